"""What a rule is given and how it is registered: the contract of the files in `rules`."""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from models.graph.channels import Channels, Step
from models.graph.passing import passes_channels
from utils.errors import UserError

LiveOutputs = Callable[[str, nn.Module, Channels | None], Sequence[int]]
ALIASES = {"dim": ("axis",), "dims": ("dim", "axis"), "keepdim": ("keepdims",)}
SHAPE = "shape"  # in a node's `meta`: the shape of its result for the example, where a rule may ask for it


@dataclass
class Call:
    """What a rule may look at to plan one node."""

    node: fx.Node
    steps: Mapping[fx.Node, Step]
    model: nn.Module
    modules: Mapping[str, nn.Module]
    live_outputs: LiveOutputs
    carriers: frozenset[str]
    shared: frozenset[str]
    asked: list[tuple[Channels | None, int, tuple[int, ...]]] = field(default_factory=list)  # by `outputs_of_layer`

    @property
    def module(self) -> nn.Module:
        return self.modules[self.node.target]

    @property
    def source(self) -> fx.Node:
        """The node's first input."""
        return self.node.all_input_nodes[0]

    def channels(self, value: Any) -> Channels | None:
        out = self.steps[value].out if isinstance(value, fx.Node) else None
        return out if isinstance(out, Channels) else None

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument given by position or by name, torch's or NumPy's; a method's own tensor is position 0."""
        args, kwargs = self.node.args, self.node.kwargs
        given = (kwargs[alias] for alias in (name, *ALIASES.get(name, ())) if alias in kwargs)
        return args[position] if len(args) > position else next(given, default)

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """The shape of a tensor of the dense network for the example, None where it is not known."""
        return node.meta.get(SHAPE)

    def channelled_inputs(self) -> list[fx.Node]:
        return [node for node in self.node.all_input_nodes if self.channels(node) is not None]

    def step(self, out: Any = None, **fields: Any) -> Step:
        return Step(self.node, out, **fields)

    def outputs_of_layer(self, given: Channels | None, full: int) -> tuple[int, ...]:
        """The output channels that the layer has to store: the live ones, or one as a carrier."""
        live = tuple(self.live_outputs(self.node.target, self.module, given))
        live = (0,) if not live and full and self.node.target in self.carriers else live
        self.asked.append((given, full, live))
        return live

    def vanishing(self, given: Channels | None) -> frozenset[str]:
        return frozenset([self.node.target]) | (given.vanished if given is not None else frozenset())


Rule = Callable[["Call"], Step]

_MODULES: dict[type[nn.Module], Rule] = {}
_FUNCTIONS: dict[Any, Rule] = {}  # functions by identity, tensor methods by name
_ENTRYWISE: set[Rule] = set()


def rule(*operations: Any) -> Callable[[Rule], Rule]:
    """Registers the decorated function as the rule of its operations.

    Modules are named by type, or as `package.module.Class` where the package may be missing; functions by identity, tensor
    methods by name. A module's rule holds for subclasses that inherit its `forward`.
    """

    def register(function: Rule) -> Rule:
        for operation in operations:
            is_module = isinstance(operation, type) and issubclass(operation, nn.Module)
            is_module |= isinstance(operation, str) and "." in operation
            (_MODULES if is_module else _FUNCTIONS)[operation] = function
        return function

    return register


def entrywise(rule: Rule) -> Rule:
    """Marks a rule of operations that work on each entry by itself where they are given one tensor."""
    _ENTRYWISE.add(rule)
    return rule


def is_entrywise(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the operation reads one tensor, and each of its entries by itself."""
    return len(node.all_input_nodes) == 1 and _known_rule(node, modules) in _ENTRYWISE


def has_rule(module: nn.Module) -> bool:
    """Whether something is known about modules of this kind, so that tracing need not look into it."""
    return _rule_of_module(module) is not None


def _rule_of_module(module: nn.Module) -> Rule | None:
    """The rule of the nearest class that the module is of, if its forward pass is that of this class."""
    if "parametrizations" in module._modules or module._forward_pre_hooks or "forward" in vars(module):
        return None  # its tensors are made of others
    for kind in type(module).__mro__:
        own = _MODULES.get(kind) or _MODULES.get(f"{kind.__module__}.{kind.__qualname__}")
        if own is not None:
            return own if type(module).forward is kind.forward else None
    return None


def rule_of(call: Call) -> Rule:
    if call.node.op not in ("call_module", "call_function", "call_method"):
        return outside
    return _known_rule(call.node, call.modules) or (through if _passes_channels(call) else opaque)


def _passes_channels(call: Call) -> bool:
    """Whether the node calls a module of the network's own that is as good as none."""
    if call.node.op != "call_module" or len(call.node.args) != 1 or call.node.kwargs:
        return False
    given = call.channels(call.node.args[0])
    return given is not None and not given.flat and passes_channels(call.module, axis=given.axis, rank=given.rank)


def _known_rule(node: fx.Node, modules: Mapping[str, nn.Module]) -> Rule | None:
    if node.op == "call_module":
        return _rule_of_module(modules[node.target])
    return _FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None


def opaque(call: Call) -> Step:
    """An operation that nothing is known about reads its inputs at full width."""
    narrow = [node for node in call.channelled_inputs() if not call.channels(node).complete]
    name = call.node.target
    writes = call.node.op == "call_method" and name.endswith("_") and not name.endswith("__")
    if narrow and writes:
        raise UserError(f"operation `{name}` writes into a tensor whose channels are cut, which is not supported")
    return call.step(wants={node: call.channels(node).whole() for node in narrow})


@entrywise
def through(call: Call) -> Step:
    """Zero channels stay zero, all else stays where it is."""
    given = call.channels(call.source)
    return opaque(call) if given is None else call.step(given)


def outside(call: Call) -> Step:
    """Inputs, parameters read directly, and the network's result, which has its full width."""
    return opaque(call) if call.node.op == "output" else call.step(None)


def picks_one(node: fx.Node) -> bool:
    """Whether the node is one entry, by its number, of what another gives."""
    return node.target is operator.getitem and isinstance(node.args[1], int)


def numbered(*names: str) -> Iterator[type[nn.Module]]:
    return (getattr(nn, f"{name}{dims}d") for name in names for dims in (1, 2, 3))


def unshared(rule: Rule) -> Rule:
    """A rule for layers with parameters of their own: one that is called twice or shares parameters is left alone."""

    def guarded(call: Call) -> Step:
        if call.node.target in call.shared:
            return replace(opaque(call), why_whole="it is called twice, or shares its tensors with another layer")
        return rule(call)

    return guarded
