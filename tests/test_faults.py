"""What goes wrong on the night before the deadline.

Each test belongs to a row of the table that `make faults` prints. Tests marked slow
run there only; the rest runs in `make test`, too. Other files hold further rows.
"""

import copy
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT, only_files
from small_run import alive, small_model
from test_training import FOLDER, go_on, load

from attention import SelfAttention2d
from support import records, training
from support.records import UserError
from vision_transformer import FeedForwardBlock, SelfAttentionTransformerBlock

fault = pytest.mark.fault
slow = pytest.mark.slow
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


# --- The training process is killed ---------------------------------------------------

# One process after another, each killed at one of these; see `small_run`
MOMENTS = [
    ("half-written", 3),
    ("step", 3),
    ("before moving", 3),
    ("step", 8),
    ("before moving", 3),  # of the history, when the weights are recorded
]


def start_training(folder, stage="never", number=0, epochs=5, **options):
    """Start a process that trains the small model, to be killed at some point."""
    process = [sys.executable, str(ROOT / "tests" / "small_run.py"), stage, str(number)]
    return subprocess.Popen(
        [*process, "--batch-size", "16", "--epochs", str(epochs)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        encoding="utf-8",
        **options,
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The record of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    with start_training(folder) as process:
        assert process.wait(timeout=120) == 0
    return record_in(folder)


def record_in(folder):
    [run] = (folder / records.RUNS).iterdir()
    assert only_files(run) == [records.HISTORY_NAME, records.WEIGHTS_NAME]
    return records.read_history(run), (run / records.WEIGHTS_NAME).read_bytes()


@posix
@fault("training killed (SIGKILL)")
@pytest.mark.parametrize(
    "moments", [MOMENTS[:1], pytest.param(MOMENTS[1:], marks=slow)]
)
def test_a_run_that_was_killed_ends_as_one_that_was_not(
    uninterrupted, tmp_path, moments, record_property
):
    for stage, number in moments:
        with start_training(tmp_path, stage, number) as process:
            assert process.wait(timeout=120) == -signal.SIGKILL
    with start_training(tmp_path) as process:
        assert process.wait(timeout=120) == 0
    expected, weights = uninterrupted
    history, content = record_in(tmp_path)
    for key in ("train_losses", "val_accs", "val_accs_eval", "probe_logits"):
        assert history[key] == expected[key], key
    assert content == weights, "bit for bit"
    record_property("cases", len(moments))


# --- Ctrl-C ---------------------------------------------------------------------------


@posix
@fault("Ctrl-C")
@pytest.mark.parametrize(
    ("name", "seconds", "is_read"),
    [
        ("SIGINT", 0.0, True),
        ("SIGINT", 0.0, False),  # `| tee`, which Ctrl-C ends as well
        ("SIGTERM", 0.0, True),  # a scheduler
        pytest.param("SIGINT", 0.5, True, marks=slow),
        pytest.param("SIGHUP", 0.0, True, marks=slow),  # a terminal that is closed
    ],
)
def test_ctrl_c_and_the_like_say_how_to_go_on(workplace, name, seconds, is_read):
    options = {} if is_read else {"stderr": subprocess.PIPE}
    with start_training(workplace, epochs=1000, **options) as process:
        for line in process.stdout:
            if line.startswith("epoch   2"):
                break
        time.sleep(seconds)
        if not is_read:
            process.stdout.close()
        process.send_signal(getattr(signal, name))
        start = time.monotonic()
        try:
            lines = process.stdout if is_read else process.stderr
            said = next(line for line in lines if "Interrupted" in line)
            seconds = time.monotonic() - start
            rest = lines.read()
            process.wait(timeout=30)  # torch gives its workers 5 s to end
        finally:
            process.kill()
    assert seconds < 5, "within a step"
    assert process.returncode == 130
    assert rest == "", "no traceback"
    done = re.match(r"Interrupted: (\d+) of 1000 epochs are saved in runs", said)
    assert int(done[1]) >= 2
    [folder] = records.RUNS.glob("[!.]*")
    assert (folder / training.CHECKPOINT_NAME).is_file()


@fault("Ctrl-C")
def test_an_interruption_waits_for_the_model_and_a_second_does_not(workplace):
    model = small_model()
    images = torch.zeros(1, 3, 32, 32)
    before = signal.getsignal(signal.SIGINT)
    with training.interruption_waits(model):
        model(images)
        signal.raise_signal(signal.SIGINT)  # returns: this may be anywhere
        copy.deepcopy(model)(images)  # as when a checkpoint is stored
        with pytest.raises(KeyboardInterrupt):
            model(images)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    model(images)
    with pytest.raises(KeyboardInterrupt), training.interruption_waits(model):
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError("DataLoader worker exited unexpectedly")
    with pytest.raises(UserError, match="full"), training.interruption_waits(model):
        signal.raise_signal(signal.SIGINT)
        raise UserError("the disk is full")  # the cause, not the interruption


@fault("Ctrl-C")
def test_signals_that_are_ignored_or_not_ours_stay_as_they_are(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # `nohup`, or `&` in a script
    try:
        with training.interruption_waits(small_model()):
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    with monkeypatch.context() as patch:  # None: not set from Python
        patch.setattr(signal, "getsignal", lambda _: None)
        patch.setattr(signal, "signal", None)
        with training.interruption_waits(small_model()):
            pass


@fault("Ctrl-C")
def test_a_run_in_another_thread_trains(workplace):
    with ThreadPoolExecutor() as pool:
        pool.submit(go_on, small_model()).result()
    assert load(small_model())


TRAIN_CELL = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch, small_run, vision_transformer
from support import training
small_run.use_few_generated_images()
loaders = vision_transformer.make_loaders("data", 16)
run, cpu = training.Run({{"seed": 1}}), torch.device("cpu")
vision_transformer.train(small_run.small_model(), *loaders, 1e-3, 4, cpu, run)
"""


@posix
@slow
@fault("Ctrl-C")
def test_interrupting_a_notebook_says_how_to_go_on(workplace):
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3", cwd=str(workplace))
    shown = []

    def note(message):
        shown.append(str(message["content"].get("text")))
        if "epoch   2" in shown[-1]:
            manager.interrupt_kernel()

    try:
        reply = client.execute_interactive(TRAIN_CELL, output_hook=note, timeout=120)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert reply["content"]["ename"] == "KeyboardInterrupt"
    assert "are saved in runs" in "".join(shown)


# --- Damaged, foreign and old files ---------------------------------------------------

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)


def damages(content):
    """Return foreign files, a file cut to some lengths, and with single bits turned."""
    draw = random.Random(0)
    damaged = [b"", PNG, b"{}", b"PK\x03\x04", b"\xff" * 64]
    damaged += [content[: draw.randrange(len(content))] for _ in range(4)]
    for _ in range(20):
        # Half of them in the header, which is a small part of the file
        end = draw.choice([2000, len(content)])
        flipped = bytearray(content)
        flipped[draw.randrange(min(end, len(content)))] ^= 1 << draw.randrange(8)
        damaged.append(bytes(flipped))
    return damaged


@fault("damaged checkpoint or record")
def test_a_damaged_checkpoint_is_never_trusted(workplace, record_property):
    path = go_on(small_model(), n_epochs=3, stop_after=2).checkpoint
    whole = training.read_checkpoint(path)
    cases = damages(path.read_bytes())
    for content in cases:
        path.write_bytes(content)
        try:
            state = training.read_checkpoint(path)
        except UserError as error:
            assert "is damaged" in str(error)
            assert path.read_bytes() == content, "nothing is deleted"
        else:  # the bit was in the padding
            torch.testing.assert_close(state, whole, rtol=0, atol=0)
    record_property("cases", len(cases))


@fault("damaged checkpoint or record")
@pytest.mark.parametrize("name", [records.HISTORY_NAME, records.WEIGHTS_NAME])
def test_a_damaged_record_is_never_trusted(workplace, name, record_property):
    run = go_on(small_model())
    path = run.folder / name
    cases = damages(path.read_bytes())
    for content in cases:
        path.write_bytes(content)
        try:
            _, history = load(small_model(seed=1))
        except UserError as error:
            assert "restore" in str(error)
        else:  # 1e-05 and 1E-05 are the same number
            assert name == records.HISTORY_NAME
            assert history == run.history
    record_property("cases", len(cases))


@fault("damaged checkpoint or record")
def test_an_older_format_is_named(workplace):
    history = {**go_on(small_model()).history, "format": 0}
    (FOLDER / records.HISTORY_NAME).write_text(json.dumps(history), encoding="utf-8")
    with pytest.raises(UserError, match="has format 0, and 2 is read"):
        load(small_model())


# --- Disk full, read-only, gone -------------------------------------------------------


@fault("disk full, read-only, gone")
def test_something_else_in_the_place_of_a_run_is_named(workplace):
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


# --- Arguments ------------------------------------------------------------------------

zeros = torch.zeros
attend = SelfAttention2d(16, 4, 4)
block = SelfAttentionTransformerBlock(32, 48, 4, 0.1)
model = small_model()

BAD_CALLS = [
    # What is wrong, and what the message must show of it
    (lambda: attend(zeros(2, 16, 4)), r"\[2, 16, 4\]"),
    (lambda: attend(zeros(2, 15, 4, 4)), "15 != 16"),
    (lambda: attend(zeros(2, 16, 4, 4).int()), "int"),
    (lambda: FeedForwardBlock(4, 4, 1.5), "1.5"),
    (lambda: SelfAttentionTransformerBlock(32, 48, 5, 0.1), "=32 .* n_heads=5"),
    (lambda: block(zeros(2, 5, 16)), r"\[2, 5, 16\]"),
    (lambda: small_model(patch_size=5), "image_size=32 .* patch_size=5"),
    (lambda: model(zeros(2, 3, 32, 28)), "28 != 32"),
    (lambda: model(zeros(2, 1, 32, 32)), "1 != 3"),
]


@fault("bad arguments")
@pytest.mark.parametrize(("call", "said"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_bad_calls_are_refused_with_the_value(call, said):
    """By us, by einops or by torch, with the offending size, value or type."""
    with pytest.raises((TypeError, ValueError, RuntimeError, IndexError), match=said):
        call()


# --- Numerics -------------------------------------------------------------------------


def both(module, x):
    """Return output, gradient of the input and of the first weight."""
    x = x.detach().clone().requires_grad_()
    weight = next(module.parameters())
    out = module(x)
    probe = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
    return out, *torch.autograd.grad((out * probe).sum(), [x, weight])


def exactly(module, x):
    """Return the same, computed in float64."""
    return both(copy.deepcopy(module).double(), x.double())


def assert_close(values, exact, rtol):
    """Assert that outputs and gradients are finite and near those in float64."""
    for value, expected in zip(values, exact, strict=True):
        assert value.isfinite().all()
        error = (value.double() - expected).norm()
        # A single token has no other to look at: the gradient of its query is zero
        assert error <= rtol * expected.norm() + 1e-6, f"{error:.1e}"


def attention_layer():
    torch.manual_seed(0)
    return SelfAttention2d(32, 8, 8, 4)


def grid(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator)


@pytest.fixture(params=["attention", "model"])
def module(request):
    is_layer = request.param == "attention"
    return attention_layer() if is_layer else alive(small_model()).eval()


@pytest.fixture
def x(module):
    is_layer = isinstance(module, SelfAttention2d)
    return grid(2, 32, 5, 6) if is_layer else grid(2, 3, 32, 32)


@fault("numerics")
def test_large_logits_stay_finite():
    layer = attention_layer()
    with torch.no_grad():
        layer.q.weight.mul_(1e5)
    assert all(value.isfinite().all() for value in both(layer, grid(2, 32, 5, 6)))


@fault("numerics")
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float16, 1e-2), (torch.bfloat16, 5e-2)]
)
def test_half_precision(module, x, dtype, rtol):
    module, x = module.to(dtype), x.to(dtype)
    assert_close(both(module, x), exactly(module, x), rtol)


@fault("numerics")
def test_autocast(module, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = both(module, x)
    assert_close(values, exactly(module, x), 5e-2)


@fault("numerics")
def test_any_memory_layout(module, x):
    exact = exactly(module, x)
    for view in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([x, x], -1)[..., 0],
    ):
        assert not view.is_contiguous()
        assert_close(both(module, view), exact, 1e-5)


@fault("numerics")
def test_torch_compile(module, x):
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager")
    for value, expected in zip(both(compiled, x), both(module, x), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    # Dropout draws other numbers; the model must still run and learn
    assert all(value.isfinite().all() for value in both(compiled.train(), x))


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
def test_the_graded_files_compile_and_pass_their_tests(python, tmp_path):
    def run(*arguments):
        command = [python, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    has_torch = not run("-c", "import torch, torchvision, einops").returncode
    for name, tests in (("attention.py", 2), ("vision_transformer.py", 6)):
        shutil.copy(ROOT / name, tmp_path)
        done = run(name) if has_torch else run("-m", "py_compile", name)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("passed  ") == tests * has_torch


# --- Hostile files --------------------------------------------------------------------


class Evil:
    """Its pickle makes a file when it is loaded."""

    def __reduce__(self):
        return (open, ("executed", "w"))


def zipped():
    buffer = io.BytesIO()
    torch.save({"head.weight": Evil()}, buffer)
    return buffer.getvalue()


@fault("hostile files")
@pytest.mark.parametrize("content", [pickle.dumps(Evil()), zipped()], ids=range(2))
def test_a_pickle_is_never_executed(workplace, content):
    go_on(small_model())
    path = FOLDER / training.CHECKPOINT_NAME
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        training.read_checkpoint(path)
    path.unlink()
    for name in (records.WEIGHTS_NAME, records.HISTORY_NAME):
        (FOLDER / name).write_bytes(content)
        with pytest.raises(UserError, match="restore"):
            load(small_model())
    assert only_files(workplace) == [
        f"{FOLDER}/{records.HISTORY_NAME}",
        f"{FOLDER}/{records.WEIGHTS_NAME}",
    ]
