"""What the figures of the report are drawn from."""

import math

import pytest
import torch
from conftest import small_model

import analysis
from vision_transformer import VisionTransformer


def test_the_stages_have_the_shapes_of_the_model():
    stages = dict(analysis.architecture(VisionTransformer()))
    assert list(stages.values()) == [
        "(B, 3, 32, 32)",
        "(B, 64, 48)",
        "(B, 64, 256)",
        "(B, 65, 256)",
        "(B, 65, 256),\nlast (B, 1, 256)",
        "(B, 256)",
        "(B, 10)",
    ]
    assert any(text.startswith("6 encoder blocks") for text in stages)


def test_costs_add_up_and_are_those_of_the_formulas():
    rows = {part: values for part, *values in analysis.cost_rows(VisionTransformer())}
    tokens, size, mlp = 65, 256, 512
    assert rows["all"][0] == 3_189_002
    assert rows["patch embedding"] == [49 * size, 2 * 64 * 48 * size]
    full = 2 * (4 * tokens * size**2 + 2 * tokens**2 * size)
    last = 2 * (2 * tokens * size**2 + 2 * size**2 + 2 * tokens * size)
    assert rows["self-attention"] == [6 * 4 * size**2, 5 * full + last]
    assert rows["MLPs"][1] == (5 * tokens + 1) * 2 * 2 * size * mlp
    assert rows["head"] == [257 * 10, 2 * size * 10]


LOGITS = 9 * torch.eye(4)[[0, 0, 1, 2, 3, 3]]
LABELS = torch.tensor([0, 1, 1, 2, 3, 0])


def test_confusion_counts_true_classes_by_row():
    assert analysis.confusion(LOGITS, LABELS).tolist() == [
        [1, 0, 0, 1],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
    ]
    lines = analysis.class_lines(LOGITS, LABELS, ["a", "b", "c", "d"])
    assert [line.split()[0] for line in lines[:2]] in (["c", "d"], ["d", "c"])
    assert "a" in lines[-1] or "b" in lines[-1]
    assert any("50.0 %   most often taken for d" in line for line in lines)


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
    model = small_model(layers=3).eval()
    images = torch.randn(2, 3, 32, 32)
    weights = analysis.attention_weights(model, images)
    assert weights.shape == (3, 2, 4, 65, 65)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 4, 65))
    seen = []
    last = model.blocks[2].attention.inner_module[1]
    original = last.forward

    def forward(x, need_weights=False, num_queries=None):
        seen.append(original(x, True, num_queries)[1])
        return original(x, need_weights, num_queries)

    last.forward = forward
    model(images)
    torch.testing.assert_close(weights[2][:, :, :1], seen[0])


def test_attention_distance_of_known_weights():
    eye = torch.eye(5).expand(2, 3, 1, 5, 5)
    assert analysis.attention_distance(eye, 4).tolist() == [[0.0], [0.0]]
    right = torch.zeros(1, 1, 1, 5, 5)
    right[..., 1:, 1:] = torch.eye(4)[[1, 0, 3, 2]]  # the neighbour in the row
    assert analysis.attention_distance(right, 4).item() == pytest.approx(4)
    assert analysis.even_distance(4, 4) == pytest.approx((0 + 4 + 4 + 32**0.5) / 4)


def test_rollout_is_the_product_of_the_layers_from_the_last_to_the_first():
    weights = torch.rand(3, 2, 4, 5, 5).softmax(dim=-1)
    rows = []
    for b in range(2):
        row = torch.zeros(5)
        row[0] = 1  # the class token, followed down from the last block
        for layer in (2, 1, 0):
            row = 0.5 * row + 0.5 * row @ weights[layer, b].mean(dim=0)
        rows.append(row[1:])
    torch.testing.assert_close(analysis.rollout(weights), torch.stack(rows))
    nothing = torch.eye(5).expand(3, 2, 4, 5, 5)
    assert analysis.rollout(nothing).abs().max() == 0


def test_similarity_of_known_positions():
    position = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [1.0, 1.0]])
    similarity = analysis.position_similarity(position)
    assert similarity[0].tolist() == pytest.approx([1, 0, -1, 0.5**0.5])
    torch.testing.assert_close(similarity, similarity.T)


def test_likeness_tells_the_beginning_from_another_model():
    model, other = small_model(), small_model(seed=1)
    assert min(analysis.likeness(model, small_model()).values()) > 0.9999
    assert max(map(abs, analysis.likeness(model, other).values())) < 0.1
