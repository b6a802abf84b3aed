"""A damaged or forged archive is refused in one line, in little time and memory, and never read as another network."""

import os
import random
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from archives import IMAGES, KEPT, TEST_MODELS, edited, network_of, rehashed
from bounded import run_bounded
from safetensors.numpy import load, save

from benchmarks.forged_archives import DAMAGES, FOUR_BYTES, damage
from models import MODELS
from quantize.archive import differing_tensors, load_archive, save_archive
from quantize.compression import Compressor
from utils.errors import UserError
from utils.files import is_archive


@pytest.fixture(scope="module", autouse=True)
def _test_models():
    with pytest.MonkeyPatch.context() as patch:
        for name, build in TEST_MODELS.items():
            patch.setitem(MODELS, name, build)
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The bytes of an archive, and its network."""
    path = tmp_path_factory.mktemp("tiny") / "model.huff"
    return archive_bytes(network_of("tiny"), path, model="tiny", images=IMAGES)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return archive_bytes(network_of("small", kept=KEPT), tmp_path_factory.mktemp("small") / "model.huff", model="small")


@pytest.fixture(scope="module")
def levels(tmp_path_factory):
    """An archive of the second codec."""
    batch = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    compressed = Compressor(network_of("tiny"), [batch]).compress(0.01)
    path = tmp_path_factory.mktemp("levels") / "model.huff"
    return archive_bytes(compressed.network, path, model="tiny", weights=compressed.weights)


def archive_bytes(network, path, *, model, images=None, weights=None):
    save_archive(path, network, model=model, num_classes=4, images=images, weights=weights)
    return path.read_bytes(), network


def mutated(data, choose):
    """The bytes with bits flipped, some cut off, put in, or taken out, a number made huge, or the header edited."""
    data = bytearray(data)
    header_end = 8 + int.from_bytes(data[:8], "little")
    position = choose.randrange(len(data))
    kind = choose.randrange(7)
    if kind < DAMAGES:
        damage(data, choose, kind=kind, position=position)
    elif kind == 4:  # a byte of the header
        data[choose.randrange(header_end)] = choose.choice(b'0123456789{}[]",:\\ -etfn\0\xff')
    elif kind == 5:  # a number of the header
        digits = [index for index in range(8, header_end) if chr(data[index]).isdigit()]
        start = choose.choice(digits)
        data[start : start + 1] = choose.choice((b"99999999999999999999", b"4294967296", b"-1", b"0", b"1e9"))
    else:  # four bytes of the body, where the counts of the layer table are among others
        start = choose.randrange(header_end, len(data) - 4)
        data[start : start + 4] = choose.choice(FOUR_BYTES)
    return bytes(data)


def outcome(data, path):
    """The network that a file of these bytes is read as, or None where it is refused in one line."""
    path.write_bytes(data)
    try:
        return load_archive(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error) and len(str(error)) < 600
        return None


def test_three_thousand_mutations_are_refused(tiny, small, levels, tmp_path):
    choose = random.Random(0)
    tracemalloc.start()
    for number in range(3000):
        data, _ = (tiny, small, levels)[number % 3]
        mutation = mutated(data, choose)
        assert mutation == data or outcome(mutation, tmp_path / "model.huff") is None, number
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * len(small[0]) + 2**20


@pytest.mark.parametrize(("name", "count"), [("tiny", 1000), ("small", 60), ("levels", 500)])
def test_forged_archives_are_refused_or_hold_a_network_of_the_right_shapes(name, count, request, tmp_path):
    data, network = request.getfixturevalue(name)
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    choose = random.Random(1)
    refused = 0
    for _ in range(count):
        decoded = outcome(rehashed(mutated(data, choose)), tmp_path / "model.huff")
        refused += decoded is None
        if decoded is not None and getattr(decoded, "kept", {}) == getattr(network, "kept", {}):
            assert {key: value.shape for key, value in decoded.state_dict().items()} == shapes
    assert 0.5 * count < refused < count  # some forgeries are valid archives of other values


def test_every_single_bit_of_the_header_counts(tiny, tmp_path):
    data, _ = tiny
    for position in range(0, 8 * (8 + int.from_bytes(data[:8], "little")), 7):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        assert outcome(bytes(flipped), tmp_path / "model.huff") is None


def test_forging_by_the_helper_is_otherwise_faithful(tiny, tmp_path):
    data, network = tiny
    (tmp_path / "model.huff").write_bytes(edited(data))
    assert differing_tensors(network, load_archive(tmp_path / "model.huff")) == []


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"format": 4}, "has format 4, newer than format 3"),
        ({"format": 3}, "holds the sections"),
        ({"format": 1}, "its description names"),
        ({"format": 0}, "its format is 0"),
        ({"format": "1"}, "its format is '1'"),
        ({"format": True}, "its format is True"),
        ({"format": None}, "its format is None"),
        ({"model": "resnet57"}, "network 'resnet57': the nearest are resnet"),
        ({"model": ["tiny"]}, "network"),
        ({"model": "small"}, "section 'kept'"),
        ({"num_classes": 10**15}, "has 1000000000000000 classes, at most 1,048,576 are read"),
        ({"num_classes": 10**6}, "classes do not fit"),
        ({"num_classes": 0}, "0 classes"),
        ({"num_classes": -4}, "-4 classes"),
        ({"class_names": ["a"] * 5}, "it names 5 classes, but has 4"),
        ({"class_names": ["a", "b", "c", 4]}, "its class_names is"),
        ({"class_names": ["a", "b", "c", "d" * 2000]}, "its class_names is"),
        ({"class_names": ["a", "b", "c", "\udc80"]}, "its class_names is"),
        ({"image_size": [0, 32]}, r"its image_size is \[0, 32\], expected height and width, 1 to 4096 pixels"),
        ({"image_size": [32, 10**400]}, "its image_size is"),
        ({"image_size": 32}, "its image_size is 32"),
        ({"mean": [0.5, 0.5]}, "its mean is"),
        ({"mean": [0.5, 0.5, float("nan")]}, "its mean is"),
        ({"mean": [124, 116, 104]}, r"its mean is \[124, 116, 104\], expected 3 numbers from 0 to 1"),
        ({"mean": None}, "its description names"),
        ({"std": [1, 1, 0]}, "its std is"),
        ({"std": [1, 1, True]}, "its std is"),
        ({"num_classes": 4.0}, "4.0 classes"),
        ({"num_classes": 5}, "names 4 classes, but has 5"),
        ({"num_classes": 5, "class_names": list("abcde")}, "section 'uncoded'|symbols"),
        ({"dtypes": {"float31": [0]}}, "element types"),
        ({"dtypes": [1]}, "element types"),
        ({"dtypes": {"int32": [0]}}, "element types"),
        ({"dtypes": {"float16": [0, 99]}}, "tensors of type float16"),
        ({"dtypes": {"float16": [-1]}}, "tensors of type float16"),
        ({"dtypes": {"float16": [True]}}, "tensors of type float16"),
        ({"dtypes": {"float16": "0"}}, "tensors of type float16"),
        ({"dtypes": {"float64": [6]}}, "tensors of type float64"),  # num_batches_tracked
        ({"dtypes": {"float64": [0]}}, "section 'codebooks'"),
        ({"extra": 1}, "its description names"),
        ({"sha256": "0" * 63}, "no SHA-256"),
        ({"sha256": 7}, "no SHA-256"),
        ({"sha256": None}, "no SHA-256"),
    ],
)
def test_descriptions_that_are_refused(tiny, tmp_path, description, message):
    refuse(edited(tiny[0], description=description), tmp_path, message)


def refuse(data, tmp_path, message):
    path = tmp_path / "model.huff"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        load_archive(path)
    assert "\n" not in str(error.value)


U8 = np.uint8


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("payload", lambda data: np.append(data, U8(0)), "section 'payload' has 1 bytes more"),
        ("payload", lambda data: data[:-1], "section 'payload' ends early"),
        ("codebooks", lambda data: np.append(data, U8(0)), "section 'codebooks' has 1 bytes more"),
        ("code_lengths", lambda data: np.zeros_like(data), "Huffman|Kraft"),
        ("code_lengths", lambda data: np.append(data, U8(0)), "section 'code_lengths' has 1 bytes more"),
        ("layers", lambda data: np.append(data, data), "section 'layers' has 16 bytes more"),
        ("layers", lambda data: data[:8], "section 'layers' ends early"),
        ("layers", lambda data: np.full_like(data, 255), "section 'codebooks' ends early: 17179869180 bytes expected"),
        ("layers", lambda data: np.zeros_like(data), "section 'uncoded' ends early"),
        ("layers", lambda data: np.array([0, 5, 0, 0], "<u4").view(U8), "without codebook has 5 bytes of payload"),
        ("uncoded", lambda data: np.append(data, U8(0)), "section 'uncoded' has 1 bytes more"),
        ("uncoded", lambda data: data[:-1], "section 'uncoded' ends early"),
        ("kept", lambda data: np.append(data, U8(0)), "section 'kept' has 2 bytes where 1"),
        ("kept", lambda data: data[:0], "section 'kept' has 0 bytes where 1"),
        ("kept", lambda data: data | U8(1), "section 'kept' does not end in zero padding"),
        ("kept", lambda data: data.reshape(1, 1), r"section 'kept' is U8 \[1, 1\]"),
        ("kept", lambda data: data.view(np.int8), "section 'kept' is I8"),
        ("kept", lambda data: None, "holds the sections"),
        ("more", lambda data: np.zeros(1, U8), "holds the sections"),
    ],
)
def test_sections_that_are_refused(tiny, tmp_path, section, change, message):
    data = tiny[0]
    refuse(edited(data, sections={section: change(load(data).get(section))}), tmp_path, message)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("words", lambda data: data[:-2], "damaged"),
        ("words", lambda data: data[:0], "4 classes do not fit"),
        ("words", lambda data: np.append(data, np.zeros(2, U8)), "does not end where it began"),
        ("signs", lambda data: data[:-1], "of signs where"),
        ("roles", lambda data: data[:-1], "section 'roles'"),
        ("roles", lambda data: np.append(data, U8(0)), "section 'roles' does not end"),
        ("roles", lambda data: np.frombuffer(zlib.compress(bytes(1 << 20)), U8), "section 'roles' does not end"),
        ("roles", lambda data: np.frombuffer(zlib.compress(bytes(9)), U8), "does not end where it began"),
        ("roles", lambda data: np.frombuffer(zlib.compress(b"\1" * 9 + bytes(18)), U8), "is said to hold levels"),
        ("uncoded", lambda data: np.append(data, U8(0)), "section 'uncoded' has 1 bytes more"),
        ("signs", lambda data: None, "holds the sections"),
    ],
)
def test_sections_of_levels_that_are_refused(levels, tmp_path, section, change, message):
    data = levels[0]
    refuse(edited(data, sections={section: change(load(data).get(section))}), tmp_path, message)


@pytest.mark.parametrize(
    ("fills", "message"),
    [([], "section 'roles'"), (["a"], "its fills"), ([float("nan")] * 3, "its fills"), ([1e300] * 3, "its fills"),
     (None, "its description names"), ([0.5] * 3, "cannot hold 0.5"), ([0.0] * 17, "its fills")],
)  # fmt: skip
def test_fills_that_are_refused(levels, tmp_path, fills, message):
    refuse(edited(levels[0], description={"fills": fills}), tmp_path, message)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        (2**63).to_bytes(8, "little") + b"{}",
        (1 << 21).to_bytes(8, "little") + b"{" * (1 << 21),
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        (2).to_bytes(8, "little") + b"{}",
        save({"payload": np.zeros(3, U8)}),
        save({"payload": np.zeros(3, U8)}, {"archive": "[]"}),
        save({"payload": np.zeros(3, U8)}, {"archive": "[" * 100_000}),
        save({"payload": np.zeros(3, U8)}, {"archive": '{"format": 1, "format": 1}'}),
        save({"payload": np.zeros(3, U8)}, {"archive": '{"format": ' + "9" * 5000 + "}"}),
    ],
)
def test_other_files_are_refused(data, tmp_path):
    refuse(data, tmp_path, "header cannot be read|no JSON object")


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(ValueError, match=r"none\.huff: cannot be read: No such file"):
        load_archive(tmp_path / "none.huff")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        load_archive(tmp_path)


def test_a_forged_number_of_classes_costs_no_memory(tiny, tmp_path):
    """The honest archive holds a few kilobytes; this one claims as many classes as its bytes of biases allow."""
    classes = load(tiny[0])["uncoded"].nbytes
    forged = {"model": "alexnet", "num_classes": classes, "class_names": [str(number) for number in range(classes)]}
    data = edited(tiny[0], description=forged)
    before = torch.random.get_rng_state()
    tracemalloc.start()
    refuse(data, tmp_path, "section")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    assert torch.equal(torch.random.get_rng_state(), before)


def many_classes(path):
    """The message, and the seconds of this process's own time that it took to refuse the file."""
    start = time.process_time()
    with pytest.raises(UserError) as error:
        load_archive(path)
    return str(error.value), time.process_time() - start


@pytest.mark.parametrize("classes", [16_000_000, 2**20])
def test_an_archive_with_millions_of_classes_is_refused_at_once_and_in_500_megabytes(classes, tmp_path):
    """Its bytes of biases are enough for them, and one of its layers is said to be narrow, so that it is put together anew."""
    data, network = archive_bytes(network_of("small"), tmp_path / "model.huff", model="small")
    layers = np.array([name == "conv_1_3x3" for name, module in network.named_modules() if hasattr(module, "weight")])
    kept = np.packbits(np.concatenate([layers, np.ones(16, bool)]))
    forged = edited(
        data,
        description={"num_classes": classes, "model": "small"},
        sections={"kept": kept, "uncoded": np.zeros(2 * classes, U8)},
    )
    (tmp_path / "model.huff").write_bytes(forged)
    message, seconds = run_bounded(many_classes, tmp_path / "model.huff")
    assert ("has 16000000 classes" if classes > 2**20 else "cannot hold 67108864 symbols") in message
    assert seconds < 10  # well below 1 where the machine does nothing else


def test_a_pipe_and_a_device_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        assert not is_archive(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: is no ordinary file but a {name}"):
            load_archive(tmp_path / name)
