"""A network as ONNX: a file that other programs run, for any number of images."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.narrow import NarrowNetwork
from utils.errors import UserError


def to_onnx(network: nn.Module, images: Tensor, *, metadata: Mapping[str, str] | None = None) -> bytes:
    """The file of `network`, in evaluation, traced with `images` (two or more, C, H, W); `metadata` becomes `metadata_props`.

    Raises UserError where the packages are missing that this needs.
    """
    try:
        import onnxscript  # noqa: F401, torch.onnx needs it
    except ImportError as error:
        raise UserError("ONNX needs more packages, pip install -r requirements-export.txt") from error
    bare = network.bare() if isinstance(network, NarrowNetwork) else network
    program = torch.onnx.export(bare, (images,), dynamic_shapes=(any_batch(),), dynamo=True, verbose=False)
    model = program.model_proto
    for name, value in (metadata or {}).items():
        model.metadata_props.add(key=name, value=value)
    return model.SerializeToString()


def any_batch() -> dict[int, torch.export.Dim]:
    return {0: torch.export.Dim("batch", min=1)}
