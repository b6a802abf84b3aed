"""What compaction leaves of torchvision's networks, which it knows nothing about: the table of docs/compaction.md.

    python -m benchmarks.compaction_zoo

Random weights; 40 % of the filters of each convolution are zero, with what normalises them, and 40 % of the units of each
linear layer but the last.
"""

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from benchmarks.common import RESULTS, machine, report
from prune.compact import compact, relative_difference
from utils import cli
from utils.errors import UserError
from utils.profile import profile_network

DEAD_SHARE = 0.4
# Small, but with a map left for every pooling.
IMAGE_SIDES_PIXELS = {
    "alexnet": 64,
    "vgg16_bn": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "densenet121": 32,
    "squeezenet1_1": 32,
    "googlenet": 32,
    "inception_v3": 96,
    "resnext50_32x4d": 32,
    "wide_resnet50_2": 32,
    "shufflenet_v2_x0_5": 32,
    "mnasnet0_5": 32,
    "regnet_y_400mf": 32,
    "efficientnet_b0": 32,
    "convnext_tiny": 32,
    "vit_b_16": 224,
    "swin_t": 64,
}


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog="compaction_zoo.py", description="Compaction of torchvision's networks.")
    parser.add_argument("--models", nargs="+", default=list(IMAGE_SIDES_PIXELS), choices=IMAGE_SIDES_PIXELS, help="which of them")
    parser.add_argument("--output", type=Path, default=RESULTS / "compaction_zoo.json", help="where the JSON goes")
    return parser


def main(args: argparse.Namespace) -> None:
    rows = [measure(name) for name in args.models]
    report("compaction_zoo", rows, output=args.output, machine=machine(torch.device("cpu")), dead_share=DEAD_SHARE)


def measure(name: str) -> dict[str, Any]:
    """A row for one network: how much is left and how far off it is, or why it cannot be compacted."""
    network, images = pruned_network(name), example_images(name)
    blank = dict.fromkeys(("parameters left", "MACs left", "difference"))
    try:
        small = compact(network, images)
    except UserError as error:
        return {"network": name, **blank, "result": str(error)}
    dense_size, small_size = profile_network(network, images[:1]), profile_network(small, images[:1])
    return {
        "network": name,
        "parameters left": small_size["parameters"] / dense_size["parameters"],
        "MACs left": small_size["macs"] / dense_size["macs"],
        "difference": relative_difference(network, small, [images]),
        "result": "smaller and equal",
    }


def pruned_network(name: str) -> nn.Module:
    """A network of torchvision with random weights, random batch norms, and zeros in a part of every layer but the last."""
    torch.manual_seed(0)
    options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    network = models.get_model(name, weights=None, num_classes=10, **options).eval()
    _randomise(network)
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]
    for layer, follower in pairwise(layers):  # registered in order, so a norm follows its convolution
        if not isinstance(layer, nn.BatchNorm2d):
            dead = torch.rand(len(layer.weight)) < DEAD_SHARE
            _clear(layer, dead)
            if isinstance(follower, nn.BatchNorm2d) and len(follower.weight) == len(dead):
                _clear(follower, dead)
    return network


def _randomise(network: nn.Module) -> None:
    """Replaces initial values that would hide a difference: plain batch norms, tiny layer scales, an empty last layer."""
    for name, parameter in network.named_parameters():
        if name.endswith("layer_scale"):
            nn.init.ones_(parameter)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.1)


@torch.no_grad()
def _clear(layer: nn.Module, dead: Tensor) -> None:
    layer.weight[dead] = 0
    if layer.bias is not None:
        layer.bias[dead] = 0


def example_images(name: str) -> Tensor:
    side = IMAGE_SIDES_PIXELS[name]
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


if __name__ == "__main__":
    cli.execute(lambda: main(get_args_parser().parse_args()))
