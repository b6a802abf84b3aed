"""Which form trains faster is looked up, never timed: by device, precision and widths."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from selections import selected
from torch import nn

from benchmarks import budgets, train_forms
from models.graph.layers import PrunableLayer
from prune.measured_forms import TABLE, TrainingStep, is_faster_small, multiple_of, record

RESULTS = Path(train_forms.__file__).with_name("results")
HALF = TrainingStep("cpu", amp=False, compiled=False, multiple=8, coupled=True, macs=0.5)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.json"
    record({HALF: 0.7}, hardware="one", network="resnet20", table=path)
    return path


def test_a_step_is_known_by_its_device_precision_and_widths(table):
    assert is_faster_small(HALF, table=table)
    others = [{"device": "cuda"}, {"amp": True}, {"compiled": True}, {"coupled": False}, {"multiple": 1}, {"macs": 0.6}]
    assert not any(is_faster_small(replace(HALF, **other), table=table) for other in others), "what was not measured"


def test_the_next_larger_network_that_was_measured_decides(table):
    record({replace(HALF, macs=0.9): 1.2}, hardware="one", network="resnet20", table=table)
    faster = {macs: is_faster_small(replace(HALF, macs=macs), table=table) for macs in (0.1, 0.5, 0.54, 0.6, 0.9, 0.97)}
    assert faster == {0.1: True, 0.5: True, 0.54: True, 0.6: False, 0.9: False, 0.97: False}


def test_a_machine_that_was_slower_with_less_left_says_no(table):
    record({replace(HALF, macs=0.3): 1.2, replace(HALF, macs=0.2): 0.9}, hardware="other", network="resnet56", table=table)
    assert not any(is_faster_small(replace(HALF, macs=macs), table=table) for macs in (0.3, 0.4, 0.5))
    record({replace(HALF, macs=0.3): 0.9}, hardware="other", network="resnet56", table=table)
    faster = {macs: is_faster_small(replace(HALF, macs=macs), table=table) for macs in (0.3, 0.5, 0.6)}
    assert faster == {0.3: True, 0.5: True, 0.6: False}, "one that was faster with less left says nothing of more"


def test_multiples_that_were_not_measured_count_as_odd_widths(tmp_path):
    path = tmp_path / "table.json"
    record({replace(HALF, multiple=1): 0.8}, hardware="one", network="resnet20", table=path)
    assert is_faster_small(HALF, table=path)


def test_a_form_is_faster_if_it_was_on_every_machine(table):
    record({HALF: 1.1, replace(HALF, amp=True): 0.5}, hardware="other", network="resnet20", table=table)
    assert not is_faster_small(HALF, table=table)
    record({HALF: 0.9}, hardware="other", network="resnet20", table=table)
    assert is_faster_small(HALF, table=table), "new times take the place of old ones of the same"
    assert is_faster_small(replace(HALF, amp=True), table=table), "and of no others"
    assert [row["hardware"] for row in json.loads(table.read_text())] == ["one", "other", "other"]


@pytest.mark.parametrize(
    ("widths", "multiple"), [((8, 24, 5), 8), ((16, 16, 5), 8), ((7, 24, 5), 1), ((8, 24, 4), 1), ((16, 32, 5), 8)]
)
def test_layers_that_keep_all_filters_are_no_odd_widths(widths, multiple):
    network = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 1), nn.Conv2d(32, 5, 1))
    layers = [PrunableLayer(name, module) for name, module in network.named_children()]
    kept = {layer.name: range(count) for layer, count in zip(layers, widths, strict=True)}
    assert multiple_of(selected(network, kept), layers) == multiple


def test_the_committed_table_is_what_was_measured():
    rows = json.loads(TABLE.read_text())
    documents = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("train_forms*.json"))]
    assert documents
    for document in documents:
        found = {
            train_forms.step_of(measured, document["machine"]["device"]): round(measured["compact in masked"], 3)
            for measured in document["rows"]
        }
        here = {"hardware": train_forms.hardware(document["machine"]), "network": document["settings"]["model"]}
        for step, taken in found.items():
            assert {**here, **asdict(step), "compact in masked steps": taken} in rows


def test_norms_of_a_measured_network_make_something_of_channels_that_are_gone():
    norms = [module for module in budgets.build("resnet20").modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 19
    assert all((norm(torch.zeros(1, norm.num_features, 1, 1)) != 0).all() for norm in norms)


def test_the_benchmark_measures_every_kind_of_step(tmp_path):
    flags = ["--batch-size", "2", "--rounds", "1", "--modes", "float32", "--budgets", "0.5", "--device", "cpu"]
    paths = {"--table": tmp_path / "table.json", "--output": tmp_path / "out.json"}
    args = train_forms.get_args_parser().parse_args([*flags, *(str(part) for pair in paths.items() for part in pair)])
    train_forms.main(args)
    rows = json.loads((tmp_path / "table.json").read_text())
    assert {(row["coupled"], row["multiple"]) for row in rows} == {(False, 1), (False, 8), (True, 1), (True, 8)}
    assert all(row["device"] == "cpu" and row["network"] == "resnet20" and not row["amp"] for row in rows)
    assert all(0.48 <= row["macs"] <= 0.5 for row in rows)
