"""What is shown, and how notebooks and PDF of it are made."""

import contextlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from torchvision.datasets import CIFAR10

import vision_transformer
from attention import choose_device
from report import notebooks
from report.demo import DemoCIFAR10
from report.identity import Student
from report.pdf import make_pdf, use_system_fonts
from training import (
    ARCHIVE_MD5,
    HISTORY_NAME,
    PRESETS,
    RECORD,
    UserError,
    checksum,
    describe,
    fetch,
    finished,
    is_present,
    read_history,
)

ATTENTION, TRANSFORMER = Path("attention.ipynb"), Path("vision_transformer.ipynb")
BUILD = Path("build")
DEMO = {"dataset": DemoCIFAR10.__name__, "batch_size": 32, "n_epochs": 3}
RUN_CELL = """\
# The run that this notebook shows
BATCH_SIZE, LR, N_EPOCHS, SEED = {batch_size}, {lr!r}, {n_epochs}, {seed}
RECORD = {record!r}\
"""
DEMO_CELL = """\
# DEMO DATA, generated, instead of CIFAR-10: see report/demo.py
from report.demo import DemoCIFAR10 as CIFAR10

DATASET_CACHE_DIR = "build/demo"

"""


@dataclass(frozen=True)
class Submission:
    """What a command shows: decided once, handed on to notebooks, PDF and ZIP.

    ``run`` is the folder of the run and ``history`` its record; ``folder`` is where the
    notebooks lie: here for the run that is handed in by default, below ``build`` for
    any other.
    """

    student: Student
    run: Path
    history: dict
    folder: Path

    @classmethod
    def of(cls, run, student):
        """Read the record in a folder; raise ``UserError`` if there is none."""
        run, history = Path(run).resolve(), read_history(run)
        if run.is_relative_to(Path.cwd()):
            run = run.relative_to(Path.cwd())
        describe(history)  # refuses what is no run by the recipe
        folder = Path() if run == RECORD else BUILD / run.name
        if history["dataset"] != CIFAR10.__name__:
            folder = BUILD / "demo"
        return cls(student, run, history, folder)

    @property
    def demo(self):
        """Whether something else than CIFAR-10 was trained on."""
        return self.history["dataset"] != CIFAR10.__name__

    @property
    def notebooks(self):
        """The paths of both notebooks."""
        return self.folder / ATTENTION, self.folder / TRANSFORMER

    @property
    def pdf(self):
        """The path of the PDF."""
        folder = Path("report") if self.folder == Path() else self.folder
        return folder / f"{'DEMO-' * self.demo}{self.student.stem}.pdf"


def store_notebooks(submission, needs_data=True):
    """Execute the notebooks, neither of which trains, and store them: all or none.

    Without the data set, good outputs of the Vision Transformer would be lost. So they
    are kept or, if it ``needs_data``, all is refused. Returns what is executed.
    """
    executed = {ATTENTION: _execute(submission, ATTENTION)}
    try:
        if not submission.demo:
            fetch(CIFAR10, "data")
    except UserError as error:
        stored = submission.notebooks[1]
        if needs_data or not stored.is_file():
            raise
        print(f"{error}\n\nSo {stored} is taken with the outputs it has.")
    else:
        executed[TRANSFORMER] = _execute(submission, TRANSFORMER)
    for name, notebook in executed.items():
        notebooks.store(notebook, submission.folder / name)
    return list(executed)


def report(submission):
    """Execute the notebooks, as far as there are data, and make the PDF."""
    use_system_fonts(submission.student)  # a name that cannot be printed: refused now
    live = store_notebooks(submission, needs_data=False)
    with _announced(f"Making {submission.pdf.as_posix()}"):
        make_pdf(submission, _provenance(submission, live))
    if submission.student.is_placeholder:
        print("It is a DRAFT: fill in report/student.toml, or give SURNAME= and")
        print("MATRICULATION=, to get one that can be handed in.")


def _execute(submission, name):
    """Return one of the notebooks, executed, with the run that is shown."""
    notebook = notebooks.read_script(name.with_suffix(".py"))
    if name == TRANSFORMER and submission.folder != Path():
        record = submission.run.as_posix()
        cell = RUN_CELL.format(record=record, **submission.history)
        notebooks.inject(notebook, DEMO_CELL * submission.demo + cell)
    with _announced(f"Executing {name}"):
        notebooks.execute(notebook, name)
    if name == TRANSFORMER:
        shown = checksum(submission.run / HISTORY_NAME)
        notebook.metadata["provenance"]["record"] = shown
    return notebook


def demo(student):
    """Train on generated images, and make notebooks and PDF that say so."""
    folder = BUILD / "demo" / "run"
    shutil.rmtree(folder, ignore_errors=True)
    with mock.patch.object(vision_transformer, "CIFAR10", DemoCIFAR10):
        vision_transformer.train_run(
            {**PRESETS["default"], **DEMO},
            cache_dir=BUILD / "demo",
            device=choose_device(),
            folder=folder,
        )
    report(Submission.of(folder, student))


def _provenance(submission, live):
    """Return the rows of the first page on what was executed, where and when."""
    rows = []
    for path in submission.notebooks:
        is_live = Path(path.name) in live
        how = "executed live" if is_live else "outputs as recorded"
        facts = notebooks.read_notebook(path).metadata.get("provenance")
        if facts:
            how += (
                f" on {facts['executed']}: {facts['system']}, Python "
                f"{facts['python']}, torch {facts['torch']}"
            )
        if not is_live and notebooks.differences(path.with_suffix(".py").name, path):
            how += f"; {path.stem}.py was edited since"
        rows.append([path.name, how])
    history = submission.history
    data = "not at hand when the report was made"
    if submission.demo:
        data = "generated images, see report/demo.py"
    elif is_present(CIFAR10, "data"):
        data = f"CIFAR-10, all files intact; MD5 of the archive: {ARCHIVE_MD5}"
    return [
        *rows,
        [
            "training",
            f"{describe(history)}: {finished(history)}, {history['machine']}, torch "
            f"{history['versions']['torch']}",
        ],
        ["data set", data],
    ]


@contextlib.contextmanager
def _announced(what):
    print(f"{what} ...", flush=True)
    start = time.perf_counter()
    yield
    print(f"  done in {time.perf_counter() - start:.0f} s", flush=True)
