"""Layers and operations of a network's graph as lines of Python."""

import inspect
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torchvision.ops import StochasticDepth

from models.batch_norm import UnevenBatchNorm2d
from models.graph.passing import does_nothing_in_evaluation
from models.narrow.reuse import add_over, relu_over
from utils.errors import UserError


class Helper(NamedTuple):
    """A layer of another library, as a class of the module that is written; `arguments` are its attributes."""

    arguments: tuple[str, ...]
    text: str


HELPERS = {
    StochasticDepth: Helper(
        ("p", "mode"),
        '''class StochasticDepth(nn.Module):
    """Leaves out a branch at random in training: of each image, or of the whole batch."""

    def __init__(self, p, mode):
        super().__init__()
        self.p, self.mode = p, mode

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        images = len(x) if self.mode == "row" else 1
        kept = x.new_empty([images] + [1] * (x.dim() - 1)).bernoulli_(1 - self.p)
        return x * (kept / (1 - self.p) if self.p < 1 else kept)''',
    )
}

TIMM_ACTIVATIONS = {
    "Swish": nn.SiLU,
    "Mish": nn.Mish,
    "Sigmoid": nn.Sigmoid,
    "Tanh": nn.Tanh,
    "HardSwish": nn.Hardswish,
    "HardSigmoid": nn.Hardsigmoid,
    "GELU": nn.GELU,
}

Operand = Callable[[fx.Node], str]  # the text of a value

INFIX = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.truediv: "/",
    operator.floordiv: "//",
    operator.mod: "%",
    operator.pow: "**",
    operator.matmul: "@",
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
    operator.and_: "&",
    operator.or_: "|",
}
PREFIX = {operator.neg: "-", operator.invert: "~", operator.not_: "not "}
ALIASES = {relu_over: F.relu, torch.relu: F.relu, add_over: operator.add, torch.add: operator.add}
MODULES = (("F", F), ("torch", torch), ("torch.linalg", torch.linalg), ("math", math))


def acts_in_training_alone(layer: nn.Module) -> bool:
    """Whether the layer is an unknown one that drops paths or the like in training, but does nothing in evaluation."""
    is_known = type(layer) in HELPERS or hasattr(nn, type(layer).__name__)
    return not is_known and not layer.state_dict() and does_nothing_in_evaluation(layer)


def torch_layers(layer: nn.Module) -> list[nn.Module]:
    """Layers of torch.nn that compute one after the other what `layer` does in evaluation; itself where nothing is known of it.

    timm has activations of its own, and batch norms with an activation behind.
    """
    kind = type(layer)
    if acts_in_training_alone(layer):
        return [nn.Identity()]
    if not kind.__module__.startswith("timm."):
        return [layer]
    if kind.__name__ == "BatchNormAct2d":
        norm = nn.BatchNorm2d(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        norm.load_state_dict({key: value for key, value in layer.state_dict().items() if key in norm.state_dict()})
        return [norm, *(own for part in (layer.drop, layer.act) if type(part) is not nn.Identity for own in torch_layers(part))]
    if kind.__name__ == "Linear":
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.load_state_dict(layer.state_dict())
        return [plain]
    if kind.__name__ in TIMM_ACTIVATIONS:
        return [TIMM_ACTIVATIONS[kind.__name__]()]
    return [layer]


def layer_arguments(layer: nn.Module, path: str) -> tuple[str, dict[str, Any]]:
    """`nn.Conv2d` and the like, and its arguments by name: those that it needs, and those that are not the default.

    Raises UserError, naming `path`, for a layer that is not one of torch's, or that does not say what it was made with.
    """
    kind = nn.BatchNorm2d if type(layer) is UnevenBatchNorm2d else type(layer)
    if kind in HELPERS:
        return kind.__name__, {name: getattr(layer, name) for name in HELPERS[kind].arguments}
    if getattr(nn, kind.__name__, None) is not kind:
        raise UserError(f"its layer {path} is a {kind.__name__}, none of torch.nn's, and cannot be written as Python")
    arguments = {}
    for parameter in _parameters(kind):
        if parameter.name in ("device", "dtype", "inplace"):
            continue
        if not hasattr(layer, parameter.name):
            raise UserError(
                f"its layer {path}, a {kind.__name__}, does not say its {parameter.name}: it cannot be written as Python"
            )
        value = getattr(layer, parameter.name)
        if parameter.name == "bias":
            value = isinstance(value, torch.Tensor) or value is True
        value = _plain(value)
        if parameter.default is inspect.Parameter.empty or value != _plain(parameter.default):
            arguments[parameter.name] = value
    if "Pool" in kind.__name__ and arguments.get("stride") == arguments.get("kernel_size"):
        arguments.pop("stride", None)  # which is their default
    return f"nn.{kind.__name__}", arguments


def _parameters(kind: type[nn.Module]) -> list[inspect.Parameter]:
    if kind.__init__ is nn.Module.__init__ or kind is nn.Identity:  # which take anything, and need nothing
        return []
    return list(inspect.signature(kind).parameters.values())


def _plain(value: Any) -> Any:
    """(3, 3) as 3."""
    if isinstance(value, list | tuple) and value and all(part == value[0] for part in value):
        return value[0]
    return value


def required_arguments(kind: str) -> list[str]:
    """The arguments of a layer that need no name: those without a default."""
    parameters = _parameters(getattr(nn, kind.removeprefix("nn.")))
    return [own.name for own in parameters if own.default is inspect.Parameter.empty]


def default_argument(kind: str, name: str) -> Any:
    return inspect.signature(getattr(nn, kind.removeprefix("nn."))).parameters[name].default


def expression(node: fx.Node, operand: Operand) -> str:
    """What a function or method of the graph computes, of values whose texts `operand` gives.

    Raises UserError for a function that is neither torch's nor Python's own.
    """
    if node.op == "call_method":
        return f"{_enclosed(node.args[0], operand)}.{node.target}({_arguments(node.args[1:], node.kwargs, operand)})"
    target = ALIASES.get(node.target, node.target)
    if target in INFIX and len(node.args) == 2 and not node.kwargs:
        left, right = (_enclosed(argument, operand) for argument in node.args)
        return f"{left} {INFIX[target]} {right}"
    if target in PREFIX:
        return f"{PREFIX[target]}{_enclosed(node.args[0], operand)}"
    if target is operator.getitem:
        index = node.args[1]
        parts = index if isinstance(index, tuple) and index else (index,)
        return f"{_enclosed(node.args[0], operand)}[{', '.join(_index(part, operand) for part in parts)}]"
    if target is getattr and len(node.args) == 2:
        return f"{_enclosed(node.args[0], operand)}.{node.args[1]}"
    return f"{_function_name(target)}({_arguments(node.args, node.kwargs, operand)})"


def _function_name(target: Any) -> str:
    name = getattr(target, "__name__", "")
    for prefix, module in MODULES:
        if name and not name.startswith("_") and getattr(module, name, None) is target:
            return f"{prefix}.{name}"
    if target in (int, float, bool, len, max, min, round, sum, abs, tuple, list):
        return name
    shown = f"{getattr(target, '__module__', '')}.{name or target}"
    raise UserError(f"its operation {shown} is none of torch's, and cannot be written as Python")


def _arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any], operand: Operand) -> str:
    named = [f"{name}={literal(value, operand)}" for name, value in kwargs.items() if (name, value) != ("inplace", False)]
    return ", ".join([*(literal(value, operand) for value in args), *named])


def _enclosed(value: Any, operand: Operand) -> str:
    return enclosed(literal(value, operand))


def enclosed(text: str) -> str:
    """In parentheses, where an operator inside would otherwise bind to what stands outside."""
    depth = 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == " " and depth == 0:
            return f"({text})"
    return f"({text})" if text.startswith(("-", "~")) else text


def _index(value: Any, operand: Operand) -> str:
    if isinstance(value, slice):
        start, stop, step = ("" if part is None else literal(part, operand) for part in (value.start, value.stop, value.step))
        return f"{start}:{stop}" + (f":{step}" if step else "")
    return literal(value, operand)


def quoted(text: str) -> str:
    """A text as Python writes it, in double quotes where that needs no backslash more."""
    text = repr(text)
    return f'"{text[1:-1]}"' if text.startswith("'") and '"' not in text else text


def literal(value: Any, operand: Operand | None = None) -> str:
    """The Python text of a value of a graph. Raises UserError for one that has none."""
    if isinstance(value, fx.Node) and operand is not None:
        return operand(value)
    if value is None or isinstance(value, bool | int):
        return repr(value)
    if value is Ellipsis or isinstance(value, str):
        return "..." if value is Ellipsis else quoted(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else f'float("{value}")'
    if isinstance(value, torch.dtype | torch.memory_format):
        return str(value)
    if isinstance(value, slice):
        return f"slice({', '.join(literal(part, operand) for part in (value.start, value.stop, value.step))})"
    if isinstance(value, tuple | list):
        inner = ", ".join(literal(part, operand) for part in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if len(value) == 1 else f"({inner})"
    raise UserError(f"it holds a value that cannot be written as Python, {type(value).__name__}")
