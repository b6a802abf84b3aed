"""HRank's and CHIP's numbers of feature maps: by hand, and against singular value decompositions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from selections import prunable_layers
from torch import nn

from models import build_model
from models.graph import ChannelGraph
from models.graph.features import maps_of_convolutions
from prune.criteria import CRITERIA
from prune.feature_maps import mean_of_maps
from prune.map_scores import channel_independence, map_ranks
from utils.errors import UserError


def independence_by_svd(maps):
    """As the paper defines it, a filter at a time."""
    result = np.zeros(maps.shape[:2])
    for image, rows in enumerate(maps.flatten(2).double().numpy()):
        whole = np.linalg.norm(rows, "nuc")
        for i in range(len(rows)):
            result[image, i] = whole - np.linalg.norm(np.delete(rows, i, 0), "nuc") if len(rows) > 1 else whole
    return torch.from_numpy(result)


def largest_values(maps):
    return torch.linalg.matrix_norm(maps.flatten(2).double(), ord=2)[:, None]


# ---- values ------------------------------------------------------------------------------------------------------------


def test_ranks_by_hand():
    outer = torch.outer(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, -1, 2]))
    maps = torch.stack([torch.zeros(3, 3), outer, outer + torch.diag(torch.tensor([0, 0, 1.0])), torch.eye(3)])
    assert map_ranks(maps[None]).tolist() == [[0, 1, 2, 3]]


def test_independence_by_hand():
    apart = torch.tensor([[[3.0, 0], [0, 4]], [[0, 2.0], [0, 0]]])[None]  # no pixel in common: their norms, 5 and 2
    torch.testing.assert_close(channel_independence(apart), torch.tensor([[5.0, 2.0]]).double(), rtol=1e-6, atol=0)
    twins = torch.tensor([[[3.0, 0], [0, 4]]] * 2)[None]  # sqrt(2) * 5 together, 5 alone
    torch.testing.assert_close(channel_independence(twins)[0, 0].item(), 5 * (math.sqrt(2) - 1), rtol=1e-6, atol=0)
    assert channel_independence(torch.zeros(1, 3, 2, 2)).tolist() == [[0, 0, 0]]


@given(
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 2**16),
    st.sampled_from(["plain", "relu", "low", "dead"]),
)
def test_numbers_are_those_of_singular_values(filters, height, width, seed, kind):
    maps = torch.randn(2, filters, height, width, generator=torch.Generator().manual_seed(seed))
    if kind == "relu":
        maps = maps.relu()
    elif kind == "low":  # of rank one within and between maps
        maps = maps[:, :1, :1] * maps[:, :, :, :1]
    elif kind == "dead":
        maps[:, ::2] = 0
    assert map_ranks(maps).equal(torch.linalg.matrix_rank(maps))
    difference = (channel_independence(maps) - independence_by_svd(maps)).abs()
    assert (difference <= 1e-6 * largest_values(maps)).all()


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_units_do_not_matter(scale):
    maps = torch.randn(1, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(channel_independence(maps * scale) / scale, channel_independence(maps), rtol=1e-6, atol=0)
    assert map_ranks(maps * scale).equal(map_ranks(maps))


# ---- maps --------------------------------------------------------------------------------------------------------------


def images_of(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(size, 3, 8, 8, generator=generator), torch.zeros(size, dtype=torch.long)) for size in sizes]


def trained_resnet():
    torch.manual_seed(0)
    network = build_model("resnet8", num_classes=4)
    network(torch.randn(16, 3, 8, 8))  # statistics of its own
    return network


def test_maps_are_those_behind_batch_norm_sum_and_relu():
    network, [(images, _)] = trained_resnet().eval(), images_of(3)
    names = ["conv_1_3x3", "stage_2.0.conv_a", "stage_2.0.conv_b", "stage_3.0.conv_b"]
    stem, inner, first, last = maps_of_convolutions(ChannelGraph(network, images), names)(network, images)
    blocks = network.outputs(images).blocks
    torch.testing.assert_close(stem, F.relu(network.bn_1(network.conv_1_3x3(images))))
    block = network.stage_2[0]
    torch.testing.assert_close(inner, F.relu(block.bn_a(block.conv_a(blocks[0]))))
    torch.testing.assert_close(first, blocks[1])
    torch.testing.assert_close(last, blocks[2])


@pytest.mark.parametrize("of_maps", [map_ranks, channel_independence])
def test_the_mean_is_over_images_and_nothing_is_left_of_the_pass(of_maps):
    network, batches = trained_resnet().train(), images_of(3, 1)
    layers = [layer for layer in prunable_layers(network) if layer.name.endswith("conv_b")]
    before, state = torch.get_rng_state(), {name: value.clone() for name, value in network.state_dict().items()}
    means = mean_of_maps(ChannelGraph(network, batches[0][0]), batches, layers=layers, of_maps=of_maps)
    assert network.training and torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    blocks = network.eval().outputs(torch.cat([images for images, _ in batches])).blocks
    for mean, block in zip(means.values(), blocks, strict=True):
        torch.testing.assert_close(mean, of_maps(block.detach()).double().mean(0), rtol=1e-5, atol=1e-6)


def test_processes_add_up():
    network, batches = trained_resnet(), images_of(2)
    layers = prunable_layers(network)[:2]
    passed = {"layers": layers, "of_maps": channel_independence}
    alone = mean_of_maps(ChannelGraph(network), batches, **passed)
    doubled = mean_of_maps(ChannelGraph(network), batches, all_reduce=lambda tensor: tensor.mul_(2), **passed)
    for name, scores in alone.items():
        torch.testing.assert_close(doubled[name], scores)


def test_what_has_no_maps_is_refused_by_name():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.unused, self.head = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.conv(self.conv(x)).mean((2, 3)))

    network, [(images, _)] = Twice(), images_of(1)
    for name, times in (("conv", 2), ("unused", 0)):
        with pytest.raises(UserError, match=f"{name}: has no feature maps of its own, it is called {times} times"):
            maps_of_convolutions(ChannelGraph(network, images), [name])


def test_no_batch_and_maps_that_are_not_finite_are_refused():
    network, batches = trained_resnet(), images_of(2)
    passed = {"layers": prunable_layers(network)[:1], "of_maps": map_ranks}
    with pytest.raises(UserError, match="samp_batches: not one training batch"):
        mean_of_maps(ChannelGraph(network), [], **passed)
    with torch.no_grad():
        network.bn_1.bias[2] = math.inf
    with pytest.raises(UserError, match="the feature maps of conv_1_3x3 are NaN or infinite"):
        mean_of_maps(ChannelGraph(network), batches, **passed)


@pytest.mark.parametrize("name", ["filter-hrank", "filter-chip"])
def test_scores_are_the_means_and_need_them(name):
    weight = torch.ones(3, 2, 1, 1)
    assert CRITERIA[name](weight, feature_maps=torch.tensor([1.0, 3.0, 2.0])).tolist() == [1, 3, 2]
    with pytest.raises(UserError, match=rf"{name} needs a number of the feature maps of each filter, \(3,\)"):
        CRITERIA[name](weight)
