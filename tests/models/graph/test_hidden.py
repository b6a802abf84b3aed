"""What torch.fx does not record stays the network's own code, or its graph says that it is not the network."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from selections import narrow
from torch import Tensor, nn

from models.graph.features import with_outputs
from models.graph.tracing import trace_network
from utils.errors import UserError
from utils.seed import seed_everything

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def block(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


class Net(nn.Module):
    """Two blocks around `middle`, and a classifier."""

    def __init__(self, middle: nn.Module):
        super().__init__()
        self.first, self.middle, self.second, self.head = block(3, 8), middle, block(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.middle(self.first(x))).mean((2, 3)))


class OfFunction(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def learned(network: nn.Module, logits) -> dict[str, Tensor]:
    """The gradients of a step from always the same random numbers; 0 for a parameter without."""
    seed_everything(0)
    network.zero_grad()
    logits()[:, 0].square().sum().backward()
    return {name: 0 * own if own.grad is None else own.grad.clone() for name, own in network.named_parameters()}


def assert_outputs_train_the_network(network: nn.Module) -> None:
    network = with_outputs(network).train()
    twin = copy.deepcopy(network)
    own, others = learned(network, lambda: network(IMAGES)), learned(twin, lambda: twin.outputs(IMAGES).logits)
    torch.testing.assert_close(others, own, rtol=1e-4, atol=1e-6)
    assert own["first.0.weight"].abs().sum() + own["head.weight"].abs().sum() > 0
    torch.testing.assert_close(dict(twin.named_buffers()), dict(network.named_buffers()))


def operations_inside(graph: torch.fx.Graph, path: str) -> list[str]:
    return [node.target for node in graph.nodes if node.op == "call_module" and node.target.startswith(path)]


# ---- gradients and precision -------------------------------------------------------------------------------------------


class Frozen(nn.Module):
    """A block with weights that do not learn, and nothing before it."""

    def __init__(self, context=torch.no_grad):
        super().__init__()
        self.conv, self.context = nn.Conv2d(8, 8, 1), context

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            x = self.conv(x)
        return x


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)])
def test_a_module_without_gradients_is_one_operation_in_training(context):
    network = Net(Frozen(context))
    trace = trace_network(network, example=IMAGES)
    assert operations_inside(trace.graph, "middle") == ["middle.conv"] and not trace.both_modes
    assert operations_inside(trace.training, "middle") == ["middle"]
    assert trace.why_evaluation_only.startswith("has `middle`, which runs under torch.")
    assert "test_hidden.py:" in trace.why_evaluation_only
    if context is not torch.inference_mode:  # whose tensors autograd refuses
        assert_outputs_train_the_network(network)
    with pytest.raises(UserError, match=r"Net has `middle`, which runs under .*: its narrow form can only be evaluated"):
        narrow(network, {}, example=IMAGES).train()


class FrozenStem(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.first(x)
        return self.head(self.second(self.middle(x)).mean((2, 3)))


@pytest.mark.parametrize("ambient", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_network_that_does_so_itself_has_no_graph_for_training(ambient):
    network = with_outputs(FrozenStem(nn.Identity()))
    with ambient():
        trace = trace_network(network, example=IMAGES)
        network.eval().outputs(IMAGES)
    assert trace.training is None and not trace.both_modes
    assert torch.equal(network.outputs(IMAGES).logits, network(IMAGES))
    with pytest.raises(UserError, match=r"FrozenStem runs under torch.no_grad at test_hidden.py:\d+, which no graph holds"):
        network.train().outputs(IMAGES)
    assert torch.is_grad_enabled()


def test_sizes_may_be_asked_for_without_gradients():
    def pooled(x: Tensor) -> Tensor:
        with torch.no_grad():
            size = x.shape[2] // 2
        return nn.functional.adaptive_avg_pool2d(x, (size, size))

    assert trace_network(Net(OfFunction(pooled)), example=IMAGES).both_modes


class Round(torch.autograd.Function):
    """Straight through: its gradient is not that of rounding."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(x * 8) / 8

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sign(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (ctx.saved_tensors[0].abs() < 1)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.scale * gradient, None


class RoundedItself(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(Round.apply(self.first(x))).mean((2, 3)))


@pytest.mark.parametrize("function", [Round.apply, Sign.apply, lambda x: Reverse.apply(x, 0.1)])
def test_the_backward_pass_of_an_autograd_function_stays_its_own(function):
    network = Net(OfFunction(function))
    assert trace_network(network, example=IMAGES).both_modes
    assert_outputs_train_the_network(network)


def test_an_autograd_function_between_layers_of_the_network_itself():
    assert_outputs_train_the_network(RoundedItself(nn.Identity()))


def test_a_small_network_with_an_autograd_function_trains_and_is_pickled():
    network = RoundedItself(nn.Identity()).train()
    small = pickle.loads(pickle.dumps(narrow(network, {}, example=IMAGES)))
    torch.testing.assert_close(
        learned(small, lambda: small(IMAGES)), learned(network, lambda: network(IMAGES)), rtol=1e-4, atol=1e-6
    )


class Autocast(nn.Module):
    def __init__(self, *, enabled: bool):
        super().__init__()
        self.conv, self.enabled = nn.Conv2d(8, 8, 1), enabled

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            x = self.conv(x.float())
        return x.float()


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("ambient", [True, False])
def test_a_precision_of_a_modules_own_is_kept(enabled, ambient):
    network = with_outputs(Net(Autocast(enabled=enabled))).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=ambient):
        twin = copy.deepcopy(network)
        assert torch.equal(twin.outputs(IMAGES).logits, network(IMAGES))


def test_a_network_that_sets_its_precision_itself_has_no_graph():
    class Itself(Net):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    trace = trace_network(Itself(nn.Identity()), example=IMAGES)
    with pytest.raises(UserError, match=r"Itself: it runs under torch.autocast at test_hidden.py:\d+, which no graph holds"):
        trace.checked(Itself(nn.Identity()))


# ---- random numbers ----------------------------------------------------------------------------------------------------


class OwnGenerator(nn.Module):
    def __init__(self, generator, draw):
        super().__init__()
        self.generator, self.draw = generator, draw

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if self.draw(self.generator) < 0.5 else x


DRAWS = {
    "Python": lambda: OfFunction(lambda x: 2 * x if random.random() < 0.5 else x),
    "NumPy": lambda: OfFunction(lambda x: x * float(np.random.rand())),
    "torch": lambda: OfFunction(lambda x: 2 * x if torch.rand(()).item() < 0.5 else x),
    "a tensor of torch": lambda: OfFunction(lambda x: x * torch.rand(8, 1, 1)),
    "its own, of Python": lambda: OwnGenerator(random.Random(0), lambda own: own.random()),
    "its own, of NumPy": lambda: OwnGenerator(np.random.default_rng(0), lambda own: own.random()),
    "its own, of torch": lambda: OwnGenerator(torch.Generator(), lambda own: torch.rand((), generator=own).item()),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_of_a_module_are_never_frozen(name):
    network = with_outputs(Net(DRAWS[name]())).eval()
    assert operations_inside(trace_network(network, example=IMAGES).graph, "middle") == ["middle"]
    found = {
        tuple(logits.flatten().tolist())
        for seed in range(8)
        for logits in [(seed_everything(seed), network.outputs(IMAGES).logits)[1]]
    }
    assert len(found) > 1
    seed_everything(3)
    twin = copy.deepcopy(network)
    expected = network(IMAGES)
    seed_everything(3)
    assert torch.equal(twin.outputs(IMAGES).logits, expected)


def test_tracing_leaves_every_random_stream_alone():
    networks = [Net(build()) for build in DRAWS.values()]
    seed_everything(5)
    expected = random.random(), np.random.rand(), torch.rand(1)
    seed_everything(5)
    for network in networks:
        trace_network(network, example=IMAGES)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


class StochasticDepth(Net):
    """Written by hand, in the forward pass of the network itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if not self.training or random.random() < 0.5:
            x = x + self.second(x)
        return self.head(x.mean((2, 3)))


def test_draws_of_the_network_itself_have_no_graph_for_training():
    network = with_outputs(StochasticDepth(nn.Identity())).eval()
    assert torch.equal(network.outputs(IMAGES).logits, network(IMAGES))
    for seed in range(4):  # whatever comes out while it is traced
        random.seed(seed)
        with pytest.raises(UserError, match="StochasticDepth draws random numbers in its Python, which no graph holds"):
            network.train().outputs(IMAGES)
        with pytest.raises(UserError, match="its narrow form can only be evaluated"):
            narrow(network.eval(), {}, example=IMAGES).train()


# ---- other operations in training --------------------------------------------------------------------------------------


class DropPath(nn.Module):
    """As ConvNeXt and Swin have it in their own files."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = torch.rand((x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device) < 0.5
        return x / 0.5 * mask


def test_a_drop_path_of_ones_own_is_one_operation_in_both_modes():
    network = Net(DropPath())
    trace = trace_network(network, example=IMAGES)
    assert trace.both_modes and operations_inside(trace.graph, "middle") == ["middle"]
    assert_outputs_train_the_network(network)


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else x


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2 if self.training else x / 2 + 0.1


class Shuffled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1) if self.training else x


@pytest.mark.parametrize(("middle", "passes"), [(DropPath, True), (Noise, False), (Halved, False), (Shuffled, False)])
def test_zero_channels_need_not_go_through_a_drop_path(middle, passes):
    network = Net(middle()).train()
    kept = {"first.0": [0, 2, 3], "first.1": [0, 2, 3]}
    with torch.no_grad():
        for tensor in (network.first[0].weight, network.first[1].weight, network.first[1].bias):
            tensor[[1, 4, 5, 6, 7]] = 0
    small = narrow(network, kept, example=IMAGES)
    assert [own.operation for own in small.restored] == ([] if passes else ["middle"])
    if middle is not Noise:  # which draws a number for each channel
        own, others = (learned(each, lambda each=each: each(IMAGES)) for each in (network, small))
        torch.testing.assert_close(others["head.weight"], own["head.weight"])
        torch.testing.assert_close(
            small.widened("first.0.weight", others["first.0.weight"])[[0, 2, 3]], own["first.0.weight"][[0, 2, 3]]
        )


class Auxiliary(Net):
    def __init__(self):
        super().__init__(nn.Identity())
        self.auxiliary = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        logits = self.head(self.second(x).mean((2, 3)))
        return (logits, self.auxiliary(x.mean((2, 3)))) if self.training else logits


def test_auxiliary_heads_are_none_of_the_outputs():
    network = with_outputs(Auxiliary()).eval()
    evaluated = network.outputs(IMAGES)
    assert torch.equal(evaluated.logits, network(IMAGES))
    twin = copy.deepcopy(network.train())
    trained = twin.outputs(IMAGES)
    assert [own.shape for own in trained.blocks] == [own.shape for own in evaluated.blocks]
    own = learned(network, lambda: network(IMAGES)[0])
    torch.testing.assert_close(learned(twin, lambda: twin.outputs(IMAGES).logits), own, rtol=1e-4, atol=1e-6)
