"""What a network is: traced once, and handed down to everything that asks for its layers' roles, groups, cost or maps."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from models.graph import roles
from models.graph.call import LiveOutputs
from models.graph.channels import Channels, Plan, all_channels
from models.graph.cost import LayerCosts
from models.graph.groups import ChannelGroup, channel_groups
from models.graph.layers import PrunableLayer, SharedNorm, prunable_layers, shared_norms
from models.graph.plan import Planner, missing_carriers, output_channels
from models.graph.tracing import Trace, trace_network
from models.outputs import has_outputs
from utils.errors import UserError, shown

Kept = Mapping[str, Sequence[int]]  # by layer: the output channels that stay, ascending; a layer that is not listed keeps all


@dataclass
class _Findings:
    """What was found out about an architecture, without a tensor of any network of it."""

    traces: dict[str, Trace | tuple[Any, ...]] = field(default_factory=dict)
    planners: dict[str, Planner] = field(default_factory=dict)
    known: dict[Any, Any] = field(default_factory=dict)  # roles, groups and costs, by what they are called


class ChannelGraph:
    """The graph of `network` for inputs like `example`, from which its layers' roles, groups, cost and plans are read.

    `example` is a batch of inputs, or a tuple or mapping of them; only shapes, types and device count. Without one, usual image
    sizes are tried where the network's Python asks for sizes, and there is no cost. Nothing is traced before it is asked for,
    and each method once: another network of the same architecture takes what was found with `rebound`. Pass the bare network,
    not one wrapped by `torch.compile` or DistributedDataParallel, whose names differ. What asks for the graph raises UserError
    where the network cannot be traced.
    """

    def __init__(self, network: nn.Module, example: Tensor | Sequence[Tensor] | Mapping[str, Tensor] | None = None):
        self.network = network
        self.inputs = None if example is None else inputs_in_order(network, example)
        self._architecture = _architecture(network)
        self._findings = _Findings()

    def rebound(self, network: nn.Module) -> "ChannelGraph":
        """The graph of another network of the same architecture, which shares all that is known. Raises UserError for others."""
        if network is self.network:
            return self
        self._check_architecture(network)
        return self._bound(network)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ChannelGraph":
        return self._bound(copy.deepcopy(self.network, memo))

    def _bound(self, network: nn.Module) -> "ChannelGraph":
        other = ChannelGraph.__new__(ChannelGraph)
        other.network, other.inputs = network, self.inputs
        other._architecture, other._findings = self._architecture, self._findings
        return other

    def check_current(self) -> None:
        """Raises UserError where layers were exchanged since the graph was made."""
        self._check_architecture(self.network)

    def _check_architecture(self, network: nn.Module) -> None:
        found = _architecture(network)
        if found == self._architecture:
            return
        name = type(network).__name__
        for path in {**self._architecture, **found}:
            expected, other = (known.get(path, "nothing") for known in (self._architecture, found))
            if expected != other:
                raise UserError(
                    f"network: {name} is not the one that was traced: {path or 'itself'} is {shown(other)}, not {shown(expected)}"
                )
        raise UserError(f"network: {name} is not the one that was traced: its layers are in another order")

    # ---- operations ------------------------------------------------------------------------------------------------------

    @property
    def images(self) -> Tensor | None:
        """The first input."""
        return self.inputs[0] if self.inputs else None

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """`forward`, and `outputs` where the network has feature maps."""
        if hasattr(self.network, "find_maps_in"):
            self.network.find_maps_in(self)
        return ("forward", "outputs") if has_outputs(self.network, self.images) else ("forward",)

    def trace(self, method: str = "forward") -> Trace:
        traces = self._findings.traces
        if method not in traces:
            try:
                traces[method] = self._traced(method)
            except UserError as error:
                traces[method] = error.args
        if not isinstance(traces[method], Trace):
            raise UserError(*traces[method])
        return traces[method]

    def _traced(self, method: str) -> Trace:
        own = getattr(self.network, "own_trace", None)  # of a network that was made from a graph
        return own(method) if own is not None else trace_network(self.network, method, example=self.inputs)

    def plan(self, live_outputs: LiveOutputs, method: str = "forward", *, carriers: frozenset[str] = frozenset()) -> Plan:
        """The plan of the network whose layers have to compute `live_outputs`, see `models.graph.plan`."""
        planners = self._findings.planners
        if method not in planners:
            planners[method] = Planner(self.trace(method).graph, self.network)
        return planners[method].plan(self.network, self._modules, live_outputs=live_outputs, carriers=carriers)

    def plan_of(self, kept: Kept) -> Plan:
        """The plan of `forward` with the channels `kept`."""
        return self.plan(_outputs_of(kept))

    def plans_of(self, kept: Kept) -> dict[str, Plan]:
        """One plan a method, with the same cuts: a layer that must exist for one method exists for all."""
        carriers: frozenset[str] = frozenset()
        while True:
            plans = {method: self.plan(_outputs_of(kept), method, carriers=carriers) for method in self.methods}
            missing = frozenset().union(*(missing_carriers(plan) for plan in plans.values()))
            if missing <= carriers:
                return plans
            carriers |= missing

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.network.named_modules(remove_duplicate=False))

    # ---- roles -----------------------------------------------------------------------------------------------------------

    def _known(self, name: Any, find: Callable[[], Any]) -> Any:
        known = self._findings.known
        if name not in known:
            known[name] = find()
        return known[name]

    @property
    def conv_norm_pairs(self) -> dict[str, str]:
        """Names of convolutions, each with the name of the one batch norm that alone reads it; neither of them is used twice."""
        return self._known("conv_norm_pairs", lambda: roles.conv_norm_pairs(self))

    @property
    def norm_pairs(self) -> dict[str, str]:
        """As `conv_norm_pairs`, and group norms of convolutions without groups, and batch norms of linear layers."""
        return self._known("norm_pairs", lambda: roles.norm_pairs(self))

    @property
    def depthwise_producers(self) -> dict[str, str]:
        """Names of depthwise convolutions, each with the name of the one convolution whose channels it reads, in their order."""
        return self._known("depthwise_producers", lambda: roles.depthwise_producers(self))

    @property
    def classifying_layers(self) -> frozenset[str]:
        """Names of the layers whose outputs become the network's results."""
        return self._known("classifying_layers", lambda: roles.classifying_layers(self))

    @property
    def hidden_layers(self) -> frozenset[str]:
        """Names of the linear layers of which any output may go, such as the hidden units of an MLP."""
        return self._known("hidden_layers", lambda: roles.hidden_layers(self))

    def prunable_layers(self, *, linear: bool = False) -> list[PrunableLayer]:
        """See `models.graph.layers.prunable_layers`."""
        return prunable_layers(self, linear=linear)

    def shared_norms(self, layers: Sequence[PrunableLayer]) -> list[SharedNorm]:
        """The batch and group norms that belong to none of `layers`."""
        return shared_norms(self.network, layers)

    def channel_groups(self, layers: Sequence[PrunableLayer]) -> list[list[ChannelGroup]]:
        """See `models.graph.groups.channel_groups`."""
        return self._known(("groups", tuple(layer.name for layer in layers)), lambda: channel_groups(self, layers))

    @property
    def costs(self) -> LayerCosts:
        """What the network and its layers cost for one input. Raises UserError without an example."""
        if self.inputs is None:
            raise UserError("example: the cost of a network is that of an input, give one")
        return self._known("costs", lambda: LayerCosts.of(self))

    def cost(self, kept: Kept) -> dict[str, int]:
        """`macs` of an input, and `params`, of the network that has only the channels `kept`, without building it."""
        return self.costs.of_cuts(self.plan_of(kept).cuts())

    def widths(self, kept: Kept) -> dict[str, tuple[int, int]]:
        """The channels that each convolution and linear layer of that network reads and gives."""
        return self.costs.widths(self.plan_of(kept).cuts())


def _outputs_of(kept: Kept) -> LiveOutputs:
    def live_outputs(name: str, layer: nn.Module, given: Channels | None) -> Sequence[int]:
        return kept[name] if name in kept else all_channels(output_channels(layer))

    return live_outputs


def inputs_in_order(network: nn.Module, example: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The example as positional inputs. Raises UserError for a name that `forward` has not, or one that it leaves out between."""
    if isinstance(example, Tensor):
        return (example,)
    if not isinstance(example, Mapping):
        return tuple(example)
    names = list(inspect.signature(network.forward).parameters)[: len(example)]
    if set(names) != set(example):
        raise UserError(f"example: {type(network).__name__}.forward takes {', '.join(names)} first, not {', '.join(example)}")
    return tuple(example[name] for name in names)


def _architecture(network: nn.Module) -> dict[str, str]:
    """What is compared of two networks: every module with the settings that it states, and its tensors by name and shape."""
    return {name: _description(module) for name, module in network.named_modules(remove_duplicate=False)}


def _description(module: nn.Module) -> str:
    tensors = {**module._parameters, **module._buffers}
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
    setting = module.extra_repr() if type(module).__module__.startswith("torch.nn.") else ""
    return f"{type(module).__qualname__}({setting}) {shapes} {hooks or ''}".strip()
