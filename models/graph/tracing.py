"""A network as a torch.fx graph that is valid in training and in evaluation, without in-place operations."""

import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from models.graph.call import SHAPE
from models.graph.concrete import ConcreteTracer, NoValue, Values, replica
from models.graph.hidden import Hidden
from models.graph.out_of_place import make_out_of_place
from utils.errors import UserError
from utils.modes import preserved_modes
from utils.seed import preserved_random_state

# What is tried where nobody says for which images: what the network says of itself, then these (pixels).
IMAGE_SIDES = (32, 224, 64, 256)
RESHAPING = ("view", "reshape", "squeeze")


@dataclass(frozen=True)
class Trace:
    """The graph of one method of a network.

    `both_modes` is False where training takes another path than evaluation. `image_size` is (height, width) where the
    network's Python read the size of the images, so that the graph is right for this size only, and None otherwise. `refusal`
    is the reason if the network does what the graph does not say: a write into shared memory, a precision of its own, random
    numbers. Where `graph` is not valid in training, `why_evaluation_only` says why, and `training` is the graph that is, if
    there is one; it is what comes behind the name of the network.
    """

    graph: fx.Graph
    both_modes: bool
    image_size: tuple[int, int] | None = None
    refusal: str | None = None
    training: fx.Graph | None = None
    why_evaluation_only: str | None = None

    def checked(self, model: nn.Module) -> "Trace":
        """Itself; raises UserError where the graph does not say all."""
        if self.refusal is not None:
            raise UserError(f"{type(model).__name__}: {self.refusal}")
        return self


def trace_network(model: nn.Module, method: str = "forward", *, example: Tensor | Sequence[Tensor] | None = None) -> Trace:
    """The fx graph of `model.<method>`, valid in training and evaluation if both run the same operations.

    `example` is the input (several: a sequence of them) for which conditions, loops and arithmetic on sizes are answered;
    only its shape, type and device count. A network that asks nothing of the kind needs none; for one that does, some usual
    image sizes are tried without it. Where an answer depended on the image size, the graph refuses images of another.

    A boolean that is `self.training` (as in `F.dropout(x, training=self.training)`) is read when the graph runs. In-place
    operations become ordinary ones. A module that torch.fx cannot look into becomes a single operation, and so does one whose own
    code does what no graph holds (`models.graph.hidden`). `model` and the random streams are left as they were.
    Raises UserError where the network itself cannot be traced, naming the line.
    """
    examples = [(example,) if isinstance(example, Tensor) else tuple(example)] if example is not None else _examples(model)
    failures = []
    for strict in (True, False):  # an image of the wrong size is no reason not to look into a module
        for inputs in examples:
            try:
                return _trace_for(model, method, inputs, strict=strict)
            except (NoValue, UserError) as error:
                failures.append(error)
    raise (
        failures[0]
        if isinstance(failures[0], UserError)
        else UserError(f"{type(model).__name__}: torch.fx cannot trace it: images do not go through it ({failures[0]})")
    )


def _examples(model: nn.Module) -> list[tuple[Tensor]]:
    parameter = next(model.parameters(), torch.empty(0))
    config = getattr(model, "pretrained_cfg", None) or {}
    stated = config.get("input_size") if isinstance(config, dict) else None
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    channels = stated[0] if stated else convs[0].in_channels if convs else 3
    sides = [stated[1:]] if stated else []
    sides += [(model.image_size, model.image_size)] if isinstance(getattr(model, "image_size", None), int) else []
    sides += [(side, side) for side in IMAGE_SIDES]
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    return [(torch.empty(2, channels, *side, dtype=dtype, device=parameter.device),) for side in sides]


def _trace_for(model: nn.Module, method: str, inputs: Sequence[Tensor], *, strict: bool) -> Trace:
    """Raises NoValue if the Python asks for sizes that there are not for these inputs; `strict` makes no module opaque."""
    inputs = [torch.cat([own, own]) if len(own) == 1 else own for own in inputs]  # one image may pass for no batch at all
    kept = _Kept(unreadable=None if strict else set())
    while True:
        before = kept.count()
        evaluation = _trace(model, method, inputs, training=False, kept=kept)
        kept.add_hidden(evaluation, model)
        try:
            training, why = _trace(model, method, inputs, training=True, kept=kept), None
            kept.add_hidden(training, model)
            kept.add_different(evaluation, training, model)
        except (UserError, NoValue) as error:
            training, why = None, f"cannot be traced in training ({error})"
        if kept.count() == before:
            return _joined(model, evaluation, training, why, kept.own_in_training)


@dataclass(frozen=True)
class _Traced:
    """The graph of one mode, the image size if it depends on it, and what it does not hold of the network."""

    graph: fx.Graph
    training: bool
    image_size: tuple[int, int] | None
    hidden: Sequence[Hidden]

    def missing(self) -> Hidden | None:
        """What makes the graph something else than the network, in a forward pass that has to be looked into."""
        return next((own for own in self.hidden if not own.path and (self.training or own.changes_results)), None)


@dataclass
class _Kept:
    """Modules that stay operations: types and names that torch.fx cannot look into (none are made such if it is None), and
    names of those whose own code does what no graph holds, in both modes or in training alone.
    """

    unreadable: set[Any] | None
    own: set[str] = field(default_factory=set)
    own_in_training: dict[str, str] = field(default_factory=dict)  # with what they do

    def count(self) -> int:
        return sum(len(names) for names in (self.unreadable or (), self.own, self.own_in_training))

    def names(self, *, training: bool) -> set[Any]:
        return {*(self.unreadable or ()), *self.own, *(self.own_in_training if training else ())}

    def add_hidden(self, traced: _Traced, model: nn.Module) -> None:
        """Modules that do more than the graph holds. What has no weights, nothing is lost with, stays its own in both modes."""
        for hidden in traced.hidden:
            if hidden.path and traced.training and _has_weights(model, hidden.path):
                self.own_in_training.setdefault(hidden.path, hidden.what)
            elif hidden.path and (traced.training or hidden.changes_results):
                self.own.add(hidden.path)

    def add_different(self, evaluation: _Traced, training: _Traced, model: nn.Module) -> None:
        """Modules without weights whose own operations are others in training: they are told the mode, the graph is not."""
        own, other = (_operations_of_modules(traced.graph) for traced in (evaluation, training))
        different = {path for path in own.keys() | other.keys() if own.get(path) != other.get(path)}
        self.own |= {path for path in different if path and not _has_weights(model, path)}


def _has_weights(model: nn.Module, path: str) -> bool:
    return any(True for _ in model.get_submodule(path).state_dict())


def _operations_of_modules(graph: fx.Graph) -> dict[str, list[str]]:
    """What the forward pass of each module does itself, by its path; flags that differ by the mode are left out."""
    found: dict[str, list[str]] = {}
    for node in graph.nodes:
        arguments = fx.node.map_aggregate((node.args, dict(node.kwargs)), lambda value: None if _is_part(value) else value)
        found.setdefault(_caller(node), []).append(f"{node.op} {node.target} {arguments}")
    return found


def _is_part(value: Any) -> bool:
    return isinstance(value, fx.Node | bool)


def _caller(node: fx.Node) -> str:
    """The path of the module whose forward pass the operation is in."""
    calls = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return next(reversed(calls[:-1] if node.op == "call_module" else calls), "")


def _joined(
    model: nn.Module, evaluation: _Traced, training: _Traced | None, why: str | None, own_in_training: Mapping[str, str]
) -> Trace:
    """One graph for both modes where their operations are the same, or else what is valid in which."""
    missing = training.missing() if training is not None else None
    why = f"{missing.what}, which no graph holds" if missing is not None else why
    both_modes = why is None and _merge_modes(evaluation.graph, training.graph)
    size = next((traced.image_size for traced in (evaluation, training) if traced is not None and traced.image_size), None)
    refusal = _finish(evaluation, model, size)
    if both_modes or why is not None:
        return Trace(evaluation.graph, both_modes, size, refusal, why_evaluation_only=why)
    why = _finish(training, model, size)
    other = training.graph if why is None else None
    differs = [f"has `{path}`, which {what}" for path, what in own_in_training.items()]
    return Trace(evaluation.graph, False, size, refusal, other, why or next(iter(differs), "runs other operations in training"))


def _finish(traced: _Traced, model: nn.Module, size: tuple[int, int] | None) -> str | None:
    """Makes the graph one without in-place operations, for images of one size if need be; gives a reason to refuse it."""
    refusal = make_out_of_place(traced.graph, model)
    _require_image_size(traced.graph, size, type(model).__name__)
    missing = traced.missing()
    return refusal if missing is None else f"it {missing.what}, which no graph holds"


def _trace(model: nn.Module, method: str, inputs: Sequence[Tensor], *, training: bool, kept: _Kept) -> _Traced:
    """The graph in one mode. What cannot be looked into is added to `kept`."""
    unreadable = kept.unreadable
    while True:
        with preserved_modes(model):  # the parameters are the model's own, and `train` may freeze some
            network = replica(model).train(training)
        tracer = ConcreteTracer(network, method, inputs, kept.names(training=training))
        try:
            with preserved_random_state(cuda=inputs[0].is_cuda):
                graph = tracer.trace(replica(network))
                size = _size_that_was_asked(tracer, network, graph, inputs)
                _note_shapes(graph, tracer.values)
            return _Traced(graph, training, size, tracer.hidden)
        except NoValue:
            raise
        except Exception as error:  # tracing runs the network's own Python, which may raise anything on a proxy
            name, module = getattr(error, "innermost", ("", None))
            if unreadable is None or not name or name in unreadable or type(module) in unreadable:
                raise _untraceable(model, method, error) from error
            unreadable.add(name if type(module) in (nn.Sequential, nn.ModuleList) else type(module))


def _note_shapes(graph: fx.Graph, values: Values) -> None:
    """Leaves with each view and squeeze, and with what it reads, the shape that it has for the example."""
    for node in graph.nodes:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if name in RESHAPING and node.op in ("call_function", "call_method"):
            for each in (node, *node.all_input_nodes):
                with suppress(NoValue):
                    value = values.of(each)
                    each.meta |= {SHAPE: tuple(value.shape)} if isinstance(value, Tensor) else {}


def _untraceable(model: nn.Module, method: str, error: Exception) -> UserError:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename]
    frames = [frame for frame in frames if "/models/graph/" not in frame.filename]
    where = f"{frames[-1].name}: {frames[-1].line}` ({frames[-1].filename}:{frames[-1].lineno}" if frames else f"{method}` ("
    reason = str(error).strip().split("\n")[0]
    return UserError(f"{type(model).__name__}: torch.fx cannot trace `{where}: {reason})")


# ---- what the network's Python was told --------------------------------------------------------------------------------


def _size_that_was_asked(
    tracer: ConcreteTracer, network: nn.Module, graph: fx.Graph, inputs: Sequence[Tensor]
) -> tuple[int, int] | None:
    """The image size if an answer that the Python got depends on it. Raises TraceError for one that depends on the batch."""
    sources = {question: _sources_of_answer(tracer, question) for question in tracer.questions}
    if not sources:
        return None
    every = {source for own in sources.values() for source in own}
    of_batch = _changed(tracer, network, every, [torch.cat([own, own[:1]]) for own in inputs])
    for question, (name, line) in tracer.questions.items():
        if not of_batch.isdisjoint(sources[question]):
            error = fx.proxy.TraceError(f"its Python asks for the size of the batch at {line}")
            if name:
                error.innermost = (name, network.get_submodule(name))
            raise error
    images = inputs[0]
    larger = [own.new_empty(*own.shape[:2], *(2 * side for side in own.shape[2:])) for own in inputs]
    depends = images.dim() == 4 and _changed(tracer, network, every, larger)
    _erase_answered(graph, tracer.questions)
    return tuple(images.shape[2:]) if depends else None


def _sources_of_answer(tracer: ConcreteTracer, question: fx.Node) -> set[fx.Node]:
    """The sizes from which the answer was worked out: the first plain values on the way back to tensors."""
    pending, seen, sources = [question], set(), set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        parts = [own for own in node.all_input_nodes if _is_plain(tracer.values.of(own))]
        if parts and not _is_tensor(tracer.values.of(node)):
            pending += parts
        elif node.op != "get_attr":
            sources.add(node)
    return sources


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_plain(value: Any) -> bool:
    """Whether a value is a number or flag, not a tensor or the sizes of one."""
    return isinstance(value, int | float)


def _changed(tracer: ConcreteTracer, network: nn.Module, sources: Iterable[fx.Node], inputs: Sequence[Tensor]) -> set[fx.Node]:
    """Those of the sources that other inputs, or an input that does not go through, would change."""
    values, changed = Values(network, inputs, tracer.running), set()
    for node in sources:
        try:
            if _comparable(values.of(node)) != _comparable(tracer.values.of(node)):
                changed.add(node)
        except NoValue:
            changed.add(node)
    return changed


def _comparable(value: Any) -> Any:
    return len(value) if isinstance(value, Tensor) else value


def _erase_answered(graph: fx.Graph, questions: Iterable[fx.Node]) -> None:
    """Operations on sizes that only the Python read, which has its answers."""
    pending = list(questions)
    while pending:
        node = pending.pop()
        if node.graph is graph and not node.users and node.op in ("call_function", "call_method") and not node._erased:
            sources = node.all_input_nodes
            graph.erase_node(node)
            pending += sources


def _require_image_size(graph: fx.Graph, size: tuple[int, int] | None, name: str) -> None:
    if size is None:
        return
    images = next(node for node in graph.nodes if node.op == "placeholder")
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        graph.call_function(require_image_size, (images, size, name))


def require_image_size(images: Tensor, size: Sequence[int], name: str) -> None:
    """Raises UserError for images (N, C, H, W) of another size than the one that the graph of the network is for."""
    if tuple(images.shape[2:]) != tuple(size):
        found, expected = ("x".join(map(str, own)) for own in (images.shape[2:], size))
        raise UserError(f"{name}: its Python reads the size of the images: this form is for {expected} pixels, not {found}")


# ---- training and evaluation -------------------------------------------------------------------------------------------


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
