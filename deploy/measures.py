"""What an exported network is measured by: how its logits differ from the network's, its sizes and its speed."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deploy.runtimes import SESSIONS
from models.difference import ResultDifference
from utils.images.batches import ImageData
from utils.profile import latencies, profile_network


@torch.no_grad()
def exported_difference(network: nn.Module, run: Callable[[Tensor], Tensor], data: ImageData) -> float:
    """The largest difference of any logit over the test images, relative to the largest logit of `network`; NaN if one is NaN.

    The images are in plain layout: operations choose their kernels by it, and kernels round in ways of their own.
    """
    difference = ResultDifference()
    for batch in data.test_batches():
        images = batch.images.contiguous()
        difference.add(network(images), run(images))
    return difference.relative


def speed_table(dense: nn.Module, small: nn.Module, run: Callable[[Tensor], Tensor], image: Tensor, *, name: str) -> str:
    """Sizes, and milliseconds of a forward pass on the CPU: dense, compact, exported."""
    sizes = {role: profile_network(network, image) for role, network in (("dense", dense), ("compact", small))}
    lines = [f"{role}: {size['parameters']:,} parameters, {size['macs']:,} MACs" for role, size in sizes.items()]
    times = latencies({"dense": dense, "compact": small, name: run}, image, pausing=name in SESSIONS)
    for batch_size in times["dense"]:
        row = ", ".join(f"{role} {values[batch_size]['median_ms']:.2f} ms" for role, values in times.items())
        lines.append(f"batch {batch_size} on {torch.get_num_threads()} threads: {row}")
    return "\n".join(lines)
