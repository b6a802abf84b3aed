"""A torch.fx tracer whose proxies know what they stand for, so that a network's Python may ask for sizes.

Conditions, loops, `len`, unpacking and arithmetic on shapes are answered for one example. The answer is worked out when it is
asked for, on tensors without data: a network that asks nothing costs nothing more, and stays valid for every size. What
the Python was told is remembered, so that it can be said whether the graph depends on the size of the images or the batch.
"""

import copy
import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_aggregate
from torchvision.models.shufflenetv2 import channel_shuffle

from models.graph.call import has_rule
from models.graph.hidden import Hidden, Watch
from models.graph.out_of_place import InPlaceOperators

# Functions that make tensors from sizes, which torch does not show to a tracer.
FACTORIES = ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros")
_SILENT_FOLDERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


class NoValue(Exception):
    """The example does not go through the network."""


class Values:
    """What the nodes of a graph of `network` stand for when `inputs` are given: tensors without data, sizes, flags."""

    def __init__(self, network: nn.Module, inputs: Sequence[Tensor], running: Callable[[], Any]):
        self._network, self._running = network, running
        _start_autograd()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._inputs = iter([self._mode.from_tensor(each) if isinstance(each, Tensor) else each for each in inputs])
        self._known: dict[fx.Node, Any] = {}

    def of(self, node: fx.Node) -> Any:
        pending, needed = [node], {}
        while pending:
            current = pending.pop()
            if current not in self._known and current not in needed:
                needed[current] = None
                pending += current.all_input_nodes
        if node not in self._known:
            for each in [other for other in node.graph.nodes if other in needed]:
                self._known[each] = self._value(each)
        return self._known[node]

    @functools.cached_property
    def _root(self) -> nn.Module:
        return replica(self._network, self._mode.from_tensor)

    def _value(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self._known.__getitem__)
        try:
            with self._running(), self._mode, torch.no_grad(), _quiet():
                match node.op:
                    case "placeholder":
                        return next(self._inputs)
                    case "get_attr":
                        return attribute(self._root, node.target)
                    case "call_module":
                        return self._root.get_submodule(node.target).forward(*args, **kwargs)
                    case "call_method":
                        return getattr(args[0], node.target)(*args[1:], **kwargs)
                    case _:
                        return node.target(*args, **kwargs)
        except Exception as error:  # whatever the network's own code raises
            raise NoValue(f"`{node.format_node()}`: {str(error).strip().splitlines()[0] if str(error) else error!r}") from error


@functools.cache
def _start_autograd() -> None:
    """The first backward pass starts a thread for each device, and tensors without data stand for devices that are not there.

    Were it to come after those, a process would keep idle threads, and what it forks could not train.
    """
    with torch.enable_grad():
        torch.ones(1, requires_grad=True).sum().backward()


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs what goes wrong with tensors without data, at length; here it is an answer."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def replica(model: nn.Module, tensor: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> nn.Module:
    """A network with `tensor` of each tensor of `model`, and attributes of its own that a forward pass may change."""
    tensors = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(own): tensor(own) for own in (*tensors, *model.parameters(), *model.buffers())})


def attribute(model: nn.Module, name: str) -> Any:
    path, _, last = name.rpartition(".")
    return getattr(model.get_submodule(path), last)


class ConcreteProxy(InPlaceOperators, fx.Proxy):
    """A proxy that answers what ordinary Python asks of sizes."""

    def __getattr__(self, name: str) -> "ConcreteAttribute":
        return ConcreteAttribute(self, name)

    def __len__(self) -> int:
        return len(self.tracer.asked_parts(self))

    def __index__(self) -> int:
        return self.tracer.told(self, int)

    def __int__(self) -> int:
        return self.tracer.told(self, int)

    def __float__(self) -> float:
        return self.tracer.told(self, float)

    def __hash__(self) -> int:
        return id(self)

    def __contains__(self, item: Any) -> bool:
        return any(bool(item == own) for own in self)


class ConcreteAttribute(fx.proxy.Attribute, ConcreteProxy):
    """An attribute of a proxy; a method once it is called."""


class Constant:
    """A tensor that the network's forward pass made of nothing that it was given, as an operation without inputs."""

    def __init__(self, value: Tensor, name: str):
        self.value, self.__name__, self.__module__ = value, name, __name__

    def __call__(self) -> Tensor:
        return self.value


class AutogradFunction:
    """`function.apply` as one operation, so that its backward pass stays the network's own."""

    def __init__(self, function: type[torch.autograd.Function]):
        self.function, self.__name__ = function, function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(*args, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.__name__})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AutogradFunction) and other.function is self.function

    def __hash__(self) -> int:
        return hash(self.function)


class ConcreteTracer(fx.Tracer):
    """Traces `method` of `network` for `inputs`. Modules whose type or name is in `opaque` are not looked into.

    An `autograd.Function` is one operation. What the graph does not hold of the network is in `hidden` afterwards.
    """

    proxy_buffer_attributes = True

    def __init__(self, network: nn.Module, method: str, inputs: Sequence[Tensor], opaque: set[Any]):
        super().__init__(autowrap_functions=(channel_shuffle, *_untraceable_of_timm()))
        self.traced_func_name = method
        self.inputs, self.opaque = inputs, opaque
        self.questions: dict[fx.Node, tuple[str, str]] = {}  # what the Python asked, with the module and the line
        self.values = Values(network, inputs, self.running)
        self._evaluating = False
        self._constants = 0
        self._watch: Watch | None = None

    def trace(self, root: nn.Module, concrete_args: None = None) -> fx.Graph:
        """The graph of `root`, which the tracing may change."""
        self._watch = Watch(root, next((each.device.type for each in self.inputs if isinstance(each, Tensor)), "cpu"))
        with self._watch.tracing(), self._factories(), self._autograd_functions():
            return super().trace(root, concrete_args)

    @property
    def hidden(self) -> list[Hidden]:
        return self._watch.hidden if self._watch is not None else []

    @contextmanager
    def running(self) -> Iterator[None]:
        """In here, modules and parameters are themselves, not proxies."""
        before, self._evaluating = self._evaluating, True
        try:
            yield
        finally:
            self._evaluating = before

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        unknown = type(module) in self.opaque or name in self.opaque
        unknown |= isinstance(module, torch.jit.ScriptModule)  # whose weights no operation on tensors names
        return unknown or has_rule(module) or super().is_leaf_module(module, name)

    def call_module(self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._evaluating:
            return forward(*args, **kwargs)
        name = self.path_of_module(module)
        try:
            with nullcontext() if self.is_leaf_module(module, name) else self._watch.inside(name):
                return super().call_module(module, forward, args, kwargs)
        except Exception as error:
            if not hasattr(error, "innermost"):
                error.innermost = (name, module)
            raise

    def getattr(self, name: str, value: Any, parameter_proxies: dict[str, Any]) -> Any:
        return value if self._evaluating else super().getattr(name, value, parameter_proxies)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: None = None) -> tuple[Any, list[Any]]:
        """A placeholder for each input that has no default, and for as many more as the example has."""
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = [own for own in list(inspect.signature(root_fn).parameters.values())[1:] if own.kind in positional]
        required = sum(own.default is own.empty for own in parameters)
        names = [own.name for own in parameters[: max(required, len(self.inputs))]] or ["x"]
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["place"] = self._place()
        if self._watch.has_other_modes() and self._has_gradient(node):
            self._watch.note_operation(node.meta["place"][1])
        return node

    def _has_gradient(self, node: fx.Node) -> bool:
        """Whether the operation gives numbers that could have a gradient; sizes and masks have none."""
        if node.op not in ("call_function", "call_method", "call_module"):
            return False
        try:
            value = self.values.of(node)
        except NoValue:
            return True
        tensors = [part for part in (value if isinstance(value, tuple | list) else (value,)) if isinstance(part, Tensor)]
        return any(tensor.is_floating_point() for tensor in tensors)

    def _place(self) -> tuple[str, str]:
        """The path of the module that is running, and the line of its code."""
        return (next(reversed(self.module_stack.values()))[0] if self.module_stack else "", _line_of_network())

    def proxy(self, node: fx.Node) -> ConcreteProxy:
        return ConcreteProxy(node, self)

    def create_arg(self, value: Any) -> Any:
        if isinstance(value, fx.Proxy):
            return value.node
        if isinstance(value, Tensor) and not self._has_name(value):
            self._constants += 1
            return self.create_node("call_function", Constant(value, f"constant_{self._constants}"), (), {})
        return super().create_arg(value)

    def _has_name(self, value: Tensor) -> bool:
        named = (*self.root.parameters(), *self.root.buffers())
        return value in self.tensor_attrs or any(value is own for own in named)

    def value_of(self, proxy: fx.Proxy) -> Any:
        return self.values.of(proxy.node)

    def told(self, proxy: fx.Proxy, kind: type) -> Any:
        """The value of `proxy` as a plain number or flag, remembered as a question of the network's Python."""
        value = self.value_of(proxy)
        if isinstance(value, Tensor):
            raise fx.proxy.TraceError("its Python branches on the values of a tensor")
        self.questions[proxy.node] = self._place()
        return kind(value)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return self.told(obj, bool)

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        return (obj[index] for index in range(len(self.asked_parts(obj))))

    def asked_parts(self, proxy: fx.Proxy) -> Any:
        """The value of `proxy`, of which the Python learns how many parts it has: of a tensor that is a size, else fixed."""
        value = self.value_of(proxy)
        if isinstance(value, Tensor):
            self.questions[proxy.node] = self._place()
        return value

    def keys(self, obj: fx.Proxy) -> Any:
        return self.value_of(obj).keys()

    @contextmanager
    def _autograd_functions(self) -> Iterator[None]:
        def apply(function: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
            if self._evaluating or not _proxies_in(args, kwargs):
                return before.__get__(None, function)(*args, **kwargs)
            return self.create_proxy("call_function", AutogradFunction(function), args, kwargs)

        before = torch.autograd.Function.__dict__["apply"]
        torch.autograd.Function.apply = classmethod(apply)
        try:
            yield
        finally:
            torch.autograd.Function.apply = before

    @contextmanager
    def _factories(self) -> Iterator[None]:
        originals = {name: getattr(torch, name) for name in FACTORIES}
        try:
            for name, original in originals.items():
                setattr(torch, name, self._recorded(original))
            yield
        finally:
            for name, original in originals.items():
                setattr(torch, name, original)

    def _recorded(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def factory(*args: Any, **kwargs: Any) -> Any:
            is_recorded = _proxies_in(args, kwargs)
            return self.create_proxy("call_function", original, args, kwargs) if is_recorded else original(*args, **kwargs)

        return factory


def _proxies_in(*arguments: Any) -> list[fx.Proxy]:
    proxies: list[fx.Proxy] = []
    map_aggregate(arguments, lambda value: proxies.append(value) if isinstance(value, fx.Proxy) else None)
    return proxies


def _untraceable_of_timm() -> tuple[Callable[..., Any], ...]:
    """The functions that timm says torch.fx should not look into; of the modules on its list most can be looked into here."""
    if "timm" not in sys.modules:  # then no network of timm is there
        return ()
    from timm.models._features_fx import get_notrace_functions

    return tuple(get_notrace_functions())


def _line_of_network() -> str:
    """File and line of the network's code that is running."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_SILENT_FOLDERS):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame is not None else ""
