"""Scripts and notebooks edited on either side: nothing that was written is lost."""

import base64
import contextlib
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
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from report import build, notebooks, sync, tables
from report.build import Submission
from support import records
from support.records import UserError

SCRIPT, NOTEBOOK = Path("attention.py"), Path("attention.ipynb")
PATHS = {"notebook": NOTEBOOK, "script": SCRIPT}
pytestmark = pytest.mark.fault("edited script or notebook")


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """A copy of what the commands read, with one short output in each code cell."""
    folder = copy_project(tmp_path_factory.mktemp("light") / "project", "*.safetensors")
    for path in folder.glob("*.ipynb"):
        with edited_notebook(path) as notebook:
            for cell in notebook.cells:
                if cell.cell_type == "code" and "(record " not in str(cell.outputs):
                    cell.outputs = [new_output("stream", text="as run")]
    return folder


@pytest.fixture(autouse=True)
def _edited(light, tmp_path, executed, monkeypatch):
    """A fresh copy of it as the working directory, with stand-ins for slow work."""
    monkeypatch.chdir(shutil.copytree(light, tmp_path / "Übung 11 ä"))
    monkeypatch.setattr(build, "fetch", lambda *_: None)
    monkeypatch.setattr(build, "make_pdf", lambda _: None)


def report():
    build.report(Submission.of(STUDENT))


def together(keep=None):
    sync.bring_together(SCRIPT, NOTEBOOK, keep)


@contextlib.contextmanager
def refused(said):
    """Assert that something is refused, and that nothing was written."""
    before = NOTEBOOK.read_bytes(), SCRIPT.read_bytes()
    with pytest.raises(UserError, match=said) as caught:
        yield caught
    assert (NOTEBOOK.read_bytes(), SCRIPT.read_bytes()) == before


def read(path):
    return path.read_text(encoding="utf-8")


def texts_in(path):
    """Return the texts of the cells, without the empty ones."""
    return [text for _, text, _ in sync.contents(jupytext.read(path))]


def tags_of(path, text):
    cell = next(cell for cell in jupytext.read(path).cells if text in cell.source)
    return cell.metadata.get("tags", [])


def imported():
    scope = {"__name__": "attention"}
    exec(compile(read(SCRIPT), "attention.py", "exec"), scope)
    return scope


def in_a_sentence(cells, mark, place=0):
    cells[place].source += f"\n\nA sentence, {mark}: $x^2$ and *äöü*."


def in_code(cells, mark):
    cells[1].source += f"\n# {mark}"


def new_cells(cells, mark):
    function = "SCALE = 2.0\n\n\ndef helper(x):\n    return SCALE * x"
    cells.insert(1, new_markdown_cell(f"### {mark}\n\n- one\n- two"))
    cells.insert(6, new_code_cell(function))
    cells.append(new_code_cell(f'%matplotlib inline\nprint("{mark}")\n!ls'))


def deleted(cells, mark):
    cells.pop(3)
    in_a_sentence(cells, mark)


def moved(cells, mark):
    cells.insert(1, cells.pop(5))
    in_a_sentence(cells, mark)


def everywhere(cells, mark):
    for cell in cells:
        cell.source += f"\n# {mark}" if cell.cell_type == "code" else f"\n{mark}"


EDITS = [in_a_sentence, in_code, new_cells, deleted, moved, everywhere]


def plain(notebook):
    """As Jupyter without jupytext saves it."""


def vs_code(notebook):
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


def with_windows_line_ends(notebook):
    for cell in notebook.cells:
        cell.source = cell.source.replace("\n", "\r\n")


EDITORS = [plain, vs_code, colab, with_windows_line_ends]


def change(side, edit, *arguments, editor=plain):
    notebook = jupytext.read(PATHS[side])
    edit(notebook.cells, *arguments)
    if side == "script":
        SCRIPT.write_text(jupytext.writes(notebook, fmt="py:percent"), "utf-8")
        return
    editor(notebook)
    text = json.dumps(notebook, indent=2, ensure_ascii=False)
    end = "\r\n" if editor is with_windows_line_ends else "\n"
    NOTEBOOK.write_text(text, encoding="utf-8", newline=end)


def copies():
    return [read(path) for path in sync.KEPT.glob("*")]


@pytest.mark.parametrize("side", PATHS)
@pytest.mark.parametrize("edit", EDITS)
def test_no_edit_is_lost(edit, side):
    mark, number = "edited by me", EDITS.index(edit)
    before = read(SCRIPT).splitlines()
    change(side, edit, mark, editor=EDITORS[number % len(EDITORS)])
    written = texts_in(PATHS[side])
    report()
    assert mark in "".join(written)
    assert texts_in(SCRIPT) == texts_in(NOTEBOOK) == written
    now = read(SCRIPT).splitlines()
    if edit is in_code:  # and nothing else changes, no empty line either
        assert [line for line in now if mark not in line] == before
    if side == "script":
        assert copies() == []
    else:  # what was deleted is kept, too
        assert set(before) <= set("\n".join([*now, *copies()]).splitlines())


@pytest.mark.parametrize("keep", PATHS)
def test_where_both_were_edited_one_is_chosen_and_the_other_kept(keep):
    change("notebook", in_a_sentence, "mine in the notebook")
    change("script", in_a_sentence, "mine in the script", 3)
    with refused(r"KEEP=notebook or KEEP=script") as caught:
        together()
    named = re.findall(r'cell \d+ of (\S+) \(".+?"\)', str(caught.value))
    assert named == ["attention.ipynb", "attention.py"], "only what was edited there"
    together(keep)
    [copy] = copies()
    for side in PATHS:
        assert (f"mine in the {side}" in copy) == (side != keep)
        assert (f"mine in the {side}" in read(SCRIPT)) == (side == keep)
    assert texts_in(SCRIPT) == texts_in(NOTEBOOK)
    together()  # it is settled


def test_a_notebook_whose_checksum_is_gone_is_not_judged():
    with edited_notebook() as notebook:
        del notebook.metadata["provenance"]
    together()  # they agree: nothing to decide
    change("notebook", in_a_sentence, "mine")
    together()
    assert "mine" in read(SCRIPT)
    with edited_notebook() as notebook:
        del notebook.metadata["provenance"]
        notebook.cells[0].source += "\n\nMine, too."
    with refused("KEEP=script"):
        together()


@pytest.mark.parametrize("content", [b"", b"<<<<<<< HEAD", b"\xff", b'{"cells": null}'])
def test_what_is_no_notebook_is_left_as_it_is(content):
    NOTEBOOK.write_bytes(content)
    with refused("restore it, or move it away"):
        together()


def test_tags_come_from_the_script_and_importing_still_only_defines():
    for edit in (new_cells, in_code):
        change("notebook", edit, edit.__name__, editor=colab)
        together()
    assert tags_of(SCRIPT, "def helper") == []
    assert tags_of(SCRIPT, 'print("new_cells")') == ["active-ipynb"]
    for path in PATHS.values():
        assert tags_of(path, "plot_cost") == ["active-ipynb", "appendix", "timed"]
    assert "colab" not in read(SCRIPT)
    assert imported()["helper"](1) == 2.0
    with edited_notebook() as notebook:
        notebook.cells[0].metadata["tags"] = ["mine"]
    together()
    assert tags_of(SCRIPT, "# Task 1") == ["mine"]


@pytest.mark.parametrize(
    ("module", "name", "said"),
    [(notebooks, "execute", "saved while"), (sync, "_use_cells", "saved just now")],
)
def test_an_edit_in_the_meantime_is_not_overwritten(monkeypatch, module, name, said):
    replace_in(SCRIPT, "The layer", "The graded layer")
    function = getattr(module, name)

    def slowly(*arguments):
        function(*arguments)
        change("notebook", in_a_sentence, "in the meantime")

    monkeypatch.setattr(module, name, slowly)
    with pytest.raises(UserError, match=said):
        report()
    assert "in the meantime" in "".join(texts_in(NOTEBOOK))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("s = '\u2028'", "cell 5 cannot be written as part"),
        ("    def forward(:", r"cell 5 could not be imported .*line \d+"),
    ],
)
def test_what_a_script_cannot_hold_stays_in_the_notebook_until_it_can(line, said):
    with edited_notebook() as notebook:
        source = notebook.cells[4].source
        notebook.cells[4].source += "\n" + line
    with refused(said):
        together()
    with edited_notebook() as notebook:
        notebook.cells[4].source = source + "\n    # repaired"
    together()
    assert "\n    # repaired\n" in read(SCRIPT)


BLANKS = [
    new_markdown_cell("a line  \n  and another  \n  \nthe end  "),
    new_code_cell('TEXT = """a  \n   \n\tb \t"""  \nLAST = 1  '),
    new_code_cell('print("x")  \n\n  \n%matplotlib inline  '),
]


@pytest.mark.parametrize("side", PATHS)
def test_blanks_at_the_ends_of_lines_are_kept(side):
    def add(cells):
        cells[2:2] = map(nbformat.from_dict, BLANKS)

    def lessen(cells):
        for cell in cells[2:5]:
            cell.source = cell.source.replace("  \n", "\n")

    for edit in (add, lessen):
        change(side, edit)
        written = [cell.source for cell in jupytext.read(PATHS[side]).cells[2:5]]
        together()
        for path in PATHS.values():
            assert [c.source for c in jupytext.read(path).cells[2:5]] == written


def test_line_breaks_in_a_text_are_no_fault_of_the_code():
    ruff = [sys.executable, "-m", "ruff"]
    for path in sync.SCRIPTS:  # where comments aside, the formatter has the last word
        text = re.sub(r"(?m)^(#.*?) +$", r"\1", read(path))
        command = [*ruff, "format", "--check", "--stdin-filename=x.py", "-"]
        subprocess.run(command, input=text.encode(), check=True)
    change("notebook", lambda cells: cells.insert(2, BLANKS[0]))
    together()
    assert re.search(r"(?m)^# .* +$", read(SCRIPT))
    for words in (["check"], ["format", "--check"]):
        subprocess.run([*ruff, *words, "--no-cache", "."], check=True)


USES = "def masked(x):\n    return x * MASKED"


def add_code(*texts):
    with edited_notebook() as notebook:
        notebook.cells += map(new_code_cell, texts)
    together()


@pytest.mark.parametrize(
    ("new", "comments"),
    [
        (['MASKED = float("-inf")', USES], []),
        (['BASE: float = float("-inf")', "MASKED = 2 * BASE", USES], []),
        (['MASKED = float("-inf")', "def masked(x=MASKED):\n    return x"], []),
        (["MASKED = 1.0", 'MASKED = open("nowhere").read()\nprint(2)', USES], [1]),
        ([USES, "MASKED = 1.0", "%matplotlib inline", "math.pi = 3"], [2, 3]),
        (["def plot(x):\n    return x", "x = plot(1 / 0)"], [1]),
    ],
)
def test_what_defines_is_code_in_the_script_and_the_rest_is_said(capsys, new, comments):
    place = len(jupytext.read(NOTEBOOK).cells)
    add_code(*new)
    for number, text in enumerate(new):
        assert tags_of(SCRIPT, text) == ["active-ipynb"] * (number in comments)
    assert "tags=[]" not in read(SCRIPT)
    said = re.findall(r"cell (\d+) \(", capsys.readouterr().out)
    assert [int(number) - place - 1 for number in said] == comments
    scope = imported()
    if USES in new:
        assert scope["masked"](-1.0) in (-1.0, float("inf"))


def test_a_comment_becomes_code_when_code_reads_it():
    add_code('MASKED = float("-inf")')
    assert tags_of(SCRIPT, "MASKED = ") == ["active-ipynb"]
    add_code(USES)
    assert tags_of(SCRIPT, "MASKED = ") == []


def test_a_code_cell_turned_into_text_keeps_no_tag_of_code():
    with edited_notebook() as notebook:
        cell = next(c for c in notebook.cells if "plot_cost(" in c.source)
        cell["cell_type"] = "markdown"  # as JupyterLab does, with all metadata
        del cell["outputs"], cell["execution_count"]
    report()
    for path in PATHS.values():
        assert tags_of(path, cell.source) == ["appendix", "timed"]
    assert f"\n# {cell.source}\n" in read(SCRIPT)


def test_pasted_pictures_become_files_and_replace_none(capsys):
    pasted = [
        ("image.png", b"a picture", "image/png"),
        ("image.png", b"another", "image/png"),
        ("../../%C3%84%20b", b"<svg/>", "image/svg+xml"),
    ]
    with edited_notebook() as notebook:
        for name, content, kind in pasted:
            data = {kind: base64.b64encode(content).decode()}
            cell = new_markdown_cell(f"See ![x](attachment:{name}).")
            cell["attachments"] = {urllib.parse.unquote(name): data}
            notebook.cells.append(cell)
    together()
    assert capsys.readouterr().out.count("A picture pasted into attention.ipynb") == 3
    cells = jupytext.read(SCRIPT).cells[-3:]
    names = [re.search(r"\((pictures/[\w.-]+)\)", cell.source)[1] for cell in cells]
    contents = [content for _, content, _ in pasted]
    assert [Path(name).read_bytes() for name in names] == contents
    assert names[2].endswith(".svg")
    stored = jupytext.read(NOTEBOOK).cells[-3:]
    assert [cell.source for cell in stored] == [cell.source for cell in cells]
    assert not any("attachments" in cell for cell in stored)
    with edited_notebook() as notebook:
        notebook.cells[0]["attachments"] = {"x.png": {"image/png": "not base 64"}}
    with refused("cell 1: the picture 'x.png' cannot be read"):
        together()


def test_code_edited_since_execution_is_seen():
    def edited_files():
        return sync.edited_since(notebooks.read_notebook(NOTEBOOK))

    report()
    assert edited_files() == []
    replace_in(Path("support", "records.py"), "# --- Files", "# --- The files")
    replace_in(SCRIPT, "softmax(dim=-1)", "softmax(dim=-2)")
    assert edited_files() == ["support/records.py", "attention.py"]
    submission = Submission.of(STUDENT)
    rows = tables.origin(submission, map(notebooks.read_notebook, submission.notebooks))
    assert "edited since: support/records.py, attention.py" in rows[0][1]


def test_a_report_of_what_is_unchanged_leaves_the_notebooks_unchanged(monkeypatch):
    execute, times = notebooks.execute, iter(["2 ms", "3 ms", "4 ms"])

    def timed(notebook):
        return [cell for cell in notebook.cells if build.TIMED in sync.tags_of(cell)]

    def measure(notebook, name):
        execute(notebook, name)
        for cell in timed(notebook):
            cell.outputs = [new_output("stream", text=next(times))]

    monkeypatch.setattr(notebooks, "execute", measure)
    report()
    with edited_notebook() as notebook:
        notebook.metadata["provenance"]["executed"] = "long ago"
    before = NOTEBOOK.read_bytes()
    report()
    assert NOTEBOOK.read_bytes() == before
    with edited_notebook() as notebook:
        timed(notebook)[0].outputs = []  # as somebody who clears it
    report()
    assert "4 ms" in read(NOTEBOOK)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_script_as_windows_editors_save_it_is_no_edit(end):
    text = read(SCRIPT)
    SCRIPT.write_text(text, encoding="utf-8-sig", newline=end)
    ours = sync.contents(notebooks.read_script(SCRIPT))
    assert texts_in(NOTEBOOK) == [text for _, text, _ in ours]
    SCRIPT.write_text(text + "# ä\n", encoding="cp1252")
    with refused("cannot be read"):
        together()


def test_another_run_is_shown_and_what_was_injected_gets_into_no_script():
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
        cells[place].source += "\n# an edit that is not kept"
        cells[0].source += "\n\nMy sentence."
    build.store_notebooks(other)
    assert "RUN = 'mine'" not in read(Path("vision_transformer.ipynb"))
    assert read(script).replace("#\n# My sentence.\n", "") == text
    replace_in(script, "## Plots", "## The plots")
    sync.bring_together(script, path)
    sources = [cell.source for cell in jupytext.read(path).cells]
    [again] = [source for source in sources if "RUN = 'mine'" in source]
    assert "an edit that" not in again, "as the cell says"
