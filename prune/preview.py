"""What a pruning would do, for --dry-run."""

from collections.abc import Callable

from models.graph.cost import Widths
from models.network_file import NetworkFile
from prune.choice import FilterChoice, small_network
from prune.record import WHOLE, whole_layers_table
from utils.errors import UserError
from utils.training.session import Session


def print_pruning(
    session: Session,
    student: NetworkFile,
    choose: FilterChoice,
    *,
    describe: Callable[[Widths], str] | None,
    loss: str,
) -> None:
    """Prints what would be pruned and trained by which loss, and what `describe` says of the widths that are left.

    The sizes are exact where the choice needs no pass over images, else those of a choice by L1 norms.
    """
    trained_by = f"loss: {loss}"
    if choose.is_whole:
        return session.print_plan({"network": student.network}, [WHOLE, trained_by])
    selection = choose.without_pass()()
    said = [f"{layer.name} would keep {len(selection.channels(layer.name))} of {layer.filters}" for layer in choose.layers]
    said += [describe(selection.widths)] if describe is not None else []
    said.append(trained_by)
    networks = {"dense": student.network}
    try:
        networks["pruned"] = small = small_network(selection)
        said += filter(None, [whole_layers_table(selection.kept, small)])
    except UserError as error:
        said.append(f"no compact network could be written: {error}")
    session.print_plan(networks, said)
