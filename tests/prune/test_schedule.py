import copy
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from selections import hard_pruning, prunable_layers, selected
from torch import nn

from models.alexnet import AlexNet
from models.cifar_resnet import CifarResNet
from models.graph import ChannelGraph
from models.narrow import Selection
from prune.choice import FilterChoice
from prune.masks import choose_filters, keep_count, keep_ratios
from prune.schedule import GradualPruning, PruningSchedule, SoftPruning
from prune.settings import Budget
from utils.errors import UserError
from utils.training.pruning import Pruning


def small_resnet():
    torch.manual_seed(0)
    return CifarResNet(depth=8, num_classes=4)


def lowest_norm(model, keep_ratio=0.5):
    graph = ChannelGraph(model)
    layers = graph.prunable_layers()
    return Selection(graph, choose_filters(layers, keep_ratios(layers, [keep_ratio]), criterion="filter-a"))


def soft_schedule(model, **options):
    graph = ChannelGraph(model)
    return SoftPruning(graph, partial(lowest_norm, model), **{"interval": 1, "last_epoch": 9} | options)


def sgd(model, momentum=0.9):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=momentum, nesterov=momentum > 0, weight_decay=5e-3)


def train(model, schedule, optimizer, *, steps=2, size=8):
    """Real steps on random images."""
    generator = torch.Generator().manual_seed(1)
    model.train()
    for _ in range(steps):
        images = torch.randn(4, 3, size, size, generator=generator)
        labels = torch.randint(4, (4,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.after_step()


def pruned_parts(model, kept, *, parts=("weight", "bias", "bn_weight", "bn_bias")):
    """The named tensors of every layer, with only the rows of pruned filters."""
    rows = []
    for layer in prunable_layers(model):
        gone = [i for i in range(layer.filters) if i not in kept.channels(layer.name)]
        tensors = {
            "weight": layer.module.weight,
            "bias": layer.module.bias,
            "bn_weight": layer.norm.weight,
            "bn_bias": layer.norm.bias,
        }
        rows += [tensors[part].detach()[gone] for part in parts if tensors[part] is not None]
    return rows


def is_positive_zero(tensor):
    return tensor.eq(0).all() and not tensor.signbit().any()


def snapshot(model):
    return copy.deepcopy(model.state_dict())


def same_state(model, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("build", [small_resnet, partial(AlexNet, num_classes=4)], ids=["resnet", "alexnet"])
def test_hard_pruned_filters_are_exactly_zero_after_every_step(build):
    model = build()
    with torch.no_grad():  # batch norms as after training, so that there is something to clear
        for layer in prunable_layers(model):
            nn.init.uniform_(layer.norm.bias, -1, 1)
    kept = lowest_norm(model)
    schedule = hard_pruning(model, kept)
    assert all(is_positive_zero(part) for part in pruned_parts(model, kept))
    optimizer = sgd(model)
    for _ in range(3):
        train(model, schedule, optimizer, steps=1, size=32 if isinstance(model, AlexNet) else 8)
        assert all(is_positive_zero(part) for part in pruned_parts(model, kept))


def test_hard_pruning_holds_against_momentum_from_before():
    model = small_resnet()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    schedule = hard_pruning(model, lowest_norm(model))
    optimizer.step()
    assert not all(is_positive_zero(part) for part in pruned_parts(model, schedule.selection))
    schedule.after_step()
    assert all(is_positive_zero(part) for part in pruned_parts(model, schedule.selection))


def test_hard_pruning_changes_nothing_else():
    model = small_resnet()
    state = snapshot(model)
    kept = lowest_norm(model)
    schedule = hard_pruning(model, kept)
    schedule.next_network(0)
    for layer in prunable_layers(model):
        stays = list(kept.channels(layer.name))
        assert torch.equal(layer.module.weight[stays], state[f"{layer.name}.weight"][stays])
        assert torch.equal(layer.norm.weight[stays], state[f"{layer.norm_name}.weight"][stays])
    assert torch.equal(model.classifier.weight, state["classifier.weight"])
    with schedule.shipped() as shipped:
        assert shipped == kept


def test_a_hard_pruned_network_does_not_see_what_stood_in_its_filters():
    model = small_resnet()
    other = copy.deepcopy(model)
    kept = lowest_norm(model)
    with torch.no_grad():
        for part, layer in enumerate(prunable_layers(other)):
            gone = [i for i in range(layer.filters) if i not in kept.channels(layer.name)]
            layer.module.weight[gone] += part + 1.0
            layer.norm.bias[gone] = 3.0
    hard_pruning(model, kept), hard_pruning(other, kept)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(images), other(images))


def test_layers_without_batch_norm_parameters_are_pruned_by_their_conv():
    torch.manual_seed(0)
    norm, head = nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 1)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, bias=False), norm, head)
    schedule = hard_pruning(model, {"0": torch.tensor([1, 3])})
    assert is_positive_zero(model[0].weight[[0, 2]]) and is_positive_zero(model[0].bias[[0, 2]])
    assert model[0].weight[[1, 3]].ne(0).all() and model[1].weight.ne(0).all()
    schedule.load_state_dict({"kept": {"1": torch.tensor([0])}})
    assert is_positive_zero(model[1].weight[1:])


def test_keeping_everything_is_no_error():
    model = small_resnet()
    state = snapshot(model)
    schedule = hard_pruning(model, lowest_norm(model, 1.0))
    schedule.after_step()
    assert same_state(model, state)


def with_bn_biases(model):
    """Batch norms as after training: where every bias is 0 there is nothing to see of whether it is left alone."""
    with torch.no_grad():
        for layer in prunable_layers(model):
            layer.norm.bias.fill_(0.5)
    return model


def test_soft_pruning_clears_before_the_first_epoch_the_convolutions_and_nothing_else():
    model = with_bn_biases(small_resnet())
    expected, state = lowest_norm(model), snapshot(model)
    schedule = soft_schedule(model)
    assert schedule.selection == expected
    assert all(is_positive_zero(part) for part in pruned_parts(model, expected, parts=("weight",)))
    weights = {f"{layer.name}.weight" for layer in prunable_layers(model)}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items() if name not in weights)


def test_soft_pruning_clears_the_bias_of_a_convolution():
    model = with_bn_biases(AlexNet(num_classes=4))
    schedule = soft_schedule(model)
    assert all(is_positive_zero(part) for part in pruned_parts(model, schedule.selection, parts=("weight", "bias")))
    assert all(part.eq(0.5).all() for part in pruned_parts(model, schedule.selection, parts=("bn_bias",)))


def official_epochs(model, *, epochs, rate):
    """The order of he-y/soft-filter-pruning, written out: mask, then for each epoch train, mask. Gives (F,) masks by layer."""

    def mask():
        masks = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                norms = module.weight.data.flatten(1).norm(2, 1)
                masks[name] = torch.ones(len(norms)).index_fill_(0, norms.argsort()[: int(len(norms) * rate)], 0)
                module.weight.data *= masks[name].view(-1, 1, 1, 1)
        return masks

    mask()
    optimizer = sgd(model)
    for _ in range(epochs):
        train(model, Pruning(), optimizer)
        masks = mask()
    return masks


def test_soft_pruning_trains_as_the_official_code():
    ours, official = (with_bn_biases(small_resnet()) for _ in range(2))
    masks = official_epochs(official, epochs=3, rate=0.5)
    layers = prunable_layers(ours)
    graph, ratios = ChannelGraph(ours), keep_ratios(layers, [0.5])
    choose = lambda: Selection(graph, choose_filters(layers, ratios, criterion="filter-l2"))  # noqa: E731
    schedule = SoftPruning(graph, choose, interval=1, last_epoch=2)
    optimizer = sgd(ours)
    for epoch in range(3):
        train(ours, schedule, optimizer)
        schedule.next_network(epoch)
    found = {layer.name: list(schedule.selection.channels(layer.name)) for layer in layers}
    assert found == {name: mask.nonzero().flatten().tolist() for name, mask in masks.items()}
    assert same_state(ours, official.state_dict())


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_every_soft_pruned_filter_comes_back(momentum):
    model = with_bn_biases(small_resnet())
    schedule = soft_schedule(model)
    train(model, schedule, sgd(model, momentum))
    parts = pruned_parts(model, schedule.selection, parts=("weight",))
    assert torch.cat([part.flatten(1).ne(0).any(1) for part in parts]).all()


def test_soft_pruning_chooses_anew():
    model = small_resnet()
    schedule = soft_schedule(model)
    before = schedule.selection.channels("conv_1_3x3")
    with torch.no_grad():
        model.conv_1_3x3.weight[list(before)] = 0.001
        model.conv_1_3x3.weight[[i for i in range(16) if i not in before]] = 1.0
    schedule.after_step()
    schedule.next_network(0)
    assert not set(before) & set(schedule.selection.channels("conv_1_3x3"))


@pytest.mark.parametrize(("interval", "pruned_epochs"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (3, [2, 4]), (9, [4])])
def test_soft_pruning_before_the_first_after_every_interval_and_the_last_epoch(interval, pruned_epochs):
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1))
    choices, epoch, graph = [], -1, ChannelGraph(model)

    def choose():
        choices.append(epoch)
        return Selection(graph, {"0": [0]})

    schedule = SoftPruning(graph, choose, interval=interval, last_epoch=4)
    for epoch in range(5):
        schedule.after_step()
        schedule.next_network(epoch)
    assert choices == [-1, *pruned_epochs]


def test_shipped_clears_the_chosen_filters_whole_and_restores_every_bit():
    model = with_bn_biases(small_resnet())
    schedule = soft_schedule(model, interval=5)
    train(model, schedule, sgd(model))
    schedule.next_network(0)  # no pruning on this one
    state, expected = snapshot(model), lowest_norm(model)
    with schedule.shipped() as kept:
        assert kept == expected
        assert all(is_positive_zero(part) for part in pruned_parts(model, kept))
    assert same_state(model, state)


def test_shipped_restores_when_the_evaluation_fails():
    model = small_resnet()
    schedule = soft_schedule(model)
    state = snapshot(model)
    with pytest.raises(KeyError), schedule.shipped():
        raise KeyError
    assert same_state(model, state)


def test_what_is_shipped_after_pruning_is_what_was_just_pruned():
    # For FPGM a cleared filter is a point as any other: chosen again at once, other filters could go.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    graph, answers = ChannelGraph(model), [[0, 1], [2, 3]]
    schedule = SoftPruning(graph, lambda: Selection(graph, {"0": answers.pop(0)}), interval=1, last_epoch=1)
    with schedule.shipped() as kept:
        assert kept.channels("0") == (0, 1)
        assert model[1].weight.tolist() == [1, 1, 0, 0]
    assert model[1].weight.tolist() == [1, 1, 1, 1]
    schedule.after_step()
    with schedule.shipped() as kept:
        assert kept.channels("0") == (2, 3)


@pytest.mark.parametrize("hard", [True, False])
def test_state_round_trip(hard):
    model = small_resnet()
    full = lowest_norm(model, 1.0)
    schedule, fresh = (hard_pruning(model, full) if hard else soft_schedule(model) for _ in range(2))
    if hard:
        schedule = hard_pruning(model, lowest_norm(model))
    else:
        train(model, schedule, sgd(model))
    fresh.load_state_dict(schedule.state_dict())
    with fresh.shipped() as loaded, schedule.shipped() as kept:
        assert loaded == kept
    if hard:
        train(model, fresh, sgd(model))
        assert all(is_positive_zero(part) for part in pruned_parts(model, schedule.selection))


def test_without_pruning_nothing_happens():
    model = small_resnet()
    state, whole = snapshot(model), lowest_norm(model, 1.0)
    schedule = PruningSchedule(whole.graph, whole)
    schedule.after_step()
    schedule.next_network(0)
    with schedule.shipped() as kept:
        assert kept.is_whole
    assert same_state(model, state)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"conv9": torch.tensor([0])}, "no convolution, batch norm or linear layer named 'conv9'"),
        ({"conv_1_3x3": torch.tensor([3, 16])}, r"numbers from 0 to 15 expected, not \[3, 16\]"),
        ({"conv_1_3x3": torch.tensor([-1])}, "numbers from 0 to 15"),
    ],
)
def test_filters_that_the_network_has_not_got_are_named(kept, message):
    with pytest.raises(UserError, match=message):
        hard_pruning(small_resnet(), kept)


def test_an_interval_below_one_is_named():
    with pytest.raises(UserError, match="interval 0"):
        soft_schedule(small_resnet(), interval=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_does_not_wait_for_the_device():
    model = small_resnet().cuda()
    schedule = hard_pruning(model, lowest_norm(model))
    torch.cuda.set_sync_debug_mode("error")
    try:
        schedule.after_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(is_positive_zero(part.cpu()) for part in pruned_parts(model, schedule.selection))


class TestGradual:
    def choice(self, model, **options):
        data = SimpleNamespace(example=torch.randn(2, 3, 32, 32))
        graph = ChannelGraph(model, data.example)
        layers = graph.prunable_layers()
        ratios = keep_ratios(layers, None if "budget" in options else [0.4])
        return FilterChoice(graph, layers, ratios, **{"criterion": "filter-gm", "data": data, "seed": 0} | options)

    def schedule(self, model, choose, *, steps, heard):
        return GradualPruning(
            choose.graph,
            lambda step, kept: choose.at_step(step, steps, kept)(),
            steps=steps,
            on_choice=lambda schedule, step: heard.append(step),
        )

    @pytest.mark.parametrize(
        "options",
        [{}, {"coupled": True}, {"budget": Budget("macs", 0.4)}, {"budget": Budget("params", 0.4), "coupled": True}],
        ids=["rates", "coupled", "budget", "coupled budget"],
    )
    def test_ever_fewer_stay_until_it_is_what_was_asked_for(self, options):
        model, heard, chosen = small_resnet(), [], []
        choose = self.choice(model, **options)
        schedule = self.schedule(model, choose, steps=3, heard=heard)
        optimizer = sgd(model)
        for epoch in range(4):
            chosen.append({layer.name: set(schedule.selection.channels(layer.name)) for layer in choose.layers})
            train(model, schedule, optimizer, size=32)
            assert not any(rows.any() for rows in pruned_parts(model, schedule.selection))
            schedule.next_network(epoch)
            assert not any(rows.any() for rows in pruned_parts(model, schedule.selection))
        assert heard == [1, 2] and chosen[2] == chosen[3]
        for before, after in pairwise(chosen):
            assert all(after[name] <= before[name] for name in before)
        sizes = [{name: len(channels) for name, channels in each.items()} for each in chosen]
        one_shot = choose()
        one_shot = {layer.name: len(one_shot.channels(layer.name)) for layer in choose.layers}
        if "budget" in options:
            dense = choose.cost({layer.name: range(layer.filters) for layer in choose.layers})
            kind, share = options["budget"].kind, options["budget"].share
            left = [
                choose.cost({name: sorted(channels) for name, channels in each.items()})[kind] / dense[kind] for each in chosen
            ]
            for cost, part in zip(left, (1 / 3, 2 / 3, 1, 1), strict=True):
                assert 0.8 * (1 - (1 - share) * part) < cost <= 1 - (1 - share) * part
        else:
            assert sizes[2] == one_shot
            if not choose.coupled:  # the streams of option A shortcuts are rounded part by part
                assert sizes[0] == {layer.name: keep_count(layer.filters, 0.8) for layer in choose.layers}

    def test_removed_filters_are_the_first_to_go_whatever_their_score(self):
        """Distances from a median rank a filter of zeros anywhere, were it not gone."""
        model = small_resnet()
        choose = self.choice(model)
        kept = {layer.name: torch.arange(layer.filters // 4, layer.filters) for layer in choose.layers}
        hard_pruning(model, kept)
        after = choose.at_step(1, 2, selected(model, kept))()
        for layer in choose.layers:
            assert set(after.channels(layer.name)) <= set(kept[layer.name].tolist())
            assert len(after.channels(layer.name)) == keep_count(layer.filters, 0.4)

    def test_only_networks_of_the_last_step_are_final(self):
        model = small_resnet()
        schedule = self.schedule(model, self.choice(model), steps=4, heard=[])
        assert [schedule.is_finished(epoch) for epoch in range(5)] == [False, False, True, True, True]
