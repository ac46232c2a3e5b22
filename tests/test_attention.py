"""Task 1 against references that share no code with it."""

import math

import pytest
import torch

from attention import SelfAttention2d, check_against_torch
from figures import errors_against_torch

# All sizes differ, so that no mix-up of two of them can go unnoticed
ODD = {"embed_dim": 14, "head_dim": 5, "value_dim": 3, "num_heads": 4}
B, H, W = 2, 6, 7


def odd_layer():
    torch.manual_seed(0)
    return SelfAttention2d(**ODD).double()


def odd_grid():
    generator = torch.Generator().manual_seed(1)
    shape = (B, ODD["embed_dim"], H, W)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def reference(layer, x):
    """Eq. 1 and 2, with a loop over images, heads and tokens."""
    d_k, d_v = layer.head_dim, layer.value_dim
    output = torch.zeros_like(x)
    weights = x.new_zeros(len(x), layer.num_heads, H * W, H * W)
    for b in range(len(x)):
        tokens = [x[b, :, i, j] for i in range(H) for j in range(W)]
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
        output[b] = merged.T.reshape(-1, H, W)
    return output, weights


def test_agrees_with_a_plain_float64_reference():
    layer, x = odd_layer(), odd_grid()
    output, weights = layer(x, need_weights=True)
    expected, expected_weights = reference(layer, x)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-12)


def test_gradients_agree_with_the_reference():
    layer, x = odd_layer(), odd_grid().requires_grad_()
    inputs = [x, *layer.parameters()]
    probe = torch.randn(x.shape, dtype=x.dtype)
    ours = torch.autograd.grad((layer(x) * probe).sum(), inputs)
    theirs = torch.autograd.grad((reference(layer, x)[0] * probe).sum(), inputs)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sizes", [(256, 256, 256, 1), (256, 32, 32, 8)])
def test_agrees_with_torch_in_float64(sizes):
    torch.manual_seed(0)
    errors = errors_against_torch(
        SelfAttention2d(*sizes), torch.randn(2, 256, 5, 7), torch.float64
    )
    assert max(errors.values()) < 1e-10, errors


def test_the_inline_test_notices_a_wrong_layer():
    class Unscaled(SelfAttention2d):
        def forward(self, x, need_weights=False):
            with torch.no_grad():
                self.q.weight.mul_(math.sqrt(self.head_dim))
            result = super().forward(x, need_weights)
            with torch.no_grad():
                self.q.weight.div_(math.sqrt(self.head_dim))
            return result

    torch.manual_seed(0)
    with pytest.raises(AssertionError, match="scaling"):
        check_against_torch(Unscaled(), torch.device("cpu"))


def test_defaults_and_attributes_are_those_of_the_course():
    layer = SelfAttention2d()
    assert (layer.embed_dim, layer.num_heads) == (256, 8)
    assert {name for name, _ in layer.named_children()} == {"q", "k", "v", "out"}
    for linear in layer.children():
        assert linear.weight.shape == (256, 256)
        assert linear.bias is None
    odd = SelfAttention2d(**ODD)
    assert odd.q.weight.shape == (20, 14)
    assert odd.v.weight.shape == (12, 14)
    assert odd.out.weight.shape == (14, 12)


def test_returns_weights_only_when_asked():
    layer, x = odd_layer(), odd_grid()
    output, weights = layer(x, need_weights=True)
    assert torch.equal(layer(x), output)
    assert output.shape == x.shape
    assert weights.shape == (B, ODD["num_heads"], H * W, H * W)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_an_empty_batch_gives_an_empty_result():
    output, weights = odd_layer()(odd_grid()[:0], need_weights=True)
    assert output.shape == (0, ODD["embed_dim"], H, W)
    assert weights.shape == (0, ODD["num_heads"], H * W, H * W)
