"""A network as a torch.fx graph that is valid in training and in evaluation, without in-place operations."""

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torchvision.models.shufflenetv2 import channel_shuffle
from torchvision.ops import StochasticDepth

from models.batch_norm import UnevenBatchNorm2d
from models.channel_flow.in_place import InPlaceOperators, make_out_of_place
from models.modes import preserved_modes
from utils.errors import UserError


@dataclass(frozen=True)
class Trace:
    """The graph of one method of a network.

    `both_modes` is False where training takes another path than evaluation. `refusal` is the reason if an in-place operation
    does what the graph does not say.
    """

    graph: fx.Graph
    both_modes: bool
    refusal: str | None = None

    def checked(self, model: nn.Module) -> "Trace":
        """Itself; raises UserError where the graph does not say all."""
        if self.refusal is not None:
            raise UserError(f"{type(model).__name__}: {self.refusal}")
        return self


class _Proxy(InPlaceOperators, fx.Proxy):
    pass


class _Tracer(fx.Tracer):
    def __init__(self, method: str):
        super().__init__(autowrap_functions=(channel_shuffle,))
        self.traced_func_name = method

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

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
    return Trace(evaluation, both_modes, refusal=make_out_of_place(evaluation, model))


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


def is_mode(node: fx.Node) -> bool:
    return node.op == "get_attr" and node.target == "training"


def attribute(model: nn.Module, name: str) -> Any:
    path, _, last = name.rpartition(".")
    return getattr(model.get_submodule(path), last)
