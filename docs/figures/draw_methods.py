"""Draws the pictures of NGGM and HAP in docs/methods.md from small examples that are computed, not sketched.

From the repository's root: `python3 -m docs.figures.draw_methods [--output DIR]`. Takes about half a minute on a CPU.
"""

import argparse
import copy
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from sklearn.datasets import load_digits
from torch import Tensor

from distill.base import attention_map, channel_energy
from distill.hap import attention_similarity, hap_loss
from distill.objective import FrozenTeacher
from models.cifar_resnet import CifarResNet
from models.graph import ChannelGraph
from models.outputs import Outputs
from prune.criteria import CRITERIA
from prune.masks import keep_count

SEED = 8152
# Okabe and Ito's colours, which stay apart for the colour-blind and, with these, in grey.
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#9A9A9A"
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 200}

FILTERS, GAMMA, KEEP_RATIO = 8, 0.5, 0.6

DEPTH, TEACHER_BLOCKS = 14, 3
DIGITS, IMAGES_PER_DIGIT = (0, 1, 4, 7), 4
TRAINING_STEPS, TRAINING_IMAGES = 40, 64

HAP_LEGEND = """A batch: four images each of four digits.

Upper strips, of two of the images: the attention map
$a=$ normalize(vec(mean$_c\\,f^2$)) of the block's output $f$.

Lower squares, of all the images: how alike the maps are,
$G=$ rownorm$(a\\,a^\\top)$, $S_i$ of the student's block $i$
and $T_j$ of the teacher's block $j$.

Right: each $S_i$ is drawn towards every $T_j$."""


def draw_nggm() -> Figure:
    """Filters with two weights each, so that they are points: distances, gradient norms, their weighted sum."""
    weight, gradient = toy_layer()
    scores = CRITERIA["filter-nggm"](weight, gradient, gamma=GAMMA)
    median_part = CRITERIA["filter-nggm"](weight, gradient, gamma=1.0)
    gradient_part = CRITERIA["filter-nggm"](weight, gradient, gamma=0.0)
    pruned = set(scores.argsort()[: FILTERS - keep_count(FILTERS, KEEP_RATIO)].tolist())

    figure, axes = plt.subplots(1, 4, figsize=(12, 3.3), layout="constrained")
    draw_filters(axes[0], weight.flatten(1).numpy(), pruned)
    draw_bars(axes[1], CRITERIA["filter-gm"](weight), pruned, color=BLUE)
    draw_bars(axes[2], CRITERIA["filter-a"](gradient), pruned, color=ORANGE)
    draw_bars(axes[3], GAMMA * median_part, pruned, color=BLUE)
    draw_bars(axes[3], (1 - GAMMA) * gradient_part, pruned, color=ORANGE, bottom=GAMMA * median_part)
    axes[1].set_title("Distance to all other filters\n$m_i=\\Sigma_j\\,\\|w_i-w_j\\|_2$")
    axes[2].set_title("Norm of the loss gradient\n$n_i=\\|g_i\\|_1$")
    axes[3].set_title(f"Score, $\\gamma={GAMMA}$\n$\\gamma\\,$minmax$(m_i)+(1-\\gamma)\\,$minmax$(n_i)$")
    pruned_bar = Patch(facecolor="white", edgecolor="black", hatch="////", label="lowest scores: pruned")
    axes[3].legend(handles=[pruned_bar], frameon=False, loc="upper right")
    axes[3].set_ylim(0, 0.75)
    return figure


def toy_layer() -> tuple[Tensor, Tensor]:
    """Weight and cross-entropy gradient, both (FILTERS, 2, 1, 1), of a 1x1 convolution in a two-class problem."""
    generator = torch.Generator().manual_seed(SEED)
    weight = torch.randn(FILTERS, 2, 1, 1, generator=generator).requires_grad_()
    classifier = torch.randn(2, FILTERS, generator=generator)
    labels = torch.arange(64) % 2
    images = torch.randn(64, 2, 4, 4, generator=generator) + (2.0 * labels - 1).view(-1, 1, 1, 1)
    logits = F.conv2d(images, weight).relu().mean((2, 3)) @ classifier.T
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels), weight)
    return weight.detach(), gradient


def draw_filters(axes: Axes, points: np.ndarray, pruned: set[int]) -> None:
    for i, point in enumerate(points):
        for other in points[:i]:
            axes.plot(*zip(point, other, strict=True), color=GREY, linewidth=0.4, zorder=1)
    colors = ["white" if i in pruned else BLUE for i in range(len(points))]
    axes.scatter(*points.T, s=60, c=colors, edgecolors="black", zorder=2)
    for i, point in enumerate(points):
        axes.annotate(f"$w_{i + 1}$", point, xytext=(6, 5), textcoords="offset points", zorder=3)
    axes.margins(0.15)
    axes.set(title="Filters of one layer\nwhite: pruned", xlabel="first weight", ylabel="second weight")


def draw_bars(axes: Axes, values: Tensor, pruned: set[int], *, color: str, bottom: Tensor | float = 0.0) -> None:
    bars = axes.bar(range(1, len(values) + 1), values, bottom=bottom, color=color, edgecolor="black", linewidth=0.6)
    for i in pruned:
        bars[i].set(facecolor="white", edgecolor=color, hatch="////")
    axes.set_xticks(range(1, len(values) + 1), [f"$w_{i}$" for i in range(1, len(values) + 1)])


def draw_hap() -> Figure:
    """Attention maps and similarity matrices of a trained network and its pruned copy, and the differences of all pairs."""
    images, labels = digit_images()
    network = trained_network(images, labels)
    batch = torch.cat([images[labels == digit][:IMAGES_PER_DIGIT] for digit in DIGITS])
    teacher, student = FrozenTeacher(network)(batch), FrozenTeacher(pruned_copy(network))(batch)

    figure = plt.figure(figsize=(12, 6), layout="constrained")
    networks, pairs = figure.subfigures(1, 2, width_ratios=(3.1, 1))
    rows = networks.subfigures(2, 1)
    draw_network(rows[0], student, compared=len(student.blocks), color=ORANGE)
    rows[0].suptitle("Student, pruned: every block", fontweight="bold")
    draw_network(rows[1], teacher, compared=TEACHER_BLOCKS, color=BLUE)
    rows[1].suptitle(f"Teacher, frozen: the last {TEACHER_BLOCKS} blocks", x=0.75, fontweight="bold")
    rows[1].text(0.02, 0.45, HAP_LEGEND, fontsize=10, va="center", linespacing=1.7)
    draw_pairs(pairs.subplots(), student, teacher)
    return figure


def digit_images() -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits as (N, 3, 32, 32) images, about standardised, and their labels (N,)."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1)  # (N, 1, 8, 8), 0 to 16
    images = F.interpolate(images, size=(32, 32), mode="bilinear")
    return ((images - 5) / 6).expand(-1, 3, -1, -1), torch.from_numpy(digits.target)


def trained_network(images: Tensor, labels: Tensor) -> CifarResNet:
    """A small ResNet after a few steps: enough for its attention maps to follow the strokes."""
    torch.manual_seed(SEED)
    network = CifarResNet(depth=DEPTH, num_classes=10)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for _ in range(TRAINING_STEPS):
        chosen = torch.randint(len(images), (TRAINING_IMAGES,))
        optimizer.zero_grad()
        F.cross_entropy(network(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return network


@torch.no_grad()
def pruned_copy(network: CifarResNet) -> CifarResNet:
    """The network with the filters of lowest norm cleared, before any fine-tuning: the student of the first step."""
    network = copy.deepcopy(network)
    for layer in ChannelGraph(network).prunable_layers():
        scores = CRITERIA["filter-l2"](layer.module.weight)
        cut = scores.argsort()[: layer.filters - keep_count(layer.filters, KEEP_RATIO)]
        for parameter in (layer.module.weight, layer.norm.weight, layer.norm.bias):
            parameter[cut] = 0
    return network


def draw_network(figure: SubFigure, outputs: Outputs, *, compared: int, color: str) -> None:
    """A column a block: the attention map of one image of each digit above the similarity matrix of the whole batch."""
    similarities = attention_similarity(outputs.blocks)
    first = len(outputs.blocks) - compared
    low, high = similarities[first:].min().item(), similarities[first:].max().item()
    grid = figure.add_gridspec(2, len(outputs.blocks), height_ratios=(1, 2))
    for i, block in enumerate(outputs.blocks):
        maps, matrix = figure.add_subplot(grid[0, i]), figure.add_subplot(grid[1, i])
        if i < first:
            maps.set_axis_off()
            matrix.set_axis_off()
            continue
        maps.imshow(attention_strip(block), cmap="gray")
        matrix.imshow(similarities[i], cmap="cividis", vmin=low, vmax=high)
        maps.set_title(f"block {i + 1}")
        for axes in (maps, matrix):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=True, color=color, linewidth=1.5)
        matrix.set_xlabel(f"${'S' if compared == len(outputs.blocks) else 'T'}_{i + 1}$")


def attention_strip(block: Tensor) -> np.ndarray:
    """Attention maps of the first image of two digits, side by side, each in its own grey scale."""
    energy = channel_energy(block[::IMAGES_PER_DIGIT][:2])
    maps = attention_map(energy).view_as(energy)
    return torch.cat([one / one.max() for one in maps], dim=1).numpy()


def draw_pairs(axes: Axes, student: Outputs, teacher: Outputs) -> None:
    """`mean((S_i - T_j)^2)` of each pair of blocks; their mean is the loss."""
    teacher_blocks = teacher.blocks[-TEACHER_BLOCKS:]
    pairs = torch.stack([torch.stack([hap_loss([s], [t]) for t in teacher_blocks]) for s in student.blocks]) * 1000
    axes.imshow(pairs, cmap="Blues", vmin=0, vmax=2 * pairs.max().item())  # twice: black text stays readable
    for i, j in np.ndindex(*pairs.shape):
        axes.text(j, i, f"{pairs[i, j]:.2f}", ha="center", va="center")
    first = len(teacher.blocks) - TEACHER_BLOCKS
    axes.set_xticks(range(TEACHER_BLOCKS), [f"$T_{first + j + 1}$" for j in range(TEACHER_BLOCKS)])
    axes.set_yticks(range(len(student.blocks)), [f"$S_{i + 1}$" for i in range(len(student.blocks))])
    axes.set_title("mean$((S_i-T_j)^2)\\times 10^3$")
    axes.set_xlabel(f"HAP loss: mean over all pairs\n$= {pairs.mean():.2f} \\times 10^{{-3}}$", fontweight="bold")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder for nggm.png and hap.png")
    output = parser.parse_args().output
    matplotlib.use("agg")
    with plt.rc_context(STYLE):
        for name, draw in (("nggm", draw_nggm), ("hap", draw_hap)):
            draw().savefig(output / f"{name}.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
