"""Which figures of a run's summary.json a report shows, and where the entry scripts put them."""

from collections.abc import Mapping, Sequence
from typing import Any

from utils.errors import UserError, shown

LATENCY_BATCH = 64
REQUIRED = ("last_top1", "best_top1")
LARGEST, SHORTEST_MS = 1e24, 1e-6  # of any measure, of a latency
SIZES = ("parameters", "macs", "dense_macs", "dense_bytes", "compact_bytes", "archive_bytes")  # which no network lacks
# Places by measure; the first that is there counts. Accuracies in percent.
PLACES: dict[str, Sequence[tuple[str, ...]]] = {
    "last_top1": [("last", "top1")],
    "best_top1": [("best", "top1")],
    "reference_top1": [("teacher", "top1"), ("accuracy", "original", "top1")],
    "parameters": [("compact", "compact", "parameters"), ("parameters",)],
    "macs": [("compact", "compact", "macs"), ("macs",)],
    "dense_macs": [("compact", "dense", "macs"), ("macs",)],
    "dense_bytes": [("compact", "dense", "file_bytes"), ("checkpoint_bytes",)],
    "compact_bytes": [("compact", "compact", "file_bytes")],
    "archive_bytes": [("archive", "file_bytes")],
    "archive_payload_bytes": [("archive", "total", "payload_bytes")],
    "archive_coded_bytes": [("archive", "total", "coded_bytes")],
    "archive_uncoded_bytes": [("archive", "uncoded_bytes")],
    "archive_overhead_bytes": [("archive", "overhead_bytes")],
    "latency_ms": [("compact", "compact", "latency", str(LATENCY_BATCH), "median_ms")],
    "dense_latency_ms": [("compact", "dense", "latency", str(LATENCY_BATCH), "median_ms")],
    "seconds": [("seconds",)],
    "training_flops": [("training_flops",)],
}


def measures_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """The measures that a summary.json has, and those that follow from them.

    Raises UserError if an accuracy is missing, or anything that is there is no number that it can be.
    """
    found = {name: _first(summary, places, name) for name, places in PLACES.items()}
    measures = {name: value for name, value in found.items() if value is not None}
    for name in REQUIRED:
        if name not in measures:
            raise UserError(f"its summary is damaged: no {'.'.join(PLACES[name][0])}")
    for name in SIZES:
        if measures.get(name) == 0:
            raise UserError(f"its summary is damaged: {name} of 0")
    return measures | _derived(measures)


def _first(summary: Mapping[str, Any], places: Sequence[tuple[str, ...]], name: str) -> float | None:
    for place in places:
        value: Any = summary
        for key in place:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            return _number(value, ".".join(place), largest=100 if name.endswith("top1") else LARGEST)
    return None


def _number(value: Any, place: str, *, largest: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= largest:
        raise UserError(f"its summary is damaged: {place} is {shown(value)}, not a number from 0 to {largest:g}")
    return float(value)


def _derived(measures: Mapping[str, float]) -> dict[str, float]:
    derived = {}
    if "reference_top1" in measures:
        derived["drop"] = measures["reference_top1"] - measures["last_top1"]
    if {"latency_ms", "dense_latency_ms"} <= measures.keys():
        if measures["latency_ms"] < SHORTEST_MS:
            raise UserError(f"its summary is damaged: a latency of {measures['latency_ms']:g} ms")
        derived["speedup"] = measures["dense_latency_ms"] / measures["latency_ms"]
    if "seconds" in measures:
        derived["minutes"] = measures["seconds"] / 60
    if "training_flops" in measures:
        derived["training_pflops"] = measures["training_flops"] / 1e15
    if "archive_coded_bytes" in measures:
        derived["archive_codebook_bytes"] = measures["archive_coded_bytes"] - measures["archive_payload_bytes"]
    return derived
