"""Python source of a network: the same bits, plain torch, what a person would have written, and nothing that could run."""

import ast
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from norms import fill_norms
from PIL import Image
from selections import narrow, prunable_layers
from torch import nn
from torchvision.ops import StochasticDepth

from deploy.expressions import quoted
from deploy.source import PythonSource, _preprocessing, network_source
from models import build_model
from models.graph import ChannelGraph
from models.narrow import NarrowNetwork
from prune.choice import FilterChoice, small_network
from prune.masks import keep_ratios
from utils.errors import UserError
from utils.images import preparation
from utils.images.spec import ImageSpec

IMAGES = ImageSpec(("zebra", 'a "quoted"\nname \\', "日本"), (32, 32), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def narrowed(model: nn.Module, *, side: int = 32, coupled: bool = False) -> NarrowNetwork:
    """The network without some of its filters, chosen at random, or half of each layer's, the same of all that meet."""
    example = torch.randn(2, 3, side, side)
    layers = prunable_layers(model, example=example)
    if coupled:
        data = types.SimpleNamespace(example=example)
        choice = FilterChoice(
            ChannelGraph(model, example),
            layers,
            keep_ratios(layers, [0.5]),
            criterion="filter-a",
            data=data,
            seed=0,
            multiple=1,
            coupled=True,
        )
        return small_network(choice())
    kept, random = {}, torch.Generator().manual_seed(0)
    for layer in layers:
        channels = torch.randperm(layer.filters, generator=random)[: max(1, int(0.6 * layer.filters))].sort()[0].tolist()
        kept |= dict.fromkeys(filter(None, (layer.name, layer.norm_name)), channels)
    return narrow(model, kept, example=example)


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(name, num_classes=3)
    fill_norms(model)
    return model


def source_of(network: NarrowNetwork) -> PythonSource:
    return network_source(network.eval(), title="A network.", images=IMAGES, weights="small.safetensors")


def loaded(source: PythonSource, folder: Path) -> types.ModuleType:
    """The module as its users import it, and `network`, what its `load` gives."""
    (folder / "small.py").write_text(source.text)
    safetensors.torch.save_file(source.tensors, folder / "small.safetensors")
    module = types.ModuleType("small")
    module.__file__ = str(folder / "small.py")
    exec(compile(source.text, module.__file__, "exec"), vars(module))
    module.network = module.load()
    return module


NETWORKS = [
    ("resnet20", 32, False),
    ("resnet20", 32, True),
    ("alexnet", 32, False),
    ("resnet18", 64, False),
    ("torchvision/mobilenet_v3_small", 64, False),
    ("torchvision/mobilenet_v2", 64, True),
    ("torchvision/squeezenet1_1", 64, False),
    ("torchvision/shufflenet_v2_x0_5", 64, True),
    ("torchvision/densenet121", 32, True),
    ("torchvision/efficientnet_b0", 32, False),
    ("timm/resnet10t", 64, False),
    ("timm/mobilenetv3_small_050", 64, False),
]


@pytest.mark.parametrize(("name", "side", "coupled"), NETWORKS)
def test_the_source_computes_the_same_bits_in_evaluation_and_in_training(name, side, coupled, tmp_path):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    small = narrowed(built(name), side=side, coupled=coupled)
    network = loaded(source_of(small), tmp_path).network
    images = torch.randn(3, 3, side, side)
    with torch.no_grad():
        assert torch.equal(network(images), small.eval()(images))
    results = []
    for own in (network, small):
        torch.manual_seed(1)
        logits = own.train()(images)
        logits.square().sum().backward()
        gradients = sorted(float(parameter.grad.norm()) for parameter in own.parameters() if parameter.grad is not None)
        results.append((logits, torch.tensor(gradients)))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0.05, atol=0.1)


BLOCK = """
class BasicBlock(nn.Module):
    def __init__(self, conv_a_in, conv_a_out):
        super().__init__()
        self.conv_a = nn.Conv2d(conv_a_in, conv_a_out, 3, padding=1, bias=False)
        self.bn_a = nn.BatchNorm2d(conv_a_out)
        self.conv_b = nn.Conv2d(conv_a_out, conv_a_in, 3, padding=1, bias=False)
        self.bn_b = nn.BatchNorm2d(conv_a_in)

    def forward(self, x):
        return F.relu(x + self.bn_b(self.conv_b(F.relu(self.bn_a(self.conv_a(x))))))
"""


def coupled_resnet() -> NarrowNetwork:
    """ResNet-20 with 12, 20 and 40 channels in its streams, which share their first ones, and 8, 16 and 24 within its blocks."""
    model, kept = built("resnet20"), {}
    first = [*range(12)]
    streams = (first, [*first, *range(16, 24)], [*first, *range(16, 24), *range(32, 52)])
    for name, layer in model.named_modules():
        stage = int(name.partition("stage_")[2][:1] or 1) - 1
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
            kept[name] = list(range((8, 16, 24)[stage])) if name.endswith("_a") else streams[stage]
    return narrow(model, kept)


def test_coupled_channels_come_out_as_one_would_write_them():
    text = source_of(coupled_resnet()).text
    assert BLOCK in text
    assert "        self.stage_1 = nn.Sequential(BasicBlock(12, 8), BasicBlock(12, 8), BasicBlock(12, 8))\n" in text
    assert "nn.Sequential(BasicBlock2(), BasicBlock(20, 16), BasicBlock(20, 16))\n" in text
    assert "        return F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 8)))\n" in text
    assert "        self.classifier = nn.Linear(40, 3)\n" in text
    assert "        return self.classifier(x.mean((2, 3)))\n" in text
    assert "register_buffer" not in text and "index" not in text


def test_other_channels_are_picked_by_short_lines():
    text = source_of(narrowed(built("resnet20"))).text
    assert "            places" in text or "        places = [" in text
    assert ".index_add(1, self.places, " in text
    assert max(map(len, text.splitlines())) <= 110


def test_the_constants_are_those_of_the_images_and_preprocessing_normalises(tmp_path):
    module = loaded(source_of(coupled_resnet()), tmp_path)
    assert tuple(module.CLASS_NAMES) == IMAGES.class_names
    assert (IMAGES.image_size, IMAGES.mean, IMAGES.std) == (module.IMAGE_SIZE, module.MEAN, module.STD)
    grey = module.normalise(torch.full((1, 3, 2, 2), 0.5))
    assert grey[0, :, 0, 0].tolist() == pytest.approx([0.0, 0.4, 0.2 / 0.3])


def test_it_needs_torch_and_safetensors_and_for_photos_pillow_and_passes_a_linter(tmp_path):
    for small in (coupled_resnet(), narrowed(built("resnet20"))):
        text = source_of(small).text
        imported = {
            (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).partition(".")[0]
            for node in ast.parse(text).body  # the function for photos has its own
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert imported == {"pathlib", "torch", "safetensors"}
        (tmp_path / "small.py").write_text(text)
        words = ("check", "--isolated", "--select", "E4,E7,E9,F,I,B,W", str(tmp_path / "small.py"))
        ended = subprocess.run([sys.executable, "-m", "ruff", *words], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout


def test_it_compiles_and_exports(tmp_path):
    network = loaded(source_of(narrowed(built("resnet20"))), tmp_path).network
    images = torch.randn(2, 3, 32, 32)
    expected = network(images)
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(network, backend="eager", fullgraph=True)(images), expected, atol=1e-5)
    assert torch.allclose(torch.export.export(network, (images,)).module()(images), expected, atol=1e-5)


class Other(nn.Module):
    def forward(self, x):
        return x.sinh() if x.sum() > 0 else x  # torch.fx cannot look into it


@pytest.mark.parametrize(
    ("layer", "message"),
    [(Other(), "is a Other, none of torch.nn's"), (nn.MultiheadAttention(3, 1), "does not say its")],
)
def test_a_layer_that_is_not_torchs_is_named(layer, message):
    from deploy.expressions import layer_arguments

    with pytest.raises(UserError, match=message):
        layer_arguments(layer, "odd")


def test_stochastic_depth_draws_as_torchvisions(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.depth = nn.Conv2d(3, 4, 1), StochasticDepth(0.4, "row")
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.depth(self.conv(x)).mean((2, 3)))

    small = narrow(Net(), {"conv": [0, 2]})
    network = loaded(source_of(small), tmp_path).network.train()
    images, results = torch.randn(16, 3, 4, 4), []
    for own in (network, small.train()):
        torch.manual_seed(3)
        results.append(own(images))
    assert torch.equal(*results)
    assert results[0].unique(dim=0).shape[0] < 16  # some branches were left out


class DropPath(nn.Module):
    def forward(self, x):
        return x * (torch.rand(len(x), 1, 1, 1) < 0.5) if self.training else x


def test_a_layer_of_ones_own_that_acts_in_training_alone_is_left_out(tmp_path):
    layers = nn.Conv2d(3, 4, 1), DropPath(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    small, images = narrow(nn.Sequential(*layers), {"0": [0, 2]}).eval(), torch.randn(4, 3, 4, 4)
    network = loaded(source_of(small), tmp_path).network
    assert torch.equal(network(images), small(images))
    with pytest.raises(Exception, match="training"):
        network.train()(images)


def test_a_title_cannot_leave_the_docstring():
    title = 'x"""\nimport os\n"""\\'
    text = network_source(coupled_resnet().eval(), title=title, images=IMAGES, weights='a"b.safetensors').text
    assert not [node for node in ast.parse(text).body if isinstance(node, ast.Import) and node.names[0].name == "os"]


# ---- names that anybody may have chosen --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    return narrow(built("resnet20"), {}, example=torch.randn(2, 3, 8, 8)).eval()


def class_names(text: str) -> list[str]:
    """What the source says that its classes are called; nothing of it runs."""
    tree = ast.parse(text)
    named = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    return ast.literal_eval(named["CLASS_NAMES"])


ORDINARY = [
    "tench, Tinca tinca",
    "cat (tabby",
    "a,b",
    "]",
    "(",
    "it's",
    'an "inch"',
    "\\",
    "😀",
    "𝔸, 𝔹",
    "\u2028",
    "\x1b[31m",
    "",
    "'\"",
    "#",
]


@pytest.mark.parametrize("count", [1, 3, len(ORDINARY), 200])
def test_class_names_are_what_they_are(count, small):
    names = tuple((ORDINARY * 20)[:count])
    source = network_source(
        small, title="\x1b]0;a\ud800", images=replace(IMAGES, class_names=names), weights="a\udcff.safetensors"
    )
    assert class_names(source.text) == list(names)
    source.text.encode()
    assert max(map(len, source.text.splitlines())) <= 120


@given(st.lists(st.text(max_size=40), min_size=1, max_size=30))
def test_any_class_names_are_what_they_are(names):
    assert ast.literal_eval("[" + ", ".join(map(quoted, names)) + "]") == names
    assert all(quoted(name).isprintable() for name in names)


def test_texts_in_calls_stay_whole():
    class Einsum(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            maps = self.conv(x)
            scaled = torch.einsum("b c h w , k c -> b k", torch.sigmoid(maps) * torch.tanh(maps) + torch.relu(maps), self.weight)
            return scaled + torch.einsum("b c h w , k c -> b k", torch.sigmoid(maps), torch.relu(self.weight))

    network = narrow(Einsum(), {}, example=torch.randn(2, 3, 8, 8)).eval()
    source = network_source(network, title="A network.", images=IMAGES, weights="small.safetensors")
    texts = [node.value for node in ast.walk(ast.parse(source.text)) if isinstance(node, ast.Constant)]
    assert texts.count("b c h w , k c -> b k") == 2


@pytest.mark.parametrize("size", [(32, 32), (20, 40), (224, 224), (96, 200)])
@pytest.mark.parametrize("photo", [(300, 200), (37, 190), (16, 16)])
def test_a_photo_is_prepared_as_it_was_in_testing(size, photo):
    images = replace(IMAGES, image_size=size)
    module = {"__name__": "small"}
    code = _preprocessing(images)
    exec(f"import torch\n\ndef normalise(images):\n    return images\n\n{code}", module)
    pixels = torch.randint(256, (photo[1], photo[0], 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    found = module["preprocess"](image)
    torch.testing.assert_close(found, preparation.test_transform(size)(image)[None] / 255, rtol=0, atol=0)
