"""Groups of channels: found where channels meet, and gone without a step that lays channels out anew."""

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from random_networks import RandomNetwork, network_descriptions
from selections import channel_groups, hard_pruning, prunable_layers
from torch import nn

from models import build_model
from models.graph import output_channels
from utils.errors import UserError


class Small(nn.Module):
    """A stem, a residual block with a depthwise convolution, and a gate."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.expand = nn.Conv2d(4, 6, 1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.project = nn.Conv2d(6, 4, 1)
        self.gate = nn.Conv2d(4, 4, 1)
        self.classifier = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + self.project(F.relu(self.depthwise(F.relu(self.expand(x)))))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.classifier(x.mean((2, 3)))


class Sliced(nn.Module):
    """A stem of which a convolution in groups reads half."""

    def __init__(self, groups):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=groups), nn.BatchNorm2d(8)
        self.pointwise, self.classifier = nn.Conv2d(8, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.grouped(self.stem(x)[:, :8])))
        return self.classifier(self.pointwise(x).mean((2, 3)))


def groups_of(network, size=8):
    example = torch.randn(2, 3, size, size)
    return channel_groups(network, prunable_layers(network, example=example), example=example)


def test_what_meets_in_a_sum_a_product_or_a_depthwise_convolution_goes_together():
    stream, hidden = groups_of(Small())
    assert [group.filters for group in stream] == [tuple((name, i) for name in ("stem", "project", "gate")) for i in range(4)]
    assert [group.filters for group in hidden] == [(("expand", i), ("depthwise", i)) for i in range(6)]
    assert stream[0].layers == ("stem", "project", "gate")


def test_streams_of_option_a_shortcuts_share_their_first_channels():
    streams = [alike for alike in groups_of(build_model("resnet20", num_classes=10)) if len(alike[0].layers) > 1]
    assert [len(alike) for alike in streams] == [16, 16, 32]  # in all three stages, from the second on, in the third alone
    first, second, third = (alike[0] for alike in streams)
    assert {name.partition(".")[0] for name in first.layers} == {"conv_1_3x3", "stage_1", "stage_2", "stage_3"}
    assert {channel for _, channel in second.filters} == {16}
    assert {name.partition(".")[0] for name in third.layers} == {"stage_3"}


def test_what_another_layer_reads_at_full_width_is_in_no_group():
    class Normed(Small):
        def forward(self, x):
            return self.classifier(F.layer_norm(self.project(self.depthwise(self.expand(self.stem(x)))).mean((2, 3)), (4,)))

    assert [alike[0].layers for alike in groups_of(Normed())] == [("stem",), ("expand", "depthwise")]


@pytest.mark.parametrize("groups", [8, 4])
def test_a_slice_of_the_channels_goes_with_what_it_shows(groups):
    network = Sliced(groups)
    families = groups_of(network)
    members = [member for alike in families for group in alike for member in group.filters]
    assert {name for name, _ in members} == {"stem", "grouped", "pointwise"} and len(members) == 16 + 8 + 6
    small = without(network, [group for alike in families for group in alike[::2]])
    assert small.relayout_count == 0 and small.restored == []


def test_all_groups_of_a_grouped_convolution_lose_the_same():
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1, groups=2), nn.Flatten(), nn.Linear(4 * 36, 3))
    inputs, filters = groups_of(network)
    assert [group.filters for group in inputs] == [(("0", i), ("0", i + 3)) for i in range(3)]
    assert [group.filters for group in filters] == [(("1", i), ("1", i + 2)) for i in range(2)]


def test_entries_of_a_batch_norm_that_reads_a_concatenation_go_with_what_they_read():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 3, 1), nn.Conv2d(5, 4, 1)
            self.norm, self.classifier = nn.BatchNorm2d(5), nn.Linear(4, 3)

        def forward(self, x):
            x = self.first(x)
            x = F.relu(self.norm(torch.cat([x, self.second(x)], 1)))
            return self.classifier(self.third(x).mean((2, 3)))

    first, second, third = groups_of(Dense())
    assert [group.norms for group in first] == [(("norm", 0),), (("norm", 1),)]
    assert [group.norms for group in second] == [(("norm", i),) for i in (2, 3, 4)]
    assert all(not group.norms for group in third)


def without(network, removed):
    """The network with the groups' channels at zero, and what narrow makes of it."""
    layers, kept = dict(network.named_modules()), {}
    for name, channel in (member for group in removed for member in (*group.filters, *group.norms)):
        kept.setdefault(name, set(range(output_channels(layers[name])))).discard(channel)
    kept = {name: sorted(channels) for name, channels in kept.items()}
    return hard_pruning(network, kept, example=torch.randn(2, 3, 32, 32)).selection.shrink()


NETWORKS = ["resnet20", "resnet18", "torchvision/mobilenet_v2", "torchvision/densenet121", "torchvision/mobilenet_v3_small"]


@pytest.mark.parametrize("name", NETWORKS)
def test_without_groups_the_small_network_is_the_same_and_lays_nothing_out_anew(name):
    network = build_model(name, num_classes=3).eval()
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias, std=0.1), norm.running_mean.normal_(std=0.1)
    draw = random.Random(1)
    groups = groups_of(network, size=64)
    filters = sum(layer.filters for layer in prunable_layers(network))
    assert sum(len(group.filters) for alike in groups for group in alike) == filters
    small = without(network, [group for alike in groups for group in draw.sample(alike, len(alike) // 2)])
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(images)
        assert (small(images) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert small.relayout_count == 0
    assert sum(map(torch.numel, small.parameters())) < 0.37 * sum(map(torch.numel, network.parameters()))


@pytest.mark.parametrize(("name", "own"), [("timm/ghostnet_050", 0), ("torchvision/shufflenet_v2_x0_5", 16)])
def test_all_that_is_laid_out_anew_is_what_the_network_shuffles_itself(name, own):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    network = build_model(name, num_classes=3).eval()
    small = without(network, [group for alike in groups_of(network, size=32) for group in alike[::2]])
    assert small.relayout_count == own and small.kept


@given(network_descriptions(), st.integers(0, 2**16))
def test_groups_of_random_networks_go_without_a_change(operations, seed):
    torch.manual_seed(seed)
    network = RandomNetwork(operations, hidden=4).eval()
    images = torch.randn(2, 3, 6, 6)
    try:
        groups = groups_of(network, size=6)
        draw = random.Random(seed)
        small = without(network, [group for alike in groups for group in alike if draw.random() < 0.5])
    except UserError:  # memory that is overwritten in a way that is refused
        assume(False)
    with torch.no_grad():
        expected = network(images)
        assert torch.allclose(small(images), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max() + 1))
