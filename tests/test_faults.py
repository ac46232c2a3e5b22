"""What goes wrong on the night before the deadline.

Each test belongs to a row of the table that `make faults` prints. Tests marked slow
run there only; the rest runs in `make test`, too. Rows with tests in other files:
download, identity, failing cells, ZIP.
"""

import contextlib
import copy
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy
import pytest
import torch
from conftest import ROOT, only_files, small_model
from test_dataset import TinyCIFAR10, archive_of
from test_training import FOLDER, go_on, load

import dataset
import training
import vision_transformer
from attention import SelfAttention, SelfAttention2d
from training import UserError
from vision_transformer import FeedForwardBlock, SelfAttentionTransformerBlock

CPU = torch.device("cpu")
fault = pytest.mark.fault
slow = pytest.mark.slow
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals or limits")


# --- The training process is killed ---------------------------------------------------

STAGES = ("half-written", "before writing", "before moving", "after moving")


def start_training(folder, stage=None, number=0):
    """Start a process that trains the small model, to be killed at some point."""
    command = [sys.executable, str(ROOT / "tests" / "victim.py")]
    return subprocess.Popen(
        [*command, stage or "never", str(number)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The record of a run that nobody disturbed, and its seconds."""
    folder = tmp_path_factory.mktemp("whole")
    start = time.monotonic()
    assert start_training(folder).wait(timeout=120) == 0
    return record_in(folder), time.monotonic() - start


def record_in(folder):
    [run] = (folder / training.RUNS).glob("[!.]*")
    assert sorted(path.name for path in run.iterdir()) == [
        training.HISTORY_NAME,
        training.WEIGHTS_NAME,
    ], "no checkpoint, no half-written file"
    return training.read_history(run), (run / training.WEIGHTS_NAME).read_bytes()


def survive(uninterrupted, folder, moments):
    """Kill a run at moment after moment, and compare what comes of it in the end."""
    (expected, weights), seconds = uninterrupted
    kills = 0
    for stage, number in [*moments, (None, 0)]:
        with start_training(folder, stage, number) as process:
            if stage == "time":
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(number * seconds)
                process.kill()
            code = process.wait(timeout=120)
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
    history, content = record_in(folder)
    for key in ("train_losses", "val_accs", "val_accs_eval", "probe_logits"):
        assert history[key] == expected[key], key
    assert content == weights, "bit for bit"
    return kills


@posix
@fault("training killed (SIGKILL)")
@pytest.mark.parametrize(
    "stage", [STAGES[0], *(pytest.param(stage, marks=slow) for stage in STAGES[1:])]
)
def test_killed_while_a_checkpoint_is_written(uninterrupted, tmp_path, stage):
    assert survive(uninterrupted, tmp_path, [(stage, 3)]) == 1


@posix
@slow
@fault("training killed (SIGKILL)")
@pytest.mark.parametrize("seed", range(5))
def test_killed_again_and_again(uninterrupted, tmp_path, seed, record_property):
    draw = random.Random(seed)
    moments = [
        ("time", draw.uniform(0.05, 0.9)),
        ("step", draw.randint(1, 6)),
        (draw.choice(STAGES), draw.randint(1, 2)),
        ("time", draw.uniform(0.05, 0.9)),
        ("step", draw.randint(1, 5)),
    ]
    kills = survive(uninterrupted, tmp_path, moments)
    record_property("cases", kills)
    assert kills >= 3


# --- Ctrl-C ---------------------------------------------------------------------------

DRIVER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import report.demo, train, vision_transformer
report.demo.SIZES = {{True: 160, False: 40}}
vision_transformer.CIFAR10 = report.demo.DemoCIFAR10
model = vision_transformer.VisionTransformer
vision_transformer.VisionTransformer = lambda: model(
    layers=1, hidden_size=32, mlp_size=48, n_heads=4
)
if __name__ == "__main__":
    sys.exit(train.main())
"""


@posix
@fault("Ctrl-C")
@pytest.mark.parametrize(
    "seconds", [0.0, *(pytest.param(s / 10, marks=slow) for s in range(1, 10))]
)
def test_ctrl_c_in_a_terminal_says_how_to_go_on(workplace, seconds):
    Path("driver.py").write_text(DRIVER, encoding="utf-8")
    command = [sys.executable, "driver.py", "--batch-size", "16"]
    with subprocess.Popen(
        [*command, "--epochs", "1000"], stdout=subprocess.PIPE, encoding="utf-8"
    ) as process:
        for line in process.stdout:
            if line.startswith("epoch   2"):
                break
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        try:
            said = next(line for line in process.stdout if "Interrupted" in line)
            seconds = time.monotonic() - start
            process.communicate(timeout=30)  # torch gives its workers 5 s to end
        finally:
            process.kill()
    assert seconds < 5, "within a step"
    assert process.returncode == 130
    done = re.match(r"Interrupted: (\d+) of 1000 epochs are saved in build", said)
    assert int(done[1]) >= 2
    [folder] = Path("build", "runs").glob("[!.]*")
    assert (folder / training.CHECKPOINT_NAME).is_file()


@fault("Ctrl-C")
def test_an_interruption_waits_for_the_model_and_a_second_does_not(workplace):
    model = small_model()
    images = torch.zeros(1, 3, 32, 32)
    before = signal.getsignal(signal.SIGINT)
    with training.ctrl_c_waits(model):
        model(images)
        signal.raise_signal(signal.SIGINT)  # returns: this may be anywhere
        copy.deepcopy(model)(images)  # as when a checkpoint is stored
        with pytest.raises(KeyboardInterrupt):
            model(images)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    model(images)
    with pytest.raises(KeyboardInterrupt), training.ctrl_c_waits(model):
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError("DataLoader worker exited unexpectedly")


TRAIN_CELL = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.path.insert(0, {str(ROOT / "tests")!r})
import torch, report.demo, vision_transformer, training
from conftest import small_model
report.demo.SIZES = {{True: 160, False: 40}}
vision_transformer.CIFAR10 = report.demo.DemoCIFAR10
loaders = vision_transformer.make_loaders("data", 16)
run = training.Run({{"seed": 0}})
cpu = torch.device("cpu")
history = vision_transformer.train(small_model(), *loaders, 1e-3, 4, cpu, run)
"""


@posix
@slow
@fault("Ctrl-C")
def test_interrupting_a_notebook_says_how_to_go_on(workplace):
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3", cwd=str(workplace))
    shown = []

    def run_cell(source, interrupt_at=None):
        def note(message):
            content = message["content"]
            shown.append(str(content.get("text") or content.get("evalue") or ""))
            if interrupt_at and interrupt_at in shown[-1]:
                manager.interrupt_kernel()

        reply = client.execute_interactive(source, output_hook=note, timeout=120)
        return reply["content"]

    try:
        cell = TRAIN_CELL
        first = run_cell(cell, interrupt_at="epoch   2")
        assert first["ename"] == "KeyboardInterrupt"
        assert "are saved in build" in "".join(shown)
        shown.clear()
        assert run_cell(cell)["status"] == "ok"
        assert "The run continues after epoch" in "".join(shown)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


# --- Damaged, foreign and old files ---------------------------------------------------


@pytest.fixture
def two_checkpoints(workplace):
    """The path of the last of two checkpoints, of a run after two of three epochs."""
    return go_on(small_model(), n_epochs=3, stop_after=2).checkpoint.path


def damages(content, lengths, flips):
    """Yield a file cut to some lengths, and with single bits turned."""
    draw = random.Random(0)
    for _ in range(lengths):
        yield content[: draw.randrange(len(content))]
    for _ in range(flips):
        damaged = bytearray(content)
        # Half of them in the header, which is a small part of the file
        end = draw.choice([2000, len(content)])
        damaged[draw.randrange(min(end, len(content)))] ^= 1 << draw.randrange(8)
        yield bytes(damaged)


AMOUNT = [pytest.param(4, 20, id="some"), pytest.param(20, 200, id="all", marks=slow)]


def epochs_in(state):
    return len(state["history"]["val_accs"]) if state else 0


@fault("damaged checkpoint or record")
@pytest.mark.parametrize(("lengths", "flips"), AMOUNT)
def test_a_damaged_checkpoint_is_never_trusted(
    two_checkpoints, lengths, flips, record_property
):
    good = two_checkpoints.read_bytes()
    checkpoint = training.Checkpoint(FOLDER)
    whole = checkpoint.load()
    cases = 0
    for content in damages(good, lengths, flips):
        two_checkpoints.write_bytes(content)
        state = checkpoint.load()
        if epochs_in(state) == 2:  # the bit was in the padding, or in a time
            torch.testing.assert_close(state, whole, rtol=0, atol=0)
        else:
            assert epochs_in(state) == 1, "the one before"
            assert not two_checkpoints.exists()
        cases += 1
    record_property("cases", cases)
    two_checkpoints.write_bytes(b"")
    checkpoint.previous.write_bytes(good[:-1])
    assert checkpoint.load() is None, "both are damaged: from the beginning"


@fault("damaged checkpoint or record")
@pytest.mark.parametrize("name", [training.HISTORY_NAME, training.WEIGHTS_NAME])
@pytest.mark.parametrize(("lengths", "flips"), AMOUNT)
def test_a_damaged_record_is_never_trusted(
    workplace, name, lengths, flips, record_property
):
    run = go_on(small_model())
    path = run.folder / name
    good = path.read_bytes()
    cases = 0
    for content in damages(good, lengths, flips):
        path.write_bytes(content)
        try:
            _, history = load(small_model(seed=1))
        except UserError as error:
            assert "restore" in str(error)
        else:  # 1e-05 and 1E-05 are the same number
            assert name == training.HISTORY_NAME
            assert history == run.history
        cases += 1
    record_property("cases", cases)


PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)


@fault("damaged checkpoint or record")
@pytest.mark.parametrize(
    "content", [b"", PNG, b"{}", b"PK\x03\x04", b"\xff" * 64], ids=range(5)
)
@pytest.mark.parametrize("name", [training.HISTORY_NAME, training.WEIGHTS_NAME])
def test_a_foreign_record_is_refused(workplace, name, content):
    run = go_on(small_model())
    (run.folder / name).write_bytes(content)
    with pytest.raises(UserError, match="restore"):
        load(small_model())


@fault("damaged checkpoint or record")
def test_weights_of_another_run_are_refused(workplace):
    weights = FOLDER / training.WEIGHTS_NAME
    go_on(small_model())
    other = weights.read_bytes()
    shutil.rmtree(FOLDER)
    go_on(small_model(seed=1))
    weights.write_bytes(other)
    with pytest.raises(UserError, match="does not belong to"):
        load(small_model())


@fault("damaged checkpoint or record")
def test_older_formats_are_named(two_checkpoints):
    state = torch.load(two_checkpoints, weights_only=True)
    del state["history"]["format"]
    torch.save(state, two_checkpoints)
    with pytest.raises(UserError, match="format = None, not 1"):
        go_on(small_model(), n_epochs=3)
    assert two_checkpoints.is_file(), "nothing is deleted"
    shutil.rmtree(FOLDER)
    history = go_on(small_model()).history
    path = FOLDER / training.HISTORY_NAME
    path.write_text(json.dumps({**history, "format": 0}), encoding="utf-8")
    with pytest.raises(UserError, match="has format 0, and 1 is read"):
        load(small_model())


@fault("damaged checkpoint or record")
def test_a_folder_in_the_place_of_a_checkpoint_is_named(workplace):
    (FOLDER / training.CHECKPOINT_NAME).mkdir(parents=True)
    with pytest.raises(UserError, match="could not be"):
        go_on(small_model())


# --- Disk full, read-only, gone -------------------------------------------------------


def in_child(function):
    """Run a function in a forked process, whose limits and rights may be lowered."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            function()
            code = 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@posix
@fault("disk full, read-only, gone")
@pytest.mark.parametrize("limit", [0, 1, 1000, 99_999])
def test_a_full_disk_costs_nothing_stored(tmp_path, limit):
    import resource

    path = tmp_path / "file"
    training.write_whole(path, b"old")

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with pytest.raises(UserError, match="could not be read or written"):
            training.write_whole(path, bytes(100_000))

    assert in_child(fill) == 0
    assert path.read_bytes() == b"old"
    assert only_files(tmp_path) == ["file"]


@posix
@fault("disk full, read-only, gone")
def test_a_read_only_folder_is_named(tmp_path):
    for parent in [tmp_path, *tmp_path.parents][:3]:
        parent.chmod(0o755)
    training.write_whole(tmp_path / "file", b"old")
    tmp_path.chmod(0o555)

    def write():
        if os.geteuid() == 0:  # to whom nothing is read-only
            os.setuid(65534)
        with pytest.raises(UserError, match="Permission denied"):
            training.write_whole(tmp_path / "file", b"new")

    assert in_child(write) == 0
    tmp_path.chmod(0o755)
    assert (tmp_path / "file").read_bytes() == b"old"
    assert only_files(tmp_path) == ["file"]


@fault("disk full, read-only, gone")
def test_a_file_in_the_place_of_the_folder_is_named(workplace):
    FOLDER.write_bytes(b"mine")
    with pytest.raises(UserError, match="could not be read or written"):
        go_on(small_model())
    assert FOLDER.read_bytes() == b"mine"


@fault("disk full, read-only, gone")
def test_a_folder_that_vanishes_is_made_again(workplace, monkeypatch):
    note_step = training.Run.note_step

    def vanish(run, loss):
        shutil.rmtree(FOLDER, ignore_errors=True)
        note_step(run, loss)

    monkeypatch.setattr(training.Run, "note_step", vanish)
    go_on(small_model(), n_epochs=2)
    assert load(small_model())


# --- Data -----------------------------------------------------------------------------


@fault("data missing or corrupt")
@pytest.mark.parametrize("damage", ["missing", "cut", "bit", "empty", "other"])
def test_corrupt_data_is_never_trained_on(tmp_path, monkeypatch, damage):
    file = tmp_path / TinyCIFAR10.base_folder / "data_batch_1"
    file.parent.mkdir()
    content = bytearray(TinyCIFAR10.content)
    content[5000] ^= 1
    files = {
        "cut": TinyCIFAR10.content[:-1],
        "bit": bytes(content),
        "empty": b"",
        "other": b"<html>",
    }
    if damage != "missing":
        file.write_bytes(files[damage])
    assert not dataset.is_present(TinyCIFAR10, tmp_path)
    with pytest.raises(UserError, match="could not be fetched"):
        dataset.fetch(TinyCIFAR10, tmp_path, [])
    archive = archive_of()
    (tmp_path / dataset.ARCHIVE_NAME).write_bytes(archive)
    import hashlib

    monkeypatch.setattr(dataset, "ARCHIVE_MD5", hashlib.md5(archive).hexdigest())
    dataset.fetch(TinyCIFAR10, tmp_path, [])
    assert file.read_bytes() == TinyCIFAR10.content, "repaired"


@fault("data missing or corrupt")
@pytest.mark.parametrize("end", [0, 1, 100, 5000, -1])
def test_a_truncated_archive_is_never_unpacked(tmp_path, end):
    (tmp_path / dataset.ARCHIVE_NAME).write_bytes(archive_of()[:end])
    with pytest.raises(UserError, match="wrong MD5, so it is incomplete"):
        dataset.fetch(TinyCIFAR10, tmp_path, [])
    assert only_files(tmp_path) == [dataset.ARCHIVE_NAME], "left for the user to judge"


# --- Arguments ------------------------------------------------------------------------

IMAGES = torch.zeros(2, 3, 32, 32)
TOKENS = torch.zeros(2, 5, 32)


def layer(**sizes):
    return SelfAttention2d(**{"embed_dim": 16, "head_dim": 4, "value_dim": 4, **sizes})


def block(*arguments):
    return SelfAttentionTransformerBlock(*arguments)


def sequence(x):
    return SelfAttention(32, 4, 4, 2)(x)


def feed(x):
    return FeedForwardBlock(32, 48, 0.1)(x)


def encode(x):
    return block(32, 48, 4, 0.1)(x)


def first(x):
    return block(32, 48, 4, 0.1)(x, keep=1)


def images(x):
    return small_model()(x)


def patchify(x):
    return small_model().patchify(x)


BAD_CALLS = [
    # What is wrong, and what the message must show of it
    (lambda: layer(embed_dim=-16), "-16"),
    (lambda: layer(embed_dim=16.5), "float"),
    (lambda: layer(embed_dim="16"), "str"),
    (lambda: layer(embed_dim=None), "NoneType"),
    (lambda: layer(value_dim=-1), "-8"),
    (lambda: layer(head_dim=2.5), "float"),
    (lambda: layer(num_heads="8"), "str"),
    (lambda: layer(num_heads=[8]), "list"),
    (lambda: layer()(torch.zeros(2, 16)), r"\[2, 16\]"),
    (lambda: layer()(torch.zeros(2, 16, 4)), r"\[2, 16, 4\]"),
    (lambda: layer()(torch.zeros(1, 2, 16, 4, 4)), r"\[1, 2, 16, 4, 4\]"),
    (lambda: layer()(torch.zeros(2, 15, 4, 4)), "15 != 16"),
    (lambda: layer()(torch.zeros(2, 4, 4, 16)), "4 != 16"),
    (lambda: layer()(torch.zeros(())), r"\[\]"),
    (lambda: layer()(torch.zeros(2, 16, 4, 4).int()), "int"),
    (lambda: layer()(torch.zeros(2, 16, 4, 4).bool()), "(?i)bool"),
    (lambda: layer()(torch.zeros(2, 16, 4, 4).cfloat()), "(?i)complex"),
    (lambda: layer()(numpy.zeros((2, 16, 4, 4))), "ndarray"),
    (lambda: layer()(None), "NoneType"),
    (lambda: sequence(torch.zeros(2, 5, 31)), "10x31"),
    (lambda: sequence(torch.zeros(5, 32)), "2-dim"),
    (lambda: sequence(torch.zeros(1, 2, 5, 32)), "4-dim"),
    (lambda: sequence(TOKENS.long()), "(?i)long"),
    (lambda: sequence(TOKENS.numpy()), "ndarray"),
    (lambda: FeedForwardBlock(-4, 4, 0.1), "-4"),
    (lambda: FeedForwardBlock(4, 4.5, 0.1), "float"),
    (lambda: FeedForwardBlock(4, "4", 0.1), "str"),
    (lambda: FeedForwardBlock(4, 4, 1.5), "1.5"),
    (lambda: FeedForwardBlock(4, 4, -1e-9), "-1e-09"),
    (lambda: FeedForwardBlock(4, 4, math.inf), "inf"),
    (lambda: FeedForwardBlock(4, 4, "0.1"), "str"),
    (lambda: FeedForwardBlock(4, 4, None), "NoneType"),
    (lambda: feed(torch.zeros(2, 5, 33)), "10x33"),
    (lambda: feed(TOKENS.short()), "(?i)short"),
    (lambda: feed(TOKENS.numpy()), "ndarray"),
    (lambda: block(32, 48, 5, 0.1), "hidden_size=32 .* n_heads=5"),
    (lambda: block(32, 48, 64, 0.1), "hidden_size=32 .* n_heads=64"),
    (lambda: block(32.5, 48, 4, 0.1), "hidden_size=32.5 .* n_heads=4"),
    (lambda: block(32, 48, "4", 0.1), "str"),
    (lambda: block(32, 48, 4, 2), "got 2"),
    (lambda: encode(torch.zeros(2, 5, 16)), r"\[2, 5, 16\]"),
    (lambda: encode(torch.zeros(5, 32)), r"\[5, 32\]"),
    (lambda: encode(torch.zeros(32)), "dimension 1"),
    (lambda: encode(TOKENS.byte()), "type"),
    (lambda: first(torch.zeros(2, 5, 16)), r"\[2, 5, 16\]"),
    (lambda: small_model(patch_size=5), "image_size=32 .* patch_size=5"),
    (lambda: small_model(patch_size=64), "image_size=32 .* patch_size=64"),
    (lambda: small_model(image_size=(32, 32)), "tuple"),
    (lambda: small_model(image_size=33.5), "image_size=33.5"),
    (lambda: small_model(in_channels=-3), "-48"),
    (lambda: small_model(in_channels="3"), "str"),
    (lambda: small_model(layers=1.0), "float"),
    (lambda: small_model(num_classes=-1), "-1"),
    (lambda: small_model(num_classes=1.5), "float"),
    (lambda: small_model(hidden_size=30), "hidden_size=30 .* n_heads=4"),
    (lambda: small_model(mlp_size=-48), "-48"),
    (lambda: small_model(p_dropout=1.5), "1.5"),
    (lambda: images(torch.zeros(2, 3, 32, 28)), "28 != 32"),
    (lambda: images(torch.zeros(2, 3, 28, 28)), "28 != 32"),
    (lambda: images(torch.zeros(2, 3, 64, 64)), "64 != 32"),
    (lambda: images(torch.zeros(2, 1, 32, 32)), "1 != 3"),
    (lambda: images(torch.zeros(2, 32, 32, 3)), "32 != 3"),
    (lambda: images(torch.zeros(3, 32, 32)), r"\[3, 32, 32\]"),
    (lambda: images(IMAGES.byte()), "Byte"),
    (lambda: images("image.png"), "str"),
    (lambda: patchify(torch.zeros(2, 3, 32, 31)), "31 != 32"),
    (lambda: patchify(IMAGES.half().numpy()), "ndarray"),
]


@fault("bad arguments")
@pytest.mark.parametrize(("call", "said"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_bad_calls_are_refused_with_the_value(call, said):
    """By us, by einops or by torch, with the offending size, value or type."""
    with pytest.raises((TypeError, ValueError, RuntimeError, IndexError), match=said):
        call()


@fault("bad arguments")
def test_sixty_bad_calls_are_tried():
    assert len(BAD_CALLS) >= 60


@fault("bad arguments")
@pytest.mark.parametrize("function", [sequence, feed, encode, first, images, patchify])
def test_an_empty_batch_gives_an_empty_result(function):
    x = IMAGES if function in (images, patchify) else TOKENS
    full, empty = function(x), function(x[:0])
    assert empty.shape == (0, *full.shape[1:])


# --- Numerics -------------------------------------------------------------------------


def both(module, x):
    """Return output, gradient of the input and of the first weight."""
    x = x.detach().clone().requires_grad_()
    weight = next(module.parameters())
    out = module(x)
    probe = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
    return out, *torch.autograd.grad((out * probe).sum(), [x, weight])


def close_to_float64(module, x, rtol, like=None):
    """Assert that outputs and gradients are finite and near those in float64."""
    exact = both(copy.deepcopy(like or module).double(), x.double())
    for value, expected in zip(both(module, x), exact, strict=True):
        assert value.isfinite().all()
        error = (value.double() - expected).norm()
        # A single token has no other to look at: the gradient of its query is zero
        assert error <= rtol * max(1, expected.norm()), f"{error:.1e}"


def attention_layer():
    torch.manual_seed(0)
    return SelfAttention2d(32, 8, 8, 4)


def grid(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*(shape or (2, 32, 5, 6)), generator=generator)


@fault("numerics")
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_large_logits_stay_finite(scale):
    layer, x = attention_layer(), grid()
    tokens = x.flatten(2).transpose(1, 2)
    logits = layer.q(tokens) @ layer.k(tokens).mT
    with torch.no_grad():
        layer.q.weight.mul_(scale / logits.abs().max())
    out, gradient, _ = both(layer, x)
    assert out.isfinite().all()
    assert gradient.isfinite().all()
    exact = copy.deepcopy(layer).double()(x.double())
    # The logits are rounded to 24 bits, and that error is what exp() sees
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=scale * 1e-6)


@fault("numerics")
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float16, 1e-2), (torch.bfloat16, 5e-2)]
)
@pytest.mark.parametrize("what", ["attention", "model"])
def test_half_precision(what, dtype, rtol):
    module = attention_layer() if what == "attention" else small_model().eval()
    x = grid() if what == "attention" else grid(2, 3, 32, 32)
    module, x = module.to(dtype), x.to(dtype)
    close_to_float64(module, x, rtol)


@fault("numerics")
@pytest.mark.parametrize("what", ["attention", "model"])
def test_autocast(what):
    module = attention_layer() if what == "attention" else small_model().eval()
    x = grid() if what == "attention" else grid(2, 3, 32, 32)
    exact = both(copy.deepcopy(module).double(), x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = both(module, x)
    for value, expected in zip(values, exact, strict=True):
        assert value.isfinite().all()
        assert (value.double() - expected).norm() < 5e-2 * expected.norm()


@fault("numerics")
@pytest.mark.parametrize(
    "shape",
    [
        (2, 32, 1, 1),
        (1, 32, 1, 7),
        pytest.param((1, 32, 64, 64), marks=slow, id="4096 tokens"),
    ],
)
def test_one_token_and_many(shape):
    close_to_float64(attention_layer(), grid(*shape), 1e-5)


@fault("numerics")
@pytest.mark.parametrize(
    "layout", ["channels last", "transposed", "strided", "flipped"]
)
def test_any_memory_layout(layout):
    x = grid()
    views = {
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "strided": torch.stack([x, x], -1)[..., 0],
        "flipped": x.flip(-1).contiguous().flip(-1),
    }
    close_to_float64(attention_layer(), views[layout], 1e-5)
    torch.testing.assert_close(attention_layer()(views[layout]), attention_layer()(x))
    x = grid(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    close_to_float64(small_model().eval(), x, 1e-4)


@fault("numerics")
@pytest.mark.parametrize("make", [attention_layer, small_model])
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_compute_the_same(make, way):
    module = make().eval()
    x = grid() if make is attention_layer else grid(2, 3, 32, 32)
    other = way(module)
    assert torch.equal(other(x), module(x))
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert not torch.equal(other(x), module(x)), "no weights in common"


COMPILERS = ["aot_eager", *(pytest.param(c, marks=slow) for c in ("eager", "inductor"))]


@fault("numerics")
@pytest.mark.parametrize("backend", COMPILERS)
@pytest.mark.parametrize("training", [False, True])
def test_torch_compile(backend, training):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    layer, x = attention_layer(), grid()
    compiled = torch.compile(copy.deepcopy(layer), backend=backend)
    for value, expected in zip(both(compiled, x), both(layer, x), strict=True):
        torch.testing.assert_close(value, expected)
    model, x = small_model().train(training), grid(2, 3, 32, 32)
    compiled = torch.compile(copy.deepcopy(model), backend=backend)
    if training:  # dropout draws other numbers; the model must still run and learn
        assert all(value.isfinite().all() for value in both(compiled, x))
    else:
        for value, expected in zip(both(compiled, x), both(model, x), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@fault("numerics")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dropout_keeps_the_type(dtype):
    torch.manual_seed(0)
    x = torch.ones(1000, 100, dtype=dtype, requires_grad=True)
    y = vision_transformer.Dropout(0.2)(x)
    y.sum().backward()
    assert y.dtype == dtype
    assert torch.equal(y.detach(), x.grad), "the mask acts on the gradient alike"
    assert set(y.unique().tolist()) == {0, 1.25}
    assert abs((y == 0).double().mean().item() - 0.2) < 0.01


# --- Other Pythons --------------------------------------------------------------------


def interpreters():
    """Return the Pythons to try: those on the path, and those in PYTHONS."""
    names = [f"python3.{minor}" for minor in range(8, 16)]
    found = [shutil.which(name) for name in names]
    found += os.environ.get("PYTHONS", "").split(os.pathsep)
    return [path for path in dict.fromkeys(found) if path and _works(path)]


def _works(python):
    done = subprocess.run([python, "-c", "pass"], capture_output=True, check=False)
    return done.returncode == 0  # a shim of pyenv may stand for a Python not there


@fault("Python and torch versions")
@pytest.mark.parametrize("python", interpreters(), ids=os.path.basename)
def test_the_graded_files_compile(python, tmp_path):
    for name in ("attention.py", "vision_transformer.py"):
        code = (
            f"compile(open({str(ROOT / name)!r}, encoding='utf-8').read(), 'x', 'exec')"
        )
        subprocess.run([python, "-c", code], check=True, cwd=tmp_path)


@slow
@fault("Python and torch versions")
@pytest.mark.parametrize("python", interpreters(), ids=os.path.basename)
def test_the_graded_files_pass_their_tests(python, tmp_path):
    code = "import torch, torchvision, einops"
    if subprocess.run([python, "-c", code], capture_output=True).returncode:
        pytest.skip("without torch, torchvision and einops")
    for name in ("attention.py", "vision_transformer.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name, tests in (("attention.py", 2), ("vision_transformer.py", 7)):
        done = subprocess.run(
            [python, name], cwd=tmp_path, capture_output=True, encoding="utf-8"
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("passed  ") == tests


# --- Hostile files --------------------------------------------------------------------


class Evil:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def pickles(folder):
    """Return files that run code where someone unpickles them."""
    evil = Evil(folder / "executed")
    zipped = io.BytesIO()
    torch.save({"head.weight": evil}, zipped)
    old = io.BytesIO()
    torch.save(evil, old, _use_new_zipfile_serialization=False)
    return [pickle.dumps(evil), zipped.getvalue(), old.getvalue()]


@fault("hostile files")
@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("place", ["weights", "checkpoint", "both names"])
def test_a_pickle_is_never_executed(workplace, kind, place):
    content = pickles(workplace)[kind]
    if place == "checkpoint":
        FOLDER.mkdir()
        (FOLDER / training.CHECKPOINT_NAME).write_bytes(content)
        assert training.Checkpoint(FOLDER).load() is None
    else:
        go_on(small_model())
        (FOLDER / training.WEIGHTS_NAME).write_bytes(content)
        if place == "both names":
            (FOLDER / training.HISTORY_NAME).write_bytes(content)
        with pytest.raises(UserError, match="restore"):
            load(small_model())
    assert not (workplace / "executed").exists()


def member(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


INSIDE = TinyCIFAR10.base_folder
MEMBERS = [
    [member("../outside")],
    [member(f"{INSIDE}/../../outside")],
    [member("/outside-of-the-archive")],
    [member(f"{INSIDE}/link", tarfile.SYMTYPE, "../../outside")],
    [member(f"{INSIDE}/link", tarfile.SYMTYPE, "/etc/passwd")],
    [member(f"{INSIDE}/link", tarfile.LNKTYPE, "../../../outside")],
    [member("link", tarfile.SYMTYPE, ".."), member("link/outside")],
    [member(f"{INSIDE}/device", tarfile.CHRTYPE)],
    [member(f"{INSIDE}/pipe", tarfile.FIFOTYPE)],
]


@fault("hostile files")
@pytest.mark.parametrize("members", MEMBERS, ids=range(len(MEMBERS)))
def test_archive_members_stay_inside(tmp_path, members):
    folder = tmp_path / "deep" / "data"
    folder.mkdir(parents=True)
    archive = folder / dataset.ARCHIVE_NAME
    with tarfile.open(archive, "w:gz") as tar:
        for info in members:
            tar.addfile(info)
    with pytest.raises(UserError, match="could not be unpacked"):
        dataset._unpack(archive, INSIDE)
    assert [*tmp_path.rglob("*")] == [tmp_path / "deep", folder, archive]
    assert not Path("/outside-of-the-archive").exists()
