"""What a choice does after another one: in steps, under a budget, and beside layers that keep everything."""

from types import SimpleNamespace

import pytest
import torch
from selections import hard_pruning, prunable_layers
from torch import nn

from models import build_model
from models.graph import ChannelGraph
from prune.choice import FilterChoice
from prune.criteria import CRITERIA
from prune.masks import keep_ratios, score_filters
from prune.settings import Budget
from utils.errors import UserError
from utils.profile import profile_network

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Depthwise(nn.Module):
    """pw - norm - dw - norm - last - norm - head."""

    def __init__(self, *, norm: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.pw, self.dw = nn.Conv2d(3, 16, 1, bias=False), nn.Conv2d(16, 16, 3, groups=16, bias=False)
        self.last, self.head = nn.Conv2d(16, 16, 1, bias=False), nn.Linear(16, 3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) if norm or place == 2 else nn.Identity() for place in range(3))

    def forward(self, x):
        for norm, layer in zip(self.norms, (self.pw, self.dw, self.last), strict=True):
            x = norm(layer(x)).relu()
        return self.head(x.mean((2, 3)))


def choice(network, rates=None, *, criterion="filter-l2", exclude=(), **options):
    graph, data = ChannelGraph(network, IMAGES), SimpleNamespace(example=IMAGES)
    layers = graph.prunable_layers()
    return FilterChoice(
        graph, layers, keep_ratios(layers, rates, exclude=exclude), criterion=criterion, data=data, seed=1, **options
    )


def in_steps(choose, steps):
    kept = None
    for step in range(steps):
        kept = choose.at_step(step, steps, kept)()
        hard_pruning(choose.network, kept)
    return {layer.name: list(kept.channels(layer.name)) for layer in choose.layers}


@pytest.mark.parametrize(("rates", "exclude"), [((0.5,), ()), ((0.5,), ("dw",)), ((0.5, 0.9, 0.5), ())])
def test_steps_end_where_one_shot_does(rates, exclude):
    at_once = in_steps(choice(Depthwise(), rates, exclude=exclude), 1)
    assert in_steps(choice(Depthwise(), rates, exclude=exclude), 2) == at_once
    assert len(at_once["pw"]) == 8 and len(at_once["dw"]) == (16 if exclude else 8)


@pytest.mark.parametrize("options", [{"budget": Budget("macs", 0.7)}, {"coupled": True}, {}], ids=["budget", "coupled", "rates"])
def test_a_layer_that_keeps_everything_needs_nothing_that_the_criterion_reads(options):
    network = Depthwise(norm=False)
    choose = choice(network, (0.5,), criterion="filter-bn", exclude=["pw", "dw"], **options)
    choose.check()
    for step in (choose, choose.at_step(1, 2, choose.at_step(0, 2, None)())):
        kept = step()
        assert not {"pw", "dw"} & kept.kept.keys() and 1 <= len(kept.kept["last"]) < 16


class Summed(nn.Module):
    """Sums over the channels before of two convolutions: an operation that reads them all."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 16, 1), nn.Linear(8, 3)

    def forward(self, x):
        return self.head((self.first(x) + self.second(x)).cumsum(1)[:, 8:].mean((2, 3)))


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (Summed(), {"coupled": True}, "coupled: no filter can go: each meets channels that an operation reads"),
        (Summed(), {"coupled": True, "budget": Budget("latency", 0.5)}, "coupled: no filter can go"),
        (Depthwise(), {"exclude": ["pw", "dw", "last"], "budget": Budget("latency", 0.5)}, "latency=0.5: no filter can"),
        (Depthwise(), {"exclude": ["pw", "last"], "coupled": True}, "coupled: no filter can go"),
    ],
)
def test_a_choice_that_can_take_nothing_is_refused(network, options, message):
    with pytest.raises(UserError, match=message):
        choice(network, (0.5,), **options).check()


def test_coupled_channels_of_which_none_has_to_go_may_all_stay():
    choice(Summed(), (1.0,), coupled=True).check()


@pytest.mark.parametrize("share", [0.6, 0.4])
@pytest.mark.parametrize("coupled", [False, True])
def test_a_budget_is_met_by_a_network_that_was_pruned_before(coupled, share):
    torch.manual_seed(0)
    network = build_model("resnet20", num_classes=10)
    first = choice(network, budget=Budget("macs", 0.7), allocation="global", coupled=coupled)()
    hard_pruning(network, first)
    earlier = first.to_json()  # as a checkpoint has them, with those of batch norms
    assert "stage_1.0.bn_a" in earlier
    again = choice(network, budget=Budget("macs", share), earlier=first, coupled=coupled)
    chosen = again()
    hard_pruning(network, chosen)  # which takes no layer but those that it prunes
    kept = chosen.kept
    assert all(set(kept[name]) <= set(earlier.get(name, kept[name])) for name in kept), "what is gone stays gone"
    assert share - 0.02 <= again.cost(kept)["macs"] / profile_network(network, IMAGES[:1])["macs"] <= share


def test_what_is_cheap_enough_already_stays_as_it_is():
    torch.manual_seed(0)
    network = build_model("resnet20", num_classes=10)
    first = choice(network, budget=Budget("macs", 0.5))()
    again = choice(network, budget=Budget("macs", 0.6), earlier=first)()
    assert again == first


@pytest.mark.parametrize("criterion", ["filter-gm", "filter-nggm", "filter-a", "filter-r"])
def test_filters_that_are_gone_count_in_no_others_score(criterion):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 12, 3))
    [layer], left = prunable_layers(nn.Sequential(*network, nn.Flatten(), nn.Linear(3, 3)))[:1], [0, 2, 3, 7, 11]
    gradients = {layer.name: torch.randn_like(layer.module.weight)}
    options = {"gamma": 0.5, "gm_distance": "euclidean", "gradients": gradients if criterion == "filter-nggm" else None}
    generator = torch.Generator().manual_seed(0)
    [scores] = score_filters([layer], criterion=criterion, left={layer.name: left}, generator=generator, **options).values()
    if criterion == "filter-r":
        assert not scores.isnan().any(), "random scores are the same at every step"
        return
    assert scores.isnan().nonzero().flatten().tolist() == [each for each in range(12) if each not in left]
    alone = nn.Conv2d(3, 5, 3)
    with torch.no_grad():
        alone.weight.copy_(layer.module.weight[left])
    grad = gradients[layer.name][left] if criterion == "filter-nggm" else None
    assert scores[left].equal(CRITERIA[criterion](alone.weight, grad, gamma=0.5, gm_distance="euclidean"))
