"""Weight sharing: Han et al., "Deep Compression", ICLR 2016, section 3.

Each layer gets a codebook of at most 2^bits values by k-means over its non-zero weights; zeros stay zero. From then on the
codebook is the layer's parameter and `weight = codebook[index]`, so that autograd sums the gradients of all weights in a
cluster, which is the paper's update, and any optimizer works. Weight decay acts on a shared value once, not once a weight.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quantize.settings import QUAN_MODES
from utils.errors import ParameterError, UserError

LAYER_KINDS: dict[str, tuple[type[nn.Module], ...]] = dict(
    zip(QUAN_MODES, ((nn.Conv2d, nn.Linear), (nn.Conv2d,), (nn.Linear,)), strict=True)
)
MAX_BITS = 16
MAX_ITERATIONS = 300  # this and the tolerance are scikit-learn's
TOLERANCE = 1e-4  # of the values' variance


class SharedWeight(nn.Module):
    """Parametrization of a weight by its codebook: (K,) shared values -> weight (F, C, ...), in the memory layout of `like`.

    `index` (N,) belongs to the elements of `like` in the order of their logical positions: 0 stands for the fixed value
    zero, which is no entry of the codebook, and i + 1 for `codebook[i]`. A new weight assigned to the layer must share its
    values in the same way.
    """

    def __init__(self, index: Tensor, *, entries: int, like: Tensor):
        super().__init__()
        self.entries = entries
        self.order = sorted(range(like.dim()), key=lambda axis: -like.stride(axis))  # a convolution's may be channels-last
        self.order_back = [self.order.index(axis) for axis in range(like.dim())]
        stored = index.view(like.shape).permute(self.order)
        self.stored_shape = stored.shape
        # gradients are added up row by row: in parallel, always in the same order, with few collisions on a GPU
        rows = stored.shape[0] if 0 < stored.shape[0] * (entries + 1) <= index.numel() else 1
        self.register_buffer("index", stored.reshape(rows, -1))

    def forward(self, codebook: Tensor) -> Tensor:
        values = F.pad(codebook, (1, 0)).expand(len(self.index), -1)  # (rows, K + 1)
        return values.gather(1, self.index).view(self.stored_shape).permute(self.order_back)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The codebook (K,) of a weight that already shares its values by the index."""
        values = weight.new_zeros(self.entries + 1)
        values[self.index] = weight.permute(self.order).reshape(self.index.shape)
        return values[1:].clone()


def layer_bits(network: nn.Module, *, mode: str, bits: Sequence[str]) -> dict[str, int]:
    """Bits for each layer to quantize, of those that `mode` covers (`QUAN_MODES`, with or without `-quan`).

    `bits` holds at most one plain number, for every layer of the mode, and `name=bits` pairs for single layers; without a
    plain number only the named layers are quantized. Raises ParameterError for a layer that the mode does not cover, for bits
    outside 1 to 16, and for a layer or a plain number given twice.
    """
    names = _covered_layers(network, mode)
    chosen: dict[str, int] = {}
    for item in bits:
        name, separator, value = item.rpartition("=")
        if separator and name not in names:
            raise ParameterError("bits", item, f"no layer {name!r} in mode {mode}, choose from {', '.join(names)}")
        if name in chosen:
            raise ParameterError("bits", item, f"given twice, expected one value for {name or 'all layers'}")
        chosen[name] = _parse_bits(item, value)
    default = chosen.pop("", None)
    return {name: chosen.get(name, default) for name in names if name in chosen or default is not None}


def share_weights(network: nn.Module, bits_of_layer: Mapping[str, int]) -> dict[str, int]:
    """Makes the named layers of `network`, in place, share 2^bits values each; returns the size of each codebook.

    A layer with no more distinct non-zero values than that keeps exactly those values. Build the optimizer afterwards: the
    codebooks are new parameters. Raises UserError for a layer whose weights are not finite.
    """
    sizes = {}
    for name, bits in bits_of_layer.items():
        layer = network.get_submodule(name)
        weight = layer.weight.detach()
        if not torch.isfinite(weight).all():
            raise UserError(f"layer {name}: cannot be quantized, its weights hold values that are not finite")
        values = weight.cpu().to(torch.promote_types(weight.dtype, torch.float32))  # NumPy knows no bfloat16
        codebook, index = find_codebook(values.numpy().ravel(), bits)
        sharing = SharedWeight(torch.from_numpy(index), entries=codebook.size, like=weight).to(weight.device)
        weight.copy_(sharing(torch.from_numpy(codebook).to(weight)))
        parametrize.register_parametrization(layer, "weight", sharing)
        sizes[name] = codebook.size
    return sizes


def bake_weights(network: nn.Module) -> nn.Module:
    """Turns every shared weight of `network` back into a plain parameter with the same values, in place."""
    for layer in list(network.modules()):
        if parametrize.is_parametrized(layer, "weight") and isinstance(layer.parametrizations.weight[0], SharedWeight):
            weight = layer.weight.detach()
            # remove_parametrizations would change the class of the layer, which copies of it share
            layer.__class__ = parametrize.type_before_parametrizations(layer)
            del layer.parametrizations
            layer.weight = nn.Parameter(weight)
    return network


def find_codebook(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """At most 2^bits shared values for floating-point `values` (N,), and the index of each: int64 (N,), 0 for zeros.

    Index i + 1 means `codebook[i]`. The codebook ascends, each of its entries is used and is the mean of its values. k-means
    starts from centroids spaced evenly over [min, max] of the non-zero values (Han et al.'s linear initialisation).
    """
    index = np.zeros(values.size, np.int64)
    live = np.flatnonzero(values)
    distinct = np.unique(values[live])
    if distinct.size <= 1 << bits:
        index[live] = 1 + np.searchsorted(distinct, values[live])
        return distinct, index
    centroids = _k_means(values[live], 1 << bits)
    cluster = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, values[live])
    members = np.bincount(cluster, minlength=centroids.size)
    used = members > 0  # a cluster may have lost all its weights
    index[live] = np.cumsum(used)[cluster]
    means = np.bincount(cluster, weights=values[live], minlength=centroids.size)[used] / members[used]
    return means.astype(values.dtype), index


def _k_means(values: np.ndarray, clusters: int) -> np.ndarray:
    """Ascending centroids (clusters,) of Lloyd's algorithm over `values` (N,), from a start evenly over their range.

    In one dimension the clusters are runs of the sorted values, and their sums are differences of one running sum: an
    iteration costs K log N instead of the N K of scikit-learn's KMeans, whose stopping rule and whose way with empty
    clusters this keeps. Nothing depends on the number of threads. It is a local optimum, as in the paper: the best one of all
    takes K N log N by dynamic programming, which for the layers of ImageNet networks is out of proportion.
    """
    values = np.sort(values).astype(np.float64)
    running_sum = np.concatenate(([0.0], np.cumsum(values)))
    tolerance = TOLERANCE * values.var()
    centroids = np.linspace(values[0], values[-1], clusters)
    for _ in range(MAX_ITERATIONS):
        cuts = np.searchsorted(values, (centroids[1:] + centroids[:-1]) / 2)
        cuts = np.concatenate(([0], cuts, [values.size]))
        members, sums = np.diff(cuts), np.diff(running_sum[cuts])
        empty = clusters - np.count_nonzero(members)
        if empty:
            begun = _take_farthest(values, empty, centroids=centroids, members=members, sums=sums)
            centroids = np.sort(np.concatenate((sums[members > 0] / members[members > 0], begun)))
            continue
        means = sums / members
        shift = np.square(means - centroids).sum()
        centroids = means
        if shift <= tolerance:
            break
    return centroids


def _take_farthest(values: np.ndarray, count: int, *, centroids: np.ndarray, members: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Takes the `count` values that lie farthest from their centroids out of their clusters, where empty clusters begin anew.

    Changes the numbers of members and the sums (K,). A cluster that loses all its values here is filled in the next round.
    """
    cluster = np.repeat(np.arange(members.size), members)
    farthest = np.argpartition(np.abs(values - centroids[cluster]), -count)[-count:]
    np.subtract.at(members, cluster[farthest], 1)
    np.subtract.at(sums, cluster[farthest], values[farthest])
    return values[farthest]


def _covered_layers(network: nn.Module, mode: str) -> list[str]:
    kinds = LAYER_KINDS.get(f"{mode.removesuffix('-quan')}-quan")
    if kinds is None:
        raise ParameterError("mode", mode, f"unknown, choose from {', '.join(QUAN_MODES)}")
    return [name for name, module in network.named_modules() if isinstance(module, kinds)]


def _parse_bits(item: str, value: str) -> int:
    if value not in map(str, range(1, MAX_BITS + 1)):
        raise ParameterError("bits", item, f"expected 1 to {MAX_BITS} bits, or NAME=BITS")
    return int(value)
