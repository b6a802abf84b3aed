"""Compact networks: what is zero is found and cut, through every kind of operation, and the function stays the same."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from random_networks import RandomNetwork, network_descriptions, prune_at_random
from torch import Tensor, nn
from torchvision.models.shufflenetv2 import channel_shuffle

from models.cifar_resnet import CifarResNet
from models.graph import ChannelGraph
from prune.compact import check_pruned_zeros, compact, nonzero_selection, relative_difference
from utils.errors import UserError

DEAD = [1, 2, 5]  # of 8 channels
LIVE = [0, 3, 4, 6, 7]


class Chain(nn.Module):
    """A convolution of which three filters are dead, an operation to follow the zeros through, and a reader of its result."""

    def __init__(self, operation, reader: nn.Module | None = None, *, channels: int = 8):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.operation = operation
        self.reader = reader if reader is not None else nn.Conv2d(channels, 4, 1)
        with torch.no_grad():
            self.conv.weight[DEAD] = 0
            self.conv.bias[DEAD] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.operation(self.conv(x)))


def images(size: int = 6) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def compacted(model: nn.Module) -> nn.Module:
    """The compact network, equal to `model` to rounding in evaluation."""
    small = compact(model, images(), tolerance=1e-5)
    torch.testing.assert_close(small.eval()(images()), model.eval()(images()), rtol=1e-4, atol=1e-5)
    return small


ZERO_KEEPING = {
    "relu": F.relu,
    "relu_": lambda x: x.relu_(),
    "relu6": nn.ReLU6(inplace=True),
    "silu": nn.SiLU(),
    "gelu": F.gelu,
    "hardswish": nn.Hardswish(),
    "leaky_relu": nn.LeakyReLU(0.1),
    "tanh": torch.tanh,
    "prelu": nn.PReLU(8),
    "max_pool": nn.MaxPool2d(3, 2, 1),
    "F.max_pool": lambda x: F.max_pool2d(x, 2),
    "avg_pool": lambda x: F.avg_pool2d(x, 2),
    "adaptive_pool": nn.AdaptiveAvgPool2d(2),
    "padding": lambda x: F.pad(x, (1, 0, 2, 1)),
    "reflection": nn.ReflectionPad2d(1),
    "subsampling": lambda x: x[:, :, ::2, 1::2],
    "scaling": lambda x: 2 * x / 3,
    "dropout": nn.Dropout(),
    "upsampling": nn.Upsample(scale_factor=2),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "sizes in space": lambda x: F.adaptive_avg_pool2d(x, (x.shape[2], x.size(3))),
    "batch norm": nn.BatchNorm2d(8),
    "double sum": lambda x: x + x.relu() + x.tanh(),
    "difference": lambda x: x - x.relu(),
    "product": lambda x: x * x.tanh(),
    "shuffle": lambda x: channel_shuffle(x, 2),
    "permuted": lambda x: x.permute(0, 2, 3, 1).transpose(1, 3).permute(0, 1, 3, 2).contiguous(),
}


@pytest.mark.parametrize("name", ZERO_KEEPING)
def test_zeros_are_followed_through(name):
    small = compacted(Chain(ZERO_KEEPING[name]))
    assert small.conv.weight.shape[0] == 5 and small.reader.weight.shape[1] == 5


ZERO_BREAKING = {
    "sigmoid": torch.sigmoid,
    "plus one": lambda x: x + 1,
    "softmax": lambda x: x.softmax(1),
    "layer norm": nn.LayerNorm(6),
    "group norm": nn.GroupNorm(2, 8),
    "power of": lambda x: 2**x,
    "shifted clamp": lambda x: x.clamp(0.5, 1.0),
    "padding with ones": lambda x: F.pad(x, (1, 1, 1, 1), value=1.0),
    "shifted norm": nn.BatchNorm2d(8),
    "channel reversal": lambda x: x.flip(1),
    "own reshape": lambda x: x.reshape(2, 4, 2, 6, 6).sum(2).repeat(1, 2, 1, 1),
    "mean over channels": lambda x: x - x.mean(1, keepdim=True),
    "division by itself": lambda x: x / (x.abs() + 1),
    "sizes": lambda x: x * x.size(1),
    "shape": lambda x: x * x.shape[1],
}


@pytest.mark.parametrize("name", ZERO_BREAKING)
def test_other_operations_see_the_full_width(name):
    model = Chain(ZERO_BREAKING[name])
    if name == "shifted norm":
        nn.init.ones_(model.operation.bias)
    small = compacted(model)
    assert small.conv.weight.shape[0] == 5 and small.reader.weight.shape[1] == 8


def test_flatten_cuts_all_pixels_of_a_channel():
    for operation in (nn.Flatten(), lambda x: x.flatten(1), lambda x: x.view(x.size(0), -1), lambda x: x.reshape(x.shape[0], -1)):
        small = compacted(Chain(operation, nn.Linear(8 * 36, 4)))
        assert small.reader.weight.shape == (4, 5 * 36)


def test_a_flat_tensor_is_restored_where_needed():
    small = compacted(Chain(lambda x: x.flatten(1).softmax(1), nn.Linear(8 * 36, 4)))
    assert small.conv.weight.shape[0] == 5 and small.reader.weight.shape == (4, 8 * 36)


def test_dead_linear_units_go():
    model = Chain(lambda x: x.mean((2, 3)), nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)))
    with torch.no_grad():
        model.reader[0].weight[[0, 4]] = 0
        model.reader[0].bias[[0, 4]] = 0
    small = compacted(model)
    assert small.get_submodule("reader.0").weight.shape == (4, 5) and small.get_submodule("reader.2").weight.shape == (4, 4)


def test_cat_chunk_and_padded_channels():
    assert compacted(Chain(lambda x: torch.cat([x, x.relu(), x], 1), channels=24)).reader.weight.shape[1] == 15
    halves = Chain(lambda x: x.chunk(2, 1)[0] + torch.split(x, 4, dim=1)[1], channels=4)  # 0, 3 and 0, 2, 3 are live
    assert compacted(halves).reader.weight.shape[1] == 3
    assert compacted(Chain(lambda x: F.pad(x, (0, 0, 0, 0, 2, 3)), channels=13)).reader.weight.shape[1] == 5


def test_a_chunk_without_live_channels():
    model = Chain(lambda x: torch.cat(x.chunk(4, 1)[:2], 1) + 1, channels=4)
    with torch.no_grad():
        model.conv.weight[:2], model.conv.bias[:2] = 0, 0
    compacted(model)


def test_depthwise_and_grouped_convolutions():
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    small = compacted(Chain(depthwise))
    assert small.operation.weight.shape == (5, 1, 3, 3) and small.operation.groups == 5
    grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)  # 2 and 3 live inputs a group
    with torch.no_grad():
        grouped.weight[[0, 1, 6]], grouped.bias[[0, 1, 6]] = 0, 0  # 4 and 5 live filters a group
    small = compacted(Chain(grouped, channels=12))
    assert small.operation.weight.shape == (10, 3, 3, 3) and small.operation.groups == 2
    with torch.no_grad():
        grouped.weight[:6], grouped.bias[:6] = 0, 0
    small = compacted(Chain(grouped, channels=12))
    assert small.operation.weight.shape == (5, 3, 3, 3) and small.operation.groups == 1


def test_filters_whose_norm_is_zero_go_although_they_are_not():
    model = Chain(nn.BatchNorm2d(8))
    with torch.no_grad():
        model.operation.weight[[0, 1, 7]], model.operation.bias[[0, 1, 7]] = 0, 0
    small = compacted(model)
    assert small.kept == {"conv": [3, 4, 6], "operation": [3, 4, 6]}


def test_zeros_spread_to_filters_that_only_read_zeros():
    model = Chain(nn.Sequential(nn.Conv2d(8, 4, 1, bias=False), nn.ReLU()), channels=4)
    with torch.no_grad():
        model.operation[0].weight[2][LIVE] = 0  # reads dead channels alone
    assert nonzero_selection(ChannelGraph(model)).to_json() == {"conv": LIVE, "operation.0": [0, 1, 3]}


def test_a_sum_of_different_channels():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
            self.reader = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.reader(self.first(x) + self.second(x).mean((2, 3), keepdim=True))

    model = Residual()
    with torch.no_grad():
        for conv, dead in ((model.first, DEAD), (model.second, [0, 1, 2, 3])):
            conv.weight[dead], conv.bias[dead] = 0, 0
    assert compacted(model).reader.weight.shape[1] == 6  # all but 1 and 2


def test_a_layer_called_twice_or_sharing_its_weight_is_left_alone():
    model = Chain(nn.Conv2d(8, 8, 1))
    model.operation = nn.Sequential(model.operation, model.operation)
    small = compacted(model)
    assert small.reader.weight.shape[1] == 8
    model = Chain(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
    model.reader.weight = model.operation.weight
    small = compacted(model)
    assert small.reader.weight is small.operation.weight and small.conv.weight.shape[0] == 5


def test_writing_into_a_cut_tensor_is_refused_by_name():
    with pytest.raises(UserError, match="operation `copy_` writes into a tensor whose channels are cut"):
        compact(Chain(lambda x: x.copy_(x.flip(1))), images())


def test_a_difference_is_an_error():
    class Unsteady(nn.Module):
        """Its function changes from call to call, which no compact form can equal."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.bernoulli(self.conv(x).sigmoid())

    with pytest.raises(UserError, match="the compact network differs from the dense one by"):
        compact(Unsteady(), images())


def test_relative_difference_by_hand():
    scale, shifted = nn.Linear(1, 2, bias=False), nn.Linear(1, 2, bias=False)
    scale.weight.data = torch.tensor([[1.0], [-4.0]])
    shifted.weight.data = torch.tensor([[1.0], [-3.0]])
    batches = [torch.ones(1, 1), torch.full((1, 1), 2.0)]  # logits up to 8 in size, differences 1 and 2
    scale.train()
    assert relative_difference(scale, shifted, batches) == pytest.approx(0.25)
    assert scale.training


def test_pruned_channels_must_be_zero():
    model = CifarResNet(depth=8, num_classes=3)
    nn.init.zeros_(model.bn_1.weight)
    nn.init.zeros_(model.bn_1.bias)
    check_pruned_zeros(model.state_dict(), {"bn_1": [0, 1]})
    with torch.no_grad():
        model.bn_1.bias[5] = -0.25
    with pytest.raises(UserError, match=r"bn_1\.bias: pruned channels must be exactly 0, the largest entry left there is 0\.25"):
        check_pruned_zeros(model.state_dict(), {"bn_1": [0, 1]})


@pytest.mark.parametrize("channels", [[0, 16], [-1], [3, 3], ["3"]])
def test_kept_channels_that_the_layer_has_not_got(channels):
    with pytest.raises(UserError, match="kept channels of 'bn_1': different numbers from 0 to 15"):
        check_pruned_zeros(CifarResNet(depth=8, num_classes=3).state_dict(), {"bn_1": channels})


# ---- random networks ---------------------------------------------------------------------------------------------------


@given(
    operations=network_descriptions(),
    hidden=st.integers(1, 4),
    seed=st.integers(0, 1000),
    dead_share=st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]),
)
def test_random_networks_stay_the_same_function(operations, hidden, seed, dead_share):
    torch.manual_seed(seed)
    model = RandomNetwork(operations, hidden=hidden).double()
    prune_at_random(model, seed=seed, dead_share=dead_share)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    try:
        small = compact(model, x, tolerance=1e-9)
    except UserError as error:
        assert "overwrites memory that is read later" in str(error) and "write" in {own[0] for own in model.operations}
        return
    assert sum(p.numel() for p in small.parameters()) <= sum(p.numel() for p in model.parameters())
    with torch.no_grad():  # torch has no gradients for some of what is overwritten
        torch.testing.assert_close(small.train()(x), model.train()(x), rtol=1e-6, atol=1e-6)


class SqueezeExcitation(nn.Module):
    """Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018, its gates by linear layers and brought to the map's axes."""

    def __init__(self, squeeze, excite):
        super().__init__()
        self.squeeze, self.excite = squeeze, excite
        self.gates = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excite(self.gates(self.squeeze(F.adaptive_avg_pool2d(x, 1), x)), x)


EXCITATIONS = {
    "views and expand_as": (
        lambda pooled, x: pooled.view(x.size(0), x.size(1)),
        lambda gates, x: gates.view(x.size(0), x.size(1), 1, 1).expand_as(x),
    ),
    "shapes and expand": (
        lambda pooled, x: pooled.reshape(x.shape[0], x.shape[1]),
        lambda gates, x: gates.view(x.shape[0], -1, 1, 1).expand(x.shape[0], x.shape[1], x.shape[2], x.shape[3]),
    ),
    "None as an index": (lambda pooled, x: pooled.flatten(1), lambda gates, x: gates[:, :, None, None]),
    "unsqueeze": (lambda pooled, x: pooled.view(x.size(0), -1), lambda gates, x: gates.unsqueeze(-1).unsqueeze(2)),
}


@pytest.mark.parametrize("name", EXCITATIONS)
def test_gates_of_linear_layers_read_and_scale_what_is_left(name):
    small = compacted(Chain(SqueezeExcitation(*EXCITATIONS[name])))
    assert small.get_submodule("operation.gates.0").weight.shape == (4, 5) and small.reader.weight.shape[1] == 5
    assert not small.restored


def test_a_group_norm_loses_whole_groups():
    model = Chain(nn.GroupNorm(4, 8))
    with torch.no_grad():
        for tensor in (model.conv.weight, model.conv.bias, model.operation.weight, model.operation.bias):
            tensor[[0, 1, 2]] = 0  # channel 3 is normalised together with channel 2
    small = compacted(model)
    assert (small.operation.num_groups, small.operation.num_channels) == (3, 6)
    assert small.reader.weight.shape[1] == 6 and small.conv.weight.shape[0] == 4  # 5 is dead as well
