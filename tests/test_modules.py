"""The graded classes do what every ordinary module does, in every number format."""

import copy
import io

import pytest
import torch
from small_run import alive, small_model
from torch import nn

from attention import SelfAttention2d
from vision_transformer import SelfAttentionTransformerBlock

MODULES = {
    "attention": (lambda: SelfAttention2d(32, 8, 8, 4), (32, 5, 6)),
    "block": (lambda: alive(SelfAttentionTransformerBlock(32, 48, 4, 0.2)), (7, 32)),
    "model": (lambda: alive(small_model()), (3, 32, 32)),
}


@pytest.fixture(params=MODULES)
def made(request):
    """A module and its input, always the same."""
    torch.manual_seed(0)
    make, shape = MODULES[request.param]
    return make(), torch.randn(4, *shape)


# --- What others do with modules ------------------------------------------------------


def same(model, one, other, **tolerance):
    """Compare outputs; dropout makes those of training mode differ."""
    assert one.shape == other.shape
    assert one.isfinite().all()
    if not model.training:
        torch.testing.assert_close(one, other, **tolerance)


def hooks(model, x):
    parts = {n: m for n, m in model.named_modules() if type(m) is not nn.ModuleList}
    called = set()
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: called.add(name))
    model(x)
    assert called == parts.keys()


def compiled(model, x):
    torch._dynamo.reset()
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = both(whole, x), both(model, x)
    for one, other in zip(*outputs, strict=True):
        same(model, one, other, rtol=1e-4, atol=1e-5)


def saved(model, x):
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    same(model, torch.load(buffer, weights_only=False)(x), model(x))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("check", [hooks, compiled, saved])
def test_does_what_any_module_does(made, check, mode):
    model, x = made
    check(model.train(mode == "train"), x)


# --- Numerics -------------------------------------------------------------------------


def both(module, x):
    """Return output, gradient of the input and of the first weight."""
    x = x.detach().clone().requires_grad_()
    weight = next(module.parameters())
    out = module(x)
    probe = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
    return out, *torch.autograd.grad((out * probe).sum(), [x, weight])


def assert_exact(values, module, x, rtol):
    """Assert that outputs and gradients are near those computed in float64."""
    exact = both(copy.deepcopy(module).double(), x.double())
    for value, expected in zip(values, exact, strict=True):
        assert value.isfinite().all()
        error = (value.double() - expected).norm()
        # A single token has no other to look at: the gradient of its query is zero
        assert error <= rtol * expected.norm() + 1e-6, f"{error:.1e}"


@pytest.mark.fault("numerics")
@pytest.mark.parametrize(
    ("dtype", "is_automatic", "rtol"),
    [
        (torch.float16, False, 1e-2),
        (torch.bfloat16, False, 5e-2),
        (torch.bfloat16, True, 5e-2),
    ],
)
def test_half_precision(made, dtype, is_automatic, rtol):
    module, x = made[0].eval(), made[1]
    if not is_automatic:
        module, x = module.to(dtype), x.to(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=is_automatic):
        values = both(module, x)
    assert_exact(values, module, x, rtol)


@pytest.mark.fault("numerics")
def test_any_memory_layout(made):
    module, x = made[0].eval(), made[1]
    for view in (
        x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([x, x], -1)[..., 0],
    ):
        assert not view.is_contiguous()
        assert_exact(both(module, view), module, view, 1e-5)


@pytest.mark.fault("numerics")
def test_large_logits_stay_finite():
    layer = SelfAttention2d(32, 8, 8, 4)
    torch.nn.init.normal_(layer.q.weight, std=1e4)
    values = both(layer, torch.randn(2, 32, 5, 6))
    assert all(value.isfinite().all() for value in values)
