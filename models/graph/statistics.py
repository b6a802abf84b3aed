"""What a layer reads, as rows of a matrix, and the sums over them that least squares and second-order methods ask for.

Every convolution and linear layer is a product of such rows with a matrix of its weight: `y = x W' + b`, in as many blocks as it
has groups.
"""

import math
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.graph.kinds import TRANSPOSED, kind_of

CHUNK_BYTES = 64 << 20  # of the rows that exist at a time


def is_linear_map(layer: nn.Module) -> bool:
    """Whether the layer computes what its class says, from a weight of its own: a convolution of any kind or `nn.Linear`."""
    kind = kind_of(layer)
    if kind is None or layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return False
    return type(layer).forward is kind.module.forward and isinstance(layer._parameters.get("weight"), nn.Parameter)


def groups_of(layer: nn.Module) -> int:
    return getattr(layer, "groups", 1)


def weight_matrix(layer: nn.Module) -> Tensor:
    """The weight as (groups, outputs a group, inputs a group * kernel): what the rows of `input_rows` are multiplied with."""
    weight, groups = layer.weight, groups_of(layer)
    if isinstance(layer, TRANSPOSED):  # (inputs, outputs a group, kernel)
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2)
        return weight.reshape(groups, weight.shape[1], -1)
    return weight.reshape(groups, len(weight) // groups, -1)


@torch.no_grad()
def set_weight_matrix(layer: nn.Module, matrix: Tensor) -> None:
    """Writes what `weight_matrix` gives into the layer."""
    if isinstance(layer, TRANSPOSED):
        _, outputs, *kernel = layer.weight.shape
        matrix = matrix.reshape(groups_of(layer), outputs, -1, *kernel).transpose(1, 2)
    layer.weight.copy_(matrix.reshape(layer.weight.shape))


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """(groups, rows, inputs a group * kernel): what each position of each output of the layer reads of the batch `x`.

    As many rows as the output has positions, image by image.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, layer.in_features)
    dims = len(layer.kernel_size)
    if isinstance(layer, TRANSPOSED):
        windows = _windows(_spread(layer, x), layer.kernel_size, (1,) * dims, layer.dilation).flip([*range(-dims, 0)])
    else:
        windows = _windows(_padded(layer, x), layer.kernel_size, layer.stride, layer.dilation)
    windows = windows.unflatten(1, (layer.groups, -1))  # (B, groups, inputs a group, *positions, *kernel)
    positions, kernel = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
    rows = windows.permute(1, 0, *positions, 2, *kernel)
    return rows.reshape(layer.groups, math.prod(rows.shape[1 : 2 + dims]), -1)


def output_rows(layer: nn.Module, y: Tensor) -> Tensor:
    """(groups, rows, outputs a group): the output `y` of the layer in the order of `input_rows`."""
    if isinstance(layer, nn.Linear):
        return y.reshape(1, -1, y.shape[-1])
    groups = y.unflatten(1, (layer.groups, -1)).movedim(1, 0).movedim(2, -1)  # (groups, B, *positions, outputs a group)
    return groups.reshape(layer.groups, -1, groups.shape[-1])


def _windows(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """A view (B, C, *positions, *kernel) of the maps (B, C, *sizes)."""
    for dim, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(dim, gap * (size - 1) + 1, step)[..., ::gap]
    return x


def _padded(conv: nn.Module, x: Tensor) -> Tensor:
    if conv.padding == "valid":
        return x
    if conv.padding == "same":
        totals = [gap * (size - 1) for size, gap in zip(conv.kernel_size, conv.dilation, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(width, width) for width in conv.padding]
    widths = [*chain.from_iterable(reversed(sides))]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, widths, mode=mode) if any(widths) else x


def _spread(conv: nn.Module, x: Tensor) -> Tensor:
    """The maps with the zeros between and around them that make a transposed convolution an ordinary one."""
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], conv.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    spread[(..., *(slice(None, None, step) for step in conv.stride))] = x
    extents = zip(conv.kernel_size, conv.dilation, conv.padding, conv.output_padding, strict=True)
    sides = [(gap * (size - 1) - cut, gap * (size - 1) - cut + more) for size, gap, cut, more in extents]
    return F.pad(spread, [*chain.from_iterable(reversed(sides))])


class Moments:
    """Sums over the rows X that a layer reads, and over those Y that it is to give: X'X, X'Y and the squares of Y, in float64.

    `gram` (groups, k, k), `cross` (groups, k, outputs a group), `squares` (groups, outputs a group); `count` is how many rows
    there were. With `constant`, which stands for a bias, the last of the k columns of X is 1; without it where the layer has
    one. Products of single batches are in `dtype`. What is added in the same order gives the same bits.
    """

    def __init__(self, layer: nn.Module, *, constant: bool | None = None, dtype: torch.dtype = torch.float64):
        self.layer, self.count, self.dtype = layer, 0, dtype
        groups, outputs, inputs = weight_matrix(layer).shape
        self.constant = layer.bias is not None if constant is None else constant
        self.columns = inputs + self.constant
        zeros = layer.weight.new_zeros((), dtype=torch.float64)
        self.gram = zeros.new_zeros(groups, self.columns, self.columns)
        self.cross = zeros.new_zeros(groups, self.columns, outputs)
        self.squares = zeros.new_zeros(groups, outputs)

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor | None = None, *, every: int = 1) -> None:
        """Adds what the layer reads of the batch `x` and, where it is given, the output `y` (as the layer's, its own rows).

        Of the rows only each `every`-th is taken.
        """
        for part in self._parts(x):
            rows = input_rows(self.layer, x[part].to(self.dtype))[:, ::every]
            if self.constant:
                rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
            self.gram += rows.mT @ rows
            self.count += rows.shape[1]
            if y is not None:
                wanted = output_rows(self.layer, y[part].to(self.dtype))[:, ::every]
                self.cross += rows.mT @ wanted
                self.squares += wanted.square().sum(1)

    def _parts(self, x: Tensor) -> list[slice]:
        """The batch in pieces whose rows fit into memory."""
        positions = input_rows(self.layer, x[:1]).shape[1]
        images = max(1, CHUNK_BYTES // (8 * positions * self.columns * len(self.gram)))
        return [slice(first, first + images) for first in range(0, len(x), images)]

    def errors(self, matrix: Tensor) -> Tensor:
        """(groups, outputs a group): the sum of `(x w - y)^2` for each row w of `matrix` (groups, outputs a group, k)."""
        columns = matrix.mT
        quadratic = (columns * (self.gram @ columns - 2 * self.cross)).sum(1)
        return (quadratic + self.squares).clamp(min=0)
