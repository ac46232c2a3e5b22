"""The commands of the project: `python make.py report` is `make report`.

This file runs on any Python from 3.10 on. It makes the environment (.venv) when that
is missing or outdated, and then runs the command inside it.
"""

import contextlib
import difflib
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
COMMANDS = {  # the most needed first
    "report": "execute both notebooks and make the PDF; trains nothing",
    "test": "run the tests and the linter",
    "zip": "make dist/Surname-MatriculationNumber.zip, ready for Moodle",
    "lab": "open the notebooks in JupyterLab",
    "setup": "make .venv, as the others do; UV_TORCH_BACKEND=cpu does without CUDA",
    "train": "train the run of the exercise or another, or continue it",
    "course": "execute the course's own notebook, with our classes in place of its",
    "verify": "validate recorded weights on the test images again",
    "demo": "everything live on generated images, below build/demo",
    "faults": "provoke what can go wrong, as a table",
    "bench": "measure speed and memory beside other implementations",
    "clean": "remove the demo, dist/ and caches; never data, .venv, runs or copies",
}
MAKERS = ("report", "zip", "demo")  # show a name, and write what others show
# Which commands take an option (None: all), and what it is
OPTIONS = {
    "SURNAME": (MAKERS, "instead of the one in report/student.toml"),
    "GIVEN_NAME": (MAKERS, "likewise"),
    "MATRICULATION": (MAKERS, "likewise, the matriculation number"),
    "RUN": (
        ("report", "zip", "train", "verify"),
        "folder of the run to show, to store or to validate",
    ),
    "WEIGHTS": (("zip",), "WEIGHTS=0 leaves the recorded weights out"),
    "KEEP": (None, "notebook or script: which one stays, where both were edited"),
    "NOTEBOOK": (("course",), "path of the course's notebook, as Moodle has it"),
    "PRESET": (("train",), "default (50 epochs) or quick (fewer, smaller batches)"),
    "EPOCHS": (("train", "course"), "passes over the images"),
    "BATCH_SIZE": (("train",), "images in a step"),
    "LR": (("train",), "learning rate"),
    "SEED": (("train",), "of all random numbers"),
    "VENV": (None, "folder of the environment, instead of .venv"),
}
CHOICES = {"WEIGHTS": ("1", "0"), "KEEP": ("notebook", "script")}
BACKEND = "UV_TORCH_BACKEND"  # uv's own: which build of PyTorch it takes
ANSWER_SECONDS = 60  # for a package index to answer


def fail(sentence):
    """End with one sentence that says what is wrong, and exit code 1."""
    sys.exit(f"error: {sentence}")


# --- The environment ------------------------------------------------------------------


def environment_folder():
    """Return the folder of the environment, as the user may have chosen it."""
    return ROOT / (os.environ.get("VENV") or ".venv")


def own_variables():
    """Return the environment variables of children: none leads Python elsewhere."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    # On Linux, memory in large pages: a step on a CPU, bit-identical, takes less time
    return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **kept, "PYTHONUTF8": "1"}


def ensure_environment():
    """Make the environment when it is missing or outdated; return its Python."""
    if sys.version_info < (3, 10):  # noqa: UP036 - of whoever types the command
        fail(
            f"Python 3.10 or newer is needed, this is {platform.python_version()}: "
            "give another one, as in `make report PYTHON=python3.12`."
        )
    folder = environment_folder()
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    is_broken = not python.exists()  # perhaps a Python that was upgraded
    is_other = is_broken and not (folder / "pyvenv.cfg").exists()
    if is_other and folder.exists() and any(folder.iterdir()):
        fail(f"VENV={folder} holds something else: choose an empty folder")
    stamp = folder / "requirements.sha256"
    requirements = (ROOT / "pyproject.toml").read_bytes()
    wanted = hashlib.sha256(requirements).hexdigest()
    if not is_broken and stamp.exists() and stamp.read_text("utf-8") == wanted:
        return python

    print(f"Setting up {folder.name}: a few minutes, once.", flush=True)
    clear = ["--clear"] * is_broken
    set_up("the environment", [sys.executable, "-m", "venv", *clear, str(folder)])
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install"]
    set_up("uv, which installs the rest", [*pip, "--quiet", "uv>=0.8,<1"])
    install = install_command(python, "test")
    os.environ.setdefault(BACKEND, "auto")  # which fits the driver
    if not answers([*install, "--dry-run"]):
        print("  PyTorch's index does not answer: on Linux, CUDA comes along (5 GB).")
        del os.environ[BACKEND]
    set_up("all packages", install)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def install_command(python, group):
    """Return the command that installs a group into the environment of a Python."""
    words = ["-m", "uv", "pip", "install", "--python", str(python), "--group", group]
    return [str(python), *words]


def answers(command):
    """Return whether a command succeeds, and soon, without a word."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return not call(command, capture_output=True, timeout=ANSWER_SECONDS)
    return False


def set_up(what, command):
    """Run one step of the set-up, which shows its progress by itself."""
    print(f"  {what} ...", flush=True)
    if call(command):
        fail(
            f"The environment could not be made ({' '.join(command[1:4])} ... failed, "
            "see above): put right the cause, or the network, and type the same again."
        )


def call(command, **options):
    """Run a program in the folder of this file, return its exit code."""
    options.update(cwd=ROOT, env=own_variables(), check=False)
    return subprocess.run(command, **options).returncode


def run(command):
    """Run a program, leave Ctrl-C to it, and return its exit code."""
    with subprocess.Popen(command, env=own_variables()) as process:
        for name in ("SIGTERM", "SIGHUP"):  # which would leave it alone
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), lambda *_: process.terminate())
        while process.returncode is None:
            with contextlib.suppress(KeyboardInterrupt):
                process.wait()
    number = -process.returncode
    if number <= 0:
        return process.returncode
    if number != signal.SIGINT:
        print(
            f"error: it was ended from outside ({signal.strsignal(number)}), or lacked "
            "memory: type the same again, and a training goes on from what is stored",
            file=sys.stderr,
        )
    return 128 + number  # as shells have it


# --- Commands, inside the environment -------------------------------------------------


def run_inside(name):
    """Run a command that reads the code, of which both sides are brought together."""
    from support.records import UserError, file_errors, lock

    run_of, keep = os.environ.get("RUN"), os.environ.get("KEEP")
    try:
        if name in MAKERS:
            from report.student import read_student

            student = read_student()  # refused before more is loaded
            digits = len(student.matriculation_number)
            if digits not in (7, 8):
                print(f"LMU's matriculation numbers have 7 or 8 digits, not {digits}.")
            busy = f"another {' or '.join(MAKERS)} is at work here: wait for its end"
            turn = lock(Path("build", ".lock"), busy)  # noqa: F841 - free at the end

        from report import sync

        for script in sync.SCRIPTS:
            sync.bring_together(script, script.with_suffix(".ipynb"), keep)
            if name == "lab":
                with file_errors(script):
                    os.utime(script)  # jupytext wants it to be the newer one
                continue
            try:
                compile(script.read_bytes(), script, "exec")
            except SyntaxError as error:
                fail(f"{script}, line {error.lineno}: {error.msg}")
        if name == "course":
            from report.course import run_course

            run_course(os.environ.get("NOTEBOOK"), os.environ.get("EPOCHS"))
            return 0
        if name in ("train", "verify"):
            return train_or_verify(name)
        if name not in MAKERS:
            return run_program(name)

        from report import build, bundle

        if name == "demo":
            build.demo(student, keep)
        elif name == "report":
            build.report(build.Submission.of(student, run_of), keep)
        else:
            shown = build.Submission.of(student, run_of)
            bundle.make_zip(shown, os.environ.get("WEIGHTS") != "0", keep)
    except UserError as error:
        fail(error)
    return 0


def train_or_verify(name):
    """Run train.py with the options of a command; return its exit code."""
    import train

    options = [
        f"--{option.lower().replace('_', '-')}={os.environ[option]}"
        for option, (commands, _) in OPTIONS.items()
        if name in (commands or ()) and os.environ.get(option)
    ]
    return train.main(["--verify"] * (name == "verify") + options)


def run_program(name):
    """Run a command that is another program of the environment; return its code."""
    programs = {
        "lab": [["-m", "jupyterlab", "attention.ipynb"]],
        "test": [
            ["-m", "ruff", "check", "."],
            ["-m", "ruff", "format", "--check", "."],
            ["-m", "pytest"],
        ],
        "faults": [["-m", "pytest", "--quiet", "-m", "fault"]],
        "bench": [[str(Path("bench", "speed.py"))]],
    }
    if name == "bench":  # needs more than the rest
        command = install_command(sys.executable, "bench")
        set_up("the other implementations", command)
    codes = [run([sys.executable, *command]) for command in programs[name]]
    return max(codes)  # each of them runs, whatever the others say


def clean():
    """Remove what the commands make again: no runs, copies or notebooks of runs."""
    made = ("build/demo", "dist", ".pytest_cache", ".ruff_cache", ".hypothesis")
    caches = [*ROOT.glob("__pycache__"), *ROOT.glob("[!.]*/__pycache__")]
    for path in [*(ROOT / name for name in made), *caches]:
        files = [*path.rglob("history.json"), *path.rglob("checkpoint.pt")]
        runs = {file.parent for file in files} - {ROOT / "build" / "demo" / "run"}
        if runs:
            print(f"{path} stays, as it holds a run: move {min(runs)} into runs/")
        else:
            shutil.rmtree(path, ignore_errors=True)


def usage():
    """Print the commands and options, one line each, the most needed first."""
    costs = json.loads((ROOT / "bench" / "commands.json").read_text(encoding="utf-8"))
    seconds = {entry["command"]: entry["seconds"] for entry in costs["commands"]}
    print("make COMMAND [NAME=VALUE ...]    (python make.py does the same)\n")
    for name, what in COMMANDS.items():
        cost = seconds.get(f"make {name}")
        if cost:
            what += f" ({cost} s)" if cost < 100 else f" ({cost / 60:.0f} min)"
        print(f"  {name:<11}{what}")
    print()
    for name, (commands, what) in OPTIONS.items():
        print(f"  {name:<15}{', '.join(commands or ['all commands'])}: {what}")


def meant(word, known):
    """Return what a mistyped word may have meant, else all that is known."""
    close = difflib.get_close_matches(word, known, 1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"


def main(arguments):
    """Run one command, given as on the command line; return its exit code."""
    words = [word for word in arguments if "=" not in word]
    given = dict(word.split("=", 1) for word in arguments if "=" in word)
    # make hands its own over by the environment, as a shell does what it exports
    typed = os.environ.get("MAKEFLAGS", "").partition("-- ")[2]
    names = {*given, *re.findall(r"(?:^| )([A-Za-z_]+)=", typed)} - {"PYTHON"}
    for name in names:
        if name not in OPTIONS:
            fail(f"{name!r} is no option: {meant(name.upper(), OPTIONS)}")
    os.environ.update(given)
    if not words or words[0] in ("help", "-h", "--help"):
        usage()
        return 0
    if len(words) > 1 or words[0] not in COMMANDS:
        words = " ".join(words)
        fail(f"{words!r} is no command: {meant(words.lower(), COMMANDS)}")
    [name] = words
    for option, (commands, _) in OPTIONS.items():
        if option in names and commands and name not in commands:
            fail(f"{option} is no option of {name}, but of {', '.join(commands)}")
        value = os.environ.get(option)
        # Other programs have variables of these names, too
        if value is None or not (option in names or name in (commands or ())):
            continue
        if value not in CHOICES.get(option, (value,)):
            fail(f"{option}={value} is not one of {', '.join(CHOICES[option])}")
        if not value.strip():
            fail(f"{option}= is empty: give a value, or leave it away")
    os.chdir(ROOT)
    is_inside = Path(sys.prefix).resolve() == environment_folder().resolve()
    if name == "clean":
        clean()
    elif name == "setup":
        if not is_inside:
            ensure_environment()
        print(f"{environment_folder().name} is ready.")
    elif is_inside and os.environ == own_variables():
        # Behind the standard library: a file here may have a name of its modules
        sys.path[:] = [path for path in sys.path if path != str(ROOT)]
        sys.path.insert(["-packages" in p for p in sys.path].index(True), str(ROOT))
        return run_inside(name)
    else:
        python = sys.executable if is_inside else str(ensure_environment())
        return run([python, str(Path(__file__).resolve()), *arguments])
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\nInterrupted: type the same again.", file=sys.stderr)
        sys.exit(130)
