"""The short runs that choices and ablations rest on."""

import json
import math
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT
from small_run import alive, small_model

import report.demo_data
import training
from report.demo_data import DemoCIFAR10

sys.path.insert(0, str(ROOT / "bench"))
import trials


def test_every_record_is_of_a_trial_that_is_listed_and_was_finished():
    records = {
        path: json.loads(path.read_text(encoding="utf-8"))
        for path in trials.FOLDER.glob("*.json")
        if not path.name.startswith("init-")  # of an earlier version
    }
    assert records
    for trial in trials.TRIALS:
        record = records.pop(trial.path, None)
        if record:
            assert {key: record[key] for key in asdict(trial)} == asdict(trial)
            assert len(record["train_losses"]) == trial.epochs
            assert len(record["held_out_accs"]) == trial.epochs
            assert all(0 < accuracy < 1 for accuracy in record["held_out_accs"])
    for seed in trials.SEEDS:
        record = records.pop(trials.seed_path(seed), None)
        if record:
            settings = {**training.PRESETS["quick"], "seed": seed}
            assert {key: record[key] for key in settings} == settings
            assert record["format"] == training.FORMAT, "of this model"
            assert len(record["val_accs"]) == settings["n_epochs"]
    assert not records, "listed nowhere"


def test_a_trial_is_judged_by_images_that_it_never_trains_on(workplace, monkeypatch):
    monkeypatch.setattr(report.demo_data, "SIZES", {True: 60, False: 20})
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


MODEL = "zero branches, MLP dropout"  # that of the report
ATTENTION = "blocks.5.attention.inner_module.1"
QUERY, OUT = f"{ATTENTION}.q.weight", f"{ATTENTION}.out.weight"
MLP = "blocks.5.feed_forward.inner_module.1.layers"
PATCH, POSITION = "patch_embedding.weight", "position_embedding"


@pytest.mark.parametrize(
    ("name", "parameter", "factor", "like"),
    [
        # Begins with so many times what the model has in the last one
        ("zero branches, patch gain 1", PATCH, 1 / 3, PATCH),
        ("zero branches, patch gain 2", PATCH, 2 / 3, PATCH),
        ("zero branches, patch gain 5", PATCH, 5 / 3, PATCH),
        (MODEL, OUT, 0, QUERY),
        ("full branches, MLP dropout", OUT, 1, QUERY),
        ("full branches, MLP dropout", f"{MLP}.3.weight", 1, f"{MLP}.0.weight"),
        ("GPT-2 scaling", OUT, 12**-0.5, QUERY),
        ("zero branches, soft queries", QUERY, 0.2, QUERY),
        ("zero branches, zero head", "head.weight", 0, QUERY),
        ("no positions", POSITION, 0, POSITION),
    ],
)
def test_variants_begin_as_their_names_say(name, parameter, factor, like):
    variant, model = (trials.MODELS[each]() for each in (name, MODEL))
    begins = training.traits(variant)["begins"][parameter]
    expected = factor * training.traits(model)["begins"][like]
    assert begins == pytest.approx(expected, rel=0.05)


def test_variants_are_built_as_their_names_say():
    make = trials.MODELS
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
    assert active[MODEL] == active["post-norm"] == [0.2] * 12
    assert active["zero branches, block dropout"] == [0.2] * 18
    assert active["zero branches, paper dropout"] == [0.2] * 19
    assert active["no dropout"] == []
