"""Fetching the data, checkpoints, and records of runs."""

import contextlib
import copy
import hashlib
import http.server
import io
import tarfile
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import assert_same_weights, small_model
from torchvision.datasets import CIFAR10

import training
from training import UserError

# --- Fetching, from a server on the loopback ------------------------------------------


class TinyCIFAR10(CIFAR10):
    """CIFAR-10's form with one small file, whose MD5 is known here."""

    base_folder = "cifar-10-batches-py"
    content = bytes(range(256)) * 4000
    train_list = (("data_batch_1", hashlib.md5(content).hexdigest()),)
    test_list = ()
    meta = None


def archive_of(content=TinyCIFAR10.content, name="data_batch_1"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=0) as tar:
        info = tarfile.TarInfo(f"{TinyCIFAR10.base_folder}/{name}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


ARCHIVE = archive_of()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the archive, in the manner that the path names."""

    def do_GET(self):
        manner = self.path.strip("/").partition("/")[0]
        with contextlib.suppress(ConnectionError):
            getattr(self, manner)()

    def send(self, content, length=None):
        self.send_response(200)
        self.send_header("Content-Length", str(length or len(content)))
        self.end_headers()
        self.wfile.write(content)

    def good(self):
        self.send(ARCHIVE)

    def missing(self):
        self.send_error(404)

    def cut(self):
        self.send(ARCHIVE[: len(ARCHIVE) // 2], length=len(ARCHIVE))

    def wrong(self):
        self.send(b"<html>not the archive</html>")

    def loop(self):
        self.send_response(302)
        self.send_header("Location", "/loop")
        self.end_headers()

    def moved(self):
        self.send_response(302)
        self.send_header("Location", "/good")
        self.end_headers()

    def silent(self):
        self.server.stop.wait(30)

    def slow_headers(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for number in range(300):
            self.wfile.write(b"X-Header-%d: x\r\n" % number)
            self.wfile.flush()
            if self.server.stop.wait(0.1):
                return

    def trickle(self):
        self.send(b"", length=len(ARCHIVE))
        for _ in range(300):
            self.wfile.write(bytes(100))
            self.wfile.flush()
            if self.server.stop.wait(0.1):
                return

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(training, "ARCHIVE_MD5", hashlib.md5(ARCHIVE).hexdigest())
    monkeypatch.setattr(training, "WATCH_SECONDS", WATCH_SECONDS)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.stop = threading.Event()
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, args=[0.02], daemon=True).start()
        yield lambda manner: f"http://127.0.0.1:{running.server_port}/{manner}"
        running.stop.set()
        running.shutdown()


def only_files(folder):
    return sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()
    )


WATCH_SECONDS = 0.5  # instead of 10
GOOD = ["cifar-10-batches-py/data_batch_1", training.ARCHIVE_NAME]


@pytest.mark.fault("download")
@pytest.mark.parametrize("manner", ["good", "moved"])
def test_a_good_source_is_fetched_and_unpacked(server, tmp_path, manner):
    training.fetch(TinyCIFAR10, tmp_path / "data", [server(manner)])
    assert only_files(tmp_path / "data") == sorted(GOOD)
    training.fetch(TinyCIFAR10, tmp_path / "data", ["nothing is fetched twice"])


@pytest.mark.fault("download")
@pytest.mark.parametrize(
    ("manner", "said"),
    [
        ("missing", "404"),
        ("cut", ""),
        ("wrong", "wrong MD5"),
        ("loop", "redirect"),
        ("silent", ""),
        ("slow_headers", "hopelessly slow"),
        ("trickle", "hopelessly slow"),
    ],
)
def test_a_bad_source_is_named_and_left_for_the_next(server, tmp_path, manner, said):
    start = time.monotonic()
    with pytest.raises(UserError, match=f"(?i){server(manner)}: .*{said}"):
        training.fetch(TinyCIFAR10, tmp_path, [server(manner)])
    training.fetch(TinyCIFAR10, tmp_path, [server(manner), server("good")])
    assert time.monotonic() - start < 10, "bounded: two watch periods and some"
    assert only_files(tmp_path) == sorted(GOOD)


@pytest.mark.fault("download")
def test_when_all_sources_fail_one_message_says_what_to_do(server, tmp_path):
    sources = [server("missing"), server("cut"), "http://127.0.0.1:1/refused"]
    with pytest.raises(UserError) as caught:
        training.fetch(TinyCIFAR10, tmp_path, sources)
    message = str(caught.value)
    for part in (*sources, training.ARCHIVE_NAME, training.ARCHIVE_MD5, str(tmp_path)):
        assert part in message
    assert only_files(tmp_path) == []


@pytest.mark.fault("download")
def test_dead_sources_cost_no_more_than_they_are_watched(server, tmp_path):
    manners = ["silent", "slow_headers", "trickle", "silent"]
    start = time.monotonic()
    with pytest.raises(UserError):
        training.fetch(TinyCIFAR10, tmp_path, [server(manner) for manner in manners])
    # Each costs WATCH_SECONDS and the grain of the watch
    assert time.monotonic() - start < len(manners) * (WATCH_SECONDS + 1)
    assert only_files(tmp_path) == []


@pytest.mark.fault("download")
def test_a_host_name_that_never_resolves_is_given_up(server, tmp_path, monkeypatch):
    asked = threading.Event()

    def hang(*_, **__):
        asked.wait(30)
        raise OSError("no name server")

    with monkeypatch.context() as patch:
        patch.setattr("socket.getaddrinfo", hang)
        start = time.monotonic()
        with pytest.raises(UserError, match="hopelessly slow"):
            training.fetch(TinyCIFAR10, tmp_path, ["http://nowhere.invalid/x"])
        assert time.monotonic() - start < 4
        asked.set()


@pytest.mark.fault("download")
def test_all_real_sources_dead_cost_less_than_a_minute():
    assert len(training.SOURCES) * (training.WATCH_SECONDS + 1) < 60


@pytest.mark.fault("data missing or corrupt")
def test_an_archive_put_there_by_hand_is_unpacked(server, tmp_path):
    (tmp_path / training.ARCHIVE_NAME).write_bytes(ARCHIVE)
    training.fetch(TinyCIFAR10, tmp_path, [])
    assert training.is_present(TinyCIFAR10, tmp_path)


@pytest.mark.fault("data missing or corrupt")
def test_a_broken_archive_is_named(server, tmp_path):
    (tmp_path / training.ARCHIVE_NAME).write_bytes(ARCHIVE[:-1])
    with pytest.raises(UserError, match="wrong MD5, so it is incomplete"):
        training.fetch(TinyCIFAR10, tmp_path, [])


@pytest.mark.fault("data missing or corrupt")
def test_a_damaged_file_is_not_present_and_repaired(server, tmp_path):
    training.fetch(TinyCIFAR10, tmp_path, [server("good")])
    file = tmp_path / GOOD[0]
    file.write_bytes(file.read_bytes()[:-1])
    assert not training.is_present(TinyCIFAR10, tmp_path)
    training.fetch(TinyCIFAR10, tmp_path, [])
    assert training.is_present(TinyCIFAR10, tmp_path)


# --- Files ---------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    training.write_whole(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training.os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        training.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert only_files(tmp_path) == ["file"]


# --- Checkpoints ---------------------------------------------------------------------

LOGITS, LABELS = torch.eye(2)[[0, 0, 1, 0, 1]], torch.tensor([0, 0, 1, 1, 0])
FOLDER = Path("run")  # of the runs below


def go_on(model, n_epochs=1, stop_after=None, **settings):
    """Train nothing: note made-up measurements of a run, and perhaps break off."""
    run = training.Run({"n_epochs": n_epochs, "seed": 0, **settings}, FOLDER)
    optimizer = torch.optim.Adam(model.parameters())
    with contextlib.suppress(StopIteration), run.started(model, optimizer, n_epochs, 2):
        for epoch in range(run.epochs_done, n_epochs):
            if epoch == stop_after:
                raise StopIteration
            for loss in (2.0, 1.5):
                run.note_step(torch.tensor(loss))
            run.note_epoch(0.5, LOGITS, LABELS)
    return run


def load(model, **settings):
    return training.load_record(FOLDER, settings, model)


def test_a_run_goes_on_after_its_last_epoch(workplace):
    model = small_model()
    go_on(model, n_epochs=3, stop_after=2)
    run = go_on(small_model(seed=1), n_epochs=3, stop_after=2)
    assert run.epochs_done == 2
    assert_same_weights(run.model, model)
    run = go_on(small_model(seed=1), n_epochs=3)
    assert run.history["train_losses"] == [2.0, 1.5] * 3
    assert run.history["val_accs_eval"] == [0.6] * 3
    assert only_files(FOLDER) == [training.HISTORY_NAME, training.WEIGHTS_NAME]


def test_a_checkpoint_of_other_settings_or_another_model_is_refused(workplace):
    go_on(small_model(), n_epochs=2, stop_after=1)
    before = only_files(FOLDER)
    with pytest.raises(UserError, match="n_epochs = 2, not 3"):
        go_on(small_model(), n_epochs=3)
    with pytest.raises(UserError, match="weights of another model"):
        go_on(small_model(hidden_size=16), n_epochs=2)
    assert only_files(FOLDER) == before, "nothing is deleted"


def test_a_restored_checkpoint_is_not_kept_open(workplace):
    go_on(small_model(), n_epochs=2, stop_after=1)
    run = go_on(small_model(), n_epochs=2, stop_after=1)
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("there is no /proc here")
    assert run.checkpoint.path.name not in maps.read_text(encoding="utf-8")


def test_a_checkpoint_that_cannot_be_read_now_is_kept(workplace, monkeypatch):
    go_on(small_model(), n_epochs=3, stop_after=2)

    def locked(*_):
        raise PermissionError(13, "used by another program")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", locked)
        with pytest.raises(UserError, match="close what uses it"):
            go_on(small_model(), n_epochs=3)
    assert len([*FOLDER.glob("*checkpoint*")]) == 2, "nothing is deleted"


def test_two_processes_do_not_train_the_same_run(workplace):
    import filelock

    FOLDER.mkdir()
    lock = filelock.FileLock(FOLDER / ".lock")
    with lock, pytest.raises(UserError, match="another process is training"):
        go_on(small_model())
    go_on(small_model())


# --- Records -------------------------------------------------------------------------


@pytest.mark.fault("damaged checkpoint or record")
def test_a_record_of_another_model_is_refused(workplace):
    go_on(small_model())
    assert load(small_model(seed=1))
    with pytest.raises(UserError, match="weights of another model"):
        load(small_model(hidden_size=16))
    silent = small_model()  # the same names and sizes, but another computation
    silent.blocks[0].attention.inner_module[0].eps = 10.0
    before = copy.deepcopy(silent)
    with pytest.raises(UserError, match="logits differ"):
        load(silent)
    assert_same_weights(silent, before)


def test_a_record_of_other_settings_is_refused(workplace):
    go_on(small_model())
    assert load(small_model(), n_epochs=1)
    with pytest.raises(UserError, match="n_epochs = 1, not 2"):
        load(small_model(), n_epochs=2)


def test_a_record_beside_the_notebooks_is_found_without_weights_too(workplace):
    run = go_on(small_model())
    for path in FOLDER.iterdir():
        path.rename(path.name)
    FOLDER.rmdir()
    model, history = load(small_model(seed=1))
    assert_same_weights(model, run.model)
    Path(training.WEIGHTS_NAME).unlink()
    assert load(small_model()) == (None, history)
    Path(training.HISTORY_NAME).unlink()
    with pytest.raises(UserError, match="there is no finished run in run"):
        load(small_model())


def test_the_summary_says_when_the_marks_were_reached(workplace):
    history = go_on(small_model()).history
    history |= {"dataset": "CIFAR10", "batch_size": 16, "lr": 1e-3}
    said = training.summary({**history, "val_accs": [0.2, 0.5, 0.6, 0.5]})
    assert "0.5000 (recipe), 0.6000 (eval)" in said
    assert "25% by the recipe's measure: reached in epoch 2" in said
    assert "50% by the recipe's measure: reached in epoch 2" in said
    assert "70% by the recipe's measure: not reached" in said


def test_hours_leave_out_a_night_of_sleep():
    assert training.hours({"epoch_seconds": [3600, 3600, 36_000]}) == 3


def test_progress_is_lines_in_a_log(workplace, capsys):
    go_on(small_model(), n_epochs=2)
    start, *epochs = capsys.readouterr().out.splitlines()
    assert start == f"The run starts; it is stored in {FOLDER}."
    assert [line.split(",")[0] for line in epochs] == [
        "epoch   1: loss 1.750",
        "epoch   2: loss 1.750",
    ]
