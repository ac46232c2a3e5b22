"""Fetching the data, whatever a server does."""

import errno
import functools
import hashlib
import io
import os
import tarfile
import threading
import time
from unittest import mock

import httpx
import pytest
from conftest import only_files
from torchvision.datasets import CIFAR10

from support import dataset
from support.records import UserError


class TinyCIFAR10(CIFAR10):
    """CIFAR-10's form with one small file, whose MD5 is known here."""

    base_folder = "cifar-10-batches-py"
    content = bytes(range(256)) * 4000
    train_list = (("data_batch_1", hashlib.md5(content).hexdigest()),)
    test_list = ()
    meta = None


GOOD = ["cifar-10-batches-py/data_batch_1", dataset.ARCHIVE_NAME]
WATCH_SECONDS = 0.5  # instead of 10


def make_archive():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=0) as tar:
        info = tarfile.TarInfo(GOOD[0])
        info.size = len(TinyCIFAR10.content)
        tar.addfile(info, io.BytesIO(TinyCIFAR10.content))
    return buffer.getvalue()


ARCHIVE = make_archive()


@pytest.fixture
def server(monkeypatch):
    """Addresses of a server that answers in the manner that they name."""
    stop = threading.Event()

    def drip():
        while not stop.wait(0.1):
            yield bytes(100)

    def answer(request):
        manner = request.url.path[1:]
        if manner == "nobody":
            raise httpx.ConnectError("refused")
        if manner == "silent":
            stop.wait(30)
        if manner == "moved":
            return httpx.Response(302, headers={"Location": "/good"})
        sent = {"good": [ARCHIVE], "wrong": [b"<html>"], "trickle": drip()}
        code = 404 if manner == "missing" else 200
        return httpx.Response(code, content=iter(sent.get(manner, [])))

    monkeypatch.setattr(dataset, "ARCHIVE_MD5", hashlib.md5(ARCHIVE).hexdigest())
    monkeypatch.setattr(dataset, "WATCH_SECONDS", WATCH_SECONDS)
    transport = httpx.MockTransport(answer)
    client = functools.partial(httpx.Client, transport=transport)
    monkeypatch.setattr(httpx, "Client", client)
    yield "http://x.org/{}".format
    stop.set()


@pytest.mark.fault("download")
@pytest.mark.parametrize("manner", ["good", "moved"])
def test_a_good_source_is_fetched_once_and_unpacked(server, tmp_path, manner):
    killed, going_on = tmp_path / ".cifar-10-killed", tmp_path / ".cifar-10-going-on"
    for path in (killed, going_on):  # of other processes
        path.touch()
    os.utime(killed, (0, 0))
    dataset.fetch(TinyCIFAR10, tmp_path, [server(manner)])
    assert only_files(tmp_path) == sorted([*GOOD, going_on.name])
    mode = (tmp_path / dataset.ARCHIVE_NAME).stat().st_mode
    assert mode == going_on.stat().st_mode, "others may read it, too"
    dataset.fetch(TinyCIFAR10, tmp_path, ["nothing is fetched twice"])


@pytest.mark.fault("download")
@pytest.mark.parametrize(
    ("manner", "said"),
    [
        ("missing", "404"),
        ("wrong", "wrong MD5"),
        ("silent", "hopelessly slow"),
        ("trickle", "hopelessly slow"),
    ],
)
def test_a_bad_source_is_named_and_left_for_the_next(server, tmp_path, manner, said):
    start = time.monotonic()
    with pytest.raises(UserError, match=f"(?i){server(manner)}: .*{said}") as caught:
        dataset.fetch(TinyCIFAR10, tmp_path, [server(manner)])
    assert f"put it at {tmp_path / dataset.ARCHIVE_NAME}" in str(caught.value)
    assert only_files(tmp_path) == []
    dataset.fetch(
        TinyCIFAR10, tmp_path, [server(manner), server("nobody"), server("good")]
    )
    # Asked twice, and given up after WATCH_SECONDS and the grain of the watch
    assert time.monotonic() - start < 2 * (WATCH_SECONDS + 1)
    assert only_files(tmp_path) == sorted(GOOD)


@pytest.mark.fault("download")
@pytest.mark.parametrize(
    ("owner", "name", "number", "said"),
    [
        (dataset.Path, "open", errno.ENOSPC, "make room"),
        (dataset, "move", errno.EROFS, "can be written"),
        (dataset, "is_present", errno.EACCES, "the right to read"),  # another's data
    ],
)
def test_what_the_disk_refuses_is_said_and_tried_once(
    server, tmp_path, monkeypatch, owner, name, number, said
):
    refuse = mock.Mock(side_effect=OSError(number, os.strerror(number)))
    with monkeypatch.context() as patch, pytest.raises(UserError, match=said):
        patch.setattr(owner, name, refuse)
        dataset.fetch(TinyCIFAR10, tmp_path, [server("good")] * 2)
    assert refuse.call_count == 1
    assert only_files(tmp_path) == []


@pytest.mark.fault("download")
def test_proxy_settings_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "[::1]")
    with pytest.raises(UserError, match=r"Invalid port.* correct or unset .*NO_PROXY"):
        dataset.fetch(TinyCIFAR10, tmp_path)


@pytest.mark.fault("data missing or corrupt")
def test_what_is_corrupt_is_repaired_from_an_archive_that_is_whole(server, tmp_path):
    file, archive = (tmp_path / name for name in GOOD)
    file.parent.mkdir()
    for content in (b"", TinyCIFAR10.content[:-1] + b"x"):
        file.write_bytes(content)
        for end in (0, 5000, -1):
            archive.write_bytes(ARCHIVE[:end])
            with pytest.raises(UserError, match="wrong MD5, so it is incomplete"):
                dataset.fetch(TinyCIFAR10, tmp_path, [])
            assert only_files(tmp_path) == sorted(GOOD), "left for the user to judge"
            assert file.read_bytes() == content
        archive.write_bytes(ARCHIVE)
        dataset.fetch(TinyCIFAR10, tmp_path, [])
        assert file.read_bytes() == TinyCIFAR10.content
