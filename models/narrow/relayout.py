"""The steps of a narrow network between layers that store different channels of the same map.

They hold nothing but indices, which follow from the channels that are stored on either side.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.graph import Channels


class Relayout(nn.Module):
    """Turns a tensor that stores the channels `source` into one that stores `target`; what it did not have is zero."""

    def __init__(self, source: Channels, target: Channels):
        super().__init__()
        self.axis, self.rank, self.flat = source.axis, source.rank, source.flat
        self.count, self.width = len(source.stored), len(target.stored)
        self.selects = set(target.stored) <= set(source.stored)
        self.fills = set(source.stored) <= set(target.stored)
        place = {channel: place for place, channel in enumerate(source.stored)}
        origins = [place.get(channel, self.count) for channel in target.stored]  # self.count stands for a zero channel
        self.register_buffer("origins", torch.tensor(origins), persistent=False)
        place = {channel: place for place, channel in enumerate(target.stored)}
        places = [place[channel] for channel in source.stored if channel in place]
        self.register_buffer("places", torch.tensor(places, dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.flat:  # (B, C * pixels): the pixels of a channel move with it
            return self._lay_out(x.unflatten(self.axis, (self.count, -1))).flatten(self.axis, self.axis + 1)
        return self._lay_out(x)

    def _lay_out(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not _is_channels_last(x, self.axis):
            return self._lay_out_axis(x, self.axis)
        return as_maps(self._lay_out_axis(as_rows(x), 1), x)

    def _lay_out_axis(self, x: Tensor, axis: int) -> Tensor:
        if self.selects:
            return x.index_select(axis, self.origins)
        if self.fills and not torch.compiler.is_compiling():
            shape = list(x.shape)
            shape[axis] = self.width
            return x.new_zeros(shape).index_add_(axis, self.places, x)  # on a CPU faster than index_copy
        behind = x.dim() - 1 - axis % x.dim()  # axes behind the channels; a compiler fuses this gather with its neighbours
        return F.pad(x, (0, 0) * behind + (0, 1)).index_select(axis, self.origins)


class MaskedRelayout(nn.Module):
    """What the `Relayout` of a map does, as a gather and a product with ones and zeros.

    In graphs of eight bits: OpenVINO 2026.4 ends the process over a gather behind a padding of channels.
    """

    def __init__(self, step: Relayout):
        super().__init__()
        self.axis = step.axis
        missing = step.origins == step.count
        self.register_buffer("origins", step.origins.masked_fill(missing, 0), persistent=False)
        self.register_buffer("mask", (~missing).float().view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(self.axis, self.origins) * self.mask


class AddInto(nn.Module):
    """A sum whose sides store different channels: `part` is added into its places in `whole`, which is widened first if need be.

    On a CPU that is the fastest of the forms tried (docs/architecture.md); compilers and ONNX get a sum of gathers instead,
    which they fuse, and which has a plain kernel everywhere.
    """

    def __init__(self, whole: Channels, part: Channels, total: Channels):
        super().__init__()
        self.axis = total.axis if total.axis > 0 and not total.flat else None  # where channels are added by their place
        self.widen_whole = Relayout(whole, total) if whole.stored != total.stored else nn.Identity()
        self.widen_part = Relayout(part, total)

    def forward(self, whole: Tensor, part: Tensor, *, over: bool = False) -> Tensor:
        """With `over` the sum may replace `whole`."""
        base = self.widen_whole(whole)
        if self.axis is None or torch.compiler.is_compiling() or not _aligned(whole, part, self.axis):
            return base + self.widen_part(part)
        into = base is not whole or (over and may_overwrite())
        if _is_channels_last(base, self.axis):
            return as_maps(self._add(as_rows(base), as_rows(part), 1, into=into), base)
        return self._add(base, part, self.axis, into=into)

    def _add(self, base: Tensor, part: Tensor, axis: int, *, into: bool) -> Tensor:
        add = base.index_add_ if into else base.index_add
        return add(axis, self.widen_part.places, part)


def may_overwrite() -> bool:
    """Whether an operation may write its result over an operand that nothing reads any more."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _aligned(whole: Tensor, part: Tensor, axis: int) -> bool:
    """Whether the tensors differ in nothing but their channels: a sum may also broadcast over pixels, or promote."""
    return whole.dtype == part.dtype and whole.shape[axis + 1 :] == part.shape[axis + 1 :]


def _is_channels_last(x: Tensor, axis: int) -> bool:
    return axis == 1 and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def as_rows(x: Tensor) -> Tensor:
    """(B, C, H, W) as one row a pixel: indexing channels there is twice as fast in channels-last layout, and keeps it."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])  # (B * H * W, C)


def as_maps(rows: Tensor, like: Tensor) -> Tensor:
    batch, _, height, width = like.shape
    return rows.view(batch, height, width, rows.shape[1]).permute(0, 3, 1, 2)


class Relayouts(nn.Module):
    """All steps of a network, of which this is the submodule `name`; those between the same channels are one."""

    def __init__(self, name: str, training: bool):
        super().__init__()
        self.name = name
        self._names: dict[Any, str] = {}
        self.training = training

    def name_of(self, kind: type[nn.Module], *layouts: Channels) -> str:
        """The name, within the network, of the step of this kind between these channels."""
        key = (kind, layouts[0].axis, layouts[0].flat, *(layout.stored for layout in layouts))
        if key not in self._names:
            self._names[key] = str(len(self._names))
            self.add_module(self._names[key], kind(*layouts).train(self.training))
        return f"{self.name}.{self._names[key]}"
