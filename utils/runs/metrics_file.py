"""metrics.jsonl: what a run recorded, a line an epoch and split."""

import math
from itertools import zip_longest
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.runs.folder import METRICS
from utils.untrusted import MAX_TEXT_BYTES, parse_json, read_whole

SPLITS = ("train", "test")
REMEDY = "put back a copy of it to go on"


class TornLine(ValueError):
    """A line that is no JSON, as one that was cut off."""


def read_metrics(folder: Path, *, skip_damaged: bool = False) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last one that was cut off by a crash is passed over.

    Raises UserError, with the number of the line, for any other that is no record of an epoch; `skip_damaged` passes over
    those as well, for who only wants to see what there is.
    """
    path = folder / METRICS
    try:
        *whole, torn = read_whole(path, limit=MAX_TEXT_BYTES).split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except UserError as error:
        raise UserError(f"{path} {error}") from error
    records = []
    for number, line in enumerate([*whole, torn], start=1):
        try:
            records.append(_record(line))
        except (ValueError, OverflowError, RecursionError) as error:
            is_torn = number > len(whole) and isinstance(error, TornLine)
            if not skip_damaged and not is_torn:
                raise UserError(f"{path} is damaged in line {number}: {error}; {REMEDY}") from error
    return records


def _record(line: bytes) -> dict[str, Any]:
    """Raises ValueError for a line that no run writes."""
    try:
        record = parse_json(line)
    except UserError as error:
        raise ValueError(str(error)) from error
    except ValueError:
        raise TornLine("no JSON") from None
    check_record(record)
    return record


def check_record(record: Any) -> None:
    """Raises ValueError for what is no record of an epoch."""
    if not isinstance(record, dict):
        raise ValueError("no record of an epoch")
    epoch, split = record.get("epoch"), record.get("split")
    if type(epoch) is not int or epoch < 0 or not isinstance(split, str) or "seconds" not in record:
        raise ValueError("epoch, split or seconds is missing or wrong")
    values = [value for name, value in record.items() if name != "split"]
    if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise ValueError("a value is no finite number")


def known_metrics(folder: Path, *, epochs: int) -> list[dict[str, Any]]:
    """The lines of the first `epochs` epochs, those that a saved state knows.

    Raises UserError if a line is damaged, missing, or there twice.
    """
    records = [record for record in read_metrics(folder) if record["epoch"] < epochs]
    found = [(record["epoch"], record["split"]) for record in records if record["split"] in SPLITS]
    expected = [(epoch, split) for epoch in range(epochs) for split in SPLITS]
    if found != expected:
        epoch, split = next(want or have for want, have in zip_longest(expected, found) if want != have)
        where = f"the {split} line of epoch {epoch}, counted from 0,"
        raise UserError(f"{folder / METRICS} is damaged: {where} is missing, out of place or there twice; {REMEDY}")
    return records
