"""Everything that is drawn for the notebooks, in one style.

A ``plot_...`` function returns a figure. Where the model or its predictions are missing
(None), it says so in one line instead.
"""

import csv
import functools
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from einops import rearrange
from IPython.display import Markdown

from attention import SelfAttention2d
from support import analysis
from support.records import first_epoch_at
from vision_transformer import VisionTransformer

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


def plot_scaling(head_dims, num_tokens=64):
    """Plot ``measure_scaling``."""
    measured = analysis.measure_scaling(head_dims, num_tokens)
    figure, axes = _panels(2.1)
    curves = [
        (True, r"divided by $\sqrt{d_k}$", "o-", BLUE),
        (False, "not divided", "s--", ORANGE),
    ]
    for scaled, label, style, color in curves:
        for ax, values in zip(axes, measured[scaled], strict=True):
            ax.plot(head_dims, values, style, color=color, label=label)
    law = [math.sqrt(head_dim) for head_dim in head_dims]
    axes[0].plot(head_dims, law, ":", color=GREY, label=r"law $\sqrt{d_k}$")
    axes[0].set(yscale="log", ylabel=r"$\sigma$ of the logits")
    uniform = math.log(num_tokens)
    axes[1].axhline(uniform, linestyle=":", color=GREY, label=r"uniform, $\ln L$")
    axes[1].set(ylabel="entropy / nats", ylim=(0, 1.15 * uniform))
    for ax in axes:
        ax.set(xscale="log", xlabel="size of a head $d_k$")
        ax.set_xticks(head_dims, [str(head_dim) for head_dim in head_dims])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].legend(loc="lower right", bbox_to_anchor=(1, 0.06))  # between the curves
    axes[1].legend(loc="upper right", bbox_to_anchor=(1, 0.74))
    return figure


def plot_attention_maps(queries, heads):
    """Draw where the tokens at (row, column) look in ``content_attention``, by head."""
    regions, weights = analysis.content_attention()
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


def plot_cost(sides):
    """Plot what ``SelfAttention2d`` costs on square grids, one at a time."""
    torch.manual_seed(0)
    layer = SelfAttention2d()
    rows = []
    for side in sides:
        x = torch.randn(1, layer.embed_dim, side, side)
        costs = analysis.saved_for_backward(layer, x), analysis.fastest_pass(layer, x)
        rows.append((side * side, *analysis.count_operations(layer, x), *costs))
    tokens, projections, products, kept, seconds = zip(*rows, strict=True)
    figure, axes = _panels(2.0, columns=3)
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
    axes[0].axvline(crossing, color=GREY, linestyle=":")
    axes[0].set_ylim(0.5, None)
    axes[0].legend(loc="lower right", handlelength=1)
    labels = "operations / million", "memory / MiB", "time / ms"
    for ax, what in zip(axes, labels, strict=True):
        ax.set(xlabel="tokens $L$", ylabel=what)
        ax.set_xticks(tokens[:-1], [str(n) for n in tokens[:-1]])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    return figure


# --- Task 2: the patches ----------------------------------------------


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
    figure = plt.figure(figsize=(WIDTH, 2.2), layout="constrained")
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
    figure, (left, right) = _panels(2.3)
    left.plot(losses, color=SKY, linewidth=0.5, label="one step", rasterized=True)
    ends = window * np.arange(1, n_epochs + 1)
    mean = np.reshape(losses, (n_epochs, window)).mean(axis=1)
    middles = ends - window / 2
    left.plot(middles, mean, ".-", color=BLUE, label="mean of an epoch")
    validation = "validation, eval()"
    left.plot(ends, history["val_losses_eval"], ".--", color=YELLOW, label=validation)
    left.set(xlabel="training step", ylabel="cross-entropy / nats", ylim=(0, None))

    epochs, accuracies = range(1, n_epochs + 1), history["val_accs"]
    for key, label, style, color in (
        ("val_accs_eval", "eval()", "s--", YELLOW),
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


# --- Task 2: predictions ----------------------------------------------


@needs_results
def plot_confusion(predictions):
    """Draw the confusion matrix, in percent of the images of each true class."""
    matrix = analysis.confusion(predictions.logits, predictions.labels).double()
    percent = (100 * matrix / matrix.sum(dim=1, keepdim=True)).numpy()
    classes = predictions.classes
    figure, ax = _panels(2.55, 1, 1)
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


@needs_results
def plot_calibration(predictions):
    """Draw the reliability diagram and how confident the predictions are."""
    labels = predictions.labels
    mean, accuracy, share, error = analysis.calibration(predictions.logits, labels)
    enough = share * len(labels) >= 10  # of fewer images, a share right means nothing
    figure, axes = _panels(1.8)
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
    percent = (10_000 * confidence).floor() / 100  # none is rounded up to 100
    right = predicted == labels
    order = confidence.argsort(descending=True)
    columns = 6
    rows = {
        "confident, right": order[right[order]][:columns],
        "least confident": order.flip(0)[:columns],
        "confident, wrong": order[~right[order]][:columns],
    }
    no_ticks = {"xticks": [], "yticks": []}
    figure, axes = _panels(3.4, 3, columns, subplot_kw=no_ticks)
    figure.get_layout_engine().set(hspace=0.06)  # a row's labels apart from the next's
    for axes_row, (name, chosen) in zip(axes, rows.items(), strict=True):
        axes_row[0].set_ylabel(name)
        for ax, index in zip(axes_row, chosen.tolist(), strict=False):
            ax.imshow(pixels[index])
            ax.set_title(
                f"{classes[predicted[index]]}\n{percent[index]:.2f} %",
                size="medium",
                color="black" if right[index] else ORANGE,
            )
            ax.set_xlabel(f"is {classes[labels[index]]}")
    return figure


@needs_results
def show_confident(predictions):
    """Show how many of the predictions of at least some confidence are correct."""
    confidence, predicted = predictions.logits.double().softmax(dim=-1).max(dim=-1)
    correct, rows = (predicted == predictions.labels).double(), []
    for least in (0.5, 0.9, 0.99, 0.999):
        chosen = confidence >= least
        shares = chosen.double().mean(), correct[chosen].mean()
        rows.append([f"{100 * least:g}", *(f"{100 * share:.1f}" for share in shares)])
    return _table(["confidence ≥ / %", "images / %", "correct / %"], rows)


# --- Tables ------------------------------------------------------------


def _table(header, rows):
    """Return a table for a notebook."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return Markdown("\n".join(f"| {' | '.join(map(str, line))} |" for line in lines))


def show_table(path, bold=None):
    """Show a table that is stored as CSV, the row that begins with ``bold`` in bold."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    rows = [[f"**{c}**" for c in row] if row[0] == bold else row for row in rows]
    return _table(header, rows)


# --- Task 2: what the model has learned -------------------------------


@needs_results
def plot_filters(model):
    """Draw the first filters of the patch embedding, before and after training."""
    p, channels = model.patch_size, model.in_channels
    figure, axes = _panels(2.1, 2, 1)
    for ax, (title, shown) in zip(
        axes,
        {"before training": VisionTransformer(), "after training": model}.items(),
        strict=True,
    ):
        weight = shown.patch_embedding.weight.detach().cpu()
        weight = weight[: channels * min(p**2, len(weight) // channels)]
        tiles = rearrange(
            0.5 + 0.5 * weight / weight.abs().amax(dim=1, keepdim=True),
            "(place colour) (y x C) -> colour place y x C",
            colour=channels,
            y=p,
            x=p,
        )
        draw_tiles(ax, tiles.numpy(), fill=0.85)
        ax.set(xticks=[], yticks=[])
        ax.set_title(title, size="medium")
    return figure


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
    shown = {
        f"trained (cosine with initial: {likeness:.4f})": trained,
        "changed by training": trained - initial,
    }
    figure, axes = _panels(3.4)
    for ax, (title, position) in zip(axes, shown.items(), strict=True):
        similarity = torch.cosine_similarity(position[:, None], position[None], dim=-1)
        limit = (similarity - torch.diag(similarity.diag())).abs().max().item()
        side = round(len(position) ** 0.5)
        maps = similarity.reshape(side, side, side, side).numpy()
        drawn = draw_tiles(ax, maps, cmap="viridis", vmin=-limit, vmax=limit)
        ax.set(xlabel="patch column", ylabel="patch row")
        ax.set_title(title, size="medium")
        where = {"extend": "max", "location": "bottom"}
        figure.colorbar(drawn, ax=ax, label="cosine similarity", **where)
    return figure


@needs_results
def plot_attention_distance(model, predictions):
    """Plot the attention distance of every head of all blocks but the last."""
    images = analysis.normalised(predictions.pixels[:128])
    torch.manual_seed(0)
    untrained = VisionTransformer().to(model.head.weight.device)
    figure, ax = _panels(2.1, 1, 1)
    for shown, color, label in (
        (untrained, GREY, "one head before training"),
        (model, BLUE, "one head"),
    ):
        weights = analysis.attention_weights(shown, images)[:-1]
        distances = analysis.attention_distance(weights, model.patch_size)
        layers = np.arange(1, len(distances) + 1) + 0.08 * (shown is model)
        labels = [label, *[None] * (distances.shape[1] - 1)]  # in the legend once
        ax.plot(layers, distances, "o", color=color, alpha=0.6, label=labels)
    ax.plot(layers, distances.mean(dim=1), "-", color=ORANGE, label="mean of the heads")
    ones = torch.ones_like(weights[:1, :1, :1])
    uniform = analysis.attention_distance(ones, model.patch_size)
    ax.axhline(uniform.item(), linestyle=":", color=GREY, label="uniform attention")
    ax.set(xlabel="encoder block", ylabel="distance / pixels", ylim=(0, 20))
    ax.set(xticks=range(1, len(distances) + 1))
    ax.grid(alpha=0.3)
    ax.legend(ncols=2, loc="lower left")
    return figure
