"""The short runs that choices and ablations rest on."""

import json
import re
import shutil
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT, small_model

import training

sys.path.insert(0, str(ROOT / "bench"))
import trials

QUICK_DEMO = {
    **training.QUICK,
    "dataset": "DemoCIFAR10",
    "n_epochs": 2,
    "batch_size": 20,
}


@pytest.mark.parametrize("trial", trials.TRIALS, ids=lambda t: f"{t.group} {t.name}")
def test_a_record_is_of_the_trial_that_is_listed(trial):
    if not trial.path.is_file():
        pytest.skip("not run yet")
    record = json.loads(trial.path.read_text(encoding="utf-8"))
    assert {key: record[key] for key in asdict(trial)} == asdict(trial)
    assert len(record["held_out_accs"]) == trial.epochs
    assert all(0 < accuracy < 1 for accuracy in record["held_out_accs"])


def test_every_record_is_listed():
    files = {path for path in trials.FOLDER.iterdir() if path.suffix == ".json"}
    seeds = {trials.seed_path(seed) for seed in trials.SEEDS}
    assert files <= {trial.path for trial in trials.TRIALS} | seeds
    assert files


@pytest.mark.parametrize("seed", trials.SEEDS)
def test_a_record_of_a_seed_is_a_whole_quick_run(seed):
    if not trials.seed_path(seed).is_file():
        pytest.skip("not run yet")
    record = json.loads(trials.seed_path(seed).read_text(encoding="utf-8"))
    settings = {**training.QUICK, "seed": seed}
    assert {key: record[key] for key in settings} == settings
    assert len(record["val_accs"]) == training.QUICK["n_epochs"]


def test_the_figure_of_the_ablations_is_that_of_the_records(monkeypatch, tmp_path):
    stored = trials.ABLATION_FIGURE
    content = stored.read_text(encoding="utf-8") if stored.is_file() else None
    shutil.copytree(trials.FOLDER, tmp_path / "trials")
    monkeypatch.setattr(trials, "FOLDER", tmp_path / "trials")
    monkeypatch.setattr(trials, "ABLATION_FIGURE", tmp_path / "ablation.svg")

    def drawn():
        trials.draw()
        path = trials.ABLATION_FIGURE
        found = path.is_file() and re.search("description>(.*)<", path.read_text())
        return found[1] if found else None

    assert drawn() == (re.search("description>(.*)<", content)[1] if content else None)
    record = {"make": "one_head", "name": "one head"}
    record |= {"held_out_accs": [0.4], "held_out_accs_eval": [0.5]}
    trial = next(t for t in trials.TRIALS if t.name == "one head")
    trial.path.write_text(json.dumps(record), encoding="utf-8")
    one = drawn()
    assert one
    trial.path.write_text(json.dumps({**record, "name": "x"}), encoding="utf-8")
    assert drawn() != one


def test_a_seed_is_run_by_the_recipe_and_continues(demo_data, workplace, monkeypatch):
    monkeypatch.setattr(trials, "QUICK", QUICK_DEMO)
    seeded = lambda: small_model(torch.initial_seed())  # noqa: E731
    monkeypatch.setattr(trials, "default", seeded)
    record = trials.run_seed(1, "data", torch.device("cpu"))
    assert (record["seed"], len(record["val_accs"])) == (1, 2)
    assert "train_losses" not in record
    assert trials.run_seed(1, "data", torch.device("cpu")) == record, "it is kept"
    other = trials.run_seed(2, "data", torch.device("cpu"))
    assert other["weights_sha256"] != record["weights_sha256"]


@pytest.mark.parametrize("make", sorted({trial.make for trial in trials.TRIALS}))
def test_the_variants_are_models_that_learn(make):
    torch.manual_seed(0)
    model = getattr(trials, make)()
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    logits = model(images)
    assert logits.shape == (4, 10)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    learned = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learned)


def test_variants_differ_as_their_names_say():
    positions = trials.no_positions()
    assert positions.position_embedding.abs().max() == 0
    assert trials.patch_2().num_patches == 256
    assert trials.patch_8().num_patches == 16
    assert trials.one_head().blocks[0].attention.inner_module[1].num_heads == 1
    torch.manual_seed(0)
    default, xavier = trials.default(), trials.xavier()
    ratio = default.patch_embedding.weight.std() / xavier.patch_embedding.weight.std()
    assert abs(ratio - 3) < 0.1
    layer = trials.mimetic().blocks[0].attention.inner_module[1]
    product = layer.out.weight @ layer.v.weight  # of one value and output map
    assert product.diagonal().mean() < -0.2
    tokens = torch.randn(2, 65, 256)
    out = trials.post_norm().blocks[0](tokens)
    assert out.mean(-1).abs().max() < 1e-4
    assert (out.var(-1) - 1).abs().max() < 0.05


def test_the_text_names_the_settings_of_the_quick_run():
    text = (trials.ROOT / "vision_transformer.py").read_text(encoding="utf-8")
    text = text.replace("\n# ", " ").partition("*quick* run:")[2].partition("# %%")[0]
    assert f"batches of {trials.QUICK['batch_size']}," in text
    assert f"and {trials.QUICK['n_epochs']} epochs." in text
