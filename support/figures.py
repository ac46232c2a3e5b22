"""Everything that is measured or drawn for the notebooks, in one style.

A ``plot_...`` function returns a figure. Where the model or its predictions are missing
(None), it says so in one line instead.
"""

import csv
import functools
import json
import math
import statistics
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from einops import rearrange
from IPython.display import Markdown
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from attention import SelfAttention2d
from support.records import FORMER, TRIALS_TABLE, describe, first_epoch_at
from vision_transformer import VAL_TRANSFORM, VisionTransformer, predict

BLUE, ORANGE, SKY, YELLOW, GREY = "#0072B2", "#D55E00", "#56B4E9", "#E69F00", "0.45"
WIDTH = 6.4  # inches, of the text in the report
plt.rcParams["font.size"] = 9  # as the captions of the report
plt.rcParams["figure.dpi"] = 300  # of heat maps and photographs, without smoothing
plt.rcParams["image.interpolation"] = "nearest"
plt.rcParams["svg.hashsalt"] = "figures"  # else the ids in an SVG are random


def needs_results(function):
    """Let a function print what is missing where an argument is None."""

    @functools.wraps(function)
    def wrapper(*arguments):
        if any(argument is None for argument in arguments):
            what = function.__name__.partition("_")[2].replace("_", " ")
            print(f"Not shown ({what}): it needs the recorded weights and CIFAR-10.")
            return None
        return function(*arguments)

    return wrapper


def _panels(height, rows=1, columns=2, **options):
    return plt.subplots(
        rows, columns, figsize=(WIDTH, height), layout="constrained", **options
    )


# --- Task 1: scaling, maps, cost --------------------------------------


def measure_scaling(head_dims, num_tokens=64, num_queries=4096):
    """Measure what the division by sqrt(d_k) does to logits and attention weights.

    Returns a dict with the keys True (divided) and False; each holds two lists, one
    entry per size: standard deviation of the logits, and mean entropy of a row of
    attention weights, in nats.
    """
    generator = torch.Generator().manual_seed(0)
    measured = {True: ([], []), False: ([], [])}
    for head_dim in head_dims:
        q = torch.randn(num_queries, head_dim, generator=generator)
        k = torch.randn(num_tokens, head_dim, generator=generator)
        for scaled, (deviations, entropies) in measured.items():
            logits = q @ k.T / (math.sqrt(head_dim) if scaled else 1)
            log_weights = logits.log_softmax(dim=-1)
            entropy = -(log_weights.exp() * log_weights).sum(dim=-1)
            deviations.append(logits.std().item())
            entropies.append(entropy.mean().item())
    return measured


def plot_scaling(head_dims, num_tokens=64):
    """Plot ``measure_scaling``."""
    measured = measure_scaling(head_dims, num_tokens)
    figure, axes = _panels(2.4)
    curves = [
        (True, r"divided by $\sqrt{d_k}$", "o-", BLUE),
        (False, "not divided", "s--", ORANGE),
    ]
    for scaled, label, style, color in curves:
        for ax, values in zip(axes, measured[scaled], strict=True):
            ax.plot(head_dims, values, style, color=color, label=label)
    law = [math.sqrt(head_dim) for head_dim in head_dims]
    axes[0].plot(head_dims, law, ":", color=GREY, label=r"law $\sqrt{d_k}$")
    axes[0].set(yscale="log", ylabel="standard deviation of the logits")
    even = math.log(num_tokens)
    axes[1].axhline(even, linestyle=":", color=GREY, label=r"even, $\ln L$")
    axes[1].set(ylabel="entropy of a row / nats", ylim=(0, 1.15 * even))
    for ax in axes:
        ax.set(xscale="log", xlabel="size of a head $d_k$")
        ax.set_xticks(head_dims, [str(head_dim) for head_dim in head_dims])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend()
    return figure


def structured_grid(side=16, embed_dim=256):
    """Return a grid of tokens (1, D, side, side), and the region (side, side) of each.

    Regions are 0 for the background, 1 for a disc and 2 for a bar; the tokens of a
    region share one random direction.
    """
    generator = torch.Generator().manual_seed(0)
    row, column = torch.meshgrid(
        torch.arange(side) / side, torch.arange(side) / side, indexing="ij"
    )
    regions = torch.zeros(side, side, dtype=torch.long)
    regions[(row - 0.3) ** 2 + (column - 0.3) ** 2 < 0.05] = 1
    regions[(row > 0.65) & (row < 0.85) & (column > 0.2)] = 2
    directions = torch.randn(3, embed_dim, generator=generator)
    noise = 0.3 * torch.randn(side, side, embed_dim, generator=generator)
    return rearrange(directions[regions] + noise, "H W D -> 1 D H W"), regions


@torch.no_grad()
def content_attention():
    """Return regions (H, W) and the attention weights (h, L, L) of tokens in them.

    The layer compares content: its key projection is a copy of the query projection.
    """
    torch.manual_seed(0)
    layer = SelfAttention2d()
    layer.q.weight.mul_(2)  # sharper: the logits grow by a factor of four
    layer.k.weight.copy_(layer.q.weight)
    tokens, regions = structured_grid()
    sequence = rearrange(tokens, "1 D H W -> 1 (H W) D")
    return regions, layer.attention_weights(sequence)[0]


def plot_attention_maps(queries, heads):
    """Draw where the tokens at (row, column) look in ``content_attention``, by head."""
    regions, weights = content_attention()
    height, width = regions.shape
    maps = rearrange(weights.numpy(), "h (H W) (I J) -> h H W I J", H=height, I=height)
    size = len(queries), len(heads) + 1
    figure, axes = _panels(1.4 * len(queries), *size, squeeze=False)
    vmax = max(maps[head, i, j].max() for head in heads for i, j in queries).item()
    for axes_row, (i, j) in zip(axes, queries, strict=True):
        axes_row[0].imshow(regions.numpy(), cmap="Greys", vmax=3)
        axes_row[0].set_title("input regions", fontsize="medium")
        axes_row[0].set_ylabel("token row")
        for ax, head in zip(axes_row[1:], heads, strict=True):
            drawn = ax.imshow(maps[head, i, j], cmap="viridis", vmin=0, vmax=vmax)
            ax.set_title(f"head {head + 1}", fontsize="medium")
        for ax in axes_row:
            ax.plot(j, i, "x", color=ORANGE, markersize=8, markeredgewidth=2)
            ax.set(xticks=[0, width - 1], yticks=[0, height - 1])
    for ax in axes[-1]:
        ax.set_xlabel("token column")
    figure.colorbar(drawn, ax=axes, label="attention weight", shrink=0.8)
    return figure


def saved_for_backward(layer, x):
    """Return the bytes that ``layer(x)`` keeps for its backward pass.

    Parameters and the input are not counted; a tensor kept twice counts once.
    """
    free = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    free.add(x.untyped_storage().data_ptr())
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # The result keeps the graph, and so every saved tensor, alive until counted
        result = layer(x)
        total = sum(size for where, size in kept.items() if where not in free)
        del result
    return total


def count_operations(layer, x):
    """Return the operations of a layer's projections, and of its other products."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    counts = {str(name): n for name, n in counter.get_flop_counts()["Global"].items()}
    projections = sum(n for name, n in counts.items() if "bmm" not in name)
    return projections, counter.get_total_flops() - projections


@torch.no_grad()
def fastest_pass(layer, x, seconds=0.3):
    """Return the seconds of the fastest of some passes: disturbance only adds time.

    On one core, since several wait for each other, longest on a busy machine.
    """
    # Not by torch.utils.benchmark: its import may print a warning about CUDA
    times, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    while len(times) < 5 or sum(times) < seconds:
        start = time.perf_counter()
        layer(x)
        times.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return min(times)


def plot_cost(sides):
    """Print and plot what ``SelfAttention2d`` costs on square grids, one at a time."""
    torch.manual_seed(0)
    layer = SelfAttention2d()
    rows = []
    for side in sides:
        x = torch.randn(1, layer.embed_dim, side, side)
        costs = saved_for_backward(layer, x), fastest_pass(layer, x)
        rows.append((side * side, *count_operations(layer, x), *costs))
    for n, projections, products, kept, seconds in rows:
        print(
            f"{n:5d} tokens: {projections / 1e6:5.0f} + {products / 1e6:5.0f} million "
            "operations (projections + products), "
            f"{kept / 2**20:6.1f} MiB kept, {1e3 * seconds:6.1f} ms"
        )
    tokens, projections, products, kept, seconds = zip(*rows, strict=True)
    figure, axes = _panels(2.2, columns=3)
    series = [
        (0, projections, 1e6, "o-", BLUE, "projections"),
        (0, products, 1e6, "s--", ORANGE, "products"),
        (1, kept, 2**20, "o-", BLUE, None),
        (2, seconds, 1e-3, "o-", BLUE, None),
    ]
    for panel, values, unit, style, color, label in series:
        scaled = [value / unit for value in values]
        axes[panel].loglog(tokens, scaled, style, color=color, label=label)
    crossing = 2 * layer.embed_dim
    axes[0].axvline(crossing, color=GREY, linestyle=":", label="$L = 2D$")
    axes[0].legend()
    for ax, what in zip(
        axes, ("operations / million", "memory / MiB", "time / ms"), strict=True
    ):
        ax.set(xlabel="tokens $L$", ylabel=what)
        ax.set_xticks(tokens[:-1], [str(n) for n in tokens[:-1]])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    return figure


# --- Task 2: the model ------------------------------------------------


def architecture(model):
    """Return the stages of a model as pairs of texts: what it does, and its shape."""
    p, size, channels = model.patch_size, model.image_size, model.in_channels
    side, patches, dim = size // p, model.num_patches, model.head.in_features
    heads = model.blocks[0].attention.inner_module[1].num_heads
    mlp = model.blocks[0].feed_forward.inner_module[1].layers[0].out_features
    return [
        ("image", f"(B, {channels}, {size}, {size})"),
        (
            f"{side} x {side} patches of {p} x {p} pixels,\nrow by row",
            f"(B, {patches}, {p * p * channels})",
        ),
        ("linear projection + positions", f"(B, {patches}, {dim})"),
        ("class token in front", f"(B, {1 + patches}, {dim})"),
        (
            f"{len(model.blocks)} encoder blocks, each self-attention\n"
            f"({heads} heads) and MLP ({mlp} hidden features)",
            f"(B, {1 + patches}, {dim})",
        ),
        ("layer norm of the class token", f"(B, {dim})"),
        ("linear head: logits", f"(B, {model.head.out_features})"),
    ]


def plot_architecture(model):
    """Draw the stages of a model with the tensor shapes, and one block in detail."""
    figure, ax = _panels(3.7, 1, 1)
    ax.set(xlim=(0, 10.6), ylim=(0, 7.1))
    ax.axis("off")

    def box(x, y, width, text, color="white", height=0.66):
        style = "round,pad=0.02,rounding_size=0.08"
        ax.add_patch(
            FancyBboxPatch((x, y), width, height, boxstyle=style, fc=color, ec="0.2")
        )
        ax.text(x + width / 2, y + height / 2, text, ha="center", va="center")

    def arrow(start, end):
        ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9))

    for number, (text, shape) in enumerate(architecture(model)):
        y = 6.35 - number
        box(0.1, y, 4.6, text, "#DCEBF7" if "encoder" in text else "white")
        ax.text(4.85, y + 0.33, shape, va="center", family="monospace")
        if number:
            arrow((2.4, y + 1), (2.4, y + 0.68))

    ax.text(8.9, 6.6, "one encoder block", ha="center", weight="bold")
    parts = {5.4: "layer norm", 4.4: "self-attention", 3.5: "+"}
    parts |= {2.5: "layer norm", 1.5: "MLP", 0.6: "+"}
    circle = {"boxstyle": "circle,pad=0.15", "fc": "white", "ec": "0.2"}
    top = 6.45
    for y, part in parts.items():
        if part == "+":
            ax.text(8.9, y + 0.2, "+", ha="center", va="center", bbox=circle)
            arrow((8.9, top), (8.9, y + 0.42))
        else:
            color = "white" if part == "layer norm" else "#DCEBF7"
            box(7.8, y, 2.2, part, color, 0.56)
            arrow((8.9, top), (8.9, y + 0.58))
        top = y - 0.02
    arrow((8.9, top), (8.9, 0.1))
    for top, bottom in ((6.2, 3.7), (3.3, 0.8)):  # the residual connections
        ax.plot([8.9, 10.4, 10.4], [top, top, bottom], color="black", linewidth=1)
        arrow((10.4, bottom), (9.12, bottom))
    return figure


def print_costs(model):
    """Print the parameters of a model and of some parts, and what operations they cost.

    Operations are those of the matrix products for one image; a multiplication and an
    addition count as two.
    """
    size, device = model.image_size, model.head.weight.device
    image = torch.zeros(1, model.in_channels, size, size, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a new torch would find the modules itself
        counter = FlopCounterMode(model, display=False)
    with torch.no_grad(), counter:
        model(image)
    print(f"{'part':<18}{'parameters':>12}{'operations per image':>24}")
    for name in ("patch_embedding", "blocks.0", "head", ""):
        parameters = sum(p.numel() for p in model.get_submodule(name).parameters())
        path = ".".join(filter(None, (type(model).__name__, name)))
        millions = sum(counter.get_flop_counts()[path].values()) / 1e6
        print(f"{name or 'all':<18}{parameters:>12,}{millions:>16.2f} million")


def plot_patches(dataset, cache_dir, patch_size):
    """Draw a test image, cut into its patches, and as the sequence they become."""
    try:
        pixels = dataset(cache_dir, train=False).data[1]
    except RuntimeError:  # torchvision's word for missing or damaged files
        print(f"Not shown (patches): there is no CIFAR-10 in {cache_dir}.")
        return None
    patches = rearrange(
        pixels / 255, "(H p) (W q) C -> H W p q C", p=patch_size, q=patch_size
    )
    figure = plt.figure(figsize=(WIDTH, 2.7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.4, 1])
    left, right = top.subplots(1, 2)
    left.imshow(pixels)
    left.set(xlabel="pixel column", ylabel="pixel row")
    draw_tiles(right, patches, fill=1.0)
    right.set(xlabel="patch column", ylabel="patch row")
    ax = bottom.subplots()
    middle = len(patches) // 2 - 1  # what the first rows show is sky
    shown = patches[middle : middle + 2].reshape(1, -1, *patches.shape[2:])
    draw_tiles(ax, shown, fill=1.0)
    first = middle * patches.shape[1]
    ax.set_xticks(ax.get_xticks(), range(first, first + shown.shape[1]))
    ax.set(xlabel="token", yticks=[])
    return figure


def draw_tiles(ax, tiles, fill=np.nan, **options):
    """Draw small pictures (rows, columns, height, width, ...) apart, as one image."""
    rows, columns, height, width = tiles.shape[:4]
    size = rows * (height + 1) - 1, columns * (width + 1) - 1
    sheet = np.full((*size, *tiles.shape[4:]), fill)
    for i, j in np.ndindex(rows, columns):
        y, x = i * (height + 1), j * (width + 1)
        sheet[y : y + height, x : x + width] = tiles[i, j]
    ax.set_xticks(np.arange(columns) * (width + 1) + (width - 1) / 2, range(columns))
    ax.set_yticks(np.arange(rows) * (height + 1) + (height - 1) / 2, range(rows))
    return ax.imshow(sheet, **options)


# --- Task 2: the training ---------------------------------------------


def plot_training(history):
    """Plot training loss against steps, and validation accuracy against epochs."""
    losses, n_epochs = history["train_losses"], len(history["val_accs"])
    window = len(losses) // n_epochs
    figure, (left, right) = _panels(2.6)
    left.plot(losses, color=SKY, linewidth=0.5, label="one step", rasterized=True)
    ends = window * np.arange(1, n_epochs + 1)
    mean = np.reshape(losses, (n_epochs, window)).mean(axis=1)
    middles = ends - window / 2
    left.plot(middles, mean, ".-", color=BLUE, label="mean of an epoch")
    left.plot(ends, history["val_losses_eval"], ".--", color=YELLOW, label="validation")
    left.set(xlabel="training step", ylabel="cross-entropy / nats", ylim=(0, None))

    epochs, accuracies = range(1, n_epochs + 1), history["val_accs"]
    for key, label, style, color in (
        ("val_accs_eval", "model.eval()", "s--", YELLOW),
        ("val_accs", "recipe", "o-", BLUE),
    ):
        percent = [100 * accuracy for accuracy in history[key]]
        right.plot(epochs, percent, style, color=color, markersize=2.5, label=label)
    lowest = 45 if min(accuracies) > 0.45 else 0
    for mark in (25, 50, 70):
        first = first_epoch_at(accuracies, mark / 100)
        if mark > lowest:
            right.axhline(mark, color=GREY, linewidth=0.8, linestyle=":")
        if mark > lowest and first:
            accuracy = 100 * accuracies[first - 1]
            right.plot(first, accuracy, "o", color=ORANGE, fillstyle="none")
    right.set(xlabel="epoch", ylabel="validation accuracy / %", ylim=(lowest, None))
    right.xaxis.get_major_locator().set_params(integer=True)
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend()
    return figure


def plot_before_and_after(history, before=FORMER):
    """Plot a run against that of an earlier version, read from its history."""
    if not Path(before).is_file():
        print(f"Not shown (before and after): {before} is not here.")
        return None
    former = json.loads(Path(before).read_text(encoding="utf-8"))
    if describe(former) != describe(history):
        print(f"Not shown (before and after): the earlier run is {describe(former)}.")
        return None
    figure, (left, right) = _panels(1.9)
    for run, name, color in ((former, "before", GREY), (history, "after", BLUE)):
        n_epochs = len(run["val_accs"])
        epochs = np.arange(1, n_epochs + 1)
        losses = np.reshape(run["train_losses"], (n_epochs, -1)).mean(axis=1)
        left.plot(epochs, losses, color=color, label=name)
        for key, style, how in (
            ("val_accs_eval", "--", "model.eval()"),
            ("val_accs", "-", "recipe"),
        ):
            percent = [100 * accuracy for accuracy in run[key]]
            right.plot(epochs, percent, style, color=color, label=f"{name}, {how}")
    left.set(xlabel="epoch", ylabel="training cross-entropy / nats", ylim=(0, None))
    right.set(xlabel="epoch", ylabel="validation accuracy / %")
    for ax in (left, right):
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        ax.legend()
    return figure


# --- Task 2: predictions ----------------------------------------------


class Predictions(NamedTuple):
    """What a model says of the N test images."""

    pixels: Any  # (N, 32, 32, 3), uint8
    labels: torch.Tensor  # (N,)
    logits: torch.Tensor  # (N, num_classes)
    classes: list  # their names


def predict_test_images(dataset, cache_dir, model, device):
    """Return ``Predictions``; without data or weights (no model) None, and say so."""
    if model is None:
        print("The test images are not classified: the recorded weights are not here.")
        return None
    try:
        val_set = dataset(cache_dir, train=False, transform=VAL_TRANSFORM)
    except RuntimeError:  # torchvision's word for missing or damaged files
        print(f"The test images are not classified: no CIFAR-10 in {cache_dir}.")
        return None
    except OSError as error:  # files of another user
        print(f"The test images are not classified: {error}.")
        return None
    logits, labels = predict(model, DataLoader(val_set, batch_size=100), device)
    return Predictions(val_set.data, labels, logits, val_set.classes)


def verify(history, predictions):
    """Print right answers beside those recorded; return whether they agree.

    They may differ by 5 in number, which another device's rounding can do.
    """
    hits = int((predictions.logits.argmax(dim=-1) == predictions.labels).sum())
    total = len(predictions.labels)
    recorded = round(history["val_accs_eval"][-1] * total)
    agrees = abs(hits - recorded) <= 5
    print(f"{hits} of {total} test images right, {100 * hits / total:.2f} %")
    print(f"recorded: {recorded}; the record is {'' if agrees else 'NOT '}confirmed")
    return agrees


def confusion(logits, labels):
    """Count the predictions: (num_classes, num_classes), true class by row."""
    classes = logits.shape[1]
    pairs = labels * classes + logits.argmax(dim=-1)
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)


@needs_results
def plot_confusion(predictions):
    """Draw the confusion matrix, in percent of the images of each true class."""
    matrix = confusion(predictions.logits, predictions.labels).double()
    percent = (100 * matrix / matrix.sum(dim=1, keepdim=True)).numpy()
    classes = predictions.classes
    figure, ax = _panels(2.8, 1, 1)
    drawn = ax.imshow(percent, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for i, row in enumerate(percent):
        for j, value in enumerate(row):
            color = "white" if value > 55 else "black"
            ax.text(j, i, f"{value:.0f}", ha="center", va="center", color=color)
    ax.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    ax.set_yticks(range(len(classes)), classes)
    ax.set(xlabel="predicted class", ylabel="true class")
    figure.colorbar(drawn, ax=ax, label="share of the true class / %")
    return figure


def calibration(logits, labels, bins=10):
    """Compare the confidence of predictions with how often they are right.

    Guo et al. (2017), Section 2. Returns arrays (bins,) of mean confidence, accuracy
    and share of the images, nan where a bin is empty, and the expected calibration
    error.
    """
    confidence, predicted = logits.softmax(dim=-1).max(dim=-1)
    right = (predicted == labels).double()
    where = (confidence * bins).long().clamp(max=bins - 1)
    counts = torch.bincount(where, minlength=bins).double()
    mean = torch.bincount(where, confidence.double(), minlength=bins) / counts
    accuracy = torch.bincount(where, right, minlength=bins) / counts
    gap = (mean - accuracy).abs().nan_to_num() * counts / len(labels)
    share = counts / len(labels)
    return mean.numpy(), accuracy.numpy(), share.numpy(), gap.sum().item()


@needs_results
def plot_calibration(predictions):
    """Draw the reliability diagram and how confident the predictions are."""
    labels = predictions.labels
    mean, accuracy, share, error = calibration(predictions.logits, labels)
    enough = share * len(labels) >= 10  # of fewer images, a share right means nothing
    figure, axes = _panels(1.9)
    axes[0].plot([0, 100], [0, 100], ":", color=GREY, label="perfectly calibrated")
    percent = 100 * mean[enough], 100 * accuracy[enough]
    axes[0].plot(*percent, "o-", color=BLUE, label="model")
    axes[0].set(xlabel="confidence / %", ylabel="right predictions / %")
    axes[0].set(xlim=(0, 102), ylim=(0, 102))
    axes[0].set_title(f"expected calibration error {100 * error:.1f} %", size="medium")
    axes[0].legend()
    centres = 100 * (np.arange(len(share)) + 0.5) / len(share)
    axes[1].bar(centres, 100 * share, 90 / len(share), color=SKY, edgecolor=BLUE)
    axes[1].set(xlabel="confidence / %", ylabel="images / %", xlim=(0, 102))
    for ax in axes:
        ax.grid(alpha=0.3)
    return figure


@needs_results
def plot_predictions(predictions):
    """Draw confident, unsure and confidently wrong predictions."""
    pixels, labels, logits, classes = predictions
    # In double precision, since many round to 100 % in single
    confidence, predicted = logits.double().softmax(dim=-1).max(dim=-1)
    right = predicted == labels
    order = confidence.argsort(descending=True)
    columns = 6
    rows = {
        "most confident": order[right[order]][:columns],
        "least confident": order.flip(0)[:columns],
        "confident, wrong": order[~right[order]][:columns],
    }
    figure, axes = _panels(3.5, 3, columns)
    figure.get_layout_engine().set(hspace=0.06)  # a row's labels apart from the next's
    for axes_row, (name, chosen) in zip(axes, rows.items(), strict=True):
        axes_row[0].set_ylabel(name)
        for ax in axes_row:
            ax.set(xticks=[], yticks=[])
        for ax, index in zip(axes_row, chosen.tolist(), strict=False):
            ax.imshow(pixels[index])
            ax.set_title(
                f"{classes[predicted[index]]}\n{100 * confidence[index]:.0f} %",
                size="medium",
                color="black" if right[index] else ORANGE,
            )
            ax.set_xlabel(f"is {classes[labels[index]]}")
    return figure


@needs_results
def show_confident(predictions, least=(0.5, 0.9, 0.99, 0.999)):
    """Show how many of the predictions of at least some confidence are correct."""
    confidence, predicted = predictions.logits.double().softmax(dim=-1).max(dim=-1)
    correct = (predicted == predictions.labels).double()
    rows = [
        [f"{mark:g}", *(f"{100 * part.mean():.1f}" for part in (chosen.double(), hits))]
        for mark in least
        for chosen in [confidence >= mark]
        for hits in [correct[chosen]]
    ]
    return _table(["confidence", "images / %", "correct / %"], rows)


# --- Task 2: trials ---------------------------------------------------


def _table(header, rows):
    """Return a table for a notebook."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return Markdown("\n".join(f"| {' | '.join(map(str, line))} |" for line in lines))


def _mean(rows, name, digits=2):
    return f"{statistics.mean(float(row[name]) for row in rows):.{digits}f}"


def show_trials(path=TRIALS_TABLE, chosen="zero branches, MLP dropout"):
    """Show finals and ablations, the best first; those of several seeds by the mean."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file))
    rows = []
    for group in ("final", "ablation"):
        names = dict.fromkeys(r["name"] for r in records if r["group"] == group)
        for name in names:
            same = [r for r in records if (r["group"], r["name"]) == (group, name)]
            values = [
                _mean(same, "recipe"),
                _mean(same, "eval"),
                _mean(same, "loss", 3),
            ]
            shown = f"**{name}**" if name == chosen else name
            rows.append([shown, same[0]["epochs"], len(same), *values])
    header = ["model", "epochs", "seeds", "recipe / %", "`eval()` / %", "loss / nats"]
    return _table(header, sorted(rows, key=lambda row: (-int(row[1]), -float(row[3]))))


def show_seeds(path=TRIALS_TABLE):
    """Show the quick runs, which differ in the seed, with their mean and spread."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        runs = [row for row in csv.DictReader(file) if row["group"] == "quick"]
    runs.sort(key=lambda row: int(row["seed"]))
    rows = [[r["seed"], r["recipe"], r["eval"], r["epoch_at_70"]] for r in runs]
    spread = (
        f"{statistics.stdev(float(row[key]) for row in runs):.2f}"
        for key in ("recipe", "eval")
    )
    rows.append(["mean", _mean(runs, "recipe"), _mean(runs, "eval"), ""])
    rows.append(["standard deviation", *spread, ""])
    return _table(["seed", "recipe / %", "`eval()` / %", "70 % in epoch"], rows)


# --- Task 2: what the model has learned -------------------------------


@needs_results
def plot_position_similarity(model, history):
    """Draw how alike the positional embeddings are, and their changes.

    Dosovitskiy et al. (2021), Fig. 7 (centre); without the initial noise. Should this
    machine draw other numbers from the seed, the first title shows a likeness near 0.
    """
    torch.manual_seed(history["seed"])
    trained, initial = (
        each.position_embedding.detach().cpu()[0, 1:]
        for each in (model, VisionTransformer())
    )
    likeness = torch.cosine_similarity(trained.flatten(), initial.flatten(), dim=0)
    titles = (
        f"trained (cosine with the initial values {likeness:.4f})",
        "changed by training",
    )
    figure, axes = _panels(2.8)
    for ax, position, title in zip(
        axes, (trained, trained - initial), titles, strict=True
    ):
        similarity = torch.cosine_similarity(position[:, None], position[None], dim=-1)
        limit = (similarity - torch.diag(similarity.diag())).abs().max().item()
        side = round(len(position) ** 0.5)
        maps = similarity.reshape(side, side, side, side).numpy()
        drawn = draw_tiles(ax, maps, cmap="viridis", vmin=-limit, vmax=limit)
        ax.set(xlabel="patch column", ylabel="patch row")
        ax.set_title(title, size="medium")
        figure.colorbar(
            drawn, ax=ax, label="cosine similarity", extend="max", location="bottom"
        )
    return figure


@torch.no_grad()
def attention_weights(model, images):
    """Return the attention weights of all blocks, (layers, B, num_heads, 1 + L, 1 + L).

    For normalised images (B, C, H, W).
    """
    layers = [m for m in model.modules() if isinstance(m, SelfAttention2d)]
    inputs = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        for layer in layers
    ]
    model.eval()(images.to(model.head.weight.device))
    for hook in hooks:
        hook.remove()
    weights = [
        layer.attention_weights(x) for layer, x in zip(layers, inputs, strict=True)
    ]
    return torch.stack(weights)


def normalised(pixels):
    """Turn pixels (N, 32, 32, 3), uint8, into what the model reads, (N, 3, 32, 32)."""
    return torch.stack([VAL_TRANSFORM(image) for image in pixels])


def attention_distance(weights, patch_size):
    """Return how far the heads look, in pixels, (layers, num_heads).

    Dosovitskiy et al. (2021), Section 4.5: the distance between the centres of two
    patches, weighted by ``attention_weights`` and averaged over queries and images. The
    class token has no place, and is left out.
    """
    among = weights[..., 1:, 1:]
    # Averaging over images first saves a gigabyte; MPS knows no float64
    among = (among / among.sum(dim=-1, keepdim=True)).mean(dim=1).cpu().double()
    side = round(among.shape[-1] ** 0.5)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([row, column], dim=-1).reshape(-1, 2).double() * patch_size
    distances = torch.cdist(places, places)
    return (among * distances).sum(dim=-1).mean(dim=-1)


@needs_results
def plot_attention_distance(model, predictions):
    """Plot the attention distance of every head of all blocks but the last."""
    images = normalised(predictions.pixels[:256])
    torch.manual_seed(0)
    untrained = VisionTransformer().to(model.head.weight.device)
    figure, ax = _panels(2.1, 1, 1)
    for shown, color, label in (
        (untrained, GREY, "one head before training"),
        (model, BLUE, "one head"),
    ):
        weights = attention_weights(shown, images)[:-1]
        distances = attention_distance(weights, model.patch_size)
        layers = np.arange(1, len(distances) + 1) + 0.08 * (shown is model)
        for head, values in enumerate(distances.T):
            name = label if head == 0 else None
            ax.plot(layers, values, "o", color=color, alpha=0.6, label=name)
    ax.plot(layers, distances.mean(dim=1), "-", color=ORANGE, label="mean of the heads")
    even = attention_distance(torch.ones_like(weights[:1, :1, :1]), model.patch_size)
    ax.axhline(even.item(), linestyle=":", color=GREY, label="even attention")
    ax.set(xlabel="encoder block", ylabel="distance / pixels", ylim=(0, None))
    ax.set(xticks=range(1, len(distances) + 1))
    ax.grid(alpha=0.3)
    ax.legend(ncols=2, loc="lower left")
    return figure


def rollout(weights):
    """Return what the class token gets from each patch through all blocks, (B, L).

    Abnar and Zuidema (2020): the mean of ``attention_weights`` over heads, mixed half
    and half with the residual connection, multiplied up.
    """
    mixed = weights.mean(dim=2)
    mixed = 0.5 * mixed + 0.5 * torch.eye(mixed.shape[-1], device=mixed.device)
    flow = mixed[0]
    for layer in mixed[1:]:
        flow = layer @ flow
    return flow[:, 0, 1:]


@needs_results
def plot_rollout(model, predictions):
    """Draw the first image of eight classes, each above its ``rollout``."""
    labels = predictions.labels.tolist()
    first = [labels.index(number) for number in range(8)]
    images = predictions.pixels[first]
    maps = rollout(attention_weights(model, normalised(images))).cpu()
    side = round(maps.shape[-1] ** 0.5)
    figure, axes = _panels(1.7, 2, len(images))
    for image, heat, number, (top, bottom) in zip(
        images, maps, first, axes.T, strict=True
    ):
        top.imshow(image)
        top.set_title(predictions.classes[labels[number]], size="medium")
        relative = (heat / heat.max()).reshape(side, side).numpy()
        drawn = bottom.imshow(relative, cmap="inferno", vmin=0, vmax=1)
        for ax in (top, bottom):
            ax.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("image")
    axes[1, 0].set_ylabel("rollout")
    figure.colorbar(drawn, ax=axes[1], label="relative weight", aspect=8)
    return figure
