"""Which channels of a network stay: the one form that choosing, masking, cutting and recording hand to each other."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from models.graph import ChannelGraph, output_channels
from models.graph.kinds import axis_of
from models.narrow.network import NarrowNetwork, narrow_network
from utils.errors import UserError, shown


@dataclass(frozen=True)
class Selection:
    """The output channels that stay of the layers of `graph`, norms and norms of several layers included.

    `kept` maps names of convolutions, norms and linear layers to ascending channels, possibly none; a layer that is not listed
    keeps all, and one that is listed with all is left out. The norm that alone reads a layer keeps what that one keeps, unless
    it is listed as well. Raises UserError for a name or channels that the network has not.
    """

    graph: ChannelGraph = field(repr=False, compare=False)
    kept: Mapping[str, Sequence[int]]

    def __post_init__(self) -> None:
        layers, norms = dict(self.graph.network.named_modules()), self.graph.norm_pairs
        kept: dict[str, tuple[int, ...]] = {}
        for name, channels in self.kept.items():
            kept[name] = _checked(self.graph.network, layers, name, channels)
            if name in norms and norms[name] not in self.kept:
                kept[norms[name]] = kept[name]
        lost = {name: channels for name, channels in kept.items() if len(channels) < output_channels(layers[name])}
        object.__setattr__(self, "kept", MappingProxyType(lost))

    @classmethod
    def literal(cls, graph: ChannelGraph, kept: Mapping[str, Sequence[int]]) -> "Selection":
        """Of what `kept` lists and nothing else: the norm of a layer stays whole where it is not listed."""
        norms = [norm for layer, norm in graph.norm_pairs.items() if layer in kept and norm not in kept]
        return cls(graph, {**{norm: range(output_channels(graph.network.get_submodule(norm))) for norm in norms}, **kept})

    @classmethod
    def from_json(cls, graph: ChannelGraph, kept: Any) -> "Selection":
        """The inverse of `to_json`. Raises UserError for what is no mapping from layers to lists of channels of the network."""
        lists = isinstance(kept, Mapping) and all(isinstance(own, list) for own in kept.values())
        if not lists or not all(isinstance(name, str) for name in kept):
            raise UserError(f"kept: a mapping from layers to lists of channels expected, not {shown(kept)}")
        return cls.literal(graph, kept)

    def to_json(self) -> dict[str, list[int]]:
        """`kept` as checkpoints hold it."""
        return {name: list(channels) for name, channels in self.kept.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Selection":
        return Selection.literal(copy.deepcopy(self.graph, memo), self.kept)

    @property
    def is_whole(self) -> bool:
        return not self.kept

    def channels(self, name: str) -> Sequence[int]:
        """The channels that stay of the layer `name`."""
        return self.kept[name] if name in self.kept else range(output_channels(self.graph.network.get_submodule(name)))

    def on(self, network: nn.Module) -> "Selection":
        """The same channels of another network of the same architecture. Raises UserError for others."""
        return self if network is self.graph.network else Selection.literal(self.graph.rebound(network), self.kept)

    def shrink(self, network: nn.Module | None = None, *, wide_sums: bool = False) -> NarrowNetwork:
        """The network that is left of `network`, that of the graph by default, see `models.narrow.network`.

        `wide_sums` leaves the outputs of layers that meet other channels in a sum at full width, with zeros: more arithmetic,
        but plain sums, for runtimes that add into places slowly (onnxruntime). Raises UserError for a network of another
        architecture, one whose layers were exchanged since it was traced, and one that cannot be traced or copied.
        """
        graph = self.graph if network is None else self.graph.rebound(network)
        graph.check_current()
        return narrow_network(graph, self.kept, wide_sums=wide_sums)

    @torch.no_grad()
    def mask(self, network: nn.Module | None = None) -> nn.Module:
        """A copy of `network`, that of the graph by default, at full width, with zeros in the place of all that is gone."""
        own = self.on(network if network is not None else self.graph.network)
        masked = copy.deepcopy(own.graph.network)
        for key, rows in own.zero_rows().items():
            tensor = tensor_of(masked, key)
            tensor.index_fill_(axis_of(masked, key), rows.to(tensor.device), 0)
        return masked

    def zero_rows(self, *, norms: bool = True) -> dict[str, Tensor]:
        """The outputs that are 0 in the masked network, int64 on the CPU, by the keys of its state dict, see `axis_of`.

        Those of layers and, with `norms`, of norms: without weight and bias a norm gives `-mean / std` for a map of zeros in
        evaluation, so that its mean is 0 there.
        """
        rows = {}
        for name, channels in self.kept.items():
            layer = self.graph.network.get_submodule(name)
            gone = sorted({*range(output_channels(layer))}.difference(channels))
            rows |= {f"{name}.{key}": torch.tensor(gone) for key in _zeroed_tensors(layer, norms=norms)}
        return rows

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the small network for one input like the graph's."""
        return self.graph.cost(self.kept)["macs"]

    @property
    def parameters(self) -> int:
        """Of the small network."""
        return self.graph.cost(self.kept)["params"]

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """The channels that each convolution and linear layer of the small network reads and gives."""
        return self.graph.widths(self.kept)


def tensor_of(network: nn.Module, key: str) -> Tensor:
    path, _, name = key.rpartition(".")
    return getattr(network.get_submodule(path), name)


def _zeroed_tensors(layer: nn.Module, *, norms: bool) -> list[str]:
    found = [name for name in ("weight", "bias") if getattr(layer, name, None) is not None]
    is_norm = not hasattr(layer, "out_channels") and not hasattr(layer, "out_features")
    if not is_norm:
        return found
    statistics = [name for name in ("running_mean",) if getattr(layer, name, None) is not None]
    return (found or statistics) if norms else []


def _checked(network: nn.Module, layers: Mapping[str, nn.Module], name: str, channels: Any) -> tuple[int, ...]:
    full = output_channels(layers[name]) if name in layers else None
    if full is None:
        raise UserError(
            f"kept channels: {type(network).__name__} has no convolution, batch norm or linear layer named {shown(name)}"
        )
    channels = channels.tolist() if isinstance(channels, Tensor) else list(channels)
    whole_numbers = all(type(channel) is int and 0 <= channel < full for channel in channels)
    if not whole_numbers or any(left >= right for left, right in pairwise(channels)):
        raise UserError(f"kept channels of {name!r}: ascending numbers from 0 to {full - 1} expected, not {shown(channels)}")
    return tuple(channels)
