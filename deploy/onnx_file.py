"""ONNX files that this repository wrote, read back: what runs them, and what their metadata say."""

import json
import os
from dataclasses import dataclass

from deploy.onnx import PRODUCER
from deploy.runtimes import Runner, inference_session, session_runner
from utils.errors import UserError, naming, shown
from utils.files import open_regular
from utils.images.spec import FIELDS, ImageSpec, read_image_spec

SUFFIX = ".onnx"


@dataclass(frozen=True)
class OnnxFile:
    """`run` gives the logits (N, classes) of images (N, 3, H, W)."""

    run: Runner
    model: str
    images: ImageSpec


def read_onnx(path: str | os.PathLike, *, flag: str) -> OnnxFile:
    """Opens an ONNX file that export.py wrote, in onnxruntime. Raises UserError for any other file."""
    origin = f"{flag} {path}"
    try:
        with open_regular(path) as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"{origin}: cannot be read: {error.strerror or error}") from error
    try:
        session = inference_session(content)
    except UserError:
        raise
    except Exception as error:  # onnxruntime has an exception for each of its states
        raise UserError(f"{origin}: is no ONNX file that onnxruntime runs ({shown(str(error), 100)})") from error
    about = session.get_modelmeta()
    classes = session.get_outputs()[0].shape[-1:]
    if about.producer_name != PRODUCER or len(classes) != 1 or not isinstance(classes[0], int):
        raise UserError(f"{origin}: was not written by export.py, so it does not say how its images must look")
    with naming(origin):
        images = read_image_spec(_fields(about.custom_metadata_map), num_classes=classes[0])
    if images is None:
        raise UserError(f"{origin}: does not say how its images must look, export it again")
    return OnnxFile(session_runner(session), str(_fields(about.custom_metadata_map, "model").get("model", "")), images)


def _fields(metadata: dict[str, str], *names: str) -> dict[str, object]:
    found = {}
    for name in names or FIELDS:
        if name in metadata:
            try:
                found[name] = json.loads(metadata[name])
            except (ValueError, RecursionError) as error:
                raise UserError(f"its {name} is no JSON: {shown(metadata[name], 60)}") from error
    return found
