"""How much of each layer stays: by a proportion, or within a budget, counted as the built network counts."""

from types import SimpleNamespace

import pytest
import torch
from selections import channel_groups, hard_pruning, prunable_layers
from torch import nn

from models import build_model
from models.graph import ChannelGraph
from models.graph.groups import ChannelGroup
from prune.allocation import FLOOR, Family, counts_within, kept_channels, rank, uniform_counts
from prune.choice import FilterChoice
from prune.masks import keep_ratios
from prune.settings import Budget, parse_budget
from utils.errors import UserError
from utils.profile import profile_network


def singles(name, count):
    return [ChannelGroup(((name, channel),)) for channel in range(count)]


def family(count, *, name="a", scores=None, step=1, keep_ratio=FLOOR):
    return Family(tuple(singles(name, count)), tuple(scores or range(1, count + 1)), step, keep_ratio)


# ---- ranking -----------------------------------------------------------------------------------------------------------


def test_a_group_scores_the_mean_of_its_filters_over_their_layers_means():
    groups = [ChannelGroup((("a", channel), ("b", channel))) for channel in range(2)]
    scores = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([30.0, 10.0])}  # over their means 0.5, 1.5 and 1.5, 0.5
    [ranked] = rank([groups], scores, ratios={"a": 0.5, "b": 0.5}, multiple=1)
    assert ranked.scores == (1.0, 1.0) and ranked.groups == tuple(groups)  # the lower index first
    scores["b"] = torch.tensor([20.0, 20.0])
    [ranked] = rank([groups], scores, ratios={"a": 0.5, "b": 0.5}, multiple=1)
    assert ranked.scores == (0.75, 1.25)


def test_layers_that_go_together_need_one_ratio_and_an_excluded_one_keeps_the_others():
    groups, scores = [ChannelGroup((("a", 0), ("b", 0)))], {name: torch.ones(1) for name in "ab"}
    with pytest.raises(UserError, match="a and b lose the same channels"):
        rank([groups], scores, ratios={"a": 0.5, "b": 0.6}, multiple=1)
    assert rank([groups], scores, ratios={"a": 0.5, "b": 1.0}, multiple=1)[0].is_fixed


def test_multiples_count_the_filters_of_a_layer():
    groups = [ChannelGroup((("a", channel), ("a", channel + 8))) for channel in range(8)]
    [ranked] = rank([groups], {"a": torch.arange(16.0)}, ratios={"a": 0.6}, multiple=8)
    assert ranked.step == 4 and uniform_counts([ranked]) == (4,)  # eight filters


def test_the_lowest_groups_go_with_the_batch_norm_entries_that_read_them():
    groups = tuple(ChannelGroup((("a", channel),), norms=(("norm", channel + 2),)) for channel in (1, 0, 2))
    kept = kept_channels([Family(groups, (1.0, 2.0, 3.0))], (1,), filters={"a": 3, "norm": 5, "b": 2})
    assert kept == {"a": [2], "norm": [0, 1, 4], "b": [0, 1]}


# ---- budgets -----------------------------------------------------------------------------------------------------------


def cost_of(*prices):
    return lambda counts: {"macs": sum(price * count for price, count in zip(prices, counts, strict=True))}


def test_global_keeps_the_best_scores_per_cost():
    dear, cheap = family(10, scores=[5.0] * 10), family(10, name="b", scores=[1.0] * 10)
    prices = cost_of(10, 1)  # 0.5 against 1 for each unit of cost
    assert counts_within(Budget("macs", 0.46), [dear, cheap], cost=prices, allocation="global") == (4, 10)
    prices = cost_of(2, 1)
    assert counts_within(Budget("macs", 0.5), [dear, cheap], cost=prices, allocation="global") == (7, 1)


def test_global_takes_a_dear_group_in_the_place_of_cheap_ones_to_come_close():
    dear, cheap = family(10, scores=[1.0] * 10), family(10, name="b", scores=[1.0] * 10)
    prices = cost_of(10, 3)  # all the cheap ones come back first, and 5 dear ones cost 80 of 89.7
    assert counts_within(Budget("macs", 0.69), [dear, cheap], cost=prices, allocation="global") == (6, 9)


def test_a_group_is_worth_all_of_its_filters():
    pairs = tuple(ChannelGroup((("a", channel), ("b", channel))) for channel in range(10))
    stream, inner = Family(pairs, (1.0,) * 10, 1, FLOOR), family(10, name="c", scores=[1.0] * 10)
    prices = cost_of(15, 10)  # 2 filters for 15 against 1 for 10
    assert counts_within(Budget("macs", 0.64), [stream, inner], cost=prices, allocation="global") == (10, 1)


def test_a_group_costs_its_share_of_what_its_family_does():
    steps, even = family(16, scores=[1.0] * 16), family(16, name="b", scores=[1.1] * 16)

    def in_steps(counts):  # as times of blocks of eight channels: the last of a block seem to be free
        return {"macs": 100 * (8 * -(-counts[0] // 8) + counts[1])}

    counts = counts_within(Budget("macs", 0.5), [steps, even], cost=in_steps, allocation="global")
    assert counts == (8, 8)


@pytest.mark.parametrize("share", [0.9, 0.833, 0.75, 0.7, 0.6, 0.4, 0.3])
def test_global_comes_close_to_every_budget_of_coupled_channels(share):
    torch.manual_seed(0)
    network, images = build_model("resnet8", num_classes=10).eval(), torch.randn(2, 3, 32, 32)
    choice = chosen(network, images, budget=Budget("macs", share), allocation="global", coupled=True)
    macs = choice().macs
    assert share - 0.02 <= macs / profile_network(network, images[:1])["macs"] <= share


def test_uniform_takes_the_same_of_all_and_spends_the_rest():
    families = [family(10), family(10, name="b")]
    assert counts_within(Budget("macs", 0.5), families, cost=cost_of(1, 1), allocation="uniform") == (5, 5)
    assert counts_within(Budget("macs", 0.55), families, cost=cost_of(1, 1), allocation="uniform") == (6, 5)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_multiples_the_floor_and_what_is_excluded(allocation):
    families = [family(20, step=8), family(30, name="b"), family(10, name="c", keep_ratio=1.0)]
    counts = counts_within(Budget("macs", 0.6), families, cost=cost_of(1, 1, 1), allocation=allocation)
    assert counts[0] in (8, 16, 20) and counts[1] >= 3 and counts[2] == 10
    assert 0.58 * 60 <= sum(counts) <= 0.6 * 60


def test_what_a_budget_does_not_pay_for():
    families = [family(10), family(10, name="b", keep_ratio=1.0)]
    with pytest.raises(UserError, match=r"budget macs=0\.5: .* macs=0\.55 is the least"):
        counts_within(Budget("macs", 0.5), families, cost=cost_of(1, 1), allocation="global")


@pytest.mark.parametrize("text", ["macs", "macs=", "macs=0", "macs=1", "macs=nan", "time=0.5", "", "=0.5", "params=-1"])
def test_budgets_that_are_none(text):
    with pytest.raises(UserError):
        parse_budget(text)
    assert parse_budget("params=0.25") == Budget("params", 0.25)


# ---- whole networks ----------------------------------------------------------------------------------------------------


def chosen(network, images, *, exclude=(), keep_ratio=None, **options):
    graph, data = ChannelGraph(network, images), SimpleNamespace(example=images)
    layers = graph.prunable_layers()
    ratios = keep_ratios(layers, None if keep_ratio is None else [keep_ratio], exclude=exclude)
    return FilterChoice(graph, layers, ratios, criterion="filter-a", data=data, seed=1, **options)


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("coupled", [False, True])
def test_a_budget_is_met_from_below_and_what_is_counted_is_what_is_built(coupled, allocation, kind):
    torch.manual_seed(0)
    network, images = build_model("resnet8", num_classes=10).eval(), torch.randn(2, 3, 32, 32)
    choice = chosen(network, images, budget=Budget(kind, 0.5), allocation=allocation, coupled=coupled)
    kept = choice()
    small = kept.shrink()
    dense, built = (profile_network(each, images[:1]) for each in (network, small))
    assert (kept.macs, kept.parameters) == (built["macs"], built["parameters"])
    key = {"macs": "macs", "params": "parameters"}[kind]
    assert 0.48 <= built[key] / dense[key] <= 0.5
    assert all(len(kept.channels(layer.name)) >= FLOOR * layer.filters for layer in choice.layers)
    assert small.relayout_count == 0 or not coupled


def test_excluded_layers_and_patterns_keep_all_and_what_is_coupled_with_them():
    network, images = build_model("resnet8", num_classes=10).eval(), torch.randn(2, 3, 32, 32)
    kept = chosen(network, images, budget=Budget("macs", 0.7), coupled=True, exclude=["stage_3.*.conv_b"])()
    assert not {"stage_3.0.conv_b", "conv_1_3x3"} & kept.kept.keys()  # their first channels are the stem's
    assert len(kept.channels("stage_3.0.conv_a")) < 64


def test_coupled_layers_retain_the_proportion_of_each_family():
    network = build_model("resnet20", num_classes=10).eval()
    kept = chosen(network, torch.randn(2, 3, 32, 32), coupled=True, keep_ratio=0.6)()
    assert len(kept.kept["conv_1_3x3"]) == len(kept.kept["stage_1.2.conv_b"]) == 10
    assert len(kept.kept["stage_2.0.conv_a"]) == 19 and len(kept.kept["stage_2.0.conv_b"]) == 20  # 10 of each 16
    assert kept.kept["stage_2.1.conv_b"] == kept.kept["stage_2.0.conv_b"]


def test_groups_with_the_lowest_mean_of_normalised_norms_go():
    torch.manual_seed(0)
    network = build_model("resnet8", num_classes=10).eval()
    example, layers = torch.randn(2, 3, 32, 32), prunable_layers(network)
    stream = channel_groups(network, layers, example=example)[0]
    norms = {layer.name: layer.module.weight.detach().double().abs().sum((1, 2, 3)) for layer in layers}
    score = [sum(float(norms[name][i] / norms[name].mean()) for name, i in group.filters) for group in stream]
    highest = sorted(sorted(range(16), key=score.__getitem__)[6:])
    assert chosen(network, example, coupled=True, keep_ratio=0.6)().channels("conv_1_3x3") == tuple(highest)


class Dense(nn.Module):
    """Two convolutions, concatenated before a batch norm."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1)
        self.norm, self.classifier = nn.BatchNorm2d(16), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        x = self.norm(torch.cat([x, self.second(x)], 1)).relu()
        return self.classifier(self.third(x).mean((2, 3)))


def test_entries_of_shared_batch_norms_are_zero_and_stay_so():
    torch.manual_seed(0)
    network = Dense()
    kept = chosen(network, torch.randn(2, 3, 4, 4), coupled=True, keep_ratio=0.5)()
    assert kept.channels("norm") == (*kept.channels("first"), *(8 + channel for channel in kept.channels("second")))
    schedule = hard_pruning(network, kept)
    gone = sorted(set(range(16)) - set(kept.channels("norm")))
    assert len(gone) == 8 and network.norm.weight[gone].eq(0).all()
    nn.init.ones_(network.norm.weight)
    schedule.after_step()
    assert network.norm.weight[gone].eq(0).all() and network.norm.weight.sum() == 8
