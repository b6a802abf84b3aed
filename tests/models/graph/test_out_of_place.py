"""In-place operations of a network: the narrow network computes what the dense one does, or it is refused by name."""

import operator

import pytest
import torch
import torch.nn.functional as F
from selections import narrow
from torch import Tensor, nn

from models.graph import ChannelGraph
from utils.errors import UserError

KEPT = [0, 3, 4, 6, 7]  # of 8


class Chain(nn.Module):
    """A convolution that loses filters, an operation on its maps, and a reader of the result."""

    def __init__(self, operation, reader: nn.Module | None = None, *, channels: int = 8):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.operation = nn.Conv2d(3, 8, 3, padding=1), operation
        self.reader = reader if reader is not None else nn.Conv2d(channels, 4, 1)
        with torch.no_grad():
            for tensor in (self.conv.weight, self.conv.bias):
                tensor[[1, 2, 5]] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.operation(self.conv(x)))


def images() -> Tensor:
    return torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def narrowed(model: nn.Module, *, learns: bool = True) -> nn.Module:
    """The narrow network, which agrees with `model` in results and, if it `learns`, in the gradients of what is left."""
    model = model.double()
    small = narrow(model, {"conv": KEPT})
    with torch.no_grad():
        torch.testing.assert_close(small(images()), model(images()))
    if learns:
        for network in (model, small):
            network(images()).square().sum().backward()
        gradient = model.conv.weight.grad
        torch.testing.assert_close(small.conv.weight.grad, None if gradient is None else gradient[KEPT])
    return small


# ---- activations that make something of zero ---------------------------------------------------------------------------

NOT_KEEPING_ZERO = {
    "hardsigmoid": nn.Hardsigmoid(inplace=True),
    "threshold": nn.Threshold(0.1, 20.0, inplace=True),
    "hardtanh above zero": nn.Hardtanh(0.2, 1.0, inplace=True),
    "F.hardsigmoid": lambda x: F.hardsigmoid(x, inplace=True),
    "F.threshold by position": lambda x: F.threshold(x, 0.1, 20.0, True),
    "F.hardtanh_": lambda x: F.hardtanh_(x, 0.2, 1.0),
    "clamp_": lambda x: x.clamp_(0.2, 1.0),
    "sigmoid_": lambda x: x.sigmoid_(),
    "exp_": lambda x: x.exp_(),
    "fill_": lambda x: x.clone().fill_(0.5) + x,
    "add_ a number": lambda x: x.add_(1),
}


@pytest.mark.parametrize("name", NOT_KEEPING_ZERO)
def test_an_activation_that_makes_something_of_zero_sees_the_full_width(name):
    assert narrowed(Chain(NOT_KEEPING_ZERO[name])).reader.weight.shape[1] == 8


def test_one_that_keeps_zero_stays_narrow():
    for operation in (nn.ReLU(inplace=True), nn.Hardtanh(-1, 1, inplace=True), nn.Hardswish(inplace=True), nn.ELU(inplace=True)):
        assert narrowed(Chain(operation)).reader.weight.shape[1] == 5


# ---- results that are dropped ------------------------------------------------------------------------------------------


def dropped(*statements):
    """An operation that carries out in-place statements and returns what it was given."""

    def operation(x: Tensor) -> Tensor:
        for statement in statements:
            statement(x)
        return x

    return operation


DROPPED = {
    "F.relu": lambda x: F.relu(x, inplace=True),
    "F.relu by position": lambda x: F.relu(x, True),
    "F.relu by name": lambda x: F.relu(input=x, inplace=True),
    "torch.relu_": lambda x: torch.relu_(x),
    "F.leaky_relu_": lambda x: F.leaky_relu_(x, 0.1),
    "relu_": lambda x: x.relu_(),
    "clamp_": lambda x: x.clamp_(0, 0.5),
    "add_": lambda x: x.add_(x.tanh()),
    "mul_": lambda x: x.mul_(2),
    "div_": lambda x: x.div_(3),
    "tanh_": lambda x: x.tanh_(),
    "two": lambda x: (x.mul_(2), x.relu_()),
    "out": lambda x: torch.add(x, x.tanh(), out=x),
    "iadd": lambda x: operator.iadd(x, x.tanh()),
    "zero_": lambda x: x.zero_().add_(x),
}


@pytest.mark.parametrize("name", DROPPED)
def test_statements_in_place(name):
    assert narrowed(Chain(dropped(DROPPED[name])), learns=name not in ("out", "zero_")).reader.weight.shape[1] == (
        8 if name == "zero_" else 5
    )


def test_a_module_in_place_whose_result_is_dropped():
    class Model(Chain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            self.operation(x)
            return self.reader(x)

    assert narrowed(Model(nn.ReLU(inplace=True))).reader.weight.shape[1] == 5
    assert narrowed(Model(nn.Hardsigmoid(inplace=True))).reader.weight.shape[1] == 8


def test_a_sum_in_place_before_what_was_read_earlier():
    def operation(x: Tensor) -> Tensor:
        before = x.tanh()
        x += before
        x *= 2
        return torch.cat([x, before], 1)

    assert narrowed(Chain(operation, channels=16)).reader.weight.shape[1] == 10


# ---- other names of the same memory ------------------------------------------------------------------------------------


def view_that_is_written(x: Tensor) -> Tensor:
    flat = x.view(2, -1)
    flat.add_(1)
    return x


def written_while_a_view_is_read(x: Tensor) -> Tensor:
    flat = x.flatten(2)
    x.mul_(3)
    return x + flat.view(2, 8, 6, 6)


def slice_that_is_written(x: Tensor) -> Tensor:
    x[:, :, ::2].add_(1)
    return x


def half_that_is_written(x: Tensor) -> Tensor:
    first, _ = x.chunk(2, 1)
    first.add_(1)
    return x


def operator_on_a_view(x: Tensor) -> Tensor:
    flat = x.view(2, 8, 36)
    flat += 1
    return x


def assigned_part(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :2] = 1
    return x


REFUSED = {
    "a view": (view_that_is_written, "operation `add_`.* overwrites memory that is read later as `conv`"),
    "below a view": (written_while_a_view_is_read, "operation `mul_`.* overwrites memory that is read later as `flatten`"),
    "a slice": (slice_that_is_written, "operation `add_`.* overwrites memory that is read later as `conv`"),
    "a half": (half_that_is_written, "operation `add_`.* overwrites memory that is read later as `conv`"),
    "an operator": (operator_on_a_view, "operation `iadd`.* overwrites memory that is read later as `conv`"),
    "an assignment": (assigned_part, "operation `setitem`.* assigns to a part of a tensor"),
    "no result of its own": (lambda x: x.copy_(x.flip(1)), "operation `copy_` writes into a tensor whose channels are cut"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_graph_cannot_say_is_refused(name):
    operation, message = REFUSED[name]
    model = Chain(operation)
    with pytest.raises(UserError, match=message):
        narrow(model, {"conv": KEPT})
    assert ChannelGraph(model).conv_norm_pairs == {}  # the masked network can be pruned all the same


def pieces_that_do_not_overlap(x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)
    first.relu_()
    return torch.cat([first, second], 1)


def view_that_nobody_reads(x: Tensor) -> Tensor:
    return x.view(2, 8, 36).mul_(2).mean(2)[:, :, None, None]


def size_that_grows(x: Tensor) -> Tensor:
    size = x.shape[2]
    size += 2
    return F.adaptive_avg_pool2d(x, (size, size))


ALLOWED = {
    "pieces": (pieces_that_do_not_overlap, 5),
    "a view that nobody reads": (view_that_nobody_reads, 8),
    "a size": (size_that_grows, 5),
    "a shortcut": (lambda x: x.contiguous().mul(2).add_(x), 5),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_other_overwriting_is_followed(name):
    operation, channels = ALLOWED[name]
    small = narrowed(Chain(operation), learns=name != "pieces")  # torch has no gradients for those
    assert small.reader.weight.shape[1] == channels


def test_a_tensor_of_the_network_that_is_overwritten_is_refused():
    class Counting(Chain):
        def __init__(self):
            super().__init__(F.relu)
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(x.mean())
            return super().forward(x) * self.seen

    with pytest.raises(UserError, match="overwrites `seen` of the network"):
        narrow(Counting(), {"conv": KEPT})


# ---- pooling on tensors of another rank --------------------------------------------------------------------------------


def pooled_over_channels(x: Tensor) -> Tensor:
    """Two-dimensional pooling takes (B, C, L) for one image (C, H, W)."""
    return F.max_pool2d(x.flatten(2), 3, 1, 1).view(2, 8, 6, 6)


RANKS = {
    "max_pool2d of three axes": Chain(pooled_over_channels),
    "adaptive_avg_pool2d of three axes": Chain(lambda x: F.adaptive_avg_pool2d(x.flatten(2), (8, 36)).view(2, 8, 6, 6) * 2),
    "ZeroPad2d of three axes": Chain(
        nn.Sequential(nn.Flatten(2), nn.ZeroPad2d((0, 0, 1, 1)), nn.Unflatten(2, (6, 6))), channels=10
    ),
    "pooling of two axes": Chain(lambda x: F.adaptive_avg_pool1d(x.mean((2, 3)), 4), nn.Linear(4, 2)),
    "ReflectionPad1d of two axes": Chain(lambda x: F.pad(x.mean((2, 3)), (1, 1), "reflect"), nn.Linear(10, 2)),
    "interpolated axes": Chain(lambda x: F.interpolate(x.flatten(2), 12).view(2, 8, 3, 4)),
}


@pytest.mark.parametrize("name", RANKS)
def test_pooling_works_on_the_axes_that_torch_takes(name):
    narrowed(RANKS[name])
