"""Scripts and notebooks edited on either side: nothing that was written is lost."""

import base64
import json
import re
import shutil
import subprocess
import sys
import urllib.parse
from pathlib import Path

import jupytext
import nbformat
import pytest
from conftest import ROOT, STUDENT, copy_project, edited_notebook, replace_in

from report import build, bundle, notebooks, sync
from report.build import Submission
from support import records
from support.records import UserError

SCRIPT, NOTEBOOK = Path("attention.py"), Path("attention.ipynb")
SIDES = sync.SIDES
fault = pytest.mark.fault("edited script or notebook")


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """A copy of what the commands read, with one short output in each code cell."""
    folder = copy_project(tmp_path_factory.mktemp("light") / "project", "*.safetensors")
    for path in folder.glob("*.ipynb"):
        with edited_notebook(path) as notebook:
            for cell in notebook.cells:
                if cell.cell_type == "code" and "(record " not in str(cell.outputs):
                    output = nbformat.v4.new_output("stream", text="as executed")
                    cell.outputs = [output]
    return folder


@pytest.fixture
def edited(light, tmp_path, executed, monkeypatch):
    """A fresh copy of it as the working directory, with stand-ins for slow work."""
    monkeypatch.chdir(shutil.copytree(light, tmp_path / "Übung 11 ä"))
    monkeypatch.setattr(build, "fetch", lambda *_: None)
    for module in (build, bundle):
        monkeypatch.setattr(
            module, "make_pdf", lambda s: s.pdf.write_bytes(b"a PDF") * []
        )
    monkeypatch.setattr(bundle, "_test_as_grader", lambda *_: None)


def submission():
    return Submission.of(STUDENT)


COMMANDS = {
    "report": lambda keep: build.report(submission(), keep),
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


def in_a_sentence(cells, mark, place=0):
    cells[place].source += f"\n\nA sentence, {mark}: $x^2$ and *äöü*."


def in_code(cells, mark):
    cells[1].source += f"\n# {mark}"


def new_cells(cells, mark):
    function = "SCALE = 2.0\n\n\ndef helper(x):\n    return SCALE * x"
    cells.insert(1, nbformat.v4.new_markdown_cell(f"### {mark}\n\n- one\n- two"))
    cells.insert(6, nbformat.v4.new_code_cell(function))
    cells.append(nbformat.v4.new_code_cell(f'%matplotlib inline\nprint("{mark}")\n!ls'))


def deleted(cells, mark):
    cells.pop(3)
    in_a_sentence(cells, mark)


def moved(cells, mark):
    cells.insert(1, cells.pop(5))
    in_a_sentence(cells, mark)


def rewritten(cells, mark):
    cells[3].source = f"{mark}. All of this is new."


def everywhere(cells, mark):
    for cell in cells:
        cell.source += f"\n# {mark}" if cell.cell_type == "code" else f"\n{mark}"


EDITS = [in_a_sentence, in_code, new_cells, deleted, moved, rewritten, everywhere]


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


def edit_notebook(edit, mark, editor=plain):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    edit(notebook.cells, mark)
    editor(notebook)
    text = json.dumps(notebook, indent=2, ensure_ascii=False)
    end = "\r\n" if editor is with_windows_line_ends else "\n"
    NOTEBOOK.write_text(text, encoding="utf-8", newline=end)


def edit_script(edit, mark, editor=plain):
    notebook = jupytext.read(SCRIPT)
    edit(notebook.cells, mark)
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


@fault
@pytest.mark.parametrize("side", [edit_notebook, edit_script])
@pytest.mark.parametrize("edit", EDITS)
def test_no_edit_is_lost(edited, edit, side):
    mark, number = "edited by me", EDITS.index(edit)
    before = read(SCRIPT).splitlines()
    side(edit, mark, EDITORS[number % len(EDITORS)])
    written = texts_in(NOTEBOOK if side is edit_notebook else SCRIPT)
    command = list(COMMANDS)[number % len(COMMANDS)]
    was_refused = run(command, "script" if number % 2 else None)  # nothing to decide
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
    edit_notebook(in_a_sentence, "mine in the notebook")
    edit_script(lambda *given: in_a_sentence(*given, place=3), "mine in the script")
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
    edit_notebook(in_a_sentence, "mine")
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
        *(b"", b"<<<<<<< HEAD\n", b"\xff"),
        b'{"cells": null, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}',
    ],
)
def test_what_is_no_notebook_is_left_as_it_is(edited, content):
    NOTEBOOK.write_bytes(content)
    for command in COMMANDS.values():
        with pytest.raises(UserError, match="restore it, or move it away"):
            command(None)
    assert NOTEBOOK.read_bytes() == content


@fault
def test_tags_come_from_the_script_and_importing_still_only_defines(edited):
    for edit in (new_cells, in_code):
        edit_notebook(edit, edit.__name__, colab)
        sync.bring_together(SCRIPT, NOTEBOOK)
    assert tags_of(SCRIPT, "def helper") == []
    assert tags_of(SCRIPT, 'print("new_cells")') == ["active-ipynb"]
    assert tags_of(SCRIPT, "plot_cost") == ["active-ipynb", "appendix"]
    assert tags_of(NOTEBOOK, "plot_cost") == ["active-ipynb", "appendix"]
    text = read(SCRIPT)
    assert "\ndef helper(x):\n" in text
    assert '\n# print("new_cells")\n' in text
    assert "colab" not in text
    scope = {"__name__": "attention"}
    exec(compile(text, "attention.py", "exec"), scope)
    assert scope["helper"](1) == scope["SCALE"] == 2.0
    with edited_notebook() as notebook:
        notebook.cells[0].metadata["tags"] = ["mine"]
    sync.bring_together(SCRIPT, NOTEBOOK)
    assert tags_of(SCRIPT, "# Task 1") == ["mine"]


@fault
@pytest.mark.parametrize(
    ("module", "name", "said"),
    [
        (notebooks, "execute", "was saved while it was executed"),
        (sync, "_use_cells", "was saved just now"),
    ],
)
def test_an_edit_in_the_meantime_is_not_overwritten(
    edited, monkeypatch, module, name, said
):
    replace_in(SCRIPT, "The layer", "The graded layer")
    function = getattr(module, name)

    def slowly(*arguments):
        function(*arguments)
        edit_notebook(in_a_sentence, "in the meantime")

    monkeypatch.setattr(module, name, slowly)
    with pytest.raises(UserError, match=said):
        COMMANDS["report"](None)
    assert "in the meantime" in "".join(texts_in(NOTEBOOK))


@fault
@pytest.mark.parametrize("source", ["s = '\u2028'", "x = 1\n# %% y"])
def test_what_a_script_cannot_hold_is_refused(edited, source):
    with edited_notebook() as notebook:
        notebook.cells.append(nbformat.v4.new_code_cell(source))
        number = len(notebook.cells)
    before = NOTEBOOK.read_bytes(), SCRIPT.read_bytes()
    with pytest.raises(UserError, match=f"cell {number} cannot be written as part"):
        COMMANDS["report"](None)
    assert (NOTEBOOK.read_bytes(), SCRIPT.read_bytes()) == before


BLANKS = [
    nbformat.v4.new_markdown_cell("a line  \n  and another  \n  \nthe end  "),
    nbformat.v4.new_code_cell('TEXT = """a  \n   \n\tb \t"""  \nLAST = 1  '),
    nbformat.v4.new_code_cell('print("x")  \n\n  \n%matplotlib inline  '),
]


@fault
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("cell", BLANKS)
def test_blanks_at_the_ends_of_lines_are_kept(edited, cell, side):
    def add(cells, _):
        cells.insert(2, nbformat.from_dict(cell))

    def change(cells, _):
        cells[2].source = cells[2].source.replace("  \n", "\n")

    edit = {"notebook": edit_notebook, "script": edit_script}[side]
    for function in (add, change):
        edit(function, "")
        written = jupytext.read({"notebook": NOTEBOOK, "script": SCRIPT}[side]).cells
        sync.bring_together(SCRIPT, NOTEBOOK)
        for path in (SCRIPT, NOTEBOOK):
            assert jupytext.read(path).cells[2].source == written[2].source


@fault
def test_line_breaks_in_a_text_are_no_fault_of_the_code(edited):
    ruff = [sys.executable, "-m", "ruff"]
    for path in sync.SCRIPTS:  # where comments aside, the formatter has the last word
        text = re.sub(r"(?m)^(#.*?) +$", r"\1", read(path))
        command = [*ruff, "format", "--check", "--stdin-filename=x.py", "-"]
        subprocess.run(command, input=text.encode(), check=True)
    edit_notebook(lambda cells, _: cells.insert(2, BLANKS[0]), "")
    sync.bring_together(SCRIPT, NOTEBOOK)
    assert re.search(r"(?m)^# .* +$", read(SCRIPT))
    for words in (["check"], ["format", "--check"]):
        subprocess.run([*ruff, *words, "--no-cache", "."], check=True)


USES = "def masked(x):\n    return x * MASKED"


@fault
@pytest.mark.parametrize(
    ("new", "comments"),
    [
        (['MASKED = float("-inf")', USES], []),
        ([USES, 'HALF, MASKED = 0.5, float("-inf")'], []),
        (['BASE: float = float("-inf")', "MASKED = 2 * BASE", USES], []),
        (['MASKED = float("-inf")', "def masked(x=MASKED):\n    return x"], []),
        (["MASKED = 1.0", 'MORE = open("nowhere").read()', USES], [1]),
        (["MASKED = 1.0", 'MASKED = open("nowhere").read()\nprint(2)', USES], [1]),
        ([USES, "MASKED = 1.0", "%matplotlib inline", "math.pi = 3"], [2, 3]),
        (["def plot(x):\n    return x", "x = plot(1 / 0)"], [1]),
    ],
)
def test_what_defines_is_code_in_the_script_and_the_rest_is_said(
    edited, capsys, new, comments
):
    place = len(nbformat.read(NOTEBOOK, as_version=4).cells)
    with edited_notebook() as notebook:
        notebook.cells += map(nbformat.v4.new_code_cell, new)
    sync.bring_together(SCRIPT, NOTEBOOK)
    for number, text in enumerate(new):
        assert tags_of(SCRIPT, text) == ["active-ipynb"] * (number in comments)
    assert "tags=[]" not in read(SCRIPT)
    said = re.findall(r"cell (\d+) \(", capsys.readouterr().out)
    assert [int(number) - place - 1 for number in said] == comments
    scope = {"__name__": "attention"}
    exec(compile(read(SCRIPT), "attention.py", "exec"), scope)
    if USES in new:
        assert scope["masked"](-1.0) in (-1.0, float("inf"))


@fault
def test_a_comment_becomes_code_when_code_reads_it(edited):
    for text in ('MASKED = float("-inf")', USES):
        with edited_notebook() as notebook:
            notebook.cells.append(nbformat.v4.new_code_cell(text))
        sync.bring_together(SCRIPT, NOTEBOOK)
        expected = ["active-ipynb"] if text != USES else []
        assert tags_of(SCRIPT, "MASKED = ") == expected


@fault
def test_a_code_cell_turned_into_text_keeps_no_tag_of_code(edited):
    with edited_notebook() as notebook:
        cell = next(c for c in notebook.cells if "plot_cost(" in c.source)
        cell["cell_type"] = "markdown"  # as JupyterLab does, with all metadata
        del cell["outputs"], cell["execution_count"]
        source = cell.source
    assert not run("report")
    for path in (SCRIPT, NOTEBOOK):
        assert tags_of(path, source) == ["appendix"]
        assert source in texts_in(path)
    assert f"\n# {source}\n" in read(SCRIPT)


def pasted(name, content=b"a picture", kind="image/png"):
    cell = nbformat.v4.new_markdown_cell(f"See ![x](attachment:{name}).")
    data = base64.b64encode(content).decode()
    cell["attachments"] = {urllib.parse.unquote(name): {kind: data}}
    return cell


@fault
def test_pasted_pictures_become_files_and_replace_none(edited, capsys):
    with edited_notebook() as notebook:
        notebook.cells += [
            pasted("image.png"),
            pasted("image.png", b"another"),
            pasted("../../%C3%84%20b", b"<svg/>", "image/svg+xml"),
        ]
        notebook.cells[0].source += "\n"
    sync.bring_together(SCRIPT, NOTEBOOK)
    cells = jupytext.read(SCRIPT).cells[-3:]
    assert capsys.readouterr().out.count("A picture pasted into attention.ipynb") == 3
    names = [re.search(r"\((pictures/[\w.-]+)\)", cell.source)[1] for cell in cells]
    assert [Path(name).read_bytes() for name in names] == [
        *(b"a picture", b"another", b"<svg/>")
    ]
    assert names[2].endswith(".svg")
    stored = nbformat.read(NOTEBOOK, as_version=4).cells[-3:]
    assert [cell.source for cell in stored] == [cell.source for cell in cells]
    assert not any("attachments" in cell for cell in stored)
    before = NOTEBOOK.read_bytes(), SCRIPT.read_bytes()
    sync.bring_together(SCRIPT, NOTEBOOK)
    assert (NOTEBOOK.read_bytes(), SCRIPT.read_bytes()) == before, "it is settled"
    with edited_notebook() as notebook:
        notebook.cells.append(pasted("x.png"))
        notebook.cells[-1].attachments = {"x.png": {"image/png": "not base 64"}}
        number = len(notebook.cells)
    before = NOTEBOOK.read_bytes(), SCRIPT.read_bytes()
    with pytest.raises(UserError, match=f"cell {number}: the picture 'x.png' cannot"):
        sync.bring_together(SCRIPT, NOTEBOOK)
    assert (NOTEBOOK.read_bytes(), SCRIPT.read_bytes()) == before


@fault
def test_code_edited_since_execution_is_seen(edited):
    def edited_files():
        return sync.edited_since(notebooks.read_notebook(NOTEBOOK))

    build.report(submission())
    assert edited_files() == []
    replace_in(Path("support", "records.py"), "# --- Files", "# --- The files")
    replace_in(SCRIPT, "softmax(dim=-1)", "softmax(dim=-2)")
    assert edited_files() == ["support/records.py", "attention.py"]


@fault
def test_code_that_cannot_be_imported_stays_in_the_notebook_until_it_can(edited):
    before = read(SCRIPT)
    with edited_notebook() as notebook:
        cell = next(c for c in notebook.cells if c.source.startswith("class "))
        good = cell.source
        cell.source += "\n    def forward(:"
    with pytest.raises(UserError, match=r"cell 5 could not be imported .*line \d+"):
        COMMANDS["report"](None)
    assert read(SCRIPT) == before
    with edited_notebook() as notebook:
        notebook.cells[4].source = good + "\n    # repaired"
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
def test_another_run_is_shown_and_what_was_injected_gets_into_no_script(edited):
    history = {**records.read_history(ROOT / records.RECORD), "batch_size": 64}
    history["sha256"] = records.history_digest(history)
    records.write_whole(Path("mine", "history.json"), json.dumps(history).encode())
    other = Submission.of(STUDENT, "mine")
    assert other.folder == Path("build", "mine")
    build.store_notebooks(other)
    path, script = other.notebooks[1], Path("vision_transformer.py")
    text = read(script)
    with edited_notebook(path) as notebook:
        cells = notebook.cells
        [place] = [n for n, c in enumerate(cells) if "RUN = 'mine'" in c.source]
        assert "parameters" in cells[place - 1].metadata["tags"]
        colab(notebook)
        cells[place].source += "\n# an edit that is not kept, as the cell says"
        cells[0].source += "\n\nMy sentence."
    build.store_notebooks(other)
    assert "RUN = 'mine'" not in read(Path("vision_transformer.ipynb"))
    assert read(script).replace("#\n# My sentence.\n", "") == text
    cells = nbformat.read(path, as_version=4).cells
    [again] = [cell.source for cell in cells if "RUN = 'mine'" in cell.source]
    assert "an edit that" not in again
    replace_in(script, "## Plots", "## The plots")
    sync.bring_together(script, path)
    texts = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    assert sum("RUN = 'mine'" in text for text in texts) == 1, "it stays"
