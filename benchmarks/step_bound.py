"""What a plain training step is bound by: where its time goes, and how near its convolutions are to the machine's arithmetic.

    python -m benchmarks.step_bound --model resnet20

The time is shared out by torch's profiler. Convolutions are compared with a product of two large matrices of the same type on
the same threads, which comes near to what the arithmetic units can do. `if at its rate` is how many images a second there
would be if convolutions were as fast and all else took the time that it takes; `convolutions alone`, if nothing else took any.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import add_common_flags, machine, report, synthetic_batch
from benchmarks.step_cost import plain_step
from models import MODELS, build_model
from utils import cli
from utils.device import to_device
from utils.profile import training_flops
from utils.timing import interleaved_seconds
from utils.training.objective import CrossEntropyObjective

KINDS = {
    "convolutions": ("conv",),
    "batch norm": ("batch_norm",),
    "ReLU and sums": ("relu", "clamp_min", "threshold", "aten::add"),
}
MATRIX_SIDE = 2048


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog="step_bound.py", description="What a plain training step is bound by.")
    parser.add_argument("--model", nargs="+", default=["resnet20"], choices=MODELS)
    parser.add_argument("--batch-size", type=cli.positive_int, default=128, help="images a step")
    parser.add_argument("--modes", nargs="+", default=["float32", "amp"], choices=("float32", "amp"), help="how steps are run")
    add_common_flags(parser, name="step_bound", rounds=9, cpu_only=True)
    return parser


def main(args: argparse.Namespace) -> None:
    rows = [measure(model, mode, args) for model in args.model for mode in args.modes]
    report(
        "step_bound",
        rows,
        output=args.output,
        machine=machine(torch.device("cpu")),
        batch_size=args.batch_size,
        rounds=args.rounds,
    )


def measure(model: str, mode: str, args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cpu")
    torch.manual_seed(0)
    batch = synthetic_batch(args.batch_size, device=device)
    network = to_device(build_model(model, num_classes=10), device)
    flops = training_flops(CrossEntropyObjective(network), batch.images[:1]) * args.batch_size
    step, product = plain_step(network, batch, mode=mode), matrix_product(torch.bfloat16 if mode == "amp" else torch.float32)
    taken = interleaved_seconds({"step": step, "product": product}, device=device, rounds=args.rounds)
    seconds = {name: statistics.median(values) for name, values in taken.items()}
    rate = 2 * MATRIX_SIDE**3 / seconds["product"]
    shares = shares_of(step)
    at_rate = flops / rate
    rest = (1 - shares["convolutions"]) * seconds["step"]
    return {
        "network": model,
        "mode": mode,
        "ms": 1000 * seconds["step"],
        "images/s": args.batch_size / seconds["step"],
        **{f"{kind} %": 100 * share for kind, share in shares.items()},
        "GFLOP/s of convolutions": flops / (shares["convolutions"] * seconds["step"]) / 1e9,
        "of a matrix product": rate / 1e9,
        "images/s if at its rate": args.batch_size / (at_rate + rest),
        "convolutions alone": args.batch_size / at_rate,
    }


def matrix_product(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    first, second = (torch.randn(MATRIX_SIDE, MATRIX_SIDE).to(dtype) for _ in range(2))
    return lambda: first @ second


def shares_of(step: Callable[[], None], *, steps: int = 5) -> dict[str, float]:
    """The share of the time of a step that each kind of operation takes by itself."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            step()
    times = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    total = sum(times.values())
    shares = {
        kind: sum(time for key, time in times.items() if any(part in key for part in parts)) / total
        for kind, parts in KINDS.items()
    }
    return {**shares, "all else": 1 - sum(shares.values())}


if __name__ == "__main__":
    cli.execute(lambda: main(get_args_parser().parse_args()))
