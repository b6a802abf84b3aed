"""The flags of a budget of time: what it is measured in."""

import argparse

from deploy.settings import RUNTIME_NAMES, LatencySettings
from utils import cli

NAMES = ("budget_runtime", "budget_batch_size", "budget_threads", "budget_table")


def add_latency_flags(parser: cli.Parser) -> None:
    group = parser.add_argument_group("budget of time")
    group.add_argument("--budget-runtime", default="torch", choices=RUNTIME_NAMES, help="what runs the small network")
    group.add_argument("--budget-batch-size", type=cli.positive_int, default=64, metavar="N", help="images at a time")
    group.add_argument("--budget-threads", type=cli.positive_int, metavar="N", help="threads (default: as many as PyTorch takes)")
    group.add_argument("--budget-table", metavar="FILE", help="times that another run measured, its latency_table.json")
    parser.parameters |= {"runtime": "budget_runtime", "table": "budget_table"}
    cli.counts_in_training(parser, *NAMES)
    parser.counts_only(*NAMES, where=is_of_time, only="with --budget latency=SHARE")
    parser.counts_only(*NAMES[:-1], where=lambda args: args.budget_table is None, only="without --budget-table, which says it")


def latency_settings(args: argparse.Namespace) -> LatencySettings:
    """What the flags say that a budget of time is measured in."""
    return LatencySettings(args.budget_runtime, args.budget_batch_size, args.budget_threads, args.budget_table)


def is_of_time(args: argparse.Namespace) -> bool:
    """Whether the budget is one of time."""
    return args.budget is not None and args.budget.startswith("latency=")
