"""Which form trains faster: a step of the small network, of the large one with zeros, and of the dense one, turn by turn.

    python -m benchmarks.train_forms

Half and nine tenths of the multiply-accumulates are left, by layer and coupled, at any widths and at multiples of 8. The table
of `--train-form auto` (`prune/measured_forms.json`) takes this machine's times in the place of those that it had of the same
steps. A distilled step is one of the small network that learns from the dense one by HAP and KD.
"""

import argparse
import copy
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.budgets import build, choice_within
from benchmarks.common import add_common_flags, machine, report, synthetic_batch
from benchmarks.step_cost import MODES, checked_device, distilled_step, plain_step
from models import MODELS
from prune.measured_forms import MULTIPLES, TABLE, TrainingStep, record
from prune.schedule import HardPruning, PhysicalPruning
from prune.settings import Budget
from utils import cli
from utils.device import to_device
from utils.images.batches import Batch
from utils.profile import profile_network
from utils.timing import interleaved_seconds, median_ratio

FORMS = {"compact": PhysicalPruning, "masked": HardPruning}
DENSE, DISTILLED = "dense", "distilled"


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog="train_forms.py", description="Training steps of the small network and the one with zeros.")
    parser.add_argument("--model", default="resnet20", choices=MODELS, help="student and teacher")
    parser.add_argument("--batch-size", type=cli.positive_int, default=128, help="images a step")
    parser.add_argument(
        "--budgets", nargs="+", type=cli.keep_proportion, default=[0.5, 0.9], help="shares of the MACs that are left"
    )
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES, help="how steps are run")
    parser.add_argument("--table", type=Path, default=TABLE, help="the table of --train-form auto, which takes the times")
    add_common_flags(parser, name="train_forms", rounds=7)
    return parser


def main(args: argparse.Namespace) -> None:
    device = checked_device(args)
    batch = synthetic_batch(args.batch_size, device=device)
    widths = product(args.modes, args.budgets, (False, True), sorted(MULTIPLES))
    rows = [
        measure(args, batch, mode=mode, budget=budget, coupled=coupled, multiple=each) for mode, budget, coupled, each in widths
    ]
    about = machine(device)
    report(
        "train_forms", rows, output=args.output, machine=about, model=args.model, batch_size=args.batch_size, rounds=args.rounds
    )
    times = {step_of(row, device.type): round(row["compact in masked"], 3) for row in rows}
    record(times, hardware=hardware(about), network=args.model, table=args.table)


def measure(args: argparse.Namespace, batch: Batch, *, mode: str, budget: float, coupled: bool, multiple: int) -> dict[str, Any]:
    torch.compiler.reset()  # it gives up on code that it has compiled for too many networks
    network, example = to_device(build(args.model), batch.images.device), batch.images[:2]
    selection = choice_within(Budget("macs", budget), network, example, coupled=coupled, multiple=multiple)()
    copies = {form: selection.on(copy.deepcopy(network)) for form in FORMS}
    schedules = {form: pruning(copies[form].graph, copies[form]) for form, pruning in FORMS.items()}
    macs = {
        name: profile_network(net, example[:1])["macs"]
        for name, net in ((DENSE, network), ("compact", schedules["compact"].trained_network()))
    }
    students = {form: (schedule.trained_network(), schedule) for form, schedule in schedules.items()}
    steps = {DENSE: plain_step(copy.deepcopy(network), batch, mode=mode)}
    steps |= {form: distilled_step(*students[form], network, batch, loss="none", mode=mode) for form in students}
    distilled = copy.deepcopy(schedules["compact"])
    steps[DISTILLED] = distilled_step(distilled.trained_network(), distilled, network, batch, loss="hap", mode=mode)
    seconds = interleaved_seconds(steps, device=batch.images.device, rounds=args.rounds)
    share = macs["compact"] / macs[DENSE]
    compact = median_ratio(seconds["compact"], seconds[DENSE])
    return {
        "mode": mode,
        "channels": "coupled" if coupled else "by layer",
        "multiple": multiple,
        "MACs": share,
        "dense ms": 1000 * statistics.median(seconds[DENSE]),
        "compact": compact,
        "of its MACs": compact / share,
        "masked": median_ratio(seconds["masked"], seconds[DENSE]),
        "compact in masked": median_ratio(seconds["compact"], seconds["masked"]),
        "HAP + KD": median_ratio(seconds[DISTILLED], seconds[DENSE]),
    }


def step_of(row: dict[str, Any], device: str) -> TrainingStep:
    amp, compiled = MODES[row["mode"]]
    return TrainingStep(device, amp, compiled, row["multiple"], coupled=row["channels"] == "coupled", macs=round(row["MACs"], 2))


def hardware(about: dict[str, Any]) -> str:
    """Processors of one name differ in how wide their vectors are."""
    return f"{about['hardware']} ({about['cpu_vectors']})" if about["device"] == "cpu" else about["hardware"]


if __name__ == "__main__":
    cli.execute(lambda: main(get_args_parser().parse_args()))
