"""Batch norm in training on a CPU for the widths that pruning leaves: PyTorch's own, and with many pixels in a row.

    python -m benchmarks.batch_norm

Forward and backward pass of one layer of a CIFAR ResNet in channels-last layout. A row of so many numbers at least is what
`models.batch_norm` passes to PyTorch's kernels; widths that are a multiple of 16 it leaves to `nn.BatchNorm2d`.
"""

import argparse
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.common import add_common_flags, machine, report
from models import batch_norm
from models.batch_norm import UnevenBatchNorm2d
from utils import cli
from utils.timing import interleaved_seconds, median_ratio

LAYERS = ((8, 32), (10, 32), (16, 32), (19, 16), (32, 16), (38, 8), (64, 8))  # channels, pixels a side


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog="batch_norm.py", description="Cost of batch norm for odd numbers of channels.")
    parser.add_argument("--batch-size", type=cli.positive_int, default=128, help="images a batch")
    parser.add_argument("--rows", type=cli.positive_int, nargs="+", default=[16, 320, 640, 1280], help="numbers in a row")
    add_common_flags(parser, name="batch_norm", rounds=31, cpu_only=True)
    return parser


def main(args: argparse.Namespace) -> None:
    device = torch.device("cpu")
    rows = [measure(args, channels, side, device=device) for channels, side in LAYERS]
    report("batch_norm", rows, output=args.output, machine=machine(device), batch_size=args.batch_size, rounds=args.rounds)


def measure(args: argparse.Namespace, channels: int, side: int, *, device: torch.device) -> dict[str, object]:
    """One row: milliseconds of PyTorch's batch norm, and how many times faster rows of each length are."""
    shape = (args.batch_size, channels, side, side)
    images, gradient = (torch.randn(shape).contiguous(memory_format=torch.channels_last) for _ in range(2))
    images.requires_grad_()
    work = {"own": passes(nn.BatchNorm2d(channels), images, gradient)}
    work |= {row: at_row(row, passes(UnevenBatchNorm2d(channels), images, gradient)) for row in args.rows}
    seconds = interleaved_seconds(work, device=device, rounds=args.rounds)
    ratios = {f"times faster, rows of {row}": median_ratio(seconds["own"], seconds[row]) for row in args.rows}
    return {"channels": channels, "side": side, "nn.BatchNorm2d ms": 1000 * min(seconds["own"]), **ratios}


def passes(norm: nn.Module, images: Tensor, gradient: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(norm(images), [images, norm.weight, norm.bias], gradient)


def at_row(row: int, work: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        with mock.patch.object(batch_norm, "ROW", row):
            work()

    return run


if __name__ == "__main__":
    cli.execute(lambda: main(get_args_parser().parse_args()))
