"""What int8 gains beside pruning: dense and pruned networks in float and in int8, in every runtime that is installed.

    python -m benchmarks.int8 --model resnet20 resnet56 --multiples 8
    python -m benchmarks.int8 --model resnet18 --image-side 96 --batch-sizes 1 16

Networks have new weights: their times depend on widths alone. Pruned ones keep a share of the multiply-accumulates, coupled.
"""

import argparse
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.budgets import build
from benchmarks.common import add_common_flags, machine, report
from deploy.comparison import installed_runtimes
from deploy.int8 import to_int8_onnx
from deploy.onnx import to_onnx
from deploy.runtimes import SESSIONS, median_seconds, repeated
from models import MODELS
from models.graph import ChannelGraph
from models.narrow import NarrowNetwork, Selection
from prune.choice import FilterChoice, small_network
from prune.masks import keep_ratios
from prune.settings import Budget
from utils import cli
from utils.profile import profile_network

DENSE = "dense"


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog="int8.py", description="Time of networks in float and int8.")
    parser.add_argument("--model", nargs="+", default=["resnet20", "resnet56"], choices=MODELS)
    parser.add_argument("--budget", type=cli.keep_proportion, default=0.5, help="share of the multiply-accumulates that stays")
    parser.add_argument("--multiples", type=cli.positive_int, nargs="+", default=[8], help="channel multiples")
    parser.add_argument("--batch-sizes", type=cli.positive_int, nargs="+", default=[1, 64], help="images at a time")
    parser.add_argument("--image-side", type=cli.positive_int, default=32, help="pixels")
    add_common_flags(parser, name="int8", rounds=25, cpu_only=True)
    return parser


def main(args: argparse.Namespace) -> None:
    rows = [row for model in args.model for row in measure(model, args)]
    settings = {"budget": args.budget, "image_side": args.image_side, "rounds": args.rounds}
    report("int8", rows, output=args.output, machine=machine(torch.device("cpu")), **settings)


def measure(model: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each network, precision, runtime and number of images; times in units of the dense network in float."""
    example = torch.randn(8, 3, args.image_side, args.image_side, generator=torch.Generator().manual_seed(0))
    networks = {DENSE: Selection(ChannelGraph(build(model), example), {}).shrink()}
    networks |= {f"multiples of {multiple}": pruned(model, multiple, args.budget, example) for multiple in args.multiples}
    macs = {name: profile_network(network, example[:1])["macs"] for name, network in networks.items()}
    files = {(name, "float"): to_onnx(network.eval(), example) for name, network in networks.items()}
    files |= {(name, "int8"): to_int8_onnx(network.eval(), example, [example]) for name, network in networks.items()}
    rows = []
    for runtime in installed_runtimes():
        runners = {key: SESSIONS[runtime](content) for key, content in files.items()}
        for size in args.batch_sizes:
            seconds = median_seconds(runners, repeated(example, size), rounds=args.rounds)
            rows += [
                {
                    "network": model,
                    "runtime": runtime,
                    "images": size,
                    "widths": name,
                    "precision": precision,
                    "MACs": macs[name] / macs[DENSE],
                    "bytes": len(files[name, precision]),
                    "ms": 1000 * seconds[name, precision],
                    "times faster": seconds[DENSE, "float"] / seconds[name, precision],
                }
                for name, precision in files
            ]
    return rows


def pruned(model: str, multiple: int, share: float, example: torch.Tensor) -> NarrowNetwork:
    graph = ChannelGraph(build(model), example)
    layers = graph.prunable_layers()
    setting = {"criterion": "filter-a", "data": SimpleNamespace(example=example), "seed": 0, "multiple": multiple}
    choice = FilterChoice(graph, layers, keep_ratios(layers, None), **setting, coupled=True, budget=Budget("macs", share))
    return small_network(choice())


if __name__ == "__main__":
    cli.execute(lambda: main(get_args_parser().parse_args()))
