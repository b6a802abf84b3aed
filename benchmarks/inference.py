"""How much faster a small network is: dense beside compact, PyTorch beside onnxruntime, and a plain training step.

    python -m benchmarks.inference --model resnet56

Filters are chosen at random, which asks most of the residual sums. `wide sums` is the form that export.py writes as ONNX.
On a CPU with AVX-512 the dense and the compact network are also timed with vectors of half that width, in a process of its own;
all ratios are to the dense network as PyTorch runs it by itself.
"""

import argparse
import copy
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import IMAGE_SIDE_PIXELS, add_common_flags, machine, report, synthetic_batch
from benchmarks.worker import timed_elsewhere
from deploy.runtimes import RUNTIMES
from models import MODELS, build_model
from models.batch_norm import quicken_batch_norms
from models.graph import ChannelGraph
from models.narrow import Selection
from prune.masks import choose_filters, keep_ratios
from prune.schedule import PhysicalPruning
from utils import cli
from utils.device import choose_device, to_device
from utils.images.batches import Batch
from utils.profile import profile_network
from utils.timing import PAUSE_SECONDS, interleaved, median_ratio, seconds_of
from utils.training.objective import CrossEntropyObjective
from utils.training.step import sgd, train_step
from utils.world import World

PRUNINGS = ((0.6, 1), (0.5, 8))  # keep ratio, channel multiple
ISA, HALF = "ONEDNN_MAX_CPU_ISA", "AVX2"  # the variable by which oneDNN takes narrower vectors; it reads it once
HALF_FORMS = ("dense", "compact")


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog="inference.py", description="Speed of dense and compact networks.")
    parser.add_argument("--model", default="resnet56", choices=MODELS, help="the network")
    parser.add_argument("--batch-sizes", type=cli.positive_int, nargs="+", default=[1, 64], help="images a forward pass")
    parser.add_argument("--train-batch-size", type=cli.positive_int, default=128, help="images a training step")
    parser.add_argument("--onnx", action="store_true", help="time onnxruntime too (CPU)")
    add_common_flags(parser, name="inference", rounds=15)
    return parser


def main(args: argparse.Namespace) -> None:
    device = choose_device(args.device, None, World())
    rows = [row for keep_ratio, multiple in PRUNINGS for row in measure(args, keep_ratio, multiple, device=device)]
    report("inference", rows, output=args.output, machine=machine(device), model=args.model, rounds=args.rounds)


def measure(args: argparse.Namespace, keep_ratio: float, multiple: int, *, device: torch.device) -> list[dict[str, Any]]:
    networks = build_forms(args.model, keep_ratio, multiple, device=device)
    image = synthetic_batch(1, device=device).images
    sizes = {form: profile_network(network, image) for form, network in networks.items()}
    rows = []
    with half_vectors(args, keep_ratio, multiple, device=device) as seconds_there:
        for task, functions in tasks(args, networks, device=device, onnx=args.onnx).items():
            stopwatches = {(form, "default"): partial(seconds_of, run, device=device) for form, run in functions.items()}
            if seconds_there is not None and not task.startswith("onnxruntime"):
                stopwatches |= {(form, HALF): partial(seconds_there, f"{task}: {form}") for form in HALF_FORMS}
            seconds = interleaved(stopwatches, rounds=args.rounds, pause_seconds=PAUSE_SECONDS)
            for form, vectors in stopwatches:
                rows.append(
                    {
                        "retained": f"{keep_ratio} by {multiple}",
                        "task": task,
                        "form": form,
                        "vectors": vectors,
                        "parameters": sizes[form]["parameters"] / sizes["dense"]["parameters"],
                        "MACs": sizes[form]["macs"] / sizes["dense"]["macs"],
                        "ms (least)": 1000 * min(seconds[form, vectors]),
                        "times faster": median_ratio(seconds["dense", "default"], seconds[form, vectors]),
                    }
                )
    return rows


def half_vectors(
    args: argparse.Namespace, keep_ratio: float, multiple: int, *, device: torch.device
) -> AbstractContextManager[Callable[[str], float] | None]:
    """Times functions in a process that convolves with vectors of 256 bits, if this one takes 512."""
    if device.type != "cpu" or torch.backends.cpu.get_cpu_capability() != "AVX512" or ISA in os.environ:
        return nullcontext()
    return timed_elsewhere(partial(worker_functions, args, keep_ratio, multiple), {ISA: HALF})


def worker_functions(args: argparse.Namespace, keep_ratio: float, multiple: int) -> dict[str, Callable[[], object]]:
    device = torch.device("cpu")
    forms = build_forms(args.model, keep_ratio, multiple, device=device)
    found = tasks(args, {form: forms[form] for form in HALF_FORMS}, device=device, onnx=False)
    return {f"{task}: {form}": function for task, functions in found.items() for form, function in functions.items()}


def build_forms(name: str, keep_ratio: float, multiple: int, *, device: torch.device) -> dict[str, nn.Module]:
    """One function in three forms: all filters with zeros, without them, and with zeros in the residual sums alone."""
    torch.manual_seed(0)
    dense = build_model(name, num_classes=10)
    graph = ChannelGraph(dense)
    layers = graph.prunable_layers()
    generator = torch.Generator().manual_seed(0)
    kept = choose_filters(layers, keep_ratios(layers, [keep_ratio]), criterion="filter-r", multiple=multiple, generator=generator)
    pruning = PhysicalPruning(graph, Selection(graph, kept))
    wide = pruning.selection.shrink(wide_sums=True)
    forms = {"dense": dense, "compact": pruning.trained_network(), "wide sums": wide}
    quicken_batch_norms(forms["wide sums"])
    return {form: to_device(network, device) for form, network in forms.items()}


def tasks(
    args: argparse.Namespace,
    networks: Mapping[str, nn.Module],
    *,
    device: torch.device,
    onnx: bool,
    image_side: int = IMAGE_SIDE_PIXELS,
) -> dict[str, dict[str, Callable[[], object]]]:
    """What is timed, and for each of it one function a form."""
    evaluated = {form: copy.deepcopy(network).eval() for form, network in networks.items()}
    result = {}
    for size in args.batch_sizes:
        images = synthetic_batch(size, device=device, image_side=image_side).images
        result[f"forward, batch {size}"] = {form: forward(network, images) for form, network in evaluated.items()}
        if onnx and device.type == "cpu":
            result[f"onnxruntime, batch {size}"] = {form: onnx_session(net, images) for form, net in evaluated.items()}
    batch = synthetic_batch(args.train_batch_size, device=device, image_side=image_side)
    result[f"training step, batch {args.train_batch_size}"] = {form: step(net, batch) for form, net in networks.items()}
    return result


def forward(network: nn.Module, images: Tensor) -> Callable[[], object]:
    def run() -> Tensor:
        with torch.inference_mode():
            return network(images)

    return run


def step(network: nn.Module, batch: Batch) -> Callable[[], object]:
    objective = CrossEntropyObjective(network.train())
    optimizer = sgd(objective.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    return lambda: train_step(objective, batch, optimizer=optimizer)


def onnx_session(network: nn.Module, images: Tensor) -> Callable[[], object]:
    run = RUNTIMES["onnxruntime"](network, images[:1].expand(2, -1, -1, -1))
    return lambda: run(images)


if __name__ == "__main__":
    cli.execute(lambda: main(get_args_parser().parse_args()))
