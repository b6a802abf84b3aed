"""The networks of the standard pairs of distillation: their known sizes and names, and that they are pruned like all others."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from models import MODELS, build_model
from models.network_file import load_network
from models.repdistiller import NETWORKS
from models.repdistiller.parts import shuffle_channels
from prune.compact import compact
from utils.errors import UserError

# with 100 classes, as the official code builds them
PARAMETERS = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_1": 180_916,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "MobileNetV2": 812_836,
    "ShuffleV1": 949_258,
    "ShuffleV2": 1_355_528,
}
# channels and pixels a side of the stages, and the number of blocks
MAPS = {
    "resnet8x4": ([(64, 32), (128, 16), (256, 8)], 3),
    "wrn_16_2": ([(32, 32), (64, 16), (128, 8)], 6),
    "vgg8": ([(128, 16), (256, 8), (512, 4), (512, 4)], 5),
    "MobileNetV2": ([(12, 16), (16, 8), (48, 4), (160, 2)], 17),
    "ShuffleV1": ([(240, 16), (480, 8), (960, 4)], 16),
    "ShuffleV2": ([(116, 16), (232, 8), (464, 4)], 16),
}
KEYS = {
    "resnet20": {"conv1.weight", "bn1.bias", "layer1.2.conv2.weight", "layer2.0.downsample.0.weight", "fc.bias"},
    "wrn_40_1": {"conv1.weight", "block3.layer.5.bn2.running_var", "block2.layer.0.convShortcut.weight", "bn1.bias", "fc.weight"},
    "vgg13": {"block0.0.bias", "block0.3.weight", "block4.4.running_mean", "classifier.weight"},
    "MobileNetV2": {"conv1.0.weight", "blocks.3.2.conv.6.weight", "conv2.1.bias", "classifier.0.weight"},
    "ShuffleV1": {"conv1.weight", "layer1.0.conv3.weight", "layer3.3.bn3.bias", "linear.bias"},
    "ShuffleV2": {"layer1.0.conv5.weight", "layer2.7.bn3.bias", "conv2.weight", "bn2.weight", "linear.weight"},
}


def on_meta(name, num_classes=100):
    with torch.device("meta"):
        return build_model(f"repdistiller/{name}", num_classes=num_classes)


def test_every_network_has_its_size_here():
    assert set(PARAMETERS) == set(NETWORKS) == {name.partition("/")[2] for name in MODELS if name.startswith("repdistiller/")}


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_are_those_of_the_official_code(name):
    assert sum(parameter.numel() for parameter in on_meta(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", KEYS)
def test_names_are_those_of_the_official_code(name):
    assert set(on_meta(name).state_dict()) >= KEYS[name]


@pytest.mark.parametrize("name", MAPS)
def test_maps(name):
    stages, blocks = MAPS[name]
    outputs = on_meta(name).outputs(torch.empty(2, 3, 32, 32, device="meta"))
    assert [tuple(stage.shape) for stage in outputs.stages] == [(2, channels, side, side) for channels, side in stages]
    assert len(outputs.blocks) == blocks
    assert outputs.logits.shape == (2, 100) and outputs.embedding.dim() == 2


def test_channels_are_dealt_out_in_turn():
    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert shuffle_channels(x, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]
    assert shuffle_channels(x, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]


@torch.no_grad()
def clear_channels(network):
    """Every third output of each convolution is dead, with the batch norm that is registered behind it."""
    modules = list(network.modules())
    for layer, follower in pairwise(modules):
        if isinstance(layer, nn.Conv2d):
            follows = isinstance(follower, nn.BatchNorm2d) and len(follower.weight) == len(layer.weight)
            for cleared in (layer, follower) if follows else (layer,):
                cleared.weight[::3] = 0
                if cleared.bias is not None:
                    cleared.bias[::3] = 0


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2"])
def test_what_is_dead_is_cut_and_the_function_stays(name):
    torch.manual_seed(0)
    network, images = build_model(f"repdistiller/{name}", num_classes=3).eval(), torch.randn(2, 3, 16, 16)
    clear_channels(network)
    small = compact(network, images, tolerance=1e-5).eval()
    left, whole = (sum(parameter.numel() for parameter in net.parameters()) for net in (small, network))
    assert left < 0.75 * whole
    with torch.no_grad():
        torch.testing.assert_close(small(images), network(images), rtol=1e-3, atol=1e-5)
        for own, other in zip(small.outputs(images).stages, network.outputs(images).stages, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)


def test_a_checkpoint_of_the_official_code_loads(tmp_path):
    torch.manual_seed(0)
    network = build_model("repdistiller/resnet8", num_classes=100)
    torch.save({"epoch": 240, "model": network.state_dict(), "accuracy": torch.tensor(60.0)}, tmp_path / "ckpt_epoch_240.pth")
    file = load_network(tmp_path / "ckpt_epoch_240.pth", flag="--t-path", model="repdistiller/resnet8")
    assert file.num_classes == 100
    torch.testing.assert_close(file.network.state_dict(), network.state_dict(), rtol=0, atol=0)
    with pytest.raises(UserError, match=r"does not fit repdistiller/resnet14: layer1\.1"):
        load_network(tmp_path / "ckpt_epoch_240.pth", flag="--t-path", model="repdistiller/resnet14")
