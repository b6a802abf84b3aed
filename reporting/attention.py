"""What distillation by attention preserves, to look at: the maps of every block, and HAP's similarities between images."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from distill.base import attention_map, channel_energy
from distill.hap import USUAL_BLOCKS, attention_similarity, hap_loss
from distill.objective import FrozenTeacher
from models.network_file import NetworkFile, load_network
from models.outputs import Outputs
from reporting.naming import model_label
from reporting.page import Picture
from reporting.panels import LOOK, png
from reporting.settings import check_flags
from utils.errors import UserError, naming
from utils.files import read_json
from utils.images.batches import ImageData
from utils.images.dataset import Dataset, Wanted
from utils.images.datasets import DATASETS, load_dataset
from utils.python_file import names_function
from utils.runs.folder import BEST, CONFIG

MAPS = "magma"
DIFFERENCES = "PuOr"  # told apart by the colour-blind
MAX_BLOCKS = 27  # columns that are still to be seen: the blocks of a ResNet-56
SHOWN_CLASSES = 4
SHOWN_BLOCKS = 3
SIMILARITY_CHOICE = {"classes": 8, "images": 8}
CELL_INCHES = 0.62


@dataclass(frozen=True)
class Pair:
    """Teacher and student of one run, its dataset, and how many of the teacher's last blocks HAP compares."""

    teacher: NetworkFile
    student: NetworkFile
    dataset: Dataset
    hap_ts: int


def attention_pictures(
    folder: Path,
    *,
    images: Sequence[int] | None = None,
    data_dir: Path | None = None,
    t_model: str | None = None,
    s_model: str | None = None,
) -> list[Picture]:
    """Attention maps and similarity matrices of the pruning run in `folder`, teacher beside student.

    `images` are positions in the test set, by default the first image of each of the first classes; `data_dir` is where
    the dataset is now; `t_model` and `s_model` name the networks where the run names Python files, whose code never runs for
    that. Raises UserError for a folder that is no pruning run with a teacher, or without its checkpoints.
    """
    pair = load_pair(folder, data_dir=data_dir, t_model=t_model, s_model=s_model)
    with matplotlib.rc_context(LOOK):
        maps = _draw_maps(pair, images)
        similarities = _draw_similarities(pair)
    return [
        Picture(
            "attention_maps",
            f"Attention maps of {folder.name}",
            "Mean of the squared channels of every residual block, in order of depth, for some test images; of each image the "
            "teacher's maps above the student's. Bright is where a block is active.",
            png(maps),
        ),
        Picture(
            "similarities",
            f"Similarities that HAP preserves in {folder.name}",
            "Similarity G of the attention maps of test images, the first 8 of each of the first 8 classes (parted by lines), in "
            "the last blocks: the teacher's, the student's, and student minus teacher.",
            png(similarities),
        ),
    ]


def load_pair(folder: Path, *, data_dir: Path | None = None, t_model: str | None = None, s_model: str | None = None) -> Pair:
    """Reads the networks and the dataset that the run's config.json names. Raises UserError, as `attention_pictures`."""
    flags = _pruning_flags(folder)
    named = None if names_function(flags.get("t_model")) else flags.get("t_model")
    networks = {"--s-model": (folder / BEST, s_model), "--t-model": (_teacher_path(folder, flags["t_path"]), t_model or named)}
    student, teacher = (
        load_network(path, flag="--attention", model=model, model_flag=flag) for flag, (path, model) in networks.items()
    )
    images = student.images
    dataset = load_dataset(
        flags["dataset"],
        data_dir=data_dir or flags["data_dir"],
        wanted=Wanted(
            download=False,
            network=images,
            normalisation=images.normalisation if images is not None else None,
            test_only=True,
        ),
    )
    for file in (student, teacher):
        if file.num_classes != len(dataset.classes):
            raise UserError(f"--attention {folder}: {file.num_classes} classes, but {dataset.name} has {len(dataset.classes)}")
    return Pair(teacher, student, dataset, flags["hap_ts"] or USUAL_BLOCKS)


def _pruning_flags(folder: Path) -> dict[str, Any]:
    if not os.path.lexists(folder / CONFIG):
        raise UserError(f"--attention {folder}: no {CONFIG} there, expected the folder of a pruning run")
    config = read_json(folder / CONFIG)
    flags = config.get("flags") if isinstance(config, dict) else None
    if not isinstance(flags, dict) or not flags.get("t_path") or not flags.keys() >= {"dataset", "data_dir", "hap_ts"}:
        raise UserError(f"--attention {folder}: this run has no teacher (--t-path), expected a run of pruning.py that has one")
    with naming(f"--attention {folder}"):
        check_flags(flags)
        if not isinstance(flags["t_path"], str) or flags["dataset"] not in DATASETS or flags["hap_ts"] == 0:
            raise UserError(f"its {CONFIG} names no teacher, dataset or --hap-ts that there could be")
    return flags


def _teacher_path(folder: Path, t_path: str) -> Path:
    """Where the flag says, or in the folder of that name beside the run's: runs are moved together."""
    named = Path(t_path)
    beside = folder.parent / named.parent.name / named.name
    return beside if not named.is_file() and beside.is_file() else named


# ---- attention maps ----------------------------------------------------------------------------------------------------


def _draw_maps(pair: Pair, images: Sequence[int] | None) -> Figure:
    positions = _first_of_each_class(pair.dataset, classes=SHOWN_CLASSES) if images is None else images
    batch, _ = _test_images(pair.dataset, positions)
    rows = [(role, _network_maps(file, batch)) for role, file in (("teacher", pair.teacher), ("student", pair.student))]
    columns = max(len(maps) for _, maps in rows)
    size = (CELL_INCHES * (columns + 1.5), CELL_INCHES * (2 * len(positions) + 0.8))
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.02, hspace=0.02)
    grid = figure.subplots(2 * len(positions), columns + 1, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for image, position in enumerate(positions):
        _draw_photograph(grid[2 * image, 0], batch[image], pair.dataset, position)
        for offset, (role, maps) in enumerate(rows):
            line = grid[2 * image + offset]
            line[0].text(1.15, 0.5, role, rotation=90, va="center", ha="center", fontsize=7, transform=line[0].transAxes)
            for column, (block, block_maps) in enumerate(maps.items()):
                line[column + 1].imshow(block_maps[image], cmap=MAPS)
                if image == 0 and offset == 0:
                    line[column + 1].set_title(str(block + 1), fontsize=7)
    return figure


def _network_maps(file: NetworkFile, images: Tensor) -> dict[int, np.ndarray]:
    """Attention of the blocks, at most MAX_BLOCKS of them at even distances, the last included: {block: (b, h, w)}."""
    blocks = _outputs(file, images).blocks
    chosen = sorted({round(step) for step in np.linspace(0, len(blocks) - 1, min(len(blocks), MAX_BLOCKS))})
    return {block: _square_map(blocks[block]).numpy() for block in chosen}


def _square_map(block: Tensor) -> Tensor:
    """(b, c, h, w) -> (b, h, w), each image's map of length 1."""
    energy = channel_energy(block)
    return attention_map(energy).view_as(energy)


def _draw_photograph(axes: Axes, image: Tensor, dataset: Dataset, position: int) -> None:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (dataset.mean, dataset.std))
    axes.imshow((image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy())
    axes.set_title(f"{position}: {dataset.classes[int(dataset.test.labels[position])]}", fontsize=7)


def _first_of_each_class(dataset: Dataset, *, classes: int, images: int = 1) -> list[int]:
    """Positions in the test set of the first images of each of the first classes, in the order of classes."""
    labels = dataset.test.labels
    return [int(row) for label in labels.unique()[:classes] for row in (labels == label).nonzero()[:images]]


def _test_images(dataset: Dataset, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The test images at these positions, normalised: (b, 3, h, w), and their labels (b,)."""
    images, labels = dataset.test
    for position in positions:
        if not 0 <= position < len(labels):
            raise UserError(f"--images {position}: the test set of {dataset.name} has images 0 to {len(labels) - 1}")
    rows = list(positions)
    chosen = [images[row] for row in rows] if dataset.streamed else images[rows]
    part = type(dataset.test)(chosen, labels[rows])
    data = ImageData(replace(dataset, train=part, test=part), batch_size=len(rows), seed=0, device=torch.device("cpu"))
    batch = next(data.test_batches())
    return batch.images, batch.labels


def _outputs(file: NetworkFile, images: Tensor) -> Outputs:
    return FrozenTeacher(file.network)(images)


# ---- similarities ------------------------------------------------------------------------------------------------------


def _draw_similarities(pair: Pair) -> Figure:
    images, labels = _test_images(pair.dataset, _first_of_each_class(pair.dataset, **SIMILARITY_CHOICE))
    teacher, student = _outputs(pair.teacher, images).blocks, _outputs(pair.student, images).blocks
    count = min(pair.hap_ts, SHOWN_BLOCKS, len(student), len(teacher))
    teacher_g, student_g = (attention_similarity(blocks[-count:]) for blocks in (teacher, student))  # (count, b, b)
    both = torch.cat([teacher_g, student_g])
    bound = float((student_g - teacher_g).abs().max()) or 1.0
    similarity_look = {"cmap": MAPS, "vmin": float(both.min()), "vmax": float(both.max())}
    difference_look = {"cmap": DIFFERENCES, "vmin": -bound, "vmax": bound}
    figure = Figure(figsize=(9, 2.7 * count + 0.5), layout="constrained")
    loss = float(hap_loss(student, teacher[-pair.hap_ts :]))
    figure.suptitle(f"{model_label(pair.student.model)}: HAP of these images {loss:.2e}", fontsize=10)
    for row, line in enumerate(figure.subplots(count, 3, squeeze=False)):
        names = (
            f"{role}, block {len(blocks) - count + row + 1}" for role, blocks in (("teacher", teacher), ("student", student))
        )
        for axes, name, matrix in zip(line, names, (teacher_g[row], student_g[row]), strict=False):
            drawn = _draw_matrix(axes, matrix, name, labels, border_color="white", look=similarity_look)
        figure.colorbar(drawn, ax=line[:2], fraction=0.03)
        difference = student_g[row] - teacher_g[row]
        drawn = _draw_matrix(line[2], difference, "student - teacher", labels, border_color="#555555", look=difference_look)
        figure.colorbar(drawn, ax=line[2], fraction=0.06)
    return figure


def _draw_matrix(
    axes: Axes, matrix: Tensor, name: str, labels: Tensor, *, border_color: str, look: Mapping[str, Any]
) -> AxesImage:
    drawn = axes.imshow(matrix.numpy(), **look)
    for border in ((labels.diff() != 0).nonzero().flatten() + 0.5).tolist():
        axes.axhline(border, color=border_color, linewidth=0.5)
        axes.axvline(border, color=border_color, linewidth=0.5)
    axes.set(xticks=[], yticks=[])
    axes.set_title(name, fontsize=9)
    return drawn
