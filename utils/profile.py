"""How large and how fast a network is: parameters, MACs and FLOPs, bytes on disk, latency; two of them side by side.

One multiply-accumulate (MAC) is two FLOPs. `torch.utils.flop_counter` counts the FLOPs of convolutions and matrix products
of one forward pass; batch norms, activations and additions are not counted, as in the literature.
"""

import copy
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from utils.seed import preserved_random_state
from utils.timing import interleaved_seconds, seconds_of

LATENCY_BATCH_SIZES = (1, 64)
MIN_RUN_SECONDS, MIN_ROUNDS, MAX_ROUNDS = 0.5, 5, 200


def profile_network(network: nn.Module, *inputs: Tensor) -> dict[str, int]:
    """`parameters`, those that are not zero, and `macs` and `flops` of a forward pass of `inputs`: an image (1, C, H, W)."""
    counter = FlopCounterMode(display=False)
    was_training = network.training
    network.eval()
    with torch.enable_grad(), counter:  # the counter cannot do without where a module is given a parameter
        network(*inputs)
    network.train(was_training)
    parameters = list(network.parameters())
    flops = counter.get_total_flops()
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "nonzero_parameters": sum(int(parameter.count_nonzero()) for parameter in parameters),
        "macs": flops // 2,
        "flops": flops,
    }


def training_flops(objective: nn.Module, image: Tensor) -> int:
    """FLOPs of a training step for each image: forward and backward pass, of a teacher its forward pass.

    `objective(images, labels, indices)` is what is trained, `image` (1, C, H, W) one of its images. Leaves no trace in it.
    """
    counter = FlopCounterMode(display=False)
    images = image.expand(2, -1, -1, -1)  # batch norm needs two
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    with preserved_random_state(), torch.enable_grad():
        copied = copy.deepcopy(objective).train()
        with counter:
            copied(images, labels, torch.arange(len(images), device=images.device))[0].backward()
    return counter.get_total_flops() // len(images)


def latencies(
    networks: Mapping[str, Callable[[Tensor], Any]],
    image: Tensor,
    *,
    batch_sizes: Sequence[int] = LATENCY_BATCH_SIZES,
    pausing: bool = False,
) -> dict[str, dict[str, dict[str, float]]]:
    """Median and interquartile range in milliseconds of `network(images)`, by network and batch size, on the device of `image`.

    The networks run in turn, so that whatever else happens on the machine meets all of them alike. Each is a module in
    evaluation mode, or anything else that is called with images; `image` is (1, C, H, W). `pausing` is for networks of several
    runtimes: see `utils.timing`.
    """
    results: dict[str, dict[str, dict[str, float]]] = {name: {} for name in networks}
    for batch_size in batch_sizes:
        images = image[:1].expand(batch_size, -1, -1, -1).contiguous(memory_format=torch.channels_last)
        functions = {name: partial(network, images) for name, network in networks.items()}
        with torch.inference_mode():
            rounds = _rounds(functions, image.device)
            seconds = interleaved_seconds(functions, device=image.device, rounds=rounds, pausing=pausing)
        for name, taken in seconds.items():
            low, median, high = (1e3 * value for value in statistics.quantiles(taken, n=4, method="inclusive"))
            results[name][str(batch_size)] = {"median_ms": median, "iqr_ms": high - low}
    return results


def _rounds(functions: Mapping[str, Callable[[], object]], device: torch.device) -> int:
    """So many that each function runs for MIN_RUN_SECONDS or so."""
    for function in functions.values():
        function()
    once = statistics.mean(seconds_of(function, device=device) for function in functions.values())
    return min(max(math.ceil(MIN_RUN_SECONDS / max(once, 1e-9)), MIN_ROUNDS), MAX_ROUNDS)


def compare_networks(dense: nn.Module, small: nn.Module, image: Tensor, *, files: Sequence[str | os.PathLike]) -> dict[str, Any]:
    """Profiles, latencies and file sizes of a network and its smaller form; `files` holds the checkpoint of each."""
    comparison: dict[str, Any] = {"device": str(image.device), "threads": torch.get_num_threads()}
    networks = {"dense": dense, "compact": small}
    times = latencies(networks, image)
    for (role, network), file in zip(networks.items(), files, strict=True):
        size = {"file_bytes": Path(file).stat().st_size}
        comparison[role] = {**profile_network(network, image), **size, "latency": times[role]}
    return comparison


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """The comparison as text, a line a quantity: dense, compact, and how many times smaller or faster."""
    dense, small = comparison["dense"], comparison["compact"]
    rows = [(name.replace("_", " "), dense[name], small[name], "{:,}") for name in ("parameters", "macs", "flops", "file_bytes")]
    for batch_size in dense["latency"]:
        times = [network["latency"][batch_size]["median_ms"] for network in (dense, small)]
        rows.append((f"ms, batch {batch_size}, {comparison['device']}", *times, "{:,.2f}"))
    lines = [f"{'':<22}{'dense':>16}{'compact':>16}{'ratio':>9}"]
    lines += [f"{name:<22}{form.format(a):>16}{form.format(b):>16}{a / b:>8.2f}x" for name, a, b, form in rows]
    return "\n".join(lines)
