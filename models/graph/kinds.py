"""The kinds of layers that multiply with a weight, and where that weight has the layer's outputs: one table for all who ask."""

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class LayerKind:
    """`axes` is the number of axes of an image behind the channels, 0 for a linear layer.

    A transposed convolution has its weight as (inputs, outputs a group, *kernel), all others as (outputs, inputs a group, ...).
    """

    module: type[nn.Module]
    axes: int
    transposed: bool = False


KINDS = (
    LayerKind(nn.Linear, 0),
    *(LayerKind(getattr(nn, f"Conv{axes}d"), axes) for axes in (1, 2, 3)),
    *(LayerKind(getattr(nn, f"ConvTranspose{axes}d"), axes, transposed=True) for axes in (1, 2, 3)),
)
WEIGHED = tuple(kind.module for kind in KINDS)
CONVOLUTIONS = tuple(kind.module for kind in KINDS if kind.axes)
TRANSPOSED = tuple(kind.module for kind in KINDS if kind.transposed)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def kind_of(layer: nn.Module) -> LayerKind | None:
    return next((kind for kind in KINDS if isinstance(layer, kind.module)), None)


def output_axis(layer: nn.Module) -> int | None:
    """The axis of the layer's tensors along which its outputs lie; None where no single axis of the weight has them.

    That is so for a transposed convolution in groups of more than one channel, where an output is a part of two axes. One with
    a group for each channel has outputs and inputs on the first. Norms and biases have but one axis.
    """
    kind = kind_of(layer)
    if kind is None or not kind.transposed or 1 < layer.groups == layer.in_channels == layer.out_channels:
        return 0
    return 1 if layer.groups == 1 else None


def outputs_first(layer: nn.Module, tensor: Tensor) -> Tensor:
    """A view of `tensor`, of the shape of the layer's weight, with the outputs on its first axis."""
    return tensor.transpose(0, output_axis(layer) or 0)


def axis_of(network: nn.Module, key: str) -> int:
    """The axis of the tensor `key` of the network along which the outputs of its layer lie."""
    path, _, name = key.rpartition(".")
    return (output_axis(network.get_submodule(path)) or 0) if name == "weight" else 0


def unusual_axes(network: nn.Module) -> dict[str, int]:
    """`axis_of` by key, of the weights in which it is not 0."""
    axes = {f"{name}.weight": output_axis(layer) for name, layer in network.named_modules(remove_duplicate=False)}
    return {key: axis for key, axis in axes.items() if axis}
