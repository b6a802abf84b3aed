"""ONNX files that this repository wrote, read back: what runs them, and what their metadata say.

Anybody may have written such a file, and onnxruntime would do whatever its graph says: loop without an end, take any memory,
read other files. So only graphs of the operations that `export.py` writes are taken (`deploy.onnx_operations`), in a process
of their own whose memory and time are bounded (`deploy.onnx_process`), and what comes back is checked.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deploy import onnx_process
from deploy.onnx import PRODUCER
from deploy.runtimes import Runner
from utils.errors import UserError, naming, printable, shown
from utils.images.spec import FIELDS, GREY_BITS_FIELD, ImageSpec, read_image_spec
from utils.untrusted import read_whole

MAX_BYTES = 2 << 30  # of a protobuf message
SECONDS = 120.0  # for opening the file, and for the logits of PIXELS
PIXELS = 16 * 224 * 224  # of images that are given at a time
MEMORY_BYTES, MEMORY_OF_THREAD, MEMORY_OF_FILE = 2 << 30, 16 << 20, 4  # for activations, stacks, and copies of the weights
SHOWN_REASON = 160


@dataclass(frozen=True)
class OnnxFile:
    """`run` gives the logits (N, classes) of images (N, 3, H, W)."""

    run: Runner
    model: str
    images: ImageSpec


def read_onnx(path: str | os.PathLike, *, flag: str, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> OnnxFile:
    """Opens an ONNX file that export.py wrote. Raises UserError, in one line, for any other file.

    So does `run`, also where the network takes more than `seconds` for some images or more than `memory_bytes`, or gives what
    are no logits.
    """
    origin = f"{flag} {path}"
    with naming(origin):
        try:
            content = read_whole(path, limit=MAX_BYTES)
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror or error}") from error
        process = _Process(content, seconds=seconds, memory_bytes=memory_bytes)
        about = process.about
        if about.get("producer") != PRODUCER or not about.get("classes"):
            raise UserError("was not written by export.py, so it does not say how its images must look")
        images = read_image_spec(_fields(about["metadata"]), num_classes=about["classes"])
        if images is None:
            raise UserError("does not say how its images must look, export it again")
        model = str(_fields(about["metadata"], "model").get("model", ""))

    def run(batch: Tensor) -> Tensor:
        with naming(origin):
            return torch.cat([process.logits(part, about["classes"]) for part in _parts(batch)])

    return OnnxFile(run, model, images)


def _fields(metadata: dict[str, str], *names: str) -> dict[str, object]:
    found = {}
    for name in names or (*FIELDS, GREY_BITS_FIELD):
        if name in metadata:
            try:
                found[name] = json.loads(metadata[name])
            except (ValueError, RecursionError) as error:
                raise UserError(f"its {name} is no JSON: {shown(metadata[name], 60)}") from error
    return found


def _parts(batch: Tensor) -> tuple[Tensor, ...]:
    return batch.split(max(1, PIXELS // (batch.shape[2] * batch.shape[3])))


class _Process:
    """`deploy.onnx_process` with a file in it; `about` is what that says. It ends with this object."""

    def __init__(self, content: bytes, *, seconds: float, memory_bytes: int):
        threads = torch.get_num_threads()
        memory_bytes += threads * MEMORY_OF_THREAD + MEMORY_OF_FILE * len(content)
        paths = [os.path.abspath(path) for path in sys.path]
        self._seconds = seconds
        self._process = subprocess.Popen(
            [sys.executable, "-m", onnx_process.__name__, str(threads), str(memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # which would show names of the graph as they are
            cwd=os.sep,  # not the caller's folder, where other files lie
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "MALLOC_ARENA_MAX": "2"},
        )
        weakref.finalize(self, _end, self._process)
        self.about = self._ask(content, limit=0)[0]

    def logits(self, images: Tensor, classes: int) -> Tensor:
        """(n, classes) of images (n, 3, H, W)."""
        pixels = memoryview(images.float().contiguous().numpy()).cast("B")
        expected = [len(images), classes]
        answer, content = self._ask(pixels, limit=4 * len(images) * classes, shape=list(images.shape))
        if answer.get("shape") != expected or len(content) != 4 * len(images) * classes:
            raise UserError(
                f"gives logits of shape {shown(answer.get('shape'), 60)} for {len(images)} images, expected {expected}"
            )
        logits = torch.frombuffer(bytearray(content), dtype=torch.float32).view(expected)
        if not logits.isfinite().all():
            raise UserError("gives logits that are NaN or infinite")
        return logits

    def _ask(self, payload: bytes | memoryview, *, limit: int, **fields: Any) -> tuple[dict[str, Any], bytes]:
        late = threading.Event()
        timer = threading.Timer(self._seconds, _kill, (self._process, late))
        timer.daemon = True
        timer.start()
        try:
            onnx_process.send(self._process.stdin, payload, **fields)
            answer, content = onnx_process.receive(self._process.stdout, limit=limit)
        except (OSError, EOFError, ValueError) as error:
            reason = f"takes longer than {self._seconds:g} s" if late.is_set() else "ends the process that runs it"
            raise UserError(f"{reason}: no network that export.py wrote does that") from error
        finally:
            timer.cancel()
        if "error" in answer:
            raise UserError(printable(str(answer["error"]), SHOWN_REASON))
        return answer, content


def _kill(process: subprocess.Popen, late: threading.Event) -> None:
    late.set()
    process.kill()


def _end(process: subprocess.Popen) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            pipe.close()
    process.wait()
