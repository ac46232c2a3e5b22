"""Task 1 against references that share no code with it."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attention import SelfAttention2d, run_unit_tests

small = st.integers(1, 5)
seeds = st.integers(0, 2**31)
# The same examples every time: the tests are deterministic
many = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def reference(layer, x):
    """Eq. 1 and 2, with a loop over images, heads and tokens."""
    d_k, d_v = layer.head_dim, layer.value_dim
    output = torch.zeros_like(x)
    batch, _, height, width = x.shape
    weights = x.new_zeros(batch, layer.num_heads, height * width, height * width)
    for b in range(batch):
        tokens = [x[b, :, i, j] for i in range(height) for j in range(width)]
        heads = []
        for h in range(layer.num_heads):
            w_q = layer.q.weight[h * d_k : (h + 1) * d_k]
            w_k = layer.k.weight[h * d_k : (h + 1) * d_k]
            w_v = layer.v.weight[h * d_v : (h + 1) * d_v]
            keys = torch.stack([w_k @ token for token in tokens])
            values = torch.stack([w_v @ token for token in tokens])
            rows = []
            for n, token in enumerate(tokens):
                row = torch.softmax(keys @ (w_q @ token) / math.sqrt(d_k), dim=0)
                weights[b, h, n] = row.detach()
                rows.append(row @ values)
            heads.append(torch.stack(rows))
        merged = torch.cat(heads, dim=1) @ layer.out.weight.T
        output[b] = merged.T.reshape(-1, height, width)
    return output, weights


def assert_same(ours, theirs, inputs, atol):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    if ours.numel():  # else the reference depends on nothing
        probe = torch.randn_like(ours)
        one, other = (torch.autograd.grad(o, inputs, probe) for o in (ours, theirs))
        torch.testing.assert_close(one, other, rtol=0, atol=100 * atol)


@pytest.mark.fault("properties")
@many
@given(small, small, small, small, st.integers(0, 3), small, small, seeds)
# All sizes differ, so that no mix-up of two of them can go unnoticed
@example(14, 5, 3, 4, 2, 6, 7, 0)
def test_values_and_gradients_agree_with_a_plain_float64_reference(
    size, d_k, d_v, heads, batch, height, width, seed
):
    torch.manual_seed(seed)
    layer = SelfAttention2d(size, d_k, d_v, heads).double()
    x = torch.randn(batch, size, height, width).double().requires_grad_()
    expected, weights = reference(layer, x)
    attention = layer.attention_weights(x.flatten(2).mT)
    torch.testing.assert_close(attention, weights, rtol=0, atol=1e-12)
    assert_same(layer(x), expected, [x, *layer.parameters()], 1e-12)


def test_defaults_and_attributes_are_those_of_the_course():
    layer = SelfAttention2d()
    assert (layer.embed_dim, layer.num_heads) == (256, 8)
    assert {name for name, _ in layer.named_children()} == {"q", "k", "v", "out"}
    for linear in layer.children():
        assert linear.weight.shape == (256, 256)
        assert linear.bias is None


def test_a_failing_unit_test_has_its_line_and_the_others_theirs(capsys):
    def test_wrong(device):
        raise ValueError("no")

    def test_fine(device):
        return "yes"

    with pytest.raises(AssertionError, match="failed unit tests: wrong"):
        run_unit_tests(test_wrong, test_fine)
    assert (
        capsys.readouterr().out == "FAILED  wrong: ValueError: no\npassed  fine: yes\n"
    )
