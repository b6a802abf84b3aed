"""Random small networks of the operations that zeros are followed through, and of those that are easily taken for others."""

import operator

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.shufflenetv2 import channel_shuffle

ACTIVATIONS = (F.relu, F.silu, torch.sigmoid, F.leaky_relu, F.gelu, torch.tanh)
WRITES = (
    lambda first, second: F.relu(first, True),
    lambda first, second: first.clamp_(0.1, 1),
    lambda first, second: first.mul_(2),
    lambda first, second: first.add_(second.mean((1, 2, 3), keepdim=True)),
    lambda first, second: F.hardsigmoid(first, inplace=True),
    lambda first, second: operator.iadd(first, 1),
)
OPERATIONS = ("conv", "grouped", "depthwise", "bn", "act", "add", "mul", "cat", "pool", "pad", "part", "shuffle")
OPERATIONS += ("again", "view", "write")


class RandomNetwork(nn.Module):
    """Operations given by (kind, first source, second source, variant), each reading results of those before it."""

    def __init__(self, operations: list[tuple[str, int, int, int]], *, hidden: int):
        super().__init__()
        self.layers = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3, padding=1)})
        self.operations, widths = [], [4]
        for kind, first, second, variant in operations:
            first, second = first % len(widths), second % len(widths)
            width = self._add(str(len(widths)), kind, widths[first], widths[second], variant)
            self.operations.append((kind if width else "none", first, second, variant))
            widths.append(width or widths[first])
        self.hidden = nn.Linear(widths[-1], hidden)
        self.classifier = nn.Linear(hidden, 3)

    def _add(self, name: str, kind: str, width: int, other: int, variant: int) -> int:
        """Adds the operation's layer; returns its width, 0 where it does not apply."""
        groups = {"conv": 1, "grouped": 2, "depthwise": width}.get(kind)
        if groups:
            filters = width if kind == "depthwise" else 2 * (1 + variant % 4)
            if width % groups:
                return 0
            self.layers[name] = nn.Conv2d(width, filters, 3, padding=1, groups=groups, bias=variant % 2 == 0)
            return filters
        if kind == "bn":
            self.layers[name] = nn.BatchNorm2d(width, affine=variant % 4 > 0)
            self.layers[name].running_mean.normal_()
        if kind == "again":  # a layer a second time
            used = [own for own in self.layers.values() if getattr(own, "in_channels", None) == width]
            if not used:
                return 0
            self.layers[name] = used[variant % len(used)]
            return self.layers[name].out_channels
        if kind in ("add", "mul"):
            return width if width == other else 0
        if kind in ("part", "shuffle"):
            return 0 if width % 2 else width // 2 if kind == "part" else width
        return {"cat": width + other, "pad": width + 3}.get(kind, width)

    def forward(self, x: Tensor) -> Tensor:
        results = [self.layers["stem"](x)]
        for kind, first, second, variant in self.operations:
            results.append(self._result(str(len(results)), kind, results[first], results[second], variant))
        return self.classifier(F.relu(self.hidden(results[-1].mean((2, 3)))))

    def _result(self, name: str, kind: str, first: Tensor, second: Tensor, variant: int) -> Tensor:
        if name in self.layers:
            return self.layers[name](first)
        return {
            "none": lambda: first,
            "act": lambda: ACTIVATIONS[variant % len(ACTIVATIONS)](first),
            "add": lambda: first + second,
            "mul": lambda: first * second,
            "cat": lambda: torch.cat([first, second], 1),
            "pool": lambda: F.max_pool2d(first, 3, 1, 1) if variant % 2 else F.avg_pool2d(first, 3, 1, 1),
            "pad": lambda: F.pad(first, (0, 0, 0, 0, 1, 2)),
            "part": lambda: first.chunk(2, 1)[variant % 2],
            "shuffle": lambda: channel_shuffle(first, 2),
            "view": lambda: first.flatten(2).unflatten(2, first.shape[2:]) if variant % 2 else first.transpose(2, 3),
            "write": lambda: WRITES[variant % len(WRITES)](first, second),
        }[kind]()


def prune_at_random(model: nn.Module, *, seed: int, dead_share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d | nn.Linear) and layer is not model.classifier:
            size = len(layer.weight) if layer.weight is not None else layer.num_features
            dead = torch.rand(size, generator=generator) < dead_share
            for tensor in (layer.weight, layer.bias):
                if tensor is not None:
                    tensor.data[dead] = 0
            if layer.weight is None:
                layer.running_mean[dead] = 0


def network_descriptions() -> st.SearchStrategy:
    operation = st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 7), st.integers(0, 7), st.integers(0, 7))
    return st.lists(operation, min_size=1, max_size=8)
