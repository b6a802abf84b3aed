"""What each layer loses alone: what is measured, how it goes on, and the proportions that follow from it."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from models import build_model
from models.graph import ChannelGraph
from prune.choice import FilterChoice
from prune.masks import keep_count, keep_ratios
from prune.sensitivity import PROPORTIONS, measure_sensitivity, read_rates
from reporting.layer_sensitivity import draw_sensitivity
from utils.errors import UserError

SETTING = {"network": "resnet8", "dataset": "digits", "prune_mode": "filter-a"}


def choice(*, coupled=False, exclude=()):
    torch.manual_seed(0)
    network = build_model("resnet8", num_classes=10).eval()
    data = SimpleNamespace(example=torch.randn(2, 3, 32, 32))
    graph = ChannelGraph(network, data.example)
    layers = graph.prunable_layers()
    ratios = keep_ratios(layers, None, exclude=exclude)
    return FilterChoice(graph, layers, ratios, criterion="filter-a", data=data, seed=0, coupled=coupled)


def lost_filters(network):
    """By layer: how many filters are zero."""
    convs = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    return {name: gone for name, conv in convs if (gone := int((conv.weight.flatten(1).abs().sum(1) == 0).sum()))}


@pytest.mark.parametrize("coupled", [False, True])
def test_one_layer_or_group_is_pruned_at_a_time(coupled, tmp_path, capsys):
    seen = []

    def top1(network):
        seen.append(lost_filters(network))
        return 100.0 - sum(seen[-1].values())

    choose = choice(coupled=coupled, exclude=["stage_1.0.conv_a"])
    document = measure_sensitivity(choose, tmp_path / "s.json", setting=SETTING, top1_of=top1)
    assert seen[0] == {} and document["top1"] == 100
    layers = [row["layers"] for row in document["families"]]
    names = [layer.name for layer in choose.layers if layer.name != "stage_1.0.conv_a"]
    assert {name for each in layers for name in each} == set(names)
    assert len(layers) == (5 if coupled else 6)
    assert layers[0] == (["conv_1_3x3", *(name for name in names if name.endswith("conv_b"))] if coupled else ["conv_1_3x3"])
    for row, start in zip(document["families"], range(1, len(seen), len(PROPORTIONS)), strict=True):
        for lost, proportion, top1_then in zip(seen[start : start + 9], PROPORTIONS, row["top1"], strict=True):
            assert lost.keys() == set(row["layers"]) and len(set(lost.values())) == 1
            assert top1_then == 100 - sum(lost.values())
            if not coupled:
                assert lost == {row["layers"][0]: row["filters"] - keep_count(row["filters"], proportion)}
    assert lost_filters(choose.network) == {}
    assert capsys.readouterr().out.count("\n") == len(layers)
    assert draw_sensitivity(document).startswith(b"\x89PNG")


def test_it_goes_on_where_it_was_cut_off_and_replaces_nothing_else(tmp_path):
    choose, path, calls = choice(), tmp_path / "s.json", []

    def top1(network):
        calls.append(0)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return 50.0

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(choose, path, setting=SETTING, top1_of=top1)
    assert len(json.loads(path.read_text())["families"]) == 2  # 1 + 2 * 9 calls, and some of the third
    with pytest.raises(UserError, match="is not complete, 2 of 7 are measured"):
        read_rates(path, choose.layers, drop=1.0)
    measure_sensitivity(choose, path, setting=SETTING, top1_of=top1)
    assert len(calls) == 25 + 9 * 5
    before = path.read_bytes()
    measure_sensitivity(choose, path, setting=SETTING, top1_of=top1)
    assert path.read_bytes() == before and len(calls) == 25 + 9 * 5
    for other in ({**SETTING, "prune_mode": "filter-gm"}, SETTING):
        if other is SETTING:
            with torch.no_grad():
                choose.network.conv_1_3x3.weight[0, 0, 0, 0] += 1
        with pytest.raises(UserError, match="exists, and is of another network or setting"):
            measure_sensitivity(choose, path, setting=other, top1_of=top1)
    assert path.read_bytes() == before


LAYERS = [SimpleNamespace(name=name) for name in "abcd"]


class TestRates:
    def write(self, folder, **changes):
        families = [
            {"layers": ["a", "c"], "top1": [90.0, 89.5, 88.0, 89.9]},  # the last is better, after one that is too bad
            {"layers": ["b"], "top1": [88.9, 70.0, 60.0, 50.0]},
        ]
        document = {"proportions": [0.8, 0.6, 0.4, 0.2], "top1": 90.0, "count": 2, "families": families}
        path = folder / "s.json"
        path.write_text(json.dumps({**document, **changes}))
        return path

    @pytest.mark.parametrize(
        ("drop", "rates"),
        [(0.4, [0.8, 1, 0.8, 1]), (1, [0.6, 1, 0.6, 1]), (1.2, [0.6, 0.8, 0.6, 1]), (2, [0.2, 0.8, 0.2, 1])],
    )
    def test_the_least_down_to_which_the_drop_is_small(self, drop, rates, tmp_path):
        assert read_rates(self.write(tmp_path), LAYERS, drop=drop) == rates

    def test_groups_that_share_a_layer_agree(self, tmp_path):
        families = [
            {"layers": list(names), "top1": [90.0, top1, 0, 0]} for names, top1 in (("ab", 90.0), ("bc", 0.0), ("d", 90.0))
        ]
        assert read_rates(self.write(tmp_path, families=families, count=3), LAYERS, drop=1.0) == [0.8, 0.8, 0.8, 0.6]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"families": [{"layers": ["e"], "top1": [90, 90, 90, 90]}] * 2}, "is of another network, this one has no layer 'e'"),
            ({"families": [{"layers": ["a"], "top1": [90]}] * 2}, "is no file that --sensitivity wrote"),
            ({"proportions": [-1, 2, 3, 4]}, "is no file that --sensitivity wrote"),
            ({"top1": "high"}, "is no file that --sensitivity wrote"),
            ({"top1": 100.0}, "no layer may lose anything within --sensitivity-drop 1"),
            ({"count": 3}, "is not complete, 2 of 3 are measured"),
        ],
    )
    def test_other_files_are_refused(self, changes, message, tmp_path):
        with pytest.raises(UserError, match=message):
            read_rates(self.write(tmp_path, **changes), LAYERS, drop=1.0)
