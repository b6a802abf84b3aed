"""In which form hard pruning trains a network: the large one with zeros, or the small one, once that is proved the same."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from models.copies import copied
from models.graph import ChannelGraph
from models.narrow import Selection
from prune.choice import FilterChoice
from prune.schedule import (
    GradualPhysicalPruning,
    GradualPruning,
    HardPruning,
    Mend,
    PhysicalPruning,
    PruningSchedule,
    SoftPruning,
)
from utils.distributed import any_process
from utils.errors import ParameterError, UserError


def build_schedule(
    graph: ChannelGraph,
    choose: FilterChoice,
    *,
    soft_interval: int | None,
    steps: int = 1,
    last_epoch: int,
    form: str,
    images: Tensor,
    warn: Callable[[str], None],
    is_faster_small: Callable[[Selection], bool] = lambda selection: True,
    on_choice: Callable[[PruningSchedule, int], None] = lambda schedule, step: None,
    mend: Mend | None = None,
    state: Mapping[str, Any] | None = None,
) -> PruningSchedule:
    """What keeps the network of `graph` pruned; hard pruning chooses here, or takes its choice from a resumed run's state.

    `soft_interval` is the number of epochs between soft prunings, None for hard pruning. In several `steps` that goes on over the
    first epochs, and `on_choice(schedule, step)` hears of the later ones. It trains the network in `form`, compact or masked, and
    a resumed run in the one that it began with. With form auto it is the compact one if `is_faster_small(selection)`, and if that
    evaluates and trains as the masked one does on `images`, which is proved before; if not, `warn` is told why, and the masked
    one is trained. `mend(schedule, unpruned)` is called after each choice that is made here, with the network as it was before.
    Raises UserError where form compact does not pass.
    """
    if soft_interval is not None:
        return SoftPruning(graph, choose, interval=soft_interval, last_epoch=last_epoch)
    small, masked = PhysicalPruning, HardPruning
    if steps > 1:

        def choose_at(step: int, selection: Selection | None) -> Selection:
            return choose.at_step(step, steps, selection)()

        gradual = {"choose_at": choose_at, "steps": steps}
        gradual |= {"on_choice": on_choice, "mend": mend}
        small, masked = (_with_steps(kind, gradual) for kind in (GradualPhysicalPruning, GradualPruning))
    if state is not None:
        recorded = Selection(graph, state["resume"]["hooks"]["kept"])
        return (small if _was_trained_small(state) else masked)(graph, recorded)
    unpruned = copied(graph.network) if mend is not None else None
    selection = choose() if steps == 1 else choose.at_step(0, steps, None)()
    schedule = None
    if form == "compact" or (form == "auto" and is_faster_small(selection)):
        schedule = _small_if_proved(small, selection, images, required=form == "compact", warn=warn)
    schedule = schedule or masked(graph, selection)
    if mend is not None:
        mend(schedule, unpruned)
    return schedule


def _small_if_proved(
    small: Callable[..., PhysicalPruning],
    selection: Selection,
    images: Tensor,
    *,
    required: bool,
    warn: Callable[[str], None],
) -> PhysicalPruning | None:
    """Pruning in compact form where every process has proved it right. Raises UserError where it is `required` and is not."""
    schedule, reason = _proved(small, selection, images)
    if not any_process(schedule is None):
        return schedule
    reason = reason or "another process found a difference"
    if required:
        raise ParameterError("form", "compact", f"{reason}; choose masked")
    warn(f"trains the large network with zeros, not the small one: {reason}")
    return None


def _with_steps(kind: type, gradual: Mapping[str, Any]) -> Callable[..., PruningSchedule]:
    return lambda graph, selection: kind(graph, selection=selection, **gradual)


def check_compact_form(selection: Selection, images: Tensor) -> None:
    """Raises UserError if the network, which stays as it is, cannot be trained in its compact form."""
    network = selection.graph.network
    try:
        schedule, reason = _proved(PhysicalPruning, selection.on(copy.deepcopy(network)), images)
    except (RuntimeError, TypeError) as error:
        schedule, reason = None, f"{type(network).__name__} cannot be copied ({str(error).splitlines()[0]})"
    if schedule is None:
        raise ParameterError("form", "compact", f"{reason}; choose masked")


def _proved(
    small: Callable[..., PhysicalPruning], selection: Selection, images: Tensor
) -> tuple[PhysicalPruning | None, str | None]:
    """Pruning in compact form once it is proved right, or why it is not."""
    try:
        schedule = small(selection.graph, selection)
        schedule.prove(images)
    except UserError as error:
        return None, str(error)
    return schedule, None


def _was_trained_small(state: Mapping[str, Any]) -> bool:
    """Whether the saved state is that of the small network itself, whatever device this goes on with."""
    if "compact" in state["resume"]["hooks"]:
        return True
    trained = {name: tensor.shape for name, tensor in state["resume"]["objective"].items()}
    return any(trained.get(f"student.{name}") != tensor.shape for name, tensor in state["state_dict"].items())
