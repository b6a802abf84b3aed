"""A small network as ONNX that computes in int8, beside its float form and the dense network's."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from deploy.comparison import measure_files, table
from deploy.exporters import Provenance, fastest_form, forms_of
from deploy.int8 import to_int8_onnx
from deploy.onnx import to_onnx, with_metadata
from deploy.runtimes import onnxruntime_session
from models.graph import ChannelGraph
from models.int8 import Int8Network
from models.narrow import NarrowNetwork, Selection
from utils.errors import ParameterError
from utils.images.batches import ImageData

SMALL_FLOAT, SMALL_INT8 = "small, float", "small, int8"


def export_int8(
    dense: nn.Module,
    small: NarrowNetwork,
    simulated: Int8Network | None,
    data: ImageData,
    *,
    provenance: Provenance,
    images: int,
    tolerance: float,
    weight_bits: int,
) -> tuple[bytes, str]:
    """The ONNX file of `small` in eight bits, and what to say of it; prints it beside float and dense ones.

    `simulated` is the network as it was trained for int8; without one, so many training `images` show between which bounds
    activations lie. `weight_bits` are those of `to_int8_onnx` and, where there is one, of `simulated`.

    Raises ParameterError where int8 costs more than `tolerance` points of accuracy.
    """
    shown = calibration_images(data, images)
    content, remark = _int8_file(dense, small, simulated, data, shown, weight_bits=weight_bits)
    wide = Selection(ChannelGraph(dense, data.example), {}).shrink()
    files = {
        "dense, float": to_onnx(wide, data.example),
        SMALL_FLOAT: to_onnx(small, data.example),
        "dense, int8": to_int8_onnx(wide, data.example, shown, weight_bits=weight_bits),
        SMALL_INT8: content,
    }
    rows, predictions = measure_files(files, data)
    print(table(rows))
    print(f"int8 takes {len(content) / len(files[SMALL_FLOAT]):.3f} of the bytes of float")
    scores = {(row.runtime, row.name): row.top1 for row in rows}
    _check_cost(scores, tolerance=tolerance)
    if simulated is not None:
        expected = torch.cat([simulated(batch.images).argmax(1) for batch in data.test_batches()])
        same = 100 * float((expected == predictions["onnxruntime", SMALL_INT8]).float().mean())
        print(f"onnxruntime gives the class that was simulated in training to {same:.2f} % of the test images")
    top1 = scores["onnxruntime", SMALL_INT8]
    said = {"precision": "int8", "weight_bits": weight_bits}
    return with_metadata(content, replace(provenance, top1=top1, more={**provenance.more, **said}).metadata()), remark


def _int8_file(
    dense: nn.Module,
    small: NarrowNetwork,
    simulated: Int8Network | None,
    data: ImageData,
    images: list[Tensor],
    *,
    weight_bits: int,
) -> tuple[bytes, str]:
    """As it was simulated, or else in the faster of its forms."""
    if simulated is not None:
        return to_int8_onnx(simulated, data.example, images, weight_bits=weight_bits), ""
    networks = forms_of(dense, small, data.example)
    forms = {name: to_int8_onnx(network, data.example, images, weight_bits=weight_bits) for name, network in networks.items()}
    form, remark = fastest_form({name: onnxruntime_session(content) for name, content in forms.items()}, data.example)
    return forms[form], remark


def _check_cost(scores: dict[tuple[str, str], float], *, tolerance: float) -> None:
    """`scores` holds the accuracy by runtime and name."""
    for runtime in dict.fromkeys(runtime for runtime, _ in scores):
        cost = scores[runtime, SMALL_FLOAT] - scores[runtime, SMALL_INT8]
        if cost > tolerance:
            raise ParameterError(
                "tolerance",
                tolerance,
                f"int8 costs {cost:.2f} points in {runtime}; fine-tune the network with quantize_encode.py --quan-mode int8, "
                "or allow more; nothing was written",
            )


def calibration_images(data: ImageData, count: int) -> list[Tensor]:
    """Batches of so many training images, as training shows them."""
    batches, left = [], count
    for batch in data.train_batches("calibration"):
        batches.append(batch.images[:left])
        left -= len(batches[-1])
        if left == 0:
            break
    return batches
