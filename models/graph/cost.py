"""What a network costs once it has only some of its channels, known without building it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.graph.channels import LayerCut
from models.graph.kinds import WEIGHED, kind_of
from models.graph.plan import output_channels
from utils.modes import evaluating
from utils.profile import profile_network

if TYPE_CHECKING:
    from models.graph.channel_graph import ChannelGraph

Widths = Mapping[str, tuple[int, int]]  # by layer: input and output channels


@dataclass(frozen=True)
class _Layer:
    """How many weights a layer has for each pair of channels, at how many positions, and how many numbers for each output."""

    window: int
    positions: int
    vectors: int


@dataclass(frozen=True)
class LayerCosts:
    """Multiply-accumulates and parameters of the layers of a network, as `utils.profile` counts them, by their channels.

    `dense` is the cost of the whole network for one input, `others` that of what cannot be cut.
    """

    layers: Mapping[str, _Layer]
    dense: Mapping[str, int]
    others: Mapping[str, int]

    @classmethod
    def of(cls, graph: "ChannelGraph") -> "LayerCosts":
        """The network runs twice, in evaluation, for the first of the graph's inputs."""
        network, inputs = graph.network, [each[:1] for each in graph.inputs]
        positions = positions_of_layers(network, *inputs)
        cuts = graph.plan_of({}).cuts()
        layers = {name: _layer(network.get_submodule(name), cut, positions.get(name, 0)) for name, cut in cuts.items()}
        profile = profile_network(network, *inputs)
        dense = {"macs": profile["macs"], "params": profile["parameters"]}
        own = cls(layers, dense, {"macs": 0, "params": 0}).of_cuts(cuts)
        return cls(layers, dense, {kind: dense[kind] - own[kind] for kind in dense})

    def of_cuts(self, cuts: Mapping[str, LayerCut]) -> dict[str, int]:
        """`macs` of an input and `params` of the network whose layers are cut so."""
        macs, params = self.others["macs"], self.others["params"]
        for name, cut in cuts.items():
            layer = self.layers[name]
            weights = len(cut.rows) * len(cut.columns[0]) * layer.window if cut.columns is not None else 0
            macs += layer.positions * weights
            params += weights + len(cut.rows) * layer.vectors
        return {"macs": macs, "params": params}

    def widths(self, cuts: Mapping[str, LayerCut]) -> dict[str, tuple[int, int]]:
        """The channels that each convolution and linear layer reads and gives."""
        layers = {name: cut for name, cut in cuts.items() if cut.columns is not None}
        return {name: (sum(map(len, cut.columns)), len(cut.rows)) for name, cut in layers.items()}


def _layer(layer: nn.Module, cut: LayerCut, positions: int) -> _Layer:
    vectors = [value for key, value in layer.named_parameters(recurse=False) if key != "weight" or cut.columns is None]
    window = layer.weight[0, 0].numel() if cut.columns is not None else 0
    return _Layer(window, positions, sum(value.dim() > 0 for value in vectors))


def _positions(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> int:
    """A transposed convolution multiplies each pixel that it reads with its weight, the others each that they give."""
    if kind_of(layer).transposed:
        return given[0].numel() // layer.in_channels
    return output.numel() // output_channels(layer)


def positions_of_layers(model: nn.Module, *inputs: Tensor) -> dict[str, int]:
    """How often each convolution and linear layer multiplies its weight with something, for one input, such as an image."""
    positions: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        return lambda layer, given, output: positions.update({name: _positions(layer, given, output)})

    hooks = [layer.register_forward_hook(count(name)) for name, layer in model.named_modules() if isinstance(layer, WEIGHED)]
    try:
        with evaluating(model), torch.no_grad():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return positions
