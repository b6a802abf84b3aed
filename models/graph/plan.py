"""Gives every node of a graph its step, by the rule of its operation."""

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from models.graph import rules  # noqa: F401  (fills the table that rule_of reads)
from models.graph.call import Call, LiveOutputs, opaque, rule_of
from models.graph.channels import Channels, Members, Plan, Step, members_of_layer
from models.graph.concrete import attribute
from models.graph.out_of_place import place_of
from models.graph.tracing import is_mode

REMEMBERED = 4  # steps of a node, of which a search for a budget comes back to the last few


def output_channels(layer: nn.Module) -> int | None:
    """The number of output channels of a layer that can be narrowed, None for any other module."""
    names = ("out_channels", "num_features", "out_features", "num_channels")
    sizes = [getattr(layer, name) for name in names if isinstance(getattr(layer, name, None), int)]
    return sizes[0] if sizes else None


class Planner:
    """Plans of one graph, for any networks of its architecture. Plans that agree on a part of the graph share its steps."""

    def __init__(self, graph: fx.Graph, model: nn.Module):
        self._graph = graph
        self._shared = _shared_layers(graph, model, dict(model.named_modules(remove_duplicate=False)))
        self._remembered: dict[fx.Node, deque[_Remembered]] = {node: deque(maxlen=REMEMBERED) for node in graph.nodes}

    def plan(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        *,
        live_outputs: LiveOutputs,
        carriers: frozenset[str] = frozenset(),
    ) -> Plan:
        """Gives every node its step; `modules` are those of `model`, by name.

        `live_outputs(name, module, input)` says which output channels a layer has to compute, ascending; `input` is what it is
        given, None where that is unknown. `carriers` are layers of which one zero channel is kept because something reads the
        shape of a result that would not exist otherwise: see `missing_carriers`.
        """
        steps: dict[fx.Node, Step] = {}
        for node in self._graph.nodes:
            call = Call(node, _Looking(steps), model, modules, live_outputs, carriers, self._shared)
            steps[node] = replace(opaque(call), why_whole="hooks run with it") if _has_hooks(call) else self._step(call, steps)
        return Plan(self._graph, steps)

    def _step(self, call: Call, steps: Mapping[fx.Node, Step]) -> Step:
        remembered = self._remembered[call.node]
        for known in remembered:
            if known.holds_for(call, steps):
                return known.step
        call.asked.clear()
        call.steps.found.clear()
        step = rule_of(call)(call)
        if isinstance(step.out, Channels) and not step.out.members:  # a layer, whose own channels these are
            step.out = replace(step.out, members=_own_members(call.node.target, call.module, step.out.full))
        step.out = next((known.step.out for known in remembered if known.step.out == step.out), step.out)
        remembered.appendleft(_Remembered(tuple(call.steps.found.items()), tuple(call.asked), step))
        return step


@dataclass(frozen=True)
class _Remembered:
    """A step, and all that its rule looked at: what other nodes give, and which outputs the layer has to compute."""

    found: tuple[tuple[fx.Node, Any], ...]
    asked: tuple[tuple[Channels | None, int, tuple[int, ...]], ...]
    step: Step

    def holds_for(self, call: Call, steps: Mapping[fx.Node, Step]) -> bool:
        """Equal results of a node are one object, see `Planner._step`."""
        if any(_out_of(node, steps) is not out for node, out in self.found):
            return False
        return all(call.outputs_of_layer(given, full) == live for given, full, live in self.asked)


_NO_STEP = object()


def _out_of(node: fx.Node, steps: Mapping[fx.Node, Step]) -> Any:
    return steps[node].out if node in steps else _NO_STEP


class _Looking(Mapping[fx.Node, Step]):
    """The steps so far; it notes what is found in which."""

    def __init__(self, steps: Mapping[fx.Node, Step]):
        self._steps = steps
        self.found: dict[fx.Node, Any] = {}

    def __getitem__(self, node: fx.Node) -> Step:
        self.found[node] = _out_of(node, self._steps)
        return self._steps[node]

    def __contains__(self, node: object) -> bool:
        self.found[node] = _out_of(node, self._steps)
        return node in self._steps

    def __iter__(self) -> Iterator[fx.Node]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)


def _own_members(name: str, layer: nn.Module, full: int) -> Members:
    """Those of a layer's result. The outputs of a linear layer, of which a classifier may have millions, count as one."""
    return ((name, 0),) * full if isinstance(layer, nn.Linear) else members_of_layer(name, full)


def _has_hooks(call: Call) -> bool:
    """Whether functions of the user's run with the layer: they may change what it reads or gives."""
    return call.node.op == "call_module" and bool(call.module._forward_hooks or call.module._forward_pre_hooks)


@dataclass(frozen=True)
class Restored:
    """Channels of `layers` that are gone and are put back, as zeros, before `operation` of the network's own code."""

    layers: tuple[str, ...]
    operation: str


def restored_channels(plan: Plan) -> list[Restored]:
    """Where the plan puts back all channels of a tensor, by the operations that ask for it, in their order."""
    found = {}
    for node, step in plan.steps.items():
        for source, want in step.wants.items():
            out = plan.steps[source].out
            if isinstance(out, Channels) and want.complete and not out.complete:
                layers = dict.fromkeys(member[0] for member in out.members if member is not None)
                found[Restored(tuple(layers), _operation(node))] = None
    return list(found)


def whole_layers(plan: Plan) -> dict[str, str]:
    """The layers that the plan cannot cut at all, by name, with what keeps it from that."""
    return {
        node.target: step.why_whole or "its own operation is not known, or reads channels in another order than it is given"
        for node, step in plan.steps.items()
        if node.op == "call_module" and step.cut is None and step.exists
    }


def _operation(node: fx.Node) -> str:
    if node.op == "output":
        return "the network's result"
    if node.op == "call_module":
        return node.target
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name)
    return f"{name}{place_of(node)}"


def missing_carriers(plan: Plan) -> frozenset[str]:
    """Layers that came out empty although a step of the plan needs their result to exist."""
    missing: frozenset[str] = frozenset()
    for step in plan.steps.values():
        for source, want in step.wants.items():
            if step.exists and want.stored and not plan.steps[source].exists:
                missing |= plan.steps[source].out.vanished
    return missing


def _shared_layers(graph: fx.Graph, model: nn.Module, modules: Mapping[str, nn.Module]) -> frozenset[str]:
    """Names of layers that are called twice or share a tensor: two readers could ask for different channels of them."""
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    owners: dict[int, set[str]] = {}
    for name in set(calls):
        for tensor in (*modules[name].parameters(), *modules[name].buffers()):
            owners.setdefault(id(tensor), set()).add(name)
    for node in graph.nodes:
        if node.op == "get_attr" and not is_mode(node):
            owners.setdefault(id(attribute(model, node.target)), set()).add(node.target)
    tied = [name for names in owners.values() if len(names) > 1 for name in names]
    return frozenset(tied) | frozenset(name for name, times in Counter(calls).items() if times > 1)
