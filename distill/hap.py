"""HAP: the loss that this repository proposes, hierarchical attention-preserving distillation.

    a = normalize(vec(mean_c f^2))  (b, hw)    G = rownorm(a a^T)  (b, b)
    L = mean over pairs (i, j) of mean((S_i - T_j)^2)

where S_i is G of the student's block i (all of them) and T_j that of block j of the teacher's last `hap_ts`. The mean
over pairs is computed in its separated form, entry by entry, without an (n_s, n_t, b, b) tensor:

    mean_ij (S_i - T_j)^2 = (mean S - mean T)^2 + var_i(S) + var_j(T)

with population variances. It equals mean S^2 - 2 mean(S) mean(T) + mean T^2, but nothing large cancels in it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.base import Distiller, stacked_energies
from models.outputs import Outputs
from utils.errors import ParameterError

USUAL_BLOCKS = 3  # of the teacher, where nobody says how many
SMALLEST_SQUARE = 1e-24  # of the norm of a map: F.normalize's smallest norm is 1e-12


def attention_similarity(blocks: Sequence[Tensor]) -> Tensor:
    """G of each block: n maps (b, c_i, h_i, w_i) -> (n, b, b)."""
    return torch.cat([_similarity(energy.flatten(-2)) for energy in stacked_energies(blocks)])


def _similarity(energy: Tensor) -> Tensor:
    """`rownorm(a a^T)` for `a = normalize(energy)`: (n, b, h * w) -> (n, b, b).

    The product comes first, for it is smaller than the maps: its diagonal holds the squares of their norms, of which those
    of the rows cancel.
    """
    products = energy @ energy.mT
    squares = products.diagonal(dim1=-2, dim2=-1).clamp_min(SMALLEST_SQUARE)  # or a map of zeros would give NaN
    return F.normalize(products * squares.rsqrt().unsqueeze(-2), dim=-1)


def hap_loss(student_blocks: Sequence[Tensor], teacher_blocks: Sequence[Tensor]) -> Tensor:
    """Maps (b, c_i, h_i, w_i) of the blocks to compare, every pair of them -> 0-dim loss."""
    student, teacher = attention_similarity(student_blocks), attention_similarity(teacher_blocks)  # (n_s, b, b), (n_t, b, b)
    student_mean, teacher_mean = student.mean(0), teacher.mean(0)
    between = F.mse_loss(student_mean, teacher_mean)
    within = F.mse_loss(student, student_mean.expand_as(student)) + F.mse_loss(teacher, teacher_mean.expand_as(teacher))
    return between + within


class HAP(Distiller):
    """Similarity of a batch's attention maps: every block of the student with the last blocks of the teacher."""

    def __init__(self, student: Outputs, teacher: Outputs, *, hap_ts: int | None):
        super().__init__()
        if hap_ts is None:
            hap_ts = min(USUAL_BLOCKS, len(teacher.blocks))
        if not 1 <= hap_ts <= len(teacher.blocks):
            raise ParameterError("hap_ts", hap_ts, f"the teacher has {len(teacher.blocks)} blocks: choose from 1 to that")
        self.teacher_blocks = hap_ts

    def setting(self) -> str:
        return f"ts {self.teacher_blocks}"

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        return hap_loss(student.blocks, teacher.blocks[-self.teacher_blocks :])
