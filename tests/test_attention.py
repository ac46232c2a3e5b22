"""Task 1 against references that share no code with it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import SelfAttention2d, torch_attention

small = st.integers(1, 5)
seeds = st.integers(0, 2**31)
# The same examples every time: the tests are deterministic
many = settings(max_examples=60, deadline=None, derandomize=True, database=None)


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
                logits = keys @ (w_q @ token) / math.sqrt(d_k)
                exps = torch.exp(logits - logits.max())
                row = exps / exps.sum()
                weights[b, h, n] = row.detach()
                rows.append(row @ values)
            heads.append(torch.stack(rows))
        merged = torch.cat(heads, dim=1) @ layer.out.weight.T
        output[b] = merged.T.reshape(-1, height, width)
    return output, weights


def assert_is_reference(layer, x):
    output, weights = layer(x), layer.attention_weights(x.flatten(2).mT)
    expected, expected_weights = reference(layer, x)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-12)


def test_values_and_gradients_agree_with_a_plain_float64_reference():
    torch.manual_seed(0)
    # All sizes differ, so that no mix-up of two of them can go unnoticed
    layer = SelfAttention2d(embed_dim=14, head_dim=5, value_dim=3, num_heads=4).double()
    x = torch.randn(2, 14, 6, 7, dtype=torch.float64, requires_grad=True)
    assert_is_reference(layer, x)
    inputs = [x, *layer.parameters()]
    probe = torch.randn(x.shape, dtype=x.dtype)
    ours = torch.autograd.grad((layer(x) * probe).sum(), inputs)
    theirs = torch.autograd.grad((reference(layer, x)[0] * probe).sum(), inputs)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=1e-10)


@pytest.mark.fault("properties")
@many
@given(small, small, small, small, st.integers(0, 3), small, small, seeds)
def test_layers_of_any_sizes_do(size, d_k, d_v, heads, batch, height, width, seed):
    torch.manual_seed(seed)
    layer = SelfAttention2d(size, d_k, d_v, heads).double()
    assert_is_reference(layer, torch.randn(batch, size, height, width).double())


@pytest.mark.parametrize("sizes", [(256, 256, 256, 1), (256, 32, 32, 8)])
def test_agrees_with_torch_in_float64(sizes):
    torch.manual_seed(0)
    layer = SelfAttention2d(*sizes).double()
    x = torch.randn(2, 256, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), torch_attention(layer, x), rtol=0, atol=1e-12)


def test_defaults_and_attributes_are_those_of_the_course():
    layer = SelfAttention2d()
    assert (layer.embed_dim, layer.num_heads) == (256, 8)
    assert {name for name, _ in layer.named_children()} == {"q", "k", "v", "out"}
    for linear in layer.children():
        assert linear.weight.shape == (256, 256)
        assert linear.bias is None
