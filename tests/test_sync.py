"""Scripts and notebooks edited on either side: nothing that was written is lost."""

import json
import random
import re
import shutil
from pathlib import Path

import jupytext
import nbformat
import pytest
from conftest import ROOT, STUDENT, edited_notebook, replace_in

import training
from report import build, bundle, make, notebooks, sync
from report.build import Submission
from training import UserError

SCRIPT, NOTEBOOK = Path("attention.py"), Path("attention.ipynb")
SIDES = make.CHOICES["KEEP"]
fault = pytest.mark.fault("edited script or notebook")


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """A copy of what the commands read, with one short output in each code cell."""
    folder = tmp_path_factory.mktemp("light") / "project"
    for path in (training.RECORD / training.HISTORY_NAME, training.FORMER):
        (folder / path).parent.mkdir(parents=True)
        shutil.copy(ROOT / path, folder / path)
    for pattern in ("*.py", "*.toml", "*.ipynb"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, folder)
    for path in folder.glob("*.ipynb"):
        with edited_notebook(path) as notebook:
            for cell in notebook.cells:
                if cell.cell_type == "code":
                    output = nbformat.v4.new_output("stream", text="as executed")
                    cell.outputs = [output]
    return folder


@pytest.fixture
def edited(light, tmp_path, monkeypatch):
    """A fresh copy of it as the working directory, with stand-ins for slow work."""
    monkeypatch.chdir(shutil.copytree(light, tmp_path / "Übung 11 ä"))

    def execute(notebook, name):
        notebook.metadata["provenance"] = notebooks._provenance()
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.execution_count = 1

    monkeypatch.setattr(notebooks, "execute", execute)
    monkeypatch.setattr(build, "fetch", lambda *_: None)
    monkeypatch.setattr(build, "use_system_fonts", lambda *_: False)
    for module in (build, bundle):
        monkeypatch.setattr(module, "make_pdf", lambda s: s.pdf.write_bytes(b"a PDF"))
    monkeypatch.setattr(bundle, "_test_as_grader", lambda *_: None)


def submission():
    return Submission.of(training.RECORD, STUDENT)


COMMANDS = {
    "report": lambda keep: build.report(submission(), keep),
    "notebooks": lambda keep: build.store_notebooks(submission(), keep),
    "zip": lambda keep: bundle.make_zip(submission(), weights=False, keep=keep),
}


def read(path):
    return path.read_text(encoding="utf-8")


def texts_in(path):
    """Return the texts of the cells, without the empty ones."""
    return [text for _, text, _ in sync.contents(jupytext.read(path))]


def tags_of(path, text):
    cell = next(cell for cell in jupytext.read(path).cells if text in cell.source)
    return cell.metadata.get("tags", [])


# --- Edits, as people make them ------------------------------------------------------


def some_cell(cells, draw, kind):
    return draw.choice([cell for cell in cells if cell.cell_type == kind])


def in_a_sentence(cells, draw, mark):
    cell = some_cell(cells, draw, "markdown")
    cell.source += f"\n\nA sentence, {mark}: $x^2$ and *äöü*."


def in_code(cells, draw, mark):
    some_cell(cells, draw, "code").source += f"\n# {mark}"


def new_cells(cells, draw, mark):
    function = (
        f'SCALE = 2.0\n\n\ndef helper(x):\n    """{mark}."""\n    return SCALE * x'
    )
    for cell in (
        nbformat.v4.new_markdown_cell(f"### {mark}\n\n- one\n- two"),
        nbformat.v4.new_code_cell(function),
        nbformat.v4.new_code_cell(f'%matplotlib inline\nprint("{mark}")\n!ls'),
    ):
        cells.insert(draw.randrange(1, len(cells) + 1), cell)


def deleted(cells, draw, mark):
    cells.remove(draw.choice(cells[1:]))
    in_a_sentence(cells, draw, mark)


def moved(cells, draw, mark):
    cell = cells.pop(draw.randrange(1, len(cells)))
    cells.insert(draw.randrange(1, len(cells) + 1), cell)
    in_a_sentence(cells, draw, mark)


def rewritten(cells, draw, mark):
    some_cell(cells, draw, "markdown").source = f"{mark}. All of this is new."


def everywhere(cells, draw, mark):
    for cell in cells:
        cell.source += f"\n# {mark}" if cell.cell_type == "code" else f"\n{mark}"


EDITS = [
    in_a_sentence,
    in_code,
    new_cells,
    deleted,
    moved,
    rewritten,
    everywhere,
]


def plain(notebook):
    """As Jupyter without jupytext saves it."""


def vs_code(notebook):
    notebook.metadata["vscode"] = {"interpreter": {"hash": "0"}}
    for cell in notebook.cells:
        cell.pop("id", None)
        cell.metadata["vscode"] = {"languageId": "python"}
    notebook.nbformat_minor = 4


def colab(notebook):
    notebook.metadata["colab"] = {"provenance": [], "toc_visible": True}
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"other-{number}"
        cell.metadata = {"id": f"x{number}", "colab": {"base_uri": "https://localhost"}}
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None


def a_later_format(notebook):
    notebook.nbformat_minor = 9


def with_windows_line_ends(notebook):
    for cell in notebook.cells:
        cell.source = cell.source.replace("\n", "\r\n")


EDITORS = [plain, vs_code, colab, a_later_format, with_windows_line_ends]


def edit_notebook(edit, draw, mark, editor=plain):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    edit(notebook.cells, draw, mark)
    editor(notebook)
    text = json.dumps(notebook, indent=2, ensure_ascii=False)
    end = "\r\n" if editor is with_windows_line_ends else "\n"
    NOTEBOOK.write_text(text, encoding="utf-8", newline=end)


def edit_script(edit, draw, mark, editor=plain):
    notebook = jupytext.read(SCRIPT)
    edit(notebook.cells, draw, mark)
    text = jupytext.writes(notebook, fmt="py:percent")
    SCRIPT.write_text(text, encoding="utf-8")


def copies():
    return [read(path) for path in sync.KEPT.glob("*")] if sync.KEPT.exists() else []


def run(command, keep=None):
    """Run a command; return whether it had something to refuse."""
    try:
        COMMANDS[command](keep)
    except UserError as error:
        assert "make report" in str(error) or "KEEP=" in str(error)
        return True
    return False


FEW = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))]


@fault
@pytest.mark.parametrize("seed", FEW)
@pytest.mark.parametrize("side", [edit_notebook, edit_script])
@pytest.mark.parametrize("edit", EDITS)
def test_no_edit_is_lost(edited, edit, side, seed):
    draw, mark = random.Random(seed), "edited by me"
    before = read(SCRIPT).splitlines()
    editor = EDITORS[(EDITS.index(edit) + seed) % len(EDITORS)]
    side(edit, draw, mark, editor)
    written = texts_in(NOTEBOOK if side is edit_notebook else SCRIPT)
    command = draw.choice(list(COMMANDS))
    was_refused = run(command, draw.choice([None, *SIDES]))  # nothing to decide
    assert not was_refused or command == "zip"
    assert mark in "".join(written)
    assert texts_in(SCRIPT) == texts_in(NOTEBOOK) == written
    now = read(SCRIPT).splitlines()
    if edit is in_code:  # and nothing else changes, no empty line either
        assert [line for line in now if mark not in line] == before
    if side is edit_script:
        assert copies() == []
    else:  # what was deleted is kept, too
        assert set(before) <= set("\n".join([*now, *copies()]).splitlines())


@fault
@pytest.mark.parametrize("keep", SIDES)
@pytest.mark.parametrize("command", COMMANDS)
def test_where_both_were_edited_one_is_chosen_and_the_other_kept(edited, command, keep):
    edit_notebook(in_a_sentence, random.Random(0), "mine in the notebook")
    edit_script(in_a_sentence, random.Random(1), "mine in the script")
    before = NOTEBOOK.read_bytes(), SCRIPT.read_bytes()
    with pytest.raises(UserError, match=r"KEEP=notebook or KEEP=script") as caught:
        COMMANDS[command](None)
    named = re.findall(r'cell \d+ of (\S+) \(".+?"\)', str(caught.value))
    assert named == ["attention.ipynb", "attention.py"], "only what was edited there"
    assert (NOTEBOOK.read_bytes(), SCRIPT.read_bytes()) == before
    assert not run(command, keep)
    [copy] = copies()
    assert ("mine in the notebook" in copy) == (keep == "script")
    assert ("mine in the script" in copy) == (keep == "notebook")
    assert f"mine in the {keep}" in read(SCRIPT)
    assert f"mine in the {keep}" in "".join(texts_in(NOTEBOOK))
    assert not run(command), "it is settled"


@fault
def test_a_notebook_whose_checksum_is_gone_is_not_judged(edited):
    with edited_notebook() as notebook:
        del notebook.metadata["provenance"]
    sync.bring_together(SCRIPT, NOTEBOOK)  # they agree: nothing to decide
    edit_notebook(in_a_sentence, random.Random(0), "mine")
    sync.bring_together(SCRIPT, NOTEBOOK)
    assert "mine" in read(SCRIPT)
    with edited_notebook() as notebook:
        del notebook.metadata["provenance"]
        notebook.cells[0].source += "\n\nMine, too."
    with pytest.raises(UserError, match="KEEP=script"):
        sync.bring_together(SCRIPT, NOTEBOOK)


@fault
@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{}", b"[]", b"<<<<<<< HEAD\n", b"\xff"),
        b'{"cells": null, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}',
    ],
)
def test_what_is_no_notebook_is_left_as_it_is(edited, content):
    NOTEBOOK.write_bytes(content)
    for command in COMMANDS.values():
        with pytest.raises(UserError, match="cannot be read as a notebook"):
            command(None)
    assert NOTEBOOK.read_bytes() == content
    COMMANDS["notebooks"]("script")
    [copy] = sync.KEPT.iterdir()
    assert copy.read_bytes() == content


@fault
def test_tags_come_from_the_script_and_importing_still_only_defines(edited):
    draw = random.Random(0)
    for edit in (new_cells, in_code):
        edit_notebook(edit, draw, edit.__name__, colab)
        sync.bring_together(SCRIPT, NOTEBOOK)
    assert tags_of(SCRIPT, "def helper") == []
    assert tags_of(SCRIPT, 'print("new_cells")') == ["active-ipynb"]
    assert tags_of(SCRIPT, "**Figure 2.**") == ["caption"]
    assert tags_of(NOTEBOOK, "**Figure 2.**") == ["caption"]
    text = read(SCRIPT)
    assert "\ndef helper(x):\n" in text
    assert '\n# print("new_cells")\n' in text
    assert "colab" not in text
    scope = {"__name__": "attention"}
    exec(compile(text, "attention.py", "exec"), scope)
    assert scope["helper"](1) == scope["SCALE"] == 2.0


@fault
def test_an_edit_while_the_notebooks_are_executed_is_not_overwritten(
    edited, monkeypatch
):
    execute = notebooks.execute

    def slowly(notebook, name):
        execute(notebook, name)
        if name == NOTEBOOK.name:
            edit_notebook(in_a_sentence, random.Random(0), "in the meantime")

    monkeypatch.setattr(notebooks, "execute", slowly)
    with pytest.raises(UserError, match="was saved while it was executed"):
        COMMANDS["report"](None)
    assert "in the meantime" in "".join(texts_in(NOTEBOOK))


@fault
def test_an_edit_while_both_are_brought_together_is_not_overwritten(
    edited, monkeypatch
):
    replace_in(SCRIPT, "The layer", "The graded layer")
    use_cells = sync._use_cells

    def slowly(*books):
        use_cells(*books)
        edit_notebook(in_a_sentence, random.Random(0), "in the meantime")

    monkeypatch.setattr(sync, "_use_cells", slowly)
    with pytest.raises(UserError, match="was saved just now"):
        COMMANDS["report"](None)
    assert "in the meantime" in "".join(texts_in(NOTEBOOK))


PASTED = nbformat.v4.new_markdown_cell("![x](attachment:x.png)")
PASTED["attachments"] = {"x.png": {"image/png": ""}}
SEPARATOR = nbformat.v4.new_code_cell("s = '\u2028'")


@fault
@pytest.mark.parametrize(
    ("cell", "said"),
    [(PASTED, "a pasted picture"), (SEPARATOR, "cannot be written as part")],
)
def test_what_a_script_cannot_hold_is_refused(edited, cell, said):
    with edited_notebook() as notebook:
        notebook.cells.append(cell)
    before = NOTEBOOK.read_bytes(), SCRIPT.read_bytes()
    with pytest.raises(UserError, match=said):
        COMMANDS["report"](None)
    assert (NOTEBOOK.read_bytes(), SCRIPT.read_bytes()) == before


@fault
def test_code_that_cannot_be_imported_stays_in_the_notebook_until_it_can(edited):
    before = read(SCRIPT)
    with edited_notebook() as notebook:
        cell = next(c for c in notebook.cells if c.source.startswith("class "))
        good = cell.source
        cell.source += "\n    def forward(:"
    with pytest.raises(UserError, match=r"cell 6 could not be imported .*line \d+"):
        COMMANDS["report"](None)
    assert read(SCRIPT) == before
    with edited_notebook() as notebook:
        notebook.cells[5].source = good + "\n    # repaired"
    COMMANDS["report"](None)
    assert "    # repaired\n" in read(SCRIPT)


@fault
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_script_as_windows_editors_save_it_is_no_edit(edited, end):
    text = read(SCRIPT)
    SCRIPT.write_text(text, encoding="utf-8-sig", newline=end)
    assert texts_in(NOTEBOOK) == [
        text for _, text, _ in sync.contents(notebooks.read_script(SCRIPT))
    ]
    SCRIPT.write_text(text + "# ä\n", encoding="cp1252")
    with pytest.raises(UserError, match="cannot be read"):
        COMMANDS["report"](None)


@fault
def test_tags_that_an_editor_dropped_come_back_and_edited_ones_stay(edited):
    with edited_notebook() as notebook:
        for cell in notebook.cells[1:]:
            cell.metadata = {}
        notebook.cells[0].metadata["tags"] = ["mine"]
    before = sync.contents(jupytext.read(SCRIPT))
    bundle.make_zip(submission(), weights=False)
    before[0][2] = ["mine"]
    assert sync.contents(jupytext.read(SCRIPT)) == before
    assert sync.contents(jupytext.read(NOTEBOOK)) == before


@fault
def test_another_run_is_shown_and_what_was_injected_gets_into_no_script(edited):
    history = {**training.read_history(ROOT / training.RECORD), "batch_size": 64}
    history["sha256"] = training._history_digest(history)
    training.write_whole(Path("mine", "history.json"), json.dumps(history).encode())
    other = Submission.of("mine", STUDENT)
    build.store_notebooks(other)
    assert other.pdf == Path("build", "mine", f"{STUDENT.stem}.pdf")
    assert submission().pdf == Path("report", f"{STUDENT.stem}.pdf")
    path, script = other.notebooks[1], Path("vision_transformer.py")
    assert path == Path("build", "mine", "vision_transformer.ipynb")
    text = read(script)
    with edited_notebook(path) as notebook:
        cells = notebook.cells
        [said] = [n for n, c in enumerate(cells) if "Another run is sh" in c.source]
        assert cells[said - 1].source.startswith("## Plots")
        assert re.search(r"batch size 128.*\n.*batch size 64", cells[said].source)
        [run_cell] = [n for n, c in enumerate(cells) if "RECORD = 'mine'" in c.source]
        assert any("SEED = 0" in cell.source for cell in cells[:run_cell])
        colab(notebook)
        cells[run_cell].source += "\n# an edit that is not kept, as the cell says"
        cells[0].source += "\n\nMy sentence."
    build.store_notebooks(other)
    assert "Another run" not in read(Path("vision_transformer.ipynb"))
    assert read(script).replace("#\n# My sentence.\n", "") == text
    cells = nbformat.read(path, as_version=4).cells
    [again] = [cell.source for cell in cells if "RECORD = 'mine'" in cell.source]
    assert "an edit that" not in again
