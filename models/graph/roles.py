"""What the layers of a network are to one another, as its graph has it.

Which norm belongs to a convolution, which depthwise one follows it, which layers classify, and which give hidden units.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import fx, nn

from models.graph.channels import Channels, Plan, all_channels, members_of_layer
from models.graph.kinds import CONVOLUTIONS, WEIGHED, kind_of
from models.graph.out_of_place import place_in_code
from models.graph.plan import output_channels

if TYPE_CHECKING:
    from models.graph.channel_graph import ChannelGraph

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
NORMS = {  # of a convolution, by the axes of its images
    axes: (getattr(nn, f"BatchNorm{axes}d"), nn.SyncBatchNorm, getattr(nn, f"InstanceNorm{axes}d")) for axes in (1, 2, 3)
}
PLAIN_NORMS = tuple({norm: None for norms in NORMS.values() for norm in norms})
CHANNEL_COUNTS = (("in_channels", "out_channels"), ("in_features", "out_features"))


def conv_norm_pairs(graph: "ChannelGraph") -> dict[str, str]:
    """Names of convolutions, each with the name of the one batch norm that alone reads it; neither of them is used twice."""
    pairs, model = graph.norm_pairs, graph.network
    return {name: norm for name, norm in pairs.items() if _are(model, name, nn.Conv2d) and _are(model, norm, BATCH_NORMS)}


def norm_pairs(graph: "ChannelGraph") -> dict[str, str]:
    """As `conv_norm_pairs`, and group norms of convolutions without groups, and batch norms of linear layers."""
    model = graph.network
    calls = [node for node in graph.trace().graph.nodes if node.op == "call_module"]
    times_called = Counter(node.target for node in calls)

    def is_single(node: fx.Node) -> bool:
        return node.op == "call_module" and times_called[node.target] == 1

    return {
        layer.target: reader.target
        for layer in filter(is_single, calls)
        for reader in filter(is_single, layer.users)
        if len(layer.users) == 1 and _is_pair(model.get_submodule(layer.target), model.get_submodule(reader.target))
    }


def _is_pair(layer: nn.Module, norm: nn.Module) -> bool:
    if isinstance(layer, nn.Linear):
        return isinstance(norm, nn.BatchNorm1d)
    if not isinstance(layer, CONVOLUTIONS):
        return False
    if isinstance(norm, NORMS[kind_of(layer).axes]):
        return norm.affine or norm.track_running_stats or isinstance(norm, BATCH_NORMS)  # an instance norm with tensors
    return isinstance(norm, nn.GroupNorm) and layer.groups == 1 < norm.num_groups


def _are(model: nn.Module, name: str, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(model.get_submodule(name), kinds)


def depthwise_producers(graph: "ChannelGraph") -> dict[str, str]:
    """Names of depthwise convolutions, each with the name of the one convolution whose channels it reads, in their order."""

    def all_outputs(name: str, layer: nn.Module, given: Channels | None) -> Sequence[int]:
        return all_channels(output_channels(layer))

    plan, model, producers = graph.plan(all_outputs), graph.network, {}
    for node, step in plan.steps.items():
        layer = model.get_submodule(node.target) if step.cut is not None else None
        if not isinstance(layer, CONVOLUTIONS) or not 1 < layer.groups == layer.in_channels == layer.out_channels:
            continue
        given = plan.steps[node.all_input_nodes[0]].out
        name = given.members[0][0] if isinstance(given, Channels) and given.members[0] else None
        if name is not None and given.members == members_of_layer(name, layer.in_channels):
            producers[node.target] = name
    return {name: source for name, source in producers.items() if isinstance(model.get_submodule(source), CONVOLUTIONS)}


def classifying_layers(graph: "ChannelGraph") -> frozenset[str]:
    """Names of the convolutions and linear layers whose outputs become the network's results, with no other in between.

    A fixed layer that gives as many channels as it reads, such as the convolution that puts the mean of the colours back
    (EDSR's MeanShift), is one of them, and so is the last layer before it that learns.
    """
    model = graph.network
    pending, seen, found = [node for node in graph.trace().graph.nodes if node.op == "output"], set(), set()
    while pending:
        node = pending.pop()
        name = _layer_of(node, model)
        if name is not None:
            found.add(name)
        if name is None or _keeps_channels(model.get_submodule(name)):
            pending += [source for source in node.all_input_nodes if source not in seen]
            seen.update(node.all_input_nodes)
    return frozenset(found)


def _layer_of(node: fx.Node, model: nn.Module) -> str | None:
    """The convolution or linear layer that a node is the call of, or an operation in the own forward pass of."""
    name = node.target if node.op == "call_module" else place_in_code(node)[0]
    is_call = node.op in ("call_module", "call_function", "call_method")
    return name if is_call and isinstance(model.get_submodule(name), WEIGHED) else None


def _keeps_channels(layer: nn.Module) -> bool:
    """Whether the layer is fixed and gives as many channels as it reads."""
    sizes = (getattr(layer, reads) == getattr(layer, gives) for reads, gives in CHANNEL_COUNTS if hasattr(layer, reads))
    return all(sizes) and not any(parameter.requires_grad for parameter in layer.parameters())


def hidden_layers(graph: "ChannelGraph") -> frozenset[str]:
    """Names of the linear layers of which any output may go: what reads it reads unit by unit, up to the next layers' columns.

    So are the hidden units of an MLP, between two linear layers with an activation; not what enters a residual sum, or is
    normalised or laid out anew. A batch norm between them belongs to the first one.
    """
    pairs, model = graph.norm_pairs, graph.network
    hidden = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    while hidden:
        plan = _plan_with_half(graph, hidden)
        cuts = plan.cuts()
        cut = {name for name in hidden & cuts.keys() if len(cuts[name].rows) < output_channels(model.get_submodule(name))}
        found = cut - _met_or_laid_out_anew(plan, pairs)
        if found == hidden:
            break
        hidden = found
    return frozenset(hidden)


def _plan_with_half(graph: "ChannelGraph", halved: Collection[str]) -> Plan:
    """The plan of the network whose layers `halved` have every second output; a norm has the channels that it is given."""

    def live_outputs(name: str, layer: nn.Module, given: Channels | None) -> Sequence[int]:
        if name in halved:
            return range(0, output_channels(layer), 2)
        is_norm = given is not None and not hasattr(layer, "out_channels") and not hasattr(layer, "out_features")
        return given.stored if is_norm else all_channels(output_channels(layer))

    return graph.plan(live_outputs)


def _met_or_laid_out_anew(plan: Plan, pairs: Mapping[str, str]) -> set[str]:
    """The layers whose outputs meet others position by position, are restored for some operation, or feed a norm of others."""
    names = {member[0] for step in plan.steps.values() for pair in step.meets for side in pair for member in side if member}
    for node, step in plan.steps.items():
        is_norm = step.cut is not None and step.cut.columns is None and node.target not in pairs.values()
        for source in node.all_input_nodes if is_norm else step.wants:
            out = plan.steps[source].out
            if isinstance(out, Channels) and (is_norm or out.stored != step.wants[source].stored):
                names |= {member[0] for member in out.members if member}
    return names
