"""What is shown, and how notebooks and PDF of it are made."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import nbformat
from torchvision.datasets import CIFAR10

from report import notebooks
from report.pdf import make_pdf
from report.student import Student
from report.sync import (
    SCRIPTS,
    bring_together,
    cell_checksums,
    code_checksums,
    first_not_executed,
)
from support.dataset import fetch
from support.demo_data import DemoCIFAR10
from support.records import (
    HISTORY_NAME,
    PRESETS,
    RECORD,
    UserError,
    checksum,
    describe,
    read_history,
)

BUILD = Path("build")
DEMO = {"dataset": DemoCIFAR10.__name__, "batch_size": 32, "n_epochs": 2}
RUN_CELL = """\
# injected: the run that this notebook shows; an edit of this cell is not kept
BATCH_SIZE, LR, N_EPOCHS, SEED = {batch_size}, {lr!r}, {n_epochs}, {seed}
RECORD = {record!r}\
"""
DEMO_CELL = """\
# injected: DEMO DATA, generated, instead of CIFAR-10: see support/demo_data.py
from support.demo_data import DemoCIFAR10 as CIFAR10\
"""
OTHER_RUN = """\
<!-- injected; an edit of this cell is not kept -->
**Another run is shown here than the one that the text reads.** The text was written for
the recorded run of the exercise ({written_for}). The figures and tables show
{shown}, and may contradict it.\
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
    def pairs(self):
        """Both scripts, each with the path of its notebook."""
        return [(path, self.folder / f"{path.stem}.ipynb") for path in SCRIPTS]

    @property
    def notebooks(self):
        """The paths of both notebooks."""
        return [notebook for _, notebook in self.pairs]

    @property
    def pdf(self):
        """The path of the PDF."""
        folder = Path("report") if self.folder == Path() else self.folder
        return folder / f"{'DEMO-' * self.demo}{self.student.stem}.pdf"


def store_notebooks(submission, keep=None):
    """Execute the notebooks, neither of which trains, and store them: all or none.

    What was edited is brought together first, see ``sync.bring_together``. Without the
    data set, good outputs of the Vision Transformer would be lost, so they are kept.
    """
    for script, notebook in submission.pairs:
        bring_together(script, notebook, keep)
    (attention, stored), (transformer, last_stored) = submission.pairs
    before = {path: checksum(path) for path in submission.notebooks}
    executed = {stored: _execute(submission, attention)}
    try:
        if not submission.demo:
            fetch(CIFAR10, "data")
    except UserError as error:
        if not last_stored.is_file():
            raise
        print(f"{error}\n\nSo {last_stored} is taken with the outputs it has.")
        number = first_not_executed(notebooks.read_notebook(last_stored), transformer)
        if number:
            print(f"Its cell {number} is not executed as it is now: `make zip` will")
            print("refuse it until the data set is there.")
    else:
        executed[last_stored] = _execute(submission, transformer)
    for path in executed:
        if checksum(path) != before[path]:
            raise UserError(
                f"{path} was saved while it was executed, and is left as it is: type "
                "the same again"
            )
    for path, notebook in executed.items():
        notebooks.store(notebook, path)


def report(submission, keep=None):
    """Execute the notebooks, as far as there are data, and make the PDF."""
    store_notebooks(submission, keep)
    print(f"Making {submission.pdf.as_posix()} ...", flush=True)
    make_pdf(submission)
    if submission.student.is_placeholder:
        print("It is a DRAFT: fill in report/student.toml, or give SURNAME= and")
        print("MATRICULATION=, to get one that can be handed in.")


def _execute(submission, script):
    """Return the notebook of a script, executed, with the run that is shown."""
    notebook = notebooks.read_script(script)
    facts = {"source": cell_checksums(notebook), "code": code_checksums()}
    if script == SCRIPTS[1]:
        facts["record"] = checksum(submission.run / HISTORY_NAME)
        if submission.folder != Path():
            _inject_run(notebook, submission)
    print(f"Executing {script.stem}.ipynb ...", flush=True)
    notebooks.execute(notebook, f"{script.stem}.ipynb")
    notebook.metadata["provenance"].update(facts)
    return notebook


def _inject_run(notebook, submission):
    """Let a notebook show the run, and say that its text reads another."""
    source = RUN_CELL.format(record=submission.run.as_posix(), **submission.history)
    notebooks.inject(notebook, nbformat.v4.new_code_cell(source), "RECORD = ")
    if submission.demo:
        cell = nbformat.v4.new_code_cell(DEMO_CELL)
        notebooks.inject(notebook, cell, "DATASET_CACHE_DIR = ")
    text = OTHER_RUN.format(
        written_for=describe(PRESETS["default"]), shown=describe(submission.history)
    )
    cell = nbformat.v4.new_markdown_cell(text)
    notebooks.inject(notebook, cell, "## Plots")


def demo(student, keep=None):
    """Train on generated images, and make notebooks and PDF that say so."""
    import vision_transformer  # not above: a mistake in it must not stop all commands
    from attention import choose_device

    for script in SCRIPTS:
        bring_together(script, BUILD / "demo" / f"{script.stem}.ipynb", keep)
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
    print("It shows a demo on generated images, and cannot be handed in.")
