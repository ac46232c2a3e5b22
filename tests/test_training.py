"""Fetching the data, checkpoints, and records of runs."""

import contextlib
import hashlib
import http.server
import io
import json
import pickle
import tarfile
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import small_model
from torchvision.datasets import CIFAR10

import training
from training import Run, TrainingError

CPU = torch.device("cpu")


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
    monkeypatch.setattr(training, "WATCH_SECONDS", 1)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.stop = threading.Event()
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield lambda manner: f"http://127.0.0.1:{running.server_port}/{manner}"
        running.stop.set()
        running.shutdown()


def only_files(folder):
    return sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()
    )


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
def test_a_bad_source_is_left_for_the_next(server, tmp_path, capsys, manner, said):
    start = time.monotonic()
    training.fetch(TinyCIFAR10, tmp_path, [server(manner), server("good")])
    assert time.monotonic() - start < 5, "bounded: one watch period and some"
    assert only_files(tmp_path) == sorted(GOOD)
    assert said.lower() in capsys.readouterr().out.lower()


@pytest.mark.fault("download")
def test_when_all_sources_fail_one_message_says_what_to_do(server, tmp_path):
    sources = [server("missing"), server("cut"), "http://127.0.0.1:1/refused"]
    with pytest.raises(TrainingError) as caught:
        training.fetch(TinyCIFAR10, tmp_path, sources)
    message = str(caught.value)
    for part in (*sources, training.ARCHIVE_NAME, training.ARCHIVE_MD5, str(tmp_path)):
        assert part in message
    assert only_files(tmp_path) == []


@pytest.mark.fault("download")
def test_dead_sources_cost_no_more_than_they_are_watched(server, tmp_path):
    manners = ["silent", "slow_headers", "trickle", "silent"]
    start = time.monotonic()
    with pytest.raises(TrainingError):
        training.fetch(TinyCIFAR10, tmp_path, [server(manner) for manner in manners])
    # Each costs WATCH_SECONDS, here 1, and the grain of the watch
    assert time.monotonic() - start < len(manners) * 2
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
        with pytest.raises(TrainingError, match="hopelessly slow"):
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
    with pytest.raises(TrainingError, match="wrong MD5, so it is incomplete"):
        training.fetch(TinyCIFAR10, tmp_path, [])


@pytest.mark.fault("data missing or corrupt")
def test_a_damaged_file_is_not_present_and_repaired(server, tmp_path):
    training.fetch(TinyCIFAR10, tmp_path, [server("good")])
    file = tmp_path / GOOD[0]
    file.write_bytes(file.read_bytes()[:-1])
    assert not training.is_present(TinyCIFAR10, tmp_path)
    training.fetch(TinyCIFAR10, tmp_path, [])
    assert training.is_present(TinyCIFAR10, tmp_path)


def test_members_that_would_land_outside_are_refused(tmp_path):
    content = archive_of(name="../../../outside")
    (tmp_path / "deep").mkdir()
    archive = tmp_path / "deep" / training.ARCHIVE_NAME
    archive.write_bytes(content)
    with pytest.raises(TrainingError, match="could not be unpacked"):
        training._unpack(archive, tmp_path / "deep", TinyCIFAR10.base_folder)
    assert only_files(tmp_path) == [f"deep/{training.ARCHIVE_NAME}"]


# --- Files ---------------------------------------------------------------------------


@pytest.mark.fault("damaged checkpoint or record")
def test_tensors_come_back_and_damage_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.tensor(1.5)}
    training.save_tensors(path, tensors, "words")
    loaded, text = training.load_tensors(path)
    assert text == "words"
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    good = path.read_bytes()
    for position in range(0, len(good), max(1, len(good) // 40)):
        damaged = bytearray(good)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(TrainingError):
            training.load_tensors(path)
    for length in range(0, len(good), max(1, len(good) // 20)):
        path.write_bytes(good[:length])
        with pytest.raises(TrainingError):
            training.load_tensors(path)


def test_a_pickle_is_refused_and_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'executed')!r}, 'w')",))

    path = tmp_path / "x.safetensors"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(TrainingError, match="is damaged"):
        training.load_tensors(path)
    assert only_files(tmp_path) == ["x.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    training.write_whole(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training.os, "fsync", full)
    with pytest.raises(TrainingError, match="No space left"):
        training.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert only_files(tmp_path) == ["file"]


# --- Records -------------------------------------------------------------------------


def finish_run(model, n_epochs=1, losses=(2.0, 1.5)):
    """Record a run without training: the model as it is, and made-up measurements."""
    run = Run("CIFAR10", 16, 1e-3, n_epochs, 0, CPU)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in run.epochs(model, optimizer, steps_per_epoch=len(losses)):
        run.end_epoch(list(losses), 0.5, 0.6)
    return run


def load(model, n_epochs=1):
    return Run("CIFAR10", 16, 1e-3, n_epochs, 0, CPU).load_record(model)


@pytest.mark.fault("damaged checkpoint or record")
def test_a_record_of_another_architecture_is_refused(workplace):
    run = finish_run(small_model())
    assert load(small_model(seed=1))
    with pytest.raises(TrainingError, match="names or sizes differ"):
        load(small_model(hidden_size=16))
    silent = small_model()  # the same names and sizes, but another computation
    silent.blocks[0].attention.inner_module[0].eps = 10.0
    before = {name: value.clone() for name, value in silent.state_dict().items()}
    with pytest.raises(TrainingError, match="logits differ"):
        load(silent)
    for name, value in silent.state_dict().items():
        assert torch.equal(value, before[name]), "the model is left as it was"
    assert run.folder.is_dir()


@pytest.mark.parametrize("file", ["history.json", "vision_transformer.safetensors"])
def test_a_damaged_record_is_refused(workplace, file):
    path = finish_run(small_model()).folder / file
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TrainingError, match="restore"):
        load(small_model())


def test_a_history_alone_is_shown(workplace):
    run = finish_run(small_model())
    (run.folder / "history.json").rename(workplace / "history.json")
    again = Run("CIFAR10", 16, 1e-3, 1, 0, CPU)
    assert again.load_record(small_model())
    assert not again.has_weights
    assert "0.6000 (eval)" in again.summary()
    assert "50% by the recipe's measure: reached in epoch 1" in again.summary()
    assert "70% by the recipe's measure: not reached" in again.summary()


def test_without_a_record_it_says_so(workplace):
    run = Run("CIFAR10", 128, 3e-4, 50, 0, CPU)
    assert run.load_record(small_model()) is None
    assert run.summary().startswith("There is no finished run on CIFAR10 with batch")


@pytest.mark.fault("damaged checkpoint or record")
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    workplace, capsys, monkeypatch
):
    model = small_model()
    monkeypatch.setattr(Run, "_store_record", lambda run: None)  # keeps checkpoints
    run = finish_run(model, n_epochs=3)
    path = run.folder / training.CHECKPOINT_NAME
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    again = Run("CIFAR10", 16, 1e-3, 3, 0, CPU)
    optimizer = torch.optim.Adam(model.parameters())
    epochs = []
    for epoch in again.epochs(model, optimizer, steps_per_epoch=2):
        epochs.append(epoch)
        again.end_epoch([1.0, 1.0], 0.5, 0.5)
    assert epochs == [3]
    assert "damaged" in capsys.readouterr().out
    assert training.load_tensors(path), "whole again"


def test_a_restored_checkpoint_is_not_kept_open(workplace, monkeypatch):
    monkeypatch.setattr(Run, "_store_record", lambda run: None)
    finish_run(small_model(), n_epochs=1)
    again = Run("CIFAR10", 16, 1e-3, 1, 0, CPU)
    model = small_model()
    list(again.epochs(model, torch.optim.Adam(model.parameters()), 2))
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("there is no /proc here")
    assert training.CHECKPOINT_NAME not in maps.read_text(encoding="utf-8")


def test_a_record_of_other_parameters_is_not_overwritten(workplace):
    run = finish_run(small_model())
    other = Run("CIFAR10", 16, 1e-3, 1, 1, CPU)
    run.folder.rename(other.folder)
    with pytest.raises(TrainingError, match="other parameters"):
        other.load_record(small_model())
    other.folder.rename(run.folder)
    (run.folder / training.WEIGHTS_NAME).unlink()
    with pytest.raises(TrainingError, match="is missing: restore"):
        load(small_model())


def test_the_default_run_goes_to_its_place_in_the_project(workplace):
    run = Run("CIFAR10", 128, 3e-4, 50, 0, CPU)
    assert run.record_folder == run.folder
    (workplace / "report").mkdir()
    assert run.record_folder == training.RECORD_FOLDERS["default"]
    other = Run("DemoCIFAR10", 128, 3e-4, 50, 0, CPU)
    assert other.record_folder == other.folder


def test_records_are_plain_json(workplace):
    run = finish_run(small_model())
    text = (run.folder / "history.json").read_text(encoding="utf-8")
    assert json.loads(text)["probe_logits"] == training.probe(small_model())


def test_two_processes_do_not_train_the_same_run(workplace):
    import filelock

    run = Run("CIFAR10", 16, 1e-3, 1, 0, CPU)
    run.folder.parent.mkdir(parents=True)
    model = small_model()
    other = filelock.FileLock(run.folder.with_name(f".{run.folder.name}.lock"))
    with other, pytest.raises(TrainingError, match="another process is training"):
        next(run.epochs(model, torch.optim.Adam(model.parameters()), 1))
    finish_run(model)


def test_a_checkpoint_that_cannot_be_read_now_is_kept(workplace, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_store_record", lambda run: None)
        run = finish_run(small_model(), n_epochs=2)

    def locked(*_, **__):
        raise PermissionError(13, "used by another program")

    monkeypatch.setattr(training.safetensors, "safe_open", locked)
    with pytest.raises(TrainingError, match="close what uses it"):
        finish_run(small_model(), n_epochs=2)
    assert len([*run.folder.glob("*checkpoint*")]) == 2, "nothing is deleted"
