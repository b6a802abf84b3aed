"""What is zero goes: the smaller network that computes the same function.

A filter can go when its weights and bias are zero, or when it only feeds a batch norm entry with weight and bias zero; a
channel that only reads zeros goes with it. `compact` finds such channels from the values of the weights, follows the zeros
through the network (`models.graph`), has it built without them (`models.narrow`), and proves that both agree. Where it is
known what was pruned, `compact_selection` does without the search.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from models.batch_norm import UnevenBatchNorm2d
from models.difference import ResultDifference
from models.graph import ChannelGraph, Channels, Plan
from models.graph.kinds import CONVOLUTIONS, INSTANCE_NORMS, outputs_first, unusual_axes
from models.narrow import NarrowNetwork, Selection
from models.network_file import NetworkFile
from utils.errors import UserError, naming, shown
from utils.modes import evaluating

TOLERANCE = 1e-4  # of the largest logit, in float32


def compact(model: nn.Module, example_input: Tensor, *, tolerance: float = TOLERANCE) -> NarrowNetwork:
    """A smaller network with the function of `model`: all channels that are identically zero are gone.

    `example_input` is a batch of images; both networks must agree on it to `tolerance` of the largest logit, in evaluation
    mode. Raises UserError if they do not, and where torch.fx cannot trace the network.
    """
    return _proved(model, nonzero_selection(ChannelGraph(model, example_input)), tolerance=tolerance)


def compact_selection(masked: nn.Module, selection: Selection, *, tolerance: float = TOLERANCE) -> NarrowNetwork:
    """What `compact` returns for a network whose pruned channels are known: all others of `selection` are zero in `masked`."""
    return _proved(masked, without_unfed(selection.on(masked)), tolerance=tolerance)


def _proved(model: nn.Module, selection: Selection, *, tolerance: float) -> NarrowNetwork:
    smaller = selection.shrink()
    difference = relative_difference(model, smaller, [selection.graph.inputs])
    if not difference <= tolerance:  # a NaN is no agreement either
        raise UserError(
            f"the compact network differs from the dense one by {difference:.1e} of the largest logit (limit {tolerance})"
        )
    return smaller


def nonzero_selection(graph: ChannelGraph) -> Selection:
    """The output channels that are not identically zero, whatever comes in."""
    model, method = graph.network, graph.methods[-1]
    graph.trace(method).checked(model)
    live: dict[str, list[int]] = {}

    def find_live(name: str, layer: nn.Module, given: Channels | None) -> list[int]:
        live[name] = _live_entries_of(layer)(layer, given).nonzero().flatten().tolist()
        return live[name]

    plan = graph.plan(find_live, method)
    _drop_unread(model, plan, live)
    return Selection.literal(graph, live)


def without_unfed(selection: Selection) -> Selection:
    """The selection without the filters, too, that read nothing but channels that are gone and have no bias."""
    kept = dict(selection.kept)

    def find_fed(name: str, layer: nn.Module, given: Channels | None) -> Sequence[int]:
        own = selection.channels(name)
        if given is None or getattr(layer, "bias", None) is not None or not isinstance(layer, CONVOLUTIONS):
            return own
        filters, reads = layer.out_channels // layer.groups, layer.in_channels // layer.groups
        fed = {channel // reads for channel in given.stored}
        kept[name] = [channel for channel in own if channel // filters in fed]
        return kept[name]

    selection.graph.plan(find_fed, selection.graph.methods[-1])
    return Selection.literal(selection.graph, kept)


def _drop_unread(model: nn.Module, plan: Plan, live: dict[str, list[int]]) -> None:
    """A layer's output that only a batch or group norm reads is not needed where that norm gives zero."""
    for step in plan.steps.values():
        if step.cut is None or step.node.target not in live:
            continue
        source = step.node.all_input_nodes[0]
        feeds_norm = isinstance(model.get_submodule(step.node.target), (*BATCH_NORMS, nn.GroupNorm))
        if feeds_norm and len(source.users) == 1 and source.op == "call_module" and source.target in live:
            read = set(live[step.node.target])
            live[source.target] = [channel for channel in live[source.target] if channel in read]


def _live_filters(conv: nn.Module, given: Channels | None) -> Tensor:
    """(F,) bool: filters that can give something else than zero for an input with only the `given` channels."""
    reads = _stored(given, conv.in_channels, conv.weight).view(conv.groups, 1, -1, 1)
    weight = outputs_first(conv, conv.weight.detach()).reshape(conv.groups, conv.out_channels // conv.groups, reads.shape[2], -1)
    live = (weight * reads).ne(0).any(3).any(2).flatten()
    return live if conv.bias is None else live | conv.bias.ne(0)


def _live_units(linear: nn.Linear, given: Channels | None) -> Tensor:
    full = given.full if given is not None else linear.in_features
    reads = _stored(given, full, linear.weight).repeat_interleave(linear.in_features // full)
    live = (linear.weight.detach() * reads).ne(0).any(1)
    return live if linear.bias is None else live | linear.bias.ne(0)


def _live_entries(norm: nn.Module, given: Channels | None) -> Tensor:
    """(C,) bool: entries that give something else than zero, in training or in evaluation."""
    zero_input = _stored(given, norm.num_features, norm.running_mean).eq(0)
    unmoved = zero_input if norm.running_mean is None else zero_input & norm.running_mean.eq(0)
    if norm.weight is None:
        return ~unmoved
    return norm.bias.ne(0) | (norm.weight.ne(0) & ~unmoved)


def _live_groups(norm: nn.GroupNorm, given: Channels | None) -> Tensor:
    """(C,) bool: channels of the groups that give something else than zero anywhere."""
    reads = _stored(given, norm.num_channels, norm.weight).view(norm.num_groups, -1).ne(0).any(1, keepdim=True)
    live = reads.expand(-1, norm.num_channels // norm.num_groups)
    if norm.weight is not None:
        live = norm.bias.ne(0).view_as(live) | (norm.weight.ne(0).view_as(live) & live)
    return live.any(1, keepdim=True).expand_as(live).flatten()


def _stored(given: Channels | None, full: int, like: Tensor | None) -> Tensor:
    """(full,) ones and zeros: the channels that the input stores."""
    stored = range(full) if given is None else given.stored
    reads = torch.zeros(full) if like is None else torch.zeros(full, dtype=like.dtype, device=like.device)
    reads[list(stored)] = 1
    return reads


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, UnevenBatchNorm2d, nn.SyncBatchNorm)
_LIVE = {
    **dict.fromkeys(CONVOLUTIONS, _live_filters),
    nn.Linear: _live_units,
    nn.GroupNorm: _live_groups,
    **dict.fromkeys((*BATCH_NORMS, *INSTANCE_NORMS), _live_entries),
}


def _live_entries_of(layer: nn.Module) -> Callable[[nn.Module, Channels | None], Tensor]:
    return next(_LIVE[kind] for kind in type(layer).__mro__ if kind in _LIVE)


def relative_difference(dense: nn.Module, smaller: nn.Module, images: Iterable[Tensor | Sequence[Tensor]]) -> float:
    """The largest difference of any result of the two networks, in evaluation, over the largest of `dense`; NaN if one is NaN.

    `images` are batches on the networks' device, a tensor each or several inputs in a tuple. Modes are left as they were.
    """
    difference = ResultDifference()
    with evaluating(dense, smaller), torch.no_grad():
        for batch in images:
            inputs = batch if isinstance(batch, tuple | list) else (batch,)
            difference.add(dense(*inputs), smaller(*inputs))
    return difference.relative


def check_zeros_of(file: NetworkFile, *, origin: str) -> None:
    """`check_pruned_zeros` of a file at full width; `origin` (flag and path) begins the message."""
    if not file.compact:
        with naming(origin):
            check_pruned_zeros(file.network.state_dict(), file.kept, axes=unusual_axes(file.network))


def check_pruned_zeros(
    state: Mapping[str, Tensor], kept: Mapping[str, Sequence[int]], *, axes: Mapping[str, int] | None = None
) -> None:
    """Raises UserError where a layer has a weight or bias that is not exactly zero outside of its `kept` channels.

    `axes` says of which weights the outputs are not on the first axis (`models.graph.kinds.unusual_axes`).
    """
    for name, channels in kept.items():
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in state:
                tensor = state[key].transpose(0, (axes or {}).get(key, 0))
                largest = float(_pruned_entries(tensor, name, channels).abs().amax()) if len(channels) < len(tensor) else 0
                if largest != 0:
                    raise UserError(f"{key}: pruned channels must be exactly 0, the largest entry left there is {largest:.3g}")


def _pruned_entries(tensor: Tensor, name: str, channels: Sequence[int]) -> Tensor:
    pruned = set(range(len(tensor))).difference(channels)
    if len(pruned) + len(channels) != len(tensor):
        raise UserError(
            f"kept channels of {name!r}: different numbers from 0 to {len(tensor) - 1} expected, not {shown(list(channels))}"
        )
    return tensor[sorted(pruned)]
