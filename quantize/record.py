"""What a run that quantizes leaves: its checkpoints, the archive and its proof, what it logs and sums up."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.difference import ResultDifference
from models.int8 import Int8Network
from models.narrow import NarrowNetwork
from models.network_file import NetworkFile, describe_network
from quantize.archive import differing_tensors, load_archive, save_archive
from quantize.codebook import bake_weights, share_weights
from quantize.table import ArchiveReport
from utils.device import to_device
from utils.files import read_json
from utils.images.batches import ImageData
from utils.modes import evaluating
from utils.profile import compare_networks
from utils.runs.folder import ARCHIVE, BEFORE_TRAINING, BEST, COMPACT, SUMMARY
from utils.runs.run import Run
from utils.training.evaluation import check_score, evaluate

CALIBRATION_BATCHES = 10  # that show the bounds of activations before the training


def share(run: Run, network: nn.Module, bits: Mapping[str, int], data: ImageData, *, is_new: bool) -> None:
    """Makes the layers of `bits` share their weights, in place; a new run logs what that does and keeps it in a file."""
    original = evaluate(network, data) if is_new else {}
    entries = share_weights(network, bits)
    if is_new:
        run.log(f"{len(entries)} layers share values: " + ", ".join(f"{name} {count}" for name, count in entries.items()))
        log_before(run, {"original": original, "quantized": evaluate(network, data)})


def simulate(run: Run, network: NarrowNetwork, data: ImageData, *, is_new: bool) -> Int8Network:
    """The network in simulated eight bits; a new run finds the bounds of its activations, and logs what they cost."""
    original = evaluate(network, data) if is_new else {}
    simulated = Int8Network(network)
    if is_new:
        batches = data.train_batches("calibration")
        simulated.train()
        with torch.no_grad():
            for batch, _ in zip(batches, range(CALIBRATION_BATCHES), strict=False):
                simulated(batch.images)
        simulated.eval()
        places = len(simulated.names)
        run.log(f"{len(simulated.layers)} layers compute in int8, activations are rounded at {places} places")
        log_before(run, {"original": original, "quantized": evaluate(simulated, data)})
    return simulated


def log_before(run: Run, scores: Mapping[str, Any]) -> None:
    for name, result in scores.items():
        check_score(result, origin=f"{name} network")
        run.log(f"{name}, before fine-tuning: top1 {result['top1']:.2f}, loss {result['loss']:.4f}")
    run.save_json(BEFORE_TRAINING, scores)


def describe_quantized(
    network: nn.Module, kept: Mapping[str, Tensor], *, config: Mapping[str, Any], file: NetworkFile
) -> dict[str, Any]:
    """A checkpoint with plain weights at full width, so that everything that reads the unquantized network reads it too."""
    ranges = network.ranges() if isinstance(network, Int8Network) else None
    plain = network.network if isinstance(network, Int8Network) else bake_weights(copy.deepcopy(network))
    is_narrow = isinstance(plain, NarrowNetwork)
    return describe_network(
        plain.dense_state_dict() if is_narrow else plain.state_dict(),
        model=file.model,
        num_classes=file.num_classes,
        images=file.images,
        config=config,
        kept=plain.kept if is_narrow else None,
        int8=ranges,
    )


def describe_compact(network: nn.Module, *, config: Mapping[str, Any], **identity: Any) -> dict[str, Any]:
    """A checkpoint of the network as it is, narrow or not; `identity` is its model, number of classes, images and `int8`."""
    kept = network.kept if isinstance(network, NarrowNetwork) else None
    return describe_network(network.state_dict(), **identity, config=config, kept=kept, compact=bool(kept))


def encode(
    run: Run,
    result: Mapping[str, Any],
    data: ImageData,
    *,
    best: NetworkFile,
    small: nn.Module,
    config: Mapping[str, Any],
    head: Mapping[str, Any],
) -> None:
    """Encodes the best network, proves that it decodes to the same bits, and leaves archive, small checkpoint and summary.

    `best` is its file, `small` the network without its zero filters, both on the device.
    """
    save_compact(run, result, best=best, small=small, config=config)
    identity = _identity(best)
    report = save_archive(run.folder / ARCHIVE, small, **identity)
    decoded = to_device(load_archive(run.folder / ARCHIVE, model=best.model), data.device)
    check_identical(small, decoded, data)
    scores = {**read_json(run.folder / BEFORE_TRAINING), "fine_tuned": evaluate(small, data), "decoded": evaluate(decoded, data)}
    sizes = compare_networks(best.network, small, data.example[:1], files=(run.folder / BEST, run.folder / COMPACT))
    ratio = sizes["dense"]["file_bytes"] / report.file_bytes
    log_result(run, report, scores=scores, sizes=sizes, ratio=ratio)
    archive = {**report.as_dict(), "ratio": ratio, "identical": "yes"}
    run.save_json(SUMMARY, {**head, "model": best.model, **result, "accuracy": scores, "compact": sizes, "archive": archive})


def finish_int8(
    run: Run,
    result: Mapping[str, Any],
    data: ImageData,
    *,
    best: NetworkFile,
    small: NarrowNetwork,
    config: Mapping[str, Any],
    head: Mapping[str, Any],
) -> None:
    """Leaves the small checkpoint of the best network, with the bounds of its activations, and the summary."""
    save_compact(run, result, best=best, small=small, config=config)
    simulated = Int8Network.with_ranges(small, best.int8)
    scores = {**read_json(run.folder / BEFORE_TRAINING), "fine_tuned": evaluate(simulated, data)}
    sizes = compare_networks(best.network, small, data.example[:1], files=(run.folder / BEST, run.folder / COMPACT))
    run.log(_accuracies(scores))
    run.save_json(SUMMARY, {**head, "model": best.model, **result, "accuracy": scores, "compact": sizes})
    run.log(f"done -> {run.folder / BEST}; export.py --int8 writes it as ONNX")


def save_compact(run: Run, result: Mapping[str, Any], *, best: NetworkFile, small: nn.Module, config: Mapping[str, Any]) -> None:
    description = describe_compact(small, **_identity(best), config=config, int8=best.int8)
    run.save(COMPACT, {**description, "epoch": result["best"]["epoch"], "metrics": result["best"]})


def _identity(file: NetworkFile) -> dict[str, Any]:
    return {"model": file.model, "num_classes": file.num_classes, "images": file.images}


@torch.no_grad()
def check_identical(encoded: nn.Module, decoded: nn.Module, data: ImageData) -> None:
    """Compares every tensor and the logits of every test image, bit for bit; a difference is an error of this program."""
    names = differing_tensors(encoded, decoded)
    difference = ResultDifference()
    with evaluating(encoded, decoded):
        for batch in data.test_batches():
            difference.add(encoded(batch.images), decoded(batch.images))
    if names or difference.difference != 0:
        raise RuntimeError(f"the decoded network is not the encoded one: {', '.join(names[:3]) or 'other logits'}")


def log_result(run: Run, report: ArchiveReport, *, scores: Mapping[str, Any], sizes: Mapping[str, Any], ratio: float) -> None:
    run.log("\n".join(report.lines()))
    checkpoints = ", ".join(f"{role} checkpoint {sizes[role]['file_bytes']:,}" for role in ("dense", "compact"))
    run.log(f"bytes on disk: {checkpoints}, archive {report.file_bytes:,}, {ratio:.2f}x smaller than the dense one")
    run.log(_accuracies(scores))
    run.log("identical: yes, every tensor and the logits of every test image, before encoding and after decoding")
    run.log(f"done -> {run.folder / ARCHIVE}")


def _accuracies(scores: Mapping[str, Any]) -> str:
    return "top1: " + ", ".join(f"{name.replace('_', '-')} {score['top1']:.2f}" for name, score in scores.items())
