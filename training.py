"""What a training run needs and the exercise is not about.

Progress is shown, every epoch saved, and a finished run recorded. Nothing here computes
what the recipe does.

A run is a folder. While it goes on, that holds a checkpoint, which only this machine
needs to read. When it is finished, that holds its record: ``history.json``, everything
that was measured, and ``vision_transformer.safetensors``, the weights. Reading any of
these files executes nothing. A ``.lock`` stays in the folder: to delete it while
another process waits would let two of them train the same run.
"""

import contextlib
import copy
import datetime
import hashlib
import io
import json
import math
import os
import platform
import signal
import statistics
import sys
import time
import zipfile
from pathlib import Path

import einops
import filelock
import safetensors.torch
import torch
import torchvision
from torch.nn import functional as F
from tqdm import tqdm

# The run of the exercise, and one for those who train without a GPU
DEFAULT = {
    "dataset": "CIFAR10",
    "batch_size": 128,
    "lr": 3e-4,
    "n_epochs": 50,
    "seed": 0,
}
QUICK = {**DEFAULT, "batch_size": 32, "lr": 2e-4, "n_epochs": 13}  # chosen by trials
PRESETS = {"default": DEFAULT, "quick": QUICK}
RECORD, QUICK_RECORD = Path("report", "run"), Path("report", "quick")
FORMER = Path("bench", "former", "default.json")  # of an earlier version
RUNS = Path("build", "runs")
HISTORY_NAME = "history.json"
WEIGHTS_NAME = "vision_transformer.safetensors"
CHECKPOINT_NAME = "checkpoint.pt"
PROBE_TOLERANCE = 1e-3
FORMAT = 2  # of what is stored; raise it when older files can no longer be read


class UserError(Exception):
    """Something that the user can put right; the message says how, in one sentence."""


# --- Files ------------------------------------------------------------


@contextlib.contextmanager
def _files(path):
    """Say in one sentence what the operating system refuses."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} could not be read or written ({error.strerror or error}): make "
            "room, or close what uses it, and type the same command again; what was "
            "stored before is untouched"
        ) from error


def write_whole(path, content):
    """Write bytes to a file so that it is there whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _files(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def checksum(path):
    """Return the SHA-256 of a file in hexadecimal digits, empty if there is none."""
    path = Path(path)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


# --- Checkpoints ------------------------------------------------------


def read_checkpoint(path):
    """Return what a run has stored after its last epoch, or None if there is nothing.

    ``torch.load`` with ``weights_only`` reads plain data only; that a file is damaged
    shows in the checksums (CRC-32) that every ZIP archive has, which PyTorch writes.
    """
    if not path.exists():
        return None
    with _files(path):
        content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if archive.testzip():
                raise ValueError("a checksum does not match")
        return torch.load(io.BytesIO(content), "cpu", weights_only=True)
    except MemoryError:  # says nothing of the file
        raise
    except Exception as error:  # whatever a damaged file makes a reader raise
        reason = str(error).split("\n")[0]
        raise UserError(
            f"{path} is damaged ({reason}): restore it, or delete it and begin again"
        ) from error


# --- Records ----------------------------------------------------------


@torch.no_grad()
def probe(model):
    """Return the logits of a model for four seeded images, as nested lists.

    They identify the weights together with the architecture: a layer norm left out or
    patches read in another order change them, although all shapes fit.
    """
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return copy.deepcopy(model).cpu().float().eval()(images).tolist()


def traits(model):
    """Return what weights do not show: how a new model begins, where it drops out.

    The root mean square of every parameter, and p of every dropout, by their names.
    """
    return {
        "begins": {
            name: values.detach().cpu().double().square().mean().sqrt().item()
            for name, values in model.named_parameters()
        },
        "drops_out": {
            name: module.p
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Dropout)
        },
    }


def _check_is_of(path, history, settings, model):
    """Refuse a history of other settings, or of another model than this new one."""
    for name, value in settings.items():
        if history.get(name) != value:
            raise UserError(
                f"{path} is of a run with {name} = {history.get(name)!r}, not "
                f"{value!r}: name its folder and its settings together, or train yours "
                "in another folder"
            )
    now = traits(model)
    sizes = {name: values.numel() for name, values in model.named_parameters()}
    for kind, words in (("begins", "begins with"), ("drops_out", "drops out")):
        for name in sorted(now[kind].keys() | history[kind].keys()):
            here, there = now[kind].get(name, 0), history[kind].get(name, 0)
            # Root mean squares of n values from two seeds differ by about 1 / sqrt(n)
            tolerance = min(0.9, 5 / math.sqrt(sizes.get(name, math.inf)))
            if not math.isclose(here, there, rel_tol=tolerance):
                raise UserError(
                    f"{path} is of another model, in which {name} {words} {there:.2g}, "
                    f"not {here:.2g}: restore the code of that model, or train this "
                    "one in another folder"
                )


def load_weights(model, state, logits, source):
    """Load a state dict, and check that the model answers ``probe`` as it did.

    Raises ``UserError`` if these are not its weights.
    """
    try:
        model.load_state_dict(state)
        now, then = torch.tensor(probe(model)), torch.tensor(logits)
        difference = (now - then).abs().max().item()
        if not difference <= PROBE_TOLERANCE:
            raise RuntimeError(
                f"its logits differ by {difference:.2g}, {PROBE_TOLERANCE:g} would be "
                "rounding"
            )
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"{source} holds the weights of another model ({reason}): restore the code "
            f"of that model, or train this one in another folder"
        ) from error


def _history_digest(history):
    rest = {key: value for key, value in history.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_history(folder):
    """Return the history of the finished run in a folder, a dict.

    It begins with the settings. ``train_losses`` has a cross-entropy in nats for every
    step. ``val_accs``, accuracies in [0, 1] as the recipe measures them,
    ``val_accs_eval`` and ``val_losses_eval``, in nats, both with ``model.eval()``, and
    ``epoch_seconds``, with validation, have an entry for every epoch; ``seconds`` is
    the sum of the last. ``begins`` and ``drops_out`` are the ``traits`` of the model,
    ``probe_logits`` what ``probe`` returns; ``date`` is when the run ended, UTC, ISO
    8601. ``weights_sha256`` is the checksum of the weights file, ``sha256`` that of all
    the rest of the history.
    """
    path = Path(folder, HISTORY_NAME)
    try:
        history = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(history, dict):
            raise ValueError("it holds no JSON object")
        if history.get("format") != FORMAT:
            then = history.get("format")
            raise ValueError(f"it has format {then!r}, and {FORMAT} is read here")
        if history.get("sha256") != _history_digest(history):
            raise ValueError("its checksum does not match")
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: there is no finished run in {folder}; "
            "`python train.py` trains one"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read, or is damaged ({error}): restore it, or train the "
            "run in another folder"
        ) from error
    return history


def load_record(folder, settings, model):
    """Load a finished run, whose history must say what ``settings`` do.

    Where the folder does not exist, as in an unpacked submission, the record is looked
    for beside the notebooks. Returns the model with the recorded weights, None if the
    record has come without any, and the history.
    """
    if not Path(folder).is_dir() and Path(HISTORY_NAME).is_file():
        folder = "."
    history = read_history(folder)
    _check_is_of(Path(folder, HISTORY_NAME), history, settings, model)
    path = Path(folder, WEIGHTS_NAME)
    if not path.is_file():
        return None, history
    if checksum(path) != history["weights_sha256"]:
        raise UserError(
            f"{path} does not belong to the {HISTORY_NAME} beside it, or is damaged: "
            "restore both, or train the run in another folder"
        )
    state = safetensors.torch.load(path.read_bytes())
    load_weights(model, state, history["probe_logits"], path)
    return model, history


def first_epoch_at(accuracies, mark):
    """Return the first epoch, counted from 1, with at least this accuracy, or None."""
    return next((n for n, acc in enumerate(accuracies, 1) if acc >= mark), None)


def hours(history):
    """Return epochs times the median epoch, so that a pause does not count."""
    seconds = history["epoch_seconds"]
    return len(seconds) * statistics.median(seconds) / 3600


def finished(history):
    """Return when a run was finished, to the minute."""
    return f"{history['date'][:16].replace('T', ' ')} UTC"


def describe(history):
    """Return the settings of a run by the recipe in words."""
    missing = DEFAULT.keys() - history.keys()
    if missing:
        raise UserError(
            f"this is no run by the recipe: its history says no {min(missing)}"
        )
    return (
        f"{history['dataset']}, batch size {history['batch_size']}, learning rate "
        f"{history['lr']:g}, {history['n_epochs']} epochs, seed {history['seed']}"
    )


def summary(history):
    """Return what is known of a finished run as a few lines."""
    by_recipe = history["val_accs"]
    lines = [
        describe(history),
        f"{hours(history):.2f} hours (epochs times their median) on "
        f"{history['machine']}, {finished(history)}",
        f"validation accuracy after the last epoch: {by_recipe[-1]:.4f} (recipe), "
        f"{history['val_accs_eval'][-1]:.4f} (eval)",
    ]
    for mark in (0.25, 0.5, 0.7):
        epoch = first_epoch_at(by_recipe, mark)
        reached = "not reached"
        if epoch:
            after = hours(history) * epoch / len(by_recipe)
            reached = (
                f"{by_recipe[epoch - 1]:.4f} in epoch {epoch}, after {after:.2f} h"
            )
        lines.append(f"{mark:.0%} by the recipe's measure: {reached}")
    return "\n".join(lines)


def processor_name():
    """Return what the processor calls itself."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux, where platform.processor() is empty
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# --- Progress ---------------------------------------------------------


def progress_bar(total, done):
    """Return a bar for a terminal or a notebook; in a log, only lines are written."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return tqdm(
        total=total,
        initial=done,
        unit="step",
        file=sys.stdout,
        disable=False if hasattr(shell, "kernel") else None,  # in a notebook
        leave=False,
        mininterval=0.5,
        ncols=76,
    )


@contextlib.contextmanager
def ctrl_c_waits(model):
    """Let an interruption wait for the next time that the model is called.

    Raised anywhere, it may be dropped, or leave a lock behind that is waited for
    forever: between epochs torch ends its worker processes. A second one is raised at
    once.
    """
    noted = []

    def note(*_):
        if noted:
            raise KeyboardInterrupt
        noted.append(True)

    def check(called, _):
        if noted and called is model:  # not a copy of it, which is only probed
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    hook = model.register_forward_pre_hook(check)
    try:
        yield
    except RuntimeError:
        if noted:  # it ended the workers, where they are not forked
            raise KeyboardInterrupt from None
        raise
    finally:
        hook.remove()
        signal.signal(signal.SIGINT, before)


# --- Runs -------------------------------------------------------------


class Run:
    """A training run: what the loop tells it is shown, saved and, at the end, recorded.

    ``settings`` is a dict of plain values, with which the history begins, and which
    names the folder unless another is given.
    """

    def __init__(self, settings, folder=None):
        self.settings = dict(settings)
        name = "-".join(f"{key}{value}" for key, value in self.settings.items())
        self.folder = Path(folder) if folder else RUNS / name
        self.history = None
        self.epochs_done = 0  # which are saved, and need not be trained again

    @property
    def is_finished(self):
        """Whether its record is there."""
        return (self.folder / HISTORY_NAME).is_file()

    @contextlib.contextmanager
    def started(self, model, optimizer, n_epochs, steps_per_epoch):
        """Go on from the last checkpoint, show progress, and record the run at the end.

        Weights, optimiser and random numbers are restored as they were after the last
        full epoch, so an interrupted run ends bit for bit as an uninterrupted one.
        """
        if not steps_per_epoch:
            raise UserError(
                "a batch would hold more than all training images: choose a smaller one"
            )
        self.model, self.optimizer = model, optimizer
        self.device = next(model.parameters()).device.type
        self.random = {"cpu": torch}  # the modules that draw the run's random numbers
        if self.device != "cpu":
            self.random[self.device] = getattr(torch, self.device)
        self.checkpoint = self.folder / CHECKPOINT_NAME
        with self._locked():
            self._restore()
            done = self.epochs_done
            self.bar = progress_bar(n_epochs * steps_per_epoch, done * steps_per_epoch)
            start = f"continues after epoch {done}" if done else "starts"
            self._say(f"The run {start}; it is stored in {self.folder}.")
            self._begin_epoch()
            try:
                with ctrl_c_waits(model), self.bar:
                    yield
            except KeyboardInterrupt:
                print(
                    f"Interrupted: {self.epochs_done} of {n_epochs} epochs are saved "
                    f"in {self.folder}. Run the same again, and it continues there.",
                    flush=True,
                )
                raise
            self._record()

    def note_step(self, loss):
        """Note the loss of a step, a tensor without axes, and show progress."""
        self._losses.append(loss.detach())
        if self.bar.update():  # the loss is read only when the bar is drawn
            self.bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)

    def note_epoch(self, accuracy, logits, labels):
        """Note what was validated after an epoch, and save a checkpoint.

        Accuracy as the recipe measures it, in [0, 1]; logits (N, num_classes) in
        evaluation mode, and labels (N,).
        """
        losses = torch.stack(self._losses).tolist()
        measured = {
            "val_accs": accuracy,
            "val_accs_eval": (logits.argmax(dim=-1) == labels).double().mean().item(),
            "val_losses_eval": F.cross_entropy(logits, labels).item(),
            "epoch_seconds": time.perf_counter() - self._start,
        }
        self.history["train_losses"] += losses
        for name, value in measured.items():
            self.history[name].append(value)
        self._save()
        self._say(
            f"epoch {self.epochs_done:>3}: "
            f"loss {sum(losses) / len(losses):.3f}, validation accuracy "
            f"{accuracy:.4f} (recipe), {measured['val_accs_eval']:.4f} (eval), "
            f"{measured['epoch_seconds']:.0f} s"
        )
        self._begin_epoch()

    def _say(self, line):
        self.bar.write(line, file=sys.stdout)  # above the bar
        sys.stdout.flush()

    def _begin_epoch(self):
        self._losses, self._start = [], time.perf_counter()

    @contextlib.contextmanager
    def _locked(self):
        """Keep other processes from training the same run at the same time."""
        lock = filelock.FileLock(self.folder / ".lock", timeout=0)
        with _files(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except filelock.Timeout:  # an OSError, too
                raise UserError(
                    f"another process is training the run in {self.folder}: wait for "
                    "it, or end it"
                ) from None
        try:
            for path in self.folder.glob(".*.part"):  # of a process that was killed
                path.unlink(missing_ok=True)
            yield
        finally:
            lock.release()

    def _save(self):
        buffer = io.BytesIO()
        torch.save(
            {
                "history": self.history,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "random": {k: m.get_rng_state() for k, m in self.random.items()},
                "probe_logits": probe(self.model),
            },
            buffer,
        )
        write_whole(self.checkpoint, buffer.getvalue())
        self.epochs_done = len(self.history["val_accs"])

    def _restore(self):
        state = read_checkpoint(self.checkpoint)
        if state is None:
            lists = ("train_losses", "val_accs", "val_accs_eval", "val_losses_eval")
            self.history = {
                **self.settings,
                "format": FORMAT,
                **{name: [] for name in (*lists, "epoch_seconds")},
                "parameters": sum(p.numel() for p in self.model.parameters()),
                **traits(self.model),
            }
            self._save()  # an interruption in the first epoch must find its beginning
            return
        self.history, source = state["history"], self.checkpoint
        settings = {**self.settings, "format": FORMAT}
        _check_is_of(source, self.history, settings, self.model)
        load_weights(self.model, state["model"], state["probe_logits"], source)
        self.epochs_done = len(self.history["val_accs"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, module in self.random.items():
            if name in state["random"]:  # not so after a change of device
                module.set_rng_state(state["random"][name])

    def _record(self):
        content = safetensors.torch.save(self.model.state_dict())
        is_cuda = self.device == "cuda"
        name = torch.cuda.get_device_name() if is_cuda else processor_name()
        self.history.update(
            seconds=sum(self.history["epoch_seconds"]),
            device=self.device,
            machine=f"{name}, {torch.get_num_threads()} threads, {platform.system()}",
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "einops": einops.__version__,
            },
            date=datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
            probe_logits=probe(self.model),
            weights_sha256=hashlib.sha256(content).hexdigest(),
        )
        self.history["sha256"] = _history_digest(self.history)
        write_whole(self.folder / WEIGHTS_NAME, content)
        text = json.dumps(self.history) + "\n"
        write_whole(self.folder / HISTORY_NAME, text.encode())
        self.checkpoint.unlink(missing_ok=True)  # the record holds what is needed
