"""By how much the FLOPs fall as the papers on filter pruning count them, which is not what the small network saves."""

from torch import Tensor, fx, nn

from models.graph import ChannelGraph
from models.graph.cost import positions_of_layers


def papers_flops_drop(graph: ChannelGraph, small: nn.Module) -> float:
    """By how many percent the FLOPs fall as He et al. count them ("Soft Filter Pruning", IJCAI 2018, section 3.4; FPGM alike).

    Convolutions alone. One that retains the proportion p of its filters, and reads another that retains q, costs p * q of
    its dense self; what reads a residual sum reads all of its channels, though `small` may store fewer. `small` has the
    convolutions of the graph's network under their names, or not at all. Raises UserError where that cannot be traced.
    """
    dense = graph.network
    macs = _macs_of_convolutions(dense, graph.images[:1])
    left = dict(small.named_modules())
    kept = {name: left[name].out_channels / dense.get_submodule(name).out_channels if name in left else 0.0 for name in macs}
    reads = _convolutions_read_directly(graph)
    after = sum(count * kept[name] * kept.get(reads.get(name), 1.0) for name, count in macs.items())
    return 100 * (1 - after / sum(macs.values()))


def _macs_of_convolutions(network: nn.Module, image: Tensor) -> dict[str, int]:
    """H * W * kH * kW * C / groups * F of each convolution that is called."""
    positions = positions_of_layers(network, image)
    layers = {name: network.get_submodule(name) for name in positions}
    return {name: positions[name] * layer.weight.numel() for name, layer in layers.items() if isinstance(layer, nn.Conv2d)}


def _convolutions_read_directly(graph: ChannelGraph) -> dict[str, str]:
    """For each convolution, by name, the one that it reads with no sum, or other operation on several tensors, between."""

    def is_conv(node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(graph.network.get_submodule(node.target), nn.Conv2d)

    reads = {}
    for node in filter(is_conv, graph.trace().graph.nodes):
        source = node.all_input_nodes[0]
        while len(source.all_input_nodes) == 1 and not is_conv(source):
            source = source.all_input_nodes[0]
        if is_conv(source):
            reads[node.target] = source.target
    return reads
