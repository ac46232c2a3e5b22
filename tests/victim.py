"""Train the small model on generated data: the process that `test_faults` kills.

    python tests/victim.py STAGE NUMBER

It kills itself at its n-th training step, or at its n-th write of a file.
"""

import os
import signal
import sys

import torch

import report.demo
import training
import vision_transformer

BATCH_SIZE, LR, N_EPOCHS = 16, 1e-3, 3


def kill_now(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def counted(original, number, before=None, after=None):
    """Return a function that calls another before or after its n-th call."""
    count = 0

    def function(*arguments):
        nonlocal count
        count += 1
        if count == number and before:
            before(*arguments)
        result = original(*arguments)
        if count == number and after:
            after()
        return result

    return function


def halve(handle):
    os.ftruncate(handle, os.fstat(handle).st_size // 2)
    kill_now()


def arm(stage, number):
    if stage == "step":
        step = training.Run.on_step
        training.Run.on_step = counted(step, number, after=kill_now)
    elif stage == "before writing":
        training.write_whole = counted(training.write_whole, number, before=kill_now)
    elif stage == "half-written":
        os.fsync = counted(os.fsync, number, before=halve)
    elif stage == "before moving":
        os.replace = counted(os.replace, number, before=kill_now)
    elif stage == "after moving":
        os.replace = counted(os.replace, number, after=kill_now)


if __name__ == "__main__":
    torch.set_num_threads(1)
    report.demo.SIZES = {True: 100, False: 40}
    vision_transformer.CIFAR10 = report.demo.DemoCIFAR10
    arm(sys.argv[1], int(float(sys.argv[2])))
    torch.manual_seed(0)
    small = {"layers": 1, "hidden_size": 32, "mlp_size": 48, "n_heads": 4}
    model = vision_transformer.VisionTransformer(**small)
    cpu = torch.device("cpu")
    run = training.Run("DemoCIFAR10", BATCH_SIZE, LR, N_EPOCHS, 0, cpu)
    vision_transformer.train(model, run, "data", BATCH_SIZE, LR, cpu)
