"""What a choice of filters costs: from a network that was not seen before to the filters that a budget leaves.

    python -m benchmarks.choice
    python -m benchmarks.choice --beside ../other-checkout

A row is one network: seconds, in passes of it over one batch, and the peak of what Python holds meanwhile (`tracemalloc`, so
without tensors). Each measurement is a process of its own. `--beside` measures another checkout of this repository turn by
turn and gives this one's share of its seconds and memory.
"""

import argparse
import inspect
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import add_common_flags, machine, report
from utils import cli
from utils.errors import UserError

HERE = Path(__file__).resolve().parents[1]
SIDES = {"resnet20": 32, "resnet56": 32, "torchvision/mobilenet_v2": 96, "torchvision/densenet121": 64}
BUDGET = 0.5


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog="choice.py", description="Cost of choosing the filters that half of the multiply-accumulates leave.")
    parser.add_argument("--models", nargs="+", default=list(SIDES), choices=SIDES, help="the networks")
    parser.add_argument(
        "--beside", type=Path, metavar="CHECKOUT", help="another checkout of this repository, measured turn by turn"
    )
    add_common_flags(parser, name="choice", rounds=3, cpu_only=True)
    return parser


def main(args: argparse.Namespace) -> None:
    if args.beside is not None and not (args.beside / "benchmarks" / "budgets.py").is_file():
        raise UserError(f"--beside {args.beside}: is no checkout of this repository, it has no benchmarks/budgets.py")
    import torch

    rows = [measure(model, rounds=args.rounds, beside=args.beside) for model in args.models]
    report("choice", rows, output=args.output, machine=machine(torch.device("cpu")), budget=f"macs={BUDGET}", rounds=args.rounds)


def measure(model: str, *, rounds: int, beside: Path | None) -> dict[str, Any]:
    """The row of a network: medians over the rounds; shares are medians of each round's."""
    own, other = [], []
    for _ in range(rounds):
        own.append(in_process(HERE, model))
        if beside is not None:
            other.append(in_process(beside, model))
    row = {
        "network": model,
        "passes": statistics.median(found["seconds"] / found["pass_seconds"] for found in own),
        "seconds": statistics.median(found["seconds"] for found in own),
        "memory MB": statistics.median(found["peak_bytes"] for found in own) / 1e6,
    }
    if beside is not None:
        pairs = list(zip(own, other, strict=True))
        row["share of time"] = statistics.median(mine["seconds"] / its["seconds"] for mine, its in pairs)
        row["share of memory"] = statistics.median(mine["peak_bytes"] / its["peak_bytes"] for mine, its in pairs)
    return row


def in_process(checkout: Path, model: str) -> dict[str, float]:
    """What `choose_once` finds with the code of a checkout. Raises UserError where that code cannot run it."""
    code = f"import json\n{inspect.getsource(choose_once)}\nprint(json.dumps(choose_once{model, SIDES[model], BUDGET}))"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    if ended.returncode:
        raise UserError(f"{checkout}: the choice for {model} failed: {ended.stderr.strip().splitlines()[-1]}")
    return json.loads(ended.stdout.splitlines()[-1])


def choose_once(model: str, side: int, share: float) -> dict[str, float]:
    """Seconds and peak of Python's memory of a choice, coupled, in widths of any size; needs nothing of this module."""
    import time
    import tracemalloc

    import torch

    from benchmarks.budgets import Budget, build, choice_within

    def choose(network: torch.nn.Module) -> float:
        began = time.perf_counter()
        choice = choice_within(Budget("macs", share), network, example, coupled=True, multiple=1)
        choice.check()
        choice()
        return time.perf_counter() - began

    example = torch.randn(2, 3, side, side)
    network, batch = build(model), torch.randn(32, 3, side, side)
    with torch.no_grad():
        network(batch)
        began = time.perf_counter()
        network(batch)
        pass_seconds = time.perf_counter() - began
    seconds = choose(network)
    tracemalloc.start()
    choose(build(model))
    return {"seconds": seconds, "pass_seconds": pass_seconds, "peak_bytes": tracemalloc.get_traced_memory()[1]}


if __name__ == "__main__":
    cli.execute(lambda: main(get_args_parser().parse_args()))
