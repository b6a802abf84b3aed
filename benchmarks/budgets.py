"""What half of the multiply-accumulates are worth in time: channels by layer, coupled, and coupled in multiples of 8.

    python -m benchmarks.budgets --model resnet56 resnet18 --onnx

Filters go by L1 norm, as `pruning.py --prune-mode filter-a --budget macs=0.5` chooses them. All times are of one run, the forms
in turn, in units of the dense network's.
"""

import argparse
import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks.common import add_common_flags, machine, report, synthetic_batch
from benchmarks.inference import tasks
from models import build_model, check_model
from prune.allocation import FLOOR, Budget
from prune.choice import FilterChoice
from prune.masks import keep_ratios, prunable_layers
from prune.schedule import PhysicalPruning
from utils import cli
from utils.distributed import World
from utils.profile import profile_network
from utils.setup import choose_device, to_device
from utils.timing import interleaved_seconds, median_ratio

FORMS = {"by layer": (False, 1), "coupled": (True, 1), "coupled, by 8": (True, 8)}  # coupled, channel multiple


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog="budgets.py", description="Time of networks with half of their multiply-accumulates.")
    parser.add_argument(
        "--model", nargs="+", default=["resnet56", "resnet18"], type=cli.checked(check_model), help="the networks"
    )
    parser.add_argument("--budget", type=cli.keep_proportion, default=0.5, help="share of the MACs that is left")
    parser.add_argument("--batch-sizes", type=cli.positive_int, nargs="+", default=[1, 64], help="images a forward pass")
    parser.add_argument("--train-batch-size", type=cli.positive_int, default=64, help="images a training step")
    parser.add_argument("--onnx", action="store_true", help="time onnxruntime too (CPU)")
    add_common_flags(parser, name="budgets", rounds=15)
    return parser


def main(args: argparse.Namespace) -> None:
    device = choose_device(args.device, None, World())
    rows = [row for model in args.model for row in measure(model, args, device=device)]
    report("budgets", rows, output=args.output, machine=machine(device), rounds=args.rounds)


def measure(model: str, args: argparse.Namespace, *, device: torch.device) -> list[dict[str, Any]]:
    image = synthetic_batch(1, device=device).images
    networks = {"dense": build(model), **{form: pruned(model, args, form) for form in FORMS}}
    networks = {form: to_device(network, device) for form, network in networks.items()}
    macs = {form: profile_network(network, image)["macs"] for form, network in networks.items()}
    rows = []
    for task, functions in tasks(args, networks, device=device, onnx=args.onnx).items():
        seconds = interleaved_seconds(functions, device=device, rounds=args.rounds)
        for form in FORMS:
            rows.append(
                {
                    "network": model,
                    "task": task,
                    "channels": form,
                    "relayouts": networks[form].relayout_count,
                    "MACs": macs[form] / macs["dense"],
                    "time": median_ratio(seconds[form], seconds["dense"]),
                }
            )
    return rows


def build(model: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(model, num_classes=10)


def pruned(model: str, args: argparse.Namespace, form: str) -> nn.Module:
    coupled, multiple = FORMS[form]
    network, example = build(model), synthetic_batch(2, device=torch.device("cpu")).images
    layers = prunable_layers(network, example=example)
    choose = FilterChoice(
        network,
        layers,
        keep_ratios(layers, [FLOOR]),
        criterion="filter-a",
        data=SimpleNamespace(example=example),
        seed=0,
        multiple=multiple,
        coupled=coupled,
        budget=Budget("macs", args.budget),
    )
    return copy.deepcopy(PhysicalPruning(network, choose(), example=example).trained_network())


if __name__ == "__main__":
    cli.execute(lambda: main(get_args_parser().parse_args()))
