"""Small networks to archive, and archives with another inside and a digest that agrees all the same."""

import hashlib
import json
import re

import torch
from safetensors.numpy import load, save
from selections import narrow
from torch import nn

from models.cifar_resnet import CifarResNet
from quantize.codebook import bake_weights, layer_bits, share_weights
from utils.images.spec import ImageSpec

NO_DIGEST = "0" * 64
KEPT = {"stage_1.0.conv_a": [0, 3, 4, 9], "stage_1.0.bn_a": [0, 3, 4, 9], "stage_2.0.conv_b": [], "stage_2.0.bn_b": []}

IMAGES = ImageSpec(("0" * 64, "größe", 'a "b"', "猫"), (16, 24), (0.1, 0.2, 1 / 3), (0.25, 0.5, 1.0))


class Tiny(nn.Module):
    """One convolution, one batch norm, one linear layer."""

    def __init__(self, *, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


def small_resnet(*, num_classes):
    return CifarResNet(depth=8, num_classes=num_classes)


TEST_MODELS = {"tiny": Tiny, "small": small_resnet}


def network_of(name, *, kept=None, bits="3", num_classes=4):
    """A network with random batch norms, quantized, in evaluation mode."""
    torch.manual_seed(0)
    network = TEST_MODELS[name](num_classes=num_classes)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    if kept:
        network = narrow(network, kept)
    share_weights(network, layer_bits(network, mode="all", bits=[bits]))
    return bake_weights(network).eval()


def edited(data, *, description=None, sections=None):
    """The archive with members of its description and whole sections replaced (None takes one out), its digest renewed."""
    length = int.from_bytes(data[:8], "little")
    text = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["archive"])
    text = {name: value for name, value in {**text, "sha256": NO_DIGEST, **(description or {})}.items() if value is not None}
    tensors = {name: value for name, value in {**load(data), **(sections or {})}.items() if value is not None}
    return rehashed(save(tensors, {"archive": json.dumps(text, separators=(",", ":"))}))


def rehashed(data):
    """The bytes with the digest that they ought to have, where there is one."""
    found = re.search(rb'sha256\\":\\"([0-9a-f]{64})', data)
    if found is None:
        return data
    blank = data[: found.start(1)] + NO_DIGEST.encode() + data[found.end(1) :]
    return data[: found.start(1)] + hashlib.sha256(blank).hexdigest().encode() + data[found.end(1) :]
