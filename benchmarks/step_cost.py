"""What a training step costs: each way to prune with each loss, in units of a plain step of the same network.

    python -m benchmarks.step_cost --model resnet56

The plain step is the dense network's, cross-entropy alone, in the same mode. Criteria (`--prune-mode`) differ in how they
choose, which is not part of a step: a step depends on the form that is trained. `compact` is hard pruning of the small
network itself, `masked` hard pruning by zeros, `soft` is SFP between two prunings, `dense` is not pruned at all.

On CUDA a row also says how much of a step the device is idle, waiting for Python.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.common import add_common_flags, machine, report, synthetic_batch
from distill import DISTILLERS, build_distiller
from distill.objective import DistillationObjective, FrozenTeacher, sample_outputs
from models import MODELS, build_model
from models.graph import ChannelGraph
from models.narrow import Selection
from prune.masks import choose_filters, keep_ratios
from prune.schedule import HardPruning, PhysicalPruning, PruningSchedule, SoftPruning
from utils import cli
from utils.device import choose_device, to_device
from utils.images.batches import Batch
from utils.timing import idle_share, interleaved_seconds, median_ratio
from utils.training.objective import CrossEntropyObjective
from utils.training.pruning import Pruning
from utils.training.step import check_acceleration, prepare_step, sgd, train_step
from utils.world import World

FORMS = ("dense", "compact", "masked", "soft")
MODES = {"float32": (False, False), "amp": (True, False), "compile": (False, True), "compile+amp": (True, True)}  # amp, compiled
PLAIN = ("plain", "none")


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog="step_cost.py", description="Cost of a training step in units of a plain one.")
    parser.add_argument("--model", default="resnet56", choices=MODELS, help="student and teacher")
    parser.add_argument("--batch-size", type=cli.positive_int, default=128, help="images a step")
    parser.add_argument("--prune-rate", type=cli.keep_proportion, default=0.6, help="proportion of filters retained")
    parser.add_argument("--forms", nargs="+", default=["compact"], choices=FORMS, help="how the student is pruned")
    parser.add_argument("--distill", nargs="+", default=["none", *DISTILLERS], choices=("none", *DISTILLERS), help="the losses")
    parser.add_argument("--modes", nargs="+", default=["float32", "amp"], choices=MODES, help="how steps are run")
    add_common_flags(parser, name="step_cost", rounds=9)
    return parser


def main(args: argparse.Namespace) -> None:
    device = checked_device(args)
    batch = synthetic_batch(args.batch_size, device=device)
    rows = [row for mode in args.modes for form in args.forms for row in measure(args, mode=mode, form=form, batch=batch)]
    settings = {"model": args.model, "batch_size": args.batch_size, "prune_rate": args.prune_rate, "rounds": args.rounds}
    report("step_cost", rows, output=args.output, machine=machine(device), **settings)


def checked_device(args: argparse.Namespace) -> torch.device:
    """The device of `--device`. Raises UserError unless it can run steps in all of `--modes`."""
    device = choose_device(args.device, None, World())
    for mode in args.modes:
        amp, compiled = MODES[mode]
        check_acceleration(device=device, amp=amp, compiled=compiled, sync_bn=False)
    return device


def measure(args: argparse.Namespace, *, mode: str, form: str, batch: Batch) -> list[dict[str, Any]]:
    """A row for the plain step and for each loss with one form of the student, taken turn by turn."""
    torch.compiler.reset()  # it gives up on code that it has compiled for too many networks
    torch.manual_seed(0)
    device = batch.images.device
    network = to_device(build_model(args.model, num_classes=10), device)
    steps = {PLAIN: plain_step(copy.deepcopy(network), batch, mode=mode)}
    for loss in args.distill:
        steps[form, loss] = pruned_step(network, batch, form=form, loss=loss, keep_ratio=args.prune_rate, mode=mode)
    seconds = interleaved_seconds(steps, device=device, rounds=args.rounds)
    return [
        _row(mode, *name, taken=seconds[name], plain=seconds[PLAIN], images=args.batch_size)
        | _idle(steps[name], device=device, taken=seconds[name])
        for name in steps
    ]


def _row(mode: str, form: str, loss: str, *, taken: Sequence[float], plain: Sequence[float], images: int) -> dict[str, Any]:
    median = statistics.median(taken)
    cost = median_ratio(taken, plain)
    return {"mode": mode, "form": form, "distill": loss, "ms": 1000 * median, "images/s": images / median, "plain steps": cost}


def _idle(step: Callable[[], None], *, device: torch.device, taken: Sequence[float]) -> dict[str, float]:
    share = idle_share(step, device=device, seconds=statistics.median(taken))
    return {} if share is None else {"device idle": share}


def plain_step(network: nn.Module, batch: Batch, *, mode: str) -> Callable[[], None]:
    return _runnable(CrossEntropyObjective(network), Pruning(), batch, mode=mode)


def pruned_step(network: nn.Module, batch: Batch, *, form: str, loss: str, keep_ratio: float, mode: str) -> Callable[[], None]:
    """A step of a pruned copy of `network` that learns from `network` by `loss`."""
    schedule = build_schedule(copy.deepcopy(network), form, keep_ratio)
    student = schedule.trained_network() if isinstance(schedule, PruningSchedule) else copy.deepcopy(network)
    return distilled_step(student, schedule, network, batch, loss=loss, mode=mode)


def distilled_step(
    student: nn.Module, hooks: Pruning, teacher: nn.Module, batch: Batch, *, loss: str, mode: str
) -> Callable[[], None]:
    """A step of `student`, which `hooks` keep pruned, that learns from `teacher` by `loss`, with KD as `pruning.py` adds it."""
    student = to_device(student, batch.images.device).train()
    return _runnable(distillation_objective(student, teacher, loss, batch.images[:8]), hooks, batch, mode=mode)


def build_schedule(network: nn.Module, form: str, keep_ratio: float) -> Pruning:
    if form == "dense":
        return Pruning()
    graph = ChannelGraph(network)
    layers = graph.prunable_layers()
    selection = Selection(graph, choose_filters(layers, keep_ratios(layers, [keep_ratio]), criterion="filter-gm"))
    if form == "soft":
        return SoftPruning(graph, lambda: selection, interval=1, last_epoch=0)
    return (PhysicalPruning if form == "compact" else HardPruning)(graph, selection)


def distillation_objective(student: nn.Module, teacher: nn.Module, loss: str, images: torch.Tensor) -> DistillationObjective:
    if loss == "none":
        return DistillationObjective(student)
    frozen = FrozenTeacher(teacher, channels_last=True, fold_batch_norm=True)
    samples = {"student": sample_outputs(student, images), "teacher": frozen(images)}
    build = {name: build_distiller(name, **samples).to(images.device) for name in {loss, "kd"}}
    losses = [(loss, build[loss], DISTILLERS[loss].beta)] if loss != "kd" else []
    return DistillationObjective(student, teacher=frozen, losses=losses, kd=build["kd"])


def _runnable(objective: nn.Module, hooks: Pruning, batch: Batch, *, mode: str) -> Callable[[], None]:
    amp, compiled = MODES[mode]
    objective.train()
    step = prepare_step(objective, device=batch.images.device, world=World(), compiled=compiled)
    optimizer = sgd(objective.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)

    def run() -> None:
        train_step(step, batch, optimizer=optimizer, amp=amp)
        hooks.after_step()

    return run


if __name__ == "__main__":
    cli.execute(lambda: main(get_args_parser().parse_args()))
