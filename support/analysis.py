"""What is measured for the notebooks: operations, predictions, attention."""

import math
import timeit
import warnings
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from attention import SelfAttention2d
from vision_transformer import VAL_TRANSFORM, predict


def measure_scaling(head_dims, num_tokens=64, num_queries=4096):
    """Measure what the division by sqrt(d_k) does to logits and attention weights.

    Returns a dict with the keys True (divided) and False; each holds two lists, one
    entry per size: standard deviation of the logits, and mean entropy of a row of
    attention weights, in nats.
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


@torch.no_grad()
def content_attention():
    """Return regions (H, W) and the attention weights (h, L, L) of tokens in them.

    Regions are 0 for the background, 1 for a disc and 2 for a bar; the tokens of a
    region share one random direction. The layer compares content: its key projection
    is a copy of the query projection.
    """
    row, column = torch.meshgrid(*[torch.arange(16) / 16] * 2, indexing="ij")
    regions = torch.zeros(16, 16, dtype=torch.long)
    regions[(row - 0.3) ** 2 + (column - 0.3) ** 2 < 0.05] = 1
    regions[(row > 0.65) & (row < 0.85) & (column > 0.2)] = 2
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(3, 256, generator=generator)
    noise = 0.3 * torch.randn(16 * 16, 256, generator=generator)
    torch.manual_seed(0)
    layer = SelfAttention2d()
    layer.q.weight.mul_(2)  # sharper: the logits grow by a factor of four
    layer.k.weight.copy_(layer.q.weight)
    tokens = directions[regions.flatten()] + noise
    return regions, layer.attention_weights(tokens[None])[0]


def saved_for_backward(layer, x):
    """Return the bytes that ``layer(x)`` keeps for its backward pass.

    Parameters and the input are not counted; a tensor kept twice counts once.
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


def count_operations(layer, x):
    """Return the operations of a layer's projections, and of its other products."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    counts = {str(name): n for name, n in counter.get_flop_counts()["Global"].items()}
    projections = sum(n for name, n in counts.items() if "bmm" not in name)
    return projections, counter.get_total_flops() - projections


@torch.no_grad()
def fastest_pass(layer, x):
    """Return the seconds of the fastest of some passes: disturbance only adds time.

    On one core, since several wait for each other, longest on a busy machine.
    """
    times, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    while len(times) < 5 or sum(times) < 0.3:
        times.append(timeit.timeit(lambda: layer(x), number=1))
    torch.set_num_threads(threads)
    return min(times)


def print_costs(model):
    """Print the parameters of a model and of some parts, and what operations they cost.

    Operations are those of the matrix products for one image; a multiplication and an
    addition count as two.
    """
    size, device = model.image_size, model.head.weight.device
    image = torch.zeros(1, model.in_channels, size, size, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a new torch would find the modules itself
        counter = FlopCounterMode(model, display=False)
    with torch.no_grad(), counter:
        model(image)
    print(f"{'part':<18}{'parameters':>12}{'operations per image':>24}")
    for name in ("patch_embedding", "blocks.0", "head", ""):
        parameters = sum(p.numel() for p in model.get_submodule(name).parameters())
        path = ".".join(filter(None, (type(model).__name__, name)))
        millions = sum(counter.get_flop_counts()[path].values()) / 1e6
        print(f"{name or 'all':<18}{parameters:>12,}{millions:>16.2f} million")


class Predictions(NamedTuple):
    """What a model says of the N test images."""

    pixels: Any  # (N, 32, 32, 3), uint8
    labels: torch.Tensor  # (N,)
    logits: torch.Tensor  # (N, num_classes)
    classes: list  # their names


def predict_test_images(dataset, cache_dir, model, device):
    """Return ``Predictions``; without data or weights (no model) None, and say so."""
    if model is None:
        print("The test images are not classified: the recorded weights are not here.")
        return None
    try:
        val_set = dataset(cache_dir, train=False, transform=VAL_TRANSFORM)
    except RuntimeError:  # torchvision's word for missing or damaged files
        print(f"The test images are not classified: no CIFAR-10 in {cache_dir}.")
        return None
    except OSError as error:  # files of another user
        print(f"The test images are not classified: {error}.")
        return None
    logits, labels = predict(model, DataLoader(val_set, batch_size=100), device)
    return Predictions(val_set.data, labels, logits, val_set.classes)


def verify(history, predictions):
    """Print right answers beside those recorded; return whether they agree.

    They may differ by 5 in number, which another device's rounding can do.
    """
    hits = int((predictions.logits.argmax(dim=-1) == predictions.labels).sum())
    total = len(predictions.labels)
    recorded = round(history["val_accs_eval"][-1] * total)
    agrees = abs(hits - recorded) <= 5
    print(f"{hits} of {total} test images right, {100 * hits / total:.2f} %")
    print(f"recorded: {recorded}; the record is {'' if agrees else 'NOT '}confirmed")
    return agrees


def confusion(logits, labels):
    """Count the predictions: (num_classes, num_classes), true class by row."""
    classes = logits.shape[1]
    pairs = labels * classes + logits.argmax(dim=-1)
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def calibration(logits, labels, bins=10):
    """Compare the confidence of predictions with how often they are right.

    Guo et al. (2017), Section 2. Returns arrays (bins,) of mean confidence, accuracy
    and share of the images, nan where a bin is empty, and the expected calibration
    error.
    """
    confidence, predicted = logits.softmax(dim=-1).max(dim=-1)
    right = (predicted == labels).double()
    where = (confidence * bins).long().clamp(max=bins - 1)
    counts = torch.bincount(where, minlength=bins).double()
    mean = torch.bincount(where, confidence.double(), minlength=bins) / counts
    accuracy = torch.bincount(where, right, minlength=bins) / counts
    share = counts / len(labels)
    error = ((mean - accuracy).abs().nan_to_num() * share).sum().item()
    return mean.numpy(), accuracy.numpy(), share.numpy(), error


@torch.no_grad()
def attention_weights(model, images):
    """Return the attention weights of all blocks, (layers, B, num_heads, 1 + L, 1 + L).

    For normalised images (B, C, H, W).
    """
    weights = []

    def note(layer, given):
        weights.append(layer.attention_weights(given[0]))

    layers = [m for m in model.modules() if isinstance(m, SelfAttention2d)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    model.eval()(images.to(model.head.weight.device))
    for hook in hooks:
        hook.remove()
    return torch.stack(weights)


def normalised(pixels):
    """Turn pixels (N, 32, 32, 3), uint8, into what the model reads, (N, 3, 32, 32)."""
    return torch.stack([VAL_TRANSFORM(image) for image in pixels])


def attention_distance(weights, patch_size):
    """Return how far the heads look, in pixels, (layers, num_heads).

    Dosovitskiy et al. (2021), Section 4.5: the distance between the centres of two
    patches, weighted by ``attention_weights`` and averaged over queries and images. The
    class token has no place, and is left out.
    """
    among = weights[..., 1:, 1:]
    # Averaging over images first saves a gigabyte; MPS knows no float64
    among = (among / among.sum(dim=-1, keepdim=True)).mean(dim=1).cpu().double()
    side = round(among.shape[-1] ** 0.5)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([row, column], dim=-1).reshape(-1, 2).double() * patch_size
    distances = torch.cdist(places, places)
    return (among * distances).sum(dim=-1).mean(dim=-1)
