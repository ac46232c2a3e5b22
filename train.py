"""Train the Vision Transformer by the recipe, or validate recorded weights again.

    python train.py                    # the run of the exercise: 50 epochs
    python train.py --preset quick     # the same model, fewer epochs, smaller batches
    python train.py --verify           # the recorded weights on the 10,000 test images

A run can be interrupted at any time; the same command continues it.
"""

import argparse
import math
import sys

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import vision_transformer as vt
from attention import choose_device
from support import analysis, dataset, records

PASSES = 3  # with dropout active, to verify


def number(kind, name, least, limit):
    """Return a reader of numbers from ``least`` to below ``limit`` for ``argparse``."""

    def read(text):
        value = kind(text)
        if not least <= value < limit:
            raise ValueError
        return value

    read.__name__ = name
    return read


def parse_arguments(arguments=None):
    """Read the command line; see ``python train.py --help``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    whole = number(int, "positive int", 1, math.inf)
    rate = number(float, "positive float", 1e-37, 1e37)  # torch computes in float32
    seed = number(int, "64-bit seed", 0, 2**64)
    add = parser.add_argument
    add("--verify", action="store_true", help="validate a record, train nothing")
    add(
        "--preset",
        choices=records.PRESETS,
        default="default",
        help="the run of the exercise, or a quick one (default: %(default)s)",
    )
    for option, name, kind, what in (
        ("--batch-size", "batch_size", whole, "images in a step"),
        ("--lr", "lr", rate, "learning rate"),
        ("--epochs", "n_epochs", whole, "passes over the images"),
        ("--seed", "seed", seed, "of all random numbers"),
    ):
        values = (f"{key}: {preset[name]}" for key, preset in records.PRESETS.items())
        what += f" ({', '.join(values)})"
        add(option, dest=name, type=kind, help=what)
    add(
        "--run",
        help="folder of the run, to store or to verify (default: runs/exercise, "
        "runs/quick, or in runs/ by what differs, as runs/epochs-1)",
    )
    parser.error = lambda message: sys.exit(f"error: {message}")  # without the usage
    return parser.parse_args(arguments)


@torch.no_grad()
def verify_recipe(history, model, device):
    """Validate with dropout active, as the recipe does; return whether that agrees.

    The recorded accuracy is one such pass, and a pass is a sum over independent images:
    its variance is the sum of theirs. So it may differ from the mean of n passes by
    4 sqrt(1 + 1/n) of its standard deviations, and by chance does once in 16,000 times.
    """
    test_set = vt.CIFAR10(vt.DATASET_CACHE_DIR, False, vt.VAL_TRANSFORM)
    loader = DataLoader(test_set, batch_size=100)
    print(f"Validating {PASSES} times with dropout active, as the recipe does:")
    model.train()
    hits = []
    with tqdm(total=PASSES * len(test_set), unit="image", disable=None) as bar:
        for _ in range(PASSES):
            for images, labels in loader:
                hits.append(model(images.to(device)).argmax(dim=-1).cpu() == labels)
                bar.update(len(labels))
    hits = torch.cat(hits).view(PASSES, -1).double()
    mean, scatter = hits.mean().item(), hits.var(dim=0).sum().sqrt() / hits.shape[1]
    recorded = history["val_accs"][-1]
    agrees = abs(recorded - mean) <= 4 * math.sqrt(1 + 1 / PASSES) * scatter
    print(f"{100 * mean:.2f} % on average, one pass scatters by {100 * scatter:.2f} %")
    said = "confirmed" if agrees else "NOT confirmed"
    print(f"recorded: {100 * recorded:.2f} %; the recipe's accuracy is {said}")
    return bool(agrees)


def main(arguments=None):
    """Do what the command line asks for; return the exit code."""
    from support import training  # not above: all who load images import this file

    given = parse_arguments(arguments)
    device = choose_device()
    preset = records.PRESETS[given.preset]
    own = {k: v for k, v in vars(given).items() if k in preset and v is not None}
    settings = {**preset, **own}
    data = vt.CIFAR10, vt.DATASET_CACHE_DIR
    folder = given.run or training.default_folder(settings)
    try:
        if given.verify:
            model = vt.VisionTransformer().to(device)
            wanted = {"dataset": vt.CIFAR10.__name__, **own}  # no demo's images here
            model, history = records.load_record(folder, wanted, model)
            if model is not None:
                dataset.fetch(*data)
        else:
            model, history = vt.train_run(
                settings, vt.DATASET_CACHE_DIR, device, folder
            )
        print(records.summary(history, folder))
        predictions = analysis.predict_test_images(*data, model, device)
        agrees = bool(predictions) and analysis.verify(history, predictions)
        if given.verify and agrees:
            agrees = verify_recipe(history, model, device)
        return 0 if agrees else 1
    except records.UserError as error:
        print(f"error: {error}")
        return 1
    except KeyboardInterrupt as interrupted:
        if not interrupted.args:  # nothing is said yet, nor trained
            print("Interrupted: type the same again.")
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
