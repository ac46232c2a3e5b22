"""How fast this Vision Transformer is, beside four others of the same size.

`make bench` measures all candidates in one process, in turn, round by round, so that a
machine whose speed drifts slows all of them alike. Ratios are medians over the ratios
of each round. Peak memory is taken in a process of its own for each candidate. Last,
the parts of an epoch of our training are measured likewise. The result is a table, and
``bench/speed.json``, or ``bench/speed-avx512.json`` where MKL is told that an AMD
processor is Intel's, see the README.
"""

import argparse
import datetime
import json
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
from PIL import Image
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import vision_transformer as ours  # noqa: E402
from attention import SelfAttention2d  # noqa: E402
from support.demo_data import DemoCIFAR10  # noqa: E402
from support.records import processor_name, write_whole  # noqa: E402
from support.training import mkl_is_told, use_quick_dropout  # noqa: E402

RECORD = ROOT / "bench" / ("speed-avx512.json" if mkl_is_told() else "speed.json")
P_DROPOUT = 0.2
PEERS = ("nn.MultiheadAttention", "torchvision", "timm", "vit-pytorch")


# --- Candidates ----------------------------------------------------------------------


def with_quick_dropout(model):
    """Drop out as training does on a CPU."""
    use_quick_dropout(model)
    return model


class TorchAttention(nn.Module):
    """``nn.MultiheadAttention`` on tokens, without weights, as a block uses it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.MultiheadAttention(256, 8, bias=False, batch_first=True)

    def forward(self, x):
        return self.layer(x, x, x, need_weights=False)[0]


def torch_attention_vit():
    """Our blocks around PyTorch's attention."""
    model = ours.VisionTransformer()
    for block in model.blocks:
        block.attention.inner_module[1] = TorchAttention()
    return model


def only_mlp_dropout(model, mlp):
    """Let dropout act only in modules with ``mlp`` in their name, as in our model."""
    dropouts = {n: m for n, m in model.named_modules() if isinstance(m, nn.Dropout)}
    for name, module in dropouts.items():
        module.p = P_DROPOUT if mlp in name else 0.0
    active = sum(module.p > 0 for module in dropouts.values())
    assert active == 12, f"{active} active dropouts instead of 12"
    return model


def torchvision_vit():
    model = torchvision.models.VisionTransformer(
        32, 4, 6, 8, 256, 512, dropout=P_DROPOUT, num_classes=10
    )
    return only_mlp_dropout(model, ".mlp.")


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
    return only_mlp_dropout(model, ".mlp.")


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
    return only_mlp_dropout(model, ".1.net.")


MODELS = {
    "ours": ours.VisionTransformer,
    "ours, quick dropout": lambda: with_quick_dropout(ours.VisionTransformer()),
    "nn.MultiheadAttention": torch_attention_vit,
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


def step_parts(model, batch_size, device):
    """Return functions that make a step of the recipe on fixed random images."""
    model = model.to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    labels = torch.randint(10, (batch_size,), device=device)
    losses = []

    def update():
        optimizer.step()
        optimizer.zero_grad()

    return {
        "forward": lambda: losses.append(F.cross_entropy(model(images), labels)),
        "backward": lambda: losses.pop().backward(),
        "optimizer": update,
    }


def training_step(model, batch_size, device):
    """Return one function that makes the whole step."""
    parts = step_parts(model, batch_size, device).values()
    return lambda: [part() for part in parts]


def inference(model, batch_size, device):
    """Return a function that classifies fixed random images, in the model's mode."""
    model = model.to(device)
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    return torch.no_grad()(lambda: model(images))


def attention(layer, grid, device, backward):
    """Return a function that applies a layer to a fixed random grid (B, H, W)."""
    batch, height, width = grid
    layer = layer.to(device)
    x = torch.randn(batch, 256, height, width, device=device, requires_grad=backward)

    def apply():
        with torch.set_grad_enabled(backward):
            output = layer(x)
        if backward:
            output.sum().backward()

    return apply


def timings(functions, rounds, device):
    """Time functions in turn, round by round, after two rounds to warm up.

    Returns the milliseconds of each, a list (rounds,).
    """
    times = {name: [] for name in functions}
    for _ in range(rounds + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: values[2:] for name, values in times.items()}


def measure(functions, rounds, device):
    """Compare candidates.

    Returns:
        For each name the ``median`` and the ``quartiles`` of the milliseconds, and
        ``times_ours``, the median of the ratios to "ours" in the same round.
    """
    times, result = timings(functions, rounds, device), {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        ratios = [v / our for v, our in zip(values, times["ours"], strict=True)]
        result[name] = {
            "median": median,
            "quartiles": [low, high],
            "times_ours": statistics.median(ratios),
        }
    return result


def epoch_parts(batch_size, rounds, device):
    """Return the seconds that the parts of an epoch of CIFAR-10 take, one by one.

    In training, other processes load the images meanwhile, where a core is free.
    """

    def model():
        return with_quick_dropout(ours.VisionTransformer().to(device))

    data = DemoCIFAR10("").data
    images = [Image.fromarray(data[n % len(data)]) for n in range(batch_size)]
    parts = {
        "loading": lambda: [ours.TRAIN_TRANSFORM(image) for image in images],
        **step_parts(model(), batch_size, device),
        "validation by the recipe": inference(model(), batch_size, device),
        "validation with eval()": inference(model().eval(), batch_size, device),
    }
    seconds = {}
    for name, values in timings(parts, rounds, device).items():
        number = 10_000 if name.startswith("validation") else 50_000
        seconds[name] = statistics.median(values) / 1e3 * number / batch_size
    return seconds


def step_memory(name, batch_size, device):
    """Return the peak memory of a training step in MiB: the median of three processes.

    How much a process asks for depends on how its allocations happen to fit.
    """
    command = [sys.executable, __file__, "--memory", name, "--device", str(device)]
    command += ["--batch-size", str(batch_size)]
    return statistics.median(
        float(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        for _ in range(3)
    )


def print_memory(name, batch_size, device):
    """Make three training steps; print the peak memory above that at the beginning."""
    torch.randn(512, 512) @ torch.randn(512, 512)  # load the matrix library
    step = training_step(MODELS[name](), batch_size, device)
    begin = peak_memory(device)
    for _ in range(3):
        step()
    end = peak_memory(device)
    # On a CPU it is resident memory, and the libraries are not the model's
    print(end if device.type == "cuda" else end - begin)


def peak_memory(device):
    """Return the peak memory of this process so far, in MiB (Linux or CUDA)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Not resource.getrusage: that begins with the peak of the parent process
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024


def run_all(device, rounds, batch_size):
    """Measure everything; return the record."""
    torch.manual_seed(0)
    cuda = device.type == "cuda"

    print("training step", flush=True)
    steps = {n: training_step(make(), batch_size, device) for n, make in MODELS.items()}
    steps = measure(steps, rounds, device)
    print("inference", flush=True)
    models = {
        name: inference(make().eval(), batch_size, device)
        for name, make in MODELS.items()
    }
    models = measure(models, 2 * rounds, device)

    layers = {}
    for shape, grid in {"ViT": (batch_size, 5, 13), "unit test": (4, 24, 24)}.items():
        for backward, what in ((False, "forward"), (True, "forward + backward")):
            print(f"attention, {shape}, {what}", flush=True)
            functions = {
                name: attention(make(), grid, device, backward)
                for name, make in ATTENTIONS.items()
            }
            layers[f"{shape}, {what}"] = measure(functions, 2 * rounds, device)

    print("memory", flush=True)
    memory = {name: step_memory(name, batch_size, device) for name in MODELS}

    print("parts of an epoch", flush=True)
    parts = epoch_parts(batch_size, rounds, device)

    def against(rows, *names):
        return min(rows[name]["times_ours"] for name in names)

    fastest = against(steps, *PEERS)

    return {
        "machine": {
            "processor": processor_name(),
            "gpu": torch.cuda.get_device_name(device) if cuda else None,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "mkl_is_told": mkl_is_told(),
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
        "batch_size": batch_size,
        "rounds": rounds,
        "summary": {
            "training step against the fastest peer": fastest,
            "training step with quick dropout against the fastest peer": fastest
            / steps["ours, quick dropout"]["times_ours"],
            "inference against the fastest peer": against(models, *PEERS),
            **{
                f"attention, {name}": against(rows, "nn.MultiheadAttention")
                for name, rows in layers.items()
            },
            "memory of a training step against the leanest peer": memory["ours"]
            / min(memory[name] for name in PEERS),
        },
        "training_step": steps,
        "inference": models,
        "attention": layers,
        "training_step_memory_mib": memory,
        "epoch_seconds": parts,
    }


def table(record):
    """Return the record as lines of text."""
    lines = []
    for title, rows in (
        ("training step", record["training_step"]),
        ("inference", record["inference"]),
        *((f"attention, {name}", rows) for name, rows in record["attention"].items()),
    ):
        lines.append(f"\n{title:<36}{'median':>10}{'quartiles':>19}{'x ours':>9}")
        for name, row in rows.items():
            low, high = row["quartiles"]
            lines.append(
                f"  {name:<34}{row['median']:>7.1f} ms{low:>9.1f} to {high:>6.1f}"
                f"{row['times_ours']:>9.2f}"
            )
    lines.append("\npeak memory of a training step")
    for name, mib in record["training_step_memory_mib"].items():
        lines.append(f"  {name:<34}{mib:>7.0f} MiB")
    parts = record["epoch_seconds"]
    lines.append("\nparts of an epoch, with quick dropout on a CPU")
    for name, seconds in parts.items():
        share = 100 * seconds / sum(parts.values())
        lines.append(f"  {name:<34}{seconds:>7.1f} s{share:>9.1f} %")
    lines.append("\nin short")
    for name, value in record["summary"].items():
        lines.append(f"  {name:<54}{value:.2f}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--rounds", default=10, type=int, help="at least 2")
    parser.add_argument("--batch-size", default=128, type=int)
    parser.add_argument("--record", default=RECORD, type=Path)
    parser.add_argument("--memory", choices=MODELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device, batch_size = arguments.device, arguments.batch_size
    if arguments.memory:
        print_memory(arguments.memory, batch_size, device)
        return
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, for all candidates
    record = run_all(device, arguments.rounds, batch_size)
    print(table(record))
    write_whole(arguments.record, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
