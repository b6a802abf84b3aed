"""A network as ONNX: a file that other programs run, for any number of images."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deploy.onnx_operations import problems
from models.narrow import NarrowNetwork
from utils.errors import UserError, printable, shown

PRODUCER = "filter-pruning-self-distillation"
INPUT, LOGITS = "x", "logits"


def to_onnx(network: nn.Module, images: Tensor, *, metadata: Mapping[str, str] | None = None, inner: Sequence[str] = ()) -> bytes:
    """The file of `network`, in evaluation, traced with `images` (two or more, C, H, W); `metadata` becomes `metadata_props`.

    With `inner` the network gives so many tensors behind its logits: the file gives its logits alone, and has these
    tensors under these names. Raises UserError where the packages are missing that this needs, and for an operation that no
    opset of this version of torch has.
    """
    try:
        import onnxscript  # noqa: F401, torch.onnx needs it
    except ImportError as error:
        raise UserError("ONNX needs more packages, pip install -r requirements-export.txt") from error
    bare = network.bare() if isinstance(network, NarrowNetwork) else network
    names = {"input_names": [INPUT], "output_names": [LOGITS, *inner]}
    try:
        program = torch.onnx.export(bare, (images,), **names, dynamic_shapes=(any_batch(),), dynamo=True, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        reason = next((line.strip() for line in reversed(str(error.__cause__ or error).splitlines()) if line.strip()), "")
        raise UserError(f"the network cannot be written as ONNX: {shown(reason, 160)}") from error
    model = program.model_proto
    del model.graph.output[1:]
    for node in model.graph.node:  # where in the Python code it comes from, longer than the node itself
        del node.metadata_props[:]
    for value in model.graph.value_info:
        del value.metadata_props[:]
    return described(model, metadata or {}).SerializeToString()


def described(model: Any, metadata: Mapping[str, str]) -> Any:
    """The onnx.ModelProto `model`, in place, as this project's, with `metadata` for its users."""
    model.producer_name = PRODUCER
    del model.metadata_props[:]
    for name, value in metadata.items():
        model.metadata_props.add(key=name, value=value)
    return model


def with_metadata(content: bytes, metadata: Mapping[str, str]) -> bytes:
    """The file `content` with other metadata."""
    import onnx

    return described(onnx.load_from_string(content), metadata).SerializeToString()


def unread_parts(content: bytes) -> str:
    """What keeps predict.py from running the file `content`, such as an operation of its own; empty where nothing does."""
    import onnx

    return printable(next(problems(onnx.load_from_string(content)), ""))


def any_batch() -> dict[int, torch.export.Dim]:
    return {0: torch.export.Dim("batch", min=1)}
