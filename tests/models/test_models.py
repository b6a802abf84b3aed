from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from models import MODELS, PRETRAINED_MODELS, build_model
from models.cifar_resnet import BasicBlock, CifarResNet
from models.outputs import Outputs
from utils.errors import UserError

CIFAR_RESNETS = sorted(name for name in MODELS.keys() - PRETRAINED_MODELS - {"alexnet"} if "/" not in name)
IMAGENET_RESNETS = sorted(PRETRAINED_MODELS)
IMAGENET_BLOCKS = {"resnet18": 8, "resnet34": 16, "resnet50": 16, "resnet101": 33, "resnet152": 50}


def on_meta(name, num_classes=10):
    """The network without values: enough for shapes and names, and free for the largest."""
    with torch.device("meta"):
        return build_model(name, num_classes=num_classes)


def shapes(maps):
    return [tuple(feature_map.shape) for feature_map in maps]


def names_and_shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_all_promised_networks_are_there():
    cifar, imagenet = (8, 20, 32, 44, 56, 110), (18, 34, 50, 101, 152)
    assert {name for name in MODELS if "/" not in name} == {"alexnet", *(f"resnet{depth}" for depth in cifar + imagenet)}
    assert set(CIFAR_RESNETS) == {f"resnet{depth}" for depth in cifar}
    assert set(IMAGENET_RESNETS) == {f"resnet{depth}" for depth in imagenet}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num_classes", [10, 1000])
def test_logits_are_one_a_class(name, num_classes):
    images = torch.empty(2, 3, 32, 32, device="meta")
    assert on_meta(name, num_classes)(images).shape == (2, num_classes)


@pytest.mark.parametrize("name", ["alexnet", "resnet20", "resnet18"])
def test_outputs_hold_the_logits_and_stay_attached(name):
    torch.manual_seed(0)
    model = build_model(name, num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    outputs = model.outputs(images)
    assert isinstance(outputs, Outputs)
    assert torch.equal(outputs.logits, model(images))
    classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    torch.testing.assert_close(classifier(outputs.embedding), outputs.logits)
    for feature_map in (*outputs.stages, *outputs.blocks):
        assert feature_map.requires_grad and feature_map.min() == 0  # after ReLU
    assert outputs.stages[-1] is outputs.blocks[-1]


@pytest.mark.parametrize("name", CIFAR_RESNETS)
def test_maps_of_cifar_resnets(name):
    outputs = on_meta(name).outputs(torch.empty(2, 3, 32, 32, device="meta"))
    stages = [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]
    blocks = (int(name.removeprefix("resnet")) - 2) // 6
    assert shapes(outputs.stages) == stages
    assert shapes(outputs.blocks) == [stage for stage in stages for _ in range(blocks)]
    assert outputs.embedding.shape == (2, 64)


@pytest.mark.parametrize("name", IMAGENET_RESNETS)
def test_maps_of_imagenet_resnets(name):
    outputs = on_meta(name).outputs(torch.empty(2, 3, 64, 96, device="meta"))
    wide = 1 if name in ("resnet18", "resnet34") else 4
    sizes = [(64, 16, 24), (128, 8, 12), (256, 4, 6), (512, 2, 3)]
    assert shapes(outputs.stages) == [(2, wide * channels, height, width) for channels, height, width in sizes]
    assert len(outputs.blocks) == IMAGENET_BLOCKS[name]
    assert outputs.embedding.shape == (2, wide * 512)


def test_maps_of_alexnet():
    outputs = on_meta("alexnet").outputs(torch.empty(2, 3, 32, 32, device="meta"))
    maps = [(2, 64, 8, 8), (2, 192, 4, 4), (2, 384, 2, 2), (2, 256, 2, 2), (2, 256, 2, 2)]
    assert shapes(outputs.blocks) == maps
    assert shapes(outputs.stages) == [maps[0], maps[1], maps[4]]
    assert outputs.embedding.shape == (2, 4096)


@pytest.mark.parametrize("name", IMAGENET_RESNETS)
def test_imagenet_resnets_have_torchvisions_names(name):
    with torch.device("meta"):
        reference = getattr(torchvision.models, name)(num_classes=10)
    assert names_and_shapes(on_meta(name)) == names_and_shapes(reference)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_imagenet_resnets_compute_what_torchvisions_do(name):
    torch.manual_seed(0)
    reference = getattr(torchvision.models, name)(num_classes=5).eval()
    model = build_model(name, num_classes=5).eval()
    model.load_state_dict(reference.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images), reference(images))


@pytest.mark.parametrize("name", CIFAR_RESNETS)
def test_cifar_resnets_have_the_known_names(name):
    blocks = (int(name.removeprefix("resnet")) - 2) // 6
    expected = {"conv_1_3x3.weight", "classifier.weight", "classifier.bias"}
    norms = {"bn_1"}
    for block in (f"stage_{stage}.{i}" for stage in (1, 2, 3) for i in range(blocks)):
        expected |= {f"{block}.conv_a.weight", f"{block}.conv_b.weight"}
        norms |= {f"{block}.bn_a", f"{block}.bn_b"}
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert set(on_meta(name).state_dict()) == expected | {f"{norm}.{part}" for norm in norms for part in parts}


def test_alexnet_has_the_known_names():
    shapes_by_name = names_and_shapes(on_meta("alexnet"))
    modules = {f"conv{i}" for i in range(1, 6)} | {f"conv{i}_bn" for i in range(1, 6)} | {"fc1", "fc2", "fc3"}
    assert {name.rpartition(".")[0] for name in shapes_by_name} == modules
    assert shapes_by_name["conv1.weight"] == (64, 3, 11, 11)
    stem = on_meta("alexnet").conv1
    assert (stem.stride, stem.padding) == ((4, 4), (5, 5))


def test_resnet56_has_the_known_number_of_conv_weights():
    convs = [module for module in on_meta("resnet56").modules() if isinstance(module, nn.Conv2d)]
    assert sum(conv.weight.numel() for conv in convs) == 848_304


def test_a_cifar_shortcut_subsamples_and_pads_with_zero_channels():
    block = BasicBlock(1, 3, stride=2).eval()
    nn.init.zeros_(block.bn_b.weight)  # nothing but the shortcut is left
    x = torch.arange(-8.0, 8.0).reshape(1, 1, 4, 4)
    expected = torch.zeros(1, 3, 2, 2)
    expected[0, 0] = torch.tensor([[0.0, 0.0], [0.0, 2.0]])  # ReLU of -8, -6; 0, 2
    assert torch.equal(block(x), expected)


def test_a_cifar_block_adds_its_residual_before_the_relu():
    torch.manual_seed(0)
    block = BasicBlock(2, 2, stride=1).eval()
    x = torch.randn(1, 2, 5, 5)
    scale = (1 + block.bn_a.eps) ** -0.5  # fresh batch norms divide by this alone
    inner = F.relu(F.conv2d(x, block.conv_a.weight, padding=1) * scale)
    expected = F.relu(x + F.conv2d(inner, block.conv_b.weight, padding=1) * scale)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("depth", [2, 19, 57])
def test_a_depth_that_is_not_6n_plus_2_is_refused(depth):
    with pytest.raises(ValueError, match=f"not {depth}"):
        CifarResNet(depth=depth, num_classes=10)


def test_an_unknown_network_lists_the_known():
    with pytest.raises(UserError, match=r"unknown network 'qqq': .*alexnet, .*resnet152"):
        build_model("qqq", num_classes=10)


def test_pretrained_weights_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match="pretrained: no published weights for 'resnet56': choose resnet101"):
        build_model("resnet56", num_classes=10, pretrained=True)


def download(monkeypatch, result):
    """Makes torchvision's download give a state_dict, or fail."""

    def load(url, **_):
        if isinstance(result, Exception):
            raise result
        return dict(result)

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", load)


def test_pretrained_weights_are_all_loaded_for_imagenets_classes(monkeypatch):
    published = torchvision.models.resnet18().state_dict()
    download(monkeypatch, published)
    model = build_model("resnet18", num_classes=1000, pretrained=True)
    assert all(torch.equal(tensor, published[name]) for name, tensor in model.state_dict().items())


def test_the_classifier_stays_new_for_other_classes(monkeypatch):
    published = torchvision.models.resnet18().state_dict()
    download(monkeypatch, published)
    model = build_model("resnet18", num_classes=7, pretrained=True)
    assert model.fc.weight.shape == (7, 512)
    assert torch.equal(model.layer4[1].conv2.weight, published["layer4.1.conv2.weight"])


def test_weights_that_cannot_be_downloaded_are_named(monkeypatch):
    download(monkeypatch, URLError("no network"))
    with pytest.raises(UserError, match=r"--pretrained: the weights of resnet18 could not be downloaded from .*no network"):
        build_model("resnet18", num_classes=10, pretrained=True)


def test_cifar_resnets_start_from_the_fan_out():
    torch.manual_seed(0)
    network = build_model("resnet20", num_classes=100)
    conv, linear = network.get_submodule("stage_3.0.conv_a"), network.classifier  # 32 channels to 64 filters of 3x3
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert network.conv_1_3x3.weight.std().item() == pytest.approx((2 / (16 * 9)) ** 0.5, rel=0.1)
    assert conv.weight.abs().max() > 3 * conv.weight.std()  # normal, not uniform
    assert linear.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    assert linear.bias.eq(0).all() and network.bn_1.weight.eq(1).all() and network.bn_1.bias.eq(0).all()
