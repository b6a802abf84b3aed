"""What criteria that look at images cost: time and memory of their pass, a batch, beside a plain training step.

python -m benchmarks.criteria --model resnet56
"""

import argparse
import multiprocessing
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common import add_common_flags, machine, report, synthetic_batch
from models import MODELS, build_model
from models.graph import ChannelGraph
from prune.criteria import CRITERIA
from prune.feature_maps import mean_of_maps
from prune.gradients import mean_gradients
from utils import cli
from utils.device import choose_device, to_device
from utils.timing import interleaved_seconds, median_ratio
from utils.training.objective import CrossEntropyObjective
from utils.training.step import prepare_step, sgd, train_step
from utils.world import World

BATCHES = 2  # of one measured pass, and as many steps
PASSES = {"NGGM": "filter-nggm", "HRank": "filter-hrank", "CHIP": "filter-chip"}


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog="criteria.py", description="Cost of the passes over images that criteria take.")
    parser.add_argument("--model", nargs="+", default=["resnet20", "resnet56"], choices=MODELS, help="the networks")
    parser.add_argument("--batch-size", type=cli.positive_int, default=128, help="images a batch")
    add_common_flags(parser, name="criteria", rounds=9)
    return parser


def main(args: argparse.Namespace) -> None:
    device = choose_device(args.device, None, World())
    rows = [measure(model, args, device=device) for model in args.model]
    report("criteria", rows, output=args.output, machine=machine(device), batch_size=args.batch_size, rounds=args.rounds)


def measure(model: str, args: argparse.Namespace, *, device: torch.device) -> dict[str, object]:
    """One row: milliseconds a batch, their ratios, and how far memory rises above what network and batch take."""
    work = {kind: prepare(kind, model, args.batch_size, device) for kind in ("plain step", *PASSES)}
    seconds = interleaved_seconds(work, device=device, rounds=args.rounds)
    peaks = {f"{kind} MiB": peak_mebibytes(kind, model, args.batch_size, device) for kind in work}
    milliseconds = {f"{kind} ms": 1000 * statistics.median(seconds[kind]) / BATCHES for kind in work}
    in_steps = {f"{kind} in plain steps": median_ratio(seconds[kind], seconds["plain step"]) for kind in PASSES}
    in_passes = {f"{kind} in NGGM's": median_ratio(seconds[kind], seconds["NGGM"]) for kind in PASSES if kind != "NGGM"}
    return {"model": model, **milliseconds, **in_steps, **in_passes, **peaks}


def prepare(kind: str, model: str, batch_size: int, device: torch.device) -> Callable[[], object]:
    torch.manual_seed(0)
    network = to_device(build_model(model, num_classes=10), device).train()
    batch = synthetic_batch(batch_size, device=device)
    if kind in PASSES:
        criterion, graph = CRITERIA[PASSES[kind]], ChannelGraph(network, batch.images)
        layers, batches = graph.prunable_layers(), [(batch.images, batch.labels)] * BATCHES
        if criterion.needs_gradient:
            return lambda: mean_gradients(network, batches, layers=layers)
        return lambda: mean_of_maps(graph, batches, layers=layers, of_maps=criterion.of_maps)
    objective = CrossEntropyObjective(network)
    step = prepare_step(objective, device=device, world=World(), compiled=False)
    optimizer = sgd(objective.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)
    return lambda: [train_step(step, batch, optimizer=optimizer) for _ in range(BATCHES)]


def peak_mebibytes(kind: str, model: str, batch_size: int, device: torch.device) -> int:
    """How far memory rises above what the network and a batch take; on a CPU by the resident set of a fresh process."""
    if device.type == "cuda":
        return _cuda_peak(prepare(kind, model, batch_size, device), device)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_resident_peak, (kind, model, batch_size))


def _cuda_peak(work: Callable[[], object], device: torch.device) -> int:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**20)


def _resident_peak(kind: str, model: str, batch_size: int) -> int:
    work = prepare(kind, model, batch_size, torch.device("cpu"))
    before = _peak_kibibytes()
    work()
    return round((_peak_kibibytes() - before) / 1024)


def _peak_kibibytes() -> int:
    """Of this process alone: getrusage's figure begins at that of the process which started it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])


if __name__ == "__main__":
    cli.execute(lambda: main(get_args_parser().parse_args()))
