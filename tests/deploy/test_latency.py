"""Budgets of time: what the table says between its measurements, the slope that is set by real networks, files of tables."""

import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deploy import latency, layers
from deploy.budget import obtain_table
from deploy.latency import LatencyTable, best_multiple, calibrate, measured_widths, read_table, rising
from deploy.layers import LayerKind, kinds_of_layers, layer_runner
from deploy.settings import LatencySettings
from models import build_model
from models.graph import ChannelGraph
from prune.choice import FilterChoice
from prune.masks import keep_ratios
from prune.settings import Budget
from utils.errors import UserError

IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def table(**values):
    """Of a dense network of 200 s with two layers of one kind, which take a second for each pair of input and output."""
    grid = ([2, 8], [2, 4, 8], [[4.0, 8.0, 16.0], [16.0, 32.0, 64.0]])
    fields = {"runtime": "torch", "batch_size": 4, "threads": 1, "hardware": "here", "multiple": 1, "dense_seconds": 200.0}
    fields |= {"slope": 2.0, "layers": {"a": ("conv", 4, 8), "b": ("conv", 8, 8)}, "grids": {"conv": grid}}
    return LatencyTable(**{**fields, **values})


def test_the_time_of_a_network_is_that_of_the_dense_one_less_what_its_layers_save():
    times = table()
    assert times.sum_of_layers() == 4 * 8 + 8 * 8
    assert times.seconds({}) == times.seconds({"a": (4, 8), "b": (8, 8)}) == 200
    assert times.seconds({"a": (4, 4), "b": (4, 8)}) == 200 - 2 * (4 * 4 + 4 * 8)
    assert times.seconds({"b": (5, 3)}) == 200 - 2 * (64 - 15)  # between the measured widths; linear in both is exact here
    assert times.seconds({"unknown": (1, 1)}) == 200


@pytest.mark.parametrize(
    ("full", "multiple", "widths"),
    [
        (16, 1, [2, 4, 7, 10, 14, 16]),
        (64, 8, [8, 16, 32, 40, 56, 64]),
        (10, 8, [8, 10]),
        (3, 1, [1, 2, 3]),
        (1, 4, [1]),
    ],
)
def test_widths_from_a_tenth_to_all(full, multiple, widths):
    assert measured_widths(full, multiple) == widths


@given(st.lists(st.lists(st.floats(0.1, 10), min_size=3, max_size=3), min_size=1, max_size=4))
def test_no_wider_layer_is_faster(times):
    found = torch.tensor(rising(times), dtype=torch.float64)
    assert (found.diff(dim=0) >= 0).all() and (found.diff(dim=1) >= 0).all()
    assert (found <= torch.tensor(times, dtype=torch.float64)).all()
    assert rising(found.tolist()) == found.tolist()


@pytest.mark.parametrize(("block", "narrowest", "expected"), [(1, 64, 1), (2, 64, 2), (8, 64, 8), (8, 12, 4), (16, 64, 16)])
def test_the_best_multiple_is_that_of_the_steps(block, narrowest, expected):
    sweep = {width: math.ceil(width / block) * (1 + 1e-3 * (width % 3)) for width in range(16, 49)}
    assert best_multiple(sweep, narrowest=narrowest) == expected


def test_layers_that_differ_in_width_alone_are_of_one_kind():
    kinds = kinds_of_layers(build_model("resnet20", num_classes=10), IMAGE.expand(2, -1, -1, -1))
    assert len(kinds) == 20 and len({kind.key for kind in kinds.values()}) == 6
    first, later = kinds["conv_1_3x3"], kinds["stage_1.0.conv_a"]
    assert (first.key, first.inputs, first.outputs) == (later.key, 3, 16)
    assert "stride (2, 2)" in kinds["stage_2.0.conv_a"].key and kinds["stage_2.0.conv_a"].size == (32, 32)
    assert sum(kind.macs for kind in kinds.values()) == 40_551_040  # as utils.profile counts them
    assert kinds["classifier"].key == "linear, 1 vectors"


@pytest.mark.parametrize(
    ("kind", "widths"),
    [
        (LayerKind(8, 6, (9, 7), (3, 3), (2, 1), ((1, 1), (1, 1)), (1, 1)), (8, 6)),
        (LayerKind(8, 6, (9, 7), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), has_norm=True), (4, 3)),
        (LayerKind(8, 8, (6, 6), (4, 2), (1, 1), ((1, 2), (0, 1)), (1, 1)), (8, 5)),
        (LayerKind(8, 8, (9, 9), (3, 3), (1, 1), ((2, 2), (2, 2)), (2, 2), groups=2), (4, 6)),
        (LayerKind(8, 8, (5, 5), (5, 5), (1, 1), ((2, 2), (2, 2)), (1, 1), groups=0, has_norm=True), (3, 3)),
        (LayerKind(12, 10, (7,)), (5, 4)),
    ],
    ids=lambda value: value.key if isinstance(value, LayerKind) else str(value),
)
def test_a_single_layer_computes_the_same_in_every_runtime(kind, widths, monkeypatch):
    pytest.importorskip("onnxruntime")
    results = []
    for runtime in ("torch", "onnxruntime"):
        torch.manual_seed(0)  # the same input, and then the same weights
        if runtime == "torch" and kind.has_norm:  # new running statistics change nothing but for the constant in the root
            monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda norm, x: x)
        if kind.has_norm:
            monkeypatch.setattr(layers, "_module", with_bias(layers._module))
        results.append(torch.as_tensor(layer_runner(kind, *widths, runtime, torch.empty(2, 3, 4, 4))()))
        monkeypatch.undo()
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert results[0].shape[2 if kind.is_linear else 1] == widths[1]


def with_bias(module):
    """Layers are given a bias where a norm would follow, as they have one once the norm is part of their weights."""

    def build(kind):
        found = module(LayerKind(**{**asdict(kind), "has_norm": False}))
        return nn.Sequential(*found, nn.ReLU()) if kind.has_norm else found

    return build


LAWS = {"proportional": lambda work: work, "with a constant": lambda work: 0.3 + 0.7 * work, "root": lambda work: work**0.5}


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("law", LAWS)
def test_the_slope_is_set_until_the_network_takes_what_it_may(share, law, monkeypatch):
    """The machine's times follow a law of the work that is left, which the table does not know."""
    network, images = build_model("resnet8", num_classes=10).eval(), IMAGE.expand(2, -1, -1, -1)
    kinds = kinds_of_layers(network, images)
    widths = {kind.key: [measured_widths(width, 1) for width in (kind.inputs, kind.outputs)] for kind in kinds.values()}
    widths["conv 3x3 of 32x32, stride (1, 1), padding ((1, 1), (1, 1)), dilation (1, 1), with norm"] = [list(range(1, 17))] * 2
    grids = {key: (rows, columns, [[i * o for o in columns] for i in rows]) for key, (rows, columns) in widths.items()}
    full = {name: (kind.key, kind.inputs, kind.outputs) for name, kind in kinds.items()}
    times = table(dense_seconds=1.0, layers=full, grids=grids)
    times.slope = 1.0 / times.sum_of_layers()
    graph = ChannelGraph(network, images)
    prunable = graph.prunable_layers()
    setting = {"criterion": "filter-a", "data": SimpleNamespace(example=images), "seed": 0, "coupled": True}

    def small():
        ratios, budget = keep_ratios(prunable, None), Budget("latency", share)
        choose = FilterChoice(graph, prunable, ratios, **setting, budget=budget, seconds=times.seconds)
        return choose.outcome()

    def share_of(small):
        work = {name: layer.weight.shape[:2].numel() for name, layer in small.named_modules() if name in full}
        return LAWS[law](sum(work.values()) / sum(inputs * outputs for _, inputs, outputs in full.values()))

    monkeypatch.setattr(
        latency, "round_seconds", lambda runners, *_, **__: {"dense": [7.0], "small": [7 * share_of(runners.get("small"))]}
    )
    monkeypatch.setattr(latency, "RUNTIMES", {"torch": lambda network, images: network})
    if LAWS[law](0.02) > share:  # about what a tenth of each layer takes
        with pytest.raises(UserError, match=r"budget latency=0\.3: no network .* latency=0\.3\d* is the least"):
            calibrate(times, share, network, small, IMAGE)
        return
    calibrate(times, share, network, small, IMAGE)
    found, left = small()
    assert 0.95 * share <= share_of(found) <= share
    assert times.seconds(left) <= share * times.dense_seconds * (1 + 1e-6)


def test_a_time_that_was_right_by_luck_does_not_end_the_search(monkeypatch):
    """The network of the first slope takes more than its budget, whatever its first measurement says."""
    times, shares = table(), iter([0.49, 0.59, 0.47, 0.49, 0.49])
    beside = SimpleNamespace(share_of=lambda network: next(shares))
    monkeypatch.setattr(latency, "RelativeTimer", lambda *_: beside)
    slopes = []

    def small():
        slopes.append(times.slope)
        return nn.Identity(), {"a": (4, 4), "b": (8, 4)}

    calibrate(times, 0.5, nn.Identity(), small, IMAGE)
    assert len(slopes) == 3 and times.slope == slopes[-1] and next(shares, None) is None


def test_a_table_is_measured_on_this_machine():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    network, setting = nn.Sequential(*body).train(), {"batch_size": 2, "threads": 1, "multiple": None, "narrowest": 8}
    times = latency.measure_table(network, torch.randn(1, 3, 8, 8), runtime="torch", **setting)
    assert network.training and times.layers.keys() == {"0", "5"} and times.multiple in (1, 2, 4)
    assert all(value > 0 for _, _, rows in times.grids.values() for row in rows for value in row)
    assert times.seconds({}) == times.dense_seconds >= times.seconds({"0": (3, 2), "5": (2, 10)})
    assert times.slope * times.sum_of_layers() == pytest.approx(times.dense_seconds)


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_measuring_a_table_leaves_the_random_streams_as_they_were(runtime, monkeypatch):
    if runtime != "torch":
        pytest.importorskip(runtime)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Dropout(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(144, 10))
    settings = LatencySettings(runtime, batch_size=2, threads=1)
    monkeypatch.setattr(latency, "round_seconds", lambda runners, *_, **__: {name: [len(name)] for name in runners})
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 10)), {"0": (3, 4), "2": (4, 4)}
    data, stream = SimpleNamespace(example=torch.randn(1, 3, 8, 8)), torch.get_rng_state()
    found = obtain_table(
        settings, network, data, recorded=None, share=1.0, multiple=1, narrowest=4, chosen_by=lambda table: lambda: small
    )
    assert found.runtime == runtime and torch.equal(torch.get_rng_state(), stream)


class TestFiles:
    def write(self, folder, **changes):
        network = build_model("resnet8", num_classes=10)
        kinds = kinds_of_layers(network, IMAGE)
        grids = {kind.key: ([1, kind.inputs], [1, kind.outputs], [[1.0, 2.0], [3.0, 4.0]]) for kind in kinds.values()}
        times = table(layers={name: (kind.key, kind.inputs, kind.outputs) for name, kind in kinds.items()}, grids=grids)
        path = folder / "table.json"
        path.write_text(json.dumps({**asdict(times), **changes}))
        return path, times

    def read(self, path, model="resnet8", image=IMAGE):
        return read_table(path, flag="--budget-table", network=build_model(model, num_classes=10), image=image)

    def test_a_table_comes_back_as_it_was(self, tmp_path):
        path, times = self.write(tmp_path)
        found = self.read(path)
        assert found.seconds({"classifier": (10, 10)}) == times.seconds({"classifier": (10, 10)})
        assert (found.runtime, found.batch_size, found.multiple) == ("torch", 4, 1)

    def test_that_of_another_network_or_size_is_refused(self, tmp_path):
        path, _ = self.write(tmp_path)
        with pytest.raises(UserError, match=r"budget-table .*table.json: is of another network or image size, its layer"):
            self.read(path, model="resnet32")
        with pytest.raises(UserError, match="is of another network or image size"):
            self.read(path, image=torch.randn(1, 3, 64, 64))

    @pytest.mark.parametrize(
        "changes",
        [
            {"slope": float("nan")},
            {"slope": -1.0},
            {"dense_seconds": "fast"},
            {"threads": 10**400},
            {"grids": {}},
            {"grids": {"conv": [[1], [1], [[0.0]]]}},
            {"grids": {"conv": [[1, 2], [1], [[1.0]]]}},
            {"grids": {"conv": [[2, 1], [1], [[1.0], [2.0]]]}},
            {"grids": {"conv": "x"}},
            {"grids": {"conv": [["a", "b"], [1, 2], [[1.0, 2.0], [3.0, 4.0]]]}},
            {"grids": {"conv": [[0, 2], [1], [[1.0], [2.0]]]}},
            {"grids": {"conv": [[1], [1, 10**400], [[1.0, 2.0]]]}},
            {"grids": {"conv": [[1.5], [1], [[1.0]]]}},
            {"layers": {"a": ["conv"]}},
            {"layers": []},
            {"runtime": "mine"},
            {"unknown": 1},
        ],
    )
    def test_damaged_ones_are_refused(self, changes, tmp_path):
        path, _ = self.write(tmp_path, **changes)
        with pytest.raises(UserError, match=r"is no table of latencies|is damaged"):
            self.read(path)


def test_times_that_vary_from_round_to_round_decide_no_budget(monkeypatch):
    """Measured up to three times: a disturbance that passes does not matter, one that stays is said."""
    quiet, busy = [0.5] * 15, [0.2, 0.5, 1.0] * 5
    network, rounds = nn.Identity(), iter([busy, busy, quiet])
    monkeypatch.setattr(latency, "round_seconds", lambda *_, **__: {"dense": [1.0] * 15, "small": next(rounds)})
    times = table()
    assert latency.RelativeTimer(times, network, IMAGE).share_of(network) == 0.5
    rounds = iter([busy] * 3)
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 10)), {"a": (3, 4)}
    monkeypatch.setattr("deploy.budget.measure_table", lambda *_, **__: times)
    settings, data = LatencySettings("torch", batch_size=4, threads=1), SimpleNamespace(example=IMAGE)
    wanted = {"recorded": None, "share": 0.5, "multiple": 1, "narrowest": 4, "chosen_by": lambda table: lambda: small}
    with pytest.raises(UserError, match=r"budget latency=0\.5: times vary .* by \d+ % .*quiet machine, or .*--budget-table"):
        obtain_table(settings, network, data, **wanted)
