"""What a training run needs and the exercise is not about.

Progress is shown, every epoch saved, and a finished run recorded. Nothing here computes
what the recipe does.

While a run goes on, its folder holds a checkpoint, which only this machine needs to
read; when it is finished, its record. A ``.lock`` stays: to delete it while another
process waits would let two of them train the same run.
"""

import contextlib
import ctypes
import datetime
import hashlib
import io
import json
import math
import os
import platform
import re
import signal
import sys
import threading
import time
import zipfile
from pathlib import Path

import einops
import safetensors.torch
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from support import records
from support.records import UserError, file_errors

CHECKPOINT_NAME = "checkpoint.pt"
CPUINFO = Path("/proc/cpuinfo")  # Linux
LOOK_EVERY = 50  # steps: to read a loss waits for the GPU
# How torch begins to say that memory or a worker is gone; </torch_ is in /dev/shm
EXHAUSTED = r"DataLoader worker \(pid|</torch_|out of memory|allocate memory"


# --- Checkpoints ------------------------------------------------------


def read_checkpoint(path):
    """Return what a run has stored after its last epoch, or None if there is nothing.

    ``torch.load`` with ``weights_only`` reads plain data only; that a file is damaged
    shows in the checksums (CRC-32) that every ZIP archive has, which PyTorch writes.
    """
    with file_errors(path):
        if not path.exists():
            return None
        content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if archive.testzip():
                raise ValueError("a checksum does not match")
        state = torch.load(io.BytesIO(content), "cpu", weights_only=True)
        names = {"history", "model", "optimizer", "random", "probe_logits"}
        if not isinstance(state, dict) or state.keys() != names:
            raise ValueError("it holds something else")
    except MemoryError:  # says nothing of the file
        raise
    except Exception as error:  # whatever a damaged file makes a reader raise
        reason = str(error).split("\n")[0]
        raise UserError(
            f"{path} is damaged ({reason}): restore it, or delete it and begin again"
        ) from error
    records.check_values(path, state["history"], records.BEGUN)
    return state


# --- Dropout on a CPU -------------------------------------------------


class QuickDropout(nn.Dropout):
    """``nn.Dropout`` on a CPU, from a quarter as many random numbers.

    One of 64 bits decides four features, so p is exact to 2**-17.
    """

    def forward(self, x):
        """Drop features of ``x`` in training mode, and scale up the others."""
        of_65536 = round(self.p * 2**16)  # so many draws drop a feature
        if not self.training or x.device.type != "cpu" or of_65536 == 2**16:
            return super().forward(x)
        numbers = torch.empty((x.numel() + 3) // 4, dtype=torch.int64)
        numbers.random_(-(2**63), None)
        draws = numbers.view(torch.int16)[: x.numel()].view(x.shape)
        kept = draws >= of_65536 - 2**15  # all that backward needs: one byte a feature
        return (x * kept).div_(1 - self.p)


def use_quick_dropout(model):
    """Let a model on a CPU drop out by ``QuickDropout``: 1.15 times as fast there.

    Weights and their names stay; on another device, nothing changes.
    """
    if next(model.parameters()).device.type != "cpu":
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, QuickDropout(child.p).train(child.training))


# --- Speed on a CPU ---------------------------------------------------


def mkl_is_told():
    """Return whether MKL takes every processor for one of Intel's, see the README."""
    here = sys.platform == "linux" and ctypes.CDLL(None)
    return hasattr(here, "mkl_serv_intel_cpu_true")  # where PyTorch's own is not seen


def is_held_back():
    """Return whether MKL leaves the AVX-512 units of an AMD processor idle."""
    facts = CPUINFO.read_text("utf-8") if CPUINFO.is_file() else ""
    return "AuthenticAMD" in facts and "avx512f" in facts and not mkl_is_told()


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
        ncols=76,
    )


def say(line):
    """Print a line; on stderr where nobody reads the output any more."""
    try:
        print(line, flush=True)
    except OSError:  # Ctrl-C has ended `| tee` as well, or the terminal is closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def interruption_waits(model):
    """Let Ctrl-C and the like wait for the next time that the model is called.

    Raised anywhere, it may be dropped, or leave a lock behind that is waited for
    forever: between epochs torch ends its worker processes. A second one is raised at
    once. A closed terminal (SIGHUP) and a scheduler (SIGTERM) interrupt alike.
    """
    noted, before = [], {}

    def note(*_):
        if noted:
            raise KeyboardInterrupt
        noted.append(True)

    def check(called, _):
        if noted and called is model:  # not a copy of it, which is only probed
            raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():  # others may not
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # on Windows, not all
            handler = number and signal.getsignal(number)
            # What `nohup` ignores stays so; None is not Python's, and could not go back
            if handler not in (None, signal.SIG_IGN):
                before[number] = signal.signal(number, note)
    hook = model.register_forward_pre_hook(check)
    try:
        yield
    except RuntimeError:
        if noted:  # it ended the workers, where they are not forked
            raise KeyboardInterrupt from None
        raise
    finally:
        hook.remove()
        for number, handler in before.items():
            signal.signal(number, handler)


# --- Runs -------------------------------------------------------------


def default_folder(settings):
    """Return the folder of a run: of a recorded one, or named by what differs."""
    if settings == records.QUICK:
        return records.QUICK_RECORD
    names = [
        f"{name.removeprefix('n_')}-{value}"
        for name, value in settings.items()
        if value != records.DEFAULT.get(name)
    ]
    return records.RUNS / "-".join(names) if names else records.RECORD


class Run:
    """A training run: what the loop tells it is shown, saved and, at the end, recorded.

    ``settings`` is a dict of plain values, with which the history begins, and which
    names the folder unless another is given.
    """

    def __init__(self, settings, folder=None):
        self.settings = dict(settings)
        self.folder = Path(folder or default_folder(self.settings))
        self.history = None
        self.epochs_done = 0  # which are saved, and need not be trained again
        self._pace = None  # seconds of the first steps

    @property
    def is_finished(self):
        """Whether its record is there."""
        with file_errors(self.folder):
            return (self.folder / records.HISTORY_NAME).is_file()

    @contextlib.contextmanager
    def started(self, model, optimizer, n_epochs, steps_per_epoch):
        """Go on from the last checkpoint, show progress, and record the run at the end.

        Weights, optimiser and random numbers are restored as they were after the last
        full epoch, so an interrupted run ends bit for bit as an uninterrupted one.
        """
        if os.environ.get("NO_TRAINING"):
            raise UserError(
                f"{self.folder} holds no finished run, and a report trains none: "
                f"`make train RUN={self.folder.as_posix()}` does"
            )
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
        self.n_epochs, self.steps_per_epoch = n_epochs, steps_per_epoch
        with contextlib.ExitStack() as stack:
            busy = f"another process is training {self.folder}: wait, or end it"
            lock = records.lock(self.folder / ".lock", busy)
            stack.callback(lock.release)
            for path in self.folder.glob(".*.part"):  # of a process that was killed
                path.unlink(missing_ok=True)
            self._restore()
            done = self.epochs_done
            self.bar = progress_bar(n_epochs * steps_per_epoch, done * steps_per_epoch)
            settings = ", ".join(f"{name} {now}" for name, now in self.settings.items())
            start = f"continues after epoch {done}" if done else "starts"
            self._say(
                f"The run ({settings}) {start}; it is stored in {self.folder}. Without "
                "a GPU, an epoch of CIFAR-10 takes minutes, and 50 take hours."
            )
            if self.device == "cpu" and is_held_back():
                self._say(
                    "PyTorch's MKL leaves the AVX-512 units of this AMD processor "
                    "idle: the README says how it uses them, and takes less time."
                )
            self._begin_epoch()
            try:
                with interruption_waits(model), self.bar:
                    yield
            except KeyboardInterrupt:
                say(f"Interrupted: {self._saved()}.")
                raise KeyboardInterrupt(self._saved()) from None
            except (RuntimeError, ConnectionError) as error:
                is_lost = isinstance(error, ConnectionError)  # a worker's, to this one
                if not is_lost and not re.search(EXHAUSTED, str(error)):
                    raise
                # Else torch raises again whenever another process of the loader ends
                with contextlib.suppress(AttributeError, ValueError):  # Windows, thread
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                reason = str(error).strip().split("\n")[-1]
                raise UserError(
                    f"memory, or a process that loads images, is gone ({reason}): "
                    "close other programs, choose smaller batches, or give a container "
                    f"more shared memory (--shm-size); {self._saved()}"
                ) from error
            self._record()

    def _saved(self):
        """Say what another start finds."""
        if not self.epochs_done:
            return "no epoch is saved yet, so the same command begins again"
        return (
            f"{self.epochs_done} of {self.n_epochs} epochs are saved in {self.folder}, "
            "and the same command continues there"
        )

    def note_step(self, loss):
        """Note the loss of a step, a tensor without axes, and show progress."""
        self._losses.append(loss.detach())
        step = len(self._losses)
        if self.bar.update() or step % LOOK_EVERY == 0:
            self._check("loss", loss.item())
            self.bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
        if step % LOOK_EVERY == 0:
            self._watch_pace()
        if step == self.steps_per_epoch:
            self.bar.set_postfix_str("validating")

    def note_epoch(self, accuracy, logits, labels):
        """Note what was validated after an epoch, and save a checkpoint.

        Accuracy as the recipe measures it, in [0, 1]; logits (N, num_classes) in
        evaluation mode, and labels (N,).
        """
        losses = torch.stack(self._losses).tolist()
        mean = sum(losses) / len(losses)
        measured = {
            "val_accs": accuracy,
            "val_accs_eval": (logits.argmax(dim=-1) == labels).double().mean().item(),
            "val_losses_eval": F.cross_entropy(logits, labels).item(),
            "epoch_seconds": time.perf_counter() - self._start,
        }
        for name, value in {"loss": mean, **measured}.items():
            self._check(name, value)
        self.history["train_losses"] += losses
        for name, value in measured.items():
            self.history[name].append(value)
        self._save()
        self._say(
            f"epoch {self.epochs_done:>3}: "
            f"loss {mean:.3f}, validation accuracy "
            f"{accuracy:.4f} (recipe), {measured['val_accs_eval']:.4f} (eval), "
            f"{measured['epoch_seconds']:.0f} s"
        )
        self._begin_epoch()

    def _check(self, name, value):
        """Stop at a value that no further step can mend, before it is saved."""
        if not math.isfinite(value):
            raise UserError(
                f"{name} = {value} in epoch {self.epochs_done + 1}: "
                f"{records.DIVERGED}; {self.epochs_done} epochs are saved in "
                f"{self.folder}"
            )

    def _watch_pace(self):
        """Say once when steps take three times as long as the first ones did."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self._pace = self._pace or seconds
        if seconds > 3 * self._pace:
            self._pace = math.inf
            self._say(
                "Steps take three times as long as the first ones: beside another busy "
                "program, threads wait for each other. It goes on, but end the other."
            )

    def _say(self, line):
        with tqdm.external_write_mode(sys.stdout):  # above the bar
            say(line)

    def _begin_epoch(self):
        self._losses, self._start = [], time.perf_counter()
        self._since = self._start
        self.bar.set_postfix_str("", refresh=False)

    def _save(self):
        buffer = io.BytesIO()
        torch.save(
            {
                "history": self.history,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "random": {k: m.get_rng_state() for k, m in self.random.items()},
                "probe_logits": records.probe(self.model),
            },
            buffer,
        )
        records.write_whole(self.checkpoint, buffer.getvalue())
        self.epochs_done = len(self.history["val_accs"])

    def _restore(self):
        state = read_checkpoint(self.checkpoint)
        if state is None:
            self.history = {
                **self.settings,
                "format": records.FORMAT,
                **{name: [] for name in ("train_losses", *records.PER_EPOCH)},
                "parameters": sum(p.numel() for p in self.model.parameters()),
                **records.traits(self.model),
            }
            self._save()  # an interruption in the first epoch must find its beginning
            return
        self.history, source = state["history"], self.checkpoint
        settings = {**self.settings, "format": records.FORMAT}
        records.check_is_of(source, self.history, settings, self.model)
        records.load_weights(self.model, state["model"], state["probe_logits"], source)
        self.epochs_done = len(self.history["val_accs"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, module in self.random.items():
            if name in state["random"]:  # not so after a change of device
                module.set_rng_state(state["random"][name])

    def _record(self):
        content = safetensors.torch.save(self.model.state_dict())
        is_cuda = self.device == "cuda"
        name = torch.cuda.get_device_name() if is_cuda else records.processor_name()
        self.history.update(
            seconds=sum(self.history["epoch_seconds"]),
            device=self.device,
            machine=f"{name}, {torch.get_num_threads()} threads, {platform.system()}"
            + ", MKL told that it is Intel's" * mkl_is_told(),
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "einops": einops.__version__,
            },
            date=datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
            probe_logits=records.probe(self.model),
            weights_sha256=hashlib.sha256(content).hexdigest(),
        )
        self.history["sha256"] = records.history_digest(self.history)
        records.write_whole(self.folder / records.WEIGHTS_NAME, content)
        text = json.dumps(self.history) + "\n"
        records.write_whole(self.folder / records.HISTORY_NAME, text.encode())
        self.checkpoint.unlink(missing_ok=True)  # the record holds what is needed
