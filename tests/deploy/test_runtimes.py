"""Every runtime computes the network, and one that is missing is named with what installs it."""

import sys
from unittest import mock

import pytest
import torch
from selections import hard_pruning, prunable_layers

from deploy.onnx import to_onnx
from deploy.runtimes import RUNTIMES, median_seconds, onnxruntime_session, openvino_session
from models import build_model
from prune.compact import compact
from prune.masks import choose_filters, keep_ratios
from utils.errors import UserError

PACKAGES = {"torch": "torch", "onnxruntime": "onnxruntime", "openvino": "openvino"}


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    network = build_model("resnet8", num_classes=10).eval()
    layers = prunable_layers(network)
    hard_pruning(network, choose_filters(layers, keep_ratios(layers, [0.5]), criterion="filter-a"))
    return compact(network, torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_logits_are_those_of_the_network(runtime, small):
    pytest.importorskip(PACKAGES[runtime])
    run = RUNTIMES[runtime](small, torch.randn(2, 3, 32, 32))
    for size in (1, 5):
        images = torch.randn(size, 3, 32, 32)
        with torch.no_grad():
            expected = small(images)
        torch.testing.assert_close(run(images), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("onnxscript", lambda: to_onnx(torch.nn.ReLU(), torch.ones(2, 3))),
        ("onnxruntime", lambda: onnxruntime_session(b"")),
        ("openvino", lambda: openvino_session(b"")),
    ],
)
def test_a_missing_package_is_named_with_what_installs_it(package, use):
    with mock.patch.dict(sys.modules, {package: None}), pytest.raises(UserError, match="pip install"):
        use()


def test_times_are_medians_of_each_runner():
    calls = []
    runners = {name: (lambda images, name=name: calls.append(name)) for name in ("a", "b")}
    seconds = median_seconds(runners, torch.ones(1, 3, 4, 4), rounds=3)
    assert seconds.keys() == {"a", "b"} and all(0 <= value < 1 for value in seconds.values())
    assert calls == ["a", "a", "b", "b"] * 4  # in turn, each woken first, after a round that does not count


def test_an_operation_that_onnx_has_not_is_one_line():
    pytest.importorskip("onnxscript")

    class Bessel(torch.nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x).flatten(1)

    with pytest.raises(UserError, match=r"cannot be written as ONNX: .*bessel_j0") as raised:
        to_onnx(Bessel().eval(), torch.ones(2, 3, 4, 4))
    assert "\n" not in str(raised.value)
