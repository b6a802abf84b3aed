"""Feature maps of any network: where its graph has them, and `outputs(x)` for a network that was written without.

Three rules find, in the graph of `forward`, what a network of this repository says of itself:

- A block ends in a residual sum, with the activation that alone reads it. Where no two maps are added, every activation
  behind a convolution is one.
- A stage is a resolution at which blocks end, and its map the last that all later ones come from: the maps within the
  branches of a block are none, nor is the stem or what a global pooling leaves.
- The embedding is what the last linear layer, or the convolution in its place, reads; of a map its mean.

Tokens (B, N, C) and maps with channels last are maps like others, and handed out as (B, C, H, W); a class token, or what
else comes before the grid, is left out.
"""

import copy
import copyreg
import math
import operator
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.ops import StochasticDepth

from models.graph.channel_graph import ChannelGraph
from models.graph.function import GraphFunction
from models.outputs import Outputs
from utils.errors import UserError

CHANNELS_LAST, CHANNELS_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
MEANS = (torch.mean, "mean")
PERMUTATIONS = (torch.permute, "permute")
POOLED_TO_ONE = (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
NORM_FUNCTIONS = (F.batch_norm, F.group_norm, F.layer_norm, F.local_response_norm)
PASSING = (nn.Identity, nn.Dropout, nn.Dropout2d, StochasticDepth)
NO_ACTIVATIONS = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax)
ACTIVATION_NAMES = frozenset(
    [
        "relu",
        "relu_",
        "relu6",
        "leaky_relu",
        "prelu",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "hardswish",
        "hardtanh",
        "softplus",
        "sigmoid",
        "hardsigmoid",
        "tanh",
    ]
)
IMAGE_SIDES = (224, 32, 256, 64)  # what is tried where the size of the images is not known yet


# ---- outputs(x) --------------------------------------------------------------------------------------------------------


def with_outputs(network: nn.Module) -> nn.Module:
    """`network` itself, with a method `outputs(x) -> Outputs` if its class has none; state dict, repr and pickling stay.

    The maps are looked for when images of a size first come, and found by name: a copy of the network, one whose batch
    norms are folded, and a compiled one use the same. `outputs` raises UserError where there are none to be found. A network
    that has something else of that name keeps it: it cannot be distilled, everything else can be done with it.
    """
    if hasattr(network, "outputs"):
        return network
    network.__class__ = _class_with_outputs(type(network))
    network._functions = _Functions()
    return network


class FoundOutputs:
    """The method that `with_outputs` gives a network."""

    def outputs(self, x: Tensor) -> Outputs:
        """Logits and feature maps of images (B, 3, H, W)."""
        return self._functions.for_images(self, x)(self, x)

    def find_maps_in(self, graph: ChannelGraph) -> None:
        """Looks for the maps in a graph of the network that is there already, for images like its example."""
        if graph.images is not None:
            self._functions.find_in(graph)

    def finds_feature_maps(self, images: Tensor | None) -> bool:
        """Whether `outputs` finds any in images like these; without them like the last, or of a usual size before the first."""
        try:
            self._functions.of(self) if images is None else self._functions.expect(self, images)
        except UserError:
            return False
        return True

    def __reduce_ex__(self, protocol: int) -> Any:
        """As that of the network's own class, which others can import."""
        rebuild, arguments, *state = super().__reduce_ex__(protocol)
        if rebuild is copyreg.__newobj__:
            rebuild, arguments = _new_with_outputs, (type(self)._network_class, *arguments[1:])
        return rebuild, arguments, *state


@cache
def _class_with_outputs(network_class: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": network_class.__module__, "__qualname__": network_class.__qualname__, "__doc__": network_class.__doc__}
    return type(network_class.__name__, (FoundOutputs, network_class), {**names, "_network_class": network_class})


def _new_with_outputs(network_class: type[nn.Module], *arguments: Any) -> nn.Module:
    network_class = _class_with_outputs(network_class)
    return network_class.__new__(network_class, *arguments)


class _Functions:
    """What `outputs` runs, by image size. It holds no tensor, so copies of a network share it; pickled, it is empty."""

    def __init__(self) -> None:
        self._by_size: dict[tuple[int, ...], Callable[..., Outputs]] = {}
        self._without: dict[tuple[int, ...], tuple[Any, ...]] = {}  # why there are none

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Functions":
        return self

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Functions, ()

    def for_images(self, network: nn.Module, x: Any) -> Callable[..., Outputs]:
        """The function for images like `x`; for the proxy of a tracer the last one, or that of `expect`."""
        if not isinstance(x, Tensor):
            return self.of(network)
        size = tuple(x.shape[1:])
        if size not in self._by_size:
            self.find_in(_graph_of(network, x))
        if size in self._without:
            raise UserError(*self._without[size])
        return self._by_size[size]

    @torch.compiler.disable
    def find_in(self, graph: ChannelGraph) -> None:
        """Makes the function for images like the graph's, or notes why there is none."""
        size = tuple(graph.images.shape[1:])
        if size not in self._by_size and size not in self._without:
            try:
                self._by_size[size] = _outputs_function(graph, graph.images)
            except UserError as error:
                self._without[size] = error.args

    def expect(self, network: nn.Module, images: Tensor) -> None:
        """Makes the function for such images the one that a tracer's proxy gets."""
        self.for_images(network, images)
        size = tuple(images.shape[1:])
        self._by_size[size] = self._by_size.pop(size)  # the last one

    def of(self, network: nn.Module) -> Callable[..., Outputs]:
        """The function for images of the size that came last, or else of a usual one."""
        if self._by_size:
            return next(reversed(self._by_size.values()))
        device = next(network.parameters(), torch.empty(0)).device
        for size in _usual_sizes(network):
            try:
                return self.for_images(network, torch.zeros(2, *size, device=device))
            except UserError as error:
                failure = error
        raise failure


@torch.compiler.disable
def _graph_of(network: nn.Module, images: Tensor) -> ChannelGraph:
    return ChannelGraph(network, images)


def _usual_sizes(network: nn.Module) -> list[tuple[int, ...]]:
    """(3, H, W) of images to try: those that the network says it is for, as timm's and torchvision's transformers do, first."""
    stated = getattr(network, "pretrained_cfg", None) or {}
    sizes = [tuple(stated["input_size"])] if isinstance(stated, dict) and "input_size" in stated else []
    sides = [side for side in (getattr(network, "image_size", None),) if isinstance(side, int)]
    return sizes + [(3, side, side) for side in (*sides, *IMAGE_SIDES)]


def _outputs_function(graph: ChannelGraph, images: Tensor) -> Callable[..., Outputs]:
    """A function of the network and images; raises UserError where the graph has no feature maps, or there is none."""
    network = graph.network
    trace = graph.trace().checked(network)
    evaluating, features = _function_of(trace.graph, network, images)
    if trace.both_modes:
        return evaluating
    if trace.training is None:
        return _by_mode(evaluating, _refusing(trace.why_evaluation_only))
    try:
        training, others = _function_of(trace.training, network, images, in_training=True)
    except UserError as error:
        return _by_mode(evaluating, _refusing(f"runs other operations in training ({error})"))
    counts = [(len(each.stages), len(each.blocks)) for each in (features, others)]
    if counts[0] != counts[1]:
        return _by_mode(evaluating, _refusing(f"{trace.why_evaluation_only}, and gives other maps there"))
    return _by_mode(evaluating, training)


def _function_of(
    traced: fx.Graph, network: nn.Module, images: Tensor, *, in_training: bool = False
) -> tuple[GraphFunction, "Features"]:
    """The graph of a forward pass as a function that gives `Outputs`, and where its maps are."""
    features = find_features(traced, network, images, in_training=in_training)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(traced, copies)
    stages, blocks = (
        [_as_map(graph, copies[node], features.maps[node]) for node in nodes] for nodes in (features.stages, features.blocks)
    )
    embedding = copies[features.embedding]
    if features.embedding in features.maps:
        embedding = graph.call_method("mean", (_as_map(graph, embedding, features.maps[features.embedding]), (2, 3)))
    graph.output(Outputs(copies[features.logits], tuple(stages), tuple(blocks), embedding))
    return GraphFunction(graph), features


def _by_mode(evaluating: Callable[..., Outputs], training: Callable[..., Outputs]) -> Callable[..., Outputs]:
    return lambda network, x: training(network, x) if network.training else evaluating(network, x)


def _refusing(why: str) -> Callable[..., Outputs]:
    def outputs(network: nn.Module, x: Tensor) -> Outputs:
        raise UserError(f"{type(network).__name__} {why}: its feature maps there are not known")

    return outputs


def _as_map(graph: fx.Graph, node: fx.Node, kind: "Map") -> fx.Node:
    """(B, C, H, W) of a map in any layout."""
    if kind.layout == "last":
        return graph.call_method("permute", (node, *CHANNELS_FIRST))
    if kind.layout == "tokens":
        if kind.before:
            node = graph.call_function(operator.getitem, (node, (slice(None), slice(kind.before, None))))
        return graph.call_method("unflatten", (graph.call_method("transpose", (node, 1, 2)), 2, kind.size))
    return node


def maps_of_convolutions(graph: ChannelGraph, names: Iterable[str]) -> Callable[..., tuple[Tensor, ...]]:
    """A function of the network and images (B, 3, H, W) that gives the maps of the convolutions `names`, (B, F, H, W) each.

    A map is taken behind what alone reads the convolution: its batch norm, a sum with other maps, and the activation at the
    end of both; where no activation follows, behind the batch norm. Raises UserError where the graph calls one of the
    convolutions never or more than once.
    """
    network, trace = graph.network, graph.trace().checked(graph.network)
    calls: dict[str, list[fx.Node]] = {}
    for node in trace.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(node.target, []).append(node)
    ends = []
    for name in names:
        if len(calls.get(name, ())) != 1:
            raise UserError(f"{name}: has no feature maps of its own, it is called {len(calls.get(name, ()))} times")
        ends.append(_end_of_convolution(calls[name][0], network))
    written = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    written.graph_copy(trace.graph, copies)
    written.output(tuple(copies[node] for node in ends))
    for node in reversed(list(written.nodes)):  # what comes behind the last map
        if not node.users and node.op not in ("output", "placeholder"):
            written.erase_node(node)
    return GraphFunction(written)


def _end_of_convolution(node: fx.Node, network: nn.Module) -> fx.Node:
    """The activation behind a convolution, or else the last norm before it branches."""
    end = node
    while len(node.users) == 1:
        node = next(iter(node.users))
        if _is_activation(node, network) or _with_activation(node, network):
            return node
        is_norm = isinstance(_module(node, network), NORMS) or _calls(node, NORM_FUNCTIONS)
        if is_norm:
            end = node
        elif not _calls(node, SUMS) and not isinstance(_module(node, network), PASSING):
            break
    return end


# ---- finding them ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Map:
    """How a node holds a map: `layout` is "first", "last" or "tokens" for where its channels are, `size` height and width.

    `before` counts the tokens in front of the grid.
    """

    layout: str
    size: tuple[int, int]
    before: int = 0

    @property
    def tokens(self) -> int | None:
        """How many tokens there are, those before the grid included; None for a map of four axes."""
        return self.before + math.prod(self.size) if self.layout == "tokens" else None


@dataclass(frozen=True)
class Features:
    """The nodes of a graph that `Outputs` names, and how those of `stages`, `blocks` and `embedding` that are maps hold them."""

    logits: fx.Node
    stages: list[fx.Node]
    blocks: list[fx.Node]
    embedding: fx.Node
    maps: dict[fx.Node, Map]


def find_features(graph: fx.Graph, network: nn.Module, images: Tensor, *, in_training: bool = False) -> Features:
    """Where `graph`, that of `network`'s forward, has feature maps of images like `images` (B, 3, H, W).

    A graph `in_training` may give more than logits, behind them.
    Raises UserError where its result is no tensor, nothing linear comes before it, or no map has two dimensions.
    """
    name = type(network).__name__
    logits = next(node for node in graph.nodes if node.op == "output").args[0]
    if in_training and isinstance(logits, tuple | list) and logits:  # with those of auxiliary heads behind
        logits = logits[0]
    if not isinstance(logits, fx.Node):
        raise UserError(f"{name} has no feature maps: it returns {type(logits).__name__}, not one tensor of logits")
    shapes = _shapes(graph, network, images)
    nodes = _between(graph, logits, shapes)
    maps = _find_maps(nodes, network, shapes)
    trunk = _trunk(nodes)
    classifier = _find_classifier(logits, network)
    head = next((node for node in trunk if node is classifier or _pools_all(node, network)), classifier)
    behind = set(nodes[nodes.index(head) :])
    maps_before = {node: kind for node, kind in maps.items() if node not in behind}
    blocks = _find_blocks(nodes, maps_before, network)
    stages = _find_stages([node for node in trunk if node in maps_before], blocks, maps_before)
    if not stages:
        raise UserError(
            f"{name} has no feature maps: nothing between images and logits is a map (B, C, H, W) or a grid of tokens"
        )
    return Features(logits, stages, blocks, classifier.all_input_nodes[0], maps)


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the shape of every tensor in it."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.shapes: dict[fx.Node, tuple[int, ...] | None] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        elif isinstance(result, list | tuple) and any(isinstance(part, Tensor) for part in result):
            self.shapes[n] = None  # a tensor in several pieces
        return result


def _shapes(graph: fx.Graph, network: nn.Module, images: Tensor) -> dict[fx.Node, tuple[int, ...] | None]:
    """The shapes of the nodes that are tensors, for two images in evaluation; `network` is left alone."""
    tensors = [*network.parameters(), *network.buffers()]
    replica = copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
    recorder = _Recorder(fx.GraphModule(replica, graph).eval())
    images = images.detach()[:2]
    try:
        with torch.no_grad():
            recorder.run(images)
    except Exception as error:  # the network's own operations may raise anything on a size that they cannot take
        size = "x".join(map(str, reversed(images.shape[2:])))
        reason = str(error).partition("\n")[0]
        raise UserError(f"{type(network).__name__} cannot take images of {size} ({reason})") from error
    return recorder.shapes


def _between(graph: fx.Graph, logits: fx.Node, shapes: dict[fx.Node, Any]) -> list[fx.Node]:
    """The tensors that come from the images and lead to the logits, in order."""
    from_images: set[fx.Node] = set()
    for node in graph.nodes:
        is_input = node.op == "placeholder"
        if node in shapes and (is_input or any(source in from_images for source in node.all_input_nodes)):
            from_images.add(node)
    leading, pending = {logits}, [logits]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source in from_images and source not in leading:
                leading.add(source)
                pending.append(source)
    return [node for node in graph.nodes if node in leading and node in from_images]


def _trunk(nodes: list[fx.Node]) -> list[fx.Node]:
    """The nodes that every path from the images to the logits goes through: those that no edge jumps over."""
    position = {node: place for place, node in enumerate(nodes)}
    trunk, reach = [], 0
    for place, node in enumerate(nodes):
        if reach <= place:
            trunk.append(node)
        reach = max([reach, *(position[user] for user in node.users if user in position)])
    return trunk


# ---- what a node is ----------------------------------------------------------------------------------------------------


def _module(node: fx.Node, network: nn.Module) -> nn.Module | None:
    return network.get_submodule(node.target) if node.op == "call_module" else None


def _calls(node: fx.Node, targets: Iterable[Any]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def _is_activation(node: fx.Node, network: nn.Module) -> bool:
    module = _module(node, network)
    if module is None:
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        return node.op in ("call_function", "call_method") and name in ACTIVATION_NAMES
    defined_in = type(module).__module__
    return (defined_in == "torch.nn.modules.activation" or "activations" in defined_in) and not isinstance(module, NO_ACTIVATIONS)


def _is_convolution(node: fx.Node, network: nn.Module) -> bool:
    return isinstance(_module(node, network), nn.modules.conv._ConvNd) or _calls(node, (F.conv2d, torch.conv2d))


def _is_linear(node: fx.Node, network: nn.Module) -> bool:
    return isinstance(_module(node, network), nn.Linear) or _calls(node, (F.linear,)) or _is_convolution(node, network)


def _with_activation(node: fx.Node, network: nn.Module) -> bool:
    """Whether a layer, such as timm's batch norms, has its activation inside."""
    module = _module(node, network)
    return isinstance(module, NORMS) and not isinstance(getattr(module, "act", None), nn.Identity | None)


def _pools_all(node: fx.Node, network: nn.Module) -> bool:
    """Whether a node brings a whole map down to one number a channel."""
    module = _module(node, network)
    if isinstance(module, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
        return module.output_size in (1, (1, 1))
    if _calls(node, POOLED_TO_ONE):
        size = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
        return size in (1, (1, 1), [1, 1])
    if not _calls(node, MEANS):
        return False
    dims = node.args[1:] if len(node.args) > 1 else (node.kwargs.get("dim"),)
    dims = dims[0] if len(dims) == 1 and isinstance(dims[0], list | tuple) else dims
    return len(dims) >= 2 or dims == (1,)  # of a map, or of tokens


# ---- maps --------------------------------------------------------------------------------------------------------------


def _find_maps(nodes: list[fx.Node], network: nn.Module, shapes: dict[fx.Node, Any]) -> dict[fx.Node, Map]:
    maps: dict[fx.Node, Map] = {}
    grids: list[tuple[tuple[int, int], int]] = []  # size and channels of the maps so far, which tokens keep, the newest first
    for node in nodes:
        shape = shapes[node]
        kind = None
        if shape is not None and len(shape) == 4:
            kind = _four_axes(node, shape, maps, network)
        elif shape is not None and len(shape) == 3:
            sources = [maps[source] for source in node.all_input_nodes if source in maps]
            kind = next((own for own in sources if own.tokens == shape[1]), None) or _tokens(shape, grids)
        if kind is not None:
            maps[node] = kind
            grid = kind.size, shape[1] if kind.layout == "first" else shape[-1]
            grids = [grid, *(other for other in grids if other != grid)]
    return maps


def _four_axes(node: fx.Node, shape: tuple[int, ...], maps: dict[fx.Node, Map], network: nn.Module) -> Map | None:
    sources = [maps[source] for source in node.all_input_nodes if source in maps]
    known = [source.layout for source in sources if source.layout != "tokens"]
    layout = known[0] if known else "first" if node.op == "placeholder" else None
    if _is_convolution(node, network):
        layout = "first"
    elif _calls(node, PERMUTATIONS):
        dims = node.args[1:]
        dims = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], list | tuple) else dims
        layout = {("first", CHANNELS_LAST): "last", ("last", CHANNELS_FIRST): "first"}.get((layout, dims))
    elif layout is None:  # tokens become a map again, or are shared out among heads
        pixels = [math.prod(source.size) for source in sources]
        layout = "first" if shape[2] * shape[3] in pixels else "last" if shape[1] * shape[2] in pixels else None
    return Map(layout, shape[2:] if layout == "first" else shape[1:3]) if layout else None


def _tokens(shape: tuple[int, ...], grids: list[tuple[tuple[int, int], int]]) -> Map | None:
    """Tokens (B, N, C) of a grid that a map had, or else of a square one; what is more of them comes before the grid.

    A map whose pixels are on one axis, (B, C, H * W), is none yet.
    """
    count, width = shape[1:]
    sizes = {size: math.prod(size) for size, _ in grids}
    if any((channels, sizes[size]) == (count, width) for size, channels in grids):
        return None
    whole = [Map("tokens", size) for size, pixels in sizes.items() if pixels == count]
    newest = next(iter(sizes.items()), None)
    if not whole and newest is not None and 0 < count - newest[1] < newest[1]:
        return Map("tokens", newest[0], count - newest[1])
    side = math.isqrt(count)
    square = [Map("tokens", (side, side))] if not sizes and side > 1 and side * side == count else []
    return next(iter(whole + square), None)


def _find_blocks(nodes: list[fx.Node], maps: dict[fx.Node, Map], network: nn.Module) -> list[fx.Node]:
    sums = [node for node in nodes if _is_residual_sum(node, maps) and not _is_part_of_sum(node, maps)]
    within = _within_blocks(nodes, maps)
    return (
        [_behind_activation(node, maps, network) for node in sums if node not in within]
        or [node for node in nodes if node in maps and _is_activation_of_conv(node, network)]
        or [node for node in nodes if node in maps and _is_convolution(node, network)]
    )


def _within_blocks(nodes: list[fx.Node], maps: dict[fx.Node, Map]) -> set[fx.Node]:
    """The sums in the branch of a residual block, such as Res2Net's: those on one side only of another sum."""
    sums = {node for node in nodes if _is_residual_sum(node, maps)}
    forks = _forks(nodes)
    within: set[fx.Node] = set()
    for total in sums:
        sides = [_on_the_way(operand, forks[total], nodes=forks.keys()) & sums for operand in total.all_input_nodes]
        if not all(sides):
            within |= set().union(*sides)
    return within


def _forks(nodes: list[fx.Node]) -> dict[fx.Node, fx.Node | None]:
    """For each node the last one before it that every path from the images to it goes through: its immediate dominator.

    Cooper, Harvey, Kennedy, "A Simple, Fast Dominance Algorithm", 2001; without loops one pass does.
    """
    position = {node: place for place, node in enumerate(nodes)}
    forks: dict[fx.Node, fx.Node | None] = {}
    for node in nodes:
        sources = [source for source in node.all_input_nodes if source in position]
        fork = sources[0] if sources else None
        for other in sources[1:]:
            while fork is not other and fork is not None and other is not None:
                if position[fork] > position[other]:
                    fork = forks[fork]
                else:
                    other = forks[other]
            fork = fork if fork is other else None
        forks[node] = fork
    return forks


def _on_the_way(end: fx.Node, start: fx.Node | None, *, nodes: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes of every path from `start` to `end`, without `start`."""
    found, pending = set(), [end]
    while pending:
        node = pending.pop()
        if node is not start and node in nodes and node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _is_residual_sum(node: fx.Node, maps: dict[fx.Node, Map]) -> bool:
    operands = [operand for operand in node.args if isinstance(operand, fx.Node)]
    return _calls(node, SUMS) and node in maps and len(operands) == 2 and all(own in maps for own in operands)


def _is_part_of_sum(node: fx.Node, maps: dict[fx.Node, Map]) -> bool:
    """Whether a sum is only added to another one, so that the two are one sum of three."""
    users = list(node.users)
    return len(users) == 1 and _is_residual_sum(users[0], maps)


def _behind_activation(node: fx.Node, maps: dict[fx.Node, Map], network: nn.Module) -> fx.Node:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0] in maps and _is_activation(users[0], network) else node


def _is_activation_of_conv(node: fx.Node, network: nn.Module) -> bool:
    if not (_is_activation(node, network) or _with_activation(node, network)):
        return False
    source = node
    while len(source.all_input_nodes) >= 1:
        source = source.all_input_nodes[0]
        if _is_convolution(source, network):
            return True
        if not isinstance(_module(source, network), (*NORMS, nn.Identity)) and not _calls(source, NORM_FUNCTIONS):
            return False
    return False


def _find_stages(trunk_maps: list[fx.Node], blocks: list[fx.Node], maps: dict[fx.Node, Map]) -> list[fx.Node]:
    last = {maps[node].size: node for node in trunk_maps}  # by resolution, the last one counts
    with_blocks = {maps[node].size for node in blocks}
    return [node for size, node in last.items() if size in with_blocks]


def _find_classifier(logits: fx.Node, network: nn.Module) -> fx.Node:
    """The linear layer, or convolution, that is nearest to the logits."""
    pending, seen = [logits], {logits}
    while pending:
        node = pending.pop(0)
        if _is_linear(node, network):
            return node
        sources = [source for source in node.all_input_nodes if source not in seen]
        pending += sources
        seen.update(sources)
    raise UserError(f"{type(network).__name__} has no embedding: no linear layer leads to its logits")
