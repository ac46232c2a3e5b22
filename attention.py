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
# # Task 1: Self-Attention (6 P)
#
# Implement multi-head self-attention on a 2d grid of tokens, in which every token
# attends to all tokens of the grid: the modules (1 P), the forward pass with a single
# head (3 P) and with several (2 P).

# %% tags=["appendix"]
"""Multi-head self-attention on 2d grids of tokens (Task 1).

The paired script of ``attention.ipynb``. Importing it only defines classes and
functions; run as a script, it runs its unit tests. Cells tagged ``active-ipynb`` run in
the notebook only.
"""

import math

import einops
import torch
from torch import nn


def choose_device():
    """Return the device to compute on: MPS, else CUDA, else the CPU."""
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# %% tags=["active-ipynb", "appendix"]
# %config InlineBackend.figure_formats = ["svg"]
# from support import figures
#
# device = choose_device()
# print(f"torch {torch.__version__} on {device}")

# %% [markdown]
# ## The layer
#
# Queries, keys and values are projections of the same tokens $x$ (Eq. 1 and Section
# 3.2.2 of [Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)):
#
# $$\begin{aligned}
#   \operatorname{MultiHead}(x) &=
#   \operatorname{Concat}(\mathrm{head}_1, \dots, \mathrm{head}_h) W^O, \quad
#   \mathrm{head}_i = \operatorname{Attention}(x W_i^Q, x W_i^K, x W_i^V), \\
#   \operatorname{Attention}(Q, K, V) &=
#   \operatorname{softmax}\left(Q K^T / \sqrt{d_k}\right) V
#   \end{aligned}$$


# %%
class SelfAttention2d(nn.Module):
    """Multi-head self-attention on a grid of tokens (B, D, H, W), with L = H * W.

    Head i owns features [i * head_dim, (i + 1) * head_dim) of queries and keys, and
    likewise with value_dim of the values: the layout of ``nn.MultiheadAttention``.
    """

    def __init__(self, embed_dim=256, head_dim=32, value_dim=32, num_heads=8):
        super().__init__()
        self.embed_dim, self.num_heads = embed_dim, num_heads  # D, h
        self.head_dim, self.value_dim = head_dim, value_dim  # d_k, d_v
        self.q = nn.Linear(embed_dim, num_heads * head_dim, bias=False)  # W^Q
        self.k = nn.Linear(embed_dim, num_heads * head_dim, bias=False)  # W^K
        self.v = nn.Linear(embed_dim, num_heads * value_dim, bias=False)  # W^V
        self.out = nn.Linear(num_heads * value_dim, embed_dim, bias=False)  # W^O

    def forward(self, x):
        """Let every token of a grid attend to all of them: (B, D, H, W) again."""
        tokens = einops.rearrange(x, "B D H W -> B (H W) D", D=self.embed_dim)
        tokens = self.attend(tokens)  # (B, L, D)
        return einops.rearrange(tokens, "B (H W) D -> B D H W", H=x.shape[2])

    def attend(self, x):
        """Let every token of a sequence attend to all of them: (B, L, D) again."""
        v = self.split_heads(self.v(x))  # (B, h, L, d_v)
        heads = self.attention_weights(x) @ v  # (B, h, L, L) x (B, h, L, d_v)
        return self.out(einops.rearrange(heads, "B h L d -> B L (h d)"))  # (B, L, D)

    def attention_weights(self, x):
        """Return softmax(Q K^T / sqrt(d_k)) of tokens (B, L, D): (B, h, L, L)."""
        q = self.split_heads(self.q(x)) / math.sqrt(self.head_dim)  # (B, h, L, d_k)
        k = self.split_heads(self.k(x))  # (B, h, L, d_k)
        return (q @ k.mT).softmax(dim=-1)  # row i: how token i weights all L

    def split_heads(self, features):
        """Split (B, L, h * d) into heads: (B, h, L, d)."""
        return einops.rearrange(features, "B L (h d) -> B h L d", h=self.num_heads)


# %% [markdown]
# | symbol | in the code | meaning |
# |---|---|---|
# | $B$ | `x.shape[0]` | images in the batch |
# | $H, W$; $L = HW$ | `x.shape[2:]` | rows and columns of the grid; number of tokens |
# | $D$ | `embed_dim` | size of a token |
# | $h$ | `num_heads` | number of heads |
# | $d_k, d_v$ | `head_dim`, `value_dim` | size of a query or key; of a value |
# | $W^Q, W^K, W^V, W^O$ | `q`, `k`, `v`, `out` | linear layers without bias |
#
# `forward` reads the grid row by row as a sequence, and turns the result back into a
# grid. `attend` is the same layer on a sequence, which is what the Vision Transformer
# of Task 2 needs. A reshape splits the heads, so there is no loop over heads, tokens or
# images.


# %% [markdown]
# ## Unit tests
#
# The two tests below repeat the course's own tests in code written anew, since the
# originals are not part of this hand-in: the weights of the layer are copied into
# `nn.MultiheadAttention`, which must return the same tokens for four random grids of
# 256 x 24 x 24, within `rtol=1e-2` and `atol=1e-5`.


# %%
def torch_attention(layer, x):
    """Return what ``nn.MultiheadAttention`` makes of the layer's weights and a grid.

    This requires head_dim = value_dim = embed_dim / num_heads.
    """
    theirs = nn.MultiheadAttention(
        layer.embed_dim, layer.num_heads, bias=False, batch_first=True
    ).to(x)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(
            torch.cat([layer.q.weight, layer.k.weight, layer.v.weight])
        )
        theirs.out_proj.weight.copy_(layer.out.weight)
    tokens = einops.rearrange(x, "B D H W -> B (H W) D")
    output, _ = theirs(tokens, tokens, tokens)
    return einops.rearrange(output, "B (H W) D -> B D H W", H=x.shape[2])


@torch.no_grad()
def check_against_torch(layer, device):
    """Assert that a layer agrees with PyTorch; return by how much they differ."""
    layer = layer.to(device)
    x = torch.randn(4, layer.embed_dim, 24, 24, device=device)
    ours, theirs = layer(x), torch_attention(layer, x)
    error = (ours - theirs).abs().max().item()
    assert torch.allclose(ours, theirs, rtol=1e-2, atol=1e-5), (
        f"differs from nn.MultiheadAttention by up to {error:.1e}: is the scaling by "
        "1/sqrt(head_dim) there, and are the heads split and merged in order?"
    )
    if error == 0:
        return "bit-identical to nn.MultiheadAttention"
    return f"at most {error:.1e} from nn.MultiheadAttention"


def test_single_head(device):
    """One head as wide as the token."""
    return check_against_torch(SelfAttention2d(256, 256, 256, 1), device)


def test_multi_head(device):
    """Eight heads: the defaults."""
    return check_against_torch(SelfAttention2d(), device)


# %% tags=["appendix"]
def run_unit_tests(*tests):
    """Run tests, print a line for each, and raise AssertionError if any failed.

    A test is a function ``test_...(device)`` that returns its evidence or raises.
    """
    device, failed = choose_device(), []
    for test in tests:
        name = test.__name__[len("test_") :].replace("_", " ")
        torch.manual_seed(0)
        try:
            print(f"passed  {name}: {test(device)}")
        except Exception as error:  # the other tests still get their line
            failed.append(name)
            print(f"FAILED  {name}: {type(error).__name__}: {error}")
    assert not failed, "failed unit tests: " + ", ".join(failed)


# %%
if __name__ == "__main__":
    run_unit_tests(test_single_head, test_multi_head)

# %% [markdown]
# ## Beyond the exercise
#
# The rest was not asked for: why the layer divides by $\sqrt{d_k}$, what its heads look
# at, and what it costs.
#
# ### Why divide by $\sqrt{d_k}$?
#
# Let the entries of a query and a key all be independent of each other, with mean 0 and
# variance 1 (footnote 4 of Vaswani et al., 2017). Their dot product is then a sum of
# $d_k$ terms with mean 0 and variance 1:
#
# $$\operatorname{Var}(q \cdot k) = \sum_{i=1}^{d_k} \operatorname{Var}(q_i k_i) = d_k$$
#
# Without the division the logits grow with the size of the heads, the softmax
# approaches an argmax, and hardly any gradient passes through it. Figure 1 shows, for
# random queries and keys, the standard deviation of the logits, and how far a row of
# attention weights spreads. The spread is the entropy $-\sum_j w_j \ln w_j$: it is
# $\ln L$ when all $L$ tokens have the same weight, and 0 when one token has all of it.

# %% tags=["active-ipynb", "appendix"]
# figures.plot_scaling(head_dims=[4, 16, 64, 256, 1024]);

# %% [markdown]
# **Figure 1.** Random queries and 64 random keys with and without the division by
# $\sqrt{d_k}$: standard deviation $\sigma$ of the logits (left) and mean entropy of the
# attention weights of a query (right) against the size of a head.
# <!-- alt: Two plots against the size of a head from 4 to 1024. With the division the
# deviation of the logits stays at one and the entropy just below that of
# uniform weights; without it the deviation follows the square root law, and the entropy
# falls to nearly zero. -->

# %% [markdown]
# With the division, the standard deviation of the logits does not depend on the size of
# a head. Without it, large heads attend to hardly more than one token before anything
# is learned. The variance of the logits of a real layer depends on its initial weights,
# and training can make its logits larger.

# %% [markdown]
# ### What the heads attend to
#
# To make attention visible, the input of Figure 2 has structure: a disc, a bar and a
# background, where the tokens of a region share one random direction, each with noise
# of its own. The key projection is a copy of the query projection, so two tokens match
# when they are alike. Both have twice their initial weights, which makes the maps
# sharper. Nothing is trained here.

# %% tags=["active-ipynb", "appendix"]
# figures.plot_attention_maps(queries=[(4, 4), (12, 9)], heads=[0, 1, 2]);

# %% [markdown]
# **Figure 2.** What two tokens attend to. Left: the regions of the input, with the
# query token marked by a cross (top: in the disc, bottom: in the bar). Right: the
# attention weights that three of the eight heads give to all 256 tokens of the grid.
# <!-- alt: Two rows of heat maps over a 16 by 16 grid. The token in the disc gives
# nearly all of its weight to the tokens of the disc, the token in the bar to those of
# the bar; the three heads agree on the region and differ in how evenly they spread
# the weight inside it. -->

# %% [markdown]
# Both tokens find the other tokens of their region, near or far, in all three heads:
# without positional embeddings, attention compares content and does not know distance.
# The heads differ because each compares the tokens in a 32-dimensional
# projection of its own.

# %% [markdown]
# ### What it costs
#
# With $h d_k = h d_v = D$, a forward pass needs $8 L D^2$ operations for its four
# projections, and $4 L^2 D$ for the two products $QK^T$ and $AV$, where $A$ are the
# attention weights; a multiplication and an addition count as two. The products
# overtake the projections at $L = 2D$. Figure 3 counts the operations of all matrix
# products while a grid passes through the layer, and measures time and memory beside
# them.

# %% tags=["active-ipynb", "appendix", "timed"]
# figures.plot_cost(sides=[8, 16, 32, 48]);

# %% [markdown]
# **Figure 3.** Cost of `SelfAttention2d` with its defaults ($D = 256$) on one grid of
# $L$ tokens. Left: counted operations of the projections and of the products $QK^T$ and
# $AV$, which are equal in number at $L = 2D$ (dotted). Centre: memory kept for the
# backward pass. Right: time of a forward pass on one core of the machine that made this
# figure.
# <!-- alt: Three log-log plots against the number of tokens. On the left, the line of
# the products is steeper than that of the projections and crosses it at 512 tokens.
# Memory and time rise as well, in the end faster than the tokens. -->

# %% [markdown]
# For the backward pass, the layer keeps $h L^2$ attention weights and $4LD$ other
# values: above $L = 4D / h = 128$, memory, too, grows mostly with $L^2$. The softmax,
# which is not counted, adds time. This is why a Vision Transformer attends over patches
# and not over pixels: a CIFAR-10 image has 64 patches of 4 x 4 pixels, but 1024 pixels.
