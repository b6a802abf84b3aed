"""What a network costs once it has only some of its channels, known without building it."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from models.graph import Channels, LayerCut, output_channels, plan_channels, trace_network
from utils.modes import evaluating
from utils.profile import profile_network

Widths = Mapping[str, tuple[int, int]]  # by layer: input and output channels
NANOSECONDS = 1e9


class NetworkCost:
    """Multiply-accumulates and parameters of `model` with only some channels, as `utils.profile` counts them when it is built.

    `image` (1, C, H, W) says at how many positions each layer works; it goes through the network once, in evaluation. With
    `seconds`, which knows the time of a network by the widths of its layers, also its `latency` in nanoseconds.
    """

    def __init__(self, model: nn.Module, image: Tensor, *, seconds: Callable[[Widths], float] | None = None):
        self._model, self._seconds = model, seconds
        self._graph = trace_network(model, example=image).graph
        self._positions = positions_of_layers(model, image)
        profile = profile_network(model, image)
        self.dense = {"macs": profile["macs"], "params": profile["parameters"]}
        cut = self._of_cut_layers(self._cuts({}))
        self._others = {kind: self.dense[kind] - cut[kind] for kind in cut}  # of what cannot be cut

    def __call__(self, kept: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """`macs` of an image, `params` and `latency` of what `models.narrow.narrow(model, kept)` would return."""
        cuts = self._cuts(kept)
        costs = {kind: self._others[kind] + cost for kind, cost in self._of_cut_layers(cuts).items()}
        if self._seconds is not None:
            costs["latency"] = round(NANOSECONDS * self._seconds(_widths(cuts)))
        return costs

    def widths(self, kept: Mapping[str, Sequence[int]]) -> Widths:
        """The channels that each convolution and linear layer reads and gives in that network."""
        return _widths(self._cuts(kept))

    def _cuts(self, kept: Mapping[str, Sequence[int]]) -> dict[str, LayerCut]:
        def live_outputs(name: str, layer: nn.Module, given: Channels | None) -> Sequence[int]:
            return kept[name] if name in kept else range(output_channels(layer))

        return plan_channels(self._graph, self._model, live_outputs=live_outputs, carriers=frozenset()).cuts()

    def _of_cut_layers(self, cuts: Mapping[str, LayerCut]) -> dict[str, int]:
        macs = params = 0
        for name, cut in cuts.items():
            layer = self._model.get_submodule(name)
            weights = _weights(layer, cut)
            macs += self._positions.get(name, 0) * weights
            vectors = [value for key, value in layer.named_parameters(recurse=False) if key != "weight" or cut.columns is None]
            params += weights + sum(len(cut.rows) for value in vectors if value.dim())
        return {"macs": macs, "params": params}


def _widths(cuts: Mapping[str, LayerCut]) -> Widths:
    layers = {name: cut for name, cut in cuts.items() if cut.columns is not None}
    return {name: (sum(map(len, cut.columns)), len(cut.rows)) for name, cut in layers.items()}


def _weights(layer: nn.Module, cut: LayerCut) -> int:
    """The entries that are left of the weight of a convolution or a linear layer."""
    if cut.columns is None:
        return 0
    return len(cut.rows) * len(cut.columns[0]) * layer.weight[0, 0].numel()


def positions_of_layers(model: nn.Module, image: Tensor) -> dict[str, int]:
    """How often each convolution and linear layer multiplies its weight with something, for one image."""
    positions: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        return lambda layer, _, output: positions.update({name: output.numel() // output_channels(layer)})

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    hooks = [layer.register_forward_hook(count(name)) for name, layer in model.named_modules() if isinstance(layer, kinds)]
    try:
        with evaluating(model), torch.no_grad():
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return positions
