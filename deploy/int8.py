"""ONNX in eight bits: weights int8 by channel, of 7 bits for any processor, activations uint8, as pairs of operations (QDQ).

The pairs are QuantizeLinear and DequantizeLinear; onnxruntime's own tools write it (`onnxruntime.quantization`), and
onnxruntime, OpenVINO and other runtimes compute it in
integers. What is rounded is what `models.int8` rounds.
"""

import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from deploy.onnx import INPUT, to_onnx, with_metadata
from models.int8 import Bounds, Int8Network
from models.narrow import NarrowNetwork
from utils.errors import UserError
from utils.modes import evaluating

OPERATIONS = ("Conv", "Gemm", "MatMul", "Add", "Relu")  # those whose inputs are rounded; a ReLU becomes part of the rounding
FLOAT_RESULTS = ["Gemm", "MatMul"]  # logits, and sums that are rounded where they are read


def to_int8_onnx(
    network: NarrowNetwork | Int8Network, images: Tensor, calibration: Iterable[Tensor], *, weight_bits: int = 7
) -> bytes:
    """The file of `network` in eight bits, for any number of images; `images` are those of `to_onnx`.

    The bounds of activations are those of an `Int8Network`, or else the lowest and highest value that the batches of
    `calibration` show. Weights of 7 bits are right on every processor, those of 8 where two products of uint8 and int8 are
    not added in 16 bits: with VNNI on x86.

    Raises UserError where packages are missing, and where nothing of the network can be rounded.
    """
    quantization = _quantization()
    is_simulated = isinstance(network, Int8Network)
    simulated = network if is_simulated else Int8Network(network)
    with evaluating(simulated):
        plain, names = simulated.plain()
    tensors = {name: f"rounded_{number}" for number, name in enumerate(names)}
    content = to_onnx(plain, images, inner=list(tensors.values()))
    bounds = dict(zip(simulated.names, simulated.bounds, strict=True)) if is_simulated else {}
    overrides = {tensors.get(name, INPUT): [_override(own, quantization)] for name, own in bounds.items()}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        source.write_bytes(content)
        quantization.quantize_static(
            source,
            target,
            _Reader(calibration),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(OPERATIONS),
            per_channel=True,
            reduce_range=weight_bits < 8,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"OpTypesToExcludeOutputQuantization": FLOAT_RESULTS, "TensorQuantOverrides": overrides},
        )
        return with_metadata(target.read_bytes(), {})


def _quantization() -> Any:
    try:
        from onnxruntime import quantization
    except ImportError as error:
        raise UserError("int8 needs more packages, pip install -r requirements-export.txt") from error
    return quantization


def _override(bounds: Bounds, quantization: Any) -> dict[str, Any]:
    scale, zero = bounds.scale_and_zero()
    return {
        "quant_type": quantization.QuantType.QUInt8,
        "scale": np.array(float(scale), np.float32),
        "zero_point": np.array(int(zero), np.uint8),
    }


class _Reader:
    """Batches of images, as onnxruntime's calibration asks for them."""

    def __init__(self, batches: Iterable[Tensor]):
        self._batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        images = next(self._batches, None)
        return None if images is None else {INPUT: images.cpu().contiguous().numpy()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice that the tools log: what they ask for is done already."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
