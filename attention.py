# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,-all
#     formats: ipynb,py:percent
#     notebook_metadata_filter: -jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Task 1: Self-Attention
#
# Every token of a 2d grid looks at every other token of the grid and collects what
# it finds there. This notebook builds that operation, multi-head self-attention,
# from linear layers, a softmax and matrix products, checks it against PyTorch's own
# layer, and looks at what it does and what it costs.
#
# | step of the exercise | points | where |
# |---|---|---|
# | the modules in `__init__` | 1 | `SelfAttention.__init__` |
# | one head, `num_heads=1` | 3 | `SelfAttention.forward`, test *single head* |
# | several heads | 2 | `SelfAttention.forward`, test *multi-head* |

# %% [markdown]
# ## The equations
#
# A head compares a query with every key and averages the values with the weights
# that come out (Eq. 1 of [Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)):
#
# $$\operatorname{Attention}(Q, K, V) =
#   \operatorname{softmax}\left(\frac{Q K^T}{\sqrt{d_k}}\right) V$$
#
# Multi-head attention lets $h$ heads do so side by side, each in a projection of its
# own, and mixes their results with one more linear map (their Section 3.2.2):
#
# $$\begin{aligned}
#   \operatorname{MultiHead}(Q, K, V) &=
#   \operatorname{Concat}(\mathrm{head}_1, \dots, \mathrm{head}_h) W^O, \\
#   \mathrm{head}_i &= \operatorname{Attention}(Q W_i^Q, K W_i^K, V W_i^V)
#   \end{aligned}$$
#
# In *self*-attention queries, keys and values are all computed from the same tokens,
# here the $L = H \cdot W$ tokens of a grid.
#
# | symbol | shape | in the code |
# |---|---|---|
# | $B$ |  | images in the batch |
# | $H, W$; $L = HW$ |  | rows and columns of the grid; number of tokens |
# | $D$ |  | `embed_dim`, size of a token |
# | $h$ |  | `num_heads` |
# | $d_k, d_v$ |  | `head_dim`, `value_dim`: size of a query or key, of a value |
# | $W^Q = [W_1^Q \dots W_h^Q]$ | $D \times h d_k$ | `q.weight`, transposed |
# | $W^K$ | $D \times h d_k$ | `k.weight`, transposed |
# | $W^V$ | $D \times h d_v$ | `v.weight`, transposed |
# | $W^O$ | $h d_v \times D$ | `out.weight`, transposed |

# %% [markdown]
# ## Imports and device

# %%
"""Multi-head self-attention on token sequences and on 2d grids of tokens (Task 1).

``SelfAttention`` works on sequences (B, L, D), ``SelfAttention2d`` on grids
(B, D, H, W). Importing this file only defines; run as a script, it tests itself:

    python attention.py

The file is the paired script of ``attention.ipynb``. Cells tagged ``active-ipynb``
run in the notebook only and are commented out here.
"""

import copy
import math
import time

import torch
from einops import rearrange
from torch import nn


def choose_device():
    """Return the ``torch.device`` to compute on: MPS, else CUDA, else the CPU."""
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# %% tags=["active-ipynb"]
# import matplotlib.pyplot as plt
#
# %config InlineBackend.figure_formats = ["svg", "png"]
# plt.rcParams["font.size"] = 9  # as the captions of the report
# device = choose_device()
# print(f"torch {torch.__version__} on {device}")

# %% [markdown]
# ## The layer
#
# `SelfAttention` is the operation on a sequence of tokens, which the Vision
# Transformer of Task 2 uses too; `SelfAttention2d` reads a grid row by row into such
# a sequence and puts the result back. Head $i$ owns slice $i$ of the features of
# `q`, `k` and `v`, so splitting the heads apart is a reshape and no loop over
# heads, tokens or images is needed. The queries are divided by $\sqrt{d_k}$ before
# the product: the same numbers as dividing the logits, with fewer divisions, since
# there are $d_k$ query entries but $L$ logits per token and head.


# %%
def check_sizes(**sizes):
    """Refuse sizes that are not positive integers.

    Args:
        **sizes: the arguments to check, by name.

    Raises:
        TypeError: a size is not an ``int``.
        ValueError: a size is smaller than 1.
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(
                f"{name} must be an int, got {size!r} ({type(size).__name__})"
            )
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def check_input(x, names, **expected):
    """Refuse an input that is no floating-point tensor of the expected shape.

    Args:
        x: the input.
        names: the axes, separated by spaces, e.g. ``"B L D"``.
        **expected: the sizes that are fixed, by axis name, e.g. ``D=256``.

    Raises:
        TypeError: ``x`` is no tensor or not of a floating-point type.
        ValueError: the number of axes or the size of one of them is wrong.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"the input must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"the input must be floating-point, got {x.dtype}")
    axes = names.split()
    shape = ", ".join(str(expected.get(axis, axis)) for axis in axes)
    sizes = dict(zip(axes, x.shape))
    fits = all(sizes.get(axis) == size for axis, size in expected.items())
    if x.ndim != len(axes) or not fits:
        raise ValueError(
            f"the input must have shape ({names.replace(' ', ', ')}) = ({shape}), "
            f"got {tuple(x.shape)}"
        )


class SelfAttention(nn.Module):
    """Multi-head self-attention on sequences of tokens.

    Vaswani et al. (2017), "Attention Is All You Need", Eq. 1 and Section 3.2.2.
    All projections are bias-free. The layout of the heads is that of
    ``nn.MultiheadAttention``: head i owns features ``[i * head_dim, (i + 1) *
    head_dim)`` of queries and keys, and likewise with ``value_dim`` of the values.

    Args:
        embed_dim: size D of a token, at input and output.
        head_dim: size d_k of a query and of a key, per head.
        value_dim: size d_v of a value, per head.
        num_heads: number of heads h.

    Raises:
        TypeError: an argument is not an ``int``.
        ValueError: an argument is smaller than 1.
    """

    def __init__(self, embed_dim=256, head_dim=32, value_dim=32, num_heads=8):
        super().__init__()
        check_sizes(
            embed_dim=embed_dim,
            head_dim=head_dim,
            value_dim=value_dim,
            num_heads=num_heads,
        )
        self.embed_dim = embed_dim
        self.head_dim = head_dim
        self.value_dim = value_dim
        self.num_heads = num_heads

        self.q = nn.Linear(embed_dim, num_heads * head_dim, bias=False)  # W^Q
        self.k = nn.Linear(embed_dim, num_heads * head_dim, bias=False)  # W^K
        self.v = nn.Linear(embed_dim, num_heads * value_dim, bias=False)  # W^V
        self.out = nn.Linear(num_heads * value_dim, embed_dim, bias=False)  # W^O

    def forward(self, x, need_weights=False, num_queries=None):
        """Let every token attend to all tokens of its sequence.

        Args:
            x: tokens, (B, L, D), floating-point.
            need_weights: also return the attention weights.
            num_queries: let only the first tokens ask, this many; by default all L.

        Returns:
            The attended tokens, (B, L, D); with ``need_weights`` a pair of these and
            the weights, (B, num_heads, L, L), each row of which sums to 1. With
            ``num_queries`` only the first rows of both.

        Raises:
            TypeError: ``x`` is no floating-point tensor.
            ValueError: ``x`` is not of shape (B, L, embed_dim).
        """
        check_input(x, "B L D", D=self.embed_dim)

        # Project, and give each head its slice of the features
        if num_queries is None:
            q, k, v = self._project(x, self.q, self.k, self.v)
        else:
            q = self.q(x[:, :num_queries])
            k, v = self._project(x, self.k, self.v)
        q = self._split_heads(q)  # (B, h, L, d_k)
        k = self._split_heads(k)  # (B, h, L, d_k)
        v = self._split_heads(v)  # (B, h, L, d_v)

        # Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V
        q = q / math.sqrt(self.head_dim)
        logits = q @ k.mT  # (B, h, L, d_k) x (B, h, d_k, L) -> (B, h, L, L)
        weights = logits.softmax(dim=-1)  # (B, h, L, L)
        heads = weights @ v  # (B, h, L, L) x (B, h, L, d_v) -> (B, h, L, d_v)

        # Concat(head_1, ..., head_h) W^O
        output = self.out(rearrange(heads, "B h L d -> B L (h d)"))  # (B, L, D)
        return (output, weights) if need_weights else output

    @staticmethod
    def _project(x, *layers):
        """Apply bias-free linear layers in one product, which reads ``x`` once."""
        stacked = torch.cat([layer.weight for layer in layers])
        sizes = [len(layer.weight) for layer in layers]
        return nn.functional.linear(x, stacked).split(sizes, dim=-1)

    def _split_heads(self, features):
        return rearrange(features, "B L (h d) -> B h L d", h=self.num_heads)


class SelfAttention2d(SelfAttention):
    """Multi-head self-attention on a 2d grid of tokens.

    Every token attends to all H * W tokens. Arguments and errors are those of
    ``SelfAttention``.
    """

    def forward(self, x, need_weights=False):
        """Let every token attend to all tokens of its grid.

        Args:
            x: grid of tokens, (B, D, H, W), floating-point.
            need_weights: also return the attention weights.

        Returns:
            The attended grid, (B, D, H, W); with ``need_weights`` a pair of this and
            the weights, (B, num_heads, L, L) with L = H * W tokens in row-major order.

        Raises:
            TypeError: ``x`` is no floating-point tensor.
            ValueError: ``x`` is not of shape (B, embed_dim, H, W).
        """
        check_input(x, "B D H W", D=self.embed_dim)
        height = x.shape[2]
        tokens = rearrange(x, "B D H W -> B (H W) D")
        output, weights = super().forward(tokens, need_weights=True)
        output = rearrange(output, "B (H W) D -> B D H W", H=height)
        return (output, weights) if need_weights else output


# %% [markdown]
# ## Unit tests
#
# The layer's weights are copied into `nn.MultiheadAttention`, which must then return
# the same tokens: once with a single head as large as the token, once with the eight
# heads of the defaults. A missing scaling, heads merged in the wrong order or a
# transposed weight all show up here, although they leave every shape intact.


# %% tags=["appendix"]
def torch_twin(layer):
    """Return an ``nn.MultiheadAttention`` that holds the weights of ``layer``.

    Args:
        layer: a ``SelfAttention`` (or ``SelfAttention2d``) whose heads fill the
            token: num_heads * head_dim = num_heads * value_dim = embed_dim, the only
            sizes that PyTorch's layer knows.
    """
    twin = nn.MultiheadAttention(
        layer.embed_dim, layer.num_heads, bias=False, batch_first=True
    ).to(layer.q.weight)
    stacked = torch.cat([layer.q.weight, layer.k.weight, layer.v.weight])
    with torch.no_grad():
        twin.in_proj_weight.copy_(stacked)
        twin.out_proj.weight.copy_(layer.out.weight)
    return twin


def outputs_beside_torch(layer, x):
    """Apply a 2d layer and its PyTorch twin to one grid.

    Args:
        layer: a ``SelfAttention2d`` that ``torch_twin`` accepts.
        x: grid of tokens, (B, D, H, W).

    Returns:
        Two pairs (output, weights), ours and PyTorch's: outputs (B, D, H, W), weights
        (B, num_heads, L, L).
    """
    tokens = rearrange(x, "B D H W -> B (H W) D")
    output, weights = torch_twin(layer)(
        tokens, tokens, tokens, need_weights=True, average_attn_weights=False
    )
    output = rearrange(output, "B (H W) D -> B D H W", H=x.shape[2])
    return layer(x, need_weights=True), (output, weights)


@torch.no_grad()
def check_against_torch(layer, device):
    """Assert that ``layer`` agrees with PyTorch; return the evidence as a sentence."""
    layer = layer.to(device)
    x = torch.randn(4, layer.embed_dim, 24, 24, device=device)
    (ours, _), (theirs, _) = outputs_beside_torch(layer, x)
    error = (ours - theirs).abs().max().item()
    assert torch.allclose(ours, theirs, rtol=1e-2, atol=1e-5), (
        f"differs from nn.MultiheadAttention by up to {error:.1e}: is the scaling by "
        "1/sqrt(head_dim) there, and are the heads split and merged in order?"
    )
    if error == 0:
        return "the same bits as nn.MultiheadAttention"
    return f"at most {error:.1e} from nn.MultiheadAttention"


def test_single_head(device):
    """One head as wide as the token."""
    return check_against_torch(SelfAttention2d(256, 256, 256, 1), device)


def test_multi_head(device):
    """Eight heads: the defaults."""
    return check_against_torch(SelfAttention2d(), device)


def run_unit_tests(*tests, device=None):
    """Run tests, print one result line for each, and fail if one of them failed.

    Args:
        *tests: functions ``test_...(device)`` that return a short evidence string or
            raise.
        device: where to compute; by default the one of ``choose_device``.

    Raises:
        AssertionError: at least one test failed; the message names all that did.
    """
    device = device or choose_device()
    failed = []
    for test in tests:
        name = test.__name__[len("test_") :].replace("_", " ")
        torch.manual_seed(0)
        try:
            print(f"passed  {name}: {test(device)}")
        except Exception as error:  # the other tests still get their line
            failed.append(name)
            unexpected = not isinstance(error, AssertionError)
            kind = f"{type(error).__name__}: " if unexpected else ""
            print(f"FAILED  {name}: {kind}{error}")
    if failed:
        raise AssertionError("failed unit tests: " + ", ".join(failed))


# %%
if __name__ == "__main__":
    run_unit_tests(test_single_head, test_multi_head)

# %% [markdown]
# ## How exact is it?
#
# The tests above allow a relative error of one percent, as the exercise does. How far
# are the two implementations really apart? The table lists the largest absolute
# difference of outputs, attention weights and gradients (of the summed squares of the
# output, with respect to the input), in single and in double precision.


# %% tags=["appendix"]
def errors_against_torch(layer, x, dtype):
    """Return the largest absolute differences from PyTorch's layer.

    Args:
        layer: a ``SelfAttention2d`` that ``torch_twin`` accepts.
        x: grid of tokens, (B, D, H, W).
        dtype: the floating-point type to compute in.

    Returns:
        A dict with the keys ``output``, ``weights`` and ``gradient``.
    """
    layer = copy.deepcopy(layer).to(dtype)
    x = x.detach().to(dtype).requires_grad_()
    pairs = outputs_beside_torch(layer, x)
    (ours, our_weights), (theirs, their_weights) = pairs
    our_grad, their_grad = (
        torch.autograd.grad(output.square().sum(), x)[0] for output, _ in pairs
    )
    differences = {
        "output": ours - theirs,
        "weights": our_weights - their_weights,
        "gradient": our_grad - their_grad,
    }
    return {key: value.abs().max().item() for key, value in differences.items()}


# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# single_head = SelfAttention2d(256, 256, 256, 1)
# layers = {"single head": single_head, "8 heads": SelfAttention2d()}
# grid = torch.randn(4, 256, 24, 24)
# print(f"{'layer':<12} {'precision':<10} {'output':>9} {'weights':>9} {'gradient':>9}")
# for name, layer in layers.items():
#     for dtype in (torch.float32, torch.float64):
#         errors = errors_against_torch(layer, grid, dtype)
#         columns = " ".join(f"{error:9.1e}" for error in errors.values())
#         print(f"{name:<12} {str(dtype)[6:]:<10} {columns}")

# %% [markdown]
# A single head does the same operations in the same order, so nothing differs at all.
# With several heads, what is left is rounding: passing from 24 to 53 bits of
# significand shrinks the differences by eight to nine orders of magnitude, and a
# mistake in the mathematics would not shrink at all.

# %% [markdown]
# ## Why divide by $\sqrt{d_k}$?
#
# If the entries of a query and a key are independent, with mean 0 and variance 1,
# then their product is a sum of $d_k$ terms with mean 0 and variance 1:
#
# $$\operatorname{Var}(q \cdot k) = \sum_{i=1}^{d_k} \operatorname{Var}(q_i k_i) = d_k$$
#
# Without the division the logits grow with the size of the heads, the softmax turns
# into a maximum, and hardly any gradient passes through it. The measurement below
# draws queries and keys at random and looks at both: how far the logits scatter, and
# how many tokens a row of attention weights really spreads over, by its entropy
# $-\sum_j w_j \ln w_j$, which is $\ln L$ when all $L$ tokens count alike and 0 when
# only one does.


# %% tags=["appendix"]
def measure_scaling(head_dims, num_tokens=64, num_queries=4096):
    """Measure what the division by sqrt(d_k) does to logits and attention weights.

    Args:
        head_dims: the sizes d_k to try.
        num_tokens: keys L that each query is compared with.
        num_queries: queries to average over.

    Returns:
        A dict with the keys ``True`` (scaled) and ``False`` (not scaled); each holds
        two lists, one entry per size: the standard deviation of the logits, and the
        mean entropy of the attention weights, in nats.
    """
    generator = torch.Generator().manual_seed(0)
    measured = {True: ([], []), False: ([], [])}
    for head_dim in head_dims:
        q = torch.randn(num_queries, head_dim, generator=generator)
        k = torch.randn(num_tokens, head_dim, generator=generator)
        for scaled, (deviations, entropies) in measured.items():
            logits = q @ k.T / (math.sqrt(head_dim) if scaled else 1)
            log_weights = logits.log_softmax(dim=-1)
            entropy = -(log_weights.exp() * log_weights).sum(dim=-1)
            deviations.append(logits.std().item())
            entropies.append(entropy.mean().item())
    return measured


def plot_scaling(head_dims, measured, num_tokens=64):
    """Plot what ``measure_scaling`` found.

    Args:
        head_dims: the sizes d_k.
        measured: the result of ``measure_scaling``.
        num_tokens: keys L that each query was compared with.

    Returns:
        The matplotlib figure.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(6.4, 2.6), layout="constrained")
    curves = [
        (True, r"divided by $\sqrt{d_k}$", "o-", "#0072B2"),
        (False, "not divided", "s--", "#D55E00"),
    ]
    for scaled, label, style, color in curves:
        for ax, values in zip(axes, measured[scaled]):
            ax.plot(head_dims, values, style, color=color, label=label)
    law = [math.sqrt(head_dim) for head_dim in head_dims]
    axes[0].plot(head_dims, law, ":", color="0.3", label=r"law $\sqrt{d_k}$")
    axes[0].set(yscale="log", ylabel="standard deviation of the logits")
    even = math.log(num_tokens)
    axes[1].axhline(even, linestyle=":", color="0.3", label=r"even, $\ln L$")
    axes[1].set(ylabel="entropy of a row / nats", ylim=(0, 1.15 * even))
    for ax in axes:
        ax.set(xscale="log", xlabel="size of a head $d_k$")
        ax.set_xticks(head_dims, [str(head_dim) for head_dim in head_dims])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend()
    return figure


# %% tags=["active-ipynb"]
# head_dims = [4, 16, 64, 256, 1024]
# measured = measure_scaling(head_dims)
# plot_scaling(head_dims, measured);

# %% [markdown] tags=["caption"]
# **Figure.** Random queries and 64 random keys with and without the division by
# $\sqrt{d_k}$: standard deviation of the logits (left) and mean entropy of the
# attention weights of a query (right) against the size of a head.
# <!-- label: fig-scaling -->
# <!-- alt: Two plots against the size of a head from 4 to 1024. With the division the
# deviation of the logits stays at one and the entropy just below that of even
# weights; without it the deviation follows the square root law, and the entropy
# falls to nearly zero. -->

# %% [markdown]
# With the division, the logits scatter alike in heads of any
# size<!-- fig-scaling -->, so the size can be chosen freely. Without it, large heads
# attend to hardly more than a single token before anything is learned. Independence
# holds for random weights; the variance depends on how they are drawn (the default of
# `nn.Linear` makes it 1/3 instead of 1, so attention starts more evenly still), and
# trained heads are free to grow their logits.

# %% [markdown]
# ## What the heads look at
#
# A freshly initialised layer attends almost evenly. To see attention at work, the
# input below has visible structure, and the layer a purpose: the grid holds a disc, a
# bar and a background, the tokens of a region share one random direction, and the
# key projection is a copy of the query projection, so that two tokens match when they
# are alike. Nothing is trained here.


# %% tags=["appendix"]
def structured_grid(side=16, embed_dim=256, seed=0):
    """Make a grid of tokens with three regions.

    Args:
        side: rows and columns of the grid, H = W.
        embed_dim: size D of a token.
        seed: seed of the random directions and of the noise.

    Returns:
        Tokens, (1, D, side, side), and the region of each, (side, side): 0 for the
        background, 1 for the disc, 2 for the bar.
    """
    generator = torch.Generator().manual_seed(seed)
    row, column = torch.meshgrid(
        torch.arange(side) / side, torch.arange(side) / side, indexing="ij"
    )
    regions = torch.zeros(side, side, dtype=torch.long)
    regions[(row - 0.3) ** 2 + (column - 0.3) ** 2 < 0.05] = 1
    regions[(row > 0.65) & (row < 0.85) & (column > 0.2)] = 2
    directions = torch.randn(3, embed_dim, generator=generator)
    noise = 0.3 * torch.randn(side, side, embed_dim, generator=generator)
    tokens = directions[regions] + noise  # (H, W, D)
    return rearrange(tokens, "H W D -> 1 D H W"), regions


def plot_attention_maps(regions, weights, queries, heads):
    """Draw where chosen tokens look, as heat maps over the grid.

    Args:
        regions: (H, W), drawn beside the maps.
        weights: attention weights of one grid, (num_heads, L, L) with L = H * W.
        queries: the tokens that look, as (row, column) pairs: one row of maps each.
        heads: the heads to show, one column of maps each.

    Returns:
        The matplotlib figure.
    """
    import matplotlib.pyplot as plt

    height, width = regions.shape
    maps = rearrange(
        weights.detach().cpu(), "h (H W) (I J) -> h H W I J", H=height, I=height
    )
    figure, axes = plt.subplots(
        len(queries),
        len(heads) + 1,
        figsize=(1.4 * (len(heads) + 1) + 0.8, 1.5 * len(queries) + 0.3),
        squeeze=False,
        layout="constrained",
    )
    vmax = max(maps[head, i, j].max() for head in heads for i, j in queries).item()
    for axes_row, (i, j) in zip(axes, queries):
        axes_row[0].imshow(regions, cmap="Greys", vmax=3)
        axes_row[0].set_title("input regions", fontsize="medium")
        axes_row[0].set_ylabel("token row")
        for ax, head in zip(axes_row[1:], heads):
            drawn = ax.imshow(maps[head, i, j], cmap="viridis", vmin=0, vmax=vmax)
            ax.set_title(f"head {head + 1}", fontsize="medium")
        for ax in axes_row:
            ax.plot(j, i, "x", color="#D55E00", markersize=8, markeredgewidth=2)
            ax.set(xticks=[0, width - 1], yticks=[0, height - 1])
    for ax in axes[-1]:
        ax.set_xlabel("token column")
    figure.colorbar(drawn, ax=axes, label="attention weight", shrink=0.8)
    return figure


# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# layer = SelfAttention2d()
# with torch.no_grad():
#     layer.q.weight.mul_(2)  # sharper: the logits grow by a factor of four
#     layer.k.weight.copy_(layer.q.weight)
#     tokens, regions = structured_grid()
#     _, weights = layer(tokens, need_weights=True)
# plot_attention_maps(regions, weights[0], queries=[(4, 4), (12, 9)], heads=[0, 1, 2]);

# %% [markdown] tags=["caption"]
# **Figure.** Where two tokens look. Left: the input, with the querying token marked by
# a cross (top: in the disc, bottom: in the bar). Right: the attention weights that
# three of the eight heads give to all 256 tokens of the grid.
# <!-- label: fig-attention-maps -->
# <!-- alt: Two rows of heat maps over a 16 by 16 grid. The token in the disc gives
# nearly all of its weight to the tokens of the disc, the token in the bar to those of
# the bar; the three heads agree on the region and differ in how evenly they spread
# the weight inside it. -->

# %% [markdown]
# Each token finds the other tokens of its region<!-- fig-attention-maps --> wherever
# they are on the grid: attention compares content and knows nothing of distance. The
# heads differ because each compares the tokens in another 32-dimensional projection.

# %% [markdown]
# ## What it costs
#
# The logits are one number for every pair of tokens and every head, so time and
# memory contain a part that grows with $L^2$: doubling the side of the grid makes
# $L$ four times and the attention weights sixteen times as large. Measured below:
# the time of a forward pass, and the memory that it keeps for the backward pass.


# %% tags=["appendix"]
def saved_for_backward(layer, x):
    """Return the bytes that a forward pass of ``layer`` keeps for its backward pass.

    Parameters and the input are not counted; a tensor that is kept twice counts once.

    Args:
        layer: a module.
        x: its input.
    """
    free = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    free.add(x.untyped_storage().data_ptr())
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # The result keeps the graph, and so every saved tensor, alive until counted
        result = layer(x)
        total = sum(size for where, size in kept.items() if where not in free)
        del result
    return total


def measure_cost(sides, layer, repeats=5, seconds_at_least=0.3):
    """Measure a 2d layer on square grids of growing size, one image at a time.

    Args:
        sides: the sides H = W of the grids.
        layer: a ``SelfAttention2d``; it is measured on the device it lies on.
        repeats: forward passes per size at least, after one to warm up; the fastest
            counts, since whatever else the machine does can only add time.
        seconds_at_least: time spent on each size, in seconds, so that a disturbance
            does not catch all passes of a small one.

    Returns:
        Three lists: tokens per grid, seconds of a forward pass, bytes kept for the
        backward pass.
    """
    device = layer.q.weight.device
    tokens, seconds, kept = [], [], []
    for side in sides:
        x = torch.randn(1, layer.embed_dim, side, side, device=device)
        kept.append(saved_for_backward(layer, x))
        times = []
        with torch.no_grad():
            while len(times) <= repeats or sum(times) < seconds_at_least:
                start = time.perf_counter()
                layer(x).sum().item()  # reading a number waits for the device
                times.append(time.perf_counter() - start)
        tokens.append(side * side)
        seconds.append(min(times[1:]))
    return tokens, seconds, kept


def plot_cost(tokens, seconds, kept):
    """Plot time and memory of a forward pass against the number of tokens.

    Args:
        tokens: tokens per grid.
        seconds: time of a forward pass, in seconds.
        kept: memory kept for the backward pass, in bytes.

    Returns:
        The matplotlib figure.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(6.4, 2.6), layout="constrained")
    series = [
        ([1e3 * s for s in seconds], "forward pass / ms"),
        ([size / 2**20 for size in kept], "kept for backward / MiB"),
    ]
    for ax, (values, label) in zip(axes, series):
        law = [values[-1] * (n / tokens[-1]) ** 2 for n in tokens]
        ax.loglog(tokens, values, "o-", color="#0072B2", label="measured")
        ax.loglog(tokens, law, "--", color="#D55E00", label=r"law $\propto L^2$")
        ax.set(xlabel="tokens $L$", ylabel=label)
        ax.set_xticks(tokens, [str(n) for n in tokens])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend()
    return figure


# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# tokens, seconds, kept = measure_cost([8, 16, 32, 48], SelfAttention2d().to(device))
# for n, s, size in zip(tokens, seconds, kept):
#     print(f"{n:5d} tokens: {1e3 * s:8.1f} ms forward, {size / 2**20:7.1f} MiB kept")
# plot_cost(tokens, seconds, kept);

# %% [markdown] tags=["caption"]
# **Figure.** Cost of `SelfAttention2d` with its defaults on one grid of $L$ tokens:
# time of a forward pass (left) and memory kept for the backward pass (right). Dashed:
# a quadratic law through the last point.
# <!-- label: fig-attention-cost -->
# <!-- alt: Two log-log plots against the number of tokens. Both measured curves start
# above the dashed quadratic law, where the linear projections dominate, and approach
# its slope as the number of tokens grows. -->

# %% [markdown]
# On small grids the four linear projections dominate, whose cost is proportional to
# $L$; on large ones the $h L^2$ attention weights do, and the
# curves<!-- fig-attention-cost --> bend into the quadratic law. This is why a Vision
# Transformer attends over patches and not over single pixels: on a CIFAR-10 image that
# makes 64 tokens instead of 1024.
