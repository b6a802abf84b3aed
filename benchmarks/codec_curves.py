"""Bytes against errors of the logits: the second codec beside `nncodec` (ISO/IEC 15938-17), both without fine-tuning."""

import contextlib
import copy
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from models.network_file import NetworkFile, load_network
from quantize.archive import pack_archive
from quantize.compression import Compressor
from quantize.level_run import training_images
from quantize.search import STEPS_PER_OCTAVE
from utils.images.batches import ImageData
from utils.images.loading import load_images
from utils.images.settings import DataSettings
from utils.modes import evaluating
from utils.world import World

STEPS = (-18, -14, -10)  # in quarters of an octave of the compressor's unit
QPS = (-36, -32, -28, -24, -20)
TEST_BATCHES, BATCH_SIZE = 32, 125


@dataclass(frozen=True)
class Point:
    """One network at one setting: `error` is that of the logits, relative, over the test images."""

    codec: str
    setting: str
    bytes: int
    error: float
    top1: float


def rows_of(path: str, *, data_dir: str) -> Iterator[dict[str, object]]:
    """The points of both codecs for one checkpoint; of `nncodec` none where it is not installed."""
    file = load_network(path, flag="--networks")
    settings = DataSettings("folder", data_dir, BATCH_SIZE, limit_batches=TEST_BATCHES)
    data = load_images(settings, seed=0, device=torch.device("cpu"), world=World(), files={f"--networks {path}": file.images})
    yield {"network": path_name(path), "codec": "float", "setting": "-", "bytes": Path(path).stat().st_size,
           "error": 0.0, "top1": score(file.network, file.network, data)[1]}  # fmt: skip
    for points in (our_points(file, data), nncodec_points(file, data)):
        for point in points:
            yield {"network": path_name(path), **vars(point)}


def path_name(path: str) -> str:
    return Path(path).parent.name


def our_points(file: NetworkFile, data: ImageData) -> Iterator[Point]:
    identity = {"model": file.model, "num_classes": file.num_classes, "images": file.images}
    compressor = Compressor(file.network, training_images(data)[0])
    for number in STEPS:
        found = compressor.compress(compressor.unit * 2 ** (number / STEPS_PER_OCTAVE))
        packed, _ = pack_archive(found.network, **identity, weights=found.weights)
        yield Point("trellis", f"step 2^{number / STEPS_PER_OCTAVE:g}", len(packed), *score(found.network, file.network, data))


def nncodec_points(file: NetworkFile, data: ImageData) -> Iterator[Point]:
    try:
        import nncodec.nn
        from nncodec import nnc
    except ImportError as error:
        print(f"nncodec is not measured: {error}")
        return
    state = {name: tensor for name, tensor in file.network.state_dict().items() if tensor.dim()}
    arrays = {name: tensor.numpy().astype(np.float32) for name, tensor in state.items()}
    for qp in QPS:
        with contextlib.redirect_stdout(io.StringIO()):
            packed = nncodec.nn.encode(dict(arrays), args={**nncodec.nn.nncargs, "qp": qp, "verbose": False})
            values = nnc.decompress(packed, verbose=False)
        network = copy.deepcopy(file.network)
        own = network.state_dict()
        network.load_state_dict({**own, **{name: torch.as_tensor(values[name]).reshape(own[name].shape) for name in state}})
        yield Point("nncodec", f"qp {qp}", len(packed), *score(network, file.network, data))


@torch.no_grad()
def score(network: nn.Module, reference: nn.Module, data: ImageData) -> tuple[float, float]:
    """Relative error of the logits, and top-1 in per cent."""
    squares, whole, hits, images = 0.0, 0.0, 0, 0
    with evaluating(network, reference):
        for batch in data.test_batches():
            logits, wanted = network(batch.images), reference(batch.images)
            squares += float((logits - wanted).square().sum())
            whole += float(wanted.square().sum())
            hits += int((logits.argmax(1) == batch.labels).sum())
            images += len(batch.labels)
    return (squares / whole) ** 0.5, 100 * hits / images


def ratios(rows: Sequence[dict[str, object]]) -> list[float]:
    """Our bytes over those of `nncodec` at our errors, between whose points logarithms are interpolated."""
    curve = sorted((row["error"], row["bytes"]) for row in rows if row["codec"] == "nncodec")
    ours = [(row["error"], row["bytes"]) for row in rows if row["codec"] == "trellis"]
    if not curve:
        return []
    errors, sizes = np.log(np.array(curve)).T
    return [
        size / np.exp(np.interp(np.log(error), errors, sizes)) for error, size in ours if errors[0] <= np.log(error) <= errors[-1]
    ]


def draw(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Bytes against error, a panel a network."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(4.2 * len(names), 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for codec in ("trellis", "nncodec"):
            own = sorted((row["bytes"], row["error"]) for row in rows if row["network"] == name and row["codec"] == codec)
            if own:
                axes.loglog(*zip(*own, strict=True), marker="o", label=codec)
        axes.set(title=name, xlabel="bytes", ylabel="relative error of the logits")
        axes.legend()
    figure.savefig(path)
