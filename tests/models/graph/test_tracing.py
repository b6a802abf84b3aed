"""Networks whose Python asks for sizes are traced for an example, and no network is changed by it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from selections import narrow
from torch import Tensor, nn

from models.graph.tracing import trace_network
from prune.compact import compact
from utils.errors import UserError

DEAD = [1, 2, 5]  # of 8 filters


def images(side: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


class Asking(nn.Module):
    """Two convolutions with something between that asks for sizes."""

    def __init__(self, between):
        super().__init__()
        self.first, self.second, self.between = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), between
        with torch.no_grad():
            self.first.weight[DEAD], self.first.bias[DEAD] = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


def same_padding(x):
    height, width = x.shape[-2:]
    missing = [max((-(-side // 3)) * 3 - side, 0) for side in (height, width)]
    return F.avg_pool2d(F.pad(x, (0, missing[1], 0, missing[0])) if any(missing) else x, 3)


def halved_until_small(x):
    while x.shape[2] > 2:
        x = F.max_pool2d(x, 2)
    return x


def asserted(x):
    _, channels, *space = x.shape
    assert len(x.shape) == 4 and channels == 8 and space[0] % 2 == 0, f"odd size {space}"
    return x.relu()


def by_branch(x):
    return F.max_pool2d(x, 2) if min(x.size(2), x.size(3)) >= 4 and x.dim() == 4 else x


def in_loop(x):
    rows = [x[:, :, row : row + 1] for row in range(0, x.shape[2], 2)]
    return torch.cat(rows, dim=2)


QUESTIONS = {function.__name__: function for function in (same_padding, halved_until_small, asserted, by_branch, in_loop)}


@pytest.mark.parametrize("name", QUESTIONS)
def test_python_that_asks_for_sizes(name):
    network = Asking(QUESTIONS[name]).eval()
    small = compact(network, images(), tolerance=1e-5)
    assert small.first.weight.shape[0] == 5 and small.second.weight.shape[1] == 5
    torch.testing.assert_close(small(images(batch=5)), network(images(batch=5)))


@pytest.mark.parametrize("name", ["same_padding", "halved_until_small", "by_branch", "in_loop"])
def test_images_of_another_size_are_refused_where_the_graph_is_for_one(name):
    assert trace_network(Asking(QUESTIONS[name]), example=images()).image_size == (8, 8)
    small = compact(Asking(QUESTIONS[name]), images())
    with pytest.raises(UserError, match="for 8x8 pixels, not 16x16"):
        small(images(side=16))


def test_a_network_that_asks_nothing_takes_images_of_any_size():
    network = Asking(lambda x: F.adaptive_avg_pool2d(x, (x.shape[2] // 2, 2)).view(x.size(0), 8, -1, 2)).eval()
    assert trace_network(network, example=images()).image_size is None
    torch.testing.assert_close(compact(network, images())(images(side=16)), network(images(side=16)))


def test_a_number_of_channels_does_not_depend_on_the_image():
    network = Asking(lambda x: x.relu() if x.shape[1] == 8 else x)
    assert trace_network(network, example=images()).image_size is None


def test_without_an_example_usual_sizes_are_tried():
    def only_for_64(x):
        assert x.shape[2] == 64
        return x

    assert trace_network(Asking(only_for_64)).image_size == (64, 64)


class EachImage(nn.Module):
    def forward(self, x):
        return torch.stack([image.relu() for image in x])


def test_a_module_that_asks_for_the_batch_size_becomes_one_operation():
    network = Asking(EachImage()).eval()
    assert [node.op for node in trace_network(network).graph.nodes].count("call_module") == 3
    torch.testing.assert_close(compact(network, images())(images(batch=5)), network(images(batch=5)))


def test_a_network_that_asks_for_the_batch_size_itself_is_refused_with_the_line():
    with pytest.raises(UserError, match=r"size of the batch at test_tracing.py:\d+"):
        trace_network(Asking(lambda x: x * 2 if len(x) > 1 else x))


def test_values_of_tensors_are_no_sizes():
    with pytest.raises(UserError, match=r"branches on the values of a tensor"):
        trace_network(Asking(lambda x: x if x.sum() > 0 else -x))


class Counting(nn.Module):
    """Changes itself in every forward pass, as batch norms of one's own do."""

    def __init__(self):
        super().__init__()
        self.calls, self.seen = 0, []
        self.register_buffer("count", torch.zeros(1))
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        self.calls += 1
        self.seen.append(x)
        self.count.add_(1)
        x = self.norm(x) + torch.rand(1)
        return x.mean() if len(x.shape) == 3 else x


def test_the_network_and_the_random_streams_stay_as_they_were():
    network = Counting().train()
    network.norm.eval()
    before, attributes, stream = copy.deepcopy(network.state_dict()), dict(vars(network)), torch.get_rng_state()
    trace_network(network, example=images())
    assert torch.equal(torch.get_rng_state(), stream)
    assert network.training and not network.norm.training
    assert network.calls == 0 and network.seen == [] and dict(vars(network)) == attributes
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])


class Doubled(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2 + 1


class Renamed(nn.Conv2d):
    """A subclass that computes what its base does."""


@pytest.mark.parametrize(("kind", "filters"), [(Renamed, 5), (Doubled, 8)])
def test_a_subclass_is_its_base_only_with_the_forward_pass_of_that(kind, filters):
    network = Asking(nn.ReLU())
    first = kind(3, 8, 3, padding=1)
    first.load_state_dict(network.first.state_dict())
    network.first = first
    small = compact(network.eval(), images(), tolerance=1e-5)
    assert small.state_dict()["first.weight"].shape[0] == filters
    torch.testing.assert_close(small(images()), network(images()))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x, y, mask=None):
        both = self.left(x) + self.right(y)
        both = both if mask is None else both * mask
        return {"logits": self.head(both).mean((2, 3)), "map": (both, both.relu())}


def test_several_inputs_and_results_of_any_structure():
    network = Two().eval()
    with torch.no_grad():
        for layer in (network.left, network.right):
            layer.weight[DEAD], layer.bias[DEAD] = 0, 0
    small = narrow(network, {"left": [0, 3, 4, 6, 7], "right": [0, 3, 4, 6, 7]}, example=(images(), images()))
    expected, found = (own(images(), images() + 1) for own in (network, small))
    torch.testing.assert_close(found["logits"], expected["logits"])
    torch.testing.assert_close(found["map"], expected["map"])
    assert small.head.weight.shape[1] == 5
