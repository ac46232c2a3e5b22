"""The commands of the project: `python report/make.py report` is `make report`.

This file runs on any Python from 3.10 on. It makes the environment (.venv) when that
is missing or outdated, and then runs the command inside it.
"""

import contextlib
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "setup": "make the environment .venv, as every other target does by itself",
    "report": "execute both notebooks and make the PDF (trains if there is no record)",
    "notebooks": "execute and store both notebooks as they are; never trains",
    "demo": "everything live in minutes, on generated data, below build/demo",
    "test": "run all tests and the linter",
    "faults": "provoke all that can go wrong, as a table: 10 minutes",
    "zip": "make dist/Surname-MatriculationNumber.zip, ready for Moodle",
    "bench": "measure speed and memory beside other implementations, 10 minutes",
    "verify": "validate the recorded weights on the test images again",
    "readme": "renew the README's pictures and tables from report and records",
    "lab": "open JupyterLab on the notebooks",
    "clean": "remove build/, dist/ and caches; never data, .venv or training runs",
}
OPTIONS = {
    "SURNAME": "your name, instead of the one in report/student.toml",
    "GIVEN_NAME": "likewise",
    "MATRICULATION": "your matriculation number, likewise",
    "PRESET": "report: of the default run (50 epochs) or the quick one (fewer)",
    "EPOCHS": "report: train another run than the recipe's; all of it below build/",
    "BATCH_SIZE": "report: likewise",
    "LR": "report: likewise",
    "WEIGHTS": "zip: WEIGHTS=1 adds the recorded weights",
    "CPU": "setup: CPU=1 takes PyTorch without CUDA (matters on Linux only)",
    "VENV": "setup: folder of the environment, instead of .venv",
}
# What a command may raise with a message for the user, by module
EXPECTED = {
    "report.bundle": "BundleError",
    "report.identity": "IdentityError",
    "report.notebooks": "NotebookError",
    "report.pdf": "PdfError",
    "training": "TrainingError",
}
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class CommandError(Exception):
    """A command that cannot be done; the message is one sentence that says why."""


# --- The environment ----------------------------------------------------------------


def environment_folder():
    """Return the folder of the environment, as the user may have chosen it."""
    return ROOT / (os.environ.get("VENV") or ".venv")


def ensure_environment():
    """Make the environment when it is missing or outdated; return its Python."""
    if sys.version_info < (3, 10):  # noqa: UP036 - of whoever types the command
        raise CommandError(
            f"Python 3.10 or newer is needed, this is {platform.python_version()}: "
            "give another one, as in `make report PYTHON=python3.12`."
        )
    folder = environment_folder()
    windows = os.name == "nt"
    python = folder / ("Scripts/python.exe" if windows else "bin/python")
    stamp = folder / "requirements.sha256"
    requirements = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = hashlib.sha256(requirements.encode()).hexdigest()
    cpu = os.environ.get("CPU") == "1"
    found = stamp.read_text(encoding="utf-8").split() if stamp.exists() else [""]
    if python.exists() and found[0] == wanted and (not cpu or "cpu" in found):
        return python
    print(f"Setting up {folder.name}: a few minutes, once.", flush=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install"]
    # A Python that was upgraded leaves a broken environment behind: begin anew
    anew = [] if python.exists() else ["--clear"]
    _set_up([sys.executable, "-m", "venv", *anew, str(folder)])
    _set_up([*pip, "--upgrade", "pip>=25.1"])  # the first to know --group
    if cpu:
        torch = re.findall(r'"(torch(?:vision)?[<>=][^"]*)"', requirements)
        _set_up([*pip, "--index-url", CPU_INDEX, *torch])  # both from one index
    _set_up([*pip, "--group", "test"])
    stamp.write_text(wanted + " cpu" * cpu, encoding="utf-8")
    return python


def _set_up(command):
    """Run one step of the set-up; of its output, show what is downloaded."""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8", errors="replace"
    ) as process:
        for line in process.stdout:
            if line.lstrip().startswith(("Downloading", "Installing")):
                print(f"  {line.strip()[:76]}", flush=True)
    if process.returncode:
        raise CommandError(
            f"The environment could not be made ({' '.join(command[1:4])} ... failed, "
            "see above): mend the cause, or the network, and type the same again."
        )


def run_in_environment(arguments):
    """Run this file again with the environment's Python; return its exit code."""
    python = ensure_environment()
    child = {**os.environ, "PYTHONUTF8": "1"}
    child.pop("PYTHONHOME", None)
    return wait_for([str(python), str(Path(__file__).resolve()), *arguments], child)


def wait_for(command, environment=None):
    """Run a command; leave Ctrl-C to it, and return its exit code."""
    with subprocess.Popen(command, env=environment) as process:
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                return process.wait()


# --- Commands, inside the environment -------------------------------------------------


def _number(name, kind, default):
    """Read a positive number from the environment."""
    text = os.environ.get(name) or ""
    try:
        value = kind(text) if text else default
        if not 0 < value < float("inf"):
            raise ValueError
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise CommandError(
            f"{name} must be {what} above 0, for example {name}={default}, got {text!r}"
        ) from None
    return value


def settings():
    """Return the settings of the run that the command line asks for."""
    from training import DEFAULTS, PRESETS, handed_in

    own = [name for name in ("BATCH_SIZE", "LR", "EPOCHS") if os.environ.get(name)]
    preset = os.environ.get("PRESET") or ("default" if own else handed_in())
    if preset not in PRESETS:
        raise CommandError(
            f"PRESET must be one of {', '.join(PRESETS)}, got {preset!r}."
        )
    if os.environ.get("PRESET") and own:
        raise CommandError(
            f"PRESET={preset} fixes what {' and '.join(own)} would set: give either."
        )
    if not own:
        return dict(PRESETS[preset])
    return {
        **DEFAULTS,
        "batch_size": _number("BATCH_SIZE", int, DEFAULTS["batch_size"]),
        "lr": _number("LR", float, DEFAULTS["lr"]),
        "n_epochs": _number("EPOCHS", int, DEFAULTS["n_epochs"]),
    }


def student():
    """Return the checked identity, with a word about what was changed in it."""
    from report.identity import read_student

    who = read_student()
    for note in who.notes:
        print(note)
    return who


def setup():
    """Nothing is left to do once this runs in the environment."""
    print(f"{environment_folder().name} is ready.")


def report():
    """Execute both notebooks and make the PDF."""
    who = student()  # refused at once, before anything heavy is loaded

    from report import build

    build.report(settings(), who)


def notebooks():
    """Execute and store both notebooks without training."""
    from report import build

    build.store_notebooks()


def demo():
    """Run everything on generated data."""
    who = student()

    from report import build

    build.demo(who)


def test():
    """Run the tests and the linter."""
    for command in (
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["pytest"],
    ):
        print(f"$ {' '.join(command)}", flush=True)
        code = subprocess.run([sys.executable, "-m", *command], check=False).returncode
        if code:
            raise CommandError(f"{command[0]} failed (exit code {code}), see above.")


def faults():
    """Run the tests of what can go wrong, all of them."""
    table = Path("build", "faults.json")
    command = [sys.executable, "-m", "pytest", "--quiet", "--faults", str(table)]
    if wait_for(command):
        raise CommandError("Not every case is held, see above.")
    print(f"The table is in {table}, too.")


def zip():
    """Make the ZIP."""
    who = student()

    from report import bundle

    bundle.make_zip(who, weights=os.environ.get("WEIGHTS") == "1")


def bench():
    """Measure speed and memory; what that needs more is installed first."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    _set_up([*pip, "--group", "bench"])
    command = [sys.executable, str(Path("bench", "speed.py"))]
    if wait_for(command):
        raise CommandError("The benchmark failed, see above.")


def verify():
    """Validate the recorded weights."""
    command = [sys.executable, "vision_transformer.py", "--verify"]
    if subprocess.run(command, check=False).returncode:
        raise CommandError("The record could not be confirmed, see above.")


def readme():
    """Renew what the README shows of report and record."""
    who = student()

    from report import build

    build.readme(who)


def lab():
    """Open JupyterLab."""
    wait_for([sys.executable, "-m", "jupyter", "lab", "attention.ipynb"])


def clean():
    """Remove what can be made again; training runs took hours, and stay."""
    build = [path for path in ROOT.glob("build/*") if path.name != "runs"]
    others = [ROOT / name for name in ("dist", ".pytest_cache", ".ruff_cache")]
    for folder in [*build, *others]:
        shutil.rmtree(folder, ignore_errors=True)
    for cache in [*ROOT.glob("__pycache__"), *ROOT.glob("[!.]*/__pycache__")]:
        shutil.rmtree(cache, ignore_errors=True)


def usage():
    """Print the commands and options, one line each."""
    print("make TARGET [NAME=VALUE ...]    (python report/make.py does the same)\n")
    for name, what in COMMANDS.items():
        print(f"  {name:<10}{what}")
    print()
    for name, what in OPTIONS.items():
        print(f"  {name:<14}{what}")


def main(arguments):
    """Run one command; return the exit code."""
    words = [word for word in arguments if "=" not in word]
    for word in arguments:
        name, sign, value = word.partition("=")
        if sign and name not in OPTIONS:
            raise CommandError(
                f"{name} is no option; the options: {', '.join(OPTIONS)}"
            )
        if sign:
            os.environ[name] = value
    if not words or words[0] in ("help", "-h", "--help"):
        usage()
        return 0
    if len(words) > 1 or words[0] not in COMMANDS:
        raise CommandError(
            f"{' '.join(words)!r} is no command; the commands: {', '.join(COMMANDS)}"
        )
    if words[0] == "clean":
        clean()
        return 0
    os.chdir(ROOT)
    if Path(sys.prefix).resolve() != environment_folder().resolve():
        return run_in_environment(arguments)

    sys.path.insert(0, str(ROOT))
    try:
        globals()[words[0]]()
    except Exception as error:
        # Only loaded modules can have raised; importing them all takes seconds
        loaded = [name for name in EXPECTED if name in sys.modules]
        if isinstance(
            error, tuple(getattr(sys.modules[m], EXPECTED[m]) for m in loaded)
        ):
            raise CommandError(str(error)) from error
        raise
    return 0


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except CommandError as problem:
        print(f"error: {problem}", file=sys.stderr, flush=True)
        code = 1
    except KeyboardInterrupt:
        print("\nInterrupted; the same command continues.", file=sys.stderr)
        code = 130
    raise SystemExit(code)
