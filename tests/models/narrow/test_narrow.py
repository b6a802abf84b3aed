"""A narrow network is the masked dense one: same outputs, gradients and training, with fewer numbers."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from norms import fill_norms
from selections import narrow
from torch import Tensor, nn

from models import build_model
from models.cifar_resnet import CifarResNet
from utils.errors import UserError


def norm_of(conv_name: str) -> str:
    return (
        f"{conv_name}_bn"
        if conv_name.startswith("conv") and "_" not in conv_name
        else conv_name.replace("conv_1_3x3", "bn_1").replace("conv_", "bn_")
    )


def random_kept(model: nn.Module, *, keep: float = 0.6) -> dict[str, list[int]]:
    """Random live channels for each convolution of a CIFAR ResNet or AlexNet and the batch norm behind it."""
    chooser = random.Random(0)
    kept = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            channels = sorted(chooser.sample(range(layer.out_channels), max(1, round(keep * layer.out_channels))))
            kept |= {name: channels, norm_of(name): channels}
    return kept


def zero_pruned(model: nn.Module, kept: dict[str, list[int]]) -> None:
    with torch.no_grad():
        for name, channels in kept.items():
            layer = model.get_submodule(name)
            pruned = [channel for channel in range(len(layer.weight)) if channel not in channels]
            for tensor in (layer.weight, layer.bias):
                if tensor is not None:
                    tensor[pruned] = 0


def masked_resnet(*, depth: int = 8, keep: float = 0.6) -> tuple[nn.Module, dict[str, list[int]]]:
    torch.manual_seed(0)
    model = CifarResNet(depth=depth, num_classes=5).double()
    fill_norms(model)
    kept = random_kept(model, keep=keep)
    zero_pruned(model, kept)
    return model, kept


def images(count: int = 3, size: int = 8) -> Tensor:
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [False, True])
def test_outputs_equal_the_masked_network_at_full_width(training):
    model, kept = masked_resnet(depth=14)
    model.train(training)
    small = narrow(model, kept)
    assert small.training is training
    expected, found = model.outputs(images()), small.outputs(images())
    torch.testing.assert_close(found, expected)
    model.eval(), small.eval()
    torch.testing.assert_close(small(images()), model(images()))


def test_both_convolutions_of_a_block_shrink():
    model, kept = masked_resnet()
    small = narrow(model, kept)
    block, dense = small.get_submodule("stage_3.0"), model.stage_3[0]
    assert dense.conv_b.weight.shape == (64, 64, 3, 3)
    assert block.conv_b.weight.shape == (38, 38, 3, 3)
    assert block.conv_a.weight.shape == (38, small.get_submodule("stage_3.0.conv_a").in_channels, 3, 3)
    assert small.get_submodule("stage_1.0.conv_a").weight.shape == (10, 10, 3, 3)


@pytest.mark.parametrize("with_features", [False, True])
def test_training_equals_masked_training(with_features):
    model, kept = masked_resnet()
    small = narrow(model.train(), kept)
    optimizers = [
        torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4) for net in (model, small)
    ]
    labels = torch.tensor([0, 3, 1])
    for _ in range(4):
        losses = []
        for net, optimizer in zip((model, small), optimizers, strict=True):
            outputs = net.outputs(images())
            loss = F.cross_entropy(outputs.logits, labels)
            if with_features:
                loss = loss + sum(stage.square().mean((1, 2, 3)).std() for stage in outputs.stages)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        zero_pruned(model, kept)
        torch.testing.assert_close(losses[1], losses[0])
    trained = model.state_dict()
    for key, value in small.dense_state_dict().items():
        if key.endswith(("conv_b.weight", "bn_b.weight", "bn_a.bias", "bn_a.running_mean", "classifier.bias")):
            layer = key.rpartition(".")[0]
            rows = kept.get(layer, range(len(value)))
            columns = value.flatten(1).abs().sum(0) != 0 if value.dim() > 1 else None
            expected, found = trained[key][list(rows)], value[list(rows)]
            if columns is not None:
                expected, found = expected.flatten(1)[:, columns], found.flatten(1)[:, columns]
            torch.testing.assert_close(found, expected)


def test_gradients_of_live_weights_are_equal():
    model, kept = masked_resnet()
    small = narrow(model.train(), kept)
    for net in (model, small):
        net(images()).square().sum().backward()
    for name in ("stage_1.0.conv_b", "stage_2.0.bn_b"):
        live = model.get_submodule(name).weight.grad[kept[name]]
        if live.dim() > 1:
            live = live[:, kept["stage_1.0.conv_a"]]
        torch.testing.assert_close(small.get_submodule(name).weight.grad, live)


def test_dense_state_gives_the_function_back():
    model, kept = masked_resnet()
    small = narrow(model.eval(), kept)
    dense = CifarResNet(depth=8, num_classes=5).double().eval()
    dense.load_state_dict(small.dense_state_dict())
    torch.testing.assert_close(dense(images()), model(images()))
    pruned = [channel for channel in range(64) if channel not in kept["stage_3.0.bn_a"]]
    assert (dense.stage_3[0].bn_a.running_var[pruned] == 1).all() and (dense.stage_3[0].bn_a.bias[pruned] == 0).all()


def test_rebuilt_from_the_architecture_kept_and_either_state():
    model, kept = masked_resnet()
    small = narrow(model.eval(), kept)
    fresh = [narrow(CifarResNet(depth=8, num_classes=5).double().eval(), small.kept) for _ in range(2)]
    fresh[0].load_state_dict(small.state_dict())
    fresh[1].load_dense_state_dict(model.state_dict())
    for net in fresh:
        torch.testing.assert_close(net(images()), model(images()))


def test_a_foreign_dense_state_is_refused():
    model, kept = masked_resnet()
    small = narrow(model, kept)
    with pytest.raises(UserError, match=r"classifier\.weight: CifarResNet needs shape"):
        small.load_dense_state_dict(CifarResNet(depth=8, num_classes=7).state_dict())


def test_state_keys_are_dense_keys_and_hold_no_indices():
    model, kept = masked_resnet()
    small = narrow(model, kept)
    assert list(small.state_dict()) == list(model.state_dict())
    assert {name for name, _ in small.named_parameters()} == {name for name, _ in model.named_parameters()}


def test_shares_no_tensor_with_the_dense_network():
    model, kept = masked_resnet()
    before = copy.deepcopy(model.state_dict())
    small = narrow(model, {})
    for parameter in small.parameters():
        nn.init.zeros_(parameter)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    del kept


@pytest.mark.parametrize("name", ["alexnet", "resnet50"])
def test_other_registered_models(name):
    torch.manual_seed(0)
    model = build_model(name, num_classes=4).eval()
    fill_norms(model)
    chooser, kept = random.Random(1), {}
    for layer_name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            kept[layer_name] = sorted(chooser.sample(range(layer.num_features), layer.num_features // 2))
    zero_pruned(model, kept)
    small = narrow(model, kept)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-4 * model(x).abs().max().item())
    assert small.get_submodule(next(iter(kept))).num_features == len(kept[next(iter(kept))])


def test_a_layer_without_filters_becomes_nothing():
    model, kept = masked_resnet()
    kept |= {"stage_2.0.conv_b": [], "stage_2.0.bn_b": []}
    zero_pruned(model, kept)
    small = narrow(model.eval(), kept)
    assert not any(key.startswith("stage_2.0.conv_b") for key in small.state_dict())
    torch.testing.assert_close(small.outputs(images()), model.outputs(images()))
    dense = CifarResNet(depth=8, num_classes=5).double().eval()
    dense.load_state_dict(small.dense_state_dict())
    torch.testing.assert_close(dense(images()), model(images()))


def test_a_network_without_any_filter_still_gives_its_bias():
    model, kept = masked_resnet()
    kept = {name: [] for name in kept}
    zero_pruned(model, kept)
    small = narrow(model.eval(), kept)
    torch.testing.assert_close(small.outputs(images()), model.outputs(images()))
    torch.testing.assert_close(small(images()), model.classifier.bias.expand(3, -1))


def test_wide_sums_cut_only_inside_of_blocks():
    model, kept = masked_resnet()
    small = narrow(model.eval(), kept, wide_sums=True)
    assert small.get_submodule("stage_3.0.conv_a").out_channels == 38
    assert small.get_submodule("stage_3.0.conv_b").weight.shape == (64, 38, 3, 3)
    assert small.get_submodule("conv_1_3x3").out_channels == 16
    torch.testing.assert_close(small.outputs(images()), model.outputs(images()))


@pytest.mark.parametrize("training", [False, True])
def test_channels_last_stays_and_computes_the_same(training):
    model, kept = masked_resnet()
    small = narrow(model.train(training), kept).to(memory_format=torch.channels_last)
    outputs = small.outputs(images().to(memory_format=torch.channels_last))
    torch.testing.assert_close(outputs, model.outputs(images()))
    assert all(block.is_contiguous(memory_format=torch.channels_last) for block in outputs.blocks)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"stage_9": [0]}, "no convolution, batch norm or linear layer named 'stage_9'"),
        ({"stage_1": [0]}, "no convolution, batch norm or linear layer named 'stage_1'"),
        ({"bn_1": [0, 16]}, "'bn_1': ascending numbers from 0 to 15"),
        ({"bn_1": [3, 2]}, "'bn_1': ascending numbers"),
        ({"bn_1": [-1]}, "'bn_1': ascending numbers"),
        ({"bn_1": ["2"]}, "'bn_1': ascending numbers"),
        ({"bn_1": [2, 2]}, "'bn_1': ascending numbers"),
    ],
)
def test_bad_kept_channels_are_named(kept, message):
    with pytest.raises(UserError, match=message):
        narrow(CifarResNet(depth=8, num_classes=5), kept)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_network_that_cannot_be_traced_names_the_line():
    with pytest.raises(UserError, match=r"Branching: torch.fx cannot trace `forward: return x if x.sum\(\) > 0"):
        narrow(Branching(), {})


class WithFunctionalDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.conv(x), 0.5, training=self.training)


def test_functional_dropout_follows_the_mode():
    small = narrow(WithFunctionalDropout().double(), {"conv": [1, 2]})
    evaluated = small.eval()(images())
    assert torch.equal(evaluated, small(images()))
    assert small.train()(images()).eq(0).sum() > evaluated.eq(0).sum()


class TwoFaced(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * 2 if self.training else x


def test_other_operations_in_training_are_refused_there():
    model = TwoFaced().double()
    small = narrow(model, {})
    torch.testing.assert_close(small(images()), model.eval()(images()))
    with pytest.raises(UserError, match="TwoFaced runs other operations in training"):
        small.train()


def test_outputs_of_a_network_without_them():
    with pytest.raises(UserError, match="WithFunctionalDropout has no feature maps"):
        narrow(WithFunctionalDropout(), {}).outputs(images())


def test_copies_and_casts():
    model, kept = masked_resnet()
    small = narrow(model.eval(), kept)
    twin = copy.deepcopy(small).float()
    nn.init.zeros_(small.classifier.weight)
    torch.testing.assert_close(twin(images().float()), model(images()).float(), rtol=1e-4, atol=1e-4)


def test_compiled_as_one_graph():
    model, kept = masked_resnet()
    small = narrow(model.train(), kept)
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    expected = copy.deepcopy(small)(images())
    torch.testing.assert_close(compiled(images()), expected)


def test_exported_with_any_batch_size():
    model, kept = masked_resnet()
    small = narrow(model.eval(), kept)
    program = torch.export.export(small, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(images(5)), model(images(5)))
