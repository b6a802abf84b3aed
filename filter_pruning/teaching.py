"""What a small network learns from: labels, a teacher's logits, and a teacher's feature maps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from distill.objective import DistillationObjective, build_objective
from distill.registry import DISTILLERS, default_alpha
from models.graph import ChannelGraph
from models.graph.features import with_outputs
from models.graph.function import GraphFunction, scopes_of
from models.narrow import NarrowNetwork
from models.outputs import Outputs
from utils.errors import UserError, shown


def distil(
    small: nn.Module,
    teacher: nn.Module,
    losses: str | Sequence[str],
    *,
    example: Tensor,
    layers: Sequence[str] | Mapping[str, str] | None = None,
    alpha: float | None = None,
    betas: Sequence[float] | None = None,
    ce_weight: float = 1.0,
    label_smoothing: float = 0.0,
    teacher_input: Callable[[Tensor], Tensor] | None = None,
    n_epochs: int = 1,
    seed: int = 0,
    **options: Any,
) -> DistillationObjective:
    """An objective to minimise: `loss, logits, terms = objective(images, labels)`, for networks that classify images.

    `losses` names one or several of `DISTILLERS`, such as "hap" or ["kd", "at"]; the loss is `ce_weight * CE + alpha * KD +
    sum of beta_i * L_i` with each paper's weights where none are given. "kd" and other losses of logits need no feature maps.
    For the others maps are found in the networks, or are those of the modules `layers`, by name: a list where they are called
    alike in both, a mapping from names in `small` to names in `teacher` where not. `teacher_input` makes the teacher's images
    of the small network's, where the two were trained with other means and deviations.

    `objective.parameters()` are the small network's and those of losses that have some: give them to the optimizer. Call
    `objective.begin_step(epoch, step, steps=...)` before each step if weights rise. The teacher is copied, and `example` is a
    batch of images on the device of both. Raises PruningError where a loss cannot compare the two.
    """
    names = [losses] if isinstance(losses, str) else list(losses)
    unknown = [name for name in names if name not in DISTILLERS]
    if unknown or not names:
        raise UserError(f"losses {shown(unknown or names)}: choose from {', '.join(DISTILLERS)}")
    if layers is not None:
        pairs = layers if isinstance(layers, Mapping) else {name: name for name in layers}
        small, teacher = _ByName(small, list(pairs), example), _ByName(teacher, list(pairs.values()), example)
    teacher = _with_maps(teacher)
    return build_objective(
        _with_maps(small),
        _Prepared(teacher, teacher_input) if teacher_input is not None else teacher,
        names,
        images=example,
        alpha=default_alpha(names) if alpha is None else alpha,
        betas=betas,
        options=options,
        n_epochs=n_epochs,
        label_smoothing=label_smoothing,
        ce_weight=ce_weight,
        seed=seed,
    )


def _with_maps(network: nn.Module) -> nn.Module:
    """The network, or a module around it, with `outputs(x)`; the network's class stays what it is."""
    lacks = not network.has_outputs if isinstance(network, NarrowNetwork) else not hasattr(network, "outputs")
    return with_outputs(_Same(network)) if lacks else network


class _Same(nn.Module):
    """What a network does, in a class of our own."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        return self.network(images)


class _Prepared(nn.Module):
    """A network whose images are made of others."""

    def __init__(self, network: nn.Module, prepare: Callable[[Tensor], Tensor]):
        super().__init__()
        self.network, self.prepare = network, prepare

    def forward(self, images: Tensor) -> Any:
        return self.network(self.prepare(images))

    def outputs(self, images: Tensor) -> Outputs:
        return self.network.outputs(self.prepare(images))


class _ByName(nn.Module):
    """A network whose feature maps (B, C, H, W) are the results of named modules."""

    def __init__(self, network: nn.Module, names: Sequence[str], example: Tensor):
        super().__init__()
        self.network, self.names = network, tuple(names)
        trace = ChannelGraph(network, example).trace().checked(network)
        if not trace.both_modes:
            raise UserError(f"layers: {type(network).__name__} {trace.why_evaluation_only}: maps by name are not known there")
        self._function = _maps_function(trace.graph, network, names)

    def forward(self, images: Tensor) -> Any:
        return self.network(images)

    def outputs(self, images: Tensor) -> Outputs:
        mode = (self.network.training,) if isinstance(self.network, NarrowNetwork) else ()  # which its graph is given
        result, maps = self._function(self.network, *mode, images)
        return Outputs(result, maps, maps, maps[-1].flatten(2).mean(2))


def _maps_function(traced: fx.Graph, network: nn.Module, names: Sequence[str]) -> GraphFunction:
    """The result of the network, and the maps that the named modules give, as one function of it and its images."""
    graph, copies = fx.Graph(), {}
    graph.graph_copy(traced, copies)
    result = next(node for node in traced.nodes if node.op == "output").args[0]
    graph.output((copies[result], tuple(copies[_result_of(traced, network, name)] for name in names)))
    return GraphFunction(graph)


def _result_of(traced: fx.Graph, network: nn.Module, name: str) -> fx.Node:
    """The one node within the module that others read."""
    within = {node for node in traced.nodes if any(f"{call}.".startswith(f"{name}.") for call, _ in scopes_of(node))}
    read = [node for node in traced.nodes if node in within and any(user not in within for user in node.users)]
    if len(read) != 1:
        said = "runs nothing" if not within else f"has {len(read)} results that others read"
        raise UserError(f"layers {shown(name)}: of {type(network).__name__}, it {said}; name a module that gives one map")
    return read[0]
