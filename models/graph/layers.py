"""The layers of a network that can lose output channels, and the norms that lose entries with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from models.graph.kinds import CONVOLUTIONS, INSTANCE_NORMS, kind_of, output_axis, outputs_first
from models.graph.roles import PLAIN_NORMS
from utils.errors import UserError

if TYPE_CHECKING:
    from models.graph.channel_graph import ChannelGraph


@dataclass(frozen=True, eq=False)
class PrunableLayer:
    """A convolution or linear layer, and the batch or group norm that reads it: a pruned filter is cleared in both.

    A depthwise convolution `follows` the one whose channels it reads, if that is a single one: it keeps the same filters.
    """

    name: str
    module: nn.Module
    norm_name: str | None = None
    norm: nn.Module | None = None
    follows: str | None = None

    @property
    def filters(self) -> int:
        return self.module.out_features if self.is_linear else self.module.out_channels

    @property
    def is_linear(self) -> bool:
        return isinstance(self.module, nn.Linear)

    @property
    def has_images(self) -> bool:
        """Whether each filter gives maps of two axes."""
        return kind_of(self.module).axes == 2

    @property
    def weight(self) -> Tensor:
        """A view of the weight with the filters first: (F, inputs a group, *kernel)."""
        return self.filters_first(self.module.weight)

    def filters_first(self, tensor: Tensor) -> Tensor:
        """The same of a tensor in the shape of the weight, such as its gradient."""
        return outputs_first(self.module, tensor)

    @property
    def groups(self) -> int:
        """The groups of a grouped convolution, which lose equally many filters."""
        return 1 if self.is_linear else self.module.groups

    @property
    def block(self) -> int:
        """How many neighbouring filters go together: those that a group norm normalises by one mean and deviation."""
        return self.norm.num_channels // self.norm.num_groups if isinstance(self.norm, nn.GroupNorm) else 1

    @property
    def bn_weight(self) -> Tensor | None:
        """The weight (F,) of the batch norm, where there is one."""
        return None if isinstance(self.norm, (nn.GroupNorm, *INSTANCE_NORMS)) else getattr(self.norm, "weight", None)

    def own_parameters(self) -> dict[str, Tensor]:
        """Weight and, where there is one, bias, by their keys in the network's state dict."""
        return _existing(self.name, self.module, "weight", "bias")

    def zeroed(self) -> dict[str, Tensor]:
        """All that is 0 for a filter that gives only zeros, by its key: rows of the convolution and of its batch norm."""
        return self.own_parameters() | _zeros_of_norm(self.norm_name, self.norm)


@dataclass(frozen=True, eq=False)
class SharedNorm:
    """A batch or group norm that reads the filters of several convolutions, or of one among other readers.

    It has no scores of its own: an entry goes with the filters that it reads (`models.graph.groups`).
    """

    name: str
    norm: nn.Module
    norm_name: None = None

    @property
    def filters(self) -> int:
        return self.norm.num_channels if isinstance(self.norm, nn.GroupNorm) else self.norm.num_features

    def own_parameters(self) -> dict[str, Tensor]:
        return {}

    def zeroed(self) -> dict[str, Tensor]:
        """All that is 0 for an entry that gives only zeros of a map of zeros, by its key."""
        return _zeros_of_norm(self.name, self.norm)


def shared_norms(model: nn.Module, layers: Sequence[PrunableLayer]) -> list[SharedNorm]:
    """The batch and group norms of `model` that belong to none of `layers`."""
    owned = {layer.norm_name for layer in layers}
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, (*PLAIN_NORMS, nn.GroupNorm))]
    return [SharedNorm(name, norm) for name, norm in norms if name not in owned]


def _zeros_of_norm(name: str | None, norm: nn.Module | None) -> dict[str, Tensor]:
    # Without weight and bias it gives `-mean / std` for a map of zeros in evaluation: its mean is 0 as well.
    return _existing(name, norm, "weight", "bias") or _existing(name, norm, "running_mean")


def _existing(name: str | None, layer: nn.Module | None, *tensors: str) -> dict[str, Tensor]:
    found = {f"{name}.{key}": getattr(layer, key, None) for key in tensors}
    return {key: tensor for key, tensor in found.items() if tensor is not None}


def prunable_layers(graph: "ChannelGraph", *, linear: bool = False) -> list[PrunableLayer]:
    """Every convolution of the network but one that classifies, in `named_modules()` order: the order of proportions.

    Of 1-D, 3-D and transposed ones those of more than one filter, not in groups where they are transposed and not depthwise.
    With `linear` also every linear layer whose outputs are hidden units of an MLP. A batch or group norm belongs to a layer if
    it reads its output directly, and neither of them is used twice. Raises UserError for a network that has nothing to prune.
    """
    classifiers, hidden = graph.classifying_layers, graph.hidden_layers if linear else ()
    layers = []
    for name, module in graph.network.named_modules():
        if name in hidden or (_is_prunable(module) and name not in classifiers):
            norm_name = graph.norm_pairs.get(name)
            norm = graph.network.get_submodule(norm_name) if norm_name else None
            layers.append(PrunableLayer(name, module, norm_name, norm, follows=graph.depthwise_producers.get(name)))
    if not layers:
        raise UserError(f"{type(graph.network).__name__} has no layer to prune")
    return layers


def _is_prunable(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return True
    return isinstance(layer, CONVOLUTIONS) and layer.out_channels > 1 and output_axis(layer) is not None
