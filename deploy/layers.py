"""Single layers, to be timed at other widths than a network has them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, nn

from deploy.runtimes import SESSIONS
from models.graph import ChannelGraph
from utils.errors import UserError
from utils.modes import evaluating


@dataclass(frozen=True)
class LayerKind:
    """A convolution or linear layer of a network, and what it is given: maps of `size` (H, W), or (N,) vectors.

    `groups` 0 stands for a depthwise convolution. `has_norm` says whether a norm and an activation follow.
    """

    inputs: int
    outputs: int
    size: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()  # before and after, by dimension
    dilation: tuple[int, ...] = ()
    groups: int = 1
    has_norm: bool = False

    @property
    def is_linear(self) -> bool:
        return not self.kernel

    @property
    def key(self) -> str:
        """What it has in common with layers of other widths."""
        if self.is_linear:
            return f"linear, {self.size[0]} vectors"
        shape = "depthwise " if self.groups == 0 else f"{self.groups} groups " if self.groups > 1 else ""
        parts = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return (
            f"{shape}conv {_times(self.kernel)} of {_times(self.size)}, "
            + ", ".join(f"{name} {value}" for name, value in parts.items())
            + (", with norm" if self.has_norm else "")
        )

    @property
    def macs(self) -> int:
        """Multiply-accumulates for an image, roughly: padding and borders are not looked at."""
        if self.is_linear:
            return self.inputs * self.outputs * self.size[0]
        positions = torch.tensor(self.size).div(torch.tensor(self.stride)).ceil().prod().int().item()
        window = torch.tensor(self.kernel).prod().item()
        return positions * window * self.outputs * (1 if self.groups == 0 else self.inputs // self.groups)

    def pair(self, inputs: int, outputs: int) -> tuple[int, int]:
        """The widths that a layer of this kind has in place of these: as many in as out, or whole groups."""
        if self.groups == 0:
            return outputs, outputs
        return tuple(self.groups * max(1, round(width / self.groups)) for width in (inputs, outputs))

    def pairs(self, inputs: Sequence[int], outputs: Sequence[int]) -> Iterable[tuple[int, int]]:
        return dict.fromkeys(self.pair(*each) for each in product(inputs, outputs))


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


@torch.no_grad()
def kinds_of_layers(network: nn.Module, images: Tensor) -> dict[str, LayerKind]:
    """The two-dimensional convolutions and linear layers of `network`, by name, as `images` (N, C, H, W) meet them."""
    found: dict[str, LayerKind] = {}
    normed = ChannelGraph(network, images[:2]).norm_pairs

    def note(name: str) -> Callable[..., None]:
        return lambda layer, inputs, _: found.update({name: _kind(layer, inputs[0], has_norm=name in normed)})

    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(note(name)) for name, layer in layers]
    try:
        with evaluating(network):
            network(images[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return {name: found[name] for name, _ in layers if name in found}


def _kind(layer: nn.Conv2d | nn.Linear, given: Tensor, *, has_norm: bool) -> LayerKind:
    if isinstance(layer, nn.Linear):
        return LayerKind(layer.in_features, layer.out_features, (given[0, ..., 0].numel(),))
    groups = 0 if 1 < layer.groups == layer.in_channels == layer.out_channels else layer.groups
    return LayerKind(
        layer.in_channels,
        layer.out_channels,
        tuple(given.shape[2:]),
        kernel=layer.kernel_size,
        stride=layer.stride,
        padding=_padding(layer),
        dilation=layer.dilation,
        groups=groups,
        has_norm=has_norm,
    )


def _padding(layer: nn.Conv2d) -> tuple[tuple[int, int], ...]:
    if layer.padding == "valid":
        return ((0, 0), (0, 0))
    if layer.padding == "same":
        totals = [dilation * (kernel - 1) for dilation, kernel in zip(layer.dilation, layer.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((pad, pad) for pad in layer.padding)


def random_input(shape: tuple[int, ...], runtime: str, device: torch.device) -> Tensor:
    given = torch.randn(shape, device=device)
    return given.to(memory_format=torch.channels_last) if runtime == "torch" and len(shape) == 4 else given


def layer_runner(
    kind: LayerKind,
    inputs: int,
    outputs: int,
    runtime: str,
    images: Tensor,
    *,
    draw: Callable[[tuple[int, ...], str, torch.device], Tensor] = random_input,
) -> Callable[[], object]:
    """What runs a layer of this kind with such widths and random weights, for as many images as `images` has.

    It is given what `draw` says, which may be the same for all runners of one input width.
    """
    inputs, outputs = kind.pair(inputs, outputs)
    kind = replace(kind, inputs=inputs, outputs=outputs)
    shape = (len(images), kind.size[0], inputs) if kind.is_linear else (len(images), inputs, *kind.size)
    given = draw(shape, runtime, images.device)
    if runtime == "torch":
        layer = _module(kind).to(images.device, memory_format=torch.channels_last).eval()

        def run() -> Tensor:
            with torch.inference_mode():
                return layer(given)

        return run
    session = SESSIONS[runtime](_onnx(kind, shape))
    return lambda: session(given)


def _module(kind: LayerKind) -> nn.Module:
    if kind.is_linear:
        return nn.Linear(kind.inputs, kind.outputs)
    (top, bottom), (left, right) = kind.padding
    is_even = top == bottom and left == right
    layers: list[nn.Module] = [] if is_even else [nn.ZeroPad2d((left, right, top, bottom))]
    layers.append(
        nn.Conv2d(
            kind.inputs,
            kind.outputs,
            kind.kernel,
            kind.stride,
            (top, left) if is_even else 0,
            kind.dilation,
            kind.groups or kind.outputs,
            bias=not kind.has_norm,
        )
    )
    return nn.Sequential(*layers, *([nn.BatchNorm2d(kind.outputs), nn.ReLU(inplace=True)] if kind.has_norm else []))


def _onnx(kind: LayerKind, shape: Sequence[int]) -> bytes:
    """The layer as an ONNX file; its norm is part of its weights, as runtimes make it."""
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise UserError("ONNX needs more packages, pip install -r requirements-export.txt") from error
    weight = _module(replace(kind, has_norm=False))
    layer = weight if kind.is_linear else weight[-1]
    weight, bias = layer.weight.detach(), layer.bias.detach()
    if kind.is_linear:
        nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Add", ["m", "b"], ["y"])]
        weight = weight.t().contiguous()
    else:
        befores, afters = zip(*kind.padding, strict=True)
        attributes = {"kernel_shape": kind.kernel, "strides": kind.stride, "dilations": kind.dilation}
        attributes |= {"pads": (*befores, *afters), "group": kind.groups or kind.outputs}
        nodes = [helper.make_node("Conv", ["x", "w", "b"], ["c" if kind.has_norm else "y"], **attributes)]
        nodes += [helper.make_node("Relu", ["c"], ["y"])] if kind.has_norm else []
    tensors = [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in (("w", weight), ("b", bias))]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()
