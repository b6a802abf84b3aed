"""What belongs to a convolution, its batch norm and depthwise ones behind it, and which classifies: as the graph has it."""

from collections import Counter
from collections.abc import Sequence

from torch import Tensor, fx, nn

from models.channel_flow import Channels, members_of_layer, output_channels, plan_channels, trace_network

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def conv_norm_pairs(model: nn.Module, *, example: Tensor | None = None) -> dict[str, str]:
    """Names of convolutions, each with the name of the one batch norm that alone reads it; neither of them is used twice.

    Pass the bare network, not one wrapped by `torch.compile` or DistributedDataParallel, whose names differ; `example` is
    for networks whose Python asks for sizes, see `trace_network`. Raises UserError where torch.fx cannot trace it.
    """
    calls = [node for node in trace_network(model, example=example).graph.nodes if node.op == "call_module"]
    times_called = Counter(node.target for node in calls)

    def is_single(node: fx.Node, kinds: type | tuple[type, ...]) -> bool:
        called_once = node.op == "call_module" and times_called[node.target] == 1
        return called_once and isinstance(model.get_submodule(node.target), kinds)

    return {
        conv.target: reader.target
        for conv in calls
        if is_single(conv, nn.Conv2d)
        for reader in conv.users
        if len(conv.users) == 1 and is_single(reader, BATCH_NORMS)
    }


def depthwise_producers(model: nn.Module, *, example: Tensor | None = None) -> dict[str, str]:
    """Names of depthwise convolutions, each with the name of the one convolution whose channels it reads, in their order.

    `example` is for networks whose Python asks for sizes, see `trace_network`.
    """

    def all_outputs(name: str, layer: nn.Module, given: Channels | None) -> Sequence[int]:
        return range(output_channels(layer))

    graph = trace_network(model, example=example).graph
    plan = plan_channels(graph, model, live_outputs=all_outputs, carriers=frozenset())
    producers = {}
    for node, step in plan.steps.items():
        layer = model.get_submodule(node.target) if step.cut is not None else None
        if not isinstance(layer, nn.Conv2d) or not 1 < layer.groups == layer.in_channels == layer.out_channels:
            continue
        given = plan.steps[node.all_input_nodes[0]].out
        name = given.members[0][0] if isinstance(given, Channels) and given.members[0] else None
        if name is not None and given.members == members_of_layer(name, layer.in_channels):
            producers[node.target] = name
    return {name: source for name, source in producers.items() if isinstance(model.get_submodule(source), nn.Conv2d)}


def classifying_layers(model: nn.Module, *, example: Tensor | None = None) -> frozenset[str]:
    """Names of the convolutions and linear layers whose outputs become the network's results, with no other in between."""
    graph = trace_network(model, example=example).graph
    pending, seen, found = [node for node in graph.nodes if node.op == "output"], set(), set()
    while pending:
        node = pending.pop()
        layer = model.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
            found.add(node.target)
        else:
            pending += [source for source in node.all_input_nodes if source not in seen]
            seen.update(node.all_input_nodes)
    return frozenset(found)
