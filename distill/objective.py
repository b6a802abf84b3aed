"""The training objective of distillation: cross-entropy, KD and feature losses of a student beside a frozen teacher."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from distill.base import Distiller, full_precision
from models.conv_norm import conv_norm_pairs
from models.outputs import Outputs


class FrozenTeacher:
    """A private copy of a network in eval mode that builds no graph: `teacher(images) -> Outputs`.

    No nn.Module, so that an objective that holds it neither trains, saves, moves, nor synchronises it. The copy stays on
    the network's device. `fold_batch_norm` merges batch norms into the convolutions before them, the same function up to
    rounding; `channels_last` sets the layout of its weights, for images of that layout.
    """

    def __init__(self, network: nn.Module, *, fold_batch_norm: bool = False, channels_last: bool = False):
        network = copy.deepcopy(network).eval().requires_grad_(False)
        if fold_batch_norm:
            _fold_batch_norms(network)
        if channels_last:
            network = network.to(memory_format=torch.channels_last)
        self.network = network

    def __call__(self, images: Tensor) -> Outputs:
        with torch.no_grad():  # not inference_mode: the losses save these tensors for the student's backward pass
            return self.network.outputs(images)


class DistillationObjective(nn.Module):
    """`CE + alpha * KD + sum of beta_i * L_i` for images (b, 3, h, w) and labels (b,).

    `losses` lists (name, distiller, beta); `kd` is the distiller weighted by alpha, or None. Without a teacher the
    objective is the cross-entropy alone. Its parameters are the student's and those of the losses (AFD's), all used in
    every step. The losses see the images of one process, so SP's and HAP's similarities are within its part of a batch.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        teacher: FrozenTeacher | None = None,
        losses: Sequence[tuple[str, Distiller, float]] = (),
        kd: Distiller | None = None,
        alpha: float = 0.9,
    ):
        super().__init__()
        weighted = [*([("kd", kd, alpha)] if kd is not None else []), *losses]
        if bool(weighted) != (teacher is not None):
            raise ValueError("a teacher and a loss to learn from it belong together: give both or neither")
        self.student = student
        self.teacher = teacher
        self.distillers = nn.ModuleDict({name: distiller for name, distiller, _ in weighted})
        self.weights = {name: weight for name, _, weight in weighted}

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(loss, logits, terms): the 0-dim loss, and detached the (b, classes) logits and each term before its weight."""
        if self.teacher is None:
            logits = self.student(images)
            loss = F.cross_entropy(full_precision(logits), labels)
            return loss, logits.detach(), {"ce": loss.detach()}
        student, teacher = self.student.outputs(images), self.teacher(images)
        loss = F.cross_entropy(full_precision(student.logits), labels)
        terms = {"ce": loss.detach()}
        for name, distiller in self.distillers.items():
            term = distiller(student, teacher)
            terms[name] = term.detach()
            loss = loss + self.weights[name] * term
        return loss, student.logits.detach(), terms


def sample_outputs(network: nn.Module, images: Tensor) -> Outputs:
    """What `build_distiller` needs of a network: its outputs for a few images, leaving no trace in it."""
    return FrozenTeacher(network)(images)


def _fold_batch_norms(network: nn.Module) -> None:
    for conv_name, norm_name in conv_norm_pairs(network).items():
        norm = network.get_submodule(norm_name)
        if norm.track_running_stats:
            fused = fuse_conv_bn_eval(network.get_submodule(conv_name), norm)
            network.set_submodule(conv_name, fused.requires_grad_(False))
            network.set_submodule(norm_name, nn.Identity())
