"""The graded classes do what every ordinary module does, as PyTorch's own do."""

import copy

import pytest
import torch
from small_run import alive, small_model
from torch import nn

from attention import SelfAttention2d
from vision_transformer import SelfAttentionTransformerBlock


class TorchAttention2d(nn.Module):
    """``nn.MultiheadAttention`` on a grid."""

    def __init__(self):
        super().__init__()
        self.layer = nn.MultiheadAttention(32, 4, bias=False, batch_first=True)

    def forward(self, x):
        tokens = x.flatten(2).mT
        return self.layer(tokens, tokens, tokens)[0].mT.unflatten(2, x.shape[2:])


MODULES = {
    "attention": (lambda: SelfAttention2d(32, 8, 8, 4), (32, 5, 6)),
    "block": (lambda: alive(SelfAttentionTransformerBlock(32, 48, 4, 0.2)), (7, 32)),
    "model": (lambda: alive(small_model()), (3, 32, 32)),
    "torch attention": (TorchAttention2d, (32, 5, 6)),
    "torch block": (
        lambda: nn.TransformerEncoderLayer(
            32, 4, 48, 0.2, "gelu", batch_first=True, norm_first=True
        ),
        (7, 32),
    ),
}


def make(name):
    torch.manual_seed(0)
    module, shape = MODULES[name]
    return module(), torch.randn(4, *shape)


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
    unused = parts.keys() - called
    # nn.MultiheadAttention reads the weights of its last layer instead of calling it
    assert all(name.endswith("out_proj") for name in unused), unused


def vmap(model, x):
    names = [name for name, _ in model.named_parameters()]
    values = tuple(model.parameters())

    def loss(values, image):
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(model, parameters, (image[None],)).sum()

    gradients = torch.func.vmap(
        torch.func.grad(loss), in_dims=(None, 0), randomness="different"
    )(values, x)
    if not model.training:
        expected = torch.autograd.grad(model(x).sum(), values)
        for each, whole in zip(gradients, expected, strict=True):
            torch.testing.assert_close(each.sum(0), whole, rtol=1e-3, atol=1e-4)


def export(model, x):
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    again = torch.cat([x, x, x])
    same(model, exported.module()(again), model(again))


def trace(model, x):
    traced = torch.jit.trace(model, x, check_trace=False)
    again = torch.cat([x, x, x])
    same(model, traced(again), model(again))


def compiled(model, x):
    torch._dynamo.reset()
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    same(model, whole(x), model(x), rtol=1e-4, atol=1e-5)


def copied(model, x):
    same(model, copy.deepcopy(model)(x), model(x))


def layout(model, x):
    view = torch.stack([x, x], -1)[..., 0]
    assert not view.is_contiguous()
    same(model, model(view), model(x))


def precision(dtype, tolerance):
    def check(model, x):
        expected = model(x)
        output = model.to(dtype)(x.to(dtype))
        assert output.dtype == dtype
        same(model, output.float(), expected, rtol=tolerance, atol=tolerance)

    return check


def meta(model, x):
    assert model.to("meta")(x.to("meta")).shape == model.to_empty(device="cpu")(x).shape


CHECKS = {
    "hooks": hooks,
    "vmap": vmap,
    "export": export,
    "trace": trace,
    "compile": compiled,
    "deepcopy": copied,
    "memory layout": layout,
    "half": precision(torch.float16, 2e-2),
    "bfloat16": precision(torch.bfloat16, 1e-1),
    "double": precision(torch.float64, 1e-4),
    "meta": meta,
}


VERSION = tuple(map(int, torch.__version__.split(".")[:2]))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.filterwarnings("ignore")
def test_does_what_any_module_does(check, name, mode):
    if VERSION < (2, 4) and check in ("half", "vmap", "export"):
        pytest.skip("not for all of torch's own before 2.4")
    model, x = make(name)
    CHECKS[check](model.train(mode == "train"), x)


@pytest.mark.fault("numerics")
def test_large_logits_stay_finite():
    layer = SelfAttention2d(32, 8, 8, 4)
    torch.nn.init.normal_(layer.q.weight, std=1e4)
    x = torch.randn(2, 32, 5, 6, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    for values in (out, x.grad, layer.q.weight.grad):
        assert values.isfinite().all()
