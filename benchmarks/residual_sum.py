"""Ways to add a few channels into their places among many: why `models.narrow.network` does it as it does.

    python -m benchmarks.residual_sum

The residual sums of ResNet-56: `whole` (B, F, H, W) holds all channels, `part` the filters that its block retains. `conv`
is the block's second convolution writing only those filters, `wide conv` the same writing all of them, zeros included,
which needs nothing but a plain sum behind it: the difference of the two is what a sum by places may cost.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import add_common_flags, machine, report
from models.cifar_resnet import STAGE_WIDTHS
from models.narrow.relayout import as_maps, as_rows
from prune.masks import keep_count
from utils import cli
from utils.device import choose_device
from utils.timing import interleaved_seconds
from utils.world import World

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
STAGE_SIDES_PIXELS = (32, 16, 8)


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog="residual_sum.py", description="Sums of maps that store different channels.")
    parser.add_argument("--batch-size", type=cli.positive_int, default=64, help="images")
    parser.add_argument("--keep-ratio", type=cli.keep_proportion, default=0.5, help="proportion of filters retained")
    add_common_flags(parser, name="residual_sum", rounds=30)
    return parser


def main(args: argparse.Namespace) -> None:
    device = choose_device(args.device, None, World())
    rows = [
        {
            "layout": name,
            "task": task,
            "channels": width,
            **measure(args, width, side, layout, train=task == "training", device=device),
        }
        for name, layout in LAYOUTS.items()
        for task in ("inference", "training")
        for width, side in zip(STAGE_WIDTHS, STAGE_SIDES_PIXELS, strict=True)
    ]
    settings = {"batch_size": args.batch_size, "keep_ratio": args.keep_ratio, "rounds": args.rounds, "figures": "least ms"}
    report("residual_sum", rows, output=args.output, machine=machine(device), **settings)


def measure(
    args: argparse.Namespace, width: int, side: int, layout: torch.memory_format, *, train: bool, device: torch.device
) -> dict[str, float | None]:
    """The least milliseconds of each form, with its backward pass if `train`."""
    torch.manual_seed(0)
    kept = torch.randperm(width)[: keep_count(width, args.keep_ratio)].sort().values.to(device)
    whole, part = (
        torch.randn(args.batch_size, channels, side, side, device=device).to(memory_format=layout).requires_grad_(train)
        for channels in (width, len(kept))
    )
    found = forms(whole, part, kept, train=train)
    functions = {name: runnable(form, train=train) for name, form in found.items() if form is not None}
    seconds = interleaved_seconds(functions, device=device, rounds=args.rounds)
    return {name: 1000 * min(seconds[name]) if name in seconds else None for name in found}


def runnable(form: Callable[[], Tensor], *, train: bool) -> Callable[[], object]:
    def infer() -> Tensor:
        with torch.inference_mode():
            return form()

    def step() -> None:
        form().sum().backward()

    return step if train else infer


def forms(whole: Tensor, part: Tensor, kept: Tensor, *, train: bool) -> dict[str, Callable[[], Tensor] | None]:
    """Each form as a function without arguments; None for those that overwrite `whole` where they cannot."""
    width, count = whole.shape[1], len(kept)
    origins = torch.full((width,), count, device=kept.device).index_copy(0, kept, torch.arange(count, device=kept.device))
    selection = F.one_hot(kept, width).t().to(whole.dtype)[:, :, None, None].contiguous()  # (F, kept, 1, 1)
    weight = torch.randn(width, count, 3, 3, device=whole.device)
    narrow_weight = weight[kept].contiguous()

    # a gradient needs `whole` as it was, and rows of other layouts are copies
    overwrites = not train and whole.is_contiguous(memory_format=torch.channels_last)

    def add_rows() -> Tensor:
        return as_maps(as_rows(whole).index_add(1, kept, as_rows(part)), whole)

    def add_rows_in_place() -> Tensor:
        return as_maps(as_rows(whole).index_add_(1, kept, as_rows(part)), whole)

    def add_product() -> Tensor:
        return as_maps(torch.addmm(as_rows(whole), as_rows(part), selection[:, :, 0, 0].t()), whole)

    return {
        "plain sum of all": lambda: whole + whole,
        "plain sum in place": (lambda: whole.add_(whole)) if overwrites else None,
        "index_add": lambda: whole.index_add(1, kept, part),
        "index_add of rows": add_rows,
        "index_add of rows in place": add_rows_in_place if overwrites else None,
        "product of rows": add_product,
        "gather from padded": lambda: whole + F.pad(part, (0, 0, 0, 0, 0, 1)).index_select(1, origins),
        "1x1 selection": lambda: whole + F.conv2d(part, selection),
        "conv": lambda: F.conv2d(part, narrow_weight, padding=1),
        "wide conv": lambda: F.conv2d(part, weight, padding=1),
    }


if __name__ == "__main__":
    cli.execute(lambda: main(get_args_parser().parse_args()))
