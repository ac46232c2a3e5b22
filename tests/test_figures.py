"""Figures with labels and captions, and what they are drawn from."""

import math

import matplotlib
import pytest
import torch
from small_run import alive, small_model

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.text import Text

from support import analysis, demo_data, figures
from vision_transformer import VisionTransformer

LOGITS = 9 * torch.eye(4)[[0, 0, 1, 2, 3, 3]]
LABELS = torch.tensor([0, 1, 1, 2, 3, 0])
HISTORY = {
    "seed": 1,
    "train_losses": [2.0, 1.5, 1.2, 1.0],
    "val_accs": [0.3, 0.4],
    "val_accs_eval": [0.4, 0.5],
    "val_losses_eval": [1.4, 1.3],
}

torch.manual_seed(0)
PIXELS = torch.randint(0, 256, (60, 32, 32, 3)).byte().numpy()
CLASSES = [f"class {n}" for n in range(10)]
PREDICTIONS = analysis.Predictions(
    PIXELS, torch.arange(60) % 10, torch.randn(60, 10), CLASSES
)
MODEL = small_model(layers=2).eval()
FIGURES = {  # arguments to try each with
    "plot_scaling": ([4, 16],),
    "plot_attention_maps": ([(1, 1)], [0, 1]),
    "plot_cost": ([4, 8],),
    "plot_patches": (demo_data.DemoCIFAR10, "data", 4),
    "plot_training": (HISTORY,),
    "plot_confusion": (PREDICTIONS,),
    "plot_calibration": (PREDICTIONS,),
    "plot_predictions": (PREDICTIONS,),
    "plot_attention_distance": (MODEL, PREDICTIONS),
    "plot_filters": (MODEL,),
    "plot_position_similarity": (MODEL, HISTORY),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(figures, "VisionTransformer", lambda: small_model(layers=2))
    yield
    plt.close("all")


@pytest.mark.parametrize("name", [n for n in dir(figures) if n.startswith("plot_")])
def test_figures_fit_the_text_and_have_labels_and_legends(name):
    figure = getattr(figures, name)(*FIGURES[name])
    figure.canvas.draw()
    assert figure.get_figwidth() <= figures.WIDTH
    sizes = {text.get_fontsize() for text in figure.findobj(Text) if text.get_text()}
    assert sizes == {9}, "as the captions"
    for ax in (ax for ax in figure.axes if ax.axison):
        for side, axis in (("x", ax.xaxis), ("y", ax.yaxis)):
            if axis.get_visible() and len(axis.get_ticklocs()):
                # A column, or row, may share one
                assert any(getattr(a, f"get_{side}label")() for a in figure.axes)
        assert len(ax.lines) < 2 or ax.get_legend(), "no legend"


def test_costs_are_those_of_the_formulas(capsys):
    analysis.print_costs(VisionTransformer())
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    tokens, size, mlp = 65, 256, 512
    block = 2 * (4 * tokens * size**2 + 2 * tokens**2 * size)
    block += 2 * 2 * tokens * size * mlp
    embedding, head = 2 * 64 * 48 * size, 2 * size * 10
    costs = embedding, block, head, embedding + 6 * block + head
    assert [row[2] for row in rows] == [f"{n / 1e6:.2f}" for n in costs]
    assert rows[-1][:2] == ["all", "3,189,002"]


def test_confusion_counts_true_classes_by_row():
    expected = [[1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert analysis.confusion(LOGITS, LABELS).tolist() == expected


def test_calibration_of_known_confidences():
    confidence = torch.tensor([0.75] * 4 + [0.95] * 2, dtype=torch.float64)
    other = (1 - confidence).log()
    logits = torch.stack([confidence.log(), other], dim=1)
    labels = torch.tensor([0, 0, 1, 1, 0, 0])
    mean, accuracy, share, error = analysis.calibration(logits, labels)
    assert mean[7] == pytest.approx(0.75)
    assert accuracy[7] == pytest.approx(0.5)
    assert accuracy[9] == 1
    assert share.sum() == pytest.approx(1)
    assert math.isnan(mean[0])
    assert error == pytest.approx((4 * 0.25 + 2 * 0.05) / 6)


def test_collected_weights_are_those_of_the_model():
    model = alive(small_model(layers=3)).eval()
    images = torch.randn(2, 3, 32, 32)
    weights = analysis.attention_weights(model, images)
    assert weights.shape == (3, 2, 4, 65, 65)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 4, 65))
    x = model.patchify(images)
    token = (model.class_token + model.position_embedding[:, :1]).expand(2, -1, -1)
    x = torch.cat([token, x], dim=1)
    for number, block in enumerate(model.blocks):
        norm, attention = block.attention.inner_module
        expected = attention.attention_weights(norm(x))
        torch.testing.assert_close(weights[number], expected)
        x = block(x)


def test_attention_distance_of_known_weights():
    eye = torch.eye(5).expand(2, 3, 1, 5, 5)
    assert analysis.attention_distance(eye, 4).tolist() == [[0.0], [0.0]]
    right = torch.zeros(1, 1, 1, 5, 5)
    right[..., 1:, 1:] = torch.eye(4)[[1, 0, 3, 2]]  # the neighbour in the row
    assert analysis.attention_distance(right, 4).item() == pytest.approx(4)
    even = analysis.attention_distance(torch.ones(1, 1, 1, 5, 5), 4)
    assert even.item() == pytest.approx((0 + 4 + 4 + 32**0.5) / 4)


def test_scaled_logits_keep_their_deviation_and_the_softmax_its_breadth():
    measured = analysis.measure_scaling([4, 64, 1024])
    deviations, entropies = measured[True]
    assert all(abs(deviation - 1) < 0.1 for deviation in deviations)
    assert min(entropies) > 0.8 * math.log(64)
    deviations, entropies = measured[False]
    for deviation, law in zip(deviations, (2, 8, 32), strict=True):
        assert abs(deviation / law - 1) < 0.1
    assert entropies[-1] < 0.3


def test_verify_counts_right_answers(capsys):
    labels = torch.arange(10).repeat(10)
    logits = torch.eye(10)[labels]
    logits[:7] = -logits[:7]  # seven wrong answers of a hundred
    predictions = analysis.Predictions(None, labels, logits, None)
    for recorded, agrees in ((93, True), (98, True), (88, True), (99, False)):
        history = {"val_accs_eval": [0.0, recorded / 100]}
        assert analysis.verify(history, predictions) is agrees
    said = capsys.readouterr().out
    assert "93 of 100 test images right, 93.00 %" in said
    assert said.count("the record is NOT confirmed") == 1
