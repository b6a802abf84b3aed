"""Small networks in simulated eight bits, for tests."""

import torch
from torch import nn

from models import build_model
from models.int8 import Int8Network
from models.narrow import NarrowNetwork, narrow


def small_resnet(**kept: list[int]) -> NarrowNetwork:
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return narrow(model.eval(), {name.replace("__", "."): channels for name, channels in kept.items()})


def simulated(network: NarrowNetwork, images: torch.Tensor) -> Int8Network:
    """With the bounds that the images show."""
    own = Int8Network(network).train()
    with torch.no_grad():
        own(images)
    return own.eval()
