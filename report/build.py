"""What is shown, and how notebooks and PDF of it are made."""

import ast
import contextlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import nbformat
from torchvision.datasets import CIFAR10

from report import notebooks, sync
from report.cells import captioned, is_caption, picture_in
from report.pdf import make_pdf
from report.student import Student
from report.sync import SCRIPTS, bring_together
from report.tables import printed
from support.dataset import fetch
from support.demo_data import DemoCIFAR10
from support.records import PRESETS, UserError, checksum, describe, read_history

BUILD = Path("build")
DEMO = {"dataset": DemoCIFAR10.__name__, "batch_size": 32, "n_epochs": 2}
PARAMETERS = "parameters"  # papermill's name for the cell
TIMED = "timed"  # the tag of a cell that measures, so shows something else every time
OTHER_RUN = """\
# injected: the run that was asked for; an edit of this cell is not kept
BATCH_SIZE, LR, N_EPOCHS, SEED = {batch_size}, {lr!r}, {n_epochs}, {seed}
RUN = {run!r}
print("This notebook shows another run than the one that its text reads.")\
"""
DEMO_DATA = """
from support.demo_data import DemoCIFAR10 as CIFAR10
print("DEMO DATA, generated, instead of CIFAR-10: see support/demo_data.py")\
"""


@dataclass(frozen=True)
class Submission:
    """What a command shows: decided once, handed on to notebooks, PDF and ZIP.

    ``run`` is the folder of the run, ``history`` its record. The notebooks lie in
    ``folder``: the project's if they name that run themselves, else one below build.
    """

    student: Student
    run: Path
    history: dict
    folder: Path

    @classmethod
    def of(cls, student, run=None):
        """Read the record of the run; raise ``UserError`` if there is none."""
        _, own = find_run(notebooks.read_script(SCRIPTS[1]))
        path = Path(run or own)
        if run and path.is_absolute() and path.is_relative_to(Path.cwd()):
            path = path.relative_to(Path.cwd())
        if path.is_absolute() or ".." in path.parts:
            raise UserError(
                f"RUN={path} is not in the folder of the project, and the sheet asks "
                "for relative paths: move it to runs/mine, for example, and name that"
            )
        history = read_history(path)
        describe(history)  # refuses what is no run by the recipe
        folder = Path() if path == Path(own) else BUILD / path
        is_demo = history["dataset"] != CIFAR10.__name__
        return cls(student, path, history, BUILD / "demo" if is_demo else folder)

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

    def check(self):
        """Refuse a stored notebook that shows another run, or another record of it."""
        path = self.notebooks[1]
        text = printed([notebooks.read_notebook(path)])
        shown = re.findall(r"^run: (.+) \(record (\w+)\)$", text, re.M)
        wanted = self.run.as_posix(), self.history["sha256"][:8]
        if shown != [wanted]:
            there = " and ".join(f"{run} ({record})" for run, record in shown)
            raise UserError(
                f"{path} shows {there or 'no run'}, and not {wanted[0]} ({wanted[1]}): "
                "`make report` executes it, where CIFAR-10 is in data or can be fetched"
            )


def find_run(notebook):
    """Return the place of the cell tagged ``parameters``, and the run that it names."""
    example = 'as in RUN = "runs/exercise"'
    for place, cell in enumerate(notebook.cells):
        found = re.search(r"^RUN\b.*", cell.source, re.M)
        is_code = cell.cell_type == "code"
        if found and is_code and PARAMETERS in sync.tags_of(cell):
            with contextlib.suppress(SyntaxError, ValueError, AttributeError):
                run = ast.literal_eval(ast.parse(found[0]).body[0].value)
                if isinstance(run, str):
                    return place, run
            raise UserError(
                f"{found[0].strip()!r} in the cell tagged {PARAMETERS} of {SCRIPTS[1]} "
                f"is no text in quotes, {example}"
            )
    raise UserError(
        f'no cell of {SCRIPTS[1]} has the tag "{PARAMETERS}" and gives RUN, the folder '
        f"of the run that is shown: restore it, {example}"
    )


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
        book = notebooks.read_notebook(last_stored)
        number = sync.first_not_executed(book, transformer)
        if number:
            print(f"Its cell {number} is not executed as it is now: `make zip` will")
            print("refuse it until the data set is there.")
    else:
        executed[last_stored] = _execute(submission, transformer)
    for path, notebook in executed.items():
        if checksum(path) != before[path]:
            raise UserError(
                f"{path} was saved while it was executed, and is left as it is: type "
                "the same again"
            )
        _check_pictures(notebook, path)
    for path, notebook in executed.items():
        if not _looks_the_same(notebook, path):
            notebooks.store(notebook, path)


def _looks_the_same(notebook, path):
    """Return whether a stored notebook differs in nothing but times.

    Those are when it was executed, and what a cell tagged ``timed`` measured.
    """

    def seen(book):
        facts = {**book.metadata.get("provenance", {}), "executed": ""}
        outputs = []
        for cell in book.cells:
            shown = cell.get("outputs", [])
            if TIMED in sync.tags_of(cell):
                shown = [
                    (out.output_type, sorted(out.get("data", ()))) for out in shown
                ]
            outputs.append((cell.get("execution_count"), shown))
        return facts, sync.contents(book), outputs

    return path.is_file() and seen(notebooks.read_notebook(path)) == seen(notebook)


def report(submission, keep=None):
    """Execute the notebooks, as far as there are data, and make the PDF."""
    store_notebooks(submission, keep)
    print(f"Making {submission.pdf.as_posix()} ...", flush=True)
    submission.check()
    make_pdf(submission)
    if submission.student.is_placeholder:
        print("It is a DRAFT: fill in report/student.toml, or give SURNAME= and")
        print("MATRICULATION=, to get one that can be handed in.")


def _execute(submission, script):
    """Return the notebook of a script, executed, with the run that is shown."""
    notebook = notebooks.read_script(script)
    facts = {"source": sync.cell_checksums(notebook), "code": sync.code_checksums()}
    if submission.folder != Path() and script == SCRIPTS[1]:
        _show_run(notebook, submission)
    print(f"Executing {script.stem}.ipynb ...", flush=True)
    notebooks.execute(notebook, f"{script.stem}.ipynb")
    notebook.metadata["provenance"].update(facts)
    return notebook


def _show_run(notebook, submission):
    """Give other values to the parameters, by a cell behind theirs."""
    values = OTHER_RUN.format(run=submission.run.as_posix(), **submission.history)
    cell = nbformat.v4.new_code_cell(values + DEMO_DATA * submission.demo)
    cell["id"], cell.metadata["tags"] = notebooks.INJECTED, [notebooks.INJECTED]
    notebook.cells.insert(find_run(notebook)[0] + 1, cell)


def _check_pictures(notebook, path):
    """Refuse an executed notebook of which plots are gone, for whatever reason."""
    then = {}
    if path.is_file():
        stored = notebooks.read_notebook(path)
        then = {c.source: c.outputs for c in stored.cells if c.cell_type == "code"}
    with_picture, is_told, last = captioned(notebook.cells), False, 1
    for place, cell in enumerate(notebook.cells):
        number = place + 1
        if cell.cell_type == "code":
            is_told, last = "Not shown (" in str(cell.outputs), number
            drew = any(map(picture_in, then.get(cell.source, [])))
            if drew and not is_told and not any(map(picture_in, cell.outputs)):
                raise UserError(
                    f"{path}, cell {number} draws nothing any more: let it draw, or "
                    "delete its outputs; nothing was stored"
                )
        elif is_caption(cell) and place not in with_picture and not is_told:
            raise UserError(
                f"{path}, cell {number} is a caption, but cell {last} "
                "above it shows nothing that it could belong to; nothing was stored"
            )


def demo(student, keep=None):
    """Train on generated images, and make notebooks and PDF that say so."""
    import vision_transformer  # not above: a mistake in it must not stop all commands
    from attention import choose_device

    folder = BUILD / "demo" / "run"
    for script in SCRIPTS:
        bring_together(script, BUILD / "demo" / f"{script.stem}.ipynb", keep)
    shutil.rmtree(folder, ignore_errors=True)
    settings = {**PRESETS["default"], **DEMO}
    vision_transformer.train_run(
        settings, BUILD / "demo", choose_device(), folder, DemoCIFAR10
    )
    report(Submission.of(student, folder))
    print("It shows a demo on generated images, and cannot be handed in.")
