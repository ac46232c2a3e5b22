"""The short runs that choices and ablations rest on."""

import json
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT
from victim import small_model

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
    assert files <= {trial.path for trial in trials.TRIALS} | seeds
    assert files


@pytest.mark.parametrize("seed", trials.SEEDS)
def test_a_record_of_a_seed_is_a_whole_quick_run(seed):
    if not trials.seed_path(seed).is_file():
        pytest.skip("not run yet")
    record = json.loads(trials.seed_path(seed).read_text(encoding="utf-8"))
    settings = {**training.PRESETS["quick"], "seed": seed}
    assert {key: record[key] for key in settings} == settings
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
    monkeypatch.setitem(trials.MODELS, "small", small_model)
    trial = trials.Trial("x", "y, z", "small", batch_size=8, epochs=2, images=30)
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


@pytest.mark.parametrize("make", trials.MODELS)
def test_the_variants_are_models_that_learn(make):
    torch.manual_seed(0)
    model = trials.MODELS[make]()
    images, labels = torch.randn(2, 3, 32, 32), torch.arange(2)
    logits = model(images)
    assert logits.shape == (2, 10)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    learned = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learned)


def test_variants_differ_as_their_names_say():
    make = trials.MODELS
    torch.manual_seed(0)
    default = make["default"]()
    torch.manual_seed(0)
    xavier = make["xavier"]()
    ratio = default.patch_embedding.weight / xavier.patch_embedding.weight
    torch.testing.assert_close(ratio, torch.full_like(ratio, 3))
    assert make["no_positions"]().position_embedding.abs().max() == 0
    assert make["patch_2"]().num_patches == 256
    assert make["patch_8"]().num_patches == 16
    assert make["one_head"]().blocks[0].attention.inner_module[1].num_heads == 1
    layer = make["mimetic"]().blocks[0].attention.inner_module[1]
    product = layer.out.weight @ layer.v.weight  # of one value and output map
    assert product.diagonal().mean() < -0.2
    tokens = torch.randn(2, 65, 256)
    out = make["post_norm"]().blocks[0](tokens)
    assert out.mean(-1).abs().max() < 1e-4
    assert (out.var(-1) - 1).abs().max() < 0.05
    block = make["zero_branches"]().blocks[0]
    assert torch.equal(block(tokens), tokens), "it begins as the identity"
    dropouts = [
        module.p
        for module in make["zero_branches_paper_dropout"]().modules()
        if isinstance(module, torch.nn.Dropout)
    ]
    assert dropouts == [0.2] * (3 * 6 + 1)
