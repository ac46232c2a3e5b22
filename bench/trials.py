"""Short training runs for choices and for ablations: `make trials`.

Nothing here looks at the test images. 5,000 of the 50,000 training images are held
out, and every trial is judged by its accuracy on them. A finished trial is a file in
``bench/trials``; a trial with a file is not run again, so an interrupted series goes
on. What a trial trains on is in its file: ``images`` of the other 45,000 training
images, for ``epochs`` passes.
"""

import argparse
import datetime
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import CIFAR10
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import vision_transformer as ours  # noqa: E402
from training import fetch, processor_name, write_whole  # noqa: E402

FOLDER = ROOT / "bench" / "trials"
HELD_OUT = 5_000


@dataclass
class Trial:
    """One short run; ``make`` names a function of this file that makes the model."""

    group: str
    name: str
    make: str = "default"
    batch_size: int = 128
    lr: float = 3e-4
    epochs: int = 1
    images: int = 45_000
    seed: int = 0

    @property
    def path(self):
        name = f"{self.group} {self.name}".replace(",", "").replace(" ", "-")
        return FOLDER / f"{name}.json"


# --- Models --------------------------------------------------------------------------


def default():
    """Return the model as it is handed in."""
    return ours.VisionTransformer()


def linear_layers(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


@torch.no_grad()
def xavier():
    """Glorot and Bengio (2010), uniform, biases zero: as in the authors' code."""
    model = default()
    for layer in linear_layers(model):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return model


@torch.no_grad()
def lecun():
    """Variance 1 / fan-in everywhere, biases zero."""
    model = default()
    for layer in linear_layers(model):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return model


@torch.no_grad()
def narrow():
    """Truncated normal of standard deviation 0.02, as in BERT."""
    model = default()
    for layer in linear_layers(model):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return model


@torch.no_grad()
def loud_patches(scale=3.0):
    """PyTorch's default, with a patch embedding that positions do not drown."""
    model = default()
    model.patch_embedding.weight.mul_(scale)
    return model


@torch.no_grad()
def xavier_loud_patches():
    """Both of the two above."""
    model = xavier()
    model.patch_embedding.weight.mul_(3)
    return model


@torch.no_grad()
def quiet_branches():
    """PyTorch's default; the last layer of every residual branch starts at zero."""
    model = default()
    for block in model.blocks:
        block.attention.inner_module[1].out.weight.zero_()
        block.feed_forward.inner_module[1].layers[3].weight.zero_()
        block.feed_forward.inner_module[1].layers[3].bias.zero_()
    return model


@torch.no_grad()
def mimetic():
    """PyTorch's default with attention that begins as trained attention looks.

    Trockman and Kolter (2023), "Mimetic Initialization of Self-Attention Layers":
    per head W_Q W_K^T is near 0.7 Z + 0.7 I, and W_V W_O near 0.4 Z - 0.4 I.
    """
    model = default()
    for block in model.blocks:
        layer = block.attention.inner_module[1]
        size, rank = layer.embed_dim, layer.head_dim
        noise = torch.randn(size, size) / math.sqrt(size)
        u, s, vt = torch.linalg.svd(0.4 * noise - 0.4 * torch.eye(size))
        layer.v.weight.copy_((u * s.sqrt()).T)
        layer.out.weight.copy_((s.sqrt()[:, None] * vt).T)
        for head in range(layer.num_heads):
            rows = slice(head * rank, (head + 1) * rank)
            noise = torch.randn(size, size) / math.sqrt(rank)
            u, s, vt = torch.linalg.svd(0.7 * noise + 0.7 * torch.eye(size))
            layer.q.weight[rows] = (u[:, :rank] * s[:rank].sqrt()).T
            layer.k.weight[rows] = s[:rank].sqrt()[:, None] * vt[:rank]
    return model


# --- Running -------------------------------------------------------------------------

SHORT = {"batch_size": 64, "epochs": 2, "images": 15_000}
TRIALS = [
    Trial("init", "default", **SHORT),
    Trial("init", "mimetic", make="mimetic", **SHORT),
    Trial("init", "loud patches", make="loud_patches", **SHORT),
    Trial("init", "xavier", make="xavier", **SHORT),
    Trial("init", "xavier, loud patches", make="xavier_loud_patches", **SHORT),
    Trial(
        "settings",
        "batch 32, lr 3e-4",
        make="xavier_loud_patches",
        **{**SHORT, "batch_size": 32},
    ),
    Trial("init", "lecun", make="lecun", **SHORT),
]


def loaders(trial, cache_dir):
    """Return loaders of the trial's training images and of the held-out images."""
    order = torch.randperm(50_000, generator=torch.Generator().manual_seed(0))
    chosen, held_out = order[HELD_OUT:][: trial.images], order[:HELD_OUT]
    augmented = CIFAR10(cache_dir, train=True, transform=ours.TRAIN_TRANSFORM)
    plain = CIFAR10(cache_dir, train=True, transform=ours.VAL_TRANSFORM)
    train_loader = DataLoader(
        Subset(augmented, chosen.tolist()),
        trial.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=2,
    )
    return train_loader, DataLoader(Subset(plain, held_out.tolist()), 500)


def run(trial, cache_dir, device):
    """Train and judge one trial; return its record."""
    torch.manual_seed(trial.seed)
    model = globals()[trial.make]().to(device)
    train_loader, held_out_loader = loaders(trial, cache_dir)
    optimizer = torch.optim.Adam(model.parameters(), lr=trial.lr)
    record = {
        **asdict(trial),
        "train_losses": [],
        "held_out_accs": [],
        "held_out_accs_eval": [],
        "epoch_seconds": [],
    }
    bar = tqdm(total=trial.epochs * len(train_loader), desc=trial.name, disable=None)
    with bar:
        for _ in range(trial.epochs):
            start = time.perf_counter()
            losses = ours.train_one_epoch(
                model, train_loader, optimizer, device, lambda loss: bar.update()
            )
            record["epoch_seconds"].append(time.perf_counter() - start)
            record["train_losses"].append(sum(losses) / len(losses))
            record["held_out_accs"].append(
                ours.validate(model, held_out_loader, device)
            )
            record["held_out_accs_eval"].append(
                ours.validate_in_eval_mode(model, held_out_loader, device)
            )
    record.update(
        parameters=sum(p.numel() for p in model.parameters()),
        machine=processor_name(),
        threads=torch.get_num_threads(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
    )
    return record


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("groups", nargs="*", help="only trials of these groups")
    parser.add_argument("--cache-dir", default="data")
    arguments = parser.parse_args()
    fetch(CIFAR10, arguments.cache_dir)
    device = ours.choose_device()
    import os

    lane = int(os.environ.get("LANE", 0))
    TR = TRIALS[lane::2] if "LANE" in os.environ else TRIALS
    for trial in TR:
        if trial.path.exists() or trial.group not in (
            arguments.groups or [trial.group]
        ):
            continue
        record = run(trial, arguments.cache_dir, device)
        write_whole(trial.path, (json.dumps(record, indent=1) + "\n").encode())
        print(
            f"{trial.group} {trial.name}: held-out accuracy "
            f"{record['held_out_accs'][-1]:.4f} (recipe), "
            f"{record['held_out_accs_eval'][-1]:.4f} (eval), "
            f"{sum(record['epoch_seconds']):.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
