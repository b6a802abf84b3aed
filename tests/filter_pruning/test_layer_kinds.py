"""Sequences, volumes, transposed convolutions and instance norms: the small network is smaller, and the masked one's function."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import filter_pruning as fp
from models.graph import ChannelGraph
from prune.gradients import importances, mean_gradients
from prune.schedule import HardPruning, PhysicalPruning


def plain(*layers: nn.Module, axes: int) -> nn.Module:
    pool = getattr(nn, f"AdaptiveAvgPool{axes}d")(1)
    return nn.Sequential(*layers, pool, nn.Flatten(), nn.Linear(16, 3))


class UNet(nn.Module):
    """One level down and up again, its maps concatenated; the result is a map."""

    def __init__(self, *, groups: int = 1):
        super().__init__()
        self.first, self.down = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.up, self.norm = nn.ConvTranspose2d(32, 16, 2, stride=2, groups=groups), nn.BatchNorm2d(16)
        self.last, self.out = nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(16, 2, 1)

    def forward(self, x):
        high = F.relu(self.first(x))
        low = F.relu(self.down(F.max_pool2d(high, 2)))
        return self.out(F.relu(self.last(torch.cat((F.relu(self.norm(self.up(low, output_size=x.shape[2:]))), high), 1))))


def of_sequences():
    return plain(nn.Conv1d(2, 16, 3), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 16, 3), nn.ReLU(), axes=1)


def of_volumes():
    return plain(nn.Conv3d(1, 16, 3), nn.BatchNorm3d(16), nn.ReLU(), nn.Conv3d(16, 16, 1), nn.ReLU(), axes=3)


def transposed(axes: int):
    up, norm = getattr(nn, f"ConvTranspose{axes}d"), getattr(nn, f"BatchNorm{axes}d")
    return plain(up(2, 16, 2, stride=2), norm(16), nn.ReLU(), up(16, 16, 3, bias=False), nn.ReLU(), axes=axes)


def depthwise():
    up = nn.ConvTranspose2d(16, 16, 2, stride=2, groups=16)
    return plain(nn.Conv2d(2, 16, 1), nn.ReLU(), up, nn.ReLU(), nn.Conv2d(16, 16, 1), axes=2)


def instance_normed(**options):
    norm = nn.InstanceNorm2d(16, **options)
    return plain(nn.Conv2d(2, 16, 3), norm, nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), axes=2)


def image(*sizes: int) -> torch.Tensor:
    return torch.rand(3, *sizes, generator=torch.Generator().manual_seed(0))


NETWORKS = {
    "sequences": (of_sequences, image(2, 9)),
    "volumes": (of_volumes, image(1, 4, 4, 4)),
    "transposed sequences": (lambda: transposed(1), image(2, 5)),
    "transposed": (lambda: transposed(2), image(2, 4, 4)),
    "transposed volumes": (lambda: transposed(3), image(2, 2, 2, 2)),
    "transposed, depthwise": (depthwise, image(2, 4, 4)),
    "UNet": (UNet, image(1, 8, 8)),
    "instance norm": (lambda: instance_normed(affine=True), image(2, 6, 6)),
    "instance norm with statistics": (lambda: instance_normed(track_running_stats=True), image(2, 6, 6)),
}


def seeded(name: str):
    make, x = NETWORKS[name]
    torch.manual_seed(0)
    network = make().eval()
    for module in network.modules():
        if getattr(module, "weight", None) is not None and hasattr(module, "num_features"):
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.bias)
    return network, x


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_all_layers_become_half_as_wide_and_the_function_is_the_masked_one(name, coupled):
    network, x = seeded(name)
    selection = fp.select(network, x, keep=0.5, coupled=coupled)
    small, masked = selection.shrink(), selection.mask()
    torch.testing.assert_close(small(x), masked(x))
    assert parameters(small) == selection.parameters < 0.6 * parameters(network)
    assert small.restored == [] and not small.uncut.keys() & selection.kept.keys()
    with FlopCounterMode(display=False) as counter:
        small(x[:1])
    assert counter.get_total_flops() == 2 * selection.macs
    rebuilt = seeded(name)[0]
    rebuilt.load_state_dict(small.dense_state_dict())
    torch.testing.assert_close(rebuilt.eval()(x), small(x))


@pytest.mark.parametrize("name", ["sequences", "transposed", "transposed, depthwise", "UNet", "instance norm"])
def test_training_is_that_of_the_masked_network(name):
    network, x = seeded(name)
    selection = fp.select(network, x, keep=0.5)
    PhysicalPruning(selection.graph, selection).prove(x)


def test_pruned_filters_of_a_transposed_layer_are_held_at_zero():
    network, x = seeded("UNet")
    selection = fp.select(network, x, keep=0.5)
    schedule = HardPruning(selection.graph, selection)
    nn.init.ones_(network.up.weight)
    schedule.clear_pruned()
    live = network.up.weight.ne(0)
    assert live.all(0).any(2).any(1).nonzero().flatten().tolist() == list(selection.channels("up"))
    assert int(live.sum()) == 32 * 8 * 4


def test_scores_are_of_the_outputs():
    """Of a transposed layer gradients and importances are by output, which are on the second axis of its weight."""
    network, x = seeded("UNet")
    layers = {layer.name: layer for layer in ChannelGraph(network, x).prunable_layers()}
    up = layers["up"]
    assert up.weight.shape == (16, 32, 2, 2) and up.norm_name == "norm"
    batches = [(x, torch.zeros(3, 8, 8, dtype=torch.long))]
    with torch.no_grad():
        network.norm.bias.fill_(5)  # all filters are alive
        network.last.weight[:, [1, 2]] = 0  # nothing reads what these two outputs of `up` give
    gradient = mean_gradients(network, batches, layers=[up], loss=F.cross_entropy)["up"]
    assert gradient.shape == up.weight.shape
    importance = importances(network, batches, layers=[up], of="weights", loss=F.cross_entropy)["up"]
    for values in (gradient.abs().flatten(1).sum(1), importance):
        assert values.eq(0).nonzero().flatten().tolist() == [1, 2]


def test_a_transposed_layer_in_groups_stays_whole():
    torch.manual_seed(0)
    network, x = UNet(groups=4).eval(), image(1, 8, 8)
    selection = fp.select(network, x, keep=0.5)
    small = selection.shrink()
    assert "up" not in selection.kept and small.uncut["up"] == "it is transposed, in groups of several channels"
    torch.testing.assert_close(small(x), selection.mask()(x))


def test_least_squares_mends_what_reads_and_is_transposed():
    network, x = seeded("UNet")
    small = fp.prune(network, x, keep=0.5)
    batches = [torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))]
    before = (small(batches[0]) - network(batches[0])).square().mean()
    fits = {fit.name: fit for fit in fp.reconstruct(small, network, batches)}
    assert (small(batches[0]) - network(batches[0])).square().mean() < before and fits["up"].after < fits["up"].before


def test_scores_of_maps_need_images():
    network, x = seeded("sequences")
    with pytest.raises(fp.PruningError, match="maps of two axes"):
        fp.select(network, x, keep=0.5, criterion="hrank", batches=[(x, torch.zeros(3))])
