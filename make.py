"""The commands of the project: `python make.py report` is `make report`.

This file runs on any Python from 3.10 on. It makes the environment (.venv) when that
is missing or outdated, and then runs the command inside it.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent
FIRST = {
    "report": "execute both notebooks and make the PDF; trains nothing",
    "test": "run the tests and the linter",
    "zip": "make dist/Surname-MatriculationNumber.zip, ready for Moodle",
    "lab": "open the notebooks in JupyterLab",
}
OTHERS = {
    "setup": "make the environment .venv, as every other command does by itself",
    "train": "train the run of the exercise or another, or continue it",
    "verify": "validate recorded weights on the test images again",
    "demo": "everything live on generated images, below build/demo",
    "faults": "provoke what can go wrong, as a table",
    "bench": "measure speed and memory beside other implementations",
    "clean": "remove the demo, dist/ and caches; never data, .venv, runs or copies",
}
OWN = ("report", "zip", "demo", "lab")  # not another program's alone
NAMED = ("report", "zip", "demo")  # show a name
# Which commands take an option (None: all), and what it is
OPTIONS = {
    "SURNAME": (NAMED, "instead of the one in report/student.toml"),
    "GIVEN_NAME": (NAMED, "likewise"),
    "MATRICULATION": (NAMED, "likewise, the matriculation number"),
    "RUN": (
        ("report", "zip", "train", "verify"),
        "folder of the run to show, to store or to validate",
    ),
    "WEIGHTS": (("zip",), "WEIGHTS=0 leaves the recorded weights out"),
    "KEEP": (OWN, "notebook or script: which one stays, where both were edited"),
    "PRESET": (("train",), "default (50 epochs) or quick (fewer, smaller batches)"),
    "EPOCHS": (("train",), "passes over the images"),
    "BATCH_SIZE": (("train",), "images in a step"),
    "LR": (("train",), "learning rate"),
    "SEED": (("train",), "of all random numbers"),
    "CPU": (None, "CPU=1 takes PyTorch without CUDA, as on Linux without its driver"),
    "CUDA": (None, "CUDA=1 takes it with CUDA; both matter on Linux only"),
    "VENV": (None, "folder of the environment, instead of .venv"),
}
CHOICES = {"KEEP": ("notebook", "script"), "WEIGHTS": ("0", "1")}
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
ANSWER_SECONDS = 5


def fail(sentence):
    """End with one sentence that says what is wrong, and exit code 1."""
    sys.exit(f"error: {sentence}")


# --- The environment ------------------------------------------------------------------


def environment_folder():
    """Return the folder of the environment, as the user may have chosen it."""
    return ROOT / (os.environ.get("VENV") or ".venv")


def ensure_environment():
    """Make the environment when it is missing or outdated; return its Python."""
    if sys.version_info < (3, 10):  # noqa: UP036 - of whoever types the command
        fail(
            f"Python 3.10 or newer is needed, this is {platform.python_version()}: "
            "give another one, as in `make report PYTHON=python3.12`."
        )
    folder = environment_folder()
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / "requirements.sha256"
    requirements = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = hashlib.sha256(requirements.encode()).hexdigest()
    is_broken = not python.exists()  # perhaps a Python that was upgraded
    is_environment = python.exists() or (folder / "pyvenv.cfg").exists()
    if folder.exists() and any(folder.iterdir()) and not is_environment:
        fail(f"VENV={folder} holds something else: choose an empty folder")
    is_made = stamp.exists() and stamp.read_text(encoding="utf-8") == wanted
    is_made = is_made and not is_broken
    build = asked_build()
    is_other = bool(build) and not is_broken and build_of(python) != build
    if is_made and not is_other:
        return python
    if not build and is_linux_pc() and not has_driver():
        build = "cpu"
    if build == "cpu" and not answers(f"{CPU_INDEX}/torch/"):
        print(f"{CPU_INDEX} does not answer: PyTorch comes with CUDA, 5 GB more.")
        build, is_other = "", False
        if is_made:
            return python
    clear = ["--clear"] * (is_broken or is_other)

    print(f"Setting up {folder.name}: a few minutes, once.", flush=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install"]
    set_up(
        "the environment",
        [sys.executable, "-m", "venv", *clear, str(folder)],
    )
    set_up("pip", [*pip, "--upgrade", "pip>=25.1"])  # the first to know --group
    if build == "cpu":
        torch = re.findall(r'"(torch(?:vision)?[<>=][^"]*)"', requirements)
        set_up(
            "PyTorch without CUDA, which needs an NVIDIA driver (or give CUDA=1)",
            [*pip, "--index-url", CPU_INDEX, *torch],  # both from one index
        )
    set_up(
        "all other packages" if build == "cpu" else "all packages",
        [*pip, "--group", "test"],
    )
    stamp.write_text(wanted, encoding="utf-8")
    return python


def is_linux_pc():
    """Return whether PyTorch comes in two builds for this machine."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def has_driver():
    """Return whether there is an NVIDIA driver."""
    path = Path("/proc/driver/nvidia/version")
    return path.exists() or shutil.which("nvidia-smi") is not None  # as in WSL


def asked_build():
    """Return the build of PyTorch that the user asked for: "cpu", "cuda" or ""."""
    asked = [name for name in ("cpu", "cuda") if os.environ.get(name.upper()) == "1"]
    if len(asked) > 1:
        fail("CPU=1 and CUDA=1 exclude each other")
    return asked[0] if asked and is_linux_pc() else ""


def build_of(python):
    """Return which build of PyTorch an environment holds: "cpu" or "cuda"."""
    question = "from importlib.metadata import version; print(version('torch'))"
    command = [str(python), "-c", question]
    done = subprocess.run(command, capture_output=True, check=False)
    return "cpu" if done.stdout.strip().endswith(b"+cpu") else "cuda"


def answers(url):
    """Return whether a server answers."""
    with (
        contextlib.suppress(Exception),  # whatever a network or a proxy can do
        urllib.request.urlopen(url, timeout=ANSWER_SECONDS),
    ):
        return True
    return False


def set_up(title, command):
    """Run one step of the set-up; pip itself shows its progress."""
    print(f"  {title} ...", flush=True)
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        fail(
            f"The environment could not be made ({' '.join(command[1:4])} ... failed, "
            "see above): put right the cause, or the network, and type the same again."
        )


def run(command, environment=None):
    """Run a program, leave Ctrl-C to it, and end as it did unless all went well."""
    with subprocess.Popen(command, env=environment) as process:
        while process.returncode is None:
            with contextlib.suppress(KeyboardInterrupt):
                process.wait()
    if process.returncode:
        sys.exit(process.returncode)


# --- Commands, inside the environment -------------------------------------------------


def run_program(name):
    """Run a command that is another program of the environment."""
    python = sys.executable
    options = [
        f"--{option.lower().replace('_', '-')}={os.environ[option]}"
        for option, (commands, _) in OPTIONS.items()
        if name in (commands or ()) and os.environ.get(option)
    ]
    pytest = [python, "-m", "pytest"]
    programs = {
        "test": [
            [python, "-m", "ruff", "check", "."],
            [python, "-m", "ruff", "format", "--check", "."],
            pytest,
        ],
        "train": [[python, "train.py", *options]],
        "verify": [[python, "train.py", "--verify", *options]],
        "faults": [[*pytest, "--quiet", "-m", "fault"]],
        "bench": [[python, str(Path("bench", "speed.py"))]],
    }
    if name == "bench":  # needs more than the rest
        pip = [python, "-m", "pip", "install", "--group", "bench"]
        set_up("the other implementations", pip)
    for command in programs[name]:
        run(command)


def run_own(name):
    """Run a command of this folder; say what the user can put right in a sentence."""
    from support.records import UserError

    keep, weights = os.environ.get("KEEP"), os.environ.get("WEIGHTS", "1")
    try:
        from report.student import read_student

        student = read_student()  # refused before more is loaded
        digits = len(student.matriculation_number)
        if name in NAMED and digits not in (7, 8):
            print(f"LMU's matriculation numbers have 7 or 8 digits, not {digits}.")

        from report import build, bundle, sync

        if name == "demo":
            build.demo(student, keep)
            return
        shown = build.Submission.of(student, os.environ.get("RUN"))
        if name == "report":
            build.report(shown, keep)
        elif name == "zip":
            bundle.make_zip(shown, weights == "1", keep)
        else:
            for script, notebook in shown.pairs:
                sync.bring_together(script, notebook, keep)
                os.utime(script)  # jupytext wants it to be the newer one
            run([sys.executable, "-m", "jupyter", "lab", "attention.ipynb"])
    except UserError as error:
        fail(error)


def clean():
    """Remove what the commands make again: no runs, copies or notebooks of runs."""
    made = ("build/demo", "dist", ".pytest_cache", ".ruff_cache", ".hypothesis")
    caches = [*ROOT.glob("__pycache__"), *ROOT.glob("[!.]*/__pycache__")]
    for path in [*(ROOT / name for name in made), *caches]:
        shutil.rmtree(path, ignore_errors=True)


def usage():
    """Print the commands and options, one line each, the most needed first."""
    costs = json.loads((ROOT / "bench" / "commands.json").read_text(encoding="utf-8"))
    seconds = {entry["command"]: entry["seconds"] for entry in costs["commands"]}
    print("make COMMAND [NAME=VALUE ...]    (python make.py does the same)\n")
    for commands in (FIRST, OTHERS):
        for name, what in commands.items():
            cost = seconds.get(f"make {name}")
            if cost:
                what += f" ({cost} s)" if cost < 100 else f" ({cost / 60:.0f} min)"
            print(f"  {name:<11}{what}")
        print()
    for name, (commands, what) in OPTIONS.items():
        print(f"  {name:<15}{', '.join(commands or ['all commands'])}: {what}")


def main(arguments):
    """Run one command, given as on the command line."""
    words = [word for word in arguments if "=" not in word]
    given = dict(word.split("=", 1) for word in arguments if "=" in word)
    os.environ.update(given)
    # make hands its own over by the environment, as a shell does what it exports
    typed = os.environ.get("MAKEFLAGS", "").partition("-- ")[2]
    given.update(dict.fromkeys(re.findall(r"(?:^| )([A-Za-z_]+)=", typed)))
    given.pop("PYTHON", None)
    for name in given:
        if name not in OPTIONS:
            fail(f"{name} is no option; the options: {', '.join(OPTIONS)}")
    if not words or words[0] in ("help", "-h", "--help"):
        usage()
        return
    known = {**FIRST, **OTHERS}
    if len(words) > 1 or words[0] not in known:
        fail(f"{' '.join(words)!r} is no command; the commands: {', '.join(known)}")
    [name] = words
    for option, (commands, _) in OPTIONS.items():
        if option in given and commands and name not in commands:
            fail(f"{option} is no option of {name}, but of {', '.join(commands)}")
    for option, choices in CHOICES.items():
        if os.environ.get(option, choices[0]) not in choices:
            value = f"{option}={os.environ[option]}"
            fail(f"{value} is not one of {', '.join(choices)}")
    os.chdir(ROOT)
    is_inside = Path(sys.prefix).resolve() == environment_folder().resolve()
    if name == "clean":
        clean()
    elif name == "setup":
        if not is_inside:
            ensure_environment()
        elif asked_build() not in ("", build_of(sys.executable)):
            fail("an environment cannot replace itself: `deactivate` first")
        print(f"{environment_folder().name} is ready.")
    elif not is_inside:
        child = {**os.environ, "PYTHONUTF8": "1"}
        child.pop("PYTHONHOME", None)
        command = [str(ensure_environment()), str(Path(__file__).resolve())]
        run([*command, *arguments], child)
    elif name in OWN:
        sys.path.insert(0, str(ROOT))
        run_own(name)
    else:
        run_program(name)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        print("\nInterrupted; the same command continues.", file=sys.stderr)
        sys.exit(130)
