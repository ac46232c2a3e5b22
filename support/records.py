"""Records of training runs: how they are checked and read, and how files are written.

A finished run is a folder with its record: ``history.json``, everything that was
measured, and ``vision_transformer.safetensors``, the weights. Reading them executes
nothing.
"""

import contextlib
import copy
import errno
import hashlib
import json
import math
import os
import platform
import statistics
import time
from pathlib import Path

import filelock
import safetensors.torch
import torch

# The run of the exercise, and one for those who train without a GPU
DEFAULT = {
    "dataset": "CIFAR10",
    "batch_size": 128,
    "lr": 3e-4,
    "n_epochs": 50,
    "seed": 0,
}
QUICK = {**DEFAULT, "batch_size": 32, "lr": 2e-4, "n_epochs": 8}  # chosen by trials
PRESETS = {"default": DEFAULT, "quick": QUICK}
RUNS = Path("runs")
RECORD, QUICK_RECORD = RUNS / "exercise", RUNS / "quick"
HISTORY_NAME = "history.json"
WEIGHTS_NAME = "vision_transformer.safetensors"
PROBE_TOLERANCE = 1e-3
DIVERGED = "the run diverged, so train with a smaller learning rate in another folder"
FORMAT = 2  # of what is stored; raise it when older files can no longer be read
# The kinds of what a history holds, beside its settings: of a run that goes on, and of
# one that is finished; a pair is a container and the kind of what is in it
PER_EPOCH = ("val_accs", "val_accs_eval", "val_losses_eval", "epoch_seconds")
BEGUN = {
    **dict.fromkeys(("train_losses", *PER_EPOCH), (list, float)),
    **dict.fromkeys(("begins", "drops_out"), (dict, float)),
    "parameters": int,
}
FINISHED = {
    **BEGUN,
    **dict.fromkeys(("device", "machine", "date", "weights_sha256", "sha256"), str),
    "seconds": float,
    "versions": (dict, str),
    "probe_logits": (list, (list, float)),
}
# What to do about an error of the operating system
REMEDIES = {
    "make room": ("ENOSPC", "EDQUOT"),
    "take the right to read and write it, or close what uses it": ("EACCES", "EPERM"),
    "choose a folder that can be written": ("EROFS",),
    "close other programs, or allow more with `ulimit -n 4096`": ("EMFILE", "ENFILE"),
    "move away what lies in its place": ("EEXIST", "EISDIR", "ENOTDIR"),
    "choose a shorter name": ("ENAMETOOLONG",),
    "check the drive, or choose another one": ("EIO", "ENXIO", "ENODEV", "ESTALE"),
}


class UserError(Exception):
    """Something that the user can put right; the message says how, in one sentence."""


# --- Files ------------------------------------------------------------


@contextlib.contextmanager
def file_errors(path):
    """Say in one sentence what the operating system refuses, and what helps."""
    try:
        yield
    except OSError as error:
        name = errno.errorcode.get(error.errno)
        remedies = [what for what, names in REMEDIES.items() if name in names]
        raise UserError(
            f"{path} could not be read or written ({error}): "
            f"{(remedies or ['put that right'])[0]}, and type the same command again; "
            "what was stored before is untouched"
        ) from error


def move(source, target):
    """Move a file; on Windows, a scanner may hold one of the two for a moment."""
    for seconds in (0.1, 0.2, 0.4, 0.8):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(seconds)
    return os.replace(source, target)


def write_whole(path, content):
    """Write bytes to a file so that it is there whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with file_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            move(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def lock(path, busy):
    """Return the lock of a file, held; refuse with ``busy`` while another holds it."""
    held = filelock.FileLock(path, timeout=0)
    with file_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire()
        except filelock.Timeout:  # an OSError, too
            raise UserError(busy) from None
        except (NotImplementedError, OSError):  # a file system without locks
            print(f"{path} cannot be locked: start one command at a time.", flush=True)
    return held


def checksum(path):
    """Return the SHA-256 of a file in hexadecimal digits, empty if there is none."""
    path = Path(path)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


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


def check_is_of(path, history, settings, model):
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
    then = torch.tensor(logits)
    if not then.isfinite().all():
        raise UserError(f"{source} holds weights that give NaN or infinity: {DIVERGED}")
    try:
        model.load_state_dict(state)
        now = torch.tensor(probe(model))
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


def check_values(source, history, kinds):
    """Refuse a history in which a value is missing, of another kind, or NaN."""

    def check(name, value, kind):
        if isinstance(kind, tuple):
            container, inner = kind
            check(name, value, container)
            for each in value.values() if container is dict else value:
                check(name, each, inner)
        elif kind is float and type(value) in (int, float):
            if not abs(value) < math.inf:
                raise UserError(f"{source} has {name} = {value}: {DIVERGED}")
        elif type(value) is not kind:
            raise UserError(
                f"{source} is damaged ({name} = {value!r:.40} is no {kind.__name__}): "
                "restore it, or train the run in another folder"
            )

    settings = {name: type(DEFAULT[name]) for name in DEFAULT if name in history}
    for name, kind in {**settings, **kinds}.items():
        check(name, history.get(name), kind)


def history_digest(history):
    """Return the checksum of a history without the one that it holds."""
    rest = {key: value for key, value in history.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_history(folder):
    """Return the history of the finished run in a folder, a dict.

    ``train_losses`` has an entry for every step, those of ``PER_EPOCH`` have one for
    every epoch: losses in nats, accuracies in [0, 1], seconds with validation.
    ``begins`` and ``drops_out`` are the ``traits`` of the model, ``probe_logits`` what
    ``probe`` returns; ``weights_sha256`` is the checksum of the weights file,
    ``sha256`` that of the rest of the history.
    """
    path = Path(folder, HISTORY_NAME)
    with file_errors(path):
        if not path.is_file():
            there = sorted(str(one.parent) for one in RUNS.glob(f"*/{HISTORY_NAME}"))
            raise UserError(
                f"{path} is missing: there is no finished run in {folder}, but in "
                f"{', '.join(there) or 'no other folder'}; `git checkout runs`, or the "
                "ZIP of the project, brings back the recorded ones, and `make train "
                f"RUN={folder}` (`python train.py --run {folder}`) trains one"
            )
        content = path.read_bytes()
    try:
        history = json.loads(content.decode())
        if not isinstance(history, dict):
            raise ValueError("it holds no JSON object")
        if history.get("format") != FORMAT:
            then = history.get("format")
            raise ValueError(f"it has format {then!r}, and {FORMAT} is read here")
        if history.get("sha256") != history_digest(history):
            raise ValueError("its checksum does not match")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}): restore it, or train the run in another "
            "folder"
        ) from error
    check_values(path, history, FINISHED)
    return history


def load_record(folder, settings, model):
    """Load a finished run, whose history must say what ``settings`` do.

    Returns the model with the recorded weights, None if the record has come without
    any, and the history.
    """
    history = read_history(folder)
    check_is_of(Path(folder, HISTORY_NAME), history, settings, model)
    path = Path(folder, WEIGHTS_NAME)
    with file_errors(path):
        if not path.is_file():
            return None, history
        content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != history["weights_sha256"]:
        raise UserError(
            f"{path} does not belong to the {HISTORY_NAME} beside it, or is damaged: "
            "restore both, or train the run in another folder"
        )
    state = safetensors.torch.load(content)
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


def summary(history, folder):
    """Return what is known of the finished run in a folder as a few lines."""
    by_recipe = history["val_accs"]
    lines = [
        f"run: {Path(folder).as_posix()} (record {history['sha256'][:8]})",
        describe(history),
        f"{hours(history):.2f} hours (epochs times their median) on "
        f"{history['machine']}, {finished(history)}",
        f"validation accuracy after the last epoch: {by_recipe[-1]:.4f} (recipe), "
        f"{history['val_accs_eval'][-1]:.4f} (eval)",
    ]
    for mark in (0.25, 0.5, 0.7):
        epoch, reached = first_epoch_at(by_recipe, mark), "not reached"
        if epoch:
            reached = f"{by_recipe[epoch - 1]:.4f} in epoch {epoch}"
        lines.append(f"{mark:.0%} by the recipe's measure: {reached}")
    return "\n".join(lines)


def table_of_epochs(history):
    """Return losses and accuracies of the epochs that tell most, as text."""
    by_recipe, evaluated = history["val_accs"], history["val_accs_eval"]
    total, steps = len(by_recipe), len(history["train_losses"]) // len(by_recipe)
    shown = {1, 2, 5, 10, *range(10, total + 1, 10), total}
    shown |= {first_epoch_at(by_recipe, mark) for mark in (0.25, 0.5, 0.7)}
    lines = ["epoch   training loss / nats   accuracy by the recipe   with eval()"]
    for epoch in sorted(shown & {*range(1, total + 1)}):
        losses = history["train_losses"][(epoch - 1) * steps : epoch * steps]
        row = statistics.mean(losses), by_recipe[epoch - 1], evaluated[epoch - 1]
        lines.append("{:5}{:23.3f}{:25.4f}{:14.4f}".format(epoch, *row))
    return "\n".join(lines)


def processor_name():
    """Return what the processor calls itself."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux, where platform.processor() is empty
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
