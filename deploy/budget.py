"""A budget of time: where its table of latencies comes from, and what is said of the network that it leads to."""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torch import nn

from deploy.latency import Comparison, LatencyTable, Widths, calibrate, measure_table, read_table
from utils.data import ImageData
from utils.distributed import same_everywhere
from utils.errors import UserError, naming
from utils.run_folder import LATENCY_TABLE
from utils.runs import Run

Chosen = tuple[nn.Module, Widths]  # a small network, and the widths of its layers


def obtain_table(
    args: argparse.Namespace,
    network: nn.Module,
    data: ImageData,
    *,
    share: float,
    multiple: int | None,
    narrowest: int,
    chosen_by: Callable[[LatencyTable], Callable[[], Chosen]],
) -> LatencyTable:
    """The table of the run that is resumed, of --budget-table, or one that the main process measures for `share` of the time.

    `multiple` None leaves the channel multiple to the table, for layers of `narrowest` filters at least. `chosen_by(table)()`
    gives the network that a table leads to as it is then.
    """
    recorded = Path(args.resume or "") / LATENCY_TABLE
    if args.resume is not None and recorded.exists():
        return read_table(recorded, flag="--resume", network=network, image=data.example)
    if args.budget_table is not None:
        return read_table(args.budget_table, flag="--budget-table", network=network, image=data.example)
    table = None
    if data.world.is_main:
        setting = {"runtime": args.budget_runtime, "batch_size": args.budget_batch_size, "threads": args.budget_threads}
        with naming(f"--budget-runtime {args.budget_runtime}"):
            table = measure_table(network, data.example, **setting, multiple=multiple, narrowest=narrowest)
        calibrate(table, share, network, chosen_by(table), data.example)
    return same_everywhere([table])[0]


def describe(table: LatencyTable, widths: Widths) -> str:
    """What the table says of the network whose layers have `widths`."""
    seconds = table.seconds(widths)
    return (
        f"latency by {table.runtime}, batch {table.batch_size}, {table.threads} threads, channels in multiples of "
        f"{table.multiple}: dense {1000 * table.dense_seconds:.2f} ms, predicted {1000 * seconds:.2f} ms, "
        f"{seconds / table.dense_seconds:.3f} of it"
    )


def log_chosen(run: Run, table: LatencyTable, network: nn.Module, small: nn.Module, widths: Widths, data: ImageData) -> None:
    """Measures the small network beside the dense one, logs both times, and keeps them with the table in the run's folder."""
    if not data.world.is_main:
        return
    table.measured = {"predicted": table.seconds(widths) / table.dense_seconds}
    run.log(describe(table, widths))
    try:
        table.measured["measured"] = Comparison(table, network, data.example).share_of(small)
        run.log(f"measured here: {table.measured['measured']:.3f} of the dense network's time")
    except UserError as error:  # a table may come from elsewhere
        run.log(f"not measured here: {error}")
    run.save_json(LATENCY_TABLE, asdict(table))
