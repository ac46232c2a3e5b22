"""The short runs that choices and ablations rest on."""

import json
import math
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT
from victim import alive, small_model

import report.demo
import training
from report.demo import DemoCIFAR10

sys.path.insert(0, str(ROOT / "bench"))
import trials


@pytest.mark.parametrize("trial", trials.TRIALS, ids=lambda trial: trial.stem)
def test_a_record_is_of_the_trial_that_is_listed(trial):
    if not trial.path.is_file():
        pytest.skip("not run yet")
    record = json.loads(trial.path.read_text(encoding="utf-8"))
    assert {key: record[key] for key in asdict(trial)} == asdict(trial)
    assert len(record["train_losses"]) == trial.epochs
    assert len(record["held_out_accs"]) == trial.epochs, "it was finished"
    assert all(0 < accuracy < 1 for accuracy in record["held_out_accs"])


def test_every_record_is_listed():
    files = {path for path in trials.FOLDER.iterdir() if path.suffix == ".json"}
    seeds = {trials.seed_path(seed) for seed in trials.SEEDS}
    former = set(trials.FOLDER.glob("init-*.json"))  # of the former model
    assert files <= {trial.path for trial in trials.TRIALS} | seeds | former
    assert files


@pytest.mark.parametrize("seed", trials.SEEDS)
def test_a_record_of_a_seed_is_a_whole_quick_run(seed):
    if not trials.seed_path(seed).is_file():
        pytest.skip("not run yet")
    record = json.loads(trials.seed_path(seed).read_text(encoding="utf-8"))
    settings = {**training.PRESETS["quick"], "seed": seed}
    assert {key: record[key] for key in settings} == settings
    assert record["format"] == training.FORMAT, "of this model"
    assert len(record["val_accs"]) == settings["n_epochs"]


def test_a_trial_is_judged_by_images_that_it_never_trains_on(workplace, monkeypatch):
    monkeypatch.setattr(report.demo, "SIZES", {True: 60, False: 20})
    monkeypatch.setattr(trials, "CIFAR10", DemoCIFAR10)
    monkeypatch.setattr(trials, "HELD_OUT", 10)
    monkeypatch.setattr(trials, "RUNS", workplace / "runs")
    shuffle = torch.randperm

    def of_sixty(n, **options):  # not of the images that are not there
        return shuffle(60 if n == 50_000 else n, **options)

    monkeypatch.setattr(torch, "randperm", of_sixty)
    monkeypatch.setitem(trials.MODELS, "y, z", small_model)
    trial = trials.Trial("x", "y, z", epochs=2, images=30, batch_size=8)
    train_loader, held_out = trials.loaders(trial, "data")
    assert len(train_loader.dataset) == 30
    assert len(held_out.dataset) == 10
    assert not set(train_loader.dataset.indices) & set(held_out.dataset.indices)
    record = trials.run(trial, "data", torch.device("cpu"))
    assert {key: record[key] for key in asdict(trial)} == asdict(trial)
    assert len(record["held_out_losses"]) == len(record["train_losses"]) == 2
    assert 0 <= record["held_out_ece"] <= 1
    again = trials.run(trial, "data", torch.device("cpu"))
    assert again == record, "it is kept, not run again"
    assert trial.path.name == "x-y-z.json"


@pytest.mark.parametrize("name", trials.MODELS)
def test_the_variants_are_models_that_learn(name):
    torch.manual_seed(0)
    model = alive(trials.MODELS[name]())
    images, labels = torch.randn(2, 3, 32, 32), torch.arange(2)
    logits = model(images)
    assert logits.shape == (2, 10)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    learned = [p for p in model.parameters() if p.requires_grad]
    assert all(0 < p.grad.abs().max() < math.inf for p in learned)


def test_variants_differ_as_their_names_say():
    make = trials.MODELS
    begins = {name: training.traits(make[name]())["begins"] for name in make}
    patch = {name: begins[name]["patch_embedding.weight"] for name in make}
    for gain in (1, 2, 5):
        ratio = patch["the model"] / patch[f"zero branches, patch gain {gain}"]
        assert ratio == pytest.approx(3 / gain, rel=0.05)
    branch = {
        n: b.get("blocks.5.attention.inner_module.1.out.weight")
        for n, b in begins.items()
    }
    assert branch["the model"] == branch["zero branches, MLP dropout"] == 0
    full = branch["full branches, MLP dropout"]
    assert full == pytest.approx(
        begins["the model"]["blocks.5.attention.inner_module.1.q.weight"], rel=0.05
    )
    assert branch["full branches"] == pytest.approx(full, rel=0.05)
    mlp = begins["full branches"]
    first, last = (f"blocks.5.feed_forward.inner_module.1.layers.{n}" for n in (0, 3))
    assert mlp[f"{last}.weight"] == pytest.approx(mlp[f"{first}.weight"], rel=0.05)
    queries = "blocks.0.attention.inner_module.1.q.weight"
    soft = begins["zero branches, soft queries"][queries]
    assert soft == pytest.approx(0.2 * begins["the model"][queries], rel=0.05)
    assert branch["GPT-2 scaling"] == pytest.approx(full / 12**0.5, rel=0.05)
    assert (
        begins["zero branches, zero head"]["head.weight"]
        == begins["no positions"]["position_embedding"]
        == 0
    )
    assert make["patch 8"]().num_patches == 16
    assert make["one head"]().blocks[0].attention.inner_module[1].num_heads == 1
    layer = make["zero branches, mimetic"]().blocks[0].attention.inner_module[1]
    product = layer.q.weight[:32].T @ layer.k.weight[:32]  # of one head
    assert product.diagonal().mean() > 0.05
    tokens = torch.randn(2, 65, 256)
    out = make["post-norm"]().blocks[0](tokens)
    assert out.mean(-1).abs().max() < 1e-4
    assert (out.var(-1) - 1).abs().max() < 0.05
    active = {
        name: [p for p in training.traits(make[name]())["drops_out"].values() if p]
        for name in make
    }
    assert active["the model"] == active["post-norm"] == [0.2] * 12
    assert active["zero branches, block dropout"] == [0.2] * 18
    assert active["paper dropout"] == [0.2] * 19
    assert active["no dropout"] == []
