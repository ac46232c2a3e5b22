"""What a trained Vision Transformer does, and what it has learned, as figures.

Used by ``vision_transformer.ipynb`` behind the training. Every function takes a model,
images or logits, and computes what it shows; nothing is trained or stored here.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from einops import rearrange
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch.utils.flop_counter import FlopCounterMode

from vision_transformer import images_to_patches

BLUE, ORANGE, SKY, GREY = "#0072B2", "#D55E00", "#56B4E9", "0.45"
WIDTH = 6.4  # inches, of the text in the report


# --- The model ------------------------------------------------------------------------


def architecture(model, batch="B"):
    """Return the stages of a model as pairs: what it does, and the shape that results.

    Args:
        model: a ``VisionTransformer``.
        batch: how the batch size is written.

    Returns:
        A list of (text, shape); the shapes are those of tensors caught on the way of
        one image through the model. The blocks have a second one, that of the last.
    """
    shapes = {}

    def note(name):
        def hook(_, inputs, output):
            shapes[name] = tuple(inputs[0].shape[1:]), tuple(output.shape[1:])

        return hook

    watched = {"patches": model.patch_embedding, "block": model.blocks[0]}
    watched["last"] = model.blocks[-1].feed_forward  # the block is not called as such
    watched |= {"norm": model.norm, "head": model.head}
    hooks = [layer.register_forward_hook(note(n)) for n, layer in watched.items()]
    size, channels = model.image_size, model.in_channels
    with torch.no_grad():
        model(torch.zeros(1, channels, size, size, device=model.head.weight.device))
    for hook in hooks:
        hook.remove()
    layer = model.blocks[0].attention.inner_module[1]
    mlp = model.blocks[0].feed_forward.inner_module[1].layers[0].out_features
    side = size // model.patch_size
    stages = [
        ("image", (channels, size, size)),
        (
            f"{side} x {side} patches of {model.patch_size} x {model.patch_size} "
            "pixels,\nrow by row",
            shapes["patches"][0],
        ),
        ("linear projection + positions", shapes["patches"][1]),
        ("class token in front", shapes["block"][0]),
        (
            f"{len(model.blocks)} encoder blocks, each self-attention\n"
            f"({layer.num_heads} heads) and MLP ({mlp} hidden features)",
            shapes["block"][1],
            shapes["last"][1],
        ),
        ("layer norm of the class token", shapes["norm"][1]),
        ("linear head: logits", shapes["head"][1]),
    ]
    return [
        (text, ",\nlast ".join(f"({', '.join([batch, *map(str, s)])})" for s in each))
        for text, *each in stages
    ]


def plot_architecture(model):
    """Draw the stages of a model with the tensor shapes, and one block in detail.

    Args:
        model: a ``VisionTransformer``.

    Returns:
        The matplotlib figure.
    """
    figure, ax = plt.subplots(figsize=(WIDTH, 4.4), layout="constrained")
    ax.set(xlim=(0, 10.6), ylim=(0, 7.1))
    ax.axis("off")

    def box(x, y, width, text, color="white", height=0.66):
        style = "round,pad=0.02,rounding_size=0.08"
        ax.add_patch(
            FancyBboxPatch((x, y), width, height, boxstyle=style, fc=color, ec="0.2")
        )
        ax.text(x + width / 2, y + height / 2, text, ha="center", va="center")

    def arrow(start, end, **style):
        ax.add_patch(
            FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, **style)
        )

    stages = architecture(model)
    for number, (text, shape) in enumerate(stages):
        y = 6.35 - number
        box(0.1, y, 4.6, text, "#DCEBF7" if "encoder" in text else "white")
        ax.text(4.85, y + 0.33, shape, va="center", family="monospace")
        if number:
            arrow((2.4, y + 1), (2.4, y + 0.68))

    ax.text(8.9, 6.6, "one encoder block", ha="center", weight="bold")
    parts = ["layer norm", "self-attention", "+", "layer norm", "MLP", "+"]
    ys = [5.4, 4.4, 3.5, 2.5, 1.5, 0.6]
    for part, y in zip(parts, ys, strict=True):
        if part == "+":
            ax.text(
                8.9,
                y + 0.2,
                "+",
                ha="center",
                va="center",
                bbox={"boxstyle": "circle,pad=0.15", "fc": "white", "ec": "0.2"},
            )
        else:
            box(7.8, y, 2.2, part, "#DCEBF7" if part != "layer norm" else "white", 0.56)
    arrow((8.9, 6.45), (8.9, 5.98))
    for start, end in (
        (5.38, 4.98),
        (4.38, 3.92),
        (3.48, 3.08),
        (2.48, 2.08),
        (1.48, 1.02),
        (0.58, 0.1),
    ):
        arrow((8.9, start), (8.9, end))
    for top, bottom in ((6.2, 3.7), (3.3, 0.8)):  # the residual connections
        ax.plot([8.9, 10.4, 10.4], [top, top, bottom], color="black", linewidth=1)
        arrow((10.4, bottom), (9.12, bottom))
    return figure


def cost_rows(model):
    """Count the parameters and the operations of a forward pass, part by part.

    Args:
        model: a ``VisionTransformer``.

    Returns:
        A list of (part, parameters, floating-point operations of the matrix products
        for one image; a multiplication and an addition count as two).

    Raises:
        AssertionError: the parts do not add up to what the whole model has.
    """
    size, device = model.image_size, model.head.weight.device
    image = torch.zeros(1, model.in_channels, size, size, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    counts = counter.get_flop_counts()
    prefix = type(model).__name__

    def flop(name):
        return sum(counts.get(f"{prefix}.{name}", {}).values())

    def size_of(*modules):
        return sum(p.numel() for m in modules for p in m.parameters())

    attention = [b.attention.inner_module[1] for b in model.blocks]
    mlps = [b.feed_forward.inner_module[1] for b in model.blocks]
    norms = [b.attention.inner_module[0] for b in model.blocks]
    norms += [b.feed_forward.inner_module[0] for b in model.blocks] + [model.norm]
    tokens = [model.position_embedding, model.class_position, model.class_token]
    depth = range(len(model.blocks))

    def flop_of(part):
        return sum(flop(f"blocks.{i}.{part}.inner_module.1") for i in depth)

    rows = [
        ("patch embedding", size_of(model.patch_embedding), flop("patch_embedding")),
        ("positions and class token", sum(p.numel() for p in tokens), 0),
        ("self-attention", size_of(*attention), flop_of("attention")),
        ("MLPs", size_of(*mlps), flop_of("feed_forward")),
        ("layer norms", size_of(*norms), 0),
        ("head", size_of(model.head), flop("head")),
    ]
    whole = sum(p.numel() for p in model.parameters()), counter.get_total_flops()
    sums = sum(row[1] for row in rows), sum(row[2] for row in rows)
    assert sums == whole, f"the parts add up to {sums}, the model has {whole}"
    return [*rows, ("all", *whole)]


def plot_patches(image, patch_size):
    """Draw an image, cut into its patches, and as the sequence they become.

    Args:
        image: (3, H, W), with values in [0, 1].
        patch_size: side of a patch, in pixels.

    Returns:
        The matplotlib figure.
    """
    patches = images_to_patches(image[None], patch_size)[0]
    rows = image.shape[1] // patch_size
    pictures = rearrange(patches, "L (p q C) -> L p q C", p=patch_size, q=patch_size)
    columns = len(pictures) // rows
    figure = plt.figure(figsize=(WIDTH, 3.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[3.2, 1])
    left, right = top.subfigures(1, 2)
    ax = left.subplots()
    ax.imshow(image.permute(1, 2, 0))
    ax.set(xlabel="pixel column", ylabel="pixel row")
    for ax, picture in zip(right.subplots(rows, columns).flat, pictures, strict=True):
        ax.imshow(picture, vmin=0, vmax=1)
        ax.axis("off")
    shown = 2 * columns
    axes = bottom.subplots(1, shown)
    for number, (ax, picture) in enumerate(zip(axes, pictures, strict=False), 1):
        ax.imshow(picture, vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
        if number in (1, columns, columns + 1, shown):
            ax.set_xlabel(f"{number}")
    bottom.supxlabel("token, the first two rows of patches", size="medium")
    return figure


# --- Its predictions ------------------------------------------------------------------


def confusion(logits, labels):
    """Count the predictions: (num_classes, num_classes), true class by row."""
    classes = logits.shape[1]
    pairs = labels * classes + logits.argmax(dim=-1)
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def plot_confusion(logits, labels, classes):
    """Draw the confusion matrix, in percent of the images of each true class.

    Args:
        logits: (N, num_classes).
        labels: (N,).
        classes: names of the classes.

    Returns:
        The matplotlib figure.
    """
    matrix = confusion(logits, labels).double()
    percent = (100 * matrix / matrix.sum(dim=1, keepdim=True)).numpy()
    figure, ax = plt.subplots(figsize=(WIDTH, 5), layout="constrained")
    drawn = ax.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    for i, row in enumerate(percent):
        for j, value in enumerate(row):
            color = "white" if value > 55 else "black"
            ax.text(j, i, f"{value:.0f}", ha="center", va="center", color=color)
    ax.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    ax.set_yticks(range(len(classes)), classes)
    ax.set(xlabel="predicted class", ylabel="true class")
    figure.colorbar(drawn, ax=ax, label="share of the true class / %")
    return figure


def class_lines(logits, labels, classes):
    """Return lines of text: accuracy of every class, best first, and its rival.

    Args:
        logits: (N, num_classes).
        labels: (N,).
        classes: names of the classes.
    """
    matrix = confusion(logits, labels)
    accuracy = matrix.diag() / matrix.sum(dim=1)
    wrong = matrix - torch.diag(matrix.diag())
    lines = []
    for index in accuracy.argsort(descending=True).tolist():
        rival = int(wrong[index].argmax())
        share = 100 * wrong[index, rival].item() / matrix[index].sum().item()
        lines.append(
            f"{classes[index]:<12}{100 * accuracy[index]:6.1f} %   most often taken "
            f"for {classes[rival]} ({share:.1f} %)"
        )
    return lines


def calibration(logits, labels, bins=10):
    """Compare the confidence of predictions with how often they are right.

    Guo et al. (2017), "On Calibration of Modern Neural Networks", Section 2.

    Args:
        logits: (N, num_classes).
        labels: (N,).
        bins: number of equal intervals of confidence.

    Returns:
        Mean confidence, accuracy and share of the images of each bin, arrays (bins,)
        with nan where a bin is empty, and the expected calibration error.
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


def plot_calibration(logits, labels):
    """Draw the reliability diagram and how confident the predictions are.

    Args:
        logits: (N, num_classes).
        labels: (N,).

    Returns:
        The matplotlib figure.
    """
    mean, accuracy, share, error = calibration(logits, labels)
    enough = share * len(labels) >= 10  # of fewer images, a share right means nothing
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.9), layout="constrained")
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


def plot_predictions(images, logits, labels, classes, columns=6):
    """Draw surely right, unsure and surely wrong predictions with their confidence.

    Args:
        images: (N, H, W, 3), of type uint8.
        logits: (N, num_classes).
        labels: (N,).
        classes: names of the classes.
        columns: images in each of the three rows.

    Returns:
        The matplotlib figure.
    """
    confidence, predicted = logits.softmax(dim=-1).max(dim=-1)
    right = predicted == labels
    order = confidence.argsort(descending=True)
    rows = {
        "right, most sure": order[right[order]][:columns],
        "least sure": order.flip(0)[:columns],
        "wrong, most sure": order[~right[order]][:columns],
    }
    figure, axes = plt.subplots(
        3, columns, figsize=(WIDTH, 4.9), layout="constrained", squeeze=False
    )
    figure.get_layout_engine().set(hspace=0.06)  # a row's labels apart from the next's
    for axes_row, (name, chosen) in zip(axes, rows.items(), strict=True):
        axes_row[0].set_ylabel(name)
        for ax in axes_row:
            ax.set(xticks=[], yticks=[])
        for ax, index in zip(axes_row, chosen.tolist(), strict=False):
            ax.imshow(images[index])
            ax.set_title(
                f"{classes[predicted[index]]}\n{100 * confidence[index]:.0f} %",
                size="medium",
                color="black" if right[index] else ORANGE,
            )
            ax.set_xlabel(f"is {classes[labels[index]]}")
    return figure


# --- What it has learned --------------------------------------------------------------


@torch.no_grad()
def attention_weights(model, images):
    """Return the attention weights of all blocks, (layers, B, num_heads, 1 + L, 1 + L).

    Args:
        model: a ``VisionTransformer``, in evaluation mode.
        images: (B, C, H, W), normalised.
    """
    tokens = model.patchify(images)
    class_token = (model.class_token + model.class_position).expand(len(images), -1, -1)
    x = torch.cat([class_token, tokens], dim=1)
    collected = []
    for block in model.blocks:
        norm, attention = block.attention.inner_module
        attended, weights = attention(norm(x), need_weights=True)
        x = block.feed_forward(x + attended)
        collected.append(weights)
    return torch.stack(collected)


def attention_distance(weights, patch_size):
    """Return how far the heads look, in pixels, (layers, num_heads).

    Dosovitskiy et al. (2021), Section 4.5: the distance between the centres of two
    patches, weighted by attention and averaged over queries and images. The class
    token has no place, and is left out.

    Args:
        weights: the result of ``attention_weights``.
        patch_size: side of a patch, in pixels.
    """
    among = weights[..., 1:, 1:]
    # Averaging over images first saves a gigabyte; MPS knows no float64
    among = (among / among.sum(dim=-1, keepdim=True)).mean(dim=1).cpu().double()
    side = round(among.shape[-1] ** 0.5)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([row, column], dim=-1).reshape(-1, 2).double() * patch_size
    distances = torch.cdist(places, places)
    return (among * distances).sum(dim=-1).mean(dim=-1)


def even_distance(num_patches, patch_size):
    """Return the attention distance, in pixels, of a head that looks everywhere."""
    even = torch.ones(1, 1, 1, 1 + num_patches, 1 + num_patches)
    return attention_distance(even, patch_size).item()


def plot_attention_distance(weights, patch_size):
    """Plot the attention distance of every head against depth.

    Args:
        weights: the result of ``attention_weights``.
        patch_size: side of a patch, in pixels.

    Returns:
        The matplotlib figure.
    """
    distances = attention_distance(weights, patch_size)
    layers = range(1, len(distances) + 1)
    figure, ax = plt.subplots(figsize=(WIDTH, 2.8), layout="constrained")
    for head, values in enumerate(distances.T):
        label = "one head" if head == 0 else None
        ax.plot(layers, values, "o", color=BLUE, alpha=0.6, label=label)
    ax.plot(layers, distances.mean(dim=1), "-", color=ORANGE, label="mean of the heads")
    even = even_distance(weights.shape[-1] - 1, patch_size)
    ax.axhline(even, linestyle=":", color=GREY, label="even attention")
    ax.set(xlabel="encoder block", ylabel="attention distance / pixels")
    ax.set(xticks=layers)
    ax.margins(y=0.25)
    ax.grid(alpha=0.3)
    ax.legend(ncols=3, loc="upper left")
    return figure


def rollout(weights):
    """Return what the class token gets from each patch through all blocks, (B, L).

    Abnar and Zuidema (2020), "Quantifying Attention Flow in Transformers": the mean
    over heads, mixed half and half with the residual connection, multiplied up.

    Args:
        weights: the result of ``attention_weights``.
    """
    mixed = weights.mean(dim=2)
    mixed = 0.5 * mixed + 0.5 * torch.eye(mixed.shape[-1], device=mixed.device)
    flow = mixed[0]
    for layer in mixed[1:]:
        flow = layer @ flow
    return flow[:, 0, 1:]


def plot_rollout(images, weights, titles):
    """Draw images, and beside each of them where its class token looks.

    Args:
        images: (B, H, W, 3), of type uint8.
        weights: the result of ``attention_weights`` for these images.
        titles: one text per image.

    Returns:
        The matplotlib figure.
    """
    maps = rollout(weights).cpu()
    side = round(maps.shape[-1] ** 0.5)
    maps = maps.reshape(-1, side, side)
    figure, axes = plt.subplots(
        2, len(images), figsize=(WIDTH, 1.9), layout="constrained", squeeze=False
    )
    for image, heat, title, (top, bottom) in zip(
        images, maps, titles, axes.T, strict=True
    ):
        extent = (0, image.shape[1], image.shape[0], 0)
        top.imshow(image, extent=extent)
        top.set_title(title, size="medium")
        bottom.imshow(image.mean(axis=-1), cmap="gray", extent=extent, alpha=0.5)
        bottom.imshow(heat / heat.max(), cmap="inferno", extent=extent, alpha=0.7)
        for ax in (top, bottom):
            ax.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("image")
    axes[1, 0].set_ylabel("rollout")
    return figure


def likeness(model, start):
    """Return how alike patch embedding and positions are to what they were at first.

    Args:
        model: a ``VisionTransformer``.
        start: the same model before training.

    Returns:
        A dict from what is compared to its cosine similarity with the initial values.
    """

    def compare(name):
        pair = (each.get_parameter(name).detach().cpu() for each in (model, start))
        return torch.cosine_similarity(*(p.flatten() for p in pair), dim=0).item()

    return {
        "patch embedding": compare("patch_embedding.weight"),
        "positions": compare("position_embedding"),
    }


def plot_filters(model, start, number=14):
    """Draw principal components of the patch embedding, and of what training changed.

    Dosovitskiy et al. (2021), Fig. 7 (left), and the same of the difference to the
    initial weights, in which their noise is gone.

    Args:
        model: a ``VisionTransformer`` with three channels.
        start: the same model before training.
        number: how many components to draw of each.

    Returns:
        The matplotlib figure.
    """
    trained, initial = (
        each.patch_embedding.weight.detach().cpu() for each in (model, start)
    )  # (D, p * p * C)
    size = model.patch_size
    figure = plt.figure(figsize=(WIDTH, 3), layout="constrained")
    panels = figure.subfigures(2, 1)
    for panel, weight, title in zip(
        panels, (trained, trained - initial), ("trained", "changed"), strict=True
    ):
        _, _, components = torch.linalg.svd(weight - weight.mean(dim=0))
        pictures = rearrange(
            components[:number], "n (p q C) -> n p q C", p=size, q=size
        )
        axes = panel.subplots(2, number // 2)
        for index, (ax, picture) in enumerate(zip(axes.flat, pictures, strict=True), 1):
            ax.imshow((0.5 + 0.5 * picture / picture.abs().max()).numpy())
            ax.set(xticks=[], yticks=[])
            ax.set_xlabel(str(index), labelpad=2)
        panel.supylabel(title, size="medium")
    return figure


def position_similarity(position):
    """Return the cosine similarities of positional embeddings, (L, L).

    Args:
        position: the embeddings, (L, D).
    """
    unit = position / position.norm(dim=-1, keepdim=True)
    return unit @ unit.T


def plot_position_similarity(model, start):
    """Draw how alike the positional embeddings are, and what training changed in them.

    Dosovitskiy et al. (2021), Fig. 7 (centre), and the same of the difference to the
    initial embeddings, in which their noise is gone.

    Args:
        model: a ``VisionTransformer``.
        start: the same model before training.

    Returns:
        The matplotlib figure.
    """
    trained, initial = (
        each.position_embedding.detach().cpu() for each in (model, start)
    )
    figure = plt.figure(figsize=(WIDTH, 3.5), layout="constrained")
    panels = figure.subfigures(1, 2)
    for panel, position, title in zip(
        panels,
        (trained[0], (trained - initial)[0]),
        ("trained", "changed by training"),
        strict=True,
    ):
        similarity = position_similarity(position)
        side = round(len(position) ** 0.5)
        others = similarity - torch.diag(similarity.diag())
        limit = others.abs().max().item()
        axes = panel.subplots(side, side)
        for ax, row in zip(axes.flat, similarity, strict=True):
            drawn = ax.imshow(
                row.reshape(side, side).numpy(), cmap="viridis", vmin=-limit, vmax=limit
            )
            ax.set(xticks=[], yticks=[])
        panel.suptitle(title, size="medium")
        panel.supylabel("patch row", size="medium", y=0.6)  # the scale is below
        # Between the two maps in the middle, above the scale
        axes[-1, side // 2 - 1].set_xlabel("patch column", x=1.1)
        panel.colorbar(
            drawn,
            ax=axes,
            label="cosine similarity",
            extend="max",
            location="bottom",
            shrink=0.8,
        )
    return figure
