"""Every figure can be read without the text around it: labels, units, captions."""

import re
import sys

import jupytext
import matplotlib
import numpy as np
import pypdf
import pytest
import torch
from conftest import ROOT, small_model

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import analysis
import attention
import vision_transformer

sys.path.insert(0, str(ROOT / "bench"))
import speed
import trials

CAPTION_SIZE = 9  # points

# Labels of what has no unit; any other has to name one, as in "time / ms"
WITHOUT_UNIT = {
    "attention weight",
    "batch size",
    "cosine similarity",
    "encoder block",
    "epoch",
    "patch column",
    "patch row",
    "pixel column",
    "pixel row",
    "predicted class",
    "size of a head $d_k$",
    "standard deviation of the logits",
    "token column",
    "token row",
    "token, the first two rows of patches",
    "tokens $L$",
    "tokens of an image, batch of 8",
    "training step",
    "true class",
    "variant",
}


def drawn():
    """Draw every figure of the project from small or random input, by name."""
    torch.manual_seed(0)
    model, start = small_model(layers=2).eval(), small_model(seed=1)
    images = torch.randn(4, 3, 32, 32)
    logits, labels = torch.randn(60, 10), torch.randint(10, (60,))
    pixels = torch.randint(0, 256, (60, 32, 32, 3)).byte().numpy()
    classes = [f"class {number}" for number in range(10)]
    weights = analysis.attention_weights(model, images)
    history = {
        "train_losses": [2.0, 1.5, 1.2, 1.0],
        "val_accs": [0.3, 0.4],
        "val_accs_eval": [0.4, 0.5],
    }
    trial = {"held_out_accs": [0.4], "held_out_accs_eval": [0.5]}
    point = {"median": 1.0, "memory_mib": 2.0}
    growth = {key: {"1": point, "2": point} for key in ("tokens", "batch")}
    grid = torch.zeros(4, 4)
    return {
        attention.plot_scaling: ([4, 16], attention.measure_scaling([4, 16])),
        attention.plot_attention_maps: (grid, torch.rand(2, 16, 16), [(1, 1)], [0, 1]),
        attention.plot_cost: ([64, 256], [0.1, 0.2], [1000, 2000]),
        vision_transformer.plot_training_loss: (history,),
        vision_transformer.plot_validation_accuracy: (history,),
        analysis.plot_architecture: (model,),
        analysis.plot_patches: (images[0].sigmoid(), 4),
        analysis.plot_confusion: (logits, labels, classes),
        analysis.plot_calibration: (logits, labels),
        analysis.plot_predictions: (pixels, logits, labels, classes),
        analysis.plot_attention_distance: (weights, 4),
        analysis.plot_rollout: (pixels[:4], weights, classes[:4]),
        analysis.plot_filters: (model, start),
        analysis.plot_position_similarity: (model, start),
        speed.plot_growth: ({"growth": growth},),
        trials.plot_ablations: (
            [{"make": n, "name": n, **trial} for n in ("default", "x")],
        ),
    }


FIGURES = {function.__name__: (function, given) for function, given in drawn().items()}


def problems(figure):
    """Return what a reader of a figure would miss, as a list of sentences."""
    found, labels = [], []
    for part in [figure, *subfigures(figure)]:
        if any(len(ax.get_xticks()) + len(ax.get_yticks()) for ax in part.axes):
            labels += filter(None, [part.get_supxlabel(), part.get_supylabel()])
    for text in figure.findobj(matplotlib.text.Text):
        if text.get_text() and text.get_fontsize() != CAPTION_SIZE:
            found.append(f"{text.get_text()!r} is not as large as a caption")
    for ax in figure.axes:
        for axis, name in ((ax.xaxis, "x"), (ax.yaxis, "y")):
            label = axis.get_label().get_text()
            has_ticks = len(axis.get_ticklocs())  # without any, it names a picture
            labels += [label] if label and has_ticks else []
            has_scale = ax.axison and axis.get_visible() and has_ticks
            if has_scale and not (label or label_of_neighbours(ax, name)):
                found.append(f"an {name} axis with a scale has no label")
        if len(ax.lines) > 1 and ax.axison and not (ax.get_legend() or is_twin(ax)):
            found.append("several curves, but no legend")
        for picture in ax.images:
            if picture.get_array().ndim == 2 and not is_readable_in_grey(picture.cmap):
                found.append(f"in grey, {picture.cmap.name} gives two values one shade")
    found += [
        f"{label!r} names no unit"
        for label in labels
        if " / " not in label and label not in WITHOUT_UNIT
    ]
    return found


def is_readable_in_grey(cmap):
    """Return whether the luminance (ITU-R BT.709) of a colour map never turns."""
    luminance = cmap(np.linspace(0, 1, 64))[:, :3] @ (0.2126, 0.7152, 0.0722)
    steps = np.diff(luminance)
    return (steps > 0).all() or (steps < 0).all()


def subfigures(figure):
    """Return the subfigures of a figure, theirs as well."""
    return [each for part in figure.subfigs for each in (part, *subfigures(part))]


def label_of_neighbours(ax, name):
    """Return the label that an axis shares with those in its column, or row."""
    place = ax.get_subplotspec()
    for other in ax.figure.axes:
        where = other.get_subplotspec()
        if place is None or where is None:
            continue
        shared = (
            where.colspan == place.colspan
            if name == "x"
            else where.rowspan == place.rowspan
        )
        label = other.get_xlabel() if name == "x" else other.get_ylabel()
        if shared and label:
            return label
    return ""


def is_twin(ax):
    return any(
        other is not ax and other.bbox.bounds == ax.bbox.bounds
        for other in ax.figure.axes
    )


@pytest.fixture(autouse=True)
def _as_in_the_notebooks():
    with plt.rc_context({"font.size": CAPTION_SIZE}):
        yield
    plt.close("all")


@pytest.mark.parametrize("name", FIGURES)
def test_figures_have_labels_units_and_legends_and_fit_the_text(name):
    function, given = FIGURES[name]
    figure = function(*given)
    figure.canvas.draw()
    assert problems(figure) == []
    assert figure.get_figwidth() <= analysis.WIDTH + 0.1


def test_figures_are_drawn_at_the_size_of_the_captions():
    template = (ROOT / "report" / "template.typ").read_text(encoding="utf-8")
    caption = template.partition("show figure.caption")[2]
    assert re.search(r"set text\(size: (\d+)pt\)", caption)[1] == str(CAPTION_SIZE)
    for name in ("attention", "vision_transformer", "bench/speed", "bench/trials"):
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        size = re.findall(r'plt\.rcParams\["font\.size"\] = (\d+)', source)
        assert size == [str(CAPTION_SIZE)], name


def test_no_plot_is_left_out():
    modules = (attention, vision_transformer, analysis, speed, trials)
    named = {name for m in modules for name in vars(m) if name.startswith("plot_")}
    assert named == set(FIGURES)


def test_a_figure_without_label_unit_or_legend_is_found():
    figure, axes = plt.subplots(1, 2)
    axes[0].plot([1, 2])
    axes[0].set(xlabel="epoch", ylabel="time")
    axes[1].plot([1, 2])
    axes[1].plot([2, 1])
    axes[1].set(ylabel="time / s")
    axes[0].text(0, 0, "small", size=8)
    axes[1].imshow([[0, 1]], cmap="RdBu")
    assert problems(figure) == [
        "'small' is not as large as a caption",
        "an x axis with a scale has no label",
        "several curves, but no legend",
        "in grey, RdBu gives two values one shade",
        "'time' names no unit",
    ]
    figure = plt.figure()
    part = figure.subfigures(1, 2)[1].subfigures(2, 1)[0]
    part.subplots().set(xlabel="speed", ylabel="speed", yticks=[])
    part.supxlabel("length", size="medium")
    assert problems(figure) == ["'length' names no unit", "'speed' names no unit"]


# --- Captions and alternative texts --------------------------------------------------


@pytest.mark.parametrize("name", ["attention.py", "vision_transformer.py"])
def test_every_plot_of_a_notebook_has_caption_label_and_alternative(name):
    cells = jupytext.read(ROOT / name).cells
    labels = []
    for cell, following in zip(cells, [*cells[1:], None], strict=True):
        tags = cell.metadata.get("tags", [])
        if "active-ipynb" not in tags or "plot_" not in cell.source:
            continue
        assert "caption" in following.metadata.get("tags", []), cell.source
        text = following.source
        comments = dict(re.findall(r"<!--\s*(\w+):\s*(.*?)\s*-->", text, re.DOTALL))
        caption = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL).strip()
        assert caption.startswith("**Figure.** ")
        assert len(caption) > 60
        assert len(comments["alt"]) > 60
        assert comments["alt"] not in caption
        labels.append(comments["label"])
    assert len(labels) >= 3
    assert len(set(labels)) == len(labels)
    captions = [c for c in cells if "caption" in c.metadata.get("tags", [])]
    assert len(captions) == len(labels), "no caption without a plot"
    prose = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    assert sorted(re.findall(r"<!-- (fig-[\w-]+) -->", prose)) == sorted(labels)


def test_every_picture_of_the_template_has_an_alternative():
    template = (ROOT / "report" / "template.typ").read_text(encoding="utf-8")
    pictures = re.findall(r"\bimage\([^)]*", template)
    assert len(pictures) >= 3
    for picture in pictures:
        assert re.search(r'alt: "[^"]{40,}', picture), picture


def elements(node):
    """Yield the elements of a PDF's structure tree below a node."""
    node = node.get_object()
    if isinstance(node, pypdf.generic.ArrayObject):
        for kid in node:
            yield from elements(kid)
    elif isinstance(node, pypdf.generic.DictionaryObject):
        if "/S" in node:
            yield node
        if "/K" in node:
            yield from elements(node["/K"])


def test_figures_and_equations_of_the_pdf_have_alternatives(report_pdf):
    root = pypdf.PdfReader(report_pdf).trailer["/Root"]
    kinds = {}
    for element in elements(root["/StructTreeRoot"]["/K"]):
        kinds.setdefault(element["/S"], []).append(element)
    for kind, least in (("/Figure", 5), ("/Formula", 20)):
        assert len(kinds[kind]) >= least
        assert all(len(element.get("/Alt", "")) > 0 for element in kinds[kind]), kind
    assert all(len(element["/Alt"]) > 40 for element in kinds["/Figure"])
    assert {"/H1", "/H2", "/Table", "/TH", "/L", "/Code", "/Link"} <= set(kinds)
