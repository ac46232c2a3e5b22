"""Train the Vision Transformer by the recipe, or validate recorded weights again.

    python train.py                    # the run of the exercise: 50 epochs
    python train.py --preset quick     # the same model, fewer epochs, smaller batches
    python train.py --verify           # the recorded weights on the 10,000 test images

A run can be interrupted at any time; the same command continues it.
"""

import argparse
import math

import vision_transformer as vt
from attention import choose_device
from support import dataset, records


def positive(kind):
    """Return a reader of numbers above 0 for ``argparse``."""

    def read(text):
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value

    read.__name__ = f"positive {kind.__name__}"
    return read


def parse_arguments(arguments=None):
    """Read the command line; see ``python train.py --help``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--verify", action="store_true", help="validate a record, train nothing"
    )
    parser.add_argument(
        "--preset",
        choices=records.PRESETS,
        default="default",
        help="quick: fewer epochs, smaller batches",
    )
    parser.add_argument("--batch-size", type=positive(int), help="images in a step")
    parser.add_argument("--lr", type=positive(float), help="learning rate")
    parser.add_argument(
        "--epochs", type=positive(int), dest="n_epochs", help="passes over the images"
    )
    parser.add_argument("--seed", type=int, help="of all random numbers")
    parser.add_argument("--run", help="folder of the run, to store or to verify")
    parser.add_argument(
        "--cache-dir", default=vt.DATASET_CACHE_DIR, help="folder of CIFAR-10"
    )
    return parser.parse_args(arguments)


def main(arguments=None):
    """Do what the command line asks for; return the exit code."""
    from support import (
        figures,  # not above: every process that loads images imports this file
    )

    given = parse_arguments(arguments)
    device = choose_device()
    try:
        if given.verify:
            model = vt.VisionTransformer().to(device)
            if given.run:
                records.read_history(given.run)  # not one that lies beside
            folder = given.run or records.RECORD
            wanted = {"dataset": vt.CIFAR10.__name__}  # a demo's images are not here
            model, history = records.load_record(folder, wanted, model)
            if model is not None:
                dataset.fetch(vt.CIFAR10, given.cache_dir)
        else:
            own = {
                key: getattr(given, key)
                for key in records.PRESETS["default"]
                if getattr(given, key, None) is not None
            }
            settings = {**records.PRESETS[given.preset], **own}
            model, history = vt.train_run(settings, given.cache_dir, device, given.run)
        print(records.summary(history, folder))
        predictions = figures.predict_test_images(
            vt.CIFAR10, given.cache_dir, model, device
        )
        return 0 if predictions and figures.verify(history, predictions) else 1
    except records.UserError as error:
        print(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
