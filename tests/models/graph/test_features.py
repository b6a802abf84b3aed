"""`outputs(x)` of networks that were written without: found in their graphs as the networks of this repository say it."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from networks_of_others import FILE
from selections import narrow
from torch import nn

from distill.objective import FrozenTeacher
from models import build_model
from models.graph.features import find_features, with_outputs
from models.graph.tracing import trace_network
from models.outputs import Outputs
from prune.compact import compact
from utils.errors import UserError

FOUND = [f"{FILE}:small", "torchvision/mobilenet_v3_small", "torchvision/densenet121", "torchvision/convnext_tiny",
         "timm/mobilenetv3_small_050", "timm/resnet10t"]  # fmt: skip


def images(side=64):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def build(name):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    return build_model(name, num_classes=5)


class Hidden(nn.Module):
    """A network of this repository as a stranger would give it: without `outputs` of its own."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)


def assert_same(found: Outputs, expected: Outputs, **tolerance):
    torch.testing.assert_close(found, expected, **tolerance or {"rtol": 0, "atol": 0})


class TestNetworksOfThisRepository:
    @pytest.mark.parametrize("side", [32, 64])
    @pytest.mark.parametrize("name", ["resnet20", "resnet56", "resnet18", "resnet50", "alexnet"])
    def test_keep_their_own_and_the_general_way_finds_the_same(self, name, side):
        network = build(name).eval()
        hidden = with_outputs(Hidden(network))
        with torch.no_grad():
            assert_same(hidden.outputs(images(side)), network.outputs(images(side)))

    def test_in_training_too(self):
        network = build("resnet20")
        hidden = with_outputs(copy.deepcopy(Hidden(network)))
        assert_same(hidden.outputs(images(32)), network.outputs(images(32)))
        assert_same(hidden.eval().outputs(images(32)), network.eval().outputs(images(32)))

    def test_have_no_class_of_another_kind(self):
        network = build("resnet20")
        assert with_outputs(network) is network and type(network).__name__ == "CifarResNet"


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("training", [False, True])
def test_maps_come_with_the_logits_of_the_network(name, training):
    network = build(name).train(training)
    copied = copy.deepcopy(network)
    torch.manual_seed(1)
    logits = copied(images())
    torch.manual_seed(1)
    outputs = network.outputs(images())
    torch.testing.assert_close(outputs.logits, logits)
    sizes = [stage.shape[2] for stage in outputs.stages]
    assert sizes == sorted(set(sizes), reverse=True) and len(sizes) >= 3
    assert outputs.embedding.dim() == 2
    assert all(map_.dim() == 4 and map_.requires_grad for map_ in (*outputs.stages, *outputs.blocks))
    weights = ({key: value for key, value in own.state_dict().items() if "num_batches" not in key} for own in (network, copied))
    torch.testing.assert_close(*weights)


def test_blocks_of_a_users_network_are_its_own():
    network = build(f"{FILE}:small").eval()
    x, expected = network.stem(images()), []
    for layer in network.body:
        x = layer(x)
        if not isinstance(layer, nn.Dropout2d):
            expected.append(x)
    outputs = network.outputs(images())
    assert_same(outputs, Outputs(network(images()), tuple(expected), tuple(expected), x.mean((2, 3))))


def test_tokens_and_maps_with_channels_last_are_laid_out_as_maps():
    vit = build("torchvision/vit_b_32").eval()
    outputs = vit.outputs(images(224))
    assert [tuple(stage.shape[1:]) for stage in outputs.stages] == [(768, 7, 7)]
    assert len(outputs.blocks) == 24
    patches = vit.conv_proj(images(224)).flatten(2).mT + vit.encoder.pos_embedding[:, 1:]
    first = vit.encoder.layers.encoder_layer_0
    whole = torch.cat([(vit.class_token + vit.encoder.pos_embedding[:, :1]).expand(2, -1, -1), patches], 1)
    normed = first.ln_1(whole)
    attended = whole + first.self_attention(normed, normed, normed, need_weights=False)[0]
    torch.testing.assert_close(outputs.blocks[0], attended[:, 1:].mT.unflatten(2, (7, 7)))
    swin = build("torchvision/swin_t").eval()
    assert [tuple(stage.shape[1:]) for stage in swin.outputs(images(64)).stages] == [
        (96, 16, 16), (192, 8, 8), (384, 4, 4), (768, 2, 2)]  # fmt: skip


def test_a_classifier_that_is_a_convolution_is_no_stage():
    outputs = build("torchvision/squeezenet1_1").eval().outputs(images())
    assert [stage.shape[1] for stage in outputs.stages] == [64, 128, 256, 512]
    assert outputs.embedding.shape == (2, 512)


@pytest.mark.parametrize("name", [f"{FILE}:small", "timm/mobilenetv3_small_050"])
class TestOtherForms:
    def test_copies_and_pickles(self, name):
        network = build(name).eval()
        expected = network.outputs(images())
        buffer = io.BytesIO()
        torch.save(network, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), torch.load(buffer, weights_only=False)):
            assert type(other) is type(network)
            assert_same(other.outputs(images()), expected)

    def test_a_frozen_teacher_with_folded_batch_norms(self, name):
        network = build(name)
        network(images())  # running statistics that folding has to get right
        expected = network.eval().outputs(images())
        found = FrozenTeacher(network, fold_batch_norm=True)(images())
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)

    def test_the_narrow_form(self, name):
        network = build(name)
        network(images())
        network.eval()
        layers = [layer for layer, module in network.named_modules() if isinstance(module, nn.Conv2d) and module.groups == 1][1:4]
        with torch.no_grad():
            for layer in layers:
                for parameter in network.get_submodule(layer).parameters():
                    parameter[::2] = 0
        small = compact(network, images())
        assert small.kept
        torch.testing.assert_close(small.outputs(images()), network.outputs(images()), rtol=1e-3, atol=1e-4)

    def test_compiled(self, name):
        network = build(name).eval()
        expected = network.outputs(images())
        compiled = torch.compile(network.outputs, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(images()), expected)


def test_a_layer_named_outputs_stays_a_layer():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.outputs = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return self.outputs(self.conv(x).mean((2, 3)))

    network = with_outputs(Named())
    assert network(images()).shape == (2, 2)
    assert narrow(network.eval(), {"conv": [0, 1]})(images()).shape == (2, 2)
    with pytest.raises(UserError, match="has a layer `outputs`"):
        FrozenTeacher(network)


def test_a_network_without_maps_is_refused_in_one_line_and_can_be_narrowed():
    network = with_outputs(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4), nn.ReLU(), nn.Linear(4, 2)))
    with pytest.raises(UserError, match="has no feature maps"):
        network.outputs(images(32))
    assert narrow(network.eval(), {"1": [0, 2]})(images(32)).shape == (2, 2)


def test_a_sum_of_three_is_one_block():
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 4, 3, padding=1) for _ in range(3))
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(F.relu(self.a(x) + self.b(x) + self.c(x)).mean((2, 3)))

    network = Three()
    graph = trace_network(network).graph
    assert [node.target for node in find_features(graph, network, images()).blocks] == [F.relu]


class TwoFaced(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.conv(x))
        return self.head((2 * x if self.training else x).mean((2, 3)))


class Overwriting(TwoFaced):
    def forward(self, x):
        x = F.relu(self.conv(x))
        flat = x.view(x.size(0), -1)
        flat.add_(1)
        return self.head(x.mean((2, 3)))


class TestFunctionsThatAGraphDoesNotHold:
    def test_other_operations_in_training(self):
        network = with_outputs(TwoFaced()).eval()
        for mode in (False, True):
            network.train(mode)
            assert torch.equal(network.outputs(images()).logits, network(images()))

    def test_memory_that_is_overwritten_and_read_under_another_name(self):
        network = with_outputs(Overwriting()).eval()
        with pytest.raises(UserError, match="overwrites memory that is read later as `relu`"):
            network.outputs(images())


class Branched(nn.Module):
    """Two residual blocks whose branch has a sum of its own, as in Res2Net."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        for first, second in (self.convs[:2], self.convs[2:]):
            y = first(x)
            x = x + second(torch.sigmoid(y) + torch.tanh(y))
        return self.head(x.mean((2, 3)))


def test_a_sum_within_the_branch_of_a_block_is_none():
    network = with_outputs(Branched())
    x, expected = images(), []
    for first, second in (network.convs[:2], network.convs[2:]):
        y = first(x)
        x = x + second(torch.sigmoid(y) + torch.tanh(y))
        expected.append(x)
    assert_same(network.outputs(images()).blocks, tuple(expected))


@pytest.mark.parametrize(
    ("name", "stages", "blocks"),
    [
        ("timm/dla34", [64, 128, 256, 512], 12),  # sums in the branches of a tree
        ("timm/lcnet_035", [16, 24, 48, 88, 176], 31),  # no sums, batch norms with their activation
        ("timm/convnext_atto", [40, 80, 160, 320], 12),
        ("timm/pvt_v2_b0", [32, 64, 160, 256], 16),  # tokens of four grids
    ],
)
def test_families_of_timm(name, stages, blocks):
    network = build(name).eval()
    side = 224 if "pvt" in name else 64
    with torch.no_grad():
        outputs = network.outputs(images(side))
    assert [stage.shape[1] for stage in outputs.stages] == stages
    assert len(outputs.blocks) == blocks
