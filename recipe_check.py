"""Check that our training computes the provided recipe: a minute or two, no data.

A plain loop of the recipe and ``vision_transformer.train`` train the same model on
generated images. Losses, accuracies and weights must be equal, bit for bit.
"""

import io
import sys
import tempfile
from contextlib import redirect_stdout

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision import transforms as T

import vision_transformer
from support.demo_data import DemoCIFAR10
from support.training import Run


def plain_loop(model, batch_size, lr, n_epochs):
    """The six points of the recipe, and nothing else: return losses and accuracies."""
    mean = [0.49139968, 0.48215841, 0.44653091]
    std = [0.24703223, 0.24348513, 0.26158784]
    to_tensor = [T.ToTensor(), T.Normalize(mean, std)]
    crop = T.RandomResizedCrop((32, 32), scale=(0.8, 1.0), ratio=(0.9, 1.1))
    train_transform = T.Compose([T.RandomHorizontalFlip(), crop, *to_tensor])
    val_transform = T.Compose(to_tensor)
    train_set = DemoCIFAR10("data", train=True, transform=train_transform)
    val_set = DemoCIFAR10("data", train=False, transform=val_transform)
    train_loader = DataLoader(
        train_set, batch_size, shuffle=True, drop_last=True, num_workers=4
    )
    val_loader = DataLoader(val_set, batch_size, shuffle=False, num_workers=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses, accuracies = [], []
    for _ in range(n_epochs):
        for images, labels in train_loader:
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        correct = 0
        with torch.no_grad():
            for images, labels in val_loader:
                correct += (model(images).argmax(dim=1) == labels).sum().item()
        accuracies.append(correct / len(val_loader.dataset))
    return losses, accuracies


def main():
    """Train twice from the same seed, and compare; return the exit code."""
    torch.manual_seed(0)
    ours = vision_transformer.VisionTransformer(layers=2)
    loaders = vision_transformer.make_loaders("data", 32, DemoCIFAR10)
    rest = 3e-4, 2, torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        history = vision_transformer.train(ours, *loaders, *rest, Run({}, folder))
    torch.manual_seed(0)
    plain = vision_transformer.VisionTransformer(layers=2)
    figures = plain_loop(plain, batch_size=32, lr=3e-4, n_epochs=2)
    weights = zip(ours.parameters(), plain.parameters(), strict=True)
    same = (history["train_losses"], history["val_accs"]) == figures
    same = same and all(torch.equal(*pair) for pair in weights)
    said = "bit-identical" if same else "DIFFER"
    print(f"losses, accuracies, weights of `train` and of a plain loop: {said}")
    return not same


if __name__ == "__main__":
    sys.exit(main())
