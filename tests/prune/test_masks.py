import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from selections import channel_groups, hard_pruning, physical_pruning, prunable_layers
from torch import nn

from models import MODELS, build_model
from models.graph.groups import single_groups
from models.graph.layers import PrunableLayer
from prune.compact import compact
from prune.masks import check_criterion, choose_filters, keep_count, keep_ratios
from utils.errors import UserError


def conv_layer(*scores, groups=1):
    """A layer whose L1 scores are the given ones."""
    conv = nn.Conv2d(groups, len(scores), 1, groups=groups, bias=False)
    conv.weight = nn.Parameter(torch.tensor(scores, dtype=torch.float32).reshape(-1, 1, 1, 1))
    return PrunableLayer("conv", conv)


def kept_of(layer, keep_ratio, **options):
    return choose_filters([layer], {"conv": keep_ratio}, criterion="filter-a", **options)["conv"].tolist()


def meta_model(name):
    with torch.device("meta"):
        return build_model(name, num_classes=10)


@pytest.mark.parametrize("name", [name for name in MODELS if "wrn" not in name])  # whose norms come before
def test_every_conv_of_every_network_is_found_with_its_batch_norm(name):
    model = meta_model(name)
    layers = prunable_layers(model)
    assert [layer.name for layer in layers] == [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    for layer in layers:
        assert layer.module is model.get_submodule(layer.name)
        assert layer.norm is model.get_submodule(layer.norm_name)
        assert layer.norm.num_features == layer.filters
    assert len({layer.norm_name for layer in layers}) == len(layers)


@pytest.mark.parametrize(
    ("model", "pairs"),
    [
        ("alexnet", {f"conv{i}": f"conv{i}_bn" for i in range(1, 6)}),
        ("resnet20", {"conv_1_3x3": "bn_1", "stage_2.0.conv_a": "stage_2.0.bn_a", "stage_3.2.conv_b": "stage_3.2.bn_b"}),
        ("resnet50", {"conv1": "bn1", "layer1.0.conv3": "layer1.0.bn3", "layer2.0.downsample.0": "layer2.0.downsample.1"}),
    ],
)
def test_pairs_by_name(model, pairs):
    found = {layer.name: layer.norm_name for layer in prunable_layers(meta_model(model))}
    assert found | pairs == found


class OddNetwork(nn.Module):
    """A conv without BN, two that share one, a conv that two BNs read, one used twice, and one that is never used."""

    def __init__(self):
        super().__init__()
        self.plain, self.left, self.right, self.split, self.twice, self.unused = (nn.Conv2d(2, 2, 1) for _ in range(6))
        self.shared, self.first, self.second, self.third = (nn.BatchNorm2d(2) for _ in range(4))
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        x = self.shared(self.left(x)) + self.shared(self.right(x)) + self.plain(x)
        split = self.split(x)
        return self.head(self.third(self.twice(self.twice(self.first(split) + self.second(split)))).flatten(1))


def test_a_batch_norm_that_is_not_the_convs_alone_is_left_out():
    layers = prunable_layers(OddNetwork())
    assert [layer.name for layer in layers] == ["plain", "left", "right", "split", "twice", "unused"]
    assert [layer.norm for layer in layers] == [None] * 6


def test_a_convolution_that_classifies_keeps_its_outputs():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert [layer.name for layer in prunable_layers(network)] == ["0"]


def test_sync_batch_norm_counts_as_batch_norm():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build_model("resnet20", num_classes=2))
    assert all(isinstance(layer.norm, nn.SyncBatchNorm) for layer in prunable_layers(model))


def test_a_network_that_cannot_be_traced_is_named():
    class Untraceable(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UserError, match=r"Untraceable: torch\.fx cannot trace"):
        prunable_layers(Untraceable())


def test_a_network_without_convolutions_is_named():
    with pytest.raises(UserError, match="Linear has no layer"):
        prunable_layers(nn.Linear(2, 2))


@pytest.mark.parametrize(("filters", "kept"), [(16, 10), (32, 19), (64, 38)])
def test_keep_count_of_resnet56_at_0_6(filters, kept):
    assert keep_count(filters, 0.6) == kept


def test_resnet56_at_0_6_leaves_the_known_number_of_weights():
    layers = prunable_layers(meta_model("resnet56"))
    weights = [layer.module.weight for layer in layers]
    assert sum(weight.numel() for weight in weights) == 848_304
    assert sum(keep_count(len(weight), 0.6) * weight[0].numel() for weight in weights) == 504_990


@pytest.mark.parametrize(
    ("filters", "keep_ratio", "multiple", "kept"),
    [
        (5, 0.5, 1, 2),  # 2.5: halves go to the even side
        (7, 0.5, 1, 4),  # 3.5
        (10, 0.01, 1, 1),  # at least one
        (64, 0.6, 8, 40),  # 38.4
        (32, 0.6, 8, 16),  # 19.2
        (16, 0.1, 8, 8),  # at least one multiple
        (20, 0.99, 8, 16),  # 19.8 is nearer to 16 than to 24
        (20, 1.0, 8, 20),  # all are all
        (22, 0.99, 8, 22),  # 24 of 22
        (6, 0.5, 8, 6),  # at most all
    ],
)
def test_keep_count_by_hand(filters, keep_ratio, multiple, kept):
    assert keep_count(filters, keep_ratio, multiple=multiple) == kept


@given(st.integers(1, 2048), st.floats(0.001, 1.0), st.integers(1, 64))
def test_keep_count_is_the_nearest_there_is(filters, keep_ratio, multiple):
    kept = keep_count(filters, keep_ratio, multiple=multiple)
    choices = [*range(multiple, filters + 1, multiple), filters]
    assert kept in choices
    if filters % multiple == 0:
        distances = [abs(choice - filters * keep_ratio) for choice in choices]
        assert abs(kept - filters * keep_ratio) <= min(distances) + 1e-6


@pytest.mark.parametrize("keep_ratio", [0.0, -0.1, 1.01, float("nan")])
def test_a_ratio_outside_its_range_is_named(keep_ratio):
    with pytest.raises(UserError, match=f"keep_ratio {keep_ratio:g}: "):
        keep_count(16, keep_ratio)


def test_a_multiple_below_one_is_named():
    with pytest.raises(UserError, match="multiple 0"):
        keep_count(16, 0.5, multiple=0)


@pytest.fixture(scope="module")
def three_layers():
    return [PrunableLayer(name, nn.Conv2d(1, 4, 1)) for name in ("a", "b", "c")]


def test_one_rate_for_all_or_one_a_layer(three_layers):
    assert keep_ratios(three_layers, [0.6]) == {"a": 0.6, "b": 0.6, "c": 0.6}
    assert keep_ratios(three_layers, [0.1, 0.2, 0.3]) == {"a": 0.1, "b": 0.2, "c": 0.3}


def test_excluded_layers_keep_everything_and_still_count(three_layers):
    assert keep_ratios(three_layers, [0.6], exclude=["c", "a"]) == {"a": 1.0, "b": 0.6, "c": 1.0}
    assert keep_ratios(three_layers, [0.1, 0.2, 0.3], exclude=["b"]) == {"a": 0.1, "b": 1.0, "c": 0.3}


@pytest.mark.parametrize(
    ("rates", "exclude", "message"),
    [
        ([0.6, 0.6], [], "keep_ratios: 2 values for 3 layers: give 1 or 3"),
        ([], [], "keep_ratios: 0 values"),
        ([0.6, 0.0, 0.5], [], "keep_ratio 0: "),
        ([0.6], ["b", "conv9"], "exclude conv9: no such layer: choose from a, b, c"),
    ],
)
def test_bad_rates_and_names_are_named(three_layers, rates, exclude, message):
    with pytest.raises(UserError, match=message):
        keep_ratios(three_layers, rates, exclude=exclude)


def test_the_highest_scores_stay_in_order():
    assert kept_of(conv_layer(5, 1, 4, 2, 3), 0.6) == [0, 2, 4]
    assert kept_of(conv_layer(5, 1, 4, 2, 3), 1.0) == [0, 1, 2, 3, 4]


def test_of_equal_scores_the_lower_index_goes_first():
    assert kept_of(conv_layer(1, 1, 1, 1), 0.5) == [2, 3]
    assert kept_of(conv_layer(*[2.0] * 500), 0.5) == list(range(250, 500))
    assert kept_of(conv_layer(3, 1, 1, 0), 0.5) == [0, 2]


def test_a_grouped_convolution_loses_the_same_number_in_every_group():
    assert kept_of(conv_layer(1, 2, 3, 4, 50, 80, 70, 60, groups=2), 0.5) == [2, 3, 5, 6]
    # Two filters of either group make a multiple of 4, not one.
    assert kept_of(conv_layer(1, 2, 3, 4, 50, 80, 70, 60, groups=2), 0.25, multiple=4) == [2, 3, 5, 6]


def test_a_depthwise_convolution_keeps_all():
    assert kept_of(conv_layer(1, 2, 3, 4, groups=4), 0.25) == [0, 1, 2, 3]


def test_channel_multiple_reaches_the_choice():
    assert len(kept_of(conv_layer(*range(64)), 0.6, multiple=8)) == 40


def test_gradients_reach_their_layer():
    layers = [PrunableLayer(name, nn.Conv2d(1, 3, 1)) for name in ("a", "b")]
    gradients = {name: torch.tensor(g).reshape(3, 1, 1, 1) for name, g in (("a", [1.0, 9, 1]), ("b", [9.0, 1, 1]))}
    kept = choose_filters(layers, {"a": 0.3, "b": 0.3}, criterion="filter-nggm", gradients=gradients, gamma=0.0)
    assert {name: indices.tolist() for name, indices in kept.items()} == {"a": [1], "b": [0]}


def test_random_choice_is_repeated_by_the_same_seed():
    layers = prunable_layers(build_model("resnet20", num_classes=2))
    ratios = keep_ratios(layers, [0.5])
    choices = [
        choose_filters(layers, ratios, criterion="filter-r", generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    ]
    first, again, other = ([indices.tolist() for indices in choice.values()] for choice in choices)
    assert first == again != other


def test_bad_criterion_and_missing_gradients_are_named():
    with pytest.raises(UserError, match=r"criterion filter-x: choose from .*filter-nggm"):
        choose_filters([conv_layer(1, 2)], {"conv": 0.5}, criterion="filter-x")
    with pytest.raises(UserError, match="filter-nggm needs a gradient"):
        choose_filters([conv_layer(1, 2)], {"conv": 0.5}, criterion="filter-nggm")


def with_norm(name, *weight, affine=True):
    layer = PrunableLayer(name, nn.Conv2d(1, len(weight), 1), f"{name}_bn", nn.BatchNorm2d(len(weight), affine=affine))
    if affine:
        layer.norm.weight = nn.Parameter(torch.tensor(weight))
    return layer


def test_the_batch_norm_of_a_layer_reaches_its_criterion():
    kept = choose_filters([with_norm("a", 1.0, -3.0, 2.0)], {"a": 0.7}, criterion="filter-bn")
    assert kept["a"].tolist() == [1, 2]


def test_layers_that_lose_filters_without_batch_norm_are_named():
    layers = [with_norm("a", 1.0, 2.0), with_norm("b", 1.0, 2.0, affine=False), PrunableLayer("c", nn.Conv2d(1, 4, 1))]
    depthwise = PrunableLayer("d", nn.Conv2d(4, 4, 1, groups=4))
    with pytest.raises(UserError, match="criterion filter-bn: no batch norm with a weight reads b, c alone"):
        check_criterion([*layers, depthwise], {"a": 0.5, "b": 0.5, "c": 0.5, "d": 0.5}, criterion="filter-bn")
    with pytest.raises(UserError, match="b: filter-bn needs a batch norm"):
        choose_filters(layers, {"a": 0.5, "b": 0.5, "c": 1.0}, criterion="filter-bn")
    ratios = {"a": 0.5, "b": 1.0, "c": 1.0, "d": 0.5}
    check_criterion([*layers, depthwise], ratios, criterion="filter-bn")
    kept = choose_filters([*layers, depthwise], ratios, criterion="filter-bn")
    assert [len(filters) for filters in kept.values()] == [1, 2, 4, 4]
    check_criterion(layers, {"a": 0.5, "b": 0.5, "c": 0.5}, criterion="filter-a")


def test_what_a_layer_retains_does_not_change_the_random_choice_in_the_next():
    layers = [PrunableLayer(name, nn.Conv2d(1, 16, 1)) for name in "ab"]
    whole, half = (
        choose_filters(layers, {"a": ratio, "b": 0.5}, criterion="filter-r", generator=torch.Generator().manual_seed(3))
        for ratio in (1.0, 0.5)
    )
    assert torch.equal(whole["b"], half["b"]) and len(whole["a"]) == 16


def test_weights_that_are_not_finite_are_named():
    with pytest.raises(UserError, match="conv: filter-a gives scores that are not finite"):
        kept_of(conv_layer(1, float("nan")), 0.5)


# ---- depthwise convolutions ----------------------------------------------------------------------------------------------


class Separable(nn.Module):
    """A convolution, two depthwise ones behind it, and a depthwise one that reads a sum."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.expand, self.norm = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.first, self.second, self.third = (nn.Conv2d(6, 6, 3, padding=1, groups=6) for _ in range(3))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.second(self.first(self.norm(self.expand(x)).relu()).relu())
        return self.head(self.third(x + x.flip(3)).mean((2, 3)))


def test_a_depthwise_convolution_keeps_what_the_one_before_it_keeps():
    layers = prunable_layers(Separable())
    assert {layer.name: layer.follows for layer in layers} == {
        "expand": None,
        "first": "expand",
        "second": "first",
        "third": None,
    }
    kept = choose_filters(layers, keep_ratios(layers, [0.5]), criterion="filter-a")
    assert len(kept["expand"]) == 3 and kept["first"].equal(kept["expand"]) and kept["second"].equal(kept["expand"])
    assert kept["third"].tolist() == list(range(6))
    kept = choose_filters(layers, keep_ratios(layers, [0.5], exclude=["first"]), criterion="filter-a")
    assert len(kept["expand"]) == 3 and len(kept["first"]) == len(kept["second"]) == 6


def test_the_order_in_which_layers_are_registered_does_not_matter():
    layers = prunable_layers(Separable())
    ratios = keep_ratios(layers, [0.5])
    kept, reversed_kept = (choose_filters(order, ratios, criterion="filter-a") for order in (layers, layers[::-1]))
    assert all(channels.equal(reversed_kept[name]) for name, channels in kept.items())
    for order in (layers, layers[::-1]):
        [family] = single_groups(order)
        assert set(family[0].layers) == {"expand", "first", "second"}


def test_what_follows_is_cut_and_the_small_network_is_the_same():
    network, images = Separable().eval(), torch.randn(2, 3, 5, 5)
    layers = prunable_layers(network)
    hard_pruning(network, choose_filters(layers, keep_ratios(layers, [0.5]), criterion="filter-a"))
    small = compact(network, images)
    assert [small.get_submodule(name).groups for name in ("first", "second")] == [3, 3]


def test_only_networks_for_phones_have_depthwise_convolutions():
    depthwise = {name for name in MODELS if any(layer.follows for layer in prunable_layers(meta_model(name)))}
    assert depthwise == {f"repdistiller/{name}" for name in ("MobileNetV2", "ShuffleV1", "ShuffleV2")}


class Mlp(nn.Module):
    """A convolution with a group norm, and an MLP with a residual sum on what it gives."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8)
        self.first, self.second, self.classifier = nn.Linear(8, 10), nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.classifier(x + self.second(nn.functional.gelu(self.first(x))))


def test_hidden_units_are_the_outputs_that_the_next_layer_alone_reads():
    model = Mlp()
    assert [layer.name for layer in prunable_layers(model)] == ["conv"]
    assert [layer.name for layer in prunable_layers(model, linear=True)] == ["conv", "first"]


@pytest.mark.parametrize("coupled", [False, True])
def test_hidden_units_and_groups_of_a_norm_are_gone_from_the_small_network(coupled):
    torch.manual_seed(0)
    model, images = Mlp(), torch.randn(4, 3, 6, 6)
    layers = prunable_layers(model, linear=True)
    if coupled:
        families = channel_groups(model, layers)
        assert [alike[0].layers for alike in families] == [("first",)]  # the sum reads what the group norm gives
        families = single_groups(layers)
        assert [len(alike) for alike in families] == [4, 10] and len(families[0][0].filters) == 2
    kept = choose_filters(layers, keep_ratios(layers, [0.5]), criterion="filter-a")
    norms = layers[0].module.weight.detach().abs().flatten(1).sum(1).view(4, 2).sum(1)
    assert kept["conv"].view(2, 2)[:, 0].div(2, rounding_mode="floor").tolist() == norms.argsort()[2:].sort().values.tolist()
    physical_pruning(model, kept).prove(images)
    hard_pruning(model, kept)
    small = compact(model, images)
    assert (small.norm.num_groups, small.conv.out_channels) == (2, 4)
    assert (small.first.out_features, small.second.in_features) == (5, 5)


def test_criteria_of_maps_refuse_hidden_units():
    layers = prunable_layers(Mlp(), linear=True)
    with pytest.raises(UserError, match="linear: not with filter-hrank"):
        check_criterion(layers, keep_ratios(layers, [0.5]), criterion="filter-hrank")
