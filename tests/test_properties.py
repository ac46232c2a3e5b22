"""Identities that hold for any sizes: found wrong by hypothesis, if they are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import SelfAttention, SelfAttention2d
from vision_transformer import (
    SelfAttentionTransformerBlock,
    VisionTransformer,
)

pytestmark = pytest.mark.fault("properties")
small = st.integers(1, 5)
seeds = st.integers(0, 2**31)
# The same examples every time: the tests are deterministic
many = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def layers(draw, kind=SelfAttention):
    """A float64 layer with sizes of which no two need agree."""
    torch.manual_seed(draw(seeds))
    return kind(draw(small), draw(small), draw(small), draw(small)).double()


@st.composite
def with_tokens(draw):
    layer = draw(layers())
    return layer, torch.randn(draw(small), draw(small), layer.embed_dim).double()


@many
@given(with_tokens())
def test_rows_sum_to_one(case):
    layer, x = case
    out, weights = layer(x, need_weights=True)
    assert out.shape == x.shape
    assert weights.shape == (len(x), layer.num_heads, x.shape[1], x.shape[1])
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


@many
@given(with_tokens(), st.randoms(use_true_random=False))
def test_permuted_tokens_give_permuted_outputs(case, random):
    layer, x = case
    order = list(range(x.shape[1]))
    random.shuffle(order)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


@many
@given(with_tokens())
def test_one_token_returns_its_value(case):
    layer, x = case
    x = x[:, :1]
    torch.testing.assert_close(layer(x), layer.out(layer.v(x)))


@many
@given(with_tokens(), st.floats(-100, 100))
def test_scaled_values_scale_the_output(case, scale):
    layer, x = case
    before = layer(x)
    with torch.no_grad():
        layer.v.weight.mul_(scale)
    torch.testing.assert_close(layer(x), scale * before)


@many
@given(layers(SelfAttention2d), small, small, small, seeds)
def test_a_grid_is_its_flattened_tokens(layer, batch, height, width, seed):
    torch.manual_seed(seed)
    x = torch.randn(batch, layer.embed_dim, height, width).double()
    sequence = SelfAttention(
        layer.embed_dim, layer.head_dim, layer.value_dim, layer.num_heads
    ).double()
    sequence.load_state_dict(layer.state_dict())
    tokens = sequence(x.flatten(2).transpose(1, 2))
    torch.testing.assert_close(layer(x), tokens.transpose(1, 2).reshape(x.shape))


@many
@given(with_tokens(), seeds)
def test_images_of_a_batch_do_not_see_each_other(case, seed):
    layer, x = case
    other = torch.randn(1, *x.shape[1:], generator=torch.Generator().manual_seed(seed))
    together = layer(torch.cat([x, other.double()]))[: len(x)]
    torch.testing.assert_close(together, layer(x))


@many
@given(with_tokens(), small)
def test_keeping_fewer_tokens_gives_the_first_rows(case, keep):
    layer, x = case
    out, weights = layer(x, need_weights=True)
    first, first_weights = layer(x, keep, need_weights=True)
    torch.testing.assert_close(first, out[:, :keep])
    torch.testing.assert_close(first_weights, weights[:, :, :keep])


@many
@given(small, small, small, small, small, seeds)
def test_a_block_keeps_its_first_tokens(heads, dim, length, batch, keep, seed):
    torch.manual_seed(seed)
    block = SelfAttentionTransformerBlock(heads * dim, 3, heads, 0.0).double()
    x = torch.randn(batch, length, heads * dim).double()
    torch.testing.assert_close(block(x, keep), block(x)[:, :keep])


@many
@given(small, small, small, small, seeds)
def test_tokens_are_patches_row_by_row(batch, channels, rows, patch, seed):
    torch.manual_seed(seed)
    sizes = {"layers": 1, "hidden_size": 4, "mlp_size": 3, "n_heads": 2}
    model = VisionTransformer(channels, patch, rows * patch, **sizes).double()
    x = torch.randn(batch, channels, rows * patch, rows * patch).double()
    tokens = model.patchify(x)
    assert tokens.shape == (batch, rows * rows, 4)
    for i in range(rows):
        for j in range(rows):
            here = x[..., i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            expected = model.patch_embedding(here.permute(0, 2, 3, 1).flatten(1))
            expected = expected + model.position_embedding[:, i * rows + j]
            torch.testing.assert_close(tokens[:, i * rows + j], expected)
