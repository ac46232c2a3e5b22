"""Training runs for choices, ablations and seeds: `python bench/trials.py GROUP ...`.

Choices and ablations never look at the test images: 5,000 of the 50,000 training images
are held out, and every trial is judged by them. It trains on ``images`` of the others,
for ``epochs`` passes. The seeds are whole quick runs by the recipe.

A finished trial is a file in ``bench/trials`` and is not run again. An interrupted one
continues after its last epoch, from its folder in ``build/trials``.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import CIFAR10

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import vision_transformer as ours  # noqa: E402
from attention import choose_device  # noqa: E402
from dataset import fetch  # noqa: E402
from figures import calibration  # noqa: E402
from training import (  # noqa: E402
    PRESETS,
    Run,
    UserError,
    load_record,
    processor_name,
    write_whole,
)

FOLDER = ROOT / "bench" / "trials"
RUNS = ROOT / "build" / "trials"
HELD_OUT = 5_000
SEEDS = (1, 2)  # beside 0, that of the run in report/quick


@dataclass
class Trial:
    """One run; ``make`` names its model in ``MODELS``."""

    group: str
    name: str
    make: str
    batch_size: int = 64
    lr: float = 3e-4
    epochs: int = 2
    images: int = 15_000
    seed: int = 0

    @property
    def stem(self):
        """The name of its file and of its folder."""
        return f"{self.group} {self.name}".replace(",", "").replace(" ", "-")

    @property
    def path(self):
        """Where its record is, or will be."""
        return FOLDER / f"{self.stem}.json"


# --- Models --------------------------------------------------------------------------


@torch.no_grad()
def patches(model, factor):
    """Scale the weights of the patch embedding."""
    model.patch_embedding.weight.mul_(factor)
    return model


@torch.no_grad()
def branches(model, factor):
    """Scale the last linear layer of both residual branches of every block."""
    for block in model.blocks:
        block.attention.inner_module[1].out.weight.mul_(factor)
        block.feed_forward.inner_module[1].layers[3].weight.mul_(factor)
    return model


def zero_branches(gain=3):
    """Every block begins as the identity: Zhang et al. (2019), "Fixup"."""
    return patches(branches(ours.VisionTransformer(), 0), gain / 3)


def gpt2_branches():
    """Branches times 1 / sqrt(2N) in a model of N blocks: Radford et al. (2019)."""
    model = ours.VisionTransformer()
    return branches(model, 1 / math.sqrt(2 * len(model.blocks)))


def pytorch():
    """All linear layers as PyTorch initialises them."""
    model = ours.VisionTransformer()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    return model


@torch.no_grad()
def mimetic_keys(model):
    """Let tokens find their like: per head W_Q W_K^T is near 0.7 Z + 0.7 I.

    Trockman and Kolter (2023), "Mimetic Initialization of Self-Attention Layers", with
    random numbers Z.
    """
    for block in model.blocks:
        layer = block.attention.inner_module[1]
        size, rank = layer.embed_dim, layer.head_dim
        for head in range(layer.num_heads):
            rows = slice(head * rank, (head + 1) * rank)
            noise = torch.randn(size, size) / math.sqrt(rank)
            u, s, vt = torch.linalg.svd(0.7 * noise + 0.7 * torch.eye(size))
            layer.q.weight[rows] = (u[:, :rank] * s[:rank].sqrt()).T
            layer.k.weight[rows] = s[:rank].sqrt()[:, None] * vt[:rank]
    return model


@torch.no_grad()
def mimetic_values(model):
    """Likewise W_V W_O near 0.4 Z - 0.4 I."""
    for block in model.blocks:
        layer = block.attention.inner_module[1]
        size = layer.embed_dim
        noise = torch.randn(size, size) / math.sqrt(size)
        u, s, vt = torch.linalg.svd(0.4 * noise - 0.4 * torch.eye(size))
        layer.v.weight.copy_((u * s.sqrt()).T)
        layer.out.weight.copy_((s.sqrt()[:, None] * vt).T)
    return model


@torch.no_grad()
def soft_queries(model):
    """Let every token attend to nearly all alike."""
    for block in model.blocks:
        block.attention.inner_module[1].q.weight.mul_(0.2)
    return model


def zero_head(model):
    """Let all classes begin with the same probability."""
    nn.init.zeros_(model.head.weight)
    return model


class DropoutBefore(nn.Module):
    """A block with dropout of its input."""

    def __init__(self, block, p_dropout):
        super().__init__()
        self.dropout, self.block = ours.Dropout(p_dropout), block

    def forward(self, x, keep=None):
        return self.block(self.dropout(x), keep)


def block_dropout(model, p_dropout=0.2):
    """Drop out also after the output projection of attention."""
    for block in model.blocks:
        layer = block.attention.inner_module[1]
        layer.out = nn.Sequential(layer.out, ours.Dropout(p_dropout))
    return model


def paper_dropout(model, p_dropout=0.2):
    """Drop out also after attention's output and after the positions are added.

    Dosovitskiy et al. (2021), Appendix B.1: after every dense layer except those for
    queries, keys and values, and directly after adding the positions.
    """
    model = block_dropout(model, p_dropout)
    model.blocks[0] = DropoutBefore(model.blocks[0], p_dropout)
    return model


class PostNormBlock(nn.Module):
    """A block with the layer norms behind the residual connections: Vaswani et al."""

    def __init__(self, block):
        super().__init__()
        self.attention_norm, self.attention = block.attention.inner_module
        self.mlp_norm, self.mlp = block.feed_forward.inner_module

    def forward(self, x, keep=None):
        x = self.attention_norm(x[:, :keep] + self.attention(x, keep))
        return self.mlp_norm(x + self.mlp(x))


def post_norm():
    """Layer norm behind each residual connection instead of in front of each layer."""
    model = ours.VisionTransformer()
    model.blocks = nn.ModuleList(PostNormBlock(block) for block in model.blocks)
    model.norm = nn.Identity()  # the last block normalises already
    return model


def no_positions():
    """No positional embedding, neither for patches nor for the class token."""
    model = ours.VisionTransformer()
    for name, parameter in model.named_parameters():
        if "position" in name:
            nn.init.zeros_(parameter).requires_grad_(False)
    return model


MODELS = {
    "default": ours.VisionTransformer,
    "pytorch": pytorch,
    "mimetic": lambda: mimetic_values(mimetic_keys(pytorch())),
    "loud_patches": lambda: patches(pytorch(), 3),
    "xavier": lambda: patches(ours.VisionTransformer(), 1 / 3),
    "zero_branches": zero_branches,
    "zero_branches_gain_1": partial(zero_branches, gain=1),
    "zero_branches_gain_2": partial(zero_branches, gain=2),
    "zero_branches_gain_5": partial(zero_branches, gain=5),
    "zero_branches_mimetic": lambda: mimetic_keys(zero_branches()),
    "zero_branches_soft_queries": lambda: soft_queries(zero_branches()),
    "zero_branches_zero_head": lambda: zero_head(zero_branches()),
    "gpt2_branches": gpt2_branches,
    "zero_branches_block_dropout": lambda: block_dropout(zero_branches()),
    "zero_branches_paper_dropout": lambda: paper_dropout(zero_branches()),
    "no_positions": no_positions,
    "one_head": partial(ours.VisionTransformer, n_heads=1),
    "patch_8": partial(ours.VisionTransformer, patch_size=8),
    "patch_2": partial(ours.VisionTransformer, patch_size=2),
    "no_dropout": partial(ours.VisionTransformer, p_dropout=0.0),
    "post_norm": post_norm,
}


# --- Running -------------------------------------------------------------------------

TRIALS = [
    Trial("init", "pytorch", "pytorch"),
    Trial("init", "mimetic", "mimetic"),
    Trial("init", "loud patches", "loud_patches"),
    Trial("init", "xavier", "xavier"),
    Trial("init", "xavier, loud patches", "default"),
    Trial("settings", "batch 32, lr 3e-4", "default", batch_size=32),
    Trial("ablation", "no positions", "no_positions"),
    Trial("ablation", "one head", "one_head"),
    Trial("ablation", "patch 8", "patch_8"),
    Trial("ablation", "no dropout", "no_dropout"),
    Trial("ablation", "post norm", "post_norm"),
    Trial("ablation", "patch 2", "patch_2"),
    *(
        Trial("final", name, make, batch_size=128, epochs=40, images=5_000)
        for name, make in {
            "full branches, MLP dropout": "default",
            "zero branches, MLP dropout": "zero_branches",
            "zero branches, block dropout": "zero_branches_block_dropout",
            "zero branches, paper dropout": "zero_branches_paper_dropout",
        }.items()
    ),
    *(
        Trial("quick", name, "zero_branches", batch_size, lr, epochs=4)
        for name, batch_size, lr in (
            ("batch 32, lr 3e-4", 32, 3e-4),
            ("batch 64, lr 3e-4", 64, 3e-4),
            ("batch 64, lr 6e-4", 64, 6e-4),
            ("batch 128, lr 6e-4", 128, 6e-4),
        )
    ),
    *(
        Trial("screen", name, make, epochs=1)
        for name, make in {
            "full branches, patch gain 3": "default",
            "zero branches, patch gain 3": "zero_branches",
            "zero branches, patch gain 1": "zero_branches_gain_1",
            "zero branches, patch gain 2": "zero_branches_gain_2",
            "zero branches, patch gain 5": "zero_branches_gain_5",
            "zero branches, mimetic": "zero_branches_mimetic",
            "zero branches, soft queries": "zero_branches_soft_queries",
            "zero branches, zero head": "zero_branches_zero_head",
            "zero branches, block dropout": "zero_branches_block_dropout",
            "zero branches, paper dropout": "zero_branches_paper_dropout",
            "GPT-2 scaling": "gpt2_branches",
        }.items()
    ),
]


def loaders(trial, cache_dir):
    """Return loaders of the trial's training images and of the held-out images."""
    order = torch.randperm(50_000, generator=torch.Generator().manual_seed(0)).tolist()
    augmented = CIFAR10(cache_dir, train=True, transform=ours.TRAIN_TRANSFORM)
    plain = CIFAR10(cache_dir, train=True, transform=ours.VAL_TRANSFORM)
    train_loader = DataLoader(
        Subset(augmented, order[HELD_OUT:][: trial.images]),
        trial.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=2,
    )
    return train_loader, DataLoader(Subset(plain, order[:HELD_OUT]), 500)


def run(trial, cache_dir, device):
    """Train and judge one trial, or continue it; return its record."""
    torch.manual_seed(trial.seed)
    model = MODELS[trial.make]().to(device)
    training_run = Run(asdict(trial), RUNS / trial.stem)
    train_loader, held_out = loaders(trial, cache_dir)
    if training_run.is_finished:
        _, history = load_record(training_run.folder, asdict(trial), model)
    else:
        history = ours.train(
            model, train_loader, held_out, trial.lr, trial.epochs, device, training_run
        )
    *_, calibration_error = calibration(*ours.predict(model, held_out, device))
    losses = torch.tensor(history["train_losses"], dtype=torch.float64)
    return {
        **asdict(trial),
        "train_losses": losses.view(trial.epochs, -1).mean(dim=1).tolist(),
        "held_out_accs": history["val_accs"],
        "held_out_accs_eval": history["val_accs_eval"],
        "held_out_losses": history["val_losses_eval"],
        "held_out_ece": calibration_error,
        "epoch_seconds": history["epoch_seconds"],
        "parameters": history["parameters"],
        "machine": processor_name(),
        "threads": torch.get_num_threads(),
        "date": history["date"],
    }


def seed_path(seed):
    """Return the file of the quick run with a seed."""
    return FOLDER / f"seeds-{seed}.json"


def run_seed(seed, cache_dir, device):
    """Train, or continue, the quick run with another seed; return its record."""
    settings = PRESETS["quick"] | {"seed": seed}
    _, history = ours.train_run(settings, cache_dir, device)
    kept = ["val_accs", "val_accs_eval", "epoch_seconds", "machine", "versions"]
    return {key: history[key] for key in [*settings, *kept, "date", "weights_sha256"]}


def store(path, record):
    """Write the record of a trial, and say what it reached."""
    write_whole(path, (json.dumps(record, indent=1) + "\n").encode())
    kind = "val_accs" if "val_accs" in record else "held_out_accs"
    print(
        f"{path.stem}: accuracy {record[kind][-1]:.4f} (recipe), "
        f"{record[f'{kind}_eval'][-1]:.4f} (eval), "
        f"{sum(record['epoch_seconds']):.0f} s",
        flush=True,
    )


def main():
    groups = [*dict.fromkeys(trial.group for trial in TRIALS), "seeds"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "groups",
        nargs="+",
        help=f"which to run, of {', '.join(groups)}",
    )
    parser.add_argument("--cache-dir", default="data")
    arguments = parser.parse_args()
    unknown = set(arguments.groups) - set(groups)
    if unknown:
        parser.error(f"no such group: {', '.join(unknown)}")
    device = choose_device()
    try:
        fetch(CIFAR10, arguments.cache_dir)
        for trial in TRIALS:
            if trial.group in arguments.groups and not trial.path.exists():
                store(trial.path, run(trial, arguments.cache_dir, device))
        for seed in SEEDS if "seeds" in arguments.groups else ():
            if not seed_path(seed).exists():
                store(seed_path(seed), run_seed(seed, arguments.cache_dir, device))
    except UserError as error:
        return f"error: {error}"
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
