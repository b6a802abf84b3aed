"""Runs a graph operation by operation over many batches, so that what an operation reads can be seen, and changed, in between.

A network that is walked through computes each operation once for each batch, however often somebody stops on the way; what is
held are the results that are still to be read, of all batches.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from models.graph.channel_graph import ChannelGraph
from models.graph.concrete import attribute
from models.graph.statistics import is_linear_map
from models.narrow import NarrowNetwork

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]  # of a network: one, several in order, or by name


class Walk:
    """The operations of `graph`, whose layers are those of `owner`, over `batches` of inputs, up to where it was asked to go.

    The first `given` go before the inputs of every batch (the mode, where the graph asks for it).
    """

    def __init__(self, graph: fx.Graph, owner: nn.Module, batches: Sequence[Inputs], *, given: tuple[Any, ...] = ()):
        self.owner, self._nodes, self._next = owner, list(graph.nodes), 0
        self._batches, self._given = batches, given
        self._last_reader = {source: node for node in self._nodes for source in node.all_input_nodes}
        self._results: dict[fx.Node, list[Any]] = {}
        self._places = [node for node in self._nodes if node.op == "placeholder"]

    @torch.no_grad()
    def before(self, node: fx.Node) -> list[Any]:
        """Runs everything that is in front of `node`; gives what that will read first, batch by batch."""
        while self._nodes[self._next] is not node:
            self._step()
        source = node.all_input_nodes[0]
        return self._results[source]

    @torch.no_grad()
    def after(self, node: fx.Node) -> list[Any]:
        """Runs everything up to `node`, and gives its results, batch by batch."""
        self.before(node)
        self._step()
        return self._results[node]

    def _step(self) -> None:
        node = self._nodes[self._next]
        self._next += 1
        results = []
        for place, batch in enumerate(self._batches):
            results.append(self._input(node, batch) if node.op == "placeholder" else self._result(node, place))
            for source in node.all_input_nodes:
                if self._last_reader[source] is node:
                    self._results[source][place] = None
        for source in node.all_input_nodes:
            if self._last_reader[source] is node:
                del self._results[source]
        self._results[node] = results

    def _input(self, node: fx.Node, batch: Inputs) -> Any:
        place = self._places.index(node)
        if place < len(self._given):
            return self._given[place]
        if isinstance(batch, Mapping) and node.target in batch:
            return batch[node.target]
        values = (batch,) if isinstance(batch, Tensor) else () if isinstance(batch, Mapping) else tuple(batch)
        own = place - len(self._given)
        return values[own] if own < len(values) else node.args[0]  # the default of `forward`

    def _result(self, node: fx.Node, place: int) -> Any:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda source: self._results[source][place])
        if node.op == "call_module":
            return self.owner.get_submodule(node.target)(*args, **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return attribute(self.owner, node.target) if node.op == "get_attr" else args[0]


@dataclass(frozen=True)
class Walkable:
    """A network as it is walked through: its graph, the module that has the layers, and the nodes of linear maps, by name."""

    graph: fx.Graph
    owner: nn.Module
    nodes: dict[str, fx.Node]
    given: tuple[bool, ...]  # what the graph asks for before the inputs

    def walk(self, batches: Sequence[Inputs]) -> Walk:
        return Walk(self.graph, self.owner, batches, given=self.given)


def walkable(network: nn.Module, batch: Inputs) -> Walkable:
    """The network with the layers that are called once and own their weight. Raises UserError where torch.fx cannot trace it."""
    if isinstance(network, NarrowNetwork):
        graph, owner, given = network.graph(), network.bare(), (False,)
    else:
        graph, owner, given = ChannelGraph(network, batch).trace().checked(network).graph, network, ()
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(node.target for node in calls)
    owners = Counter(id(owner.get_submodule(name)._parameters.get("weight")) for name in times)
    nodes = {}
    for node in calls:
        layer = owner.get_submodule(node.target)
        if times[node.target] == 1 and is_linear_map(layer) and owners[id(layer.weight)] == 1:
            nodes[node.target] = node
    return Walkable(graph, owner, nodes, given)
