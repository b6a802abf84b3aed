"""Which channels every tensor of a network must store, once some layers have lost output channels.

`trace_network` writes a network down as a torch.fx graph. `plan_channels` walks that graph and gives each node a `Step`: the
channels its result stores, and the channels it wants of its inputs. A channel that is not stored is zero wherever the network
reads it. That stays true through an operation that maps zero to zero; before any other operation, known or not, the step
wants the full width back, so a plan never changes the function, it only stops saving.

`models.narrow` builds modules from a plan, `prune.compact` uses one to find out which channels are zero.
"""

import operator
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torchvision.models.shufflenetv2 import channel_shuffle
from torchvision.ops import StochasticDepth

from models.batch_norm import UnevenBatchNorm2d
from models.modes import preserved_modes
from utils.errors import UserError

LiveOutputs = Callable[[str, nn.Module, "Channels | None"], Sequence[int]]


@dataclass(frozen=True)
class Channels:
    """The channels of a tensor along `axis`: `full` in the dense network, of which `stored` (ascending) exist.

    `axis` counts from the front where the rank is known and is -1 otherwise. `flat` says that the pixels of a map lie on the
    same axis, channel by channel, as after `flatten(1)`. A tensor that stores nothing does not exist at all; `vanished` then
    names the layers without outputs that it came through.
    """

    full: int
    stored: tuple[int, ...]
    axis: int
    rank: int | None
    flat: bool = False
    vanished: frozenset[str] = frozenset()

    @property
    def complete(self) -> bool:
        return len(self.stored) == self.full

    def storing(self, stored: Iterable[int]) -> "Channels":
        stored = tuple(stored)
        return replace(self, stored=stored, vanished=frozenset() if stored else self.vanished)

    def whole(self) -> "Channels":
        return self.storing(range(self.full))

    def fits(self, other: "Channels | None") -> bool:
        """Whether channel i of both means the same position of a sum."""
        return other is not None and replace(self, stored=(), vanished=frozenset()) == replace(
            other, stored=(), vanished=frozenset()
        )


@dataclass(frozen=True)
class LayerCut:
    """What is left of a layer: output channels `rows`, and for each group the positions in the weight of what it still reads.

    The rows are shared out evenly among the groups. `columns` is None for a layer without input channels of its own (batch
    norm, PReLU).
    """

    rows: tuple[int, ...]
    columns: tuple[tuple[int, ...], ...] | None = None


@dataclass
class Step:
    """One node of the plan: what it wants of its inputs, what it gives, and how it is written if not as in the dense graph."""

    node: fx.Node
    out: Any = None  # Channels; a tuple of them for an operation with several results; None where nothing is known
    wants: dict[fx.Node, Channels] = field(default_factory=dict)
    cut: LayerCut | None = None
    form: str = "copy"  # how models.narrow writes it: copy, through, sum, cat, pad, piece or nothing

    @property
    def exists(self) -> bool:
        return not (isinstance(self.out, Channels) and not self.out.stored)


@dataclass
class Plan:
    graph: fx.Graph
    steps: dict[fx.Node, Step]

    def cuts(self) -> dict[str, LayerCut]:
        """What is left of each layer that exists, by name."""
        return {step.node.target: step.cut for step in self.steps.values() if step.cut is not None and step.exists}


# ---- tracing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """The graph of one method of a network. `both_modes` is False where training takes another path than evaluation."""

    graph: fx.Graph
    both_modes: bool


class _Tracer(fx.Tracer):
    def __init__(self, method: str):
        super().__init__(autowrap_functions=(channel_shuffle,))
        self.traced_func_name = method

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, StochasticDepth | UnevenBatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def trace_network(model: nn.Module, method: str = "forward") -> Trace:
    """The fx graph of `model.<method>`, valid in training and evaluation if both run the same operations.

    A boolean that is `self.training` (as in `F.dropout(x, training=self.training)`) is read when the graph runs. In-place
    operations become ordinary ones. Raises UserError where torch.fx cannot trace the network, naming the line that it met.
    """
    with preserved_modes(model):
        evaluation, training = (_trace(model.train(mode), method) for mode in (False, True))
    both_modes = _merge_modes(evaluation, training)
    _make_out_of_place(evaluation, model)
    return Trace(evaluation, both_modes)


def _trace(model: nn.Module, method: str) -> fx.Graph:
    try:
        return _Tracer(method).trace(model)
    except Exception as error:  # tracing runs the network's own Python, which may raise anything on a proxy
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename]
        where = f"{frames[-1].name}: {frames[-1].line}" if frames else method
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{type(model).__name__}: torch.fx cannot trace `{where}` ({reason})") from error


def _merge_modes(evaluation: fx.Graph, training: fx.Graph) -> bool:
    """Replaces each flag that is False in evaluation and True in training by `self.training`; says if that was all."""
    pairs = list(zip(evaluation.nodes, training.nodes, strict=False))
    if len(evaluation.nodes) != len(training.nodes) or any(not _same_call(*pair) for pair in pairs):
        return False
    first = next(node for node in evaluation.nodes if node.op != "placeholder")
    with evaluation.inserting_before(first):
        flag = evaluation.create_node("get_attr", "training")
    for node, other in pairs:
        node.args = tuple(flag if _is_flag(*pair) else pair[0] for pair in zip(node.args, other.args, strict=True))
        node.kwargs = {key: flag if _is_flag(value, other.kwargs[key]) else value for key, value in node.kwargs.items()}
    if not flag.users:
        evaluation.erase_node(flag)
    return True


def _is_flag(value: Any, other: Any) -> bool:
    return value is False and other is True


def _same_call(node: fx.Node, other: fx.Node) -> bool:
    def same(values: Sequence[Any], others: Sequence[Any]) -> bool:
        return all(_is_flag(*pair) or repr(pair[0]) == repr(pair[1]) for pair in zip(values, others, strict=True))

    return (
        (node.op, node.target, len(node.args), list(node.kwargs)) == (other.op, other.target, len(other.args), list(other.kwargs))
        and same(node.args, other.args)
        and same(list(node.kwargs.values()), list(other.kwargs.values()))
    )


_OUT_OF_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    "add_": "add",
    "sub_": "sub",
    "mul_": "mul",
    "relu_": "relu",
    torch.relu_: torch.relu,
    F.relu_: F.relu,
}


def _make_out_of_place(graph: fx.Graph, model: nn.Module) -> None:
    """Later readers of an overwritten tensor read the result instead: narrow tensors may share storage where dense ones don't."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        in_place = node.op in ("call_function", "call_method") and node.target in _OUT_OF_PLACE
        if in_place:
            node.target = _OUT_OF_PLACE[node.target]
        elif node.op == "call_module":
            in_place = getattr(model.get_submodule(node.target), "inplace", False)
        elif node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
            in_place = True
        if in_place:
            position = order[node]
            node.args[0].replace_all_uses_with(node, delete_user_cb=lambda user, start=position: order[user] > start)


# ---- planning ----------------------------------------------------------------------------------------------------------


def output_channels(layer: nn.Module) -> int | None:
    """The number of output channels of a layer that can be narrowed, None for any other module."""
    names = ("out_channels", "num_features", "out_features")
    sizes = [getattr(layer, name) for name in names if isinstance(getattr(layer, name, None), int)]
    return sizes[0] if sizes else None


def plan_channels(graph: fx.Graph, model: nn.Module, *, live_outputs: LiveOutputs, carriers: frozenset[str]) -> Plan:
    """Gives every node of `graph` its step.

    `live_outputs(name, module, input)` says which output channels a layer has to compute; `input` is what it is given, None
    where that is unknown. `carriers` are layers of which one zero channel is kept because something reads the shape of a
    result that would not exist otherwise: see `missing_carriers`.
    """
    steps: dict[fx.Node, Step] = {}
    shared = _shared_layers(graph, model)
    for node in graph.nodes:
        call = _Call(node, steps, model, live_outputs, carriers, shared)
        steps[node] = _rule_of(call)(call)
    return Plan(graph, steps)


def missing_carriers(plan: Plan) -> frozenset[str]:
    """Layers that came out empty although a step of the plan needs their result to exist."""
    missing: frozenset[str] = frozenset()
    for step in plan.steps.values():
        for source, want in step.wants.items():
            if step.exists and want.stored and not plan.steps[source].exists:
                missing |= plan.steps[source].out.vanished
    return missing


def _shared_layers(graph: fx.Graph, model: nn.Module) -> frozenset[str]:
    """Names of layers that are called twice or share a tensor: two readers could ask for different channels of them."""
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    owners: dict[int, set[str]] = {}
    for name in set(calls):
        layer = model.get_submodule(name)
        for tensor in (*layer.parameters(), *layer.buffers()):
            owners.setdefault(id(tensor), set()).add(name)
    for node in graph.nodes:
        if node.op == "get_attr" and not is_mode(node):
            owners.setdefault(id(_attribute(model, node.target)), set()).add(node.target)
    tied = [name for names in owners.values() if len(names) > 1 for name in names]
    return frozenset(tied) | frozenset(name for name in calls if calls.count(name) > 1)


def _attribute(model: nn.Module, name: str) -> Any:
    path, _, last = name.rpartition(".")
    return getattr(model.get_submodule(path), last)


@dataclass
class _Call:
    """What a rule may look at to plan one node."""

    node: fx.Node
    steps: dict[fx.Node, Step]
    model: nn.Module
    live_outputs: LiveOutputs
    carriers: frozenset[str]
    shared: frozenset[str]

    @property
    def module(self) -> nn.Module:
        return self.model.get_submodule(self.node.target)

    @property
    def source(self) -> fx.Node:
        """The node's first input."""
        return self.node.all_input_nodes[0]

    def channels(self, value: Any) -> Channels | None:
        out = self.steps[value].out if isinstance(value, fx.Node) else None
        return out if isinstance(out, Channels) else None

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument given by position or by name; a method's own tensor is position 0."""
        args = self.node.args
        return args[position] if len(args) > position else self.node.kwargs.get(name, default)

    def channelled_inputs(self) -> list[fx.Node]:
        return [node for node in self.node.all_input_nodes if self.channels(node) is not None]

    def step(self, out: Any = None, **fields: Any) -> Step:
        return Step(self.node, out, **fields)

    def outputs_of_layer(self, given: Channels | None, full: int) -> tuple[int, ...]:
        """The output channels that the layer has to store: the live ones, or one as a carrier."""
        live = tuple(self.live_outputs(self.node.target, self.module, given))
        return (0,) if not live and full and self.node.target in self.carriers else live

    def vanishing(self, given: Channels | None) -> frozenset[str]:
        return frozenset([self.node.target]) | (given.vanished if given is not None else frozenset())


Rule = Callable[[_Call], Step]


def _opaque(call: _Call) -> Step:
    """An operation that nothing is known about reads its inputs at full width."""
    narrow = [node for node in call.channelled_inputs() if not call.channels(node).complete]
    name = call.node.target
    writes = call.node.op == "call_method" and name.endswith("_") and not name.endswith("__")
    if narrow and writes:
        raise UserError(f"operation `{name}` writes into a tensor whose channels are cut, which is not supported")
    return call.step(wants={node: call.channels(node).whole() for node in narrow})


def _through(call: _Call) -> Step:
    """Zero channels stay zero, all else stays where it is."""
    given = call.channels(call.source)
    return _opaque(call) if given is None else call.step(given)


def _spatial(call: _Call) -> Step:
    """Pooling and the like, which work on the axes behind the channels, each channel by itself."""
    given = call.channels(call.source)
    with_indices = call.node.kwargs.get("return_indices") or (
        call.node.op == "call_module" and getattr(call.module, "return_indices", False)
    )
    known = given is not None and given.rank is not None and given.axis == 1 and not given.flat
    return call.step(given) if known and not with_indices else _opaque(call)


def _pointwise(call: _Call) -> Step:
    """A function of single entries: it keeps the layout where f(0) = 0, and needs the full width otherwise."""
    inputs = call.channelled_inputs()
    if len(inputs) != 1 or len([node for node in call.node.all_input_nodes if not is_mode(node)]) != 1:
        return _opaque(call)
    given = call.channels(inputs[0])
    if _maps_zero_to_zero(call):
        return call.step(given)
    return call.step(given.whole(), wants={inputs[0]: given.whole()})


def is_mode(node: fx.Node) -> bool:
    return node.op == "get_attr" and node.target == "training"


def _maps_zero_to_zero(call: _Call) -> bool:
    zeros = torch.zeros(1)
    args, kwargs = fx.map_arg((call.node.args, dict(call.node.kwargs)), lambda node: False if is_mode(node) else zeros)
    function = {
        "call_module": lambda: call.module,
        "call_method": lambda: getattr(torch.Tensor, call.node.target),
        "call_function": lambda: call.node.target,
    }[call.node.op]()
    with torch.no_grad():
        return torch.equal(function(*args, **kwargs), zeros)


def _sum(call: _Call) -> Step:
    """A sum stores what either side stores. The side with fewer channels is added into its places in the other."""
    if len(call.node.args) != 2 or call.node.kwargs or len(call.node.all_input_nodes) < 2:
        return _pointwise(call)
    first, second = call.node.args
    left, right = call.channels(first), call.channels(second)
    if left is None or not left.fits(right):
        return _opaque(call)
    union = tuple(sorted({*left.stored, *right.stored}))
    out = replace(left, stored=union, vanished=left.vanished | right.vanished if not union else frozenset())
    if call.node.target in _DIFFERENCES:
        return call.step(out, wants={first: out, second: out})
    return call.step(out, wants={first: left, second: right}, form="sum")


def _product(call: _Call) -> Step:
    """A product stores what both sides store."""
    if len(call.node.args) != 2 or call.node.kwargs or len(call.node.all_input_nodes) < 2:
        return _pointwise(call)
    first, second = call.node.args
    left, right = call.channels(first), call.channels(second)
    if left is None or not left.fits(right):
        return _opaque(call)
    if not left.stored or not right.stored:
        return call.step(left if not left.stored else right)
    both = tuple(sorted({*left.stored} & {*right.stored})) or left.stored[:1]
    out = left.storing(both)
    return call.step(out, wants={first: out, second: out})


def _cat(call: _Call) -> Step:
    parts, axis = call.argument(0, "tensors"), call.argument(1, "dim", 0)
    channels = [call.channels(part) for part in parts] if isinstance(parts, list | tuple) else [None]
    first = channels[0]
    if any(part is None for part in channels) or first.rank is None or axis % first.rank != first.axis:
        return _opaque(call)
    if any((part.axis, part.rank, part.flat) != (first.axis, first.rank, False) for part in channels):
        return _opaque(call)
    stored, full = [], 0
    for part in channels:
        stored += [full + channel for channel in part.stored]
        full += part.full
    vanished = frozenset().union(*(part.vanished for part in channels)) if not stored else frozenset()
    return call.step(replace(first, full=full, stored=tuple(stored), vanished=vanished), form="cat")


def _pieces(call: _Call) -> Step:
    """`chunk` and `split` along the channels. Each piece keeps at least one channel, so that it exists."""
    given, axis = call.channels(call.source), call.argument(2, "dim", 0)
    known = given is not None and given.rank is not None and not given.flat and axis % given.rank == given.axis
    count = call.argument(1, "chunks" if call.node.target in (torch.chunk, "chunk") else "split_size_or_sections")
    if not known or not isinstance(count, int) or any(not _picks_one(user) for user in call.node.users):
        return _opaque(call)
    size = -(-given.full // count) if call.node.target in (torch.chunk, "chunk") else count
    starts = range(0, given.full, size)
    if not given.stored:
        return call.step(tuple(replace(given, full=min(size, given.full - start)) for start in starts), form="nothing")
    wanted = set(given.stored)
    for start in starts:
        if not wanted.intersection(range(start, start + size)):
            wanted.add(start)
    want = given.storing(sorted(wanted))
    pieces = tuple(
        replace(given, full=min(size, given.full - start), stored=tuple(c - start for c in want.stored if 0 <= c - start < size))
        for start in starts
    )
    return call.step(pieces, wants={call.source: want}, form="nothing")


def _picks_one(node: fx.Node) -> bool:
    return node.target is operator.getitem and isinstance(node.args[1], int)


def _getitem(call: _Call) -> Step:
    """A piece of a chunk, a size, or a tensor subsampled along axes other than the channels'."""
    out, index = call.steps[call.source].out if call.node.all_input_nodes else None, call.node.args[1]
    if isinstance(out, tuple) and isinstance(index, int):
        piece = out[index]
        return call.step(piece, form="piece")
    if not isinstance(out, Channels):
        return call.step(None)
    index = index if isinstance(index, tuple) else (index,)
    kept_axes = all(isinstance(entry, slice) and not _holds_node(entry) for entry in index)
    if out.rank is None or not kept_axes or (len(index) > out.axis and index[out.axis] != slice(None)):
        return _opaque(call)
    return call.step(out)


def _holds_node(entry: slice) -> bool:
    return any(isinstance(bound, fx.Node) for bound in (entry.start, entry.stop, entry.step))


def _pad(call: _Call) -> Step:
    """Zero padding in space changes no channel; behind or before the channels it adds some that need not be stored."""
    given, widths = call.channels(call.source), call.argument(1, "pad")
    mode, value = call.argument(2, "mode", "constant"), call.argument(3, "value")
    fixed = isinstance(widths, list | tuple) and all(isinstance(width, int) for width in widths)
    if given is None or given.rank is None or given.flat or not fixed:
        return _opaque(call)
    if mode == "constant" and value not in (None, 0):
        return _opaque(call)
    position = 2 * (given.rank - 1 - given.axis)  # of the channels' own pair: pairs count from the last axis
    before, after = widths[position : position + 2] if len(widths) > position else (0, 0)
    if before == after == 0:
        return call.step(given)
    if mode != "constant" or min(before, after) < 0:
        return _opaque(call)
    stored = tuple(channel + before for channel in given.stored)
    return call.step(replace(given, full=before + given.full + after, stored=stored), form="pad")


def _reduce(call: _Call) -> Step:
    """Mean, sum or maximum over axes other than the channels'."""
    given, dims = call.channels(call.source), call.argument(1, "dim")
    dims = (dims,) if isinstance(dims, int) else dims
    if given is None or given.rank is None or not dims or not all(isinstance(dim, int) for dim in dims):
        return _opaque(call)
    gone = {dim % given.rank for dim in dims}
    if given.axis in gone:
        return _opaque(call)
    if call.argument(2, "keepdim", False):
        return call.step(given)
    axis = given.axis - sum(dim < given.axis for dim in gone)
    return call.step(replace(given, axis=axis, rank=given.rank - len(gone)))


def _flatten(call: _Call) -> Step:
    given = call.channels(call.source)
    if call.node.op == "call_module":
        start, end = call.module.start_dim, call.module.end_dim
    else:
        start, end = call.argument(1, "start_dim", 0), call.argument(2, "end_dim", -1)
    return _flattened(call) if given is not None and given.axis == 1 and (start, end) == (1, -1) else _opaque(call)


def _view(call: _Call) -> Step:
    """`x.view(x.size(0), -1)` is a flatten."""
    given, sizes = call.channels(call.source), call.node.args[1:]
    sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else sizes
    batch_first = len(sizes) == 2 and sizes[1] == -1 and isinstance(sizes[0], fx.Node) and _is_batch_size(sizes[0])
    return _flattened(call) if given is not None and given.axis == 1 and batch_first else _opaque(call)


def _flattened(call: _Call) -> Step:
    given = call.channels(call.source)
    return call.step(replace(given, rank=2, flat=given.flat or given.rank != 2)) if given.rank else _opaque(call)


def _is_batch_size(node: fx.Node) -> bool:
    if node.op == "call_method" and node.target == "size":
        return node.args[1:] == (0,)
    return node.target is operator.getitem and node.args[1] == 0 and _reads_size(node.args[0])


def _reads_size(node: fx.Node) -> bool:
    return (node.op == "call_method" and node.target == "size" and len(node.args) == 1) or (
        node.target is getattr and node.args[1] == "shape"
    )


def _size(call: _Call) -> Step:
    """Sizes are read at full width unless it is clear that only other axes than the channels' are asked for."""
    given = call.channels(call.source)
    if given is None or given.rank is None:
        return _opaque(call)
    if _reads_size(call.node):
        asked = [user.args[1] if _picks_one(user) else None for user in call.node.users]
    else:
        asked = [call.argument(1, "dim")]
    other_axes = all(isinstance(dim, int) and dim % given.rank != given.axis for dim in asked)
    return (
        call.step(None, wants={call.source: given} if given.stored else {call.source: given.whole()})
        if other_axes
        else _opaque(call)
    )


def _getattr(call: _Call) -> Step:
    return _size(call) if _reads_size(call.node) else _opaque(call)


def _permute(call: _Call) -> Step:
    given, dims = call.channels(call.source), call.node.args[1:]
    dims = dims[0] if len(dims) == 1 and isinstance(dims[0], list | tuple) else dims
    if given is None or given.rank is None or not all(isinstance(dim, int) for dim in dims):
        return _opaque(call)
    return call.step(replace(given, axis=[dim % given.rank for dim in dims].index(given.axis)))


def _transpose(call: _Call) -> Step:
    given, dims = call.channels(call.source), call.node.args[1:3]
    if given is None or given.rank is None or len(dims) != 2 or not all(isinstance(dim, int) for dim in dims):
        return _opaque(call)
    first, second = (dim % given.rank for dim in dims)
    axis = {first: second, second: first}.get(given.axis, given.axis)
    return call.step(replace(given, axis=axis))


def _shuffle(call: _Call) -> Step:
    """Channel shuffle (Zhang et al., CVPR 2018): channel k of group i becomes channel i of block k."""
    given = call.channels(call.source)
    groups = call.module.groups if call.node.op == "call_module" else call.argument(1, "groups")
    if given is None or given.rank is None or given.flat or given.axis != 1:
        return _opaque(call)
    if given.complete or not given.stored:
        return call.step(given)
    old_channels = torch.arange(given.full).view(groups, -1).t().flatten().tolist()
    stored = {new: old for new, old in enumerate(old_channels) if old in set(given.stored)}
    return call.step(given.storing(stored), wants={call.source: given.storing(stored.values())}, form="through")


def _layer(rule: Rule) -> Rule:
    """A rule for layers with parameters of their own: one that is called twice or shares parameters is left alone."""

    def guarded(call: _Call) -> Step:
        return _opaque(call) if call.node.target in call.shared else rule(call)

    return guarded


@_layer
def _conv(call: _Call) -> Step:
    conv, given = call.module, call.channels(call.source)
    rank = conv.weight.dim()
    if given is None:
        given = Channels(conv.in_channels, tuple(range(conv.in_channels)), 1, rank)
    if given.flat or (given.axis, given.full) != (1, conv.in_channels):
        return _opaque(call)
    live = call.outputs_of_layer(given, conv.out_channels)
    if not live:
        return call.step(Channels(conv.out_channels, (), 1, rank, vanished=call.vanishing(given)))
    cut, inputs = _cut_groups(conv, live, given.stored)
    return call.step(Channels(conv.out_channels, cut.rows, 1, rank), wants={call.source: given.storing(inputs)}, cut=cut)


def _cut_groups(conv: nn.Module, live: Sequence[int], stored: Sequence[int]) -> tuple[LayerCut, tuple[int, ...]]:
    """The cut of a convolution and the input channels that it then reads.

    Groups must stay of one size: groups without a live filter go, the others are evened up with their lowest dead filters
    and input channels to the largest of them.
    """
    filters, reads = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    used = sorted({row // filters for row in live})
    rows = _evened(live, used, filters)
    inputs = _evened([channel for channel in stored if channel // reads in set(used)], used, reads)
    columns = tuple(tuple(channel % reads for channel in inputs if channel // reads == group) for group in used)
    return LayerCut(rows, columns), inputs


def _evened(channels: Sequence[int], groups: Sequence[int], size: int) -> tuple[int, ...]:
    """At least one channel of each group of `size`, and as many of each as the largest has."""
    members = {group: [channel for channel in channels if channel // size == group] for group in groups}
    count = max(1, *(len(own) for own in members.values()))
    for group, own in members.items():
        spare = [channel for channel in range(group * size, (group + 1) * size) if channel not in own]
        members[group] = sorted(own + spare[: count - len(own)])
    return tuple(channel for group in groups for channel in members[group])


@_layer
def _linear(call: _Call) -> Step:
    linear, given = call.module, call.channels(call.source)
    if given is not None and not _last_axis_of(given, linear.in_features):
        given = None
    rows = call.outputs_of_layer(given, linear.out_features)
    axis, rank = (given.rank - 1, given.rank) if given is not None and given.rank else (-1, None)
    if not rows:
        return call.step(Channels(linear.out_features, (), axis, rank, vanished=call.vanishing(given)))
    if given is None:
        inputs, wants = range(linear.in_features), _opaque(call).wants
    else:
        want = given if given.stored else given.storing([0])
        pixels = linear.in_features // given.full  # 1 unless the input is flat
        inputs = [channel * pixels + pixel for channel in want.stored for pixel in range(pixels)]
        wants = {call.source: want}
    cut = LayerCut(rows, (tuple(inputs),))
    return call.step(Channels(linear.out_features, rows, axis, rank), wants=wants, cut=cut)


def _last_axis_of(given: Channels, features: int) -> bool:
    if given.flat:
        return features % given.full == 0
    return given.full == features and (given.axis == -1 or given.axis == given.rank - 1)


@_layer
def _batch_norm(call: _Call) -> Step:
    norm, given = call.module, call.channels(call.source)
    if given is None or given.flat or (given.axis, given.full) != (1, norm.num_features):
        return _opaque(call)
    rows = call.outputs_of_layer(given, norm.num_features)
    if not rows:
        return call.step(replace(given, stored=(), vanished=call.vanishing(given)))
    out = given.storing(rows)
    return call.step(out, wants={call.source: out}, cut=LayerCut(rows))


@_layer
def _prelu(call: _Call) -> Step:
    given = call.channels(call.source)
    if call.module.num_parameters == 1 or given is None or not given.stored:
        return _through(call)
    if given.flat or (given.axis, given.full) != (1, call.module.num_parameters):
        return _opaque(call)
    return call.step(given, cut=LayerCut(given.stored))


def _outside(call: _Call) -> Step:
    """Inputs, parameters read directly, and the network's result, which has its full width."""
    return _opaque(call) if call.node.op == "output" else call.step(None)


def _rule_of(call: _Call) -> Rule:
    node = call.node
    if node.op == "call_module":
        return _MODULE_RULES.get(type(call.module), _opaque)
    if node.op in ("call_function", "call_method"):
        return _FUNCTION_RULES.get(node.target, _opaque)
    return _outside


def _table(*rows: tuple[Rule, Sequence[Any]]) -> dict[Any, Rule]:
    return {key: rule for rule, keys in rows for key in keys}


def _numbered(*names: str) -> Iterator[type[nn.Module]]:
    return (getattr(nn, f"{name}{dims}d") for name in names for dims in (1, 2, 3))


_DIFFERENCES = (operator.sub, torch.sub, "sub")

_MODULE_RULES = _table(
    (_conv, [*_numbered("Conv")]),
    (_batch_norm, [*_numbered("BatchNorm"), UnevenBatchNorm2d, nn.SyncBatchNorm]),
    (_linear, [nn.Linear]),
    (_prelu, [nn.PReLU]),
    (_pointwise, [nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish]),
    (_pointwise, [nn.Hardswish, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Tanh, nn.Softsign]),
    (_pointwise, [nn.Sigmoid, nn.Hardsigmoid, nn.LogSigmoid, nn.Softplus, nn.Threshold]),
    (_through, [nn.Identity, nn.Dropout, *_numbered("Dropout"), StochasticDepth]),
    (_spatial, [*_numbered("MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool")]),
    (_spatial, [*_numbered("ZeroPad", "ReflectionPad", "ReplicationPad", "CircularPad"), nn.Upsample]),
    (_flatten, [nn.Flatten]),
    (_shuffle, [nn.ChannelShuffle]),
)
# Functions by identity, tensor methods by name.
_FUNCTION_RULES = _table(
    (_sum, [operator.add, torch.add, "add", *_DIFFERENCES]),
    (_product, [operator.mul, torch.mul, "mul"]),
    (_pointwise, [operator.truediv, operator.neg, operator.pow, torch.div, torch.pow, torch.clamp, torch.square, torch.sqrt]),
    (_pointwise, [torch.relu, torch.tanh, torch.sigmoid, torch.abs, torch.neg, torch.exp, F.sigmoid, F.tanh, F.logsigmoid]),
    (_pointwise, [F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid]),
    (_pointwise, [F.hardtanh, F.hardshrink, F.softshrink, F.tanhshrink, F.softsign, F.softplus, F.threshold]),
    (_pointwise, ["relu", "tanh", "sigmoid", "abs", "neg", "clamp", "square", "sqrt", "pow", "div", "exp"]),
    (_through, [F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout]),
    (_spatial, [F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, torch.max_pool2d]),
    (_spatial, [F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.interpolate]),
    (_spatial, [F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d]),
    (_through, ["contiguous", "clone", "detach", "float", "double", "half", "bfloat16"]),
    (_cat, [torch.cat, torch.concat]),
    (_pieces, [torch.chunk, torch.split, "chunk", "split"]),
    (_getitem, [operator.getitem]),
    (_pad, [F.pad]),
    (_reduce, [torch.mean, torch.sum, torch.amax, "mean", "sum", "amax"]),
    (_flatten, [torch.flatten, "flatten"]),
    (_view, ["view", "reshape", torch.reshape]),
    (_permute, [torch.permute, "permute"]),
    (_transpose, [torch.transpose, "transpose"]),
    (_shuffle, [channel_shuffle, torch.channel_shuffle, F.channel_shuffle]),
    (_size, ["size"]),
    (_getattr, [getattr]),
)
