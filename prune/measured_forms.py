"""Which form trains faster, the small network or the large one with zeros: looked up in what was measured.

The table beside this file is written by `benchmarks.train_forms`. Pruning itself times nothing: a command stays the same
computation wherever it runs, and whatever else runs there.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from models.graph.layers import PrunableLayer
from models.narrow import Selection
from prune.choice import FilterChoice
from utils.errors import UserError
from utils.files import write_atomic

TABLE = Path(__file__).with_suffix(".json")
MULTIPLES = (8, 1)  # of which the numbers of filters are, that the table tells apart
SAME_MACS = 0.05  # shares of multiply-accumulates that are so near count as one
TIME = "compact in masked steps"


@dataclass(frozen=True)
class TrainingStep:
    """What the table knows a training step by: where and how it runs, and the widths of the small network.

    `macs` is what is left of the dense network's multiply-accumulates.
    """

    device: str
    amp: bool
    compiled: bool
    multiple: int
    coupled: bool
    macs: float


def trains_faster_small(choose: FilterChoice, selection: Selection, *, steps: int, amp: bool, compiled: bool) -> bool:
    """Whether the small network that `choose` leaves after the last of `steps` is the faster form; `selection` is the first."""
    if steps > 1:
        selection = choose.without_pass()()
    try:
        macs = selection.macs / choose.graph.costs.dense["macs"]
    except UserError:  # of a network that has no small form, which the proof says of it
        return True
    widths = {"multiple": multiple_of(selection, choose.layers), "coupled": choose.coupled, "macs": macs}
    return is_faster_small(TrainingStep(choose.data.device.type, amp=amp, compiled=compiled, **widths))


def is_faster_small(step: TrainingStep, *, table: Path = TABLE) -> bool:
    """Whether training the small network takes less time than the large one with zeros.

    It does if it did on every machine that measured such a step with as many multiply-accumulates left, or the next more; where
    none did, it is taken not to. A machine that only measured less of a network says no if even the most of that was slower.
    Widths that were not measured count as odd ones.
    """
    alike = [
        row for row in _read(table) if all(row[key] == getattr(step, key) for key in ("device", "amp", "compiled", "coupled"))
    ]
    own = [row for row in alike if row["multiple"] == step.multiple] or [row for row in alike if row["multiple"] == 1]
    nearest: dict[tuple[str, str], Mapping[str, Any]] = {}
    largest: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in sorted(own, key=lambda row: -row["macs"]):
        place = row["hardware"], row["network"]
        largest.setdefault(place, row)
        if row["macs"] + SAME_MACS >= step.macs:
            nearest[place] = row
    return bool(nearest) and all(row[TIME] < 1 for row in {**largest, **nearest}.values())


def multiple_of(selection: Selection, layers: Sequence[PrunableLayer]) -> int:
    """The largest of `MULTIPLES` of which all `layers` that lose filters keep as many."""
    widths = [len(selection.kept[layer.name]) for layer in layers if layer.name in selection.kept]
    return next(multiple for multiple in MULTIPLES if all(width % multiple == 0 for width in widths))


def record(times: Mapping[TrainingStep, float], *, hardware: str, network: str, table: Path = TABLE) -> None:
    """Puts the `times` of the compact form, in masked steps, into the table, in the place of those that it had of the same."""
    rows = {_key(row): row for row in (_read(table) if table.exists() else [])}
    for step, taken in times.items():
        row = {"hardware": hardware, "network": network, **asdict(step), TIME: taken}
        rows[_key(row)] = row
    write_atomic(table, ("[\n  " + ",\n  ".join(map(json.dumps, rows.values())) + "\n]\n").encode())
    _read.cache_clear()


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(value for name, value in row.items() if name != TIME)


@cache
def _read(table: Path) -> list[dict[str, Any]]:
    return json.loads(table.read_text())
