"""The order of removal: against least squares solved anew for every channel and step, and through the choice of filters."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import build_model
from models.graph import ChannelGraph
from models.graph.groups import filters_read, single_groups
from prune.criteria import CRITERIA
from prune.reconstruction import RIDGE
from prune.removal import removal_order
from utils.errors import UserError


class Pair(nn.Module):
    """A convolution of five filters and two that read it, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3), nn.Conv2d(5, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return torch.cat([self.second(x).flatten(1), self.third(x).flatten(1)], 1)


def image_batches() -> list[tuple[Tensor, None]]:
    """One batch, for a reader takes no further one once it has rows enough."""
    return [(torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(3)), None)]


def loss_without(rows: np.ndarray, layer: nn.Conv2d, gone: list[int]) -> float:
    """What is left of the squares of one layer without the channels `gone`, by a solver of the augmented system."""
    weight = layer.weight.detach().double().flatten(1).T.numpy()
    width, inputs = layer.kernel_size[0] ** 2, len(weight)
    ridge = RIDGE * np.square(rows).sum(0).mean()
    system = np.vstack([rows, np.sqrt(ridge) * np.eye(inputs)])
    constant = np.concatenate([np.ones(len(rows)), np.zeros(inputs)])[:, None]
    target, given = system @ weight, rows @ weight
    if layer.bias is not None:
        bias = layer.bias.detach().double().numpy()
        target, given = target + constant * bias, given + bias
        system = np.hstack([system, constant])
    columns = [i for i in range(system.shape[1]) if i >= inputs or i // width not in gone]
    solution = np.linalg.lstsq(system[:, columns], target, rcond=None)[0]
    return np.square(system[:, columns] @ solution - target).sum() / np.square(given).sum()


def brute_force_order(network: Pair, batches: list[tuple[Tensor, None]]) -> list[int]:
    with torch.no_grad():
        maps = torch.cat([network.first(images).relu() for images, _ in batches])
    rows = {3: F.unfold(maps, 3), 1: F.unfold(maps, 1)}
    rows = {size: own.mT.reshape(-1, own.shape[1]).double().numpy() for size, own in rows.items()}
    order: list[int] = []
    for _ in range(5):
        losses = {
            channel: sum(loss_without(rows[layer.kernel_size[0]], layer, [*order, channel])
                         for layer in (network.second, network.third))
            for channel in range(5) if channel not in order
        }  # fmt: skip
        order.append(min(losses, key=losses.__getitem__))
    return order


def order_of(network: nn.Module, batches: list, **how: bool) -> dict[str, Tensor]:
    graph = ChannelGraph(network, batches[0][0])
    layers = graph.prunable_layers()
    families = graph.channel_groups(layers) if how.get("coupled") else single_groups(layers)
    return removal_order(graph, families, batches, layers=layers)


@pytest.mark.parametrize("seed", range(6))
def test_the_order_is_that_of_least_squares_solved_for_every_channel(seed):
    torch.manual_seed(seed)
    network, batches = Pair().eval(), image_batches()
    expected = brute_force_order(network, batches)
    places = order_of(network, batches)["first"]
    assert places.argsort().tolist() == expected


def test_a_copy_and_a_channel_that_is_silent_go_first():
    torch.manual_seed(0)
    network = Pair().eval()
    with torch.no_grad():
        network.first.weight[4], network.first.bias[4] = network.first.weight[1], network.first.bias[1]
        network.first.weight[2], network.first.bias[2] = 0, 0
        network.third.weight[:, 2] = 5
    places = order_of(network, image_batches())["first"]
    assert places[2] == 1
    assert 2 in (places[1], places[4])


def test_labels_and_network_are_left_alone_and_the_same_images_give_the_same_bits():
    network = build_model("repdistiller/resnet8", num_classes=10).eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    batches = [(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)), None)]
    one, other = order_of(network, batches, coupled=True), order_of(network, batches, coupled=True)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_coupled_filters_share_a_place_and_each_family_is_ordered_whole():
    network = build_model("repdistiller/resnet8", num_classes=10).eval()
    batches = [(torch.randn(4, 3, 32, 32), None)]
    order = order_of(network, batches, coupled=True)
    graph = ChannelGraph(network, batches[0][0])
    for family in graph.channel_groups(graph.prunable_layers()):
        places = [{float(order[name][channel]) for name, channel in group.filters} for group in family]
        assert all(len(own) == 1 for own in places)
        assert sorted(itertools.chain(*places)) == [*range(1, len(family) + 1)]


def test_a_sum_that_is_left_alone_ranks_by_the_variance_of_the_map():
    network = build_model("repdistiller/resnet8", num_classes=10).eval()
    layers = {layer.name: layer for layer in ChannelGraph(network).prunable_layers()}
    images = torch.randn(4, 3, 32, 32)
    last = next(name for name in layers if name.startswith("layer1") and name.endswith("conv2"))
    with torch.no_grad():
        layers[last].norm.weight.copy_(torch.linspace(3, 1, layers[last].filters))
    seen = {}
    handle = layers[last].norm.register_forward_hook(lambda module, inputs, result: seen.update(maps=result))
    with torch.no_grad():
        network(images)
    handle.remove()
    variances = seen["maps"].double().var((0, 2, 3), correction=0)
    assert order_of(network, [(images, None)])[last].argsort().tolist() == variances.argsort().tolist()


def test_filters_of_a_sum_decide_together_on_what_reads_it():
    network = build_model("repdistiller/resnet8", num_classes=10).eval()
    read = filters_read(ChannelGraph(network, torch.zeros(1, 3, 32, 32)))
    assert {name for name, _ in read["layer1.0.conv2"][3]} == {"layer1.0.conv1"}
    assert {("conv1", 3), ("layer1.0.conv2", 3)} <= read["layer1.0.conv1"][3]
    assert "conv1" not in read


def test_no_batch_and_maps_that_are_not_finite_are_refused():
    network = Pair().eval()
    graph = ChannelGraph(network, torch.zeros(1, 3, 8, 8))
    layers = graph.prunable_layers()
    with pytest.raises(UserError, match="samp_batches: not one training batch"):
        removal_order(graph, single_groups(layers), [], layers=layers)
    with torch.no_grad():
        network.first.bias[0] = torch.inf
    with pytest.raises(UserError, match="is NaN or infinite; check the network that is pruned"):
        order_of(network, image_batches())


def test_scores_are_the_places_and_need_them():
    weight = torch.ones(3, 2, 1, 1)
    assert CRITERIA["filter-error"](weight, removal_order=torch.tensor([2.0, 3.0, 1.0])).tolist() == [2, 3, 1]
    with pytest.raises(UserError, match=r"filter-error needs the place of each filter in the order of removal, \(3,\)"):
        CRITERIA["filter-error"](weight)
