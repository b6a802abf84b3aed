"""A budget of time: where its table of latencies comes from, and what is said of the network that it leads to."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torch import nn

from deploy.latency import TOLERANCE, LatencyTable, NoisyTimes, RelativeTimer, Widths, calibrate, measure_table, read_table
from deploy.settings import LatencySettings
from utils.distributed import from_main
from utils.errors import ParameterError, UserError, naming
from utils.images.batches import ImageData
from utils.runs.folder import LATENCY_TABLE
from utils.runs.run import Run
from utils.seed import preserved_random_state

Chosen = tuple[nn.Module, Widths]  # a small network, and the widths of its layers


@preserved_random_state()
def obtain_table(
    settings: LatencySettings,
    network: nn.Module,
    data: ImageData,
    *,
    recorded: Path | None,
    share: float,
    multiple: int | None,
    narrowest: int,
    chosen_by: Callable[[LatencyTable], Callable[[], Chosen]],
) -> LatencyTable:
    """The table `recorded` in a run that goes on, that of a file, or one that the main process measures for `share` of the time.

    Wherever it comes from, the global random streams stay as they were: what follows is the same computation.

    `multiple` None leaves the channel multiple to the table, for layers of `narrowest` filters at least. `chosen_by(table)()`
    gives the network that a table leads to as it is then.
    """
    if recorded is not None:
        return read_table(recorded, flag="--resume", network=network, image=data.example)
    if settings.table is not None:
        table = read_table(settings.table, flag="--budget-table", network=network, image=data.example)
        if multiple is None and not table.sweep:
            raise ParameterError(
                "multiple",
                "auto",
                f"the table {settings.table} did not look for the best one, it has widths in multiples of {table.multiple}; "
                "give a number",
            )
        return table

    def measured() -> LatencyTable:
        setting = {"runtime": settings.runtime, "batch_size": settings.batch_size, "threads": settings.threads}
        with naming(f"--budget-runtime {settings.runtime}"):
            found = measure_table(network, data.example, **setting, multiple=multiple, narrowest=narrowest)
        try:
            calibrate(found, share, network, chosen_by(found), data.example)
        except NoisyTimes as error:
            way_out = "measure on a quiet machine, or give another run's table by --budget-table"
            raise ParameterError("budget", f"latency={share:g}", f"{error}; {way_out}") from error
        return found

    return from_main(measured)


def describe(table: LatencyTable, widths: Widths, *, multiple: int) -> str:
    """What the table says of the network whose layers have `widths`, of which those that lose channels are multiples."""
    seconds = table.seconds(widths)
    return (
        f"latency by {table.runtime}, batch {table.batch_size}, {table.threads} threads, channels in multiples of "
        f"{multiple}: dense {1000 * table.dense_seconds:.2f} ms, predicted {1000 * seconds:.2f} ms, "
        f"{seconds / table.dense_seconds:.3f} of it"
    )


def log_chosen(
    run: Run, table: LatencyTable, network: nn.Module, chosen: Chosen, *, share: float, multiple: int, data: ImageData
) -> None:
    """Measures the `chosen` network beside the dense one, logs both times, and keeps them with the table in the run's folder.

    Where it takes more than its `share` by more than the tolerance, that is a warning: it may be another criterion's choice
    than the one by which the table was set, or another machine's.
    """
    if not data.world.is_main:
        return
    small, widths = chosen
    table.measured = {"predicted": table.seconds(widths) / table.dense_seconds}
    run.log(describe(table, widths, multiple=multiple))
    try:
        taken = table.measured["measured"] = RelativeTimer(table, network, data.example).share_of(small)
        if taken > share + TOLERANCE * share:
            run.warn(f"--budget latency={share:g}: the network takes {taken:.3f} of the dense one's time here")
        run.log(f"measured here: {table.measured['measured']:.3f} of the dense network's time")
    except UserError as error:  # a table may come from elsewhere
        run.log(f"not measured here: {error}")
    run.save_json(LATENCY_TABLE, asdict(table))
