"""Notebooks: paired with their scripts, executed whole, stored clean."""

import asyncio
import json
import os
import re

import nbformat
import psutil
import pytest
from conftest import ROOT, run_script

from report import notebooks, sync
from support.records import UserError


@pytest.mark.parametrize("name", ["attention", "vision_transformer"])
def test_what_is_stored_is_that_of_the_script_and_clean(name):
    script = notebooks.read_script(ROOT / f"{name}.py")
    notebook = notebooks.read_notebook(ROOT / f"{name}.ipynb")
    assert sync.contents(script) == sync.contents(notebook), "run `make report`"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "executed from top to bottom"
    outputs = [output for cell in code for output in cell.outputs]
    kinds = {(output.output_type, output.get("name")) for output in outputs}
    assert not kinds & {("error", None), ("stream", "stderr")}
    text = json.dumps(outputs)
    debris = r"widget-view|model_id|it/s|step/s|Warning|\\u001b|site-packages"
    assert not re.search(rf"{debris}|/home/|/Users/|[A-Z]:\\\\", text)
    assert str(ROOT) not in text


def test_the_skeleton_s_order_is_kept():
    cells = notebooks.read_script(ROOT / "vision_transformer.py").cells
    text = "\n\n".join(cell.source for cell in cells)
    order = (
        "# Task 2; class ResidualModule; "
        "class FeedForwardBlock; class SelfAttentionTransformerBlock; "
        "class VisionTransformer; run_unit_tests(; N_EPOCHS = 50; "
        "def train(; figures.plot_training(; "
        "## The recorded weights"
    )
    places = [text.index(marker) for marker in order.split("; ")]
    assert places == sorted(places)
    [parameters] = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    names = re.findall(r"^(\w+) =", parameters.source, re.MULTILINE)
    assert names == ["DATASET_CACHE_DIR", "BATCH_SIZE", "LR", "N_EPOCHS", "SEED", "RUN"]


def notebook_of(*sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    return nbformat.v4.new_notebook(cells=cells)


@pytest.mark.fault("failing notebook cell")
@pytest.mark.parametrize(
    ("source", "line", "said"),
    [
        ("b = 2\n\nraise ValueError(3 * 'ä')", 3, "ValueError: äää"),
        ("while True: pass", 1, "it took longer than 3 s"),
        ("import os\nos._exit(1)", 1, "the kernel died, perhaps for lack of memory"),
        ("1 +", 1, "SyntaxError: invalid syntax"),
    ],
)
def test_a_failing_cell_is_named(source, line, said):
    with pytest.raises(UserError) as caught:
        notebooks.execute(notebook_of("1", source), "x.ipynb", timeout=3)
    text = source.splitlines()[line - 1]
    expected = f"x.ipynb, cell 2, line {line}:\n    {text}\n{said}"
    assert str(caught.value).startswith(expected)
    commands = [child.cmdline() for child in psutil.Process().children()]
    assert not [c for c in commands if "ipykernel_launcher" in c], "none is left behind"


CTRL_C = """
import os, nbformat
from report import notebooks
source = f"import os, time; os.kill({os.getpid()}, 2); time.sleep(60)"
cells = [nbformat.v4.new_code_cell(source)]
notebooks.execute(nbformat.v4.new_notebook(cells=cells), "x.ipynb", timeout=60)
"""


@pytest.mark.fault("failing notebook cell")
@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_ctrl_c_ends_the_execution(tmp_path):
    done = run_script("-c", CTRL_C, folder=tmp_path, timeout=50, PYTHONPATH=str(ROOT))
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")


def test_a_figure_drawn_again_gives_the_same_bytes():
    source = """
import matplotlib.pyplot as plt
%config InlineBackend.figure_formats = ["svg"]
plt.rcParams["svg.hashsalt"] = "x"
plt.plot([0, 1], [1, 0], "o-");
"""
    first, second = notebook_of(source), notebook_of(source)
    for notebook in (first, second):
        notebooks.execute(notebook, "x.ipynb", timeout=60)
    [once], [again] = first.cells[0].outputs, second.cells[0].outputs
    assert "<clipPath" in once["data"]["image/svg+xml"]
    assert once["data"] == again["data"]


def test_a_saved_edit_arrives_in_the_script(project):
    from jupyter_server.serverapp import ServerApp

    server = ServerApp(open_browser=False, root_dir=str(project), allow_root=True)
    server.initialize(argv=[], find_extensions=True, new_httpserver=False)
    contents = server.contents_manager  # that JupyterLab has when `make lab` starts it
    model = asyncio.run(contents.get("attention.ipynb"))
    model["content"]["cells"][0]["source"] += "\n\nEdited in the browser."
    asyncio.run(contents.save(model, "attention.ipynb"))
    ServerApp.clear_instance()
    text = (project / "attention.py").read_text(encoding="utf-8")
    assert "#\n# Edited in the browser.\n" in text
    original = (ROOT / "attention.py").read_text(encoding="utf-8")
    changed = [line for line in text.splitlines() if line not in original.splitlines()]
    assert changed == ["# Edited in the browser."], "nothing else changes"
