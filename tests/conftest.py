"""Shared by the tests: copies of the project, edits of it, the table of faults."""

import collections
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import small_run
import torch

from report import build, notebooks
from report.build import Submission
from report.pdf import make_pdf
from report.student import check_student

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(2)
# Which a job in the background ignores, and with it all processes that it starts
signal.signal(signal.SIGINT, signal.default_int_handler)


def run_script(name, *arguments, folder=ROOT, timeout=120, **environment):
    """Run a Python file as a user would; return the completed process."""
    command = [sys.executable, str(name), *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONUTF8": "1", **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
        check=False,
    )


def only_files(folder):
    """Return the files below a folder, without locks, which may be left behind."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]
    return sorted(p.relative_to(folder).as_posix() for p in files)


def replace_in(path, old, new):
    text = Path(path).read_text(encoding="utf-8")
    assert old in text
    Path(path).write_text(text.replace(old, new), encoding="utf-8")


@contextlib.contextmanager
def edited_notebook(path="attention.ipynb"):
    """Give a stored notebook to be changed; store it again as an editor does."""
    notebook = nbformat.read(path, as_version=4)
    yield notebook
    nbformat.write(notebook, path)


@pytest.fixture
def demo_data(monkeypatch):
    """Few generated images instead of CIFAR-10."""
    small_run.use_few_generated_images(monkeypatch.setattr)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


STUDENT = check_student("Müller-Lüdenscheidt", "Anna María", "12345678")


def copy_project(folder, *left_out):
    """Copy the project, without data and build products; return the folder."""
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".ipynb", ".toml") or path.name == "Makefile":
            shutil.copy(path, folder)
    ignored = shutil.ignore_patterns("*.pdf", "__pycache__", *left_out)
    for name in ("report", "support", "runs", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


@pytest.fixture(scope="session")
def reported(tmp_path_factory):
    """A copy of the project with the PDF of its stored notebooks."""
    folder = copy_project(tmp_path_factory.mktemp("reported") / "project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_pdf(Submission.of(STUDENT))
    return folder


@pytest.fixture
def project(reported, tmp_path, monkeypatch):
    """A copy of it, in a folder with spaces and umlauts, as the working directory."""
    folder = shutil.copytree(reported, tmp_path / "Übung 11 ä")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def executed(monkeypatch):
    """The names of the notebooks that were to be executed, which takes too long."""
    names = []

    def execute(notebook, name):
        names.append(name)
        notebook.metadata["provenance"] = notebooks._where_and_when()
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.execution_count = 1

    monkeypatch.setattr(notebooks, "execute", execute)
    # What it would have left
    monkeypatch.setattr(build, "_check_pictures", lambda *_: None)
    monkeypatch.setattr(Submission, "check", lambda _: None)
    return names


@pytest.fixture(scope="session")
def report_pdf(reported):
    return reported / "report" / f"{STUDENT.stem}.pdf"


# --- `make faults`: the tests marked fault(row), the slow ones included, as a table ---


def pytest_collection_modifyitems(items):
    for item in items:
        for fault in item.iter_markers("fault"):
            item.user_properties.append(("fault", fault.args[0]))


def pytest_terminal_summary(terminalreporter, config):
    if config.option.markexpr != "fault":
        return
    rows = collections.defaultdict(collections.Counter)
    for outcome in ("passed", "failed", "error", "skipped"):
        for result in terminalreporter.getreports(outcome):
            properties = dict(getattr(result, "user_properties", ()))
            if "fault" in properties:
                # A test of many cases tells how many it tried, as "cases"
                rows[properties["fault"]][outcome] += properties.get("cases", 1)
    write = terminalreporter.write_line
    write(f"\n{'case':<36}{'tried':>8}{'held':>8}{'skipped':>9}")
    for name, row in sorted(rows.items()):
        tried = row["passed"] + row["failed"] + row["error"]
        write(f"{name:<36}{tried:>8}{row['passed']:>8}{row['skipped']:>9}")
