"""Archives: what goes in comes out in every bit, small, with sizes that add up."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from archives import IMAGES, KEPT, TEST_MODELS, network_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from selections import narrow
from torch import nn

from models import MODELS, build_model
from quantize.archive import SECTIONS, differing_tensors, load_archive, read_archive, save_archive
from quantize.codebook import bake_weights, layer_bits, share_weights
from quantize.huffman import entropy_bits
from utils.files import is_archive
from utils.images.spec import ImageSpec


@pytest.fixture(autouse=True)
def _test_models(monkeypatch):
    for name, build in TEST_MODELS.items():
        monkeypatch.setitem(MODELS, name, build)


def round_trip(network, path, *, model, num_classes=4):
    report = save_archive(path, network, model=model, num_classes=num_classes)
    decoded, read_report = read_archive(path)
    assert read_report == report and report.file_bytes == path.stat().st_size
    assert differing_tensors(network, decoded) == []
    return decoded, report


@pytest.mark.parametrize("kept", [None, KEPT])
def test_round_trip_of_dense_and_narrow_networks(tmp_path, kept):
    network = network_of("small", kept=kept)
    decoded, _ = round_trip(network, tmp_path / "model.huff", model="small")
    images = torch.randn(3, 3, 16, 16)
    assert torch.equal(decoded(images), network(images))
    assert getattr(decoded, "kept", {}) == (kept or {})
    assert not decoded.training and all(parameter.requires_grad for parameter in decoded.parameters())


@pytest.mark.parametrize("images", [None, IMAGES, replace(IMAGES, grey_bits=12)])
def test_what_is_known_of_the_images_comes_back(images, tmp_path):
    network = network_of("tiny")
    report = save_archive(tmp_path / "model.huff", network, model="tiny", num_classes=4, images=images)
    decoded, read_report = read_archive(tmp_path / "model.huff")
    assert read_report.images == images and read_report == report
    assert differing_tensors(network, decoded) == []


def test_an_archive_without_it_is_one_of_the_first_format(tmp_path):
    """So that programs which know no other still read it."""
    formats = {}
    for name, images in (("plain", None), ("full", IMAGES)):
        save_archive(tmp_path / name, network_of("tiny"), model="tiny", num_classes=4, images=images)
        with safe_open(tmp_path / name, "numpy") as file:
            formats[name] = json.loads(file.metadata()["archive"])
    assert (formats["plain"].pop("format"), formats["full"].pop("format")) == (1, 2)
    assert formats["plain"].keys() == {"model", "num_classes", "dtypes", "sha256"}
    assert formats["full"]["class_names"] == list(IMAGES.class_names) and formats["full"]["image_size"] == [16, 24]


def test_names_too_long_to_be_read_back_are_refused(tmp_path):
    images = ImageSpec(tuple("n" * 1024 for _ in range(4200)), (8, 8), (0.5,) * 3, (0.5,) * 3)
    network = TEST_MODELS["tiny"](num_classes=4200)
    with pytest.raises(ValueError, match="at most 4,194,304 bytes"):
        save_archive(tmp_path / "model.huff", network, model="tiny", num_classes=4200, images=images)
    assert list(tmp_path.iterdir()) == []


def test_loading_leaves_the_random_stream_alone(tmp_path):
    save_archive(tmp_path / "model.huff", network_of("tiny"), model="tiny", num_classes=4)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load_archive(tmp_path / "model.huff")
    assert torch.equal(torch.rand(2), expected)


@given(
    values=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_any_bits_of_any_type_come_back(tmp_path_factory, values, dtype, seed):
    """NaNs with their payload, negative zeros, subnormal numbers; weights that repeat and weights that do not."""
    network = TEST_MODELS["tiny"](num_classes=4)
    patterns = np.random.default_rng(seed).choice(np.array(values, np.uint32), (8, 3, 3, 3, dtype.itemsize))
    weight = torch.from_numpy(patterns.view(np.uint8).reshape(-1)[: 216 * dtype.itemsize].copy()).view(dtype).view(8, 3, 3, 3)
    network.conv.weight = nn.Parameter(weight, requires_grad=False)
    round_trip(network, tmp_path_factory.mktemp("any") / "model.huff", model="tiny")


def test_half_precision_networks(tmp_path):
    decoded, _ = round_trip(network_of("small").bfloat16(), tmp_path / "model.huff", model="small")
    assert decoded.classifier.weight.dtype == torch.bfloat16 and decoded.bn_1.num_batches_tracked.dtype == torch.int64


def test_pruned_weights_are_one_symbol_of_the_code(tmp_path):
    network = network_of("small")
    with torch.no_grad():
        network.stage_3[0].conv_b.weight[torch.rand(64, 64, 3, 3) < 0.9] = 0
    _, report = round_trip(network, tmp_path / "model.huff", model="small")
    layer = next(layer for layer in report.layers if layer.name == "stage_3.0.conv_b.weight")
    weight = network.stage_3[0].conv_b.weight
    assert layer.kept_weights == int(weight.count_nonzero()) and layer.stored_weights == weight.numel()
    assert layer.codebook_entries == weight.unique().numel()
    assert layer.shannon_bits == pytest.approx(entropy_bits(weight.unique(return_counts=True)[1].numpy()))
    assert layer.bits_per_weight < 1.6


def test_weights_that_do_not_repeat_are_stored_as_they_are(tmp_path):
    network = TEST_MODELS["tiny"](num_classes=4)
    _, report = round_trip(network, tmp_path / "model.huff", model="tiny")
    assert [(layer.codebook_entries, layer.coded_bytes) for layer in report.layers] == [(0, 4 * 216), (0, 4 * 32)]


def test_sizes_add_up(tmp_path):
    network = network_of("small", kept=KEPT)
    _, report = round_trip(network, tmp_path / "model.huff", model="small")
    sections = {name: data.nbytes for name, data in load_file(tmp_path / "model.huff").items()}
    assert set(sections) == set(SECTIONS)
    assert sections["payload"] == sum(layer.payload_bytes for layer in report.layers)
    assert sections["payload"] + sections["codebooks"] + sections["code_lengths"] == report.total.coded_bytes
    assert sections["uncoded"] == report.uncoded_bytes
    assert report.total.coded_bytes + report.uncoded_bytes + report.overhead_bytes == report.file_bytes
    dense = TEST_MODELS["small"](num_classes=4).state_dict()
    assert report.total.original_bytes == sum(tensor.nbytes for tensor in dense.values() if tensor.dim() > 1)


def test_a_layer_without_filters_is_in_the_table(tmp_path):
    _, report = round_trip(network_of("small", kept=KEPT), tmp_path / "model.huff", model="small")
    gone = next(layer for layer in report.layers if layer.name == "stage_2.0.conv_b.weight")
    assert (gone.original_bytes, gone.stored_weights, gone.coded_bytes) == (4 * 32 * 32 * 9, 0, 0)
    assert any(line.startswith(gone.name) for line in report.lines())


def test_the_same_network_gives_the_same_file(tmp_path):
    for name in ("a", "b"):
        save_archive(tmp_path / name, network_of("tiny"), model="tiny", num_classes=4)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_resnet56_at_5_bits_is_13_times_smaller(tmp_path):
    torch.manual_seed(0)
    dense = build_model("resnet56", num_classes=10)
    torch.save(dense.state_dict(), tmp_path / "dense.pt")
    kept = {}
    for name, layer in dense.named_modules():
        if isinstance(layer, nn.Conv2d):
            filters = sorted(np.random.default_rng(0).permutation(layer.out_channels)[: round(0.6 * layer.out_channels)].tolist())
            kept |= {name: filters, name.replace("conv_1_3x3", "bn_1").replace("conv_", "bn_"): filters}
    network = narrow(dense, kept)
    share_weights(network, layer_bits(network, mode="all-quan", bits=["5"]))
    _, report = round_trip(bake_weights(network), tmp_path / "model.huff", model="resnet56", num_classes=10)
    assert (tmp_path / "dense.pt").stat().st_size >= 13 * report.file_bytes
    assert report.overhead_bytes < 0.02 * report.file_bytes


def test_differing_tensors_sees_every_bit():
    first, second, third = network_of("tiny"), network_of("tiny"), network_of("tiny").half()
    assert differing_tensors(first, second) == []
    with torch.no_grad():
        first.bn.bias[0], second.bn.bias[0] = 0.0, -0.0
    assert differing_tensors(first, second) == ["bn.bias"]
    assert "fc.bias" in differing_tensors(first, third)
    assert differing_tensors(first, nn.Sequential()) == list(first.state_dict())


def test_archives_are_told_from_checkpoints(tmp_path):
    network = network_of("tiny")
    save_archive(tmp_path / "model.huff", network, model="tiny", num_classes=4)
    torch.save(network.state_dict(), tmp_path / "new.pt")
    torch.save(network.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert [is_archive(tmp_path / name) for name in ("model.huff", "new.pt", "old.pt")] == [True, False, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda network: share_weights(network, {"fc": 2}), "fc.weight is absent, expected"),
        (lambda network: setattr(network, "fc", nn.Linear(8, 5)), r"fc.weight is \(5, 8\), expected \(4, 8\)"),
        (lambda network: network.register_buffer("extra", torch.ones(1)), r"extra is \(1,\), expected absent"),
        (
            lambda network: setattr(network.bn, "bias", nn.Parameter(torch.ones(8, dtype=torch.complex64))),
            "bn.bias as torch.complex64",
        ),
        (lambda network: setattr(network.bn, "num_batches_tracked", torch.zeros(())), "num_batches_tracked as"),
    ],
)
def test_a_network_that_is_not_the_named_one_is_refused(tmp_path, change, message):
    network = network_of("tiny")
    change(network)
    with pytest.raises(ValueError, match=message):
        save_archive(tmp_path / "model.huff", network, model="tiny", num_classes=4)
    assert not list(tmp_path.iterdir())
