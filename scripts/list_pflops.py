"""Adds to each command of a dry run what its training takes: `... # 12.3 PFLOPs`, and says the total on stderr.

    DRY=1 PARTS=pairs scripts/run_benchmark.sh --dataset cifar100

Counted are a forward and a backward pass of the network that is trained, the latter as twice the former, and a forward pass of
its teacher, for every training image of every epoch; not what a loss computes beside them, and no evaluation. Commands without a
recipe for small images pass through as they are.
"""

import shlex
import sys
from functools import cache
from itertools import pairwise

import torch
from torch.utils.flop_counter import FlopCounterMode

from models import build_on_meta
from utils.cli.recipes import recipes

TRAIN_IMAGES = {"cifar10": 50_000, "cifar100": 50_000}
CLASSES = {"cifar10": 10, "cifar100": 100}
SIDE_PIXELS = 32


@cache
def forward_flops(model: str, num_classes: int) -> int:
    """Of one image."""
    network = build_on_meta(model, num_classes=num_classes).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, SIDE_PIXELS, SIDE_PIXELS, device="meta"))
    return counter.get_total_flops()


def training_pflops(command: str) -> float | None:
    """Of the training that a command line of an entry script starts; None where it does not say enough."""
    words = shlex.split(command)
    values = {word: value for word, value in pairwise(words) if word.startswith("--")}
    dataset, recipe = values.get("--dataset"), values.get("--recipe")
    student = values.get("--s-model") or values.get("--model")
    if dataset not in TRAIN_IMAGES or recipe not in recipes() or student is None:
        return None
    epochs = int(values.get("--n-epochs", recipes()[recipe].flags["n_epochs"]))
    flops = 3 * forward_flops(student, CLASSES[dataset])
    if "--t-model" in values:
        flops += forward_flops(values["--t-model"], CLASSES[dataset])
    return flops * TRAIN_IMAGES[dataset] * epochs / 1e15


def main() -> None:
    total, runs = 0.0, 0
    for line in sys.stdin:
        pflops = training_pflops(line)
        if pflops is None:
            print(line, end="")
            continue
        total, runs = total + pflops, runs + 1
        print(f"{line.rstrip()} # {pflops:.1f} PFLOPs")
    print(f"{runs} runs, {total:,.0f} PFLOPs in all", file=sys.stderr)


if __name__ == "__main__":
    main()
