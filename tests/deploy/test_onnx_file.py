"""ONNX files of strangers: only what export.py writes is run, apart from this process, and within bounds."""

import random
import time

import pytest
import torch
from torch import nn

from deploy.exporters import Provenance
from deploy.onnx import to_onnx
from utils.errors import UserError
from utils.images.spec import ImageSpec

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from deploy.onnx_file import read_onnx  # noqa: E402, not without the packages

IMAGES = ImageSpec(("cat", "dog", "猫"), (8, 8), (0.5,) * 3, (0.25,) * 3)
SECONDS, MEMORY_BYTES = 30.0, 512 << 20
TWO_IMAGES = torch.ones(2, 3, 8, 8)
ESCAPE = "\x1b]0;owned\x07"


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()


@pytest.fixture(scope="module")
def content(network):
    origin = Provenance("tiny", IMAGES, "a-run", "folder", 50.0)
    return to_onnx(network, torch.randn(2, 3, 8, 8), metadata=origin.metadata())


@pytest.fixture
def answer(tmp_path):
    """Writes a file and gives its logits of some images."""

    def answer(content, *, images=TWO_IMAGES, seconds=SECONDS, memory_bytes=MEMORY_BYTES):
        (tmp_path / "a.onnx").write_bytes(content)
        return read_onnx(tmp_path / "a.onnx", flag="--load-path", seconds=seconds, memory_bytes=memory_bytes).run(images)

    return answer


def test_logits_are_those_of_the_network(network, content, answer):
    images = torch.randn(37, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(answer(content, images=images), network(images))


def test_parts_of_a_batch_come_back_in_order(network, content, answer, monkeypatch):
    monkeypatch.setattr("deploy.onnx_file.PIXELS", 3 * 64)
    images = torch.randn(10, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(answer(content, images=images), network(images))


# ---- forged graphs -----------------------------------------------------------------------------------------------------


def loop_without_end(model):
    """A Loop of 2**62 turns that do nothing, beside the network."""
    body = onnx.parser.parse_graph("body (int64 turn, bool on) => (bool on_again) { on_again = Identity (on) }")
    count = onnx.helper.make_tensor("turns", onnx.TensorProto.INT64, [], [2**62])
    on = onnx.helper.make_tensor("on", onnx.TensorProto.BOOL, [], [True])
    model.graph.initializer.extend([count, on])
    model.graph.node.insert(0, onnx.helper.make_node("Loop", ["turns", "on"], [], name=ESCAPE, body=body))


def other_domain(model):
    model.graph.node[0].domain = "com.example" + ESCAPE


def unknown_operation(model):
    model.graph.node[0].op_type = ESCAPE


def function(model):
    model.functions.append(onnx.FunctionProto(name="Conv", domain="com.example"))


def data_elsewhere(model):
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="passwd" + ESCAPE)


def data_elsewhere_in_an_attribute(model):
    tensor = onnx.TensorProto(data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["c"], value=tensor))


def _with_tensor_of(model, side):
    """A tensor of `side` x `side` x 1,024 numbers out of nothing, whose mean is added to the logits."""
    shape = onnx.helper.make_tensor("shape", onnx.TensorProto.INT64, [3], [side, side, 1024])
    model.graph.initializer.append(shape)
    last = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["before" if name == last else name for name in node.output]
    make = onnx.helper.make_node
    model.graph.node.extend(
        [
            make("ConstantOfShape", ["shape"], ["huge"]),
            make("Exp", ["huge"], ["larger"]),
            make("ReduceMean", ["larger"], ["one"], keepdims=0),
            make("Add", ["before", "one"], [last]),
        ]
    )


def memory_out_of_nothing(model):
    _with_tensor_of(model, 1024)


def no_memory_has_room(model):
    _with_tensor_of(model, 1 << 20)


def nan(model):
    tensor = next(each for each in model.graph.initializer if len(each.dims) == 4)
    tensor.raw_data = b"\xff" * len(tensor.raw_data)


def another_shape(model):
    """The logits of all images in one row: as many numbers, otherwise laid out."""
    last = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["before" if name == last else name for name in node.output]
    model.graph.initializer.append(onnx.helper.make_tensor("row", onnx.TensorProto.INT64, [2], [1, -1]))
    model.graph.node.append(onnx.helper.make_node("Reshape", ["before", "row"], [last]))


def two_outputs(model):
    model.graph.output.append(model.graph.output[0])


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (loop_without_end, "was not written by export.py: it has the operation Loop"),
        (other_domain, r"was not written by export.py: it has the operation com.example\\x1b"),
        (unknown_operation, r"was not written by export.py: it has the operation \\x1b"),
        (function, "was not written by export.py: it has functions of its own"),
        (data_elsewhere, "was not written by export.py: it has a tensor whose data lie in another file"),
        (data_elsewhere_in_an_attribute, "was not written by export.py: it has a tensor whose data lie in another file"),
        (memory_out_of_nothing, "onnxruntime runs|memory|ends the process"),
        (no_memory_has_room, "onnxruntime runs|memory|ends the process"),
        (nan, "gives logits that are NaN or infinite"),
        (another_shape, r"gives logits of shape \[1, 6\] for 2 images, expected \[2, 3\]"),
        (two_outputs, "was not written by export.py: it has other inputs and outputs"),
    ],
)
def test_what_no_export_has_is_refused_in_one_line(forge, message, content, answer):
    model = onnx.load_from_string(content)
    forge(model)
    with pytest.raises(UserError, match=message) as caught:
        answer(model.SerializeToString())
    line = str(caught.value)
    assert line.startswith("--load-path ") and line.isprintable() and len(line) < 500


def test_a_network_that_never_ends_is_stopped(content, answer):
    """Two thousand averages over large windows, from a file of a few kilobytes."""
    model = onnx.load_from_string(content)
    make = onnx.helper.make_node
    first = model.graph.input[0].name
    model.graph.initializer.append(onnx.helper.make_tensor("wide", onnx.TensorProto.INT64, [4], [1, 1, 400, 400]))
    nodes, name = [make("Tile", [first, "wide"], ["tiled"])], "tiled"
    for turn in range(2000):
        nodes.append(make("AveragePool", [name], [f"pooled{turn}"], kernel_shape=[31, 31], pads=[15] * 4))
        name = f"pooled{turn}"
    last = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["before" if own == last else own for own in node.output]
    nodes += [make("ReduceMean", [name], ["one"], keepdims=0), make("Add", ["before", "one"], [last])]
    model.graph.node.extend(nodes)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"takes longer than 3 s: no network that export\.py wrote does that"):
        answer(model.SerializeToString(), images=torch.ones(1, 3, 8, 8), seconds=3.0, memory_bytes=4 << 30)
    assert time.monotonic() - start < SECONDS


def damaged(data, choose):
    """With a few bits flipped, the end cut off, or bytes written over."""
    data = bytearray(data)
    for _ in range(choose.choice((1, 8))):
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    kind, position = choose.randrange(3), choose.randrange(len(data))
    if kind == 0:
        del data[position:]
    elif kind == 1:
        data[position : position + 4] = choose.choice((b"\xff\xff\xff\x7f", b"\0\0\0\0", b"1e99", b"[[[["))
    return bytes(data)


def test_damaged_files_are_one_line_or_give_logits(content, answer):
    choose, refused = random.Random(0), 0
    for _ in range(12):
        try:
            assert answer(damaged(content, choose)).isfinite().all()
        except UserError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 600
    assert refused > 3
