"""Training runs for choices, ablations and seeds: `python bench/trials.py`.

Choices and ablations never look at the test images: 5,000 of the 50,000 training images
are held out, and every trial is judged by its accuracy on them. What a trial trains on
is in its file: ``images`` of the other 45,000 training images, for ``epochs`` passes.
The seeds, asked for by name because they take hours, are whole quick runs by the
recipe, validated as it does.

A finished trial is a file in ``bench/trials``; a trial with a file is not run again, so
an interrupted series goes on.
"""

import argparse
import datetime
import hashlib
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
from training import (  # noqa: E402
    QUICK,
    Run,
    TrainingError,
    fetch,
    processor_name,
    write_whole,
)

FOLDER = ROOT / "bench" / "trials"
ABLATION_FIGURE = ROOT / "bench" / "ablation.svg"
HELD_OUT = 5_000
SEEDS = (1, 2)  # beside 0, that of the run in report/quick


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


def pytorch():
    """All linear layers as PyTorch initialises them."""
    model = default()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    return model


@torch.no_grad()
def loud_patches():
    """PyTorch's initialisation, with a patch embedding that positions do not drown."""
    model = pytorch()
    model.patch_embedding.weight.mul_(ours.PATCH_GAIN)
    return model


@torch.no_grad()
def xavier():
    """Xavier-uniform weights, the patch embedding no louder than the rest."""
    model = default()
    model.patch_embedding.weight.div_(ours.PATCH_GAIN)
    return model


@torch.no_grad()
def mimetic():
    """PyTorch's initialisation, but attention begins as trained attention looks.

    Trockman and Kolter (2023), "Mimetic Initialization of Self-Attention Layers":
    per head W_Q W_K^T is near 0.7 Z + 0.7 I, and W_V W_O near 0.4 Z - 0.4 I.
    """
    model = pytorch()
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


def no_positions():
    """No positional embedding, neither for patches nor for the class token."""
    model = default()
    for position in (model.position_embedding, model.class_position):
        nn.init.zeros_(position)
        position.requires_grad_(False)
    return model


def one_head():
    return ours.VisionTransformer(n_heads=1)


def patch_2():
    return ours.VisionTransformer(patch_size=2)


def patch_8():
    return ours.VisionTransformer(patch_size=8)


def no_dropout():
    return ours.VisionTransformer(p_dropout=0.0)


class PostNorm(nn.Module):
    """A residual connection with the layer norm behind it, as in Vaswani et al."""

    def __init__(self, residual):
        super().__init__()
        self.norm, self.inner_module = residual.inner_module

    def forward(self, x):
        return self.norm(x + self.inner_module(x))


class PostNormViT(ours.VisionTransformer):
    """Layer norm behind each residual connection instead of in front of each layer."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(PostNorm(block.attention), PostNorm(block.feed_forward))
                for block in self.blocks
            )
        )
        self.norm = nn.Identity()  # the last block normalises already

    def forward(self, x):
        class_token = (self.class_token + self.class_position).expand(len(x), -1, -1)
        x = self.blocks(torch.cat([class_token, self.patchify(x)], dim=1))
        return self.head(x[:, 0])


def post_norm():
    return PostNormViT()


# --- Running -------------------------------------------------------------------------

SHORT = {"batch_size": 64, "epochs": 2, "images": 15_000}
ABLATIONS = "no_positions one_head patch_8 no_dropout post_norm patch_2"
TRIALS = [
    Trial("init", "pytorch", make="pytorch", **SHORT),
    Trial("init", "mimetic", make="mimetic", **SHORT),
    Trial("init", "loud patches", make="loud_patches", **SHORT),
    Trial("init", "xavier", make="xavier", **SHORT),
    Trial("init", "xavier, loud patches", make="default", **SHORT),
    Trial("settings", "batch 32, lr 3e-4", **{**SHORT, "batch_size": 32}),
    *(
        Trial("ablation", make.replace("_", " "), make=make, **SHORT)
        for make in ABLATIONS.split()
    ),
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


def seed_path(seed):
    """Return the file of the quick run with a seed."""
    return FOLDER / f"seeds-{seed}.json"


def run_seed(seed, cache_dir, device):
    """Train, or continue, the quick run with another seed; return its record."""
    torch.manual_seed(seed)
    model = default().to(device)
    run = Run(**{**QUICK, "seed": seed}, device=device)
    history = run.load_record(model) or ours.train(
        model, run, cache_dir, QUICK["batch_size"], QUICK["lr"], device
    )
    kept = [*QUICK, "val_accs", "val_accs_eval", "epoch_seconds", "machine", "versions"]
    return {key: history[key] for key in [*kept, "date", "weights_sha256"]}


def plot_ablations(records):
    """Draw the held-out accuracies of the ablations, the best by the recipe on top.

    Args:
        records: the records of the trials of this group, and of the model as it is
            handed in.

    Returns:
        The matplotlib figure.
    """
    import matplotlib.pyplot as plt

    plt.rcParams["font.size"] = 9  # as the captions of the report
    records = sorted(records, key=lambda record: record["held_out_accs"][-1])
    names = [
        "as handed in" if record["make"] == "default" else record["name"]
        for record in records
    ]
    rows = range(len(records))
    figure, ax = plt.subplots(
        figsize=(6.4, 0.75 + 0.24 * len(records)), layout="constrained"
    )
    # A ring, so that neither hides the other where both are the same
    ring = {"fillstyle": "none", "markersize": 10, "markeredgewidth": 2}
    for key, label, marker, style in (
        ("held_out_accs_eval", "model.eval()", "s", {"color": "#E69F00"}),
        ("held_out_accs", "recipe (dropout active)", "o", {"color": "#0072B2", **ring}),
    ):
        percent = [100 * record[key][-1] for record in records]
        ax.plot(percent, rows, marker, label=label, **style)
    ax.set_yticks(rows, names)
    ax.set(xlabel="held-out accuracy / %", ylabel="variant")
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right")
    return figure


def draw():
    """Renew the figure of the ablations from the records, if there are any.

    It names the records that it shows by a checksum, in its description.
    """
    import io

    import matplotlib

    done = [trial for trial in TRIALS if trial.path.exists()]
    ablations = [trial.path for trial in done if trial.group == "ablation"]
    if not ablations:
        return
    handed_in = [t.path for t in done if (t.group, t.make) == ("init", "default")]
    contents = [path.read_bytes() for path in [*handed_in, *ablations]]
    matplotlib.rcParams["svg.hashsalt"] = "ablation"  # the same bytes each time
    figure = plot_ablations([json.loads(content) for content in contents])
    buffer = io.BytesIO()
    checksum = hashlib.sha256(b"".join(contents)).hexdigest()
    figure.savefig(
        buffer, format="svg", metadata={"Date": None, "Description": checksum}
    )
    write_whole(ABLATION_FIGURE, buffer.getvalue())


def store(path, record):
    """Write the record of a trial, and say what it reached."""
    write_whole(path, (json.dumps(record, indent=1) + "\n").encode())
    kind = "val_accs" if "val_accs" in record else "held_out_accs"
    print(
        f"{path.stem}: accuracy {record[kind][-1]:.4f} (recipe), "
        f"{record[kind + '_eval'][-1]:.4f} (eval), "
        f"{sum(record['epoch_seconds']):.0f} s",
        flush=True,
    )


def main():
    groups = [*dict.fromkeys(trial.group for trial in TRIALS), "seeds"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "groups",
        nargs="*",
        default=groups[:-1],
        help=f"only trials of these groups: {', '.join(groups)}; seeds take hours and "
        "are run only when asked for",
    )
    parser.add_argument("--cache-dir", default="data")
    arguments = parser.parse_args()
    unknown = set(arguments.groups) - set(groups)
    if unknown:
        parser.error(f"no such group: {', '.join(unknown)}")
    device = ours.choose_device()
    try:
        fetch(CIFAR10, arguments.cache_dir)
        for trial in TRIALS:
            if trial.group in arguments.groups and not trial.path.exists():
                store(trial.path, run(trial, arguments.cache_dir, device))
                draw()
        for seed in SEEDS if "seeds" in arguments.groups else ():
            path = seed_path(seed)
            if not path.exists():
                store(path, run_seed(seed, arguments.cache_dir, device))
    except TrainingError as error:
        return f"error: {error}"
    except KeyboardInterrupt:
        print("Interrupted; the same command continues.")
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
