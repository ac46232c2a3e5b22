"""Fetching the data, from a server on the loopback."""

import contextlib
import hashlib
import http.server
import io
import tarfile
import threading
import time

import pytest
from conftest import only_files
from torchvision.datasets import CIFAR10

import dataset
from training import UserError


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
    monkeypatch.setattr(dataset, "ARCHIVE_MD5", hashlib.md5(ARCHIVE).hexdigest())
    monkeypatch.setattr(dataset, "WATCH_SECONDS", WATCH_SECONDS)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.stop = threading.Event()
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, args=[0.02], daemon=True).start()
        yield lambda manner: f"http://127.0.0.1:{running.server_port}/{manner}"
        running.stop.set()
        running.shutdown()


WATCH_SECONDS = 0.5  # instead of 10
GOOD = ["cifar-10-batches-py/data_batch_1", dataset.ARCHIVE_NAME]


@pytest.mark.fault("download")
@pytest.mark.parametrize("manner", ["good", "moved"])
def test_a_good_source_is_fetched_and_unpacked(server, tmp_path, manner):
    dataset.fetch(TinyCIFAR10, tmp_path / "data", [server(manner)])
    assert only_files(tmp_path / "data") == sorted(GOOD)
    dataset.fetch(TinyCIFAR10, tmp_path / "data", ["nothing is fetched twice"])


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
        dataset.fetch(TinyCIFAR10, tmp_path, [server(manner)])
    dataset.fetch(TinyCIFAR10, tmp_path, [server(manner), server("good")])
    assert time.monotonic() - start < 10, "bounded: two watch periods and some"
    assert only_files(tmp_path) == sorted(GOOD)


@pytest.mark.fault("download")
def test_when_all_sources_fail_one_message_says_what_to_do(server, tmp_path):
    sources = [server("missing"), server("cut"), "http://127.0.0.1:1/refused"]
    with pytest.raises(UserError) as caught:
        dataset.fetch(TinyCIFAR10, tmp_path, sources)
    message = str(caught.value)
    for part in (*sources, dataset.ARCHIVE_NAME, dataset.ARCHIVE_MD5, str(tmp_path)):
        assert part in message
    for source in sources:
        assert sum(source in line for line in message.splitlines()) == 1
    assert only_files(tmp_path) == []


@pytest.mark.fault("download")
def test_dead_sources_cost_no_more_than_they_are_watched(server, tmp_path):
    manners = ["silent", "slow_headers", "trickle", "silent"]
    start = time.monotonic()
    with pytest.raises(UserError):
        dataset.fetch(TinyCIFAR10, tmp_path, [server(manner) for manner in manners])
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
            dataset.fetch(TinyCIFAR10, tmp_path, ["http://nowhere.invalid/x"])
        assert time.monotonic() - start < 4
        asked.set()


@pytest.mark.fault("download")
def test_all_real_sources_dead_cost_less_than_a_minute():
    assert len(dataset.SOURCES) * (dataset.WATCH_SECONDS + 1) < 60


@pytest.mark.fault("data missing or corrupt")
def test_an_archive_put_there_by_hand_is_unpacked(server, tmp_path):
    (tmp_path / dataset.ARCHIVE_NAME).write_bytes(ARCHIVE)
    dataset.fetch(TinyCIFAR10, tmp_path, [])
    assert dataset.is_present(TinyCIFAR10, tmp_path)


@pytest.mark.fault("data missing or corrupt")
def test_a_broken_archive_is_named(server, tmp_path):
    (tmp_path / dataset.ARCHIVE_NAME).write_bytes(ARCHIVE[:-1])
    with pytest.raises(UserError, match="wrong MD5, so it is incomplete"):
        dataset.fetch(TinyCIFAR10, tmp_path, [])


@pytest.mark.fault("data missing or corrupt")
def test_a_damaged_file_is_not_present_and_repaired(server, tmp_path):
    dataset.fetch(TinyCIFAR10, tmp_path, [server("good")])
    file = tmp_path / GOOD[0]
    file.write_bytes(file.read_bytes()[:-1])
    assert not dataset.is_present(TinyCIFAR10, tmp_path)
    dataset.fetch(TinyCIFAR10, tmp_path, [])
    assert dataset.is_present(TinyCIFAR10, tmp_path)
