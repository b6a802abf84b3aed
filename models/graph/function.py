"""A torch.fx graph as a function that can be copied, pickled and sent to another process.

A module whose forward pass was generated holds code that belongs to no file, which `pickle` cannot name. What is kept here,
and pickled, is the list of operations; the code is written anew from it.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

SCOPES = "scopes"  # in a node's `meta`

Scopes = tuple[tuple[str, str], ...]


def scopes_of(node: fx.Node) -> Scopes:
    """The modules that called the operation, from the outermost to the innermost: the path and the class name of each.

    A path that is called for the second time ends in `@1`. The network itself is not among them, a layer that is called is.
    """
    if SCOPES in node.meta:
        return node.meta[SCOPES]
    return tuple((call, kind.__name__) for call, (_, kind) in (node.meta.get("nn_module_stack") or {}).items())


@dataclass(frozen=True)
class _Result:
    """Stands for what the operation at this place of the list gives."""

    place: int


@dataclass(frozen=True)
class _Named:
    """Stands for a function, as the name under which a module has it."""

    module: str
    name: str

    def find(self) -> Callable[..., Any]:
        return getattr(importlib.import_module(self.module), self.name)


class GraphFunction:
    """`graph` as a function of the module that owns its layers, and of the graph's inputs.

    It holds no tensor and no module, so copies of a network share it. Pickling it needs functions that a module has under
    their name, as every function of torch is; a network that calls others raises the error of `pickle`.
    """

    def __init__(self, graph: fx.Graph):
        self._operations = _operations(graph)
        self._function = _compiled(graph)

    def __call__(self, owner: nn.Module, *inputs: Any) -> Any:
        return self._function(owner, *inputs)

    def graph(self) -> fx.Graph:
        """A copy of the operations; `scopes_of` says of each in which modules it was called."""
        return _graph(self._operations)

    def calls_below(self, name: str) -> int:
        """How many calls of submodules of the module `name` it has."""
        return sum(op == "call_module" and target.startswith(f"{name}.") for op, _, target, *_ in self._operations)

    def __deepcopy__(self, memo: dict[int, Any]) -> "GraphFunction":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (self._operations,)


def _rebuilt(operations: tuple[tuple[Any, ...], ...]) -> GraphFunction:
    return GraphFunction(_graph(operations))


def _operations(graph: fx.Graph) -> tuple[tuple[Any, ...], ...]:
    """(op, name, target, args, kwargs, scopes) of each node, with places in this list for the nodes among the arguments."""
    places = {node: place for place, node in enumerate(graph.nodes)}
    return tuple(
        (
            node.op,
            node.name,
            _named(node.target),
            *fx.map_arg((node.args, dict(node.kwargs)), lambda arg: _Result(places[arg])),
            scopes_of(node),
        )
        for node in graph.nodes
    )


def _named(target: Any) -> Any:
    """The name of a function that is found under it: some of torch's are made by others, and `pickle` would not look there."""
    module, name = getattr(target, "__module__", None), getattr(target, "__name__", None)
    if callable(target) and module and name and getattr(importlib.import_module(module), name, None) is target:
        return _Named(module, name)
    return target


def _graph(operations: tuple[tuple[Any, ...], ...]) -> fx.Graph:
    graph, nodes = fx.Graph(), []

    def given(argument: Any) -> Any:
        return nodes[argument.place] if isinstance(argument, _Result) else argument

    for op, name, target, args, kwargs, scopes in operations:
        found = target.find() if isinstance(target, _Named) else target
        args, kwargs = fx.node.map_aggregate((args, kwargs), given)
        nodes.append(graph.create_node(op, found, args, kwargs, name=name))
        nodes[-1].meta[SCOPES] = scopes
    return graph


def _compiled(graph: fx.Graph) -> Callable[..., Any]:
    """The code of `graph`; fx keeps its lines for tracebacks."""
    owned = dict.fromkeys(node.target for node in graph.nodes if node.op in ("call_module", "get_attr"))
    return type(fx.GraphModule(owned, graph)).forward
