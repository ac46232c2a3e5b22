"""The provided recipe: computed step for step, continued bit for bit."""

import multiprocessing
import os
import shutil

import pytest
import torch
from conftest import assert_same_weights
from small_run import alive, counted, small_model
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import recipe_check
import vision_transformer
from support import dataset, records, training
from support.records import UserError

CPU = torch.device("cpu")
BATCH_SIZE, LR = 16, 1e-3


def settings(n_epochs, seed=0):
    free = {"batch_size": BATCH_SIZE, "lr": LR, "n_epochs": n_epochs}
    return {"dataset": "DemoCIFAR10", **free, "seed": seed}


def train(n_epochs, seed=0):
    """Train a small model by the recipe; ``seed`` is that of the process before it."""
    torch.manual_seed(seed)
    model = small_model(seed)
    loaders = vision_transformer.make_loaders("data", BATCH_SIZE)
    run = training.Run(settings(n_epochs))
    return vision_transformer.train(model, *loaders, LR, n_epochs, CPU, run), model, run


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_recipe_is_computed_bit_for_bit(demo_data, workplace):
    history, model, _ = train(n_epochs=2)
    expected = small_model()
    losses, accuracies = recipe_check.plain_loop(expected, BATCH_SIZE, LR, n_epochs=2)
    assert history["train_losses"] == losses
    assert history["val_accs"] == accuracies
    assert_same_weights(model, expected)
    assert len(losses) == 2 * (100 // BATCH_SIZE)
    _, val_loader = vision_transformer.make_loaders("data", 40)
    [[images, labels]] = val_loader  # all of them
    logits = expected.eval()(images)
    right = (logits.argmax(dim=1) == labels).sum().item() / 40
    assert history["val_accs_eval"][-1] == right
    assert history["val_losses_eval"][-1] == pytest.approx(
        cross_entropy(logits, labels).item(), rel=1e-5
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_grader_s_check_sees_a_difference(demo_data, monkeypatch, capsys):
    monkeypatch.setattr(
        vision_transformer, "VisionTransformer", lambda layers: small_model()
    )
    assert recipe_check.main() == 0
    monkeypatch.setattr(vision_transformer, "validate", lambda *_: 0.5)
    assert recipe_check.main() == 1
    assert capsys.readouterr().out.count("\n") == 2


def test_predictions_are_without_dropout(demo_data):
    model = alive(small_model(p_dropout=0.9))
    _, loader = vision_transformer.make_loaders("data", BATCH_SIZE)
    logits, labels = vision_transformer.predict(model, loader, CPU)
    assert labels.tolist() == loader.dataset.targets
    with torch.no_grad():
        images = torch.cat([images for images, _ in loader])
        torch.testing.assert_close(model.eval()(images), logits)


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
@pytest.mark.parametrize("first", [1, training.LOOK_EVERY])  # step or epoch
def test_a_run_that_diverges_says_so_and_saves_nothing(
    demo_data, workplace, monkeypatch, first
):
    monkeypatch.setattr(training, "LOOK_EVERY", first)
    if first == 1:
        monkeypatch.setattr(vision_transformer, "validate", None)  # not so far
    torch.manual_seed(0)
    loaders = vision_transformer.make_loaders("data", BATCH_SIZE)
    run = training.Run(settings(n_epochs=2))
    with pytest.raises(UserError, match=r"(nan|inf) in epoch 1: the run diverged"):
        vision_transformer.train(small_model(), *loaders, 1e30, 2, CPU, run)
    assert training.read_checkpoint(run.checkpoint)["history"]["val_accs"] == []


@pytest.mark.fault("training killed (SIGKILL)")
def test_a_worker_that_is_killed_is_named(demo_data, workplace, monkeypatch):
    def kill_worker(*_):
        multiprocessing.active_children()[0].kill()

    stop = counted(training.Run.note_step, 8, before=kill_worker)
    monkeypatch.setattr(training.Run, "note_step", stop)
    with pytest.raises(UserError, match=r"is gone \(DataLoader worker.* 1 of 3 epochs"):
        train(n_epochs=3)


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("last_step", [2, 9])  # of the first and second epoch
def test_an_interrupted_run_ends_where_the_whole_one_does(
    demo_data, workplace, monkeypatch, last_step
):
    whole, expected, run = train(n_epochs=3)
    shutil.rmtree(run.folder)

    with monkeypatch.context() as patch:
        stop = counted(training.Run.note_step, last_step, before=interrupt)
        patch.setattr(training.Run, "note_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(n_epochs=3)
    # Another process, with other random numbers behind it
    history, model, _ = train(n_epochs=3, seed=1)
    for key in ("train_losses", "val_accs", "val_accs_eval", "val_losses_eval"):
        assert history[key] == whole[key]
    assert_same_weights(model, expected)


def test_a_finished_run_is_loaded_not_repeated(demo_data, workplace, monkeypatch):
    monkeypatch.setattr(vision_transformer, "VisionTransformer", small_model)
    monkeypatch.setattr(dataset, "fetch", lambda *_: None)
    model, history = vision_transformer.train_run(settings(1), "data", CPU)
    monkeypatch.setattr(vision_transformer, "train", None)
    again, same = vision_transformer.train_run(settings(1), "data", CPU)
    assert same == history
    assert_same_weights(again, model)


def test_default_parameters_are_the_recipe():
    v = vision_transformer
    assert v.DATASET_CACHE_DIR == "./data"
    assert (v.BATCH_SIZE, v.LR, v.N_EPOCHS) == (128, 3e-4, 50)
    given = {"batch_size": v.BATCH_SIZE, "lr": v.LR, "n_epochs": v.N_EPOCHS}
    assert records.PRESETS["default"] == {"dataset": "CIFAR10", **given, "seed": 0}


def test_training_works_where_workers_are_spawned(demo_data, workplace):
    loaders = vision_transformer.make_loaders("data", BATCH_SIZE)
    for loader, number in zip(loaders, (1, 0), strict=True):
        loader.num_workers = number  # each of them loads torch again
    loaders[0].multiprocessing_context = "spawn"  # as on Windows and macOS
    run = training.Run(settings(n_epochs=1))
    history = vision_transformer.train(small_model(), *loaders, LR, 1, CPU, run)
    assert len(history["train_losses"]) == 100 // BATCH_SIZE
