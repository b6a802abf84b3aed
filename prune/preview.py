"""What a pruning would do, for --dry-run."""

import argparse
import copy
from collections.abc import Sequence

from models.network_file import NetworkFile
from prune.choice import FilterChoice
from prune.compact import compact
from prune.record import WHOLE, whole_layers_table
from prune.schedule import HardPruning
from utils.engine import TrainingPlan
from utils.errors import UserError
from utils.plan import print_plan


def print_pruning(
    args: argparse.Namespace, plan: TrainingPlan, student: NetworkFile, choose: FilterChoice, *, lines: Sequence[str]
) -> None:
    """Prints what would be pruned and trained, and `lines`.

    The sizes are exact where the choice needs no pass over images, else those of a choice by L1 norms.
    """
    if choose.is_whole:
        return print_plan(args, plan=plan, data=choose.data, networks={"network": student.network}, lines=[WHOLE])
    kept = choose.without_pass()()
    pruned = copy.deepcopy(student.network)
    HardPruning(pruned, kept)
    said = [f"{layer.name} would keep {len(kept[layer.name])} of {layer.filters}" for layer in choose.layers]
    said += lines
    networks = {"dense": student.network}
    try:
        networks["pruned"] = small = compact(pruned, choose.data.example)
        said += filter(None, [whole_layers_table({name: channels.tolist() for name, channels in kept.items()}, small)])
    except UserError as error:
        said.append(f"no compact network could be written: {error}")
    print_plan(args, plan=plan, data=choose.data, networks=networks, lines=said)
