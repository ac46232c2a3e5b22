"""Training runs for choices, ablations and seeds: `python bench/trials.py GROUP ...`.

Choices and ablations never look at the test images: 5,000 of the 50,000 training images
are held out, and every trial is judged by them. It trains on ``images`` of the others,
for ``epochs`` passes. The seeds are whole quick runs by the recipe.

They came in this order. ``final`` and ``settings`` chose the branches, the places of
dropout and the quick run, of a model whose patch embedding began with Xavier weights;
``screen`` shows what these reach in one epoch. ``patches`` chose the cosines that it
begins with now. ``ablation`` compares the model with others. To run one again repeats
the numbers of ``the model`` only: the code of all others drew weights in another order.
In ``bench/former`` are runs of earlier versions by the recipe: with branches of full
size, with the paper's dropout, broken off, and with Xavier patches.

A finished trial is a file in ``bench/trials`` and is not run again. An interrupted one
continues after its last epoch, from its folder in ``build/trials``. What all of them
reached is in the tables of ``runs``, of which the notebook shows two.
"""

import argparse
import collections
import csv
import functools
import io
import json
import math
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import einops
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import CIFAR10

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import vision_transformer as ours  # noqa: E402
from attention import choose_device  # noqa: E402
from support import records  # noqa: E402
from support.analysis import calibration  # noqa: E402
from support.dataset import fetch  # noqa: E402
from support.training import Run, use_quick_dropout  # noqa: E402

FOLDER = ROOT / "bench" / "trials"
RUNS = ROOT / "build" / "trials"
HELD_OUT = 5_000
SETTINGS_SHOWN = ("group", "name", "batch_size", "lr", "epochs", "images", "seed")
SEEDS = (1, 2)  # beside 0, that of runs/quick and of all trials but some ablations


@dataclass
class Trial:
    """One run of the model that is called ``name`` in ``MODELS``."""

    group: str
    name: str
    epochs: int
    images: int
    batch_size: int = 64
    lr: float = 3e-4
    seed: int = 0

    @property
    def stem(self):
        """The name of its file and of its folder."""
        stem = f"{self.group} {self.name}".replace(",", "").replace(" ", "-")
        return stem + f"-seed-{self.seed}" * bool(self.seed)

    @property
    def path(self):
        """Where its record is, or will be."""
        return FOLDER / f"{self.stem}.json"


# --- Models --------------------------------------------------------------------------


# The model of the report: branches that begin at zero, dropout in the MLPs, cosines
new_model = ours.VisionTransformer


def full_branches(model):
    """Let the last layer of every branch begin as the other linear layers do."""
    for block in model.blocks:
        nn.init.xavier_uniform_(block.attention.inner_module[1].out.weight)
        mlp = block.feed_forward.inner_module[1]
        nn.init.xavier_uniform_(mlp.layers[3].weight)
    return model


def xavier_model(**changes):
    """Return a model whose patch embedding begins with Xavier weights."""
    model = new_model(**changes)
    nn.init.xavier_uniform_(model.patch_embedding.weight, gain=3)
    return model


def cosines(number):
    """Return the orthonormal cosines (number, number) of the DCT, by frequency."""
    steps = torch.arange(number)
    basis = torch.cos(math.pi / number * steps[:, None] * (steps + 0.5))
    return basis / basis.norm(dim=1, keepdim=True)


@torch.no_grad()
def cosine_patches(model, variance=2.84, exponent=1.0, colours=(1, 3, 5), mixed=True):
    """Let the patch embedding begin with cosines, the louder the higher they are.

    Of colours, too: the cosines of three channels are brightness and two opponents.
    ``variance`` is that of a feature over photographs, beside positions of 1.
    """
    p, layer = model.patch_size, model.patch_embedding
    space, colour = cosines(p), cosines(model.in_channels)
    basis = torch.einsum("ui,vj,cd->uvcijd", space, space, colour)
    f = torch.arange(p, dtype=torch.float32)
    law = (1 + 2 * torch.hypot(f[:, None], f)) ** exponent
    gains = law[:, :, None] * torch.tensor(colours, dtype=torch.float32)
    size = layer.in_features
    rows = gains.reshape(size, 1) * basis.reshape(size, size)
    if mixed:
        rows = nn.init.orthogonal_(torch.empty(layer.out_features, size)) @ rows
    else:  # each in rows of its own
        rows = rows.repeat(math.ceil(layer.out_features / size), 1)
        rows = rows[: layer.out_features]
    layer.weight.copy_(rows)
    return with_variance(model, variance)


@torch.no_grad()
def whitened_patches(model, variance=2.84):
    """Let the patch embedding begin with mixtures of the whitened training patches."""
    layer = model.patch_embedding
    values, vectors = torch.linalg.eigh(patch_covariance(model.patch_size))
    rows = vectors.T / (values[:, None] + 0.01).sqrt()
    mixture = nn.init.orthogonal_(torch.empty(layer.out_features, layer.in_features))
    layer.weight.copy_(mixture @ rows)
    return with_variance(model, variance)


def with_variance(model, variance):
    """Scale the patch embedding to a variance of its features over photographs."""
    weight, covariance = model.patch_embedding.weight, patch_covariance(4)
    weight *= (variance * len(weight) / (weight @ covariance @ weight.T).trace()).sqrt()
    return model


@functools.cache
def patch_covariance(p, images=5_000):
    """Return the second moments of normalised training patches, (p p C, p p C)."""
    order = torch.randperm(50_000, generator=torch.Generator().manual_seed(0)).tolist()
    pixels = CIFAR10("data", train=True).data[order[HELD_OUT:][:images]]
    x = torch.stack([ours.VAL_TRANSFORM(image) for image in pixels])
    x = einops.rearrange(x, "B C (H p) (W q) -> (B H W) (p q C)", p=p, q=p)
    return x.T @ x / len(x)


@torch.no_grad()
def louder_layers(model, gain):
    """Begin with another gain of all layers between patches and head."""
    for weight in model.blocks.parameters():
        if weight.ndim == 2:
            weight.mul_(gain)
    return model


def random_class_token(model):
    """Begin with a class token of N(0, 0.02)."""
    nn.init.normal_(model.class_token, std=0.02)
    return model


@torch.no_grad()
def soft_queries(model):
    """Let every token attend to nearly all alike."""
    for block in model.blocks:
        block.attention.inner_module[1].q.weight.mul_(0.2)
    return model


def block_dropout(model):
    """Drop out also after the output projection of attention."""
    for block in model.blocks:
        layer = block.attention.inner_module[1]
        layer.out = nn.Sequential(layer.out, nn.Dropout(0.2))
    return model


class DropoutBefore(nn.Module):
    """A block with dropout of its input."""

    def __init__(self, block):
        super().__init__()
        self.dropout, self.block = nn.Dropout(0.2), block

    def forward(self, x):
        return self.block(self.dropout(x))


def paper_dropout(model):
    """Likewise, and after the positions: Dosovitskiy et al. (2021), Appendix B.1."""
    model = block_dropout(model)
    model.blocks[0] = DropoutBefore(model.blocks[0])
    return model


class PostNormBlock(nn.Module):
    """A block with the layer norms behind the residual connections: Vaswani et al."""

    def __init__(self, block):
        super().__init__()
        self.attention_norm, self.attention = block.attention.inner_module
        self.mlp_norm, self.mlp = block.feed_forward.inner_module

    def forward(self, x):
        x = self.attention_norm(x + self.attention(x))
        return self.mlp_norm(x + self.mlp(x))


def post_norm(model):
    """Layer norm behind each residual connection instead of in front of each layer."""
    model.blocks = nn.ModuleList(map(PostNormBlock, model.blocks))
    model.norm = nn.Identity()  # the last block normalises already
    return model


def no_positions(model):
    """No positional embedding, neither for patches nor for the class token."""
    nn.init.zeros_(model.position_embedding).requires_grad_(False)
    return model


XAVIER = "zero branches, MLP dropout"  # what the finals call the chosen one
FINALS = {
    "full branches, MLP dropout": lambda: full_branches(xavier_model()),
    XAVIER: xavier_model,
    "zero branches, block dropout": lambda: block_dropout(xavier_model()),
    "zero branches, paper dropout": lambda: paper_dropout(xavier_model()),
}
PATCHES = {
    "Xavier patches, gain 3": xavier_model,
    "cosine patches": lambda: cosine_patches(new_model()),
    "cosine patches, variance 1": lambda: cosine_patches(new_model(), 1),
    "cosine patches, variance 8": lambda: cosine_patches(new_model(), 8),
    "cosine patches, exponent 0.5": lambda: cosine_patches(new_model(), exponent=0.5),
    "cosine patches, exponent 1.5": lambda: cosine_patches(new_model(), exponent=1.5),
    "cosine patches, colours 1 2 3": lambda: cosine_patches(
        new_model(), colours=(1, 2, 3)
    ),
    "cosine patches, own rows": lambda: cosine_patches(new_model(), mixed=False),
    "whitened patches": lambda: whitened_patches(new_model()),
    "cosine patches, gain 0.7": lambda: louder_layers(cosine_patches(new_model()), 0.7),
    "cosine patches, gain 1.4": lambda: louder_layers(cosine_patches(new_model()), 1.4),
    "cosine patches, soft queries": lambda: soft_queries(cosine_patches(new_model())),
    "cosine patches, paper dropout": lambda: paper_dropout(cosine_patches(new_model())),
    "cosine patches, random class token": lambda: random_class_token(
        cosine_patches(new_model())
    ),
}
MAIN = "the model"
XAVIER_PATCHES = "Xavier patches"  # one seed: the first half of the final
ABLATIONS = {
    MAIN: new_model,
    XAVIER_PATCHES: xavier_model,
    "Xavier patches, no positions": lambda: no_positions(xavier_model()),
    "Xavier patches, one head": lambda: xavier_model(n_heads=1),
    "Xavier patches, patch 8": lambda: xavier_model(patch_size=8),
    "Xavier patches, no dropout": lambda: xavier_model(p_dropout=0.0),
    "Xavier patches, post-norm": lambda: post_norm(xavier_model()),
}
# Batch size and learning rate of the quick run
SETTINGS = {
    "batch 128, lr 6e-4": (128, 6e-4),
    "batch 64, lr 3e-4": (64, 3e-4),
    "batch 64, lr 6e-4": (64, 6e-4),
    "batch 32, lr 3e-4": (32, 3e-4),
    "batch 32, lr 2e-4": (32, 2e-4),
}
MODELS = {
    **FINALS,
    **ABLATIONS,
    **PATCHES,
    **dict.fromkeys(SETTINGS, xavier_model),
}


# --- Running -------------------------------------------------------------------------

TRIALS = [
    Trial("screen", "Xavier patches, gain 3", 1, 15_000),
    *(Trial("final", name, 40, 5_000, batch_size=128) for name in FINALS),
    *(Trial("settings", name, 4, 15_000, *SETTINGS[name]) for name in SETTINGS),
    *(Trial("patches", name, 1, 15_000) for name in PATCHES),
    *(Trial("ablation", name, 20, 5_000, batch_size=128) for name in ABLATIONS),
    *(
        Trial("ablation", name, 20, 5_000, 128, seed=seed)
        for name in (MAIN, XAVIER_PATCHES)
        for seed in SEEDS
    ),
]


def loaders(trial, cache_dir):
    """Return loaders of the trial's training images and of the held-out images."""
    order = torch.randperm(50_000, generator=torch.Generator().manual_seed(0)).tolist()
    augmented = CIFAR10(cache_dir, train=True, transform=ours.TRAIN_TRANSFORM)
    plain = CIFAR10(cache_dir, train=True, transform=ours.VAL_TRANSFORM)
    chosen = Subset(augmented, order[HELD_OUT:][: trial.images])
    options = {"shuffle": True, "drop_last": True, "num_workers": 2}
    train_loader = DataLoader(chosen, trial.batch_size, **options)
    return train_loader, DataLoader(Subset(plain, order[:HELD_OUT]), 500)


def run(trial, cache_dir, device):
    """Train and judge one trial, or continue it; return its record."""
    torch.manual_seed(trial.seed)
    model = MODELS[trial.name]().to(device)
    use_quick_dropout(model)
    training_run = Run(asdict(trial), RUNS / trial.stem)
    train_loader, held_out = loaders(trial, cache_dir)
    if training_run.is_finished:
        _, history = records.load_record(training_run.folder, asdict(trial), model)
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
        "machine": records.processor_name(),
        "threads": torch.get_num_threads(),
        "date": history["date"],
    }


def seed_path(seed):
    """Return the file of the quick run with a seed."""
    return FOLDER / f"seeds-{seed}.json"


def run_seed(seed, cache_dir, device):
    """Train, or continue, the quick run with another seed; return its record."""
    settings = records.PRESETS["quick"] | {"seed": seed}
    _, history = ours.train_run(settings, cache_dir, device)
    kept = ["val_accs", "val_accs_eval", "epoch_seconds", "machine", "versions", "date"]
    kept += ["format", "weights_sha256"]
    return {key: history[key] for key in [*settings, *kept]}


def store(path, record):
    """Write the record of a trial, and say what it reached."""
    records.write_whole(path, (json.dumps(record, indent=1) + "\n").encode())
    kind = "val_accs" if "val_accs" in record else "held_out_accs"
    print(
        f"{path.stem}: accuracy {record[kind][-1]:.4f} (recipe), "
        f"{record[f'{kind}_eval'][-1]:.4f} (eval), "
        f"{sum(record['epoch_seconds']):.0f} s",
        flush=True,
    )


def percent(*shares):
    """Return shares as they are printed."""
    return [f"{100 * share:.2f}" for share in shares]


def reached(runs):
    """Return what runs of a trial reached on the held-out images, as it is printed.

    Two accuracies in percent and the loss in nats: the mean over the runs and, since
    single epochs scatter, over the last five epochs if there are 20 or more.
    """
    number = 5 if runs[0]["epochs"] >= 20 else 1
    *accuracies, loss = (
        statistics.mean(statistics.mean(run[kind][-number:]) for run in runs)
        for kind in ("held_out_accs", "held_out_accs_eval", "held_out_losses")
    )
    return [*percent(*accuracies), f"{loss:.3f}"]


def tables():
    """Return the tables in ``runs`` by name, each a list of rows, its header first.

    The trials; the ablations, each with its mean over the seeds; and the quick runs,
    judged by the test images, with mean and spread.
    """
    found = [json.loads(p.read_text("utf-8")) for p in sorted(FOLDER.glob("*.json"))]
    short = [record for record in found if "held_out_accs" in record]
    trials = [[*(r[key] for key in SETTINGS_SHOWN), *reached([r])] for r in short]
    models = collections.defaultdict(list)
    for record in short:
        if record["group"] == "ablation":
            models[record["name"]].append(record)
    quick = [records.read_history(ROOT / records.QUICK_RECORD)]
    quick += [record for record in found if "val_accs" in record]
    seeds, ends = [], []
    for run in quick:
        ends.append([run["val_accs"][-1], run["val_accs_eval"][-1]])
        first = records.first_epoch_at(run["val_accs"], 0.7)
        seeds.append([run["seed"], *percent(*ends[-1]), first or "never"])
    spread = {"mean": statistics.mean, "standard deviation": statistics.stdev}
    for name, of in spread.items() if len(ends) > 1 else ():
        seeds.append([name, *percent(*map(of, zip(*ends, strict=True))), ""])
    means = [[name, len(runs), *reached(runs)] for name, runs in models.items()]
    shown = ["recipe / %", "`eval()` / %", "loss / nats"]
    return {
        "trials": [
            [*SETTINGS_SHOWN, *shown],
            *sorted(trials, key=lambda row: (row[0], -float(row[-3]))),
        ],
        "ablations": [
            ["model", "seeds", *shown],
            *sorted(means, key=lambda row: -float(row[-3])),
        ],
        "seeds": [["seed", *shown[:2], "70 % in epoch"], *seeds],
    }


def as_csv(rows):
    """Return rows as the text of a file."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def main():
    groups = [*dict.fromkeys(trial.group for trial in TRIALS), "seeds"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "groups",
        nargs="*",
        help=f"which to run, of {', '.join(groups)}; the tables are made in any case",
    )
    parser.add_argument("--cache-dir", default="data")
    arguments = parser.parse_args()
    unknown = set(arguments.groups) - set(groups)
    if unknown:
        parser.error(f"no such group: {', '.join(unknown)}")
    device = choose_device()
    try:
        if arguments.groups:
            fetch(CIFAR10, arguments.cache_dir)
        for trial in TRIALS:
            if trial.group in arguments.groups and not trial.path.exists():
                store(trial.path, run(trial, arguments.cache_dir, device))
        for seed in SEEDS if "seeds" in arguments.groups else ():
            if not seed_path(seed).exists():
                store(seed_path(seed), run_seed(seed, arguments.cache_dir, device))
        for name, rows in tables().items():
            path = ROOT / records.RUNS / f"{name}.csv"
            records.write_whole(path, as_csv(rows).encode())
    except records.UserError as error:
        return f"error: {error}"
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
