"""What goes wrong on the night before the deadline.

Each test belongs to a row of the table of `make faults`. What starts several processes
that train is slow, and runs there alone; `test_training` tries much of it within one
process.
"""

import copy
import io
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
from small_run import small_model
from test_training import FOLDER, go_on, load

from attention import SelfAttention2d
from support import records, training
from support.records import HISTORY_NAME, WEIGHTS_NAME, UserError
from support.training import CHECKPOINT_NAME
from vision_transformer import SelfAttentionTransformerBlock

fault = pytest.mark.fault
slow = pytest.mark.slow
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
SMALL_RUN = str(ROOT / "tests" / "small_run.py")


def start_training(folder, stage="never", number=0, epochs=5, **options):
    """Start a process that trains the small model, to be killed at some point."""
    process = [sys.executable, SMALL_RUN, stage, str(number)]
    return subprocess.Popen(
        [*process, "--batch-size", "16", "--epochs", str(epochs)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        encoding="utf-8",
        **options,
    )


def train_and_read(folder):
    """Return the record of a run that nobody disturbs any more."""
    with start_training(folder) as process:
        assert process.wait(timeout=120) == 0
    [run] = (folder / records.RUNS).iterdir()
    assert only_files(run) == [HISTORY_NAME, WEIGHTS_NAME]
    return records.read_history(run), (run / WEIGHTS_NAME).read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return train_and_read(tmp_path_factory.mktemp("whole"))


# One process after another, each killed at one of these; see `small_run`
SOME_MOMENTS = [("step", 3), ("half-written", 3)]
# The last is of the history, when the weights are recorded
MORE = [("before moving", 3), ("step", 8), ("before moving", 3)]


@posix
@slow
@fault("training killed (SIGKILL)")
@pytest.mark.parametrize("moments", [SOME_MOMENTS, MORE])
def test_a_run_that_was_killed_ends_as_one_that_was_not(
    uninterrupted, tmp_path, moments, record_property
):
    for stage, number in moments:
        with start_training(tmp_path, stage, number) as process:
            assert process.wait(timeout=120) == -signal.SIGKILL
    (history, weights), (expected, content) = train_and_read(tmp_path), uninterrupted
    for key in ("train_losses", "val_accs", "val_accs_eval", "probe_logits"):
        assert history[key] == expected[key], key
    assert weights == content, "bit for bit"
    record_property("cases", len(moments))


@posix
@slow
@fault("Ctrl-C")
@pytest.mark.parametrize(
    ("name", "seconds", "is_read"),
    [
        ("SIGINT", 0.0, False),  # `| tee`, which Ctrl-C ends as well
        ("SIGTERM", 0.0, True),  # a scheduler
        ("SIGINT", 0.5, True),
        ("SIGHUP", 0.0, True),  # a terminal that is closed
    ],
)
def test_ctrl_c_and_the_like_say_how_to_go_on(workplace, name, seconds, is_read):
    options = {} if is_read else {"stderr": subprocess.PIPE}
    with start_training(workplace, epochs=1000, **options) as process:
        next(line for line in process.stdout if line.startswith("epoch   2"))
        time.sleep(seconds)
        if not is_read:
            process.stdout.close()
        process.send_signal(getattr(signal, name))
        start = time.monotonic()
        try:
            lines = process.stdout if is_read else process.stderr
            said = next(line for line in lines if "Interrupted" in line)
            assert time.monotonic() - start < 5, "within a step"
            assert lines.read() == "", "no traceback"
            process.wait(timeout=30)  # torch gives its workers 5 s to end
        finally:
            process.kill()
    assert process.returncode == 130
    done = re.match(r"Interrupted: (\d+) of 1000 epochs are saved in runs", said)
    assert int(done[1]) >= 2
    assert [*records.RUNS.glob(f"*/{CHECKPOINT_NAME}")]


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
    for raised, told in (
        (RuntimeError("DataLoader worker exited unexpectedly"), KeyboardInterrupt),
        (UserError("the disk is full"), UserError),  # the cause, not the interruption
    ):
        with pytest.raises(told), training.interruption_waits(model):
            signal.raise_signal(signal.SIGINT)
            raise raised


@fault("Ctrl-C")
def test_signals_that_are_not_ours_stay_as_they_are(workplace, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # `nohup`, or `&` in a script
    try:
        with training.interruption_waits(small_model()):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    with ThreadPoolExecutor() as pool:  # where no signal can be handled
        pool.submit(go_on, small_model()).result()
    assert load(small_model())
    with monkeypatch.context() as patch:  # None: not set from Python
        patch.setattr(signal, "getsignal", lambda _: None)
        patch.setattr(signal, "signal", None)
        with training.interruption_waits(small_model()):
            pass


class Evil:
    """Its pickle makes a file when it is loaded."""

    def __reduce__(self):
        return (open, ("executed", "w"))


def pickles(_):
    torch.save({"head.weight": Evil()}, buffer := io.BytesIO())
    return [pickle.dumps(Evil()), buffer.getvalue()]


def damages(content):
    """Return foreign files, a file cut to some lengths, and with single bits turned."""
    draw = random.Random(0)
    damaged = [b"", b"\x89PNG\r\n\x1a\n" + bytes(100), b"{}", b"PK\x03\x04"]
    damaged += [content[: draw.randrange(len(content))] for _ in range(4)]
    for _ in range(20):
        # Half of them in the header, which is a small part of the file
        end = draw.choice([2000, len(content)])
        flipped = bytearray(content)
        flipped[draw.randrange(min(end, len(content)))] ^= 1 << draw.randrange(8)
        damaged.append(bytes(flipped))
    return damaged


@pytest.mark.parametrize("name", [CHECKPOINT_NAME, HISTORY_NAME, WEIGHTS_NAME])
@pytest.mark.parametrize(
    "contents",
    [
        pytest.param(damages, marks=fault("damaged checkpoint or record")),
        pytest.param(pickles, marks=fault("hostile files")),
    ],
)
def test_what_a_run_did_not_write_is_never_trusted(
    workplace, contents, name, record_property
):
    is_begun = name == CHECKPOINT_NAME
    go_on(small_model(), n_epochs=3, stop_after=2 if is_begun else None)
    path = FOLDER / name

    def read():
        if is_begun:
            return training.read_checkpoint(path)
        model, history = load(small_model(seed=1))
        return model.state_dict(), hash(str(history))

    whole = read()
    cases = contents(path.read_bytes())
    for content in cases:
        path.write_bytes(content)
        try:
            state = read()
        except UserError as error:
            assert "restore" in str(error)
            assert path.read_bytes() == content, "nothing is deleted"
        else:  # the bit was in the padding, or made 1E-05 of 1e-05
            torch.testing.assert_close(state, whole, rtol=0, atol=0)
    assert not (workplace / "executed").exists()
    record_property("cases", len(cases))


@fault("disk full, read-only, gone")
def test_a_folder_that_vanishes_is_made_again(workplace, monkeypatch):
    note_step = training.Run.note_step

    def vanish(run, loss):
        shutil.rmtree(FOLDER, ignore_errors=True)
        note_step(run, loss)

    monkeypatch.setattr(training.Run, "note_step", vanish)
    go_on(small_model(), n_epochs=2)
    assert load(small_model())


model, attend = small_model(), SelfAttention2d(16, 4, 4)


@fault("bad arguments")
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: attend(torch.zeros(2, 15, 4, 4)), "15 != 16"),
        (lambda: SelfAttentionTransformerBlock(32, 48, 5, 0.1), "=32 .* n_heads=5"),
        (lambda: small_model(patch_size=5), "image_size=32 .* patch_size=5"),
        (lambda: model(torch.zeros(2, 3, 32, 28)), "28 != 32"),
        (lambda: model(torch.zeros(2, 1, 32, 32)), "1 != 3"),
    ],
)
def test_bad_calls_are_refused_with_the_value(call, said):
    with pytest.raises((ValueError, RuntimeError), match=said):  # by us, or by einops
        call()


def interpreters():
    """Return the Pythons to try: those on the path, and those in PYTHONS."""
    found = [shutil.which(f"python3.{minor}") for minor in range(8, 16)]
    found += os.environ.get("PYTHONS", "").split(os.pathsep)
    paths = [path for path in dict.fromkeys(found) if path]
    # A shim of pyenv may stand for a Python that is not there
    return [path for path in paths if not python(path, "-c", "pass").returncode]


def python(path, *arguments, folder=None):
    command = [path, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@fault("Python and torch versions")
@pytest.mark.parametrize("path", interpreters(), ids=os.path.basename)
def test_the_graded_files_compile_and_pass_their_tests(path, tmp_path):
    has_torch = not python(path, "-c", "import torch, torchvision, einops").returncode
    for name, tests in (("attention.py", 2), ("vision_transformer.py", 6)):
        shutil.copy(ROOT / name, tmp_path)
        words = [name] if has_torch else ["-m", "py_compile", name]
        done = python(path, *words, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("passed  ") == tests * has_torch
