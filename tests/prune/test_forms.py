"""The form that hard pruning trains: the small network where it is proved to be the masked one, else the masked one, and why."""

import copy
import types
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from random_networks import RandomNetwork, network_descriptions
from selections import hard_pruning, physical_pruning, prunable_layers, selected
from torch import Tensor, nn

from models import build_model
from models.graph import ChannelGraph
from models.graph.layers import PrunableLayer
from prune.forms import build_schedule, check_compact_form
from prune.masks import choose_filters, keep_ratios
from prune.schedule import HardPruning, PhysicalPruning, SoftPruning
from utils.errors import UserError
from utils.seed import random_state


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def kept_half(model: nn.Module) -> dict[str, Tensor]:
    layers = prunable_layers(model)
    return choose_filters(layers, keep_ratios(layers, [0.5]), criterion="filter-a")


def randomized(model: nn.Module) -> nn.Module:
    """With batch norms as after training."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias)
    return model


class Operations(nn.Module):
    """conv_a - norm_a - an operation - conv_b - norm_b - relu - head."""

    def __init__(self, operation: Callable[[Tensor], Tensor] = F.relu, *, affine: bool = True, groups: int = 1):
        super().__init__()
        torch.manual_seed(0)
        self.conv_a, self.norm_a = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, affine=affine)
        self.conv_b, self.norm_b = nn.Conv2d(8, 8, 3, groups=groups), nn.BatchNorm2d(8, affine=affine)
        self.operation, self.head = operation, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.operation(self.norm_a(self.conv_a(x)))
        return self.head(F.relu(self.norm_b(self.conv_b(x))).mean((2, 3)))


class CalledTwice(Operations):
    def __init__(self):
        super().__init__()
        self.twice = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm_a(self.conv_a(x)))
        x = self.twice(F.relu(self.twice(x)))
        return self.head(F.relu(self.norm_b(self.conv_b(x))).mean((2, 3)))


def train(network: nn.Module, schedule: HardPruning | PhysicalPruning, *, steps: int = 3) -> nn.Module:
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-3)
    for step in range(steps):
        batch = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(network.train()(batch), torch.arange(6) % 3).backward()
        optimizer.step()
        schedule.after_step()
    return network


def trained_in_both_forms(model: nn.Module, kept: dict[str, Tensor]) -> tuple[nn.Module, nn.Module]:
    """The masked network, and a dense one with the weights of the small one, after the same steps."""
    masked, origin = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    train(masked, hard_pruning(masked, kept))
    schedule = physical_pruning(origin, kept)
    schedule.prove(images())
    small = train(schedule.trained_network(), schedule)
    rebuilt = copy.deepcopy(model).double()
    rebuilt.load_state_dict(small.dense_state_dict())
    return masked, rebuilt


def pruned_rows(model: nn.Module, kept: dict[str, Tensor]) -> dict[str, Tensor]:
    rows = {}
    for layer in prunable_layers(model):
        gone = sorted(set(range(layer.filters)) - set(kept[layer.name].tolist()))
        rows |= {key: tensor.detach()[gone] for key, tensor in layer.zeroed().items()}
    return rows


UNEVEN = {"conv_b": torch.tensor([0, 1, 2, 4])}  # 3 and 1 of 4 filters a group
CASES = {
    "plain": (Operations, kept_half),
    "batch norm without weights": (lambda: Operations(affine=False), kept_half),
    "a layer that is called twice": (CalledTwice, kept_half),
    "groups that are evened up": (lambda: Operations(groups=2), lambda model: kept_half(model) | UNEVEN),
    "a layer without filters": (Operations, lambda model: kept_half(model) | {"conv_a": torch.tensor([], dtype=torch.int64)}),
    "only its shape is read": (
        lambda: Operations(lambda x: torch.ones_like(x) * 0.1 + x),
        lambda model: kept_half(model) | {"conv_a": torch.tensor([], dtype=torch.int64)},
    ),
    "a nonlinearity that makes something of zero": (lambda: Operations(nn.Sigmoid()), kept_half),
}


@pytest.mark.parametrize("case", CASES)
def test_both_forms_train_to_the_same_network_with_its_pruned_filters_at_zero(case):
    build, choose = CASES[case]
    model = randomized(build())
    kept = choose(model)
    masked, rebuilt = trained_in_both_forms(model, kept)
    for network in (masked, rebuilt):
        for key, rows in pruned_rows(network, kept).items():
            assert rows.eq(0).all(), key
    for mode in (True, False):
        found, expected = (network.train(mode)(images().double()) for network in (rebuilt, masked))
        torch.testing.assert_close(found, expected)


def test_a_pruned_filter_gives_zero_behind_a_batch_norm_without_weights():
    model = randomized(Operations(affine=False)).eval()
    kept = kept_half(model)
    before = copy.deepcopy(model.state_dict())
    selection = selected(model, kept)
    soft = SoftPruning(selection.graph, lambda: selection, interval=1, last_epoch=3)
    soft.after_step()
    with soft.shipped():
        maps = model.norm_a(model.conv_a(images()))
        assert maps.flatten(2).abs().sum((0, 2)).nonzero().flatten().tolist() == kept["conv_a"].tolist()
    assert torch.equal(model.norm_a.running_mean, before["norm_a.running_mean"])
    hard_pruning(model, kept)
    assert torch.equal(
        model.norm_a(model.conv_a(images())).flatten(2).abs().sum((0, 2)).ne(0), maps.flatten(2).abs().sum((0, 2)).ne(0)
    )


# ---- the proof ---------------------------------------------------------------------------------------------------------


def build(model: nn.Module, form: str) -> tuple[object, list[str]]:
    warnings: list[str] = []
    options = {"soft_interval": None, "last_epoch": 3, "images": images(), "warn": warnings.append}
    graph = ChannelGraph(model)
    return build_schedule(graph, lambda: selected(model, kept_half(model)), form=form, **options), warnings


class Cast(Operations):
    """Computes in float32 whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


def test_a_network_that_passes_is_trained_small():
    for model in (Operations(), Cast(), build_model("resnet20", num_classes=3)):
        schedule, warnings = build(randomized(model), "auto")
        assert isinstance(schedule, PhysicalPruning) and warnings == []


class TwoFaced(Operations):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2 if self.training else super().forward(x)


def test_a_network_that_has_no_small_form_is_trained_masked_and_says_why():
    schedule, warnings = build(TwoFaced(), "auto")
    assert isinstance(schedule, HardPruning)
    assert len(warnings) == 1 and "TwoFaced runs other operations in training" in warnings[0]
    with pytest.raises(UserError, match=r"form compact: TwoFaced runs other .*; choose masked"):
        build(TwoFaced(), "compact")
    assert isinstance(build(TwoFaced(), "masked")[0], HardPruning)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("head.weight", "result 1 of 1 differs in evaluation by"),
        ("norm_b.running_var", "result 1 of 1 differs in evaluation by"),
        ("norm_b.momentum", "norm_b.running_mean differs after a step by"),
        ("conv_b.bias", "the gradient of conv_b.bias differs by"),
    ],
)
def test_what_differs_is_found(what, message):
    """A fault in the small network's layers, each of which another part of the proof must find."""
    model = randomized(Operations())
    schedule = physical_pruning(model, kept_half(model))
    schedule.prove(images())
    small = schedule.trained_network()
    with torch.no_grad():
        if what == "norm_b.momentum":
            small.norm_b.momentum = 0.2
        elif what == "conv_b.bias":  # as an operation that stops gradients
            small.conv_b.forward = types.MethodType(lambda conv, x: F.conv2d(x, conv.weight, conv.bias.detach()), small.conv_b)
            small.norm_b.eval()
            model.norm_b.eval()
            model.norm_b.train = small.norm_b.train = lambda mode=True: None
        else:
            layer, _, name = what.partition(".")
            getattr(getattr(small, layer), name).mul_(1.01)
    with pytest.raises(UserError, match=message):
        schedule.prove(images())


def test_the_proof_leaves_no_trace():
    model = randomized(Operations(nn.Dropout(0.5)))
    schedule = physical_pruning(model, kept_half(model))
    networks = (model, schedule.trained_network())
    states, draws = [copy.deepcopy(network.state_dict()) for network in networks], random_state()
    modes = [[module.training for module in network.modules()] for network in networks]
    schedule.prove(images())
    assert torch.equal(random_state()["torch"], draws["torch"])
    for network, state, own in zip(networks, states, modes, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
        assert all(parameter.grad is None for parameter in network.parameters())
        assert [module.training for module in network.modules()] == own


RANDOM = {
    "dropout": nn.Dropout(0.5),
    "functional dropout": lambda x: F.dropout(x, 0.5),
    "dropout of channels": nn.Dropout2d(0.5),
    "randomized activation": nn.RReLU(),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_of_channels_do_not_fail_the_proof(name):
    assert isinstance(build(Operations(RANDOM[name]), "auto")[0], PhysicalPruning)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_network_that_cannot_be_copied_is_trained_masked():
    model = Operations()
    nn.utils.weight_norm(model.head)  # of old: it computes a tensor that torch does not copy
    schedule, warnings = build(model, "auto")
    assert isinstance(schedule, HardPruning) and "Linear cannot be copied" in warnings[0]
    with pytest.raises(UserError, match="form compact: Operations cannot be copied"):
        check_compact_form(selected(model, kept_half(model)), images())


@given(
    operations=network_descriptions(),
    seed=st.integers(0, 1000),
    keep_ratio=st.sampled_from([0.01, 0.3, 0.6]),
)
def test_random_networks_train_alike_in_both_forms(operations, seed, keep_ratio):
    torch.manual_seed(seed)
    model = RandomNetwork(operations, hidden=3)
    layers = prunable_layers(model)
    kept = choose_filters(layers, keep_ratios(layers, [keep_ratio]), criterion="filter-a")
    if seed % 3 == 0:
        kept[layers[-1].name] = torch.tensor([], dtype=torch.int64)
    try:
        physical_pruning(model, kept).prove(torch.randn(4, 3, 4, 4))
    except UserError as error:  # the graph cannot say it, or torch itself has no gradients for it
        assert any(reason in str(error) for reason in ("overwrites memory", "the masked network fails in training"))


def test_the_compact_form_is_checked_without_a_change():
    model = Operations()
    before = copy.deepcopy(model.state_dict())
    check_compact_form(selected(model, kept_half(model)), images())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(UserError, match="form compact: TwoFaced"):
        check_compact_form(selected(TwoFaced(), kept_half(TwoFaced())), images())


@pytest.mark.parametrize("is_faster", [True, False])
def test_auto_trains_the_form_that_is_the_faster_one(is_faster):
    asked = []
    options = {"soft_interval": None, "last_epoch": 3, "images": images(), "warn": pytest.fail}
    options["is_faster_small"] = lambda selection: asked.append(selection) or is_faster
    for form, expected in {"auto": is_faster, "compact": True, "masked": False}.items():
        model = Operations()
        choose = partial(selected, model, kept_half(model))
        schedule = build_schedule(ChannelGraph(model), choose, form=form, **options)
        assert isinstance(schedule, PhysicalPruning if expected else HardPruning)
    assert [{"conv_a", "conv_b"} <= selection.kept.keys() for selection in asked] == [True]


def test_a_computed_weight_cannot_be_pruned():
    model = Operations()
    nn.utils.parametrizations.weight_norm(model.conv_b)
    with pytest.raises(UserError, match="conv_b: its weight is computed from other parameters; exclude it"):
        kept_half(model)
    layers = prunable_layers(model)
    assert isinstance(layers[1], PrunableLayer)
    assert keep_ratios(layers, [0.5], exclude=["conv_b"])["conv_b"] == 1
