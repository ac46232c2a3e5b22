"""The graded files as a grader meets them: imported, run, read."""

import ast
import json
import re
import shutil
import sys
from unittest import mock

import pytest
import torch
from conftest import ROOT, only_files, run_script
from small_run import small_model

import train
from support import records, training

GRADED = ("attention.py", "vision_transformer.py")
ALLOWED = {"torch", "torchvision", "einops", "attention"} | sys.stdlib_module_names


def test_importing_only_defines(workplace):
    for name in GRADED:
        shutil.copy(ROOT / name, workplace)
    code = "import sys, torch, torchvision, einops, attention, vision_transformer\n"
    code += (
        "print({'matplotlib', 'IPython', 'support', 'safetensors'} & {*sys.modules})"
    )
    done = run_script("-c", code, folder=workplace, PYTHONDONTWRITEBYTECODE="1")
    assert done.stderr == ""
    assert done.stdout.strip() == "set()"
    assert only_files(workplace) == sorted(GRADED)


@pytest.mark.parametrize("name", GRADED)
def test_it_parses_as_python_38_and_nothing_ready_made_is_used(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    tree = ast.parse(text, feature_version=(3, 8))
    imported = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert {module.split(".")[0] for module in imported} <= ALLOWED
    ready_made = "scaled_dot_product_attention multi_head_attention_forward Conv2d timm"
    for word in [*ready_made.split(), "nn.Transformer", "torchvision.models"]:
        assert word not in text
    code = re.sub(r'""".*?"""|#.*', "", text, flags=re.DOTALL)
    graded = re.sub(r"\ndef torch_attention.*?\n(?=\S)", "", code, flags=re.DOTALL)
    assert "nn.MultiheadAttention(" not in graded


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epochs", "0"], "invalid positive int value: '0'"),
        (["--lr", "nan"], "invalid positive float value: 'nan'"),
        (["--seed", str(2**64)], f"invalid 64-bit seed value: '{2**64}'"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, said):
    with pytest.raises(SystemExit, match=f"^error: argument .*{re.escape(said)}$"):
        train.main(arguments)


def test_a_run_that_is_not_there_is_answered_with_those_that_are(workplace, capsys):
    mine = workplace / "runs" / "mine" / "history.json"
    mine.parent.mkdir(parents=True)
    mine.touch()
    assert train.main(["--verify"]) == 1
    said = capsys.readouterr().out
    assert re.match("error: .* no finished run in runs.exercise, but in runs", said)
    assert "`git checkout runs`" in said
    assert "--run runs" in said
    assert only_files(workplace) == ["runs/mine/history.json"]


@pytest.mark.parametrize("name", ["val_accs", "val_accs_eval"])
def test_verify_fails_if_either_accuracy_is_another(
    demo_data, workplace, monkeypatch, capsys, name
):
    monkeypatch.setattr(train.vt, "VisionTransformer", small_model)
    monkeypatch.setattr(train.dataset, "fetch", lambda *_: None)
    settings = {**records.DEFAULT, "dataset": "DemoCIFAR10", "batch_size": 16}
    settings["n_epochs"] = 1
    train.vt.train_run(settings, "data", torch.device("cpu"), "mine")
    monkeypatch.setattr(train.vt, "train", None)  # for it is loaded, not repeated
    train.vt.train_run(settings, "data", torch.device("cpu"), "mine")
    verify = ["--verify", "--run", "mine"]
    assert train.main(verify) == 0
    assert "NOT confirmed" not in capsys.readouterr().out
    history = records.read_history("mine")
    history[name] = [1.0]
    history["sha256"] = records.history_digest(history)
    (workplace / "mine" / "history.json").write_text(json.dumps(history), "utf-8")
    assert train.main(verify) == 1
    assert "NOT confirmed" in capsys.readouterr().out
    monkeypatch.undo()  # with CIFAR-10, to which these images do not belong
    assert train.main(["--verify", "--run", str(workplace / "mine")]) == 1
    assert "dataset = 'DemoCIFAR10', not 'CIFAR10'" in capsys.readouterr().out


def test_train_does_what_the_command_line_asks_for(workplace, monkeypatch, capsys):
    train_run = mock.Mock(side_effect=records.UserError("that is all"))
    monkeypatch.setattr(train.vt, "train_run", train_run)
    default, quick = (records.PRESETS[name] for name in ("default", "quick"))
    for arguments, settings, folder in (
        ("", default, None),
        ("--preset quick --run mine", quick, "mine"),
        ("--epochs 2 --lr 1e-3", {**default, "n_epochs": 2, "lr": 1e-3}, None),
        ("--batch-size 7 --seed 3", {**default, "batch_size": 7, "seed": 3}, None),
    ):
        assert train.main(arguments.split()) == 1
        where = folder or training.default_folder(settings)
        train_run.assert_called_with(settings, "./data", mock.ANY, where)
    assert capsys.readouterr().out.count("error: that is all") == 4
