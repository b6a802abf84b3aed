"""What a run of the second codec does and leaves: the archive of a compressed network, its proof, checkpoint and summary."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.network_file import NetworkFile
from quantize.archive import load_archive, pack_archive
from quantize.compression import Compressor
from quantize.record import check_identical, describe_compact
from quantize.search import Candidate, Search
from quantize.settings import CodecSettings
from utils.device import to_device
from utils.errors import UserError
from utils.files import write_atomic
from utils.images.batches import ImageData
from utils.modes import evaluating
from utils.profile import compare_networks
from utils.runs.folder import ARCHIVE, COMPACT, SUMMARY
from utils.runs.run import Run
from utils.training.evaluation import evaluate

CALIBRATION_IMAGES, HELD_OUT_IMAGES = 512, 4096


def find_candidate(
    file: NetworkFile, network: nn.Module, data: ImageData, *, settings: CodecSettings, say: Callable[[str], object]
) -> Candidate:
    """What `network`, that of `file` without its zero filters, on the device, becomes under the settings' bound.

    No test image has a say in it. Raises ParameterError for a bound that cannot be met.
    """
    calibration, held_out = training_images(data)
    before = top1(network, held_out) if settings.max_bytes is None else 0.0
    search = Search(
        Compressor(network, calibration),
        pack=lambda found: pack_archive(found.network, **_identity(file), weights=found.weights),
        drop_of=lambda found: before - top1(found.network, held_out),
        on_candidate=lambda found: say(_told(found)),
    )
    return search.within_bytes(settings.max_bytes) if settings.max_bytes is not None else search.within_drop(settings.max_drop)


def leave_candidate(
    run: Run,
    best: Candidate,
    data: ImageData,
    *,
    file: NetworkFile,
    original: nn.Module,
    path: str,
    config: Mapping[str, Any],
    head: Mapping[str, Any],
) -> None:
    """Writes the archive of what was found, proves that it decodes to the same bits, and leaves small checkpoint and summary.

    `original` is what was compressed, of `file`, which was read from `path`.
    """
    compressed = best.compressed.network
    write_atomic(run.folder / ARCHIVE, best.data)
    run.save(COMPACT, describe_compact(compressed, **_identity(file), config=config))
    decoded = to_device(load_archive(run.folder / ARCHIVE, model=file.model), data.device)
    check_identical(compressed, decoded, data)
    networks = {"original": original, "compressed": compressed, "decoded": decoded}
    scores = {name: evaluate(own, data) for name, own in networks.items()}
    sizes = compare_networks(file.network, compressed, data.example[:1], files=(path, run.folder / COMPACT))
    run.log("\n".join(best.report.lines()))
    run.log("top1: " + ", ".join(f"{name} {score['top1']:.2f}" for name, score in scores.items()))
    run.log("identical: yes, every tensor and the logits of every test image, before encoding and after decoding")
    archive = {**best.report.as_dict(), "step": best.step, "drop_on_held_out": best.drop, "identical": "yes"}
    run.save_json(SUMMARY, {**head, "model": file.model, "accuracy": scores, "compact": sizes, "archive": archive})
    run.log(f"done -> {run.folder / ARCHIVE}")


def _identity(file: NetworkFile) -> dict[str, Any]:
    return {"model": file.model, "num_classes": file.num_classes, "images": file.images}


def training_images(data: ImageData) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Images of the training set that show what layers read, and others, with labels, by which a step is chosen.

    The first are augmented as in training, the others as they are tested. A set or a limit (`--limit-batches`) of few images
    gives half of them to each. Raises UserError for fewer than two.
    """
    if data.train_images < 2:
        raise UserError(f"{data.train_images} training images: too few to hold any out, at least 2 are needed")
    wanted = min(CALIBRATION_IMAGES, data.train_images // 2)
    calibration, seen, taken = [], [], 0
    for batch in data.train_batches("calibration"):
        calibration.append(batch.images[: wanted - taken])
        seen.append(batch.indices[: wanted - taken])
        taken += len(calibration[-1])
        if taken == wanted:
            break
    count = min(HELD_OUT_IMAGES, data.train_images - taken)
    return calibration, data.held_out_batches(count, seen=torch.cat(seen))


@torch.no_grad()
def top1(network: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Per cent of the images whose class is found."""
    with evaluating(network):
        hits = sum(int((network(images).argmax(1) == labels).sum()) for images, labels in batches)
    return 100 * hits / sum(len(labels) for _, labels in batches)


def _told(found: Candidate) -> str:
    drop = "" if found.drop is None else f", {found.drop:+.2f} points lost on held-out training images"
    return f"step {found.step:.3g}: {len(found.data):,} bytes{drop}"
