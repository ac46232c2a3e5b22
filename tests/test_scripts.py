"""The graded files as a grader meets them: imported, run, read."""

import ast
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, run_script

import training

GRADED = ("attention.py", "vision_transformer.py")
ALLOWED = {"torch", "torchvision", "einops", "attention"} | sys.stdlib_module_names


@pytest.fixture
def unpacked(tmp_path):
    """Only the two graded files, in a folder as graders have them."""
    folder = tmp_path / "Übung 11 ä"
    folder.mkdir()
    for name in GRADED:
        shutil.copy(ROOT / name, folder)
    return folder


def test_importing_only_defines(unpacked):
    code = """
import sys
import torch, torchvision, einops
import attention, vision_transformer
print({"matplotlib", "IPython", "training", "safetensors"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=unpacked,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout.strip() == "set()"
    assert sorted(path.name for path in unpacked.iterdir()) == sorted(GRADED)


@pytest.mark.parametrize(("name", "lines"), [("attention.py", 2), (GRADED[1], 7)])
def test_run_as_a_script_it_tests_itself(unpacked, name, lines):
    done = run_script(name, folder=unpacked, timeout=60)
    assert done.returncode == 0, done.stderr
    results = done.stdout.splitlines()
    assert len(results) == lines
    assert all(line.startswith("passed  ") for line in results)


def test_a_failing_unit_test_is_printed_and_fails_the_script(unpacked):
    path = unpacked / "attention.py"
    text = path.read_text(encoding="utf-8")
    assert "q = q / math.sqrt(self.head_dim)" in text
    path.write_text(text.replace("q = q / math.sqrt", "q = q * math.sqrt"), "utf-8")
    done = run_script("attention.py", folder=unpacked)
    assert done.returncode != 0
    assert "FAILED  multi head: differs from nn.MultiheadAttention" in done.stdout


@pytest.mark.parametrize("name", GRADED)
def test_it_parses_as_python_38_and_imports_little(name):
    tree = ast.parse((ROOT / name).read_text("utf-8"), feature_version=(3, 8))
    imported = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported <= ALLOWED


@pytest.mark.parametrize("name", GRADED)
def test_nothing_ready_made_is_used(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    ready_made = "scaled_dot_product_attention multi_head_attention_forward Conv2d timm"
    for word in [*ready_made.split(), "nn.Transformer", "torchvision.models"]:
        assert word not in text
    code = re.sub(r'""".*?"""|#.*', "", text, flags=re.DOTALL)
    uses = [m.start() for m in re.finditer(r"nn\.MultiheadAttention\(", code)]
    function = code.find("def torch_twin")
    assert all(function < use < code.find("\ndef ", function + 1) for use in uses)


@pytest.mark.parametrize("name", GRADED)
def test_lines_fit_the_page(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert max(map(len, lines)) <= 88


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epochs", "0"], "invalid positive int value: '0'"),
        (["--lr", "nan"], "invalid positive float value: 'nan'"),
        (["--train", "--verify"], "not allowed with argument"),
    ],
)
def test_bad_arguments_are_refused(arguments, said, workplace):
    done = run_script(ROOT / "vision_transformer.py", *arguments, folder=workplace)
    assert done.returncode == 2
    assert said in done.stderr


def test_verify_without_a_record_says_so(workplace):
    done = run_script(ROOT / "vision_transformer.py", "--verify", folder=workplace)
    assert done.returncode == 1
    assert "There is no finished run" in done.stdout
    assert "Traceback" not in done.stderr
    assert list(workplace.iterdir()) == []


def record(folder, settings):
    """Put the history of a finished run beside the scripts, as a ZIP has it."""
    history = {**settings, "format": training.FORMAT, "seconds": 3600}
    history |= {"date": "2026-01-01T00:00:00+00:00", "machine": "a machine"}
    history |= {"val_accs": [0.1] * 3, "val_accs_eval": [0.1] * 3}
    history["sha256"] = training._history_digest(history)
    (folder / training.HISTORY_NAME).write_text(json.dumps(history), "utf-8")


def test_a_finished_run_is_not_trained_again_and_that_is_said(workplace):
    record(workplace, training.DEFAULTS)
    done = run_script(ROOT / "vision_transformer.py", "--train", folder=workplace)
    assert done.returncode == 0, done.stderr
    assert "This run is finished, and recorded in history.json" in done.stdout
    assert "validation accuracy after the last epoch: 0.1000" in done.stdout
    assert [path.name for path in workplace.iterdir()] == [training.HISTORY_NAME]


@pytest.mark.parametrize(
    ("arguments", "said", "unsaid"),
    [
        ([], "here is that of the quick run", "There is no finished run"),
        (["--epochs", "10"], "There is no finished run", "quick run"),
    ],
)
def test_only_the_default_run_is_stood_in_for(workplace, arguments, said, unsaid):
    record(workplace, training.QUICK)
    path = ROOT / "vision_transformer.py"
    done = run_script(path, "--verify", *arguments, folder=workplace)
    assert done.returncode == 1
    assert said in done.stdout
    assert unsaid not in done.stdout


def test_the_course_s_notebook_cells_run_with_our_classes(tmp_path):
    """Our class cells, pasted into another notebook, need nothing else of the file."""
    import jupytext

    notebook = jupytext.read(ROOT / "attention.py")
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    layer = next(source for source in code if "class SelfAttention2d" in source)
    scope = {}
    exec("import math, torch\nfrom torch import nn", scope)
    exec("from einops import rearrange", scope)
    exec(layer, scope)
    x = scope["torch"].randn(1, 256, 3, 5)
    assert scope["SelfAttention2d"]()(x).shape == x.shape
