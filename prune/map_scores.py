"""What criteria make of the feature maps of one layer: a number for each image and filter, of which the mean is the score."""

import math

import torch
from torch import Tensor

# The trapezoidal rule on exp(u) converges as exp(-pi^2 / step) here: the nearest singularity is pi / 2 from the real axis.
STEP = 0.5
TAIL = 18.0  # how far beyond the singular values, in powers of e; the integrand falls as exp(-|u|)
MAX_POINTS = 1 << 22  # of an intermediate tensor


def map_ranks(maps: Tensor) -> Tensor:
    """The rank of each map of `maps` (B, F, H, W), as (B, F).

    As `torch.linalg.matrix_rank` counts it in float32: the singular values above max(H, W) times the precision of float32 of
    the largest. They come from the Gram matrix in float64, which is exact enough for that and much faster on a CPU.
    """
    maps = maps.double()
    if maps.shape[2] > maps.shape[3]:
        maps = maps.transpose(2, 3)
    squares = torch.linalg.eigvalsh(maps @ maps.transpose(2, 3))  # (B, F, min(H, W)), ascending
    tolerance = max(maps.shape[2:]) * torch.finfo(torch.float32).eps
    return (squares > tolerance**2 * squares[..., -1:]).sum(2)


def channel_independence(maps: Tensor) -> Tensor:
    """`nuclear(A) - nuclear(A without row i)` for A (F, H * W), the maps of an image, as (B, F); Sui et al., eq. 2 and 3.

    From one eigendecomposition an image in place of F singular value decompositions. With G = A A^T and the eigenvalues m_j of
    G without row and column i, the Schur complement gives `prod(l_k + t) / prod(m_j + t) = 1 / [(G + t)^-1]_ii`, and
    `sqrt(x) = 1 / (2 pi) * integral of log(1 + x / t) / sqrt(t) dt` turns the difference of the two sums of square roots into

        -1 / pi * integral over s > 0 of log(sum_k q_ik^2 s^2 / (l_k + s^2)) ds,

    q_i the i-th row of the eigenvectors. The integrand is analytic in u = log(s), so the trapezoidal rule there is exact to
    2e-7 of the largest singular value with seventy points.
    """
    rows = maps.double().flatten(2)  # (B, F, H * W)
    squares, shares = _spectrum(rows)
    largest = squares.amax(1).clamp(min=torch.finfo(torch.float64).tiny).sqrt()  # (B,)
    squares = squares / largest.square()[:, None]  # in units of the largest singular value
    grid = torch.arange(-TAIL, TAIL / 2, STEP, dtype=torch.float64, device=maps.device).exp()  # s, (N,)
    grid = torch.cat([grid, grid[-1] * torch.arange(1, TAIL / 2 / STEP, device=maps.device).mul(STEP).exp()])
    pieces = max(1, MAX_POINTS // (rows.shape[1] * len(grid)))
    integrals = [_integral(*piece, grid=grid) for piece in zip(squares.split(pieces), shares.split(pieces), strict=True)]
    return torch.cat(integrals) * largest[:, None] / math.pi


def _spectrum(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues (B, K) of A A^T that may not be 0, and `q_ik^2` (B, F, K), from the smaller of the two Gram matrices."""
    if rows.shape[1] <= rows.shape[2]:
        squares, vectors = torch.linalg.eigh(rows @ rows.transpose(1, 2))
        return squares.clamp(min=0), vectors.square()
    squares, vectors = torch.linalg.eigh(rows.transpose(1, 2) @ rows)
    squares = squares.clamp(min=0)
    lengths = (rows @ vectors).square()  # of each row along each direction: l_k q_ik^2
    present = squares > torch.finfo(torch.float64).eps * rows.shape[1] * squares[:, -1:]
    return squares, torch.where(present[:, None], lengths / squares.clamp(min=torch.finfo(torch.float64).tiny)[:, None], 0)


def _integral(squares: Tensor, shares: Tensor, *, grid: Tensor) -> Tensor:
    """`-integral of log(sum_k q_ik^2 s^2 / (l_k + s^2)) ds` over the `grid` of s, (B, F)."""
    damping = squares[:, :, None] / (squares[:, :, None] + grid.square())  # (B, K, N): 1 - s^2 / (l_k + s^2)
    return -torch.log1p(-(shares @ damping).clamp(max=1 - torch.finfo(torch.float64).eps)) @ (grid * STEP)
