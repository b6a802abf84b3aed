"""What half of a network is worth in time: half of its multiply-accumulates, or half of its time, by layer and coupled.

    python -m benchmarks.budgets --model resnet56 resnet18 --onnx
    python -m benchmarks.budgets --model torchvision/mobilenet_v2 --image-side 96 --onnx --torch-pruning

Filters go by L1 norm, as `pruning.py --prune-mode filter-a --budget macs=0.5` chooses them, or `latency=0.5` in PyTorch with the
largest batch size. torch_pruning (`pip install torch-pruning`) takes the ratio of channels that leaves about as many
multiply-accumulates. "-" stands where something fails. All times are of one run, the forms in turn, in units of the dense one's.
"""

import argparse
import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import add_common_flags, machine, print_results, synthetic_batch, write_results
from benchmarks.inference import tasks
from deploy.latency import LatencyTable, calibrate, measure_table
from models import build_model, check_model
from models.graph import ChannelGraph
from models.graph.cost import Widths
from models.graph.roles import BATCH_NORMS
from models.narrow import NarrowNetwork
from prune.choice import FilterChoice
from prune.masks import keep_ratios
from prune.schedule import PhysicalPruning
from prune.settings import Budget
from utils import cli
from utils.device import choose_device, to_device
from utils.errors import UserError
from utils.profile import profile_network
from utils.timing import interleaved_seconds, median_ratio
from utils.world import World

FORMS = {  # budget, coupled, channel multiple
    "MACs, by layer": ("macs", False, 1),
    "MACs, coupled": ("macs", True, 1),
    "MACs, coupled, by 8": ("macs", True, 8),
    "time, by layer": ("latency", False, 1),
    "time, coupled": ("latency", True, 1),
}
OTHER = "torch_pruning"
BISECTIONS, CLASSES = 12, 10


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog="budgets.py", description="Time of networks with half of their multiply-accumulates, or time.")
    parser.add_argument(
        "--model", nargs="+", default=["resnet56", "resnet18"], type=cli.checked(check_model), help="the networks"
    )
    parser.add_argument("--budget", type=cli.keep_proportion, default=0.5, help="share of the MACs or the time that is left")
    parser.add_argument("--image-side", type=cli.positive_int, default=32, help="pixels")
    parser.add_argument("--batch-sizes", type=cli.positive_int, nargs="+", default=[1, 64], help="images a forward pass")
    parser.add_argument("--train-batch-size", type=cli.positive_int, default=64, help="images a training step")
    parser.add_argument("--onnx", action="store_true", help="time onnxruntime too (CPU)")
    parser.add_argument("--torch-pruning", action="store_true", help="time what torch_pruning leaves, too")
    add_common_flags(parser, name="budgets", rounds=15)
    return parser


def main(args: argparse.Namespace) -> None:
    device = choose_device(args.device, None, World())
    about = {"machine": machine(device), "rounds": args.rounds, "image_side": args.image_side}
    rows = []
    for model in args.model:
        rows += measure(model, args, device=device)
        write_results("budgets", rows, output=args.output, **about)  # the next one may take an hour
    print_results(rows, **about)


def measure(model: str, args: argparse.Namespace, *, device: torch.device) -> list[dict[str, Any]]:
    example = synthetic_batch(2, device=device, image_side=args.image_side).images
    networks = {"dense": to_device(build(model), device)}
    for form in FORMS:
        try:
            networks[form] = pruned(model, args, form, example)
        except UserError as error:  # nothing that is left is fast enough
            print(f"{model}, {form}: {error}", flush=True)
    macs = {form: profile_network(network, example[:1])["macs"] for form, network in networks.items()}
    if args.torch_pruning:
        try:
            networks[OTHER] = pruned_by_another(
                lambda: to_device(build(model), device), example, macs=args.budget * macs["dense"], num_classes=CLASSES
            )
            macs[OTHER] = profile_network(networks[OTHER], example[:1])["macs"]
        except Exception as error:  # of whatever kind
            print(f"{model}: {OTHER} fails: {type(error).__name__}: {error}", flush=True)
    networks = {form: to_device(network, device) for form, network in networks.items()}
    rows = []
    for task, functions in tasks(args, networks, device=device, onnx=args.onnx, image_side=args.image_side).items():
        seconds = interleaved_seconds(functions, device=device, rounds=args.rounds, warmups=1, pausing=True)
        for form in (*FORMS, *([OTHER] if args.torch_pruning else [])):
            network = networks.get(form)
            rows.append(
                {
                    "network": model,
                    "task": task,
                    "budget": form,
                    "relayouts": network.relayout_count if isinstance(network, NarrowNetwork) else 0,
                    "MACs": macs[form] / macs["dense"] if network is not None else None,
                    "time": median_ratio(seconds[form], seconds["dense"]) if network is not None else None,
                }
            )
    return rows


def build(model: str) -> nn.Module:
    """The network in evaluation, with batch norms that make something of a channel of zeros, as trained ones do."""
    torch.manual_seed(0)
    network = build_model(model, num_classes=CLASSES).eval()
    for norm in (module for module in network.modules() if isinstance(module, BATCH_NORMS)):
        if norm.affine:
            nn.init.normal_(norm.bias, std=0.1)
        if norm.track_running_stats:
            nn.init.normal_(norm.running_mean, std=0.1)
    return network


def choice_within(
    budget: Budget,
    network: nn.Module,
    example: Tensor,
    *,
    coupled: bool,
    multiple: int,
    seconds: Callable[[Widths], float] | None = None,
) -> FilterChoice:
    """Filters by L1 norm that meet the `budget`; one of time is counted by `seconds`."""
    graph = ChannelGraph(network, example)
    layers = graph.prunable_layers()
    setting = {"criterion": "filter-a", "data": SimpleNamespace(example=example), "seed": 0, "multiple": multiple}
    return FilterChoice(graph, layers, keep_ratios(layers, None), **setting, coupled=coupled, budget=budget, seconds=seconds)


def pruned(model: str, args: argparse.Namespace, form: str, example: Tensor) -> nn.Module:
    kind, coupled, multiple = FORMS[form]
    network, budget = to_device(build(model), example.device), Budget(kind, args.budget)

    def choice(table: LatencyTable | None) -> FilterChoice:
        seconds = table.seconds if table is not None else None
        return choice_within(budget, network, example, coupled=coupled, multiple=multiple, seconds=seconds)

    table = None
    if kind == "latency":
        setting = {"runtime": "torch", "batch_size": args.batch_sizes[-1], "threads": None, "multiple": multiple, "narrowest": 1}
        table = measure_table(network, example, **setting)
        calibrate(table, args.budget, network, choice(table).outcome, example)
    selection = choice(table)()
    return copy.deepcopy(PhysicalPruning(selection.graph, selection).trained_network())


def pruned_by_another(build: Callable[[], nn.Module], example: Tensor, *, macs: float, num_classes: int) -> nn.Module:
    """What torch_pruning leaves, by L1 norm, of the network that `build` gives with as many multiply-accumulates, or fewer."""
    import torch_pruning

    def remaining(ratio: float) -> nn.Module:
        network = build()
        last = [layer for layer in network.modules() if getattr(layer, "out_features", None) == num_classes]
        importance = torch_pruning.importance.MagnitudeImportance(p=1)
        torch_pruning.pruner.MagnitudePruner(
            network, example, importance=importance, pruning_ratio=ratio, ignored_layers=last
        ).step()
        return network

    low, high = 0.0, 0.9
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if profile_network(remaining(middle), example[:1])["macs"] > macs:
            low = middle
        else:
            high = middle
    return remaining(high)


if __name__ == "__main__":
    cli.execute(lambda: main(get_args_parser().parse_args()))
