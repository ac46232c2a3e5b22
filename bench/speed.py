"""How fast this Vision Transformer is, beside four others of the same size.

`make bench` runs everything in one process and interleaves the candidates round by
round, so that a machine whose speed drifts slows all of them alike. Peak memory is
taken in a process of its own for each candidate. The result is a table, and
``bench/speed.json``, from which README and report take their numbers.
"""

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torchvision
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import vision_transformer as ours  # noqa: E402
from attention import SelfAttention, SelfAttention2d  # noqa: E402
from training import processor_name, write_whole  # noqa: E402

RECORD = ROOT / "bench" / "speed.json"
PICTURE = ROOT / "bench" / "growth.svg"
BATCH_SIZE, P_DROPOUT = 128, 0.2
PEERS = ("nn.MultiheadAttention", "torchvision", "timm", "vit-pytorch")
GRIDS = {"unit test": (4, 24, 24), "ViT": (BATCH_SIZE, 5, 13)}  # B, H, W
PEAK_SIZE = 2048


# --- Candidates ----------------------------------------------------------------------


class PlainAttention(SelfAttention):
    """Our attention with three projections instead of one product for all of them."""

    @staticmethod
    def _project(x, *layers):
        return [layer(x) for layer in layers]


class PlainViT(ours.VisionTransformer):
    """Our model before it was made fast: the baseline, and each change alone.

    Args:
        cheap_dropout: keep our ``Dropout`` instead of ``nn.Dropout``.
        short_last_block: keep the last block to the class token.
        one_product: keep the one product for queries, keys and values.
        **sizes: as for ``VisionTransformer``.
    """

    def __init__(
        self, cheap_dropout=False, short_last_block=False, one_product=False, **sizes
    ):
        super().__init__(**sizes)
        self.short_last_block = short_last_block
        if not one_product:
            for block in self.blocks:
                block.attention.inner_module[1] = PlainAttention()
        if not cheap_dropout:
            for block in self.blocks:
                layers = block.feed_forward.inner_module[1].layers
                layers[2], layers[4] = nn.Dropout(P_DROPOUT), nn.Dropout(P_DROPOUT)

    def forward(self, x):
        if self.short_last_block:
            return super().forward(x)
        class_token = (self.class_token + self.class_position).expand(len(x), -1, -1)
        x = torch.cat([class_token, self.patchify(x)], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


class TorchAttention(nn.Module):
    """``nn.MultiheadAttention`` on tokens, without weights, as a block uses it."""

    def __init__(self, hidden_size, n_heads):
        super().__init__()
        self.layer = nn.MultiheadAttention(
            hidden_size, n_heads, bias=False, batch_first=True
        )

    def forward(self, x):
        return self.layer(x, x, x, need_weights=False)[0]


def torch_blocks():
    """Return our plain model with PyTorch's attention in its blocks."""
    model = PlainViT()
    for block in model.blocks:
        block.attention.inner_module[1] = TorchAttention(256, 8)
    return model


def only_mlp_dropout(model, is_mlp):
    """Let dropout act in the MLPs only, as in our model."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = P_DROPOUT if is_mlp(name) else 0.0
    active = sum(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    assert active == 12, f"{active} active dropouts instead of 12"
    return model


def torchvision_vit():
    model = torchvision.models.VisionTransformer(
        32, 4, 6, 8, 256, 512, dropout=P_DROPOUT, num_classes=10
    )
    return only_mlp_dropout(model, lambda name: ".mlp." in name)


def timm_vit():
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=32,
        patch_size=4,
        num_classes=10,
        embed_dim=256,
        depth=6,
        num_heads=8,
        mlp_ratio=2,
        qkv_bias=False,
        proj_drop_rate=P_DROPOUT,
    )
    return only_mlp_dropout(model, lambda name: ".mlp." in name)


def vit_pytorch_vit():
    from vit_pytorch import ViT

    model = ViT(
        image_size=32,
        patch_size=4,
        num_classes=10,
        dim=256,
        depth=6,
        heads=8,
        dim_head=32,
        mlp_dim=512,
        dropout=P_DROPOUT,
    )
    return only_mlp_dropout(model, lambda name: ".1.net." in name)


MODELS = {
    "ours": ours.VisionTransformer,
    "ours, plain": PlainViT,
    "plain + cheap dropout": partial(PlainViT, cheap_dropout=True),
    "plain + short last block": partial(PlainViT, short_last_block=True),
    "plain + one product": partial(PlainViT, one_product=True),
    "nn.MultiheadAttention": torch_blocks,
    "torchvision": torchvision_vit,
    "timm": timm_vit,
    "vit-pytorch": vit_pytorch_vit,
}


class TorchAttention2d(nn.Module):
    """``nn.MultiheadAttention`` on a grid, as the unit tests of the exercise use it."""

    def __init__(self, need_weights):
        super().__init__()
        self.layer = nn.MultiheadAttention(256, 8, bias=False, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x):
        tokens = rearrange(x, "B D H W -> B (H W) D")
        out, _ = self.layer(tokens, tokens, tokens, need_weights=self.need_weights)
        return rearrange(out, "B (H W) D -> B D H W", H=x.shape[2])


ATTENTIONS = {
    "ours": SelfAttention2d,
    "nn.MultiheadAttention, weights": partial(TorchAttention2d, need_weights=True),
    "nn.MultiheadAttention": partial(TorchAttention2d, need_weights=False),
}


# --- Measuring -----------------------------------------------------------------------


def training_step(model, batch_size, device, image_size=32):
    """Return a function that makes one step of the recipe on fixed random images."""
    model = model.to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    labels = torch.randint(10, (batch_size,), device=device)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def inference(model, batch_size, device):
    """Return a function that classifies fixed random images."""
    model = model.to(device).eval()
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    return torch.no_grad()(lambda: model(images))


def attention(layer, grid, device, backward):
    """Return a function that applies a layer to a fixed random grid."""
    batch, height, width = grid
    layer = layer.to(device).train(backward)
    x = torch.randn(batch, 256, height, width, device=device, requires_grad=backward)
    if not backward:
        return torch.no_grad()(lambda: layer(x))

    def both():
        x.grad = None
        layer.zero_grad()
        layer(x).sum().backward()

    return both


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(functions, rounds, device):
    """Time functions, interleaved round by round, after two rounds to warm up.

    Returns:
        Per name the median and the quartiles of the milliseconds.
    """
    times = {name: [] for name in functions}
    for number in range(rounds + 2):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if number >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    result = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        result[name] = {"median": median, "quartiles": [low, high], "unit": "ms"}
    return result


def matrix_flop(function):
    """Return the floating-point operations of all matrix products of a function."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def memory_of(arguments, processes=1):
    """Return the peak memory of a task, in MiB: the median of some processes.

    How much a process asks for depends on how its allocations happen to fit.
    """
    command = [sys.executable, __file__, "--memory", json.dumps(arguments)]
    return statistics.median(
        float(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout
        )
        for _ in range(processes)
    )


def print_memory(task, name, size, device):
    """Do a task of ``memory_of`` three times; print the peak above what it began with.

    On a CPU that is resident memory, of which the libraries loaded are left out.
    """
    device = torch.device(device)
    torch.manual_seed(0)
    torch.randn(512, 512) @ torch.randn(512, 512)  # load the matrix library
    if task == "attention":
        function = attention(ATTENTIONS[name](), size, device, backward=True)
    else:
        batch_size, image_size = size
        sizes = {} if image_size == 32 else {"image_size": image_size}
        function = training_step(MODELS[name](**sizes), batch_size, device, image_size)
    begin = peak_memory(device)
    for _ in range(3):
        function()
    end = peak_memory(device)
    print(end if device.type == "cuda" else end - begin)


def peak_memory(device):
    """Return the peak memory of this process so far, in MiB (Linux or CUDA)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Not resource.getrusage: that begins with the peak of the parent process
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024


def run_all(device, rounds):
    """Measure everything; return the record."""
    torch.manual_seed(0)
    where = {"device": str(device)}
    say = partial(print, flush=True)

    say("training step, inference")
    steps = {
        name: training_step(make(), BATCH_SIZE, device) for name, make in MODELS.items()
    }
    flop = matrix_flop(steps["ours"])
    big = torch.randn(2, PEAK_SIZE, PEAK_SIZE, device=device)
    training = measure({**steps, "peak": lambda: big[0] @ big[1]}, rounds, device)
    peak = 2 * PEAK_SIZE**3 / (training.pop("peak")["median"] / 1e3)
    del steps
    models = {
        name: inference(make(), BATCH_SIZE, device) for name, make in MODELS.items()
    }
    inferences = measure(models, 2 * rounds, device)
    del models

    layers = {}
    for shape, grid in GRIDS.items():
        for backward in (False, True):
            what = "forward + backward" if backward else "forward"
            say(f"attention, {shape}, {what}")
            functions = {
                name: attention(make(), grid, device, backward)
                for name, make in ATTENTIONS.items()
            }
            layers[f"{shape}, {what}"] = measure(functions, 2 * rounds, device)

    say("memory")
    step = {"task": "step", "size": [BATCH_SIZE, 32], **where}
    memory = {name: memory_of({**step, "name": name}, processes=3) for name in MODELS}
    layer_memory = {
        shape: {
            name: memory_of({"task": "attention", "name": name, "size": grid, **where})
            for name in ATTENTIONS
        }
        for shape, grid in GRIDS.items()
    }

    growth = {"tokens": {}, "batch": {}}
    for side in (32, 64, 96, 128):
        say(f"growth: {(side // 4) ** 2} tokens")
        model = ours.VisionTransformer(image_size=side)
        growth["tokens"][(side // 4) ** 2] = grown(model, 8, side, device, rounds)
    for batch_size in (32, 64, 128, 256, 512):
        say(f"growth: batch of {batch_size}")
        model = ours.VisionTransformer()
        growth["batch"][batch_size] = grown(model, batch_size, 32, device, rounds)

    fastest = min(training[name]["median"] for name in PEERS)
    fastest_inference = min(inferences[name]["median"] for name in PEERS)
    ours_ms = training["ours"]["median"]
    plain_ms = training["ours, plain"]["median"]

    def times_faster(shape, what):
        rows = layers[f"{shape}, {what}"]
        return rows["nn.MultiheadAttention"]["median"] / rows["ours"]["median"]

    return {
        "machine": {
            "processor": processor_name(),
            "gpu": torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else None,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": platform.system(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
        "batch_size": BATCH_SIZE,
        "rounds": rounds,
        "summary": {
            "training step against the fastest peer": fastest / ours_ms,
            "training step against our plain version": plain_ms / ours_ms,
            "inference against the fastest peer": fastest_inference
            / inferences["ours"]["median"],
            **{
                f"attention, {shape}, {what}": times_faster(shape, what)
                for shape in ("ViT", "unit test")
                for what in ("forward", "forward + backward")
            },
            "matrix products as share of the peak": flop / (ours_ms / 1e3) / peak,
            "memory of a training step against the leanest peer": memory["ours"]
            / min(memory[name] for name in PEERS),
        },
        "peak_gflops": peak / 1e9,
        "matrix_gflop_per_step": flop / 1e9,
        "training_step": training,
        "inference": inferences,
        "attention": layers,
        "training_step_memory_mib": memory,
        "attention_memory_mib": layer_memory,
        "growth": growth,
    }


def grown(model, batch_size, side, device, rounds):
    """Return time and memory of a training step of another size."""
    step = training_step(model, batch_size, device, side)
    task = {"task": "step", "name": "ours", "size": [batch_size, side]}
    return {
        **measure({"step": step}, max(3, rounds // 3), device)["step"],
        "memory_mib": memory_of({**task, "device": str(device)}),
        "batch_size": batch_size,
    }


# --- Showing -------------------------------------------------------------------------


def table(record):
    """Return the record as lines of text."""
    lines = []
    for title, rows in (
        ("training step", record["training_step"]),
        ("inference", record["inference"]),
        *((f"attention, {name}", rows) for name, rows in record["attention"].items()),
    ):
        lines.append(f"\n{title:<44}{'median':>10}{'quartiles':>20}")
        for name, row in rows.items():
            low, high = row["quartiles"]
            lines.append(
                f"  {name:<42}{row['median']:>7.1f} ms{low:>11.1f} to {high:.1f}"
            )
    lines.append("\npeak memory of a training step")
    for name, mib in record["training_step_memory_mib"].items():
        lines.append(f"  {name:<42}{mib:>7.0f} MiB")
    lines.append("\nin short")
    for name, value in record["summary"].items():
        lines.append(f"  {name:<54}{value:.2f}")
    return "\n".join(lines)


def plot_growth(record):
    """Plot how time and memory of a training step grow; return the figure."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    plt.rcParams["font.size"] = 9  # as the captions of the report
    figure, axes = plt.subplots(1, 2, figsize=(6.4, 2.4), layout="constrained")
    figure.get_layout_engine().set(wspace=0.05)  # the scales of the two apart
    for ax, (key, label) in zip(
        axes,
        (
            ("tokens", "tokens of an image, batch of 8"),
            ("batch", "batch size"),
        ),
        strict=True,
    ):
        rows = record["growth"][key]
        sizes = [int(size) for size in rows]
        ax.loglog(sizes, [r["median"] for r in rows.values()], "o-", color="#0072B2")
        ax.set_ylabel("time of a step / ms (solid)")
        twin = ax.twinx()
        memory = [r["memory_mib"] for r in rows.values()]
        twin.loglog(sizes, memory, "s--", color="#D55E00")
        twin.set_ylabel("peak memory / MiB (dashed)")
        ax.set_xlabel(label)
        ax.set_xticks(sizes, [str(size) for size in sizes])
        for axis in (ax.yaxis, twin.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
        ax.minorticks_off()
        twin.minorticks_off()
        ax.grid(alpha=0.3)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--rounds", default=5, type=int, help="at least 3")
    parser.add_argument("--record", default=RECORD, type=Path)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print_memory(**json.loads(arguments.memory))
        return
    if arguments.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, for all candidates
    record = run_all(arguments.device, arguments.rounds)
    print(table(record))
    write_whole(arguments.record, (json.dumps(record, indent=1) + "\n").encode())
    plot_growth(record).savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
