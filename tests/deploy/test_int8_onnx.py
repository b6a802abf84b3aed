"""ONNX in eight bits: integers in the file, computed as it was simulated, in every runtime that is installed."""

import importlib.util

import pytest
import torch
from int8_networks import simulated, small_resnet
from selections import narrow
from torch import nn

from deploy.int8 import to_int8_onnx
from deploy.onnx import PRODUCER, to_onnx
from deploy.runtimes import SESSIONS

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SOME = [1, 2, 5, 9]
FEW = {"stage_1__0__conv_b": SOME, "stage_1__0__bn_b": SOME, "conv_1_3x3": SOME[1:], "bn_1": SOME[1:]}
ALL = {  # different channels on both sides of every sum
    f"stage_{stage}__{block}__{layer}": list(range(block % 3, 8 << stage, 2 + (layer[-1] == "a")))
    for stage in (1, 2, 3)
    for block in (0,)
    for layer in ("conv_a", "bn_a", "conv_b", "bn_b")
}
KEPT = [{}, FEW, ALL]


def largest_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max() / second.abs().max())


@pytest.mark.parametrize("kept", KEPT, ids=["dense", "few", "all"])
@pytest.mark.parametrize("runtime", SESSIONS)
def test_what_runs_is_what_was_simulated(kept, runtime):
    if importlib.util.find_spec(runtime) is None:
        pytest.skip(f"{runtime} is not installed")
    images = torch.randn(16, 3, 32, 32)
    network = small_resnet(**kept)
    own = simulated(network, images, weight_bits=7)
    content = to_int8_onnx(own, images, [images])
    found = SESSIONS[runtime](content)(images)
    with torch.no_grad():
        expected, exact = own(images), network(images)
    assert largest_difference(found, expected) < 2 * largest_difference(expected, exact) < 0.2
    assert SESSIONS[runtime](content)(images[:1]).shape == (1, 10)


class Shallow(nn.Module):
    """A convolution with its norm, a residual sum, and a linear layer: few values of which one could lie half way."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        return self.head((x + self.second(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("bits", [7, 8])
def test_onnxruntime_gives_the_very_numbers(bits):
    torch.manual_seed(5)
    images = torch.randn(64, 3, 8, 8)
    own = simulated(narrow(Shallow(), {}), images, weight_bits=bits)
    found = SESSIONS["onnxruntime"](to_int8_onnx(own, images, [images], weight_bits=bits))(images)
    with torch.no_grad():
        same = torch.isclose(found, own(images), rtol=1e-4, atol=1e-5).all(1)
    assert same.float().mean() > 0.9


def test_weights_are_int8_by_channel_and_activations_uint8():
    images = torch.randn(8, 3, 32, 32)
    own = simulated(small_resnet(), images)
    model = onnx.load_from_string(to_int8_onnx(own, images, [images]))
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = {name: values for name, values in tensors.items() if values.ndim >= 2}
    assert len(weights) == 8 and {str(values.dtype) for values in weights.values()} == {"int8"}
    for name in weights:
        scales = tensors[name.replace("_quantized", "_scale")]
        assert scales.shape == (len(weights[name]),)
    rounding = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert {str(tensors[node.input[2]].dtype) for node in rounding} == {"uint8"}
    assert sorted(float(tensors[node.input[1]]) for node in rounding) == pytest.approx(
        sorted(float(bounds.scale_and_zero()[0]) for bounds in own.bounds)
    )
    assert not [node for node in model.graph.node if node.op_type in ("Relu", "BatchNormalization")]
    assert (model.producer_name, len(model.graph.output)) == (PRODUCER, 1)


def test_bounds_are_measured_where_a_network_has_none():
    images = torch.randn(16, 3, 32, 32)
    network = small_resnet()
    content = to_int8_onnx(network, images, images.split(4))
    found = SESSIONS["onnxruntime"](content)(images)
    with torch.no_grad():
        assert largest_difference(found, network(images)) < 0.1
    assert len(content) < 0.35 * len(to_onnx(network, images))


def test_weights_of_seven_bits_are_right_in_a_default_session():
    """As large as they can be, where pairs of products would overflow 16 bits if the weights had eight."""
    import onnxruntime

    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Flatten(), nn.LazyLinear(4)).eval()
    network(torch.zeros(1, 16, 4, 4))
    network[0].weight.data.fill_(0.5)
    images = torch.rand(8, 16, 4, 4) / 4 + 0.75
    content = to_int8_onnx(narrow(network, {}, example=images), images, [images])
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"x": images.numpy()})[0])
    with torch.no_grad():
        assert largest_difference(found, network(images)) < 0.03
    model = onnx.load_from_string(content)
    weights = [onnx.numpy_helper.to_array(each) for each in model.graph.initializer if each.data_type == onnx.TensorProto.INT8]
    assert max(abs(values.astype(int)).max() for values in weights) == 64
