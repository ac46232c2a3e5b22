"""Checkpoints and records of runs."""

import contextlib
import errno
import io
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import filelock
import pytest
import torch
from conftest import only_files
from small_run import alive, small_model
from tqdm import tqdm

from support import records, training
from support.records import UserError

LOGITS, LABELS = torch.eye(2)[[0, 0, 1, 0, 1]], torch.tensor([0, 0, 1, 1, 0])
FOLDER = Path("run")  # of the runs below


def go_on(model, n_epochs=1, stop_after=None, **settings):
    """Train nothing: note made-up measurements of a run, and perhaps break off."""
    run = training.Run({"n_epochs": n_epochs, "seed": 0, **settings}, FOLDER)
    optimizer = torch.optim.Adam(model.parameters())
    with contextlib.suppress(StopIteration), run.started(model, optimizer, n_epochs, 2):
        if not run.epochs_done:
            alive(model)
        for epoch in range(run.epochs_done, n_epochs):
            if epoch == stop_after:
                raise StopIteration
            for loss in (2.0, 1.5):
                run.note_step(torch.tensor(loss))
            run.note_epoch(0.5, LOGITS, LABELS)
    return run


def load(model, **settings):
    return records.load_record(FOLDER, settings, model)


def with_other_norm():
    """A model with the same names and sizes, but another computation."""
    model = small_model()
    model.blocks[0].attention.inner_module[0].eps = 10.0
    return model


def beginning_with_ones():
    model = small_model()
    torch.nn.init.ones_(model.head.weight)
    return model


@pytest.mark.fault("damaged checkpoint or record")
@pytest.mark.parametrize("is_finished", [False, True])
@pytest.mark.parametrize(
    ("model", "n_epochs", "said"),
    [
        (small_model, 3, "n_epochs = 2, not 3"),
        (lambda: small_model(hidden_size=16), 2, "of another model"),
        (with_other_norm, 2, "logits differ"),
        (lambda: small_model(p_dropout=0.1), 2, "2 drops out 0.2, not 0.1: restore"),
        (beginning_with_ones, 2, r"head.weight begins with 0\.\d+, not 1"),
    ],
)
def test_what_is_of_another_model_or_other_settings_is_refused(
    workplace, is_finished, model, n_epochs, said
):
    go_on(small_model(), n_epochs=2, stop_after=None if is_finished else 1)
    before = only_files(FOLDER)
    again = load if is_finished else go_on
    with pytest.raises(UserError, match=said):
        again(model(), n_epochs=n_epochs)
    assert only_files(FOLDER) == before, "nothing is deleted"
    assert again(small_model(seed=1), n_epochs=2)


def test_a_report_trains_nothing(workplace, monkeypatch):
    monkeypatch.setenv("NO_TRAINING", "1")  # as a command sets it for its kernel
    with pytest.raises(UserError, match="holds no finished run, and a report trains"):
        go_on(small_model())
    assert not list(FOLDER.glob("*"))


def test_a_checkpoint_is_kept_where_memory_is_too_small_for_it(workplace, monkeypatch):
    path = go_on(small_model(), n_epochs=3, stop_after=2).checkpoint
    monkeypatch.setattr(torch, "load", mock.Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        go_on(small_model(), n_epochs=3)
    assert path.is_file()


def test_two_processes_do_not_train_the_same_run(workplace):
    FOLDER.mkdir()
    lock = filelock.FileLock(FOLDER / ".lock")
    with lock, pytest.raises(UserError, match="another process is training"):
        go_on(small_model())
    go_on(small_model())


@pytest.mark.fault("disk full, read-only, gone")
@pytest.mark.parametrize(
    "error", [NotImplementedError("no flock"), OSError(errno.ENOLCK, "no locks")]
)
def test_a_file_system_without_locks_will_do(workplace, monkeypatch, error):
    monkeypatch.setattr(filelock.FileLock, "acquire", mock.Mock(side_effect=error))
    go_on(small_model())
    assert load(small_model())


@pytest.mark.fault("disk full, read-only, gone")
@pytest.mark.parametrize(
    ("owner", "name", "number", "remedy"),
    [
        (os, "fsync", errno.ENOSPC, "make room,"),
        (Path, "open", errno.EROFS, "choose a folder that can be written"),
        (Path, "open", errno.EMFILE, "ulimit"),
        (os, "replace", errno.EACCES, "close what uses it"),  # Windows, an open file
    ],
)
def test_a_write_that_fails_costs_nothing_stored(
    workplace, monkeypatch, owner, name, number, remedy
):
    records.write_whole("file", b"old")
    error = OSError(number, os.strerror(number))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(owner, name, mock.Mock(side_effect=error))
        records.write_whole("file", b"new")
    assert error.strerror in str(caught.value)
    assert remedy in str(caught.value)
    assert Path("file").read_bytes() == b"old"
    assert only_files(Path()) == ["file"]


def test_a_file_that_a_scanner_holds_for_a_moment_is_replaced(workplace, monkeypatch):
    done = [PermissionError(13, "in use"), PermissionError(13, "in use"), None]
    monkeypatch.setattr(os, "replace", mock.Mock(side_effect=done))
    records.move("a", "b")


def test_the_folder_of_a_run_is_named_by_what_differs():
    for changes, name in (
        ({}, "exercise"),
        ({"n_epochs": 1}, "epochs-1"),
        ({"batch_size": 64, "lr": 1e-3}, "batch_size-64-lr-0.001"),
        (records.QUICK, "quick"),
        ({**records.QUICK, "seed": 1}, "batch_size-32-lr-0.0002-epochs-8-seed-1"),
    ):
        run = training.Run({**records.DEFAULT, **changes})
        assert run.folder == Path("runs", name)


def test_random_numbers_of_a_gpu_are_saved_and_restored(workplace, monkeypatch):
    go_on(small_model(), n_epochs=3, stop_after=1)  # on the CPU, and then on a GPU
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(torch.optim, "Adam", lambda _: mock.Mock(state_dict=dict))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.tensor(7))
    monkeypatch.setattr(torch.cuda, "set_rng_state", mock.Mock())
    for restored in ([], [mock.call(torch.tensor(7))]):
        model = small_model()
        model.parameters = lambda: iter([on_gpu])
        go_on(model, n_epochs=3, stop_after=2)
        assert torch.cuda.set_rng_state.mock_calls == restored


@pytest.mark.fault("numerics")
@pytest.mark.parametrize(
    ("loss", "logit", "look_every"),
    [(float("inf"), 1.0, 1), (float("inf"), 1.0, 2), (2.0, float("nan"), 2)],
)
def test_an_epoch_that_diverges_is_not_saved(
    workplace, monkeypatch, loss, logit, look_every
):
    monkeypatch.setattr(training, "LOOK_EVERY", look_every)
    model, run = small_model(), training.Run({"seed": 0}, FOLDER)
    optimizer = torch.optim.Adam(model.parameters())
    refused = pytest.raises(UserError, match="in epoch 1: the run diverged")
    with refused, run.started(model, optimizer, 2, 1):
        run.note_step(torch.tensor(loss))
        run.note_epoch(0.5, logit * LOGITS, LABELS)
    assert run.epochs_done == 0


def test_the_bar_says_when_an_epoch_is_validated(workplace, monkeypatch):
    shown = []
    bar = tqdm(total=4, file=io.StringIO(), mininterval=0)
    monkeypatch.setattr(bar, "set_postfix_str", lambda s, **_: shown.append(s))
    monkeypatch.setattr(training, "progress_bar", lambda *_: bar)
    go_on(small_model(), n_epochs=2)
    assert shown == ["", "loss 2.000", "loss 1.500", "validating"] * 2 + [""]


def test_a_record_without_weights_is_checked_alike(workplace):
    run = go_on(small_model())
    Path(FOLDER, records.WEIGHTS_NAME).unlink()
    assert load(small_model()) == (None, run.history)
    with pytest.raises(UserError, match="drops out"):
        load(small_model(p_dropout=0.1))


@pytest.mark.fault("damaged checkpoint or record")
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("format", 0, "it has format 0, and 2 is read"),
        ("lr", "1); import os; (", "lr = .* is no float"),
        ("val_accs", ["0.5"], "val_accs = .* is no float"),
        ("begins", [0.1], "begins = .* is no dict"),
        ("probe_logits", [[float("-inf")]], "probe_logits = -inf: the run diverged"),
    ],
)
def test_values_of_another_kind_are_refused(workplace, name, value, said):
    history = {**go_on(small_model()).history, name: value}
    history["sha256"] = records.history_digest(history)
    Path(FOLDER, records.HISTORY_NAME).write_text(json.dumps(history), "utf-8")
    with pytest.raises(UserError, match=said):
        records.read_history(FOLDER)


@pytest.mark.fault("damaged checkpoint or record")
def test_a_checkpoint_of_something_else_or_diverged_is_named(workplace):
    path = go_on(small_model(), n_epochs=2, stop_after=1).checkpoint
    state = torch.load(path)
    nan = float("nan")
    for other, said in (
        (state["model"], "holds something else"),
        ({**state, "history": {**state["history"], "val_accs": 7}}, "is no list"),
        ({**state, "history": {**state["history"], "val_accs": [nan]}}, "diverged"),
        ({**state, "probe_logits": [[nan]]}, "weights that give NaN .* diverged"),
    ):
        torch.save(other, path)
        with pytest.raises(UserError, match=said):
            go_on(small_model(), n_epochs=2)


def test_the_summary_says_when_the_marks_were_reached(workplace):
    history = {**records.DEFAULT, **go_on(small_model()).history}
    # Hours leave out a night of sleep
    history["epoch_seconds"] = [1800, 1800, 36_000, 1800]
    history["val_accs"] = [0.2, 0.5, 0.6, 0.5]
    said = records.summary(history, "runs/mine")
    assert "2.00 hours" in said
    assert "0.5000 (recipe), 0.6000 (eval)" in said
    assert "50% by the recipe's measure: 0.5000 in epoch 2" in said
    assert "70% by the recipe's measure: not reached" in said


def test_steps_that_become_slow_are_told_once(workplace, monkeypatch, capsys):
    seconds = iter([*range(0, 10, 2), *range(10, 200, 10)])  # each look is later
    monkeypatch.setattr(training, "LOOK_EVERY", 1)
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(seconds))
    go_on(small_model(), n_epochs=4)
    assert capsys.readouterr().out.count("three times as long") == 1


@pytest.mark.parametrize(
    ("facts", "is_told", "is_said"),
    [
        ("vendor_id: AuthenticAMD\nflags: avx2 avx512f", False, True),
        ("vendor_id: AuthenticAMD\nflags: avx2 avx512f", True, False),
        ("vendor_id: AuthenticAMD\nflags: avx2", False, False),
        ("vendor_id: GenuineIntel\nflags: avx2 avx512f", False, False),
    ],
)
def test_an_amd_processor_that_could_do_more_is_told(
    workplace, monkeypatch, capsys, facts, is_told, is_said
):
    Path("cpuinfo").write_text(facts, encoding="utf-8")
    monkeypatch.setattr(training, "CPUINFO", Path("cpuinfo"))
    monkeypatch.setattr(training, "mkl_is_told", lambda: is_told)
    run = go_on(small_model())
    assert ("of this AMD processor idle" in capsys.readouterr().out) == is_said
    assert ("MKL told" in run.history["machine"]) == is_told
