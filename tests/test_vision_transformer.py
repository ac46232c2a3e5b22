"""Task 2 against references that share no code with it."""

import itertools
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from small_run import alive, small_model
from test_attention import assert_same, many, seeds, small
from torch.nn import functional as F

from support.training import QuickDropout, use_quick_dropout
from vision_transformer import FeedForwardBlock, VisionTransformer


def reference(model, x, n_heads):
    """Eq. 1 to 4 of Dosovitskiy et al. (2021), from the parameters alone."""
    p, state = model.patch_size, dict(model.named_parameters())
    rows, columns = x.shape[2] // p, x.shape[3] // p
    positions = state["position_embedding"][0]
    tokens = [(state["class_token"][0, 0] + positions[0]).expand(len(x), -1)]
    for i in range(rows):
        for j in range(columns):
            patch = x[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p]
            flat = patch.permute(0, 2, 3, 1).flatten(1)
            weight, bias = (state[f"patch_embedding.{k}"] for k in ("weight", "bias"))
            tokens.append(flat @ weight.T + bias + positions[1 + i * columns + j])
    z = torch.stack(tokens, dim=1)
    shape, size = z.shape[-1:], z.shape[-1] // n_heads
    for number in range(len(model.blocks)):

        def get(name, number=number):
            return state[f"blocks.{number}.{name}"]

        inner = "attention.inner_module"
        y = F.layer_norm(z, shape, get(f"{inner}.0.weight"), get(f"{inner}.0.bias"))
        heads = []
        for h in range(n_heads):
            part = slice(h * size, (h + 1) * size)
            q, k, v = (y @ get(f"{inner}.1.{m}.weight")[part].T for m in "qkv")
            logits = torch.einsum("bid,bjd->bij", q, k) / math.sqrt(size)
            heads.append(torch.softmax(logits, -1) @ v)
        z = z + torch.cat(heads, -1) @ get(f"{inner}.1.out.weight").T
        inner = "feed_forward.inner_module"
        y = F.layer_norm(z, shape, get(f"{inner}.0.weight"), get(f"{inner}.0.bias"))
        layers = f"{inner}.1.layers"
        y = F.gelu(y @ get(f"{layers}.0.weight").T + get(f"{layers}.0.bias"))
        z = z + y @ get(f"{layers}.3.weight").T + get(f"{layers}.3.bias")
    final = F.layer_norm(z[:, 0], shape, state["norm.weight"], state["norm.bias"])
    return final @ state["head.weight"].T + state["head.bias"]


@pytest.mark.fault("properties")
@many
@given(small, small, small, small, small, small, small, st.integers(0, 3), seeds)
@example(2, 3, 4, 3, 5, 4, 28, 3, 0)
def test_values_and_gradients_agree_with_a_plain_float64_reference(
    channels, patch, rows, layers, heads, dim, mlp, batch, seed
):
    image = {"in_channels": channels, "patch_size": patch, "image_size": rows * patch}
    sizes = {"layers": layers, "hidden_size": heads * dim, "mlp_size": mlp}
    model = small_model(seed, n_heads=heads, num_classes=7, **image, **sizes)
    model = alive(model).double().eval()
    x = torch.randn(batch, channels, rows * patch, rows * patch).double()
    assert_same(model(x), reference(model, x, heads), [*model.parameters()], 1e-10)


def test_patches_start_as_products_of_cosines():
    model = VisionTransformer()
    rows = model.patch_embedding.weight.view(256, 4, 4, 3).double()

    def cosine(k, n, i):
        scale = math.sqrt((2 if k else 1) / n)
        return scale * math.cos(math.pi * k * (i + 0.5) / n)

    for number, (u, v, c) in enumerate(itertools.product(range(4), range(4), range(3))):
        gain = 0.65 * (1 + 2 * math.hypot(u, v)) * (1 + 2 * c)
        for y, x, channel in itertools.product(range(4), range(4), range(3)):
            value = gain * cosine(u, 4, y) * cosine(v, 4, x) * cosine(c, 3, channel)
            assert rows[number, y, x, channel].item() == pytest.approx(value, abs=1e-5)
    assert torch.equal(rows[48:], rows[:208])


def test_positions_start_as_standard_normal_and_blocks_as_the_identity():
    torch.manual_seed(0)
    model = VisionTransformer()
    position = model.position_embedding
    assert abs(position.mean().item()) < 0.03
    assert abs(position.std().item() - 1) < 0.03
    assert abs(model.class_token).max() == 0
    tokens = torch.randn(2, 65, 256)
    for block in model.blocks:
        assert torch.equal(block(tokens), tokens)


SHARES = (0.0, 0.1, 0.2, 0.5, 0.9, 1 - 1e-9, 1.0)
OTHER_TYPES = (torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.fault("numerics")
@pytest.mark.parametrize(
    ("p", "dtype"),
    [*((p, torch.float32) for p in SHARES), *((0.2, kind) for kind in OTHER_TYPES)],
)
def test_dropout_keeps_the_mean_and_the_type_and_drops_the_share(p, dtype):
    torch.manual_seed(0)
    model = FeedForwardBlock(8, 8, p)
    use_quick_dropout(model)
    dropout = model.layers[2]
    x = torch.ones(1000, 1000, dtype=dtype, requires_grad=True)
    y = dropout(x)
    y.sum().backward()
    assert torch.equal(y, x.grad), "the mask acts on the gradient alike"
    assert y.dtype == dtype
    kept = (y != 0).double().mean().item()
    sigma = math.sqrt(p * (1 - p) / x.numel())
    assert abs(kept - (1 - p)) <= 5 * sigma
    assert torch.equal(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - p or 1)))
    assert torch.equal(dropout.eval()(x), x)


def test_quick_dropout_leaves_the_weights_and_drops_what_overflows():
    model = small_model()
    names = list(model.state_dict())
    use_quick_dropout(model.eval())
    assert list(model.state_dict()) == names
    assert not any(module.training for module in model.modules())
    dropout = QuickDropout(0.5)
    y = dropout(torch.full((1000,), 1e38))
    assert set(y.tolist()) == {0.0, torch.tensor(2e38).item()}
    assert not dropout(torch.full((1000,), 3e38)).isnan().any()
