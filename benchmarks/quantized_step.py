"""What fine-tuning codebooks costs: a training step with shared weights in units of a plain one.

python -m benchmarks.quantized_step --model resnet56
"""

import argparse
import statistics
from collections.abc import Callable

import torch

from benchmarks.common import add_common_flags, machine, report, synthetic_batch
from models import MODELS, build_model
from quantize.codebook import layer_bits, share_weights
from utils import cli
from utils.device import choose_device, to_device
from utils.timing import interleaved_seconds, median_ratio
from utils.training.objective import CrossEntropyObjective
from utils.training.step import prepare_step, sgd, train_step
from utils.world import World


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog="quantized_step.py", description="Cost of fine-tuning codebooks in units of a plain training step.")
    parser.add_argument("--model", nargs="+", default=["resnet20", "resnet56", "alexnet"], choices=MODELS, help="the networks")
    parser.add_argument("--batch-size", type=cli.positive_int, default=128, help="images a batch")
    parser.add_argument("--quan-bits", nargs="+", default=["5"], metavar="BITS", help="as in quantize_encode.py")
    add_common_flags(parser, name="quantized_step", rounds=9)
    return parser


def main(args: argparse.Namespace) -> None:
    device = choose_device(args.device, None, World())
    rows = [measure(model, args, device=device) for model in args.model]
    settings = {"batch_size": args.batch_size, "quan_bits": args.quan_bits, "rounds": args.rounds}
    report("quantized_step", rows, output=args.output, machine=machine(device), **settings)


def measure(model: str, args: argparse.Namespace, *, device: torch.device) -> dict[str, object]:
    """One row: milliseconds of either step, and their ratio."""
    work = {
        kind: prepare(model, bits, batch_size=args.batch_size, device=device)
        for kind, bits in (("plain", []), ("shared", args.quan_bits))
    }
    seconds = interleaved_seconds(work, device=device, rounds=args.rounds)
    milliseconds = {f"{kind} step ms": 1000 * statistics.median(values) for kind, values in seconds.items()}
    return {"model": model, **milliseconds, "plain steps": median_ratio(seconds["shared"], seconds["plain"])}


def prepare(model: str, bits: list[str], *, batch_size: int, device: torch.device) -> Callable[[], object]:
    """A training step of the network, its weights shared if there are `bits`."""
    torch.manual_seed(0)
    network = to_device(build_model(model, num_classes=10), device).train()
    share_weights(network, layer_bits(network, mode="all-quan", bits=bits))
    objective = CrossEntropyObjective(network)
    step = prepare_step(objective, device=device, world=World(), compiled=False)
    optimizer = sgd(objective.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)
    batch = synthetic_batch(batch_size, device=device)
    return lambda: train_step(step, batch, optimizer=optimizer)


if __name__ == "__main__":
    cli.execute(lambda: main(get_args_parser().parse_args()))
