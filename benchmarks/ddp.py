"""What many processes gain: a training step among all of them, what its messages cost, and one all-reduce alone.

    torchrun --standalone --nproc_per_node=2 -m benchmarks.ddp
    python -m benchmarks.ddp                                      (one process, to compare with)

The batch is shared out among the processes, as in a training.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.common import RESULTS, add_common_flags, machine, report, synthetic_batch
from models import MODELS, build_model
from utils import cli
from utils.device import choose_device, to_device
from utils.distributed import join
from utils.images.batches import Batch
from utils.timing import interleaved_seconds
from utils.training.objective import CrossEntropyObjective
from utils.training.step import prepare_step, sgd, train_step
from utils.world import World, world_from_environment


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog="ddp.py", description="Training steps among many processes.")
    parser.add_argument("--model", default="resnet20", choices=MODELS, help="the network")
    parser.add_argument("--batch-size", type=cli.positive_int, default=128, help="images a step, over all processes")
    add_common_flags(parser, name="ddp", rounds=9)
    return parser


def main(args: argparse.Namespace) -> None:
    world = world_from_environment()
    device = choose_device(args.device, None, world)
    join(world, device)
    row = measure(args, device, world)
    if world.is_main:
        output = args.output if args.output != RESULTS / "ddp.json" else RESULTS / f"ddp_{world.size}.json"
        settings = {"model": args.model, "batch_size": args.batch_size, "rounds": args.rounds}
        report("ddp", [row], output=output, machine=machine(device), **settings)


def measure(args: argparse.Namespace, device: torch.device, world: World) -> dict[str, Any]:
    torch.manual_seed(0)
    network = to_device(build_model(args.model, num_classes=10), device).train()
    share = world.share(args.batch_size)
    batch = synthetic_batch(share.stop - share.start, device=device)
    gradients = torch.zeros(sum(parameter.numel() for parameter in network.parameters()), device=device)
    work = {"step": training_step(network, batch, world)}
    if world.size > 1:
        work |= {"silent": training_step(network, batch, world, silent=True), "all-reduce": lambda: dist.all_reduce(gradients)}
    seconds = interleaved_seconds(work, device=device, rounds=args.rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "processes": world.size,
        "step ms": 1000 * medians["step"],
        "images/s": args.batch_size / medians["step"],
        "step without messages ms": 1000 * medians["silent"] if world.size > 1 else None,
        "gradient bytes": 4 * gradients.numel(),
        "all-reduce alone ms": 1000 * medians["all-reduce"] if world.size > 1 else None,
    }


def training_step(network: nn.Module, batch: Batch, world: World, *, silent: bool = False) -> Callable[[], object]:
    """`silent`: without averaging the gradients."""
    objective = CrossEntropyObjective(network)
    step = prepare_step(objective, device=batch.images.device, world=world, compiled=False)
    optimizer = sgd(objective.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)

    def run() -> None:
        if silent:
            with step.no_sync():
                train_step(step, batch, optimizer=optimizer)
        else:
            train_step(step, batch, optimizer=optimizer)

    return run


if __name__ == "__main__":
    cli.execute(lambda: main(get_args_parser().parse_args()))
