"""A data set in CIFAR-10's form that is generated instead of fetched."""

import math

import numpy as np
from PIL import Image
from torchvision.datasets import VisionDataset

ANGLES = (0, 22.5, 45, 67.5, 90)  # slope of the stripes, in degrees
WIDTHS = {"narrow": 4, "wide": 8}  # period of the stripes, in pixels
CLASSES = len(ANGLES) * len(WIDTHS)
SIZES = {True: 480, False: 200}  # training and validation images


class DemoCIFAR10(VisionDataset):
    """Images of 32 x 32 pixels with stripes; the class is their slope and width.

    Colour, phase, noise and the side that the stripes lean to are random, so a model
    has to learn what matters. Arguments are those of ``torchvision.datasets.CIFAR10``;
    nothing is read from or written to ``root``.
    """

    base_folder = "demo"
    train_list = ()
    test_list = ()
    meta = None

    def __init__(self, root, train=True, transform=None, download=False):
        super().__init__(root, transform=transform)
        self.classes = [f"{width} {angle:g}°" for width in WIDTHS for angle in ANGLES]
        generator = np.random.default_rng(1 if train else 2)
        labels = np.arange(SIZES[train]) % CLASSES
        self.targets = generator.permutation(labels).tolist()
        self.data = np.stack([_stripes(label, generator) for label in self.targets])

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        image = Image.fromarray(self.data[index])
        return self.transform(image), self.targets[index]


def _stripes(label, generator):
    """Return one image, (32, 32, 3), of type uint8."""
    width = list(WIDTHS.values())[label // len(ANGLES)]
    # Either side: the recipe's random flip mirrors the slope
    angle = math.radians(ANGLES[label % len(ANGLES)]) * generator.choice([-1, 1])
    row, column = np.mgrid[0:32, 0:32]
    distance = column * math.cos(angle) + row * math.sin(angle)
    wave = np.sin(2 * math.pi * (distance / width + generator.uniform()))[..., None]
    colour = generator.uniform(0.3, 1, size=3) * 90
    noise = generator.normal(0, 10, size=(32, 32, 3))
    return np.clip(128 + wave * colour + noise, 0, 255).astype(np.uint8)
