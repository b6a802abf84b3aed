"""What a network with fewer channels will take: a table of its layers at the widths they may have, measured where it will run.

Layers that differ in nothing but their widths share one grid of times, over input and output channels. The time of a network is
that of the dense one, less `slope` times what its narrower layers save by the table. The slope stands for all that happens
between layers; it begins as dense time over the sum of the dense layers, and is set anew after a small network was measured.
"""

import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deploy.layers import LayerKind, kinds_of_layers, layer_runner, random_input
from deploy.runtimes import RUNTIMES, Runner, round_seconds
from utils.errors import ParameterError, UserError, shown
from utils.files import read_json
from utils.runs.environment import cpu_name
from utils.timing import median_ratio, spread, timed_in_turn

FRACTIONS = (0.1, 0.25, 0.45, 0.65, 0.85, 1.0)  # of a layer's channels: the widths at which it is measured
MULTIPLES = (1, 2, 4, 8, 16, 32)
SWEEP_CHANNELS = 16  # to both sides of half the width: where the best multiple shows
SAME_TIME, NEGLIGIBLE = 1.02, 0.01  # a time that is no more than this beside another; a share of channels
SWEEPS, ROUNDS, NETWORK_ROUNDS = 2, 3, 15
CORRECTIONS = 6  # of the slope at most
TOLERANCE = 0.05  # of a budget of time
WIDEST_SPREAD, ATTEMPTS = 0.2, 3  # between the quartiles of 15 ratios: their median is then right to about the tolerance

Widths = Mapping[str, tuple[int, int]]  # by layer: input and output channels


@dataclass
class LatencyTable:
    """Seconds of the layers of a network by their widths, in one runtime on one machine.

    `layers` names the kind of each layer and its full widths, `grids` has for each kind the measured input and output widths
    and the times (inputs, outputs). `multiple` is the channel multiple that it was measured for. `measured` says what the
    network that was chosen takes.
    """

    runtime: str
    batch_size: int
    threads: int
    hardware: str
    multiple: int
    dense_seconds: float
    slope: float
    layers: dict[str, tuple[str, int, int]]
    grids: dict[str, tuple[list[int], list[int], list[list[float]]]]
    sweep: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)

    def seconds(self, widths: Widths) -> float:
        """Of the network whose layers have `widths`; one that is not named has its full ones."""
        saved = sum(
            self._of_layer(kind, *full) - self._of_layer(kind, *widths[name])
            for name, (kind, *full) in self.layers.items()
            if name in widths
        )
        return self.dense_seconds - self.slope * saved

    def _of_layer(self, kind: str, inputs: int, outputs: int) -> float:
        """Between the measured widths: linear in both."""
        rows, columns, times = self.grids[kind]
        along = [np.interp(outputs, columns, row) for row in times]
        return float(np.interp(inputs, rows, along))

    def sum_of_layers(self) -> float:
        return sum(self._of_layer(*layer) for layer in self.layers.values())


def measure_table(
    network: nn.Module, image: Tensor, *, runtime: str, batch_size: int, threads: int | None, multiple: int | None, narrowest: int
) -> LatencyTable:
    """Measures `network`, in evaluation, and its layers for `batch_size` copies of `image` (1, C, H, W), on its device.

    `threads` None means as many as PyTorch has. With `multiple` None the table looks for the best one up to half of
    `narrowest`, the fewest filters of a layer that is pruned. Raises UserError where the runtime is missing.
    """
    network, image = _where_it_runs(network, runtime), image if runtime == "torch" else image.cpu()
    images = _batch(image, batch_size)
    with _threads(threads):
        runner = {"dense": RUNTIMES[runtime](network, _batch(image, 2))}
        dense = float(np.median(round_seconds(runner, images, rounds=NETWORK_ROUNDS)["dense"]))
        layers = kinds_of_layers(network, images)
        sweep = {}
        if multiple is None:
            sweep = _sweep(_heaviest(layers), runtime, images)
            multiple = best_multiple({int(width): seconds for width, seconds in sweep.items()}, narrowest=narrowest)
        grids = _grids(layers, runtime, images, multiple=multiple)
        table = LatencyTable(
            runtime=runtime,
            batch_size=batch_size,
            threads=torch.get_num_threads(),
            hardware=torch.cuda.get_device_name(image.device) if image.is_cuda else cpu_name(),
            multiple=multiple,
            dense_seconds=dense,
            slope=1.0,
            layers={name: (kind.key, kind.inputs, kind.outputs) for name, kind in layers.items()},
            grids=grids,
            sweep=sweep,
        )
    table.slope = dense / table.sum_of_layers()
    return table


def _where_it_runs(network: nn.Module, runtime: str) -> nn.Module:
    """A copy in evaluation: for PyTorch on the network's device, for the others on the CPU."""
    copied = copy.deepcopy(network).eval()
    return copied if runtime == "torch" else copied.cpu()


def _batch(image: Tensor, size: int) -> Tensor:
    """(size, C, H, W) of one image; two for tracing at least, which takes one for a constant."""
    return image[:1].expand(max(2, size), -1, -1, -1).contiguous(memory_format=torch.channels_last)[:size]


def _grids(
    layers: Mapping[str, LayerKind], runtime: str, images: Tensor, *, multiple: int
) -> dict[str, tuple[list[int], list[int], list[list[float]]]]:
    """The times of each kind of layer on the grid of its widths: medians over sweeps, which other kinds lie between."""
    kinds = _widest(layers)
    samples: dict[tuple[str, int, int], list[float]] = {}
    for _ in range(SWEEPS):
        for key, kind in kinds.items():
            draw = cache(random_input)
            runners = {
                (key, inputs, outputs): layer_runner(kind, inputs, outputs, runtime, images, draw=draw)
                for inputs, outputs in kind.pairs(measured_widths(kind.inputs, multiple), measured_widths(kind.outputs, multiple))
            }
            for place, times in _timed(runners, runtime, images, rounds=ROUNDS).items():
                samples.setdefault(place, []).extend(times)
    grids = {}
    for key, kind in kinds.items():
        inputs, outputs = measured_widths(kind.inputs, multiple), measured_widths(kind.outputs, multiple)
        times = [[float(np.median(samples[(key, *kind.pair(row, column))])) for column in outputs] for row in inputs]
        grids[key] = (inputs, outputs, rising(times))
    return grids


def _timed(runners: Mapping[Any, Callable[[], object]], runtime: str, images: Tensor, *, rounds: int) -> dict[Any, list[float]]:
    """The runners in turn, each with its own threads awake and no others: PyTorch's are shared, a session has its own."""
    pausing = runtime != "torch" and torch.get_num_threads() > 1
    return timed_in_turn(runners, device=images.device, rounds=rounds, pausing=pausing)


def _widest(layers: Mapping[str, LayerKind]) -> dict[str, LayerKind]:
    """One layer of each kind, with the most channels that any of them has on either side."""
    found: dict[str, LayerKind] = {}
    for kind in layers.values():
        other = found.get(kind.key, kind)
        found[kind.key] = replace(kind, inputs=max(kind.inputs, other.inputs), outputs=max(kind.outputs, other.outputs))
    return found


def measured_widths(full: int, multiple: int) -> list[int]:
    """Up to six widths from about a tenth to all channels, multiples of `multiple` but the last."""
    rounded = {min(full, multiple * max(1, round(full * fraction / multiple))) for fraction in FRACTIONS}
    return sorted(rounded | {full})


def rising(times: Sequence[Sequence[float]]) -> list[list[float]]:
    """No wider layer is faster than a narrower one: what says so is noise, or a reason to take the wider one's time for both."""
    values = np.asarray(times, dtype=float)
    for axis in (0, 1):
        values = np.flip(np.minimum.accumulate(np.flip(values, axis), axis), axis)
    return values.tolist()


def _heaviest(layers: Mapping[str, LayerKind]) -> LayerKind:
    work: dict[str, int] = {}
    for kind in layers.values():
        work[kind.key] = work.get(kind.key, 0) + kind.macs
    heaviest = max(work, key=work.__getitem__)
    return max((kind for kind in layers.values() if kind.key == heaviest), key=lambda kind: kind.macs)


def _sweep(kind: LayerKind, runtime: str, images: Tensor) -> dict[str, float]:
    """Seconds of one kind of layer with as many outputs as inputs, channel by channel around half its width."""
    half = min(kind.inputs, kind.outputs) // 2
    widths = range(max(1, half // 2, half - SWEEP_CHANNELS), min(2 * half, half + SWEEP_CHANNELS) + 1)
    runners = {str(width): layer_runner(kind, width, width, runtime, images) for width in widths}
    times = _timed(runners, runtime, images, rounds=SWEEPS * ROUNDS)
    return {width: float(np.median(values)) for width, values in times.items()}


def best_multiple(sweep: Mapping[int, float], *, narrowest: int) -> int:
    """The least multiple of which hardly any width could be a larger one in the same time: such widths are wasted steps.

    `sweep` holds seconds by width. At least two multiples fit into the `narrowest` layer.
    """
    wasted = {
        width: max(other for other in sweep if other >= width and sweep[other] <= SAME_TIME * seconds) / width - 1
        for width, seconds in sweep.items()
    }
    means = {}
    for multiple in MULTIPLES:
        widths = [width for width in wasted if width % multiple == 0]
        if widths and (multiple == 1 or 2 * multiple <= narrowest):
            means[multiple] = sum(wasted[width] for width in widths) / len(widths)
    return next(multiple for multiple, mean in means.items() if mean <= min(means.values()) + NEGLIGIBLE)


def calibrate(
    table: LatencyTable, share: float, dense: nn.Module, small: Callable[[], tuple[nn.Module, Widths]], image: Tensor
) -> None:
    """Sets the slope of `table` so that what it allows for `share` of the dense time takes that time.

    `small()` gives the network, in evaluation, that is chosen by the table as it is then, and the widths of its layers. Each is
    measured beside `dense`: the steeper the slope, the less is pruned. One that seems to be right is measured once more, and
    the mean counts: noise that happens to be kind ends no search. In the end the slope of the slowest network within the
    budget stays, or of the fastest. Raises UserError if that is slower than the tolerance allows.
    """

    def is_right(taken: float) -> bool:
        return share - TOLERANCE * share <= taken <= share

    found: dict[float, float] = {}  # the share that was measured, by slope; 0 where a tenth of each layer seemed too slow
    beside = RelativeTimer(table, dense, image)
    for _ in range(CORRECTIONS + 1):
        try:
            network, widths = small()
        except UserError:
            if not found:
                raise
            found[table.slope] = 0.0
        else:
            saved = (table.dense_seconds - table.seconds(widths)) / table.slope
            taken = beside.share_of(network)
            if is_right(taken):
                taken = (taken + beside.share_of(network)) / 2
            found[table.slope] = taken
            if is_right(taken):
                return
        within, above = [s for s, taken in found.items() if taken <= share], [s for s, taken in found.items() if taken > share]
        if within and above:
            table.slope = (max(within) + min(above)) / 2
        else:
            table.slope = max(1 - taken, 0.01) * table.dense_seconds / saved
    usable = {slope: taken for slope, taken in found.items() if taken}
    table.slope = max(usable, key=lambda slope: (usable[slope] <= share, -abs(share - usable[slope])))
    if usable[table.slope] > share + TOLERANCE * share:
        least = math.ceil(1000 * usable[table.slope]) / 1000
        reason = f"no network was measured to be so fast here, latency={least:g} is the least"
        raise ParameterError("budget", f"latency={share:g}", reason)


class NoisyTimes(UserError):
    """Times vary so much from round to round that no budget can be met by them: something else runs on the machine."""


class RelativeTimer:
    """Measures networks beside `dense` in the runtime of `table`."""

    def __init__(self, table: LatencyTable, dense: nn.Module, image: Tensor):
        self._table, self._image = table, image if table.runtime == "torch" else image.cpu()
        self._dense = self._runner(dense)

    def _runner(self, network: nn.Module) -> Runner:
        with _threads(self._table.threads):
            return RUNTIMES[self._table.runtime](_where_it_runs(network, self._table.runtime), _batch(self._image, 2))

    def share_of(self, network: nn.Module) -> float:
        """The time of `network` in units of the dense one's, in interleaved rounds. Raises NoisyTimes where they vary much."""
        runners, found = {"dense": self._dense, "small": self._runner(network)}, []
        for _ in range(ATTEMPTS):
            with _threads(self._table.threads):
                seconds = round_seconds(runners, _batch(self._image, self._table.batch_size), rounds=NETWORK_ROUNDS)
            found.append(spread([small / dense for small, dense in zip(seconds["small"], seconds["dense"], strict=True)]))
            if found[-1] <= WIDEST_SPREAD:
                return median_ratio(seconds["small"], seconds["dense"])
        reason = (
            f"by {100 * min(found):.0f} % of their median between quartiles, at most {100 * WIDEST_SPREAD:.0f} % can be trusted"
        )
        raise NoisyTimes(f"times vary from round to round {reason}: something else runs on this machine")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _is_width(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def read_table(path: str | os.PathLike, *, flag: str, network: nn.Module, image: Tensor) -> LatencyTable:
    """A table that a run left. Raises UserError for anything else, and for the table of another network."""
    origin = f"{flag} {path}"
    document = read_json(path, flag=flag)
    try:
        table = LatencyTable(**document)
        table.layers = {
            str(name): (str(kind), int(inputs), int(outputs)) for name, (kind, inputs, outputs) in table.layers.items()
        }
        for inputs, outputs, times in table.grids.values():
            values = np.asarray(times, dtype=float)
            if values.shape != (len(inputs), len(outputs)) or not (values > 0).all() or not np.isfinite(values).all():
                raise ValueError("its times do not fit their widths")
            if not all(map(_is_width, (*inputs, *outputs))):
                raise ValueError("one of its widths is no number of channels")
            if sorted(set(inputs)) != inputs or sorted(set(outputs)) != outputs:
                raise ValueError("its widths do not rise")
        numbers = (table.dense_seconds, table.slope, table.batch_size, table.threads, table.multiple)
        if not all(isinstance(value, int | float) and math.isfinite(value) and value > 0 for value in numbers):
            raise ValueError(f"one of {numbers} is no positive number")
        table.batch_size, table.threads, table.multiple = int(table.batch_size), int(table.threads), int(table.multiple)
        if table.runtime not in RUNTIMES or not {kind for kind, *_ in table.layers.values()} <= table.grids.keys():
            raise ValueError("it names a runtime or a layer that is not known")
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        raise UserError(f"{origin}: is no table of latencies as runs leave it: {shown(str(error), 100)}") from error
    expected = {name: (kind.key, kind.inputs, kind.outputs) for name, kind in kinds_of_layers(network, image).items()}
    different = [name for name in expected.keys() | table.layers.keys() if expected.get(name) != table.layers.get(name)]
    if different:
        raise UserError(f"{origin}: is of another network or image size, its layer {shown(min(different), 60)} is another")
    return table
