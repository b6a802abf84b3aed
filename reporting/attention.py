"""What distillation by attention preserves, to look at: the maps of every block, and HAP's similarities between images."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from distill.base import attention_map, channel_energy
from distill.hap import attention_similarity, hap_loss
from distill.objective import FrozenTeacher
from models.network_file import NetworkFile, load_network
from models.outputs import Outputs
from reporting.naming import model_label
from reporting.page import Picture
from reporting.pictures import LOOK, png
from utils.data import ImageData
from utils.datasets import Dataset, load_dataset
from utils.errors import UserError
from utils.files import read_json
from utils.runs import BEST, CONFIG

MAPS = "magma"
DIFFERENCES = "PuOr"  # told apart by the colour-blind
MAX_BLOCKS = 27  # columns that are still to be seen: the blocks of a ResNet-56
SIMILARITY_IMAGES = 64
SHOWN_CLASSES = 4
CELL_INCHES = 0.62


@dataclass(frozen=True)
class Pair:
    """Teacher and student of one run, and the test images of its dataset."""

    teacher: NetworkFile
    student: NetworkFile
    data: ImageData
    hap_ts: int


def attention_pictures(folder: Path, *, images: Sequence[int] | None = None, data_dir: Path | None = None) -> list[Picture]:
    """Attention maps and similarity matrices of the pruning run in `folder`, teacher beside student.

    `images` are positions in the test set, by default the first image of each of the first classes; `data_dir` is where
    the dataset is now. Raises UserError for a folder that is no pruning run with a teacher, or without its checkpoints.
    """
    pair = load_pair(folder, data_dir=data_dir)
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
            f"Similarity G of the attention maps of {SIMILARITY_IMAGES} test images, ordered by class (white lines), in the last "
            "blocks: the teacher's, the student's, and student minus teacher.",
            png(similarities),
        ),
    ]


def load_pair(folder: Path, *, data_dir: Path | None = None) -> Pair:
    """Reads the networks and the dataset that the run's config.json names. Raises UserError, as `attention_pictures`."""
    flags = _pruning_flags(folder)
    student = load_network(folder / BEST, flag="--attention")
    teacher = load_network(_teacher_path(folder, flags["t_path"]), flag="--attention", model=flags.get("t_model"))
    dataset = load_dataset(flags["dataset"], data_dir=data_dir or flags["data_dir"], download=False)
    for file in (student, teacher):
        if file.num_classes != len(dataset.classes):
            raise UserError(f"--attention {folder}: {file.num_classes} classes, but {dataset.name} has {len(dataset.classes)}")
    data = ImageData(dataset, batch_size=SIMILARITY_IMAGES, seed=0, device=torch.device("cpu"))
    return Pair(teacher, student, data, min(flags.get("hap_ts") or 3, 3))


def _pruning_flags(folder: Path) -> dict:
    if not (folder / CONFIG).is_file():
        raise UserError(f"--attention {folder}: no {CONFIG} there, expected the folder of a pruning run")
    config = read_json(folder / CONFIG)
    flags = config.get("flags") if isinstance(config, dict) else None
    if not isinstance(flags, dict) or not flags.get("t_path"):
        raise UserError(f"--attention {folder}: this run has no teacher (--t-path), expected a run of pruning.py that has one")
    return flags


def _teacher_path(folder: Path, t_path: str) -> Path:
    """Where the flag says, or in the folder of that name beside the run's: runs are moved together."""
    named = Path(t_path)
    beside = folder.parent / named.parent.name / named.name
    return beside if not named.is_file() and beside.is_file() else named


# ---- attention maps ----------------------------------------------------------------------------------------------------


def _draw_maps(pair: Pair, images: Sequence[int] | None) -> Figure:
    positions = _first_of_each_class(pair.data.dataset) if images is None else list(images)
    batch = _test_images(pair.data, positions)
    rows = [(role, _network_maps(file, batch)) for role, file in (("teacher", pair.teacher), ("student", pair.student))]
    columns = max(len(maps) for _, maps in rows)
    size = (CELL_INCHES * (columns + 1.5), CELL_INCHES * (2 * len(positions) + 0.8))
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.02, hspace=0.02)
    grid = figure.subplots(2 * len(positions), columns + 1, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for image, position in enumerate(positions):
        _draw_photograph(grid[2 * image, 0], batch[image], pair.data.dataset, position)
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


def _first_of_each_class(dataset: Dataset) -> list[int]:
    labels = dataset.test.labels
    return [int((labels == label).nonzero()[0]) for label in labels.unique()[:SHOWN_CLASSES]]


def _test_images(data: ImageData, positions: Sequence[int]) -> Tensor:
    """The normalised test images (b, 3, h, w) at these positions."""
    count = len(data.dataset.test.labels)
    for position in positions:
        if not 0 <= position < count:
            raise UserError(f"--images {position}: the test set of {data.dataset.name} has images 0 to {count - 1}")
    last_batch = max(positions) // data.batch_size
    batches = {index: batch.images for index, batch in enumerate(islice(data.test_batches(), last_batch + 1))}
    return torch.stack([batches[position // data.batch_size][position % data.batch_size] for position in positions])


def _outputs(file: NetworkFile, images: Tensor) -> Outputs:
    return FrozenTeacher(file.network)(images)


# ---- similarities ------------------------------------------------------------------------------------------------------


def _draw_similarities(pair: Pair) -> Figure:
    images, labels = _images_by_class(pair.data)
    teacher, student = _outputs(pair.teacher, images).blocks, _outputs(pair.student, images).blocks
    count = min(pair.hap_ts, len(teacher), len(student))
    teacher_g, student_g = (attention_similarity(blocks[-count:]) for blocks in (teacher, student))  # (count, b, b)
    loss = hap_loss(student, teacher[-pair.hap_ts :])
    both = torch.cat([teacher_g, student_g])
    limits = {"vmin": float(both.min()), "vmax": float(both.max())}
    bound = float((student_g - teacher_g).abs().max()) or 1.0
    figure = Figure(figsize=(9, 2.7 * count + 0.5), layout="constrained")
    figure.suptitle(f"{model_label(pair.student.model)}: HAP of these images {float(loss):.2e}", fontsize=10)
    grid = figure.subplots(count, 3, squeeze=False)
    for row, (teacher_map, student_map) in enumerate(zip(teacher_g, student_g, strict=True)):
        names = (
            f"teacher, block {len(teacher) - count + row + 1}",
            f"student, block {len(student) - count + row + 1}",
            "student - teacher",
        )
        looks = ({"cmap": MAPS, **limits}, {"cmap": MAPS, **limits}, {"cmap": DIFFERENCES, "vmin": -bound, "vmax": bound})
        matrices = (teacher_map, student_map, student_map - teacher_map)
        drawn = [_draw_matrix(*each, labels) for each in zip(grid[row], matrices, names, looks, strict=True)]
        figure.colorbar(drawn[1], ax=grid[row, :2], fraction=0.03)
        figure.colorbar(drawn[2], ax=grid[row, 2], fraction=0.06)
    return figure


def _draw_matrix(axes: Axes, matrix: Tensor, name: str, look: dict, labels: Tensor):
    borders = (labels.diff() != 0).nonzero().flatten() + 0.5
    drawn = axes.imshow(matrix.numpy(), **look)
    color = "white" if look["cmap"] == MAPS else "#555555"
    for border in borders.tolist():
        axes.axhline(border, color=color, linewidth=0.5)
        axes.axvline(border, color=color, linewidth=0.5)
    axes.set(xticks=[], yticks=[])
    axes.set_title(name, fontsize=9)
    return drawn


def _images_by_class(data: ImageData) -> tuple[Tensor, Tensor]:
    """The first test batch, ordered by class: images (b, 3, h, w), labels (b,)."""
    images, labels, _ = next(data.test_batches())
    order = labels.argsort(stable=True)
    return images[order], labels[order]
