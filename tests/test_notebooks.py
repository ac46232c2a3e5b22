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

import nbformat
import pytest
from conftest import ROOT, replace_in

from report import notebooks, sync
from training import UserError

NAMES = ("attention", "vision_transformer")


def same_cells(folder, name):
    script = notebooks.read_script(folder / f"{name}.py")
    notebook = notebooks.read_notebook(folder / f"{name}.ipynb")
    return sync.contents(script) == sync.contents(notebook)


@pytest.mark.parametrize("name", NAMES)
def test_script_and_notebook_hold_the_same_cells(project, name):
    assert same_cells(ROOT, name), "run `make report`, or `make notebooks`"
    replace_in(project / f"{name}.py", "# ## Unit tests", "# ## Tests")
    assert not same_cells(project, name)


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
    text = "\n\n".join(cell.source for cell in cells)
    order = [
        "# Task 2",
        "## Imports and device",
        "class ResidualModule",
        "class FeedForwardBlock",
        "class SelfAttentionTransformerBlock",
        "class VisionTransformer",
        "run_unit_tests(",
        "N_EPOCHS = 50",
        "def train(",
        "figures.plot_training(",
        "## The recorded weights",
    ]
    places = [text.index(marker) for marker in order]
    assert places == sorted(places)
    [parameters] = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    assert len(parameters.source.splitlines()) == 4


def test_a_cell_by_itself_lints():
    """Cells that are comments in the script are code, too."""
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache"]
    paths = [str(ROOT / f"{name}.ipynb") for name in NAMES]
    command = [*ruff, "--select", "F,E9", *paths]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout


# --- Executing -----------------------------------------------------------------------


def notebook_of(*sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    return nbformat.v4.new_notebook(cells=cells)


@pytest.mark.fault("failing notebook cell")
@pytest.mark.parametrize(
    ("source", "line", "said"),
    [
        ("b = 2\n\nb / 0  # here", 3, "ZeroDivisionError: division by zero"),
        ("while True: pass", 1, "it took longer than 3 s"),
        ("import os\nos._exit(1)", 1, "the kernel died, perhaps for lack of memory"),
        ("raise SystemExit(0)", 1, "SystemExit: 0"),
        ("1 +", 1, "SyntaxError: invalid syntax"),
        ("raise ValueError('ä' * 3)", 1, "ValueError: äää"),
    ],
)
def test_a_failing_cell_is_named(source, line, said):
    with pytest.raises(UserError) as caught:
        notebooks.execute(notebook_of("1", source), "x.ipynb", timeout=3)
    text = source.splitlines()[line - 1]
    expected = f"x.ipynb, cell 2, line {line}:\n    {text}\n{said}"
    assert str(caught.value).startswith(expected)


EXECUTE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import nbformat
from report import notebooks
source = "open('started', 'w').close()\\nimport time\\ntime.sleep(60)"
cells = [nbformat.v4.new_code_cell(source)]
notebooks.execute(nbformat.v4.new_notebook(cells=cells), "x.ipynb", timeout=60)
"""


@pytest.mark.fault("failing notebook cell")
@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_ctrl_c_ends_the_execution(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", EXECUTE], cwd=tmp_path, stderr=subprocess.PIPE
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
    shutil.copystat(script, project / "attention.ipynb")
    replace_in(script, "# ## Unit tests", "# ## Unit tests, edited")
    model = asyncio.run(contents.get("attention.ipynb"))
    cells = model["content"]["cells"]
    assert any("## Unit tests, edited" in cell["source"] for cell in cells)
    stored = nbformat.read(ROOT / "attention.ipynb", as_version=4).cells
    kept = sum(bool(cell.get("outputs")) for cell in cells)
    assert kept == sum(bool(cell.get("outputs")) for cell in stored) > 0
