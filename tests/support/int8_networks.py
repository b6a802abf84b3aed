"""Small networks in simulated eight bits, for tests."""

import torch
from norms import fill_norms
from selections import narrow

from models import build_model
from models.int8 import Int8Network
from models.narrow import NarrowNetwork


def small_resnet(**kept: list[int]) -> NarrowNetwork:
    torch.manual_seed(0)
    model = build_model("resnet8", num_classes=10)
    fill_norms(model)
    return narrow(model.eval(), {name.replace("__", "."): channels for name, channels in kept.items()})


def simulated(network: NarrowNetwork, images: torch.Tensor, *, weight_bits: int = 8) -> Int8Network:
    """With the bounds that the images show."""
    own = Int8Network(network, weight_bits=weight_bits).train()
    with torch.no_grad():
        own(images)
    return own.eval()
