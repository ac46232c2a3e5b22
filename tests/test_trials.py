"""The short runs that choices and ablations rest on."""

import json
import math
import statistics
import sys
import time
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT
from small_run import alive

from support import records

sys.path.insert(0, str(ROOT / "bench"))
import speed
import trials


def test_every_record_is_of_a_trial_that_is_listed_and_was_finished():
    listed = {trial.path: asdict(trial) for trial in trials.TRIALS}
    quick = {**records.PRESETS["quick"], "format": records.FORMAT}
    listed |= {trials.seed_path(seed): {**quick, "seed": seed} for seed in trials.SEEDS}
    paths = sorted(trials.FOLDER.glob("*.json"))
    assert paths
    for path in paths:
        record, settings = json.loads(path.read_text(encoding="utf-8")), listed[path]
        assert {key: record[key] for key in settings} == settings
        accuracies = record.get("held_out_accs") or record["val_accs"]
        assert len(accuracies) == record.get("epochs", record.get("n_epochs"))


def test_a_trial_is_judged_by_images_that_it_never_trains_on(monkeypatch):
    def images(cache_dir, train, transform):
        assert train, "the test images choose nothing"
        return range(50_000)

    monkeypatch.setattr(trials, "CIFAR10", images)
    trial = trials.TRIALS[0]
    loaders = trials.loaders(trial, "data")
    learned, judged = (set(loader.dataset.indices) for loader in loaders)
    assert (len(learned), len(judged)) == (trial.images, 5_000)
    assert not learned & judged


@pytest.mark.parametrize("name", trials.MODELS)
def test_the_variants_are_models_that_learn(name, monkeypatch):
    monkeypatch.setattr(trials, "patch_covariance", lambda p: torch.eye(3 * p * p))
    torch.manual_seed(0)
    model = alive(trials.MODELS[name]())
    images, labels = torch.randn(2, 3, 32, 32), torch.arange(2)
    logits = model(images)
    assert logits.shape == (2, 10)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    learned = [p for p in model.parameters() if p.requires_grad]
    assert all(0 < p.grad.abs().max() < math.inf for p in learned)


def test_a_candidate_that_takes_longer_has_a_ratio_above_one():
    wait = {"ours": 0.002, "slow": 0.008}
    functions = {name: lambda s=s: time.sleep(s) for name, s in wait.items()}
    measured = speed.measure(functions, 3, torch.device("cpu"))
    assert measured["ours"]["times_ours"] == 1
    assert 2 < measured["slow"]["times_ours"] < 8


def test_the_tables_say_what_the_records_say():
    tables = trials.tables()
    for name, rows in tables.items():
        path = ROOT / records.RUNS / f"{name}.csv"
        assert trials.as_csv(rows) == path.read_text(encoding="utf-8")
    final = next(r for r in tables["trials"] if r[:2] == ["final", trials.XAVIER])
    path = trials.FOLDER / "final-zero-branches-MLP-dropout.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    assert float(final[-3]) == pytest.approx(
        20 * sum(record["held_out_accs"][-5:]), abs=0.006
    )
    single = [r for r in tables["trials"] if r[:2] == ["ablation", "Xavier patches"]]
    found = next(r for r in tables["ablations"] if r[0] == "Xavier patches")
    assert found[1] == len(single) == 3
    accuracies = [float(row[-3]) for row in single]
    assert float(found[2]) == pytest.approx(statistics.mean(accuracies), abs=0.011)
    *runs, mean, deviation = tables["seeds"][1:]
    accuracies = [float(run[1]) for run in runs]
    assert float(mean[1]) == pytest.approx(statistics.mean(accuracies), abs=0.01)
    assert float(deviation[1]) == pytest.approx(statistics.stdev(accuracies), abs=0.01)
