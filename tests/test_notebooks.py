"""Notebooks: paired with their scripts, executed whole, stored clean."""

import asyncio
import json
import re
import shutil

import jupytext
import nbformat
import pytest
from conftest import ROOT, run_script

from report import notebooks

NAMES = ("attention", "vision_transformer")


@pytest.mark.parametrize("name", NAMES)
def test_script_and_notebook_hold_the_same_cells(name):
    found = notebooks.differences(ROOT / f"{name}.py", ROOT / f"{name}.ipynb")
    assert found == [], f"run `make report`, or `make notebooks`: {found}"


def test_drift_is_noticed(project):
    for name in NAMES:
        script = project / f"{name}.py"
        text = script.read_text(encoding="utf-8")
        script.write_text(text.replace("# ## Unit tests", "# ## Tests"), "utf-8")
        assert notebooks.differences(script, project / f"{name}.ipynb")


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
        "class VisionTransformer",
        "N_EPOCHS = 50",
        "def train_one_epoch",
        "def plot_training_loss",
    ]
    places = [first(marker) for marker in order]
    assert places == sorted(places)
    parameters = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    assert len(parameters) == 1
    assert len(parameters[0].source.splitlines()) == 4


@pytest.mark.parametrize("name", NAMES)
def test_every_picture_has_a_caption_with_label_and_alternative_text(name):
    cells = notebooks.read_script(ROOT / f"{name}.py").cells
    plots = 0
    for cell, following in zip(cells, [*cells[1:], None], strict=True):
        draws = re.search(r"^(?:if history:\n    )?plot_\w+\(", cell.source, re.M)
        if cell.cell_type != "code" or not draws:
            continue
        plots += 1
        assert following.metadata.get("tags") == ["caption"]
        for part in ("**Figure.**", "<!-- label: fig-", "<!-- alt: "):
            assert part in following.source
    assert plots >= 2


def test_a_cell_by_itself_lints():
    """Cells that are comments in the script are code, too."""
    import subprocess
    import sys

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
def test_a_failing_cell_is_named(tmp_path):
    notebook = notebook_of("a = 1", "b = 2\n\nb / 0  # here\n")
    with pytest.raises(notebooks.NotebookError) as caught:
        notebooks.execute(notebook, "x.ipynb", tmp_path, timeout=60)
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
        ("print(bytes(range(256)).decode('latin-1'))", "it prints binary data"),
        ("import sys\nsys.stdout.write('\\x00' * 9)", "it prints binary data"),
    ],
)
def test_a_cell_that_cannot_be_shown_is_named(tmp_path, source, said):
    with pytest.raises(notebooks.NotebookError) as caught:
        notebooks.execute(notebook_of("1", source), "x.ipynb", tmp_path, timeout=3)
    assert str(caught.value).startswith("x.ipynb, cell 2, line 1:\n")
    assert said in str(caught.value)


@pytest.mark.slow
@pytest.mark.fault("failing notebook cell")
@pytest.mark.parametrize(
    "source",
    [
        "print('x' * 100_000_000)",
        "for _ in range(1_000_000): print('x' * 100)",
        "while True: print('x' * 1000)",
    ],
)
def test_a_cell_that_floods_the_notebook_is_stopped(tmp_path, source):
    notebook = notebook_of("1", source)
    with pytest.raises(
        notebooks.NotebookError, match=r"cell 2(.|\n)*larger than 20 MB"
    ):
        notebooks.execute(notebook, "x.ipynb", tmp_path, timeout=120)


def test_progress_leaves_one_line_per_epoch(tmp_path, capsys):
    source = """
import sys
sys.path.insert(0, {root!r})
import torch, training
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
run = training.Run("CIFAR10", 16, 1e-3, 2, 0, torch.device("cpu"))
for _ in run.epochs(model, torch.optim.Adam(model.parameters()), 5):
    for _ in range(5):
        run.on_step(torch.tensor(1.0))
    run.end_epoch([1.0] * 5, 0.5, 0.6)
"""
    notebook = notebook_of(source.format(root=str(ROOT)))
    notebooks.execute(notebook, "x.ipynb", tmp_path, timeout=120)
    [output] = notebook.cells[0].outputs
    start, first, second = output["data"]["text/plain"].splitlines()
    assert start.startswith("The run starts")
    assert first.startswith("epoch   1: loss 1.000, validation accuracy 0.5000")
    assert second.startswith("epoch   2: ")
    assert "epoch   2: loss" in capsys.readouterr().out


def test_a_figure_drawn_again_gives_the_same_bytes(tmp_path):
    source = """
import matplotlib.pyplot as plt
%config InlineBackend.figure_formats = ["svg"]
plt.plot([0, 1], [1, 0], "o-");
"""
    first, second = notebook_of(source), notebook_of(source)
    for notebook in (first, second):
        notebooks.execute(notebook, "x.ipynb", tmp_path, timeout=120)
    [once], [again] = first.cells[0].outputs, second.cells[0].outputs
    assert "<clipPath" in once["data"]["image/svg+xml"]
    assert once["data"] == again["data"]


# --- A failing build, as a user sees it ----------------------------------------------


@pytest.mark.fault("failing notebook cell")
def test_a_failed_report_changes_nothing(project):
    script = project / "attention.py"
    text = script.read_text(encoding="utf-8")
    broken = text.replace("q = q / math.sqrt(self.head_dim)", "q = q / 0.01")
    assert broken != text
    script.write_text(broken, encoding="utf-8")
    before = {p: p.read_bytes() for p in project.rglob("*") if p.is_file()}
    code = "import report.build as b; from report.identity import read_student as r; "
    code += "import training; b.report(dict(training.DEFAULTS), r())"
    done = run_script("-c", code, folder=project, timeout=300)
    assert done.returncode != 0
    assert "attention.ipynb, cell 10, line 2" in done.stderr
    assert "run_unit_tests(test_single_head, test_multi_head)" in done.stderr
    after = {
        p: p.read_bytes()
        for p in project.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert after == before


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


def test_a_display_that_is_replaced_again_and_again_is_no_flood(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "MAX_OUTPUT", 20_000)
    source = """
from IPython.display import display
handle = display({"text/plain": "x"}, raw=True, display_id=True)
for _ in range(100):
    handle.update({"text/plain": "x" * 1000}, raw=True)
"""
    notebooks.execute(notebook_of(source), "x.ipynb", tmp_path, timeout=60)
