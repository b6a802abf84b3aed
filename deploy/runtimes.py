"""What runs a network on this machine: PyTorch, onnxruntime or OpenVINO, by one name and one function of images each."""

import os
import statistics
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from deploy.onnx import to_onnx
from deploy.onnx_operations import inference_session
from utils.errors import UserError
from utils.timing import interleaved_seconds

Runner = Callable[[Tensor], Tensor]
ROUNDS = 15


def run_torch(network: nn.Module, images: Tensor) -> Runner:
    def run(batch: Tensor) -> Tensor:
        with torch.inference_mode():
            return network(batch)

    return run


def onnxruntime_session(content: bytes) -> Runner:
    """Runs the ONNX file `content` by onnxruntime on as many threads as PyTorch has. Raises UserError where it is missing."""
    try:
        session = inference_session(content, threads=torch.get_num_threads())
    except ImportError as error:
        raise UserError("onnxruntime is not installed, pip install -r requirements-export.txt") from error
    name = session.get_inputs()[0].name
    return lambda batch: torch.from_numpy(session.run(None, {name: batch.contiguous().numpy()})[0])


def openvino_session(content: bytes) -> Runner:
    """Runs the ONNX file `content` by OpenVINO on as many threads as PyTorch has. Raises UserError where it is missing."""
    os.environ.setdefault("OPENVINO_TELEMETRY", "0")
    try:
        import openvino
    except ImportError as error:
        raise UserError("openvino is not installed, pip install openvino") from error
    core = openvino.Core()
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(content), "CPU", options)
    request = compiled.create_infer_request()

    def run(batch: Tensor) -> Tensor:
        return torch.from_numpy(request.infer([batch.contiguous().numpy()])[compiled.output(0)])

    return run


def run_session(session: Callable[[bytes], Runner], network: nn.Module, images: Tensor) -> Runner:
    return session(to_onnx(network, images))


SESSIONS: dict[str, Callable[[bytes], Runner]] = {"onnxruntime": onnxruntime_session, "openvino": openvino_session}
RUNTIMES: dict[str, Callable[[nn.Module, Tensor], Runner]] = {
    "torch": run_torch,
    **{name: partial(run_session, session) for name, session in SESSIONS.items()},
}


def repeated(images: Tensor, size: int) -> Tensor:
    """(size, C, H, W): the first of the images, so many times, in plain layout."""
    return images[:1].expand(size, -1, -1, -1).contiguous()


def round_seconds(runners: Mapping[str, Runner], images: Tensor, *, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Each runner's times for `images`, in interleaved rounds, each with its own threads awake and no others."""
    functions = {name: (lambda run=run: run(images)) for name, run in runners.items()}
    return interleaved_seconds(functions, device=images.device, rounds=rounds, warmups=1, pausing=True)


def median_seconds(runners: Mapping[str, Runner], images: Tensor, *, rounds: int = ROUNDS) -> dict[str, float]:
    """The medians of `round_seconds`."""
    return {name: statistics.median(times) for name, times in round_seconds(runners, images, rounds=rounds).items()}
