"""Fair timings on a noisy machine: what is compared runs in turn, and ratios are taken within one round."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

PAUSE_SECONDS = 0.05  # until the threads of one runtime no longer wait for work in a loop, which would slow the next one


def interleaved_seconds(
    functions: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    rounds: int,
    warmups: int = 2,
    pausing: bool = False,
) -> dict[str, list[float]]:
    """Seconds of each function in each of `rounds` rounds, in which all of them run one after the other.

    Whatever else happens on the machine thus meets all of them alike. Each waits for the device's work. With
    `pausing` the threads of one fall asleep before the next begins, on a CPU, where they would take its time.
    """
    stopwatches = {name: partial(seconds_of, function, device=device) for name, function in functions.items()}
    return interleaved(stopwatches, rounds=rounds, warmups=warmups, pause_seconds=_pause_seconds(pausing, device))


def _pause_seconds(pausing: bool, device: torch.device) -> float:
    return PAUSE_SECONDS if pausing and device.type == "cpu" else 0.0


def interleaved(
    stopwatches: Mapping[Any, Callable[[], float]], *, rounds: int, warmups: int = 2, pause_seconds: float = 0.0
) -> dict[str, list[float]]:
    """What `interleaved_seconds` gives, of functions that return the seconds they took.

    With a pause before each of them, for threads of the last one to fall asleep, it runs once more in advance, to wake its own.
    """
    seconds: dict[str, list[float]] = {name: [] for name in stopwatches}
    for index in range(-warmups, rounds):
        for name, stopwatch in stopwatches.items():
            if pause_seconds:
                time.sleep(pause_seconds)
                stopwatch()
            taken = stopwatch()
            if index >= 0:
                seconds[name].append(taken)
    return seconds


def seconds_of(function: Callable[[], object], *, device: torch.device) -> float:
    _synchronise(device)
    began = time.perf_counter()
    function()
    _synchronise(device)
    return time.perf_counter() - began


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ratio(seconds: Sequence[float], unit: Sequence[float]) -> float:
    """The median over rounds of one time in units of another that was measured in the same round."""
    return statistics.median(own / other for own, other in zip(seconds, unit, strict=True))


def spread(values: Sequence[float]) -> float:
    """The distance between the quartiles of positive numbers, in units of their median."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float((high - low) / middle)


def timed_in_turn(
    functions: Mapping[Any, Callable[[], object]],
    *,
    device: torch.device,
    rounds: int,
    least_seconds: float = 5e-4,
    pausing: bool = False,
) -> dict[Any, list[float]]:
    """As `interleaved_seconds`, of functions that may take microseconds: short ones run several times in a measurement."""
    stopwatches = {}
    for name, function in functions.items():
        time.sleep(_pause_seconds(pausing, device))
        function()
        taken = seconds_of(function, device=device)
        repeats = min(100, max(1, round(least_seconds / max(taken, 1e-9))))
        stopwatches[name] = partial(_mean_seconds, function, repeats, device=device)
    return interleaved(stopwatches, rounds=rounds, warmups=0, pause_seconds=_pause_seconds(pausing, device))


def _mean_seconds(function: Callable[[], object], repeats: int, *, device: torch.device) -> float:
    def all_of_them() -> None:
        for _ in range(repeats):
            function()

    return seconds_of(all_of_them, device=device) / repeats


def idle_share(function: Callable[[], object], *, device: torch.device, seconds: float, repeats: int = 5) -> float | None:
    """How much of the `seconds` that `function` takes a CUDA device runs nothing; None on other devices.

    What it runs is seen by the profiler, which makes the host slower but not the device: hence `seconds`, taken without it.
    """
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(repeats):
            function()
        _synchronise(device)
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = covered([(event.time_range.start, event.time_range.end) for event in on_device]) / 1e6  # from microseconds
    return max(0.0, 1 - busy / repeats / seconds)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length that intervals cover together, wherever they overlap."""
    total, reached = 0.0, -math.inf
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
