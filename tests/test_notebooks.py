"""Notebooks: paired with their scripts, executed whole, stored clean."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jupytext
import nbformat
import pytest
from conftest import ROOT

from report import notebooks, pairs
from training import UserError

NAMES = ("attention", "vision_transformer")


@pytest.mark.parametrize("name", NAMES)
def test_script_and_notebook_hold_the_same_cells(name):
    found = pairs.differences(ROOT / f"{name}.py", ROOT / f"{name}.ipynb")
    assert found == [], f"run `make report`, or `make notebooks`: {found}"


def test_drift_is_noticed(project):
    for name in NAMES:
        script = project / f"{name}.py"
        text = script.read_text(encoding="utf-8")
        script.write_text(text.replace("# ## Unit tests", "# ## Tests"), "utf-8")
        assert pairs.differences(script, project / f"{name}.ipynb")


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs_are_clean(name):
    notebook = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "executed from top to bottom"
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert not [o for o in outputs if o.get("name") == "stderr"]
    text = json.dumps(outputs)
    for debris in ("widget-view", "model_id", "it/s", "step/s", "Warning", "\\u001b"):
        assert debris not in text
    assert not re.search(r"site-packages|/home/|/Users/|[A-Z]:\\\\", text)
    assert str(ROOT) not in text


def test_the_skeleton_s_order_is_kept():
    cells = notebooks.read_script(ROOT / "vision_transformer.py").cells
    text = [cell.source for cell in cells]

    def first(marker):
        return next(number for number, source in enumerate(text) if marker in source)

    order = [
        "# Task 2",
        "## Imports and device",
        "class ResidualModule",
        "class FeedForwardBlock",
        "class SelfAttentionTransformerBlock",
        "class VisionTransformer",
        "run_unit_tests(*UNIT_TESTS)",
        "N_EPOCHS = 50",
        "def train(",
        "figures.plot_training(",
        "## The recorded weights",
    ]
    places = [first(marker) for marker in order]
    assert places == sorted(places)
    parameters = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    assert len(parameters) == 1
    assert len(parameters[0].source.splitlines()) == 4


@pytest.mark.parametrize("name", NAMES)
def test_a_cell_holds_one_class_and_notebook_only_cells_are_short(name):
    for cell in notebooks.read_script(ROOT / f"{name}.py").cells:
        if cell.cell_type == "code":
            assert len(re.findall(r"^class \w", cell.source, re.M)) <= 1
            if "active-ipynb" in cell.metadata.get("tags", []):
                assert len(cell.source.splitlines()) <= 8


def test_a_cell_by_itself_lints():
    """Cells that are comments in the script are code, too."""
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache"]
        + ["--select", "F,E9"]
        + [str(ROOT / f"{name}.ipynb") for name in NAMES],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stdout


# --- Executing -----------------------------------------------------------------------


def notebook_of(*sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    return nbformat.v4.new_notebook(cells=cells)


@pytest.mark.fault("failing notebook cell")
def test_a_failing_cell_is_named():
    notebook = notebook_of("a = 1", "b = 2\n\nb / 0  # here\n")
    with pytest.raises(UserError) as caught:
        notebooks.execute(notebook, "x.ipynb", timeout=60)
    assert str(caught.value) == (
        "x.ipynb, cell 2, line 3:\n    b / 0  # here\n"
        "ZeroDivisionError: division by zero"
    )


@pytest.mark.fault("failing notebook cell")
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import time\ntime.sleep(60)", "it took longer than 3 s"),
        ("while True: pass", "it took longer than 3 s"),
        ("import os\nos._exit(1)", "the kernel died"),
        ("import os\nos.kill(os.getpid(), 9)", "the kernel died"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("1 +", "SyntaxError: invalid syntax"),
        ("raise ValueError('ä' * 3)", "ValueError: äää"),
    ],
)
def test_a_cell_that_cannot_be_shown_is_named(source, said):
    with pytest.raises(UserError) as caught:
        notebooks.execute(notebook_of("1", source), "x.ipynb", timeout=3)
    assert str(caught.value).startswith("x.ipynb, cell 2, line 1:\n")
    assert said in str(caught.value)


EXECUTE = """
import sys
sys.path.insert(0, {root!r})
import nbformat
from report import notebooks, pairs
cells = [nbformat.v4.new_code_cell(source) for source in {sources!r}]
notebooks.execute(nbformat.v4.new_notebook(cells=cells), "x.ipynb", timeout=60)
"""


@pytest.mark.fault("failing notebook cell")
@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_ctrl_c_ends_the_execution(tmp_path):
    sources = ["open('started', 'w').close()", "import time\ntime.sleep(60)"]
    code = EXECUTE.format(root=str(ROOT), sources=sources)
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE
    ) as process:
        while not (tmp_path / "started").exists():
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        try:
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()
    assert said.decode().rstrip().endswith("KeyboardInterrupt")


def test_a_fault_of_nbclient_is_not_taken_for_ctrl_c(monkeypatch):
    def broken(*_, **__):
        raise AssertionError("a fault of nbclient")

    monkeypatch.setattr(notebooks.NotebookClient, "execute_cell", broken)
    with pytest.raises(AssertionError, match="a fault of nbclient"):
        notebooks.execute(notebook_of("1"), "x.ipynb", timeout=60)


def test_an_injected_cell_stands_in_its_place_and_is_no_difference(tmp_path):
    script = ROOT / "vision_transformer.py"
    notebook = notebooks.read_script(script)
    for kind, place in (("code", "## Unit tests"), ("markdown", "## Plots")):
        cell = getattr(nbformat.v4, f"new_{kind}_cell")("x = 1")
        notebooks.inject(notebook, cell, place)
        where = notebook.cells.index(cell)
        assert notebook.cells[where - 1].source.startswith(place)
    notebooks.store(notebook, tmp_path / "x.ipynb")
    assert pairs.differences(script, tmp_path / "x.ipynb") == []


def test_a_figure_drawn_again_gives_the_same_bytes():
    source = """
import matplotlib.pyplot as plt
%config InlineBackend.figure_formats = ["svg"]
plt.plot([0, 1], [1, 0], "o-");
"""
    first, second = notebook_of(source), notebook_of(source)
    for notebook in (first, second):
        notebooks.execute(notebook, "x.ipynb", timeout=60)
    [once], [again] = first.cells[0].outputs, second.cells[0].outputs
    assert "<clipPath" in once["data"]["image/svg+xml"]
    assert once["data"] == again["data"]


# --- JupyterLab ----------------------------------------------------------------------


@pytest.fixture
def contents(project, monkeypatch):
    """The contents manager that JupyterLab has when `make lab` starts it."""
    from jupyter_server.serverapp import ServerApp

    monkeypatch.chdir(project)
    server = ServerApp(open_browser=False, root_dir=str(project), allow_root=True)
    server.initialize(argv=[], find_extensions=True, new_httpserver=False)
    yield server.contents_manager
    ServerApp.clear_instance()


def test_a_saved_edit_arrives_in_the_script(contents, project):
    model = asyncio.run(contents.get("attention.ipynb"))
    model["content"]["cells"][0]["source"] += "\n\nEdited in the browser."
    asyncio.run(contents.save(model, "attention.ipynb"))
    text = (project / "attention.py").read_text(encoding="utf-8")
    assert "#\n# Edited in the browser.\n" in text
    original = (ROOT / "attention.py").read_text(encoding="utf-8")
    changed = [line for line in text.splitlines() if line not in original.splitlines()]
    assert changed == ["# Edited in the browser."], "nothing else changes"


def test_an_edit_of_the_script_arrives_with_outputs_kept(contents, project):
    script = project / "attention.py"
    edited = script.read_text(encoding="utf-8").replace(
        "# ## Unit tests", "# ## Unit tests, edited"
    )
    shutil.copystat(script, project / "attention.ipynb")
    script.write_text(edited, encoding="utf-8")
    model = asyncio.run(contents.get("attention.ipynb"))
    cells = model["content"]["cells"]
    assert any("## Unit tests, edited" in cell["source"] for cell in cells)
    stored = nbformat.read(ROOT / "attention.ipynb", as_version=4).cells
    kept = sum(bool(cell.get("outputs")) for cell in cells)
    assert kept == sum(bool(cell.get("outputs")) for cell in stored) > 0


def test_jupytext_is_told_once():
    for name in NAMES:
        metadata = jupytext.read(ROOT / f"{name}.py").metadata
        assert metadata["jupytext"]["formats"] == "ipynb,py:percent"
