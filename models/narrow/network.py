"""A network with only some of its channels: kept channels in, a physically smaller module out.

`narrow_network` cuts filters, input channels, batch norm entries and linear columns of any network that torch.fx can
trace, and puts steps between the layers where they store different channels. Each residual sum adds the side with fewer
channels into its places in the other, so that both convolutions of a block shrink.

The layers that are cut keep their names, so the keys of `state_dict()` are the dense network's. The steps in between hold
nothing but indices, which follow from `kept`: a network is rebuilt from the dense architecture, `kept` and a state dict.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from models.copies import copied
from models.graph import (
    ChannelGraph,
    Kept,
    LayerCut,
    Plan,
    Restored,
    Step,
    Trace,
    counted_channels,
    is_mode,
    restored_channels,
    whole_layers,
)
from models.graph.function import SCOPES, GraphFunction, scopes_of
from models.graph.kinds import output_axis, unusual_axes
from models.graph.rules.shapes import sizes_of
from models.narrow.relayout import AddInto, Relayout, Relayouts
from models.narrow.reuse import reuse_memory
from models.outputs import Outputs
from utils.errors import UserError
from utils.modes import deviating_modes


def narrow_network(graph: ChannelGraph, kept: Kept, *, wide_sums: bool = False) -> "NarrowNetwork":
    """What `Selection.shrink` returns: the network of `graph` when each layer in `kept` has only the channels listed for it.

    It carries the dense weights that are left, buffers, device, dtype and mode, shares no tensor with the dense network, and
    computes in training and evaluation what that one computes with every other output of the listed layers (a batch norm's,
    where one follows) at zero.
    """
    traces = [graph.trace(method).checked(graph.network) for method in graph.methods]
    plans = graph.plans_of(kept)
    if wide_sums:
        summed = {name for plan in plans.values() for name in _layers_of_uneven_sums(plan)}
        kept = {name: channels for name, channels in kept.items() if name not in summed}
        plans = graph.plans_of(kept)
    reasons = [trace.why_evaluation_only for trace in traces if not trace.both_modes]
    inputs = tuple((tuple(own.shape), own.dtype) for own in graph.inputs or () if isinstance(own, Tensor))
    return NarrowNetwork(graph.network, kept, plans, inputs=inputs, why_evaluation_only=reasons[0] if reasons else None)


def _layers_of_uneven_sums(plan: Plan) -> set[str]:
    """The layers whose outputs reach a sum of different channels with nothing but operations on single channels between."""
    names: set[str] = set()
    uneven = [step for step in plan.steps.values() if step.form == "sum" and len({w.stored for w in step.wants.values()}) > 1]
    pending = [source for step in uneven for source in step.wants]
    seen = set(pending)
    while pending:
        step = plan.steps[pending.pop()]
        if step.cut is not None:
            names.add(step.node.target)
        if step.exists and (step.cut is None or step.cut.columns is None):
            pending += [source for source in step.node.all_input_nodes if source not in seen]
            seen.update(step.node.all_input_nodes)
    return names


@dataclass(frozen=True)
class _DenseFacts:
    """What a narrow network knows of the dense one. `state` holds shapes and types, on the meta device."""

    name: str
    state: dict[str, Any]
    metadata: Any  # versions of the modules, which `load_state_dict` asks for
    homes: dict[str, str]  # where a tensor goes by several names: the name that the narrow network may have it under
    idle: frozenset[str]  # tensors that no method reads
    axes: dict[str, int]  # of the weights whose outputs are not on the first axis
    modes: dict[bool, dict[str, bool]]  # mode -> modules that train(mode) leaves in another one


class NarrowNetwork(nn.Module):
    """What `Selection.shrink` returns. `kept` is what it was made from.

    A module like any other: it can be copied, pickled, compiled and exported. All that it knows is in one attribute, and its
    graphs run on a plain module that has its layers, so that a layer of the dense network may have any name.
    """

    def __init__(
        self,
        model: nn.Module,
        kept: Mapping[str, Sequence[int]],
        plans: Mapping[str, Plan],
        *,
        inputs: tuple[tuple[tuple[int, ...], torch.dtype], ...] = (),
        why_evaluation_only: str | None,
    ):
        super().__init__()
        owner = nn.Module()  # the same layers and tensors, without the names of this class
        _share_layers(self, owner)
        cuts = {name: cut for plan in plans.values() for name, cut in plan.cuts().items()}
        entries = _take_layers(model, owner, cuts, _needed_names(plans.values()))
        self.training = model.training
        relayouts = Relayouts(_free_name(owner), self.training)
        graphs = {method: _GraphWriter(plan, relayouts).write() for method, plan in plans.items()}
        owner.add_module(relayouts.name, relayouts)
        for graph in graphs.values():
            reuse_memory(graph, owner)
        self.__parts = _Parts(
            kept={name: list(channels) for name, channels in kept.items()},
            facts=_facts_of(model, plans.values()),
            entries=entries,
            owner=owner,
            relayouts=relayouts.name,
            restored=restored_channels(plans["forward"]),
            uncut=whole_layers(plans["forward"]),
            functions={method: GraphFunction(graph) for method, graph in graphs.items()},
            inputs=inputs,
            why_evaluation_only=why_evaluation_only,
        )
        if why_evaluation_only is not None:
            self.eval()

    @property
    def kept(self) -> dict[str, list[int]]:
        return self.__parts.kept

    @property
    def inputs(self) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shape and type of each input of the example that it was made for; empty where there was none."""
        return self.__parts.inputs

    @property
    def trainable(self) -> bool:
        """Whether its graph is the network's in training as well; if not, it can only be evaluated."""
        return self.__parts.why_evaluation_only is None

    def forward(self, x: Tensor, *more: Tensor) -> Any:
        return self.__parts.functions["forward"](self.__parts.owner, self.training, x, *more)

    def outputs(self, x: Tensor) -> Outputs:
        """What the dense network's `outputs` returns, its feature maps at full width."""
        if "outputs" not in self.__parts.functions:
            raise UserError(f"{self.__parts.facts.name} has no feature maps: a network with outputs(x) is needed")
        return self.__parts.functions["outputs"](self.__parts.owner, self.training, x)

    @property
    def restored(self) -> list[Restored]:
        """Where the forward pass puts back channels that are gone, for an operation that makes something else of zeros."""
        return self.__parts.restored

    @property
    def uncut(self) -> dict[str, str]:
        """The layers that could not be cut at all, by name, with what keeps them from it."""
        return self.__parts.uncut

    @property
    def relayout_count(self) -> int:
        """How many steps of the forward pass lay channels out anew between layers that store different ones."""
        return self.__parts.functions["forward"].calls_below(self.__parts.relayouts)

    @property
    def has_outputs(self) -> bool:
        """Whether it gives its feature maps: `outputs(x)`."""
        return "outputs" in self.__parts.functions

    def graph(self, method: str = "forward") -> fx.Graph:
        """The operations of `forward` or `outputs`, for use with the layers of `bare()`; the first input is the mode."""
        return self.__parts.functions[method].graph()

    def own_trace(self, method: str) -> Trace:
        """What `ChannelGraph` takes in the place of tracing."""
        reason = self.__parts.why_evaluation_only
        return Trace(self.graph(method), both_modes=reason is None, why_evaluation_only=reason)

    def bare(self) -> nn.Module:
        """The same layers and `forward` under no names but their own, for torch.export, which looks for layers by attribute."""
        return _BareNetwork(self.__parts.owner, self.__parts.functions["forward"], training=self.training)

    def train(self, mode: bool = True) -> "NarrowNetwork":
        """As the dense network's `train(mode)`: layers that it leaves in evaluation, such as frozen batch norms, stay so."""
        facts = self.__parts.facts
        if mode and not self.trainable:
            raise UserError(f"{facts.name} {self.__parts.why_evaluation_only}: its narrow form can only be evaluated")
        super().train(mode)
        modules = dict(self.named_modules())
        for name, own_mode in facts.modes[mode].items():
            if name in modules:
                modules[name].training = own_mode
        return self

    def get_submodule(self, target: str) -> nn.Module:
        return self.__parts.owner.get_submodule(target) if target else self

    def stored(self, key: str) -> tuple[Tensor, list[int]] | None:
        """The tensor that holds what is left of the dense tensor `key`, and the dense outputs in it; None if nothing is left."""
        own = self.state_dict(keep_vars=True).get(self.__home(key))
        if own is None:
            return None
        entries, axis = self.__parts.entries.get(self.__home(key)), self.output_axis(key)
        if entries is not None:
            return own, entries[axis].flatten().tolist()
        return own, list(range(own.shape[axis])) if own.dim() else []

    def output_axis(self, key: str) -> int:
        """The axis of the tensor `key` along which the outputs of its layer lie: 1 for the weight of a transposed convolution."""
        return self.__parts.facts.axes.get(key, 0)

    def __home(self, key: str) -> str:
        return self.__parts.facts.homes.get(key, key)

    def dense_state_dict(self, *, idle: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """A state dict for the dense network with which it computes the same function.

        What was cut is 0, but for a batch norm's running variance, which is 1: with weight and bias 0 its output is 0.
        Tensors that no method of the dense network reads are not in this one; they come from `idle`, a dense state dict, and
        are 0 without it. The versions of the modules that the dense network's own state dict carries are carried as well.
        """
        state, facts = self.state_dict(), self.__parts.facts
        device = next((value.device for value in state.values() if isinstance(value, Tensor)), torch.device("cpu"))
        dense: dict[str, Tensor] = OrderedDict()
        for key, full in facts.state.items():
            value = state.get(self.__home(key), full if not isinstance(full, Tensor) else None)
            if value is None and key in facts.idle and idle is not None:
                value = idle[key]
            blank = 1 if key.endswith("running_var") else 0
            dense[key] = self.widened(key, value, blank=blank).to(device) if isinstance(full, Tensor) else value
        dense._metadata = copy.deepcopy(facts.metadata)
        return dense

    def widened(self, key: str, value: Tensor | None, *, blank: float = 0) -> Tensor:
        """`value`, of the shape of this network's tensor `key`, in the shape of the dense one, with `blank` where it was cut.

        None stands for a tensor of which nothing is left; the result is then on the CPU.
        """
        entries, full = self.__parts.entries.get(self.__home(key)), self.__parts.facts.state[key]
        if value is None:
            return torch.full(full.shape, blank, dtype=full.dtype)
        if entries is None:
            return value
        dense = value.new_full(full.shape, blank)
        dense[entries] = value
        return dense

    def narrowed(self, key: str, value: Tensor) -> Tensor:
        """What this network keeps of `value`, of the shape of the dense tensor `key`: the inverse of `widened`."""
        entries = self.__parts.entries.get(self.__home(key))
        return value if entries is None else value[entries]

    def load_dense_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes what this network keeps out of a dense network's state dict. Raises UserError for one of another network."""
        name, dense = self.__parts.facts.name, self.__parts.facts.state
        own: dict[str, Any] = OrderedDict()
        for key, value in self.state_dict().items():
            if isinstance(value, Tensor) and (key not in state or state[key].shape != dense[key].shape):
                found = f"shape {tuple(state[key].shape)}" if key in state else "nothing"
                raise UserError(f"{key}: {name} needs shape {tuple(dense[key].shape)}, found {found}")
            own[key] = self.narrowed(key, state[key]) if isinstance(value, Tensor) else state[key]
        if hasattr(state, "_metadata"):
            own._metadata = state._metadata
        self.load_state_dict(own)


class _BareNetwork(nn.Module):
    def __init__(self, owner: nn.Module, function: GraphFunction, *, training: bool):
        super().__init__()
        _share_layers(owner, self)
        self.training = training
        self.__function = function

    def forward(self, x: Tensor) -> Any:
        return self.__function(self, self.training, x)


def _share_layers(owner: nn.Module, other: nn.Module) -> None:
    """Gives `other` the layers, parameters and buffers that `owner` has and will have."""
    for registry in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        setattr(other, registry, getattr(owner, registry))


@dataclass
class _Parts:
    """What a narrow network consists of, besides its layers."""

    kept: dict[str, list[int]]
    facts: _DenseFacts
    entries: dict[str, "Entries"]
    owner: nn.Module
    relayouts: str
    restored: list[Restored]
    uncut: dict[str, str]
    functions: dict[str, GraphFunction]
    inputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    why_evaluation_only: str | None


def _facts_of(model: nn.Module, plans: Iterable[Plan]) -> _DenseFacts:
    state = model.state_dict(keep_vars=True)
    read = _read_tensors(model, plans)
    names: dict[int, list[str]] = {}
    for key, value in state.items():
        names.setdefault(id(value), []).append(key)
    return _DenseFacts(
        name=type(model).__name__,
        state={key: value.detach().to("meta") if isinstance(value, Tensor) else value for key, value in state.items()},
        metadata=copy.deepcopy(getattr(state, "_metadata", None)),
        homes={key: read[id(value)] for key, value in state.items() if read.get(id(value), key) != key},
        idle=frozenset(key for key, value in state.items() if id(value) not in read),
        axes=unusual_axes(model),
        modes={mode: deviating_modes(model, mode) for mode in (False, True)},
    )


def _read_tensors(model: nn.Module, plans: Iterable[Plan]) -> dict[int, str]:
    """By identity, the tensors that any method reads, those of layers that are gone included, each with a name that is read."""
    names = {step.node.target for plan in plans for step in plan.steps.values() if step.node.op in ("call_module", "get_attr")}
    read: dict[int, str] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        owners = {key[:end] for end, letter in enumerate(key) if letter == "."} | {key}
        if isinstance(value, Tensor) and not owners.isdisjoint(names):
            read.setdefault(id(value), key)
    return read


def _free_name(owner: nn.Module) -> str:
    name = "relayouts"
    while hasattr(owner, name):
        name += "_"
    return name


# ---- layers ------------------------------------------------------------------------------------------------------------

Entries = tuple[Tensor, ...]  # an index into a dense tensor that gives what is left of it


def _needed_names(plans: Iterable[Plan]) -> set[str]:
    """Names of the modules, parameters and buffers that the narrow graphs use."""
    steps = [step for plan in plans for step in plan.steps.values() if step.exists]
    return {step.node.target for step in steps if step.node.op in ("call_module", "get_attr")} - {"training"}


def _take_layers(model: nn.Module, network: nn.Module, cuts: Mapping[str, LayerCut], names: set[str]) -> dict[str, Entries]:
    """Copies the named modules and tensors into `network`, cut; returns what was taken of each tensor that was cut."""
    entries: dict[str, Entries] = {}
    copies: dict[int, Any] = {}  # keeps parameters that two modules share one parameter
    for name, module in model.named_modules():
        if name in names:
            layer = copied(module, copies)
            if getattr(layer, "inplace", False):
                layer.inplace = False
            if name in cuts:
                own = _cut_layer(layer, cuts[name])
                entries |= {f"{name}.{key}": index for key, index in own.items()}
            _place(network, name, layer)
    for name in sorted(names - dict(model.named_modules()).keys()):
        _place_tensor(model, network, name, copies)
    for name, module in network.named_modules():
        if name:
            module.training = model.get_submodule(name).training
    return entries


def _place(network: nn.Module, name: str, layer: nn.Module) -> None:
    path, _, last = name.rpartition(".")
    setattr(_container(network, path), last, layer)


def _container(network: nn.Module, path: str) -> nn.Module:
    for part in filter(None, path.split(".")):
        if part not in network._modules:
            setattr(network, part, nn.Module())
        network = network._modules[part]
    return network


def _place_tensor(model: nn.Module, network: nn.Module, name: str, copies: dict[int, Any]) -> None:
    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    value, target = copy.deepcopy(getattr(owner, last), copies), _container(network, path)
    if not isinstance(value, Tensor):
        raise UserError(f"{type(model).__name__}: `{name}` is a {type(value).__name__}, whose weights no state dict would have")
    if not isinstance(value, nn.Parameter):
        target.register_buffer(last, value, persistent=last in owner.state_dict(keep_vars=True))
    else:
        setattr(target, last, value)


def _cut_layer(layer: nn.Module, cut: LayerCut) -> dict[str, Entries]:
    """Cuts the tensors of a layer and the sizes that it states; returns what was taken of each that became smaller."""
    rows, entries = torch.tensor(cut.rows), {}
    weight_entries = (rows,)
    if cut.columns is not None:
        columns = torch.tensor(cut.columns)  # (groups, inputs)
        columns_of_rows = columns.repeat_interleave(len(rows) // len(columns), 0) if len(columns) > 1 else columns
        weight_entries = (columns.T, rows) if output_axis(layer) == 1 else (rows[:, None], columns_of_rows)
        _state(layer, in_channels=columns.numel(), in_features=columns.numel(), groups=len(columns))
    for key, value in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
        taken = value.detach()[weight_entries if key == "weight" else (rows,)] if value.dim() else value  # or a count of batches
        if taken.shape != value.shape:
            entries[key] = weight_entries if key == "weight" else (rows,)
            setattr(layer, key, nn.Parameter(taken, value.requires_grad) if isinstance(value, nn.Parameter) else taken)
    if isinstance(layer, nn.GroupNorm):
        _state(layer, num_groups=layer.num_groups * len(rows) // layer.num_channels, num_channels=len(rows))
    _state(layer, out_channels=len(rows), num_features=len(rows), out_features=len(rows), num_parameters=len(rows))
    return entries


def _state(layer: nn.Module, **sizes: int) -> None:
    """Corrects those of the sizes that a layer of this kind states."""
    for name, size in sizes.items():
        if hasattr(layer, name):
            setattr(layer, name, size)


# ---- graphs ------------------------------------------------------------------------------------------------------------


class _GraphWriter:
    """Writes the graph of a plan: the dense graph's nodes, without those whose result is gone, and the steps between."""

    def __init__(self, plan: Plan, relayouts: Relayouts):
        self.plan, self.relayouts = plan, relayouts
        self.graph = fx.Graph()
        self.written: dict[fx.Node, fx.Node | int] = {}
        self.laid_out: dict[tuple[fx.Node, tuple[int, ...]], fx.Node] = {}
        self.training = self.graph.placeholder("training")  # the first input: is the network in training mode?

    def write(self) -> fx.Graph:
        for node, step in self.plan.steps.items():
            if is_mode(node):
                self.written[node] = self.training
            elif step.exists:
                self.written[node] = _FORMS[step.form](self, step)
                self._say_where(node)
        return self.graph

    def _say_where(self, node: fx.Node) -> None:
        """What was written for `node` was called where it was."""
        for new in reversed(self.graph.nodes):
            if SCOPES in new.meta:
                break
            new.meta[SCOPES] = scopes_of(node)

    def given(self, step: Step, source: fx.Node) -> fx.Node:
        """The new node that holds `source` as the step wants it."""
        written, want = self.written[source], step.wants.get(source)
        out = self.plan.steps[source].out or (want and want.whole())  # what is not known has not been cut
        if want is None or out.stored == want.stored:
            return written
        key = (source, want.stored)
        if key not in self.laid_out:
            name = self.relayouts.name_of(Relayout, out, want)
            self.laid_out[key] = self.graph.call_module(name, (written,))
        return self.laid_out[key]


def _copy(writer: _GraphWriter, step: Step) -> fx.Node:
    return writer.graph.node_copy(step.node, lambda source: writer.given(step, source))


def _through(writer: _GraphWriter, step: Step) -> fx.Node:
    return writer.given(step, step.node.all_input_nodes[0])


def _sum(writer: _GraphWriter, step: Step) -> fx.Node:
    part, whole = sorted(step.wants, key=lambda source: len(step.wants[source].stored))
    if not step.wants[part].stored:
        return writer.given(step, whole)
    if step.wants[part].stored == step.out.stored:
        return _copy(writer, step)
    if _is_padded(writer.plan, part, whole):
        padded = writer.graph.call_function(F.pad, (writer.given(step, part), _behind_channels(step, part)))
        return writer.graph.node_copy(step.node, lambda source: padded if source is part else writer.given(step, source))
    name = writer.relayouts.name_of(AddInto, step.wants[whole], step.wants[part], step.out)
    return writer.graph.call_module(name, (writer.given(step, whole), writer.given(step, part)))


def _is_padded(plan: Plan, part: fx.Node, whole: fx.Node) -> bool:
    """Whether `part` has lost some of the zero channels that pad it, and nothing else that `whole` stores."""
    if plan.steps[part].form != "pad":
        return False
    own, others = plan.steps[part].out, plan.steps[whole].out.stored
    behind = [channel for channel in others if channel not in own.stored]
    return own.stored == others[: len(own.stored)] and all(own.members[channel] is None for channel in behind)


def _behind_channels(step: Step, part: fx.Node) -> tuple[int, ...]:
    """The widths of `F.pad` that bring the channels of `part` to those of the sum."""
    axes_behind = step.out.rank - 1 - step.out.axis
    return (0, 0) * axes_behind + (0, len(step.out.stored) - len(step.wants[part].stored))


def _cat(writer: _GraphWriter, step: Step) -> fx.Node:
    parts = step.node.args[0] if step.node.args else step.node.kwargs["tensors"]
    existing = [writer.given(step, part) for part in parts if writer.plan.steps[part].exists]
    return writer.graph.call_function(torch.cat, (existing, step.out.axis))


def _pad(writer: _GraphWriter, step: Step) -> fx.Node:
    """Zero channels need no padding: they are not stored."""
    source, widths, *rest = step.node.args
    position = 2 * (step.out.rank - 1 - step.out.axis)
    widths = (*widths[:position], 0, 0, *widths[position + 2 :])
    if not any(widths):
        return writer.given(step, source)
    return writer.graph.call_function(F.pad, (writer.given(step, source), widths, *rest), dict(step.node.kwargs))


def _piece(writer: _GraphWriter, step: Step) -> fx.Node:
    """A piece of a chunk: the stored channels of one follow those of the piece before it."""
    chunk, index = step.node.args
    split = writer.plan.steps[chunk]
    start = sum(len(piece.stored) for piece in split.out[: index % len(split.out)])
    whole = writer.given(split, chunk.args[0])
    return writer.graph.call_method("narrow", (whole, step.out.axis, start, len(step.out.stored)))


def _slice(writer: _GraphWriter, step: Step) -> fx.Node:
    """Some of the channels: a view where they are neighbours, as in the dense network, else a step that picks them."""
    source = step.node.args[0]
    stored, wanted = writer.plan.steps[source].out.stored, step.wants[source].stored
    first = stored.index(wanted[0]) if wanted[0] in stored else 0
    if stored[first : first + len(wanted)] != wanted:
        return writer.given(step, source)
    return writer.graph.call_method("narrow", (writer.written[source], step.out.axis, first, len(wanted)))


def _sized(writer: _GraphWriter, step: Step) -> fx.Node:
    """A view or an expansion, whose sizes count the channels that are stored."""
    source, sizes = step.node.all_input_nodes[0], [*sizes_of(step.node)]
    sizes[step.out.axis] = len(step.out.stored)
    sizes = [writer.written[size] if isinstance(size, fx.Node) else size for size in sizes]
    method = step.node.target if isinstance(step.node.target, str) else "reshape"
    return writer.graph.call_method(method, (writer.given(step, source), *sizes))


def _flat(writer: _GraphWriter, step: Step) -> fx.Node:
    """A view that names the number of all that is left of an image."""
    return writer.graph.call_method("flatten", (writer.given(step, step.node.all_input_nodes[0]), 1))


def _count(writer: _GraphWriter, step: Step) -> int:
    return counted_channels(writer.plan.steps, step.node)


def _nothing(writer: _GraphWriter, step: Step) -> None:
    return None


_FORMS: dict[str, Callable[[_GraphWriter, Step], fx.Node | int | None]] = {
    "copy": _copy,
    "through": _through,
    "sum": _sum,
    "cat": _cat,
    "pad": _pad,
    "piece": _piece,
    "slice": _slice,
    "sized": _sized,
    "flat": _flat,
    "count": _count,
    "nothing": _nothing,
}
