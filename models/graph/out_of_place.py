"""In-place operations of a graph as ordinary ones, whose result later readers of the overwritten tensor read.

A plan needs that: narrow tensors may share memory where dense ones do not, and the other way round. What a graph cannot say
this way is refused: memory that is read later through another view, and tensors of the network itself.
"""

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.ops import StochasticDepth

IN_PLACE_OPERATORS = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "lshift", "rshift")
} | {operator.iand: operator.and_, operator.ior: operator.or_, operator.ixor: operator.xor}
NOT_WRITING = ("requires_grad_", "share_memory_")
_FUNCTIONS_OF_METHODS = {"zero_": torch.zeros_like, "fill_": torch.full_like}  # methods without a form out of place
_VIEWING_MODULES = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.Upsample,
    nn.ChannelShuffle,
    StochasticDepth,
    *(getattr(nn, name) for name in dir(nn) if "Pad" in name or "Dropout" in name),
)
# Functions and methods whose result is never a view of what they read; of all others it may be.
_FRESH = {
    *("add", "sub", "mul", "div", "truediv", "floordiv", "pow", "neg", "abs", "exp", "sqrt", "square", "rsqrt", "matmul", "bmm"),
    *("mean", "sum", "amax", "amin", "var", "std", "cat", "concat", "stack", "clone", "softmax", "log_softmax", "normalize"),
    *("relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh"),
    *("hardshrink", "softshrink", "tanhshrink", "softsign", "softplus", "threshold", "sigmoid", "tanh", "logsigmoid", "clamp"),
    *("conv1d", "conv2d", "conv3d", "linear", "batch_norm", "layer_norm", "group_norm", "scaled_dot_product_attention"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d"),
    *("adaptive_avg_pool2d", "adaptive_avg_pool3d", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("size", "dim", "numel", "stride", "new_zeros", "new_ones", "new_empty", "new_full", "rsub", "rmul", "masked_fill"),
}
_PLAIN_ATTRIBUTES = ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad")


class InPlaceOperators:
    """Makes a proxy record `x += y` and `x[i] = y` as what they are, where torch.fx would record `x = x + y`, or nothing."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda proxy, other: proxy.tracer.create_proxy("call_function", function, (proxy, other), {})


for _function in IN_PLACE_OPERATORS:
    setattr(InPlaceOperators, f"__{_function.__name__}__", _recorded(_function))


def make_out_of_place(graph: fx.Graph, model: nn.Module) -> str | None:
    """Rewrites the in-place operations of `graph`, whose layers are those of `model`; gives the reason if one cannot be."""
    overwritten = {node: written for node in graph.nodes if (written := _make_ordinary(node, model)) is not None}
    shared = _SharedMemory(graph, model, overwritten)
    results: dict[fx.Node, fx.Node] = {}  # where the last value of an overwritten tensor is
    for node, first in overwritten.items():
        written = results.get(first, first)
        reason = _reason_to_refuse(node, written, shared)
        if reason is not None:
            return reason
        written.replace_all_uses_with(node, delete_user_cb=lambda user, above=node: shared.order[user] > shared.order[above])
        results |= {earlier: node for earlier, result in results.items() if result is written} | {written: node}
    return None


def _make_ordinary(node: fx.Node, model: nn.Module) -> fx.Node | None:
    """Turns an in-place operation into an ordinary one; gives the node that it overwrites, None for any other operation."""
    if node.op == "call_module":
        first = next(iter((*node.args, *node.kwargs.values())), None)
        return first if getattr(model.get_submodule(node.target), "inplace", False) else None
    if node.op not in ("call_function", "call_method"):
        return None
    if isinstance(node.kwargs.get("out"), fx.Node):
        written = node.kwargs["out"]
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "out"}
        return written
    found = _ordinary_method(node) if node.op == "call_method" else _ordinary_function(node)
    if not found:
        return None
    written = node.args[0] if node.args else node.kwargs["input"]
    return written if isinstance(written, fx.Node) else None


def _ordinary_method(node: fx.Node) -> bool:
    name = node.target
    if not name.endswith("_") or name.endswith("__") or name in NOT_WRITING:
        return False
    if name in _FUNCTIONS_OF_METHODS:
        node.op, node.target = "call_function", _FUNCTIONS_OF_METHODS[name]
    elif callable(getattr(Tensor, name[:-1], None)):
        node.target = name[:-1]
    return True  # one that has no other form stays, and reads all channels


def _ordinary_function(node: fx.Node) -> bool:
    function = node.target
    if function in IN_PLACE_OPERATORS:
        node.target = IN_PLACE_OPERATORS[function]
        return True
    if function is operator.setitem:
        return True
    name = getattr(function, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        homes = [home for home in (torch, F) if getattr(home, name, None) is function and hasattr(home, name[:-1])]
        if homes:
            node.target = getattr(homes[0], name[:-1])
        return bool(homes)
    return _without_inplace(node)


def _without_inplace(node: fx.Node) -> bool:
    """Turns off the argument `inplace`, given by position or by name; says whether it was on."""
    try:
        call = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # a function in C, which has no such argument
        return False
    if not call.arguments.get("inplace"):
        return False
    call.arguments["inplace"] = False
    node.args, node.kwargs = call.args, call.kwargs
    return True


def _reason_to_refuse(node: fx.Node, written: fx.Node, shared: "_SharedMemory") -> str | None:
    what = f"operation `{node.name}`{place_of(node)}"
    if node.target is operator.setitem:
        return f"{what} assigns to a part of a tensor, which is not supported"
    for other in (written, *shared.with_memory_of(written, before=node)):
        if other.op == "get_attr":
            return f"{what} overwrites `{other.target}` of the network, which is not supported"
        if other is not written and any(shared.order[user] > shared.order[node] for user in other.users):
            return f"{what} overwrites memory that is read later as `{other.name}`, which is not supported"
    return None


def place_in_code(node: fx.Node) -> tuple[str, str]:
    """The path of the module in whose forward pass the operation is, and the line; empty where that is not known."""
    return node.meta.get("place", ("", ""))


def place_of(node: fx.Node) -> str:
    path, line = place_in_code(node)
    return f" ({', '.join(filter(None, (path, line)))})" if path or line else ""


class _SharedMemory:
    """Which nodes may show the same memory: a node and what it reads, unless its operation gives memory of its own.

    `overwritten` maps in-place operations to what they overwrite, which their result shows.
    """

    def __init__(self, graph: fx.Graph, model: nn.Module, overwritten: Mapping[fx.Node, fx.Node]):
        self.order = {node: place for place, node in enumerate(graph.nodes)}
        self._neighbours: dict[fx.Node, set[fx.Node]] = {}
        for node in graph.nodes:
            fresh = node.op == "output" or _is_fresh(node, model)
            for source in [overwritten[node]] if node in overwritten else [] if fresh else node.all_input_nodes:
                self._neighbours.setdefault(node, set()).add(source)
                self._neighbours.setdefault(source, set()).add(node)

    def with_memory_of(self, node: fx.Node, *, before: fx.Node) -> Iterator[fx.Node]:
        """All others above the node `before` that may show memory of `node`. Different pieces of one split do not."""
        seen, pending = {node}, [node]
        while pending:
            current = pending.pop()
            for other in self._neighbours.get(current, ()):
                if _is_piece(current) and other is current.args[0]:
                    seen |= {piece for piece in self._neighbours[other] if _is_piece(piece) and piece.args[1] != current.args[1]}
                if other not in seen and self.order[other] < self.order[before]:
                    seen.add(other)
                    pending.append(other)
                    yield other


def _is_piece(node: fx.Node) -> bool:
    """Whether the node is one of the parts of `chunk`, `split` or `unbind`."""
    if node.target is not operator.getitem or not isinstance(node.args[1], int) or not isinstance(node.args[0], fx.Node):
        return False
    return _name_of(node.args[0]) in ("chunk", "split", "unbind", "tensor_split")


def _name_of(node: fx.Node) -> str:
    return node.target if node.op == "call_method" else getattr(node.target, "__name__", "")


def _is_fresh(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_module":
        layer = model.get_submodule(node.target)
        return type(layer).__module__.startswith("torch.nn.") and not isinstance(layer, _VIEWING_MODULES)
    if node.target is getattr:
        return node.args[1] in _PLAIN_ATTRIBUTES
    name = _name_of(node)
    plain = node.target is operator.getitem and isinstance(node.args[0], fx.Node) and _is_plain(node.args[0])
    return plain or name in _FRESH


def _is_plain(node: fx.Node) -> bool:
    """Whether the node is a size, not a tensor."""
    return _name_of(node) in ("size", "stride") or (node.target is getattr and node.args[1] == "shape")
