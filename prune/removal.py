"""The order in which channels go by what their readers lose, each reader mended after every channel.

The greedy choice of Luo et al., "ThiNet", ICCV 2017, with the least squares of He et al., "Channel Pruning for Accelerating Very
Deep Neural Networks", ICCV 2017, solved exactly at every step. With X the rows that a layer reads, W its weight, H = X'X + r I,
and J the columns of a channel, what remains of

    min over V with V_J = 0 of  ||X V - X W||^2 + r ||V - W||^2   is   tr(W_J' ([H^-1]_JJ)^-1 W_J),

reached at V = W - [H^-1]_:J ([H^-1]_JJ)^-1 W_J (Hassibi & Stork, "Optimal Brain Surgeon", NeurIPS 1992, for blocks). Without the
channel, [H^-1] becomes [H^-1] - [H^-1]_:J ([H^-1]_JJ)^-1 [H^-1]_J:, so that one inverse a layer serves all channels in turn. A
channel with several readers loses the sum of what they lose, each over the squares of what it gives. Deviations: no sampling of
positions, an error of the mended layer in place of that of the plain sum, and the penalty r of `prune.reconstruction`.

Nothing mends a sum or a product: filters that meet others there, and may go without them, go by the variance of their own map.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.graph import ChannelGraph
from models.graph.groups import ChannelGroup, Member, deciding_group, filters_read
from models.graph.layers import PrunableLayer
from models.graph.statistics import Moments, groups_of, is_linear_map, weight_matrix
from models.graph.walk import Inputs
from prune.gradients import batch_size, called
from prune.reconstruction import RIDGE
from utils.errors import ParameterError, UserError
from utils.modes import without_trace

ROWS_PER_UNKNOWN = 8  # of a reader, whose sums take no more
MOST_IMAGES = 1024  # of a pass, for readers of one row an image


@dataclass
class Reader:
    """The least squares of one reader, or of one group of a grouped one: `inverse` (k, k) of X'X + r I and `weight` (k, outputs).

    `columns` (channels, m) are those of each channel that may go, `present` (channels, m) where there is one.
    """

    inverse: Tensor
    weight: Tensor
    columns: Tensor
    present: Tensor

    @classmethod
    def of(cls, gram: Tensor, weight: Tensor, columns: Sequence[Sequence[int]], *, penalised: int, ridge: float) -> "Reader":
        """From X'X (k, k), of whose columns the first `penalised` are weights and the next, if any, the constant."""
        diagonal = gram.diagonal()[:penalised]
        live = diagonal.ne(0)
        strength = torch.where(live.any(), ridge * diagonal.sum() / live.sum().clamp(min=1), 1.0)
        system = gram.clone()
        system.diagonal()[:penalised] += strength
        weight = weight.clone()
        weight[:penalised][~live] = 0  # what is always 0 is not missed
        energy = ((gram @ weight) * weight).sum().clamp(min=torch.finfo(torch.float64).tiny)
        factor, failed = torch.linalg.cholesky_ex(system)
        if failed:
            raise UserError("removal order: the products of what a layer reads are singular: are its inputs finite?")
        widest = max(map(len, columns))
        padded = torch.tensor([[*own, *[0] * (widest - len(own))] for own in columns], device=gram.device)
        present = torch.tensor([[place < len(own) for place in range(widest)] for own in columns], device=gram.device)
        return cls(torch.cholesky_inverse(factor), weight / energy.sqrt(), padded, present)

    def losses(self) -> Tensor:
        """(channels,): the squares that this reader loses without each channel alone, mended, over those of what it gives."""
        rows = self.weight[self.columns] * self.present.unsqueeze(2)  # (channels, m, outputs)
        blocks = self.inverse[self.columns.unsqueeze(2), self.columns.unsqueeze(1)]  # (channels, m, m)
        pairs = self.present.unsqueeze(2) & self.present.unsqueeze(1)
        blocks = torch.where(pairs, blocks, torch.eye(blocks.shape[1], dtype=blocks.dtype, device=blocks.device))
        return (torch.linalg.solve(blocks, rows) * rows).sum((1, 2))

    def remove(self, channel: int) -> None:
        """Mends the weight for the loss of `channel`, and takes its columns out of the inverse; it costs nothing afterwards."""
        own = self.columns[channel][self.present[channel]]
        if not len(own):
            return
        across = self.inverse[:, own]  # (k, m)
        solved = torch.linalg.solve(across[own], torch.cat([self.weight[own], across.T], 1))  # (m, outputs + k)
        outputs = self.weight.shape[1]
        self.weight -= across @ solved[:, :outputs]
        self.inverse -= across @ solved[:, outputs:]
        self.weight[own], self.inverse[own], self.inverse[:, own] = 0, 0, 0
        self.inverse[own, own] = 1
        self.present[channel] = False


def greedy_order(readers: Sequence[Reader]) -> list[int]:
    """The channels in the order in which they go, the least loss first and of equal ones the lower index; changes `readers`."""
    channels = len(readers[0].columns)
    gone = torch.zeros(channels, dtype=torch.bool, device=readers[0].weight.device)
    order = []
    for _ in range(channels):
        losses = torch.stack([reader.losses() for reader in readers]).sum(0)
        channel = int(losses.masked_fill(gone, torch.inf).argmin())
        order.append(channel)
        gone[channel] = True
        for reader in readers:
            reader.remove(channel)
    return order


def removal_order(
    graph: ChannelGraph,
    families: Sequence[Sequence[ChannelGroup]],
    batches: Iterable[tuple[Inputs, Any]],
    *,
    layers: Sequence[PrunableLayer],
    ridge: float = RIDGE,
    all_reduce: Callable[[Tensor], object] | None = None,
) -> dict[str, Tensor]:
    """(F,) by layer name, in float64: the place of each filter in the order of its family, 1 for the first that goes.

    `families` are the groups that stay or go together (`models.graph.groups`), those of the same layers in one list. One pass in
    evaluation over `batches` of (inputs, anything) on the network's device, which ends when each reader has had
    `ROWS_PER_UNKNOWN` rows for each of its columns, or after `MOST_IMAGES` images; labels are not looked at. It leaves no
    trace. Among several processes `all_reduce` adds a tensor up over them in place; all of them then return the same.

    Raises UserError for no batch at all, or for what is not finite.
    """
    read = _readable(graph, filters_read(graph))
    moments, variances = _sums(graph.network, list(read), batches, layers=layers, all_reduce=all_reduce)
    order = {name: 1 + own.argsort(stable=True).argsort().double() for name, own in variances.items()}
    for family in families:
        readers = _readers_of(graph.network, family, read, moments, ridge=ridge)
        if readers:
            places = greedy_order(readers)
        elif len(family[0].filters) > 1:
            means = {name: variances[name].mean().clamp(min=torch.finfo(torch.float64).tiny) for name in family[0].layers}
            shares = [sum(float(variances[name][i] / means[name]) for name, i in group.filters) for group in family]
            places = sorted(range(len(family)), key=shares.__getitem__)
        else:
            continue
        for place, channel in enumerate(places, start=1):
            for name, own in family[channel].filters:
                if name in order:
                    order[name][own] = place
    return order


def _readable(graph: ChannelGraph, read: Mapping[str, Sequence[frozenset[Member]]]) -> dict[str, Sequence[frozenset[Member]]]:
    """Those of the layers that are linear maps of the channels that they are said to read."""
    found = {}
    for name, channels in read.items():
        layer = graph.network.get_submodule(name)
        if is_linear_map(layer) and channels:
            groups, _, columns = weight_matrix(layer).shape
            if len(channels) % groups == 0 and columns % (len(channels) // groups) == 0:
                found[name] = channels
    return found


def _readers_of(
    network: nn.Module,
    family: Sequence[ChannelGroup],
    read: Mapping[str, Sequence[frozenset[Member]]],
    moments: Mapping[str, Moments],
    *,
    ridge: float,
) -> list[Reader]:
    """What reads channels of the family that vanish with its groups; none where some group is read by nothing of the kind."""
    owner = {member: place for place, group in enumerate(family) for member in group.filters}
    readers, are_read = [], set()
    for name, channels in read.items():
        layer = network.get_submodule(name)
        if groups_of(layer) > 1 and name in family[0].layers:
            continue  # its filters go with what they read
        places = [deciding_group(members, owner, family) for members in channels]
        for group, own in enumerate(_chunks(places, groups_of(layer))):
            if any(place is not None for place in own):
                readers.append(_reader(layer, moments[name], own, group=group, channels=len(family), ridge=ridge))
                are_read.update(own)
    return readers if are_read >= {*range(len(family))} else []


def _chunks(places: list[int | None], groups: int) -> Iterator[list[int | None]]:
    size = len(places) // groups
    return (places[first : first + size] for first in range(0, len(places), size))


def _reader(
    layer: nn.Module, moments: Moments, places: Sequence[int | None], *, group: int, channels: int, ridge: float
) -> Reader:
    matrix = weight_matrix(layer)[group].detach().double().mT  # (columns, outputs)
    inputs, width = len(matrix), len(matrix) // len(places)
    if moments.constant:
        matrix = torch.cat([matrix, layer.bias.detach().double().view(groups_of(layer), -1)[group : group + 1]])
    columns: list[list[int]] = [[] for _ in range(channels)]
    for position, place in enumerate(places):
        if place is not None:
            columns[place] += range(position * width, (position + 1) * width)
    return Reader.of(moments.gram[group], matrix, columns, penalised=inputs, ridge=ridge)


def _sums(
    network: nn.Module,
    names: Sequence[str],
    batches: Iterable[tuple[Inputs, Any]],
    *,
    layers: Sequence[PrunableLayer],
    all_reduce: Callable[[Tensor], object] | None,
) -> tuple[dict[str, Moments], dict[str, Tensor]]:
    """X'X of what each of `names` reads, and the variance (F,) of each layer's maps behind the norm that reads them alone."""
    moments = {name: Moments(network.get_submodule(name)) for name in names}
    maps = {layer.name: torch.zeros(3, layer.filters, dtype=torch.float64, device=layer.module.weight.device) for layer in layers}
    images = 0
    with without_trace(network), torch.no_grad(), _listening(network, moments, maps, layers):
        network.eval()
        for inputs, _ in batches:
            called(network, inputs)
            images += batch_size(inputs)
            if images >= MOST_IMAGES or all(map(_has_enough, moments.values())):
                break
    tensors = [*(own.gram for own in moments.values()), *maps.values()]
    for tensor in tensors if all_reduce is not None else ():
        all_reduce(tensor)
    if not any(bool(own[0].any()) for own in maps.values()):
        raise ParameterError("samp_batches", None, "not one training batch to look at what layers read: give 1 or more")
    for name, own in [*((name, own.gram) for name, own in moments.items()), *maps.items()]:
        if not own.isfinite().all():
            raise UserError(f"{name}: what it reads or gives is NaN or infinite; check the network that is pruned")
    variances = {name: own[2] / own[0] - (own[1] / own[0]).square() for name, own in maps.items()}
    return moments, variances


def _has_enough(moments: Moments) -> bool:
    return moments.count >= ROWS_PER_UNKNOWN * moments.columns


@contextmanager
def _listening(
    network: nn.Module, moments: Mapping[str, Moments], maps: Mapping[str, Tensor], layers: Sequence[PrunableLayer]
) -> Iterator[None]:
    """Within it the forward passes of the network add to `moments` and to the count, sum and squares in `maps`."""

    def reads(own: Moments) -> Callable[..., None]:
        return lambda module, inputs: None if _has_enough(own) else own.add(inputs[0])

    def gives(layer: PrunableLayer) -> Callable[..., None]:
        def add(module: nn.Module, inputs: Any, result: Tensor) -> None:
            rows = result.double().movedim(-1 if layer.is_linear else 1, -1).reshape(-1, layer.filters)
            count = torch.full_like(rows[0], len(rows))
            maps[layer.name] += torch.stack([count, rows.sum(0), rows.square().sum(0)])

        return add

    handles = []
    try:
        for name, own in moments.items():
            handles.append(network.get_submodule(name).register_forward_pre_hook(reads(own)))
        for layer in layers:
            handles.append((layer.norm or layer.module).register_forward_hook(gives(layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()
