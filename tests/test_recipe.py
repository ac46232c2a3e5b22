"""The provided recipe, computed step for step."""

import contextlib
import gc
import multiprocessing
import os

import pytest
import torch
from small_run import counted, small_model
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import recipe_check
import vision_transformer
from support import records, training
from support.records import UserError

CPU = torch.device("cpu")
BATCH_SIZE, LR = 16, 1e-3


def settings(n_epochs):
    free = {"batch_size": BATCH_SIZE, "lr": LR, "n_epochs": n_epochs}
    return {"dataset": "DemoCIFAR10", **free, "seed": 0}


def train(n_epochs=1, lr=LR, loaders=None):
    torch.manual_seed(0)
    model, run = small_model(), training.Run(settings(n_epochs))
    loaders = loaders or vision_transformer.make_loaders("data", BATCH_SIZE)
    return vision_transformer.train(model, *loaders, lr, n_epochs, CPU, run), model


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_recipe_is_computed_bit_for_bit(demo_data, monkeypatch, capsys):
    monkeypatch.setattr(
        vision_transformer, "VisionTransformer", lambda layers: small_model()
    )
    assert recipe_check.main() == 0
    monkeypatch.setattr(vision_transformer, "validate", lambda *_: 0.5)
    assert recipe_check.main() == 1
    assert capsys.readouterr().out.count("\n") == 2


def test_what_is_measured_beside_the_recipe_is_without_dropout(demo_data, workplace):
    history, model = train()
    _, loader = vision_transformer.make_loaders("data", 40)
    [[images, labels]] = loader  # all of them
    assert labels.tolist() == loader.dataset.targets
    logits = model.eval()(images)
    right = (logits.argmax(dim=1) == labels).sum().item() / 40
    assert history["val_accs_eval"] == [right]
    loss = cross_entropy(logits, labels).item()
    assert history["val_losses_eval"] == [pytest.approx(loss, rel=1e-5)]


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX limits")
def test_what_workers_made_does_not_outlive_its_batch():
    import resource

    data = TensorDataset(torch.zeros(300, 3, 32, 32), torch.zeros(300).long())
    loader = DataLoader(data, batch_size=1, num_workers=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, hard))
    try:
        logits, _ = vision_transformer.predict(small_model(), loader, CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(logits) == 300


@pytest.mark.fault("numerics")
def test_a_run_that_diverges_says_so_and_saves_nothing(
    demo_data, workplace, monkeypatch
):
    monkeypatch.setattr(training, "LOOK_EVERY", 1)
    monkeypatch.setattr(vision_transformer, "validate", None)  # not so far
    with pytest.raises(UserError, match=r"(nan|inf) in epoch 1: the run diverged"):
        train(n_epochs=2, lr=1e30)
    [path] = records.RUNS.glob(f"*/{training.CHECKPOINT_NAME}")
    assert training.read_checkpoint(path)["history"]["val_accs"] == []


@pytest.mark.fault("training killed (SIGKILL)")
def test_a_worker_that_is_killed_is_named(demo_data, workplace, monkeypatch):
    def kill_worker(*_):
        multiprocessing.active_children()[0].kill()

    stop = counted(training.Run.note_step, 8, before=kill_worker)
    monkeypatch.setattr(training.Run, "note_step", stop)
    reason = r"(DataLoader worker|.*reset by peer).* 1 of 3 epochs"
    with pytest.raises(UserError, match=rf"is gone \({reason}"):
        train(n_epochs=3)
    # torch raises at every end of a process until the loader that lost one is gone
    with contextlib.suppress(RuntimeError):
        gc.collect()


def test_default_parameters_are_the_recipe():
    v = vision_transformer
    given = {"batch_size": v.BATCH_SIZE, "lr": v.LR, "n_epochs": v.N_EPOCHS}
    assert given == {"batch_size": 128, "lr": 3e-4, "n_epochs": 50}
    assert {"dataset": "CIFAR10", **given, "seed": 0} == records.DEFAULT
    assert v.DATASET_CACHE_DIR == "./data"


def test_training_works_where_workers_are_spawned(demo_data, workplace):
    loaders = vision_transformer.make_loaders("data", BATCH_SIZE)
    for loader, number in zip(loaders, (1, 0), strict=True):
        loader.num_workers = number  # each of them loads torch again
    loaders[0].multiprocessing_context = "spawn"  # as on Windows and macOS
    history, _ = train(loaders=loaders)
    assert len(history["train_losses"]) == 100 // BATCH_SIZE
