"""A small model on generated images, and the process that `test_faults` kills.

    python tests/small_run.py STAGE NUMBER [OPTION ...]

It does what `train.py` does with these options, and kills itself at its n-th training
step, or at its n-th write of a file.
"""

import os
import signal
import sys

import torch

import train
import vision_transformer
from support import demo_data, training
from vision_transformer import VisionTransformer


def small_model(seed=0, **changes):
    """A Vision Transformer that trains in seconds, made from a seed."""
    torch.manual_seed(seed)
    sizes = {"layers": 1, "hidden_size": 32, "mlp_size": 48, "n_heads": 4, **changes}
    return VisionTransformer(**sizes)


@torch.no_grad()
def alive(model):
    """Return a model with weights of which none is special, as a zero branch is."""
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def use_few_generated_images(setattr=setattr):
    images = demo_data.DemoCIFAR10
    setattr(demo_data, "SIZES", {True: 100, False: 40})
    setattr(vision_transformer, "CIFAR10", images)
    setattr(vision_transformer.make_loaders, "__defaults__", (images,))
    setattr(vision_transformer.train_run, "__defaults__", (None, images))


def kill_now(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def counted(original, number, before):
    """Return a function that calls another one before its n-th call."""
    count = 0

    def function(*arguments):
        nonlocal count
        count += 1
        if count == number:
            before(*arguments)
        return original(*arguments)

    return function


def halve(handle):
    os.ftruncate(handle, os.fstat(handle).st_size // 2)
    kill_now()


def arm(stage, number):
    if stage == "step":
        step = training.Run.note_step
        training.Run.note_step = counted(step, number, before=kill_now)
    elif stage == "half-written":
        os.fsync = counted(os.fsync, number, before=halve)
    elif stage == "before moving":
        os.replace = counted(os.replace, number, before=kill_now)


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which `nohup` ignores
    use_few_generated_images()
    vision_transformer.VisionTransformer = small_model
    stage, number, *options = sys.argv[1:]
    arm(stage, int(float(number)))
    sys.exit(train.main(options))
