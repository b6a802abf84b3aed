"""AFD: Ji, Heo, Park, "Show, Attend and Distill: Knowledge Distillation via Attention-Based Feature Matching", AAAI 2021.

    attention_ts = softmax_s((key_ts . query_t + p_t . p_s) / sqrt(128))
    L = sum over t of mean over images of sum_s attention_ts * mean((v_s - v_t)^2)

Query of the teacher's block t: Linear + BN of its global average pool. Key of the student's block s: Linear + BN + ReLU,
then one Linear + BN for all s that gives 128 numbers for each t. Value: `normalize(vec(mean_c f^2))`, the student's
average-pooled to the teacher's size. Equations 1 to 5; layers as in the official code.

Deviations, in form and not in function: a bias that batch norm or the softmax cancels is left out; batch norm keeps no
running statistics, for the loss is a thing of training; the (b, s, t, 128) keys, most of the cost, are never built.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.base import Distiller, attention_map, full_precision_type, stacked_energies
from models.outputs import Outputs

WIDTH = 128  # of queries and keys
MANY_BLOCKS = 50  # above it (ResNet-110 has 54) every second block is a candidate
BN_EPSILON = 1e-5


def afd_loss(attention: Tensor, distances: Tensor) -> Tensor:
    """(b, n_t, n_s) attention, summing to 1 over student blocks, and `value_distances` -> 0-dim loss."""
    return (attention * distances).sum((1, 2)).mean()


def value_distances(student_blocks: Sequence[Tensor], teacher_blocks: Sequence[Tensor]) -> Tensor:
    """`mean((v_s - v_t)^2)` of every pair of blocks: n_s and n_t maps (b, c_i, h_i, w_i) -> (b, n_t, n_s)."""
    student_energies = stacked_energies(student_blocks)
    rows = []
    for teacher_energy in stacked_energies(teacher_blocks):  # (n, b, h, w)
        values = attention_map(teacher_energy).view_as(teacher_energy)
        rows.append(torch.cat([_energy_distances(student, values) for student in student_energies], dim=2))
    return torch.cat(rows, dim=1)


def _energy_distances(student: Tensor, teacher_values: Tensor) -> Tensor:
    """Energies (n_s, b, h, w) and values (n_t, b, H, W) -> (b, n_t, n_s), at the teacher's size."""
    values = teacher_values.flatten(-2)  # (n_t, b, H * W)
    squares = torch.linalg.vector_norm(values, dim=-1).square()
    coarse, fine = student.shape[-2:], teacher_values.shape[-2:]
    repeats = [own // other for own, other in zip(fine, coarse, strict=True)]
    is_fraction = [count * other for count, other in zip(repeats, coarse, strict=True)] == list(fine)
    if is_fraction and coarse != fine:
        # Pooled to the finer size, the student's map repeats each value. Its products with the teacher's are those of the
        # values themselves with the sums of the teacher's over the places where they are repeated.
        count = math.prod(repeats)
        sums = count * F.avg_pool2d(teacher_values, repeats).flatten(-2)
        return _mean_squared_differences(attention_map(student), sums / math.sqrt(count), squares, size=values.shape[-1])
    return _mean_squared_differences(attention_map(student, fine), values, squares, size=values.shape[-1])


def _mean_squared_differences(student: Tensor, teacher: Tensor, teacher_squares: Tensor, *, size: int) -> Tensor:
    """Values (n_s, b, d), (n_t, b, d) to multiply and the teacher's squares (n_t, b) -> (b, n_t, n_s).

    The differences themselves would be n_s * n_t maps of `size` numbers.
    """
    # Values have length 1, or 0 where a map is all zero: that does not change with the student.
    student_squares = torch.linalg.vector_norm(student.detach(), dim=-1).square()  # (n_s, b)
    products = torch.einsum("tbd,sbd->bts", teacher, student)
    return (student_squares.T.unsqueeze(1) + teacher_squares.T.unsqueeze(2) - 2 * products) / size


def bilinear_scores(key: Tensor, query: Tensor, weight: Tensor, gain: Tensor) -> Tensor:
    """`BN(Linear(key)) . query`: (b, n_s, d), (b, n_t, q), weight (n_t, q, d), BN weight (n_t, q) -> (b, n_t, n_s).

    BN's mean and variance over images and student blocks follow from the keys' covariance, so the linear map can be
    applied to the queries, of which there are fewer. BN's bias would add the same to every s, which the softmax cancels.
    """
    key = key - key.mean((0, 1))
    rows = key.flatten(0, 1)  # (b * n_s, d)
    covariance = rows.mT @ rows / rows.shape[0]
    variance = ((weight @ covariance) * weight).sum(-1).clamp_min(0)  # (n_t, q); reduced-precision products can dip below 0
    gain = gain * torch.rsqrt(variance + BN_EPSILON)
    directions = torch.einsum("btq,tqd->btd", query * gain, weight)
    return directions @ key.mT


class _BlockProjection(nn.Module):
    """Linear + BN of every block's pooled channels to WIDTH: n times (b, c_i) -> (b, n, WIDTH)."""

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(count, WIDTH, bias=False) for count in channels)
        self.gain = nn.Parameter(torch.ones(len(channels), WIDTH))
        self.bias = nn.Parameter(torch.zeros(len(channels), WIDTH))

    def forward(self, pooled: Sequence[Tensor]) -> Tensor:
        x = torch.stack([linear(block) for linear, block in zip(self.linears, pooled, strict=True)], dim=1)
        # Written out, for a batch of one image, which nn.BatchNorm1d refuses, has an answer too: the bias.
        variance, mean = torch.var_mean(x, dim=0, correction=0)  # (n, WIDTH)
        return (x - mean) * (self.gain * torch.rsqrt(variance + BN_EPSILON)) + self.bias


class AFD(Distiller):
    """Attention-based feature matching. Its parameters train with the student's and belong in the checkpoint."""

    def __init__(self, student: Outputs, teacher: Outputs):
        super().__init__()
        student_channels = [block.shape[1] for block in candidates(student.blocks)]
        teacher_channels = [block.shape[1] for block in candidates(teacher.blocks)]
        self.key = _BlockProjection(student_channels)
        self.query = _BlockProjection(teacher_channels)
        self.bilinear = nn.Parameter(torch.empty(len(teacher_channels), WIDTH, WIDTH))
        self.bilinear_gain = nn.Parameter(torch.ones(len(teacher_channels), WIDTH))
        self.student_position = nn.Parameter(torch.empty(len(student_channels), WIDTH))
        self.teacher_position = nn.Parameter(torch.empty(len(teacher_channels), WIDTH))
        nn.init.uniform_(self.bilinear, -1 / math.sqrt(WIDTH), 1 / math.sqrt(WIDTH))  # as nn.Linear does
        nn.init.xavier_normal_(self.student_position)
        nn.init.xavier_normal_(self.teacher_position)

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        student_blocks, teacher_blocks = candidates(student.blocks), candidates(teacher.blocks)
        attention = self.attention(student_blocks, teacher_blocks)
        return afd_loss(attention, value_distances(student_blocks, teacher_blocks))

    def attention(self, student_blocks: Sequence[Tensor], teacher_blocks: Sequence[Tensor]) -> Tensor:
        """How much each teacher block attends to each student block: (b, n_t, n_s), summing to 1 over n_s."""
        key = self.key([_global_average(block) for block in student_blocks]).relu()
        query = self.query([_global_average(block) for block in teacher_blocks])
        scores = bilinear_scores(key, query, self.bilinear, self.bilinear_gain)
        scores = scores + self.teacher_position @ self.student_position.T
        return torch.softmax(scores / math.sqrt(WIDTH), dim=-1)


def _global_average(block: Tensor) -> Tensor:
    """(b, c, h, w) -> (b, c), in full precision."""
    # The gradient of a sum is a view, that of a mean is a new tensor of the map's size.
    return block.sum((2, 3), dtype=full_precision_type(block)) / block[0, 0].numel()


def candidates(blocks: Sequence[Tensor]) -> Sequence[Tensor]:
    """The blocks that AFD matches: all, or of very deep networks every second one, the last included."""
    return blocks[1::2] if len(blocks) > MANY_BLOCKS else blocks
