"""Which batch norm belongs to which convolution, as the network's graph has it and not its naming."""

from collections import Counter

from torch import fx, nn

from models.channel_flow import trace_network

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def conv_norm_pairs(model: nn.Module) -> dict[str, str]:
    """Names of convolutions, each with the name of the one batch norm that alone reads it; neither of them is used twice.

    Pass the bare network, not one wrapped by `torch.compile` or DistributedDataParallel, whose names differ. Raises
    UserError where torch.fx cannot trace it.
    """
    calls = [node for node in trace_network(model).graph.nodes if node.op == "call_module"]
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
