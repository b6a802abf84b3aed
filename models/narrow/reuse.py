"""In evaluation, a result is written over an operand that nothing reads any more: sums and ReLUs of a network need no memory.

A pass over maps that are in the cache already takes less time than one that fetches memory for its result. Where gradients
are recorded, and for compilers, which plan memory themselves, the operations are the ordinary ones. A forward hook that keeps
the result of a convolution or batch norm must copy it, as in networks with in-place activations.
"""

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from models.narrow.relayout import AddInto, Relayout, may_overwrite

LAYERS = (nn.Conv2d, nn.BatchNorm2d, AddInto, Relayout)  # their result never shares memory with what they read


def relu_over(x: Tensor) -> Tensor:
    """ReLU of `x`, which it may replace."""
    return x.relu_() if may_overwrite() else F.relu(x)


def add_over(x: Tensor, y: Tensor) -> Tensor:
    """`x + y`, which may replace `x`."""
    fits = may_overwrite() and x.shape == y.shape and x.dtype == y.dtype
    return x.add_(y) if fits else x + y


SUMS = (operator.add, torch.add, add_over)
RELUS = (F.relu, torch.relu, relu_over)


def reuse_memory(graph: fx.Graph, network: nn.Module) -> None:
    """Turns the sums and ReLUs of `graph`, whose modules are those of `network`, into ones that overwrite what they read last.

    Left alone is what a view may show, or the caller has: an operand must come from one of a few operations that give memory
    of their own, and all that read it must be such operations.
    """
    fresh = {node for node in graph.nodes if _gives_fresh_memory(node, network)}
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in fresh:
        free = [
            source
            for source in node.all_input_nodes
            if source in fresh and _is_read_last(source, by=node, fresh=fresh, order=order)
        ]
        if type(_layer(node, network)) is AddInto:
            if node.args[0] in free:
                node.kwargs = {"over": True}
        elif is_relu(node, network) and free:
            node.op, node.target, node.args, node.kwargs = "call_function", relu_over, (free[0],), {}
        elif is_sum(node) and free:
            x, y = node.args
            node.target, node.args = add_over, (x, y) if x in free else (y, x)


def _gives_fresh_memory(node: fx.Node, network: nn.Module) -> bool:
    return type(_layer(node, network)) in LAYERS or is_relu(node, network) or is_sum(node)


def _is_read_last(source: fx.Node, *, by: fx.Node, fresh: set[fx.Node], order: dict[fx.Node, int]) -> bool:
    return all(reader in fresh and order[reader] <= order[by] for reader in source.users)


def _layer(node: fx.Node, network: nn.Module) -> nn.Module | None:
    """The layer of a node, if it does what its class says and nothing else."""
    layer = network.get_submodule(node.target) if node.op == "call_module" else None
    altered = layer is not None and (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))
    return None if altered else layer


def is_relu(node: fx.Node, network: nn.Module) -> bool:
    """Whether the node is a ReLU; its layers are those of `network`."""
    if node.op == "call_method":
        return node.target == "relu"
    return type(_layer(node, network)) is nn.ReLU or (node.op == "call_function" and node.target in RELUS)


def is_sum(node: fx.Node) -> bool:
    """Whether the node adds two tensors, and nothing else."""
    operands = len(node.args) == 2 and all(isinstance(operand, fx.Node) for operand in node.args)
    return node.op == "call_function" and node.target in SUMS and operands and not node.kwargs
