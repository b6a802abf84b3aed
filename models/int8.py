"""A network as runtimes compute it in eight bits, simulated in float, so that it can be trained: Jacob et al., CVPR 2018.

Weights of convolutions and linear layers are rounded to int8, or 7 bits of it, symmetric, with a scale for each output
channel, after the batch norm behind them was folded into them with its running statistics; biases to int32. Activations are
rounded to uint8 between bounds that follow what training shows: where a convolution, a linear layer or a sum reads them, and
what a convolution or a sum gives, behind the ReLU where one follows. The logits are not rounded. Gradients pass through the
rounding as if it were not there, but for activations out of bounds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from models.batch_norm import UnevenBatchNorm2d
from models.graph.function import GraphFunction
from models.narrow import NarrowNetwork
from models.narrow.relayout import AddInto, MaskedRelayout, Relayout
from models.narrow.reuse import is_relu, is_sum
from models.outputs import Outputs
from utils.errors import UserError, shown

UINT8_MAX = 255
WEIGHT_MAX = {7: 64, 8: 127}  # the largest weight by its bits: 2 * 64 * 255 is within 16 bits
LEAST_WEIGHT_STEP = 1e-30  # weights that need a smaller one are rounded to zero: its reciprocal overflows
MOMENTUM = 0.01  # of the bounds of activations
LEAST_STEP = 1e-8  # between two values of an activation that is always zero
NORMS = (nn.BatchNorm2d, UnevenBatchNorm2d)


class Bounds(nn.Module):
    """Rounds activations to 256 values between `low` and `high`, which follow those of the batches in training.

    The first batch sets them. 0 is always one of the values.
    """

    def __init__(self, device: torch.device | None = None):
        super().__init__()
        self.register_buffer("low", torch.zeros((), device=device))
        self.register_buffer("high", torch.zeros((), device=device))

    def scale_and_zero(self) -> tuple[Tensor, Tensor]:
        """The step between two values, and which of 0 to 255 stands for 0 (int32)."""
        low, high = self.low.clamp(max=0), self.high.clamp(min=0)
        scale = ((high - low) / UINT8_MAX).clamp(min=LEAST_STEP)
        return scale, (-low / scale).round().clamp(0, UINT8_MAX).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        if self.training:
            self._follow(x.detach())
        scale, zero = self.scale_and_zero()
        if torch.is_grad_enabled():
            return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, UINT8_MAX)
        return ((x / scale).round() + zero).clamp(0, UINT8_MAX).sub(zero) * scale  # as runtimes do it

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        low, high = torch.aminmax(x)
        is_first = self.low.eq(self.high)
        for bound, found in ((self.low, low), (self.high, high)):
            bound.copy_(torch.where(is_first, found, bound.lerp(found, MOMENTUM)))


class _SimulatedLayer(nn.Module):
    """A convolution or linear layer with rounded weights, and the batch norm behind it folded into them.

    Both stay modules of the network that they come from: this one holds no tensor of its own.
    """

    def __init__(self, layer: nn.Module, norm: nn.Module | None, given: Bounds, *, weight_bits: int):
        super().__init__()
        self._largest = WEIGHT_MAX[weight_bits]
        self._others = (layer, norm, given)  # in a tuple, so that they are not submodules

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the batch norm in them."""
        layer, norm, _ = self._others
        if norm is None:
            return layer.weight, layer.bias
        factor = torch.rsqrt(norm.running_var + norm.eps)
        factor = factor if norm.weight is None else factor * norm.weight
        bias = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
        bias = bias * factor if norm.bias is None else bias * factor + norm.bias
        return layer.weight * factor.view(-1, *[1] * (layer.weight.dim() - 1)), bias

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if own is None else own.float() for own in self.folded())
        scale = weight.detach().abs().amax(dim=tuple(range(1, weight.dim()))) / self._largest
        scale = torch.where(scale > LEAST_WEIGHT_STEP, scale, torch.ones_like(scale))
        given = self._others[2].scale_and_zero()[0]
        step = scale * given  # of a bias, and of what the layer gives
        if torch.is_grad_enabled():
            zero = torch.zeros_like(scale, dtype=torch.int32)
            weight = torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -self._largest, self._largest)
            bias = None if bias is None else bias + ((bias / step).round() * step - bias).detach()
            return self._run(x, weight, bias)
        # whole numbers, of which float holds every sum exactly that runtimes form in 32 bits, unless it is huge
        rows = (-1, *[1] * (weight.dim() - 1))
        whole = (weight / scale.view(rows)).round()
        total = self._run((x / given).round(), whole, None if bias is None else (bias / step).round())
        return total * (step if weight.dim() == 2 else step.view(-1, 1, 1))

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        layer = self._others[0]
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, bias)
        return layer._conv_forward(x, weight, bias)  # with its own padding

    def plain(self) -> nn.Module:
        """A layer of the same kind with the batch norm in it."""
        layer = self._others[0]
        weight, bias = self.folded()
        if isinstance(layer, nn.Linear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta")
        else:
            sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            plain = nn.Conv2d(*sizes, layer.groups, bias is not None, layer.padding_mode, device="meta")
        plain.weight = nn.Parameter(weight.detach().clone())
        plain.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        return plain.train(layer.training)


@dataclass
class _Rewritten:
    """A graph with `bounds.K` behind what is rounded, and `simulated.NAME` in place of layers; names by K."""

    graph: fx.Graph
    layers: dict[str, str | None]  # with the batch norm that is folded
    given: dict[str, int]  # whose bounds are those of a layer's input
    rounded: list[str]


class Int8Network(nn.Module):
    """`network` in simulated eight bits: the same `forward` and `outputs`. What it trains are the network's own parameters.

    The bounds of its activations are buffers, of 0 until batches were seen in training mode. Raises UserError for a network
    in which no layer can be rounded. Weights of 8 bits are those of processors with VNNI, of 7 those of any (`WEIGHT_MAX`).
    """

    def __init__(self, network: NarrowNetwork, *, weight_bits: int = 8):
        super().__init__()
        self.network = network
        methods = ("forward", "outputs") if network.has_outputs else ("forward",)
        plans = {method: _rewrite(network.graph(method), network) for method in methods}
        first = plans["forward"]
        if not first.layers:
            raise UserError("the network has no convolution and no linear layer, so nothing of it can be int8")
        if any((len(plan.rounded), plan.layers) != (len(first.rounded), first.layers) for plan in plans.values()):
            raise UserError("the network's outputs(x) computes something else than its forward: it cannot be simulated in int8")
        if len(set(map(_key, first.layers))) < len(first.layers):
            raise UserError("two of the network's layers have names that differ in . and _ alone: it cannot be simulated in int8")
        device = next(network.parameters()).device
        self.bounds = nn.ModuleList(Bounds(device) for _ in first.rounded)
        self.names, self.layers = first.rounded, list(first.layers)
        owner = _with_parts_of(network.bare())
        owner.bounds_ = self.bounds
        owner.simulated_ = nn.ModuleDict()
        for name, norm in first.layers.items():
            pair = (network.get_submodule(name), network.get_submodule(norm) if norm else None)
            owner.simulated_[_key(name)] = _SimulatedLayer(*pair, self.bounds[first.given[name]], weight_bits=weight_bits)
        self._others = (owner,)  # in a tuple, so that it is no submodule
        self.functions = {method: GraphFunction(plan.graph) for method, plan in plans.items()}
        self.train(network.training)

    @classmethod
    def with_ranges(cls, network: NarrowNetwork, ranges: Mapping[str, Any], *, weight_bits: int = 8) -> "Int8Network":
        """In evaluation, with the bounds that `ranges` gave. Raises UserError for those of another network."""
        own = cls(network, weight_bits=weight_bits).eval()
        own.load_ranges(ranges)
        return own

    def forward(self, x: Tensor) -> Tensor:
        return self.functions["forward"](self._others[0], self.training, x)

    def outputs(self, x: Tensor) -> Outputs:
        return self.functions["outputs"](self._others[0], self.training, x)

    @property
    def kept(self) -> dict[str, list[int]]:
        return self.network.kept

    def train(self, mode: bool = True) -> "Int8Network":
        """Batch norms keep their running statistics: these are what is folded."""
        super().train(mode)
        for module in self.network.modules():
            if isinstance(module, NORMS):
                module.eval()
        return self

    def ranges(self) -> dict[str, tuple[float, float]]:
        """The bounds of the activations by the name of the operation that gives them."""
        return {name: (float(own.low), float(own.high)) for name, own in zip(self.names, self.bounds, strict=True)}

    def load_ranges(self, ranges: Mapping[str, Any]) -> None:
        """Takes what `ranges` gave. Raises UserError for those of another network."""
        if list(ranges) != self.names:
            odd = min(set(map(str, ranges)) ^ set(self.names), default="their order")
            raise UserError(f"its int8 ranges are those of another network or version: {shown(odd)}")
        for name, own in zip(self.names, self.bounds, strict=True):
            try:
                low, high = map(float, ranges[name])
            except (TypeError, ValueError) as error:
                raise UserError(f"its int8 range of {name} is {shown(ranges[name])}, expected two numbers") from error
            if not (low <= high and math.isfinite(high - low)):
                raise UserError(f"its int8 range of {name} goes from {low} to {high}, expected finite numbers that rise")
            own.low.fill_(low)
            own.high.fill_(high)

    def plain(self) -> tuple[nn.Module, list[str]]:
        """The network in float with its batch norms folded, which gives the logits and then all that is rounded; the names.

        The image itself, where it is rounded, is not given: its place in the names is that of the input.
        """
        own = self._others[0]
        owner = _with_parts_of(own)
        plain = nn.ModuleDict({key: layer.plain() for key, layer in own.simulated_.items()})
        graph = self.functions["forward"].graph()
        result = next(node for node in graph.nodes if node.op == "output")
        given, masked = [], nn.ModuleDict()
        for node in list(graph.nodes):
            step = own.get_submodule(node.target) if node.op == "call_module" else None
            if isinstance(step, Relayout) and not step.selects and step.axis == 1 and not step.flat:
                key = _key(node.target)
                node.target = f"masked_.{key}"
                masked[key] = MaskedRelayout(step)
            elif node.op == "call_module" and node.target.startswith("bounds_."):
                given += [node.args[0]]
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
            elif node.op == "placeholder" and node.name == "training":
                node.replace_all_uses_with(False)
                graph.erase_node(node)
        owner.simulated_, owner.masked_ = plain, masked
        result.args = ((result.args[0], *(node for node in given if node.op != "placeholder")),)
        return fx.GraphModule(owner, graph).eval(), [
            name for name, node in zip(self.names, given, strict=True) if node.op != "placeholder"
        ]


def _with_parts_of(module: nn.Module) -> nn.Module:
    """A plain module with the same submodules, parameters and buffers, to which others can be added."""
    owner = nn.Module()
    for registry in ("_modules", "_parameters", "_buffers"):
        getattr(owner, registry).update(getattr(module, registry))
    return owner


def _key(name: str) -> str:
    return name.replace(".", "_")


def _rewrite(graph: fx.Graph, network: NarrowNetwork) -> _Rewritten:
    """The graph in place: layers, what is rounded, and batch norms that are folded."""
    layers = network.bare()
    _open_sums(graph, layers)
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    pairs: dict[str, str | None] = {}
    rounded: dict[fx.Node, None] = {}
    reads: dict[str, fx.Node] = {}
    result = next(node for node in graph.nodes if node.op == "output")
    for node in list(graph.nodes):
        layer = layers.get_submodule(node.target) if node.op == "call_module" else None
        if type(layer) in (nn.Conv2d, nn.Linear) and calls.count(node.target) == 1 and len(node.args) == 1:
            pairs[node.target] = None
            reads[node.target] = node.args[0]
            rounded[node.args[0]] = None
            if isinstance(layer, nn.Conv2d):
                norm = _only_reader(node)
                if norm is not None and _folds(norm, layers) and calls.count(norm.target) == 1:
                    pairs[node.target] = norm.target
                    norm.replace_all_uses_with(node)
                    graph.erase_node(norm)
                rounded[_behind_relu(node, layers)] = None
            node.target = f"simulated_.{_key(node.target)}"
        elif is_sum(node):
            rounded |= dict.fromkeys((*node.args, _behind_relu(node, layers)))
    rounded.pop(result.args[0], None) if isinstance(result.args[0], fx.Node) else None
    ordered = [node for node in graph.nodes if node in rounded]
    for number, node in enumerate(ordered):
        with graph.inserting_after(node):
            new = graph.call_module(f"bounds_.{number}", (node,))
        node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
    given = {name: ordered.index(node) for name, node in reads.items()}
    return _Rewritten(graph, pairs, given, [node.name for node in ordered])


def _folds(node: fx.Node, layers: nn.Module) -> bool:
    norm = layers.get_submodule(node.target) if node.op == "call_module" else None
    return type(norm) in NORMS and norm.track_running_stats


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _behind_relu(node: fx.Node, layers: nn.Module) -> fx.Node:
    """The ReLU that alone reads the node, or the node itself."""
    reader = _only_reader(node)
    return reader if reader is not None and is_relu(reader, layers) else node


def _open_sums(graph: fx.Graph, layers: nn.Module) -> None:
    """Sums of different channels as the steps that they consist of."""
    for node in list(graph.nodes):
        step = layers.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(step, AddInto):
            with graph.inserting_before(node):
                sides = [
                    graph.call_module(f"{node.target}.{name}", (side,)) if isinstance(getattr(step, name), Relayout) else side
                    for name, side in zip(("widen_whole", "widen_part"), node.args, strict=True)
                ]
                total = graph.call_function(torch.add, tuple(sides))
            node.replace_all_uses_with(total)
            graph.erase_node(node)
