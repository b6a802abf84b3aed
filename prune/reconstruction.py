"""What is left of a pruned network gives what the same layers gave before, as nearly as their weights can.

Least squares as in He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, and Luo et al., "ThiNet",
ICCV 2017, over all layers in turn. With X the rows that a layer reads in the pruned network, in which everything before it is
mended already, and Y what the same layer gave in the unpruned one for the same images, its surviving weights W0 become

    argmin over W of ||X W - Y||^2 + r ||W - W0||^2,    r = 0.001 times the mean of the diagonal of X'X,

with a bias, where there is one, in the same system and free of the penalty. No label, no gradient, no step of an optimizer.
Inputs that are always 0 count in no mean and keep their weights, so that a network with zeros in the place of pruned filters is
mended as the small one is. Each network runs once, layer by layer, over all images.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.graph.statistics import Moments, groups_of, set_weight_matrix, weight_matrix
from models.graph.walk import Inputs, walkable
from models.narrow import NarrowNetwork
from utils.errors import UserError
from utils.modes import evaluating

RIDGE = 1e-3
UNCHANGED = 1e-10  # of the squares of an output: rounding of two forward passes is below, and nothing is to be mended


@dataclass(frozen=True)
class LayerFit:
    """What became of one layer: its squared error over that of giving nothing, before and after, on the images that were used.

    `positions` rows of `unknowns` numbers were there for each filter. Of the `filters` that are not 0, `left` kept their weights
    although they have an error: what was found would have made it larger.
    """

    name: str
    before: float
    after: float
    positions: int
    unknowns: int
    filters: int
    left: int

    @property
    def is_scarce(self) -> bool:
        """Whether there were fewer equations than unknowns, so that the penalty decides."""
        return self.positions < self.unknowns


def reconstruct(
    small: nn.Module,
    network: nn.Module,
    batches: Iterable[Inputs],
    *,
    ridge: float = RIDGE,
    on_layer: Callable[[LayerFit], object] | None = None,
) -> list[LayerFit]:
    """Mends the convolutions and linear layers of `small`, in place, and says what became of each, in their order.

    `small` is what is left of the unpruned `network`: a narrow network of it, or one of its own shapes with zeros. `batches` are
    inputs of both, on their device: a tensor each, or several in a tuple or mapping. They are held, with the results of all of
    them that are still to be read. Layers that are called more than once, share their weight or compute it are left as they are,
    and so is a filter whose weights are all 0. A layer's own error never becomes larger. The same inputs give the same bits.

    `on_layer` hears of each layer. Raises UserError for no images, images that are all equal, outputs that are not finite, and
    networks that torch.fx cannot trace or that do not belong together.
    """
    batches = list(batches)
    _check_batches(batches)
    mended, unpruned = walkable(small, batches[0]), walkable(network, batches[0])
    names = [name for name in mended.nodes if name in unpruned.nodes]
    _check_pair(small, network, names)
    fits = []
    with evaluating(small, network), _repeatable():
        here, there = mended.walk(batches), unpruned.walk(batches)
        for name in names:
            layer, rows = mended.owner.get_submodule(name), _dense_rows(small, name)
            moments = Moments(layer)
            inputs, outputs = here.before(mended.nodes[name]), there.after(unpruned.nodes[name])
            for x, y in zip(inputs, outputs, strict=True):
                moments.add(x, y if rows is None else y.index_select(-1 if isinstance(layer, nn.Linear) else 1, rows))
            fits.append(_fit(name, layer, moments, ridge=ridge))
            if on_layer is not None:
                on_layer(fits[-1])
    return fits


def _check_batches(batches: Sequence[Inputs]) -> None:
    """Raises UserError for no images at all, and for images that are all the same."""
    first = [_tensors(batch)[0] for batch in batches]
    if not sum(map(len, first)):
        raise UserError("reconstruction: not one image to mend the layers by: give 1 or more")
    alike = torch.stack([(images == first[0][:1]).all() for images in first])
    if sum(map(len, first)) > 1 and bool(alike.all()):
        raise UserError(
            f"reconstruction: the {sum(map(len, first))} images are all equal: they say nothing of how outputs differ"
        )


def _tensors(batch: Inputs) -> Sequence[Tensor]:
    return [batch] if isinstance(batch, Tensor) else [*batch.values()] if isinstance(batch, Mapping) else batch


def _check_pair(small: nn.Module, network: nn.Module, names: Sequence[str]) -> None:
    """Raises UserError unless `small` can be what is left of `network`."""
    if not names:
        raise UserError(f"{type(network).__name__}: the two networks have no convolution or linear layer of one name")
    for name in names:
        dense = network.get_submodule(name).weight.shape
        key = f"{name}.weight"
        found = (
            small.widened(key, small.stored(key)[0]).shape
            if isinstance(small, NarrowNetwork)
            else small.get_submodule(name).weight.shape
        )
        if found != dense:
            raise UserError(f"{key}: {tuple(found)} is not what is left of {tuple(dense)}: are the two of one architecture?")


def _dense_rows(small: nn.Module, name: str) -> Tensor | None:
    """The outputs of the dense layer that are left in `small`; None where all are."""
    layer = small.get_submodule(name)
    if not isinstance(small, NarrowNetwork):
        return None
    tensor, rows = small.stored(f"{name}.weight")
    outputs = groups_of(layer) * weight_matrix(layer).shape[1]
    axis = small.output_axis(f"{name}.weight")
    complete = small.widened(f"{name}.weight", tensor).shape[axis] == tensor.shape[axis]
    return None if complete or len(rows) != outputs else torch.tensor(rows, device=tensor.device)


def _fit(name: str, layer: nn.Module, moments: Moments, *, ridge: float) -> LayerFit:
    """Writes the least squares into `layer`, filter by filter where they make the error smaller."""
    if not bool(moments.cross.isfinite().all() & moments.gram.isfinite().all()):
        raise UserError(f"{name}: what it reads or gives is NaN or infinite; check the network that is pruned")
    own = _with_bias(layer, weight_matrix(layer).double())
    before, silent = moments.errors(own), moments.squares
    found = _rounded(layer, own + _correction(layer, moments, own, ridge=ridge))
    after = moments.errors(found)
    live = own.ne(0).any(2)
    mends = live & (before > UNCHANGED * silent)
    better = mends & (after < before)
    result = torch.where(better.unsqueeze(2), found, own)
    inputs = weight_matrix(layer).shape[2]
    set_weight_matrix(layer, result[..., :inputs])
    if layer.bias is not None:
        with torch.no_grad():
            layer.bias.copy_(result[..., inputs].flatten())
    energy = (silent * live).sum().clamp(min=torch.finfo(torch.float64).tiny)
    sums = [(before * live).sum() / energy, (torch.where(better, after, before) * live).sum() / energy]
    numbers = torch.stack([*sums, live.sum(), (mends & ~better).sum()]).tolist()
    return LayerFit(name, numbers[0], numbers[1], moments.count, moments.columns, int(numbers[2]), int(numbers[3]))


def _correction(layer: nn.Module, moments: Moments, own: Tensor, *, ridge: float) -> Tensor:
    """(groups, outputs a group, k): the solution less what the layer has now, `own`, of the same shape.

    `(X'X + r I) (W - W0) = X'Y - X'X W0`, whose right side is 0 for an input that is always 0.
    """
    inputs = moments.columns - (layer.bias is not None)
    diagonal = moments.gram.diagonal(dim1=1, dim2=2)[:, :inputs]
    present = diagonal.ne(0).sum(1)
    strength = torch.where(present > 0, ridge * diagonal.sum(1) / present.clamp(min=1), 1.0)  # (groups,)
    system = moments.gram.clone()
    system.diagonal(dim1=1, dim2=2)[:, :inputs] += strength[:, None]
    factor, _ = torch.linalg.cholesky_ex(system)
    return torch.cholesky_solve(moments.cross - moments.gram @ own.mT, factor).mT


def _with_bias(layer: nn.Module, matrix: Tensor) -> Tensor:
    if layer.bias is None:
        return matrix
    return torch.cat([matrix, layer.bias.double().view(*matrix.shape[:2], 1)], 2)


def _rounded(layer: nn.Module, matrix: Tensor) -> Tensor:
    return matrix.to(layer.weight.dtype).double()


@contextlib.contextmanager
def _repeatable() -> Iterator[None]:
    """Without what makes products faster and less exact, or differs from run to run."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
