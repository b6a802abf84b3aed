"""A network whose weights are whole multiples of steps, chosen by what their errors do to its outputs and what they cost in bits.

One number, the step, trades bytes for errors. From it follow the steps of every row and column, so that an error of a step
changes the logits by the same amount wherever it is: what a row's output does to the logits is measured by gradients of random
projections of them (the Gauss-Newton matrix, its diagonal), what a column's input does to the row by the Gram matrix of the
inputs, as it is once the columns behind have made good what they can (reverse water-filling over its pivots). Layer by layer,
in the order of the graph, a layer's weights first become those that turn what it now reads into what it gave before (the normal
equations of reconstruction), and are then rounded by `quantize.trellis`.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from models.graph import output_channels
from models.graph.kinds import TRANSPOSED
from models.graph.statistics import Moments, groups_of, set_weight_matrix, weight_matrix
from models.graph.walk import walkable
from quantize.folding import fold_norms
from quantize.trellis import Factors, multiples_of, quantize_rows
from utils.errors import UserError
from utils.modes import evaluating
from utils.seed import generator

PARTS_PER_OCTAVE = 4  # of the steps of rows and columns
DAMPING = 1e-2  # of the mean of the Gram matrix's diagonal, as in OPTQ; also what holds a weight where it was
PRICE = 0.25  # of a bit, in squared steps: measured on Laplace distributions at 1.5 to 3.5 bits, where it is best
LEAST_SENSITIVITY = 1e-3  # of a row, in parts of its layer's mean
ROWS_PER_UNKNOWN, LEAST_ROWS = 32, 1 << 16  # of the inputs of a layer, that are looked at
PROJECTIONS = 2  # of the logits, for each image


@dataclass(frozen=True)
class CodedWeight:
    """A weight as whole numbers. F rows, J columns: those of the weight and, where it has a shift, one for that.

    The value of a level is its multiple (`multiples_of`) times 2^(e / 4), where e is the sum of the exponents of its row, its
    channel (of C inputs a group) and its place in the kernel (of K); of a shift that of its row and `shift_exponent`.
    """

    levels: np.ndarray  # (F, J) int32
    row_exponents: np.ndarray  # (F,) int64
    channel_exponents: np.ndarray  # (C,)
    kernel_exponents: np.ndarray  # (K,)
    shift: str | None = None  # the tensor that the last column is, by its name in the state dict
    shift_exponent: int = 0

    def values(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The weight (F, C K) and the shift (F,) in float64, the same on every machine."""
        exponents = self.row_exponents[:, None] + self.column_exponents()
        values = multiples_of(self.levels) * power(exponents)
        return (values, None) if self.shift is None else (values[:, :-1], values[:, -1])

    def column_exponents(self) -> np.ndarray:
        """(J,)"""
        columns = (self.channel_exponents[:, None] + self.kernel_exponents).ravel()
        return columns if self.shift is None else np.append(columns, self.shift_exponent)


def power(exponents: np.ndarray) -> np.ndarray:
    """2^(e / 4) in float64, each rounded once from constants."""
    fractions = np.array([1.0, float.fromhex("0x1.306fe0a31b715p+0"), float.fromhex("0x1.6a09e667f3bcdp+0"),
                          float.fromhex("0x1.ae89f995ad3adp+0")])  # fmt: skip
    return np.ldexp(fractions[exponents % PARTS_PER_OCTAVE], exponents // PARTS_PER_OCTAVE)


@dataclass(frozen=True)
class Compressed:
    """A network with rounded weights, and these by the name of their tensor."""

    network: nn.Module
    weights: dict[str, CodedWeight]


class Compressor:
    """Finds what is needed once, so that a network can be compressed with several steps.

    `batches` are images of the training set, normalised, on the network's device: without them nothing is known of what
    its layers read. The network is not changed. The same images give the same bits on the same machine. Raises UserError for
    weights that are not finite and for networks that torch.fx cannot trace.
    """

    def __init__(self, network: nn.Module, batches: Sequence[Tensor]):
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise UserError(f"{name} cannot be compressed: it holds values that are not finite")
        self.batches = batches
        self.reference = copy.deepcopy(network).eval()
        self.norms = fold_norms(self.reference, example=batches[0])
        traced = walkable(self.reference, batches[0])
        self.names = [name for name in traced.nodes if not isinstance(traced.owner.get_submodule(name), TRANSPOSED)]
        self.sensitivities = output_sensitivities(self.reference, self.names, batches)
        self.unit = self._unit()

    @torch.no_grad()
    def _unit(self) -> float:
        """The step at which errors would about be as large as the logits."""
        logits = torch.cat([self.reference(batch) for batch in self.batches])
        weights = sum(self.reference.get_submodule(name).weight.numel() for name in self.names)
        return float(logits.square().sum(1).mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)) / max(weights, 1) ** 0.5

    @torch.no_grad()
    def compress(self, step: float) -> Compressed:
        """The network with an error of about `step` in its logits for each weight, as a root mean square over images."""
        network = copy.deepcopy(self.reference)
        here, there = walkable(network, self.batches[0]), walkable(self.reference, self.batches[0])
        weights = {}
        with evaluating(network, self.reference):
            now, before = here.walk(self.batches), there.walk(self.batches)
            for name in self.names:
                layer = here.owner.get_submodule(name)
                shift = self._shift(name, layer)
                moments = Moments(layer, constant=shift is not None, dtype=torch.float32)
                inputs, outputs = now.before(here.nodes[name]), before.after(there.nodes[name])
                every = _rows_apart(outputs, moments.columns, outputs_last=isinstance(layer, nn.Linear))
                for x, y in zip(inputs, outputs, strict=True):
                    moments.add(x, y, every=every)
                norm = self.norms.get(name)
                bias = network.get_submodule(norm).bias if norm is not None else layer.bias
                weights[f"{name}.weight"] = coded = _round(
                    layer, bias, moments, folded=norm is not None, sensitivity=self.sensitivities[name], step=step, shift=shift
                )
                assign(layer, bias, coded)
        return Compressed(network, weights)

    def _shift(self, name: str, layer: nn.Module) -> str | None:
        norm = self.norms.get(name)
        if norm is not None:
            return f"{norm}.bias"
        return f"{name}.bias" if layer.bias is not None else None


@torch.no_grad()
def assign(layer: nn.Module, bias: Tensor | None, coded: CodedWeight) -> None:
    """Writes the values into the layer and its shift."""
    weight, shift = coded.values()
    set_weight_matrix(layer, torch.from_numpy(weight).reshape(weight_matrix(layer).shape).to(layer.weight))
    if shift is not None:
        bias.copy_(torch.from_numpy(shift))


def output_sensitivities(network: nn.Module, names: Sequence[str], batches: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """What a change of each output channel (F,) of the named layers does to the logits: their squares added up over the logits.

    The change is 1 at every position, independently of the others; the mean is over images.
    """
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> object:
        def add(gradient: Tensor) -> None:
            is_linear = isinstance(network.get_submodule(name), nn.Linear)
            rows = gradient if is_linear else gradient.movedim(1, -1)
            channels = rows.square().reshape(-1, rows.shape[-1])
            sums[name] = sums.get(name, 0) + channels.sum(0).double()

        def hook(layer: nn.Module, given: object, output: Tensor) -> None:
            output.register_hook(add)

        return network.get_submodule(name).register_forward_hook(hook)

    handles = [watch(name) for name in names]
    stream = generator(0, "projections of logits")
    with evaluating(network), torch.enable_grad():
        for batch in batches:
            logits = network(batch.requires_grad_())
            for left in reversed(range(PROJECTIONS)):
                projection = torch.randn(logits.shape, generator=stream).to(logits)
                torch.autograd.grad((logits * projection).sum(), batch, retain_graph=left > 0)
            batch.requires_grad_(False)
    for handle in handles:
        handle.remove()
    images = PROJECTIONS * sum(map(len, batches))
    unread = {name: torch.zeros(output_channels(network.get_submodule(name))) for name in names if name not in sums}
    return {name: ({**sums, **unread}[name] / images).cpu().numpy() for name in names}


def _rows_apart(outputs: Sequence[Tensor], unknowns: int, *, outputs_last: bool) -> int:
    """Every how many rows one is looked at: an odd number, so that it shows all columns of an image."""
    rows = sum(y.numel() // (y.shape[-1] if outputs_last else y.shape[1]) for y in outputs)
    return max(1, rows // max(ROWS_PER_UNKNOWN * unknowns, LEAST_ROWS) - 1 | 1)


def _round(
    layer: nn.Module,
    bias: Tensor | None,
    moments: Moments,
    *,
    folded: bool,
    sensitivity: np.ndarray,
    step: float,
    shift: str | None,
) -> CodedWeight:
    """The layer's weights as levels, fitted to what the layer gave before."""
    groups = groups_of(layer)
    weight = weight_matrix(layer).double()  # (G, F / G, C K)
    gram, cross = moments.gram / moments.count, moments.cross / moments.count
    if shift is not None:
        own = bias.double().view(groups, -1, 1)
        weight = torch.cat([weight, own], 2)
        if folded:  # the outputs are those before the norm
            cross = cross + gram[:, :, -1:] * own.mT
    columns = weight.shape[2] - (shift is not None)
    damping = DAMPING * gram.diagonal(dim1=1, dim2=2)[:, :columns].mean(1)
    gram = gram + torch.diag_embed(damping.clamp(min=torch.finfo(torch.float32).tiny)[:, None].expand(gram.shape[:2]))
    correction = torch.linalg.solve(gram, cross + damping[:, None, None] * weight.mT - gram @ weight.mT, left=True)
    fitted = (weight + correction.mT).cpu().numpy()

    factors = Factors.of(gram.cpu().numpy())
    kernel = layer.weight[0, 0].numel()
    exponents = np.log2(factors.pivots).mean(0) * (-PARTS_PER_OCTAVE / 2)
    by_place = exponents[:columns].reshape(-1, kernel)
    middle = by_place.mean()
    channels = np.rint(by_place.mean(1) - middle).astype(np.int64)
    places = np.rint(by_place.mean(0) - middle).astype(np.int64)
    sensitivity = np.maximum(sensitivity, max(LEAST_SENSITIVITY * sensitivity.mean(), np.finfo(np.float32).tiny))
    rows = np.rint(PARTS_PER_OCTAVE * (np.log2(step) - np.log2(sensitivity) / 2) + middle).astype(np.int64)
    shift_exponent = int(np.rint(exponents[-1] - middle)) if shift is not None else 0
    empty = CodedWeight(np.zeros((0, 0)), rows, channels, places, shift, shift_exponent)

    steps = power(empty.column_exponents())
    values = fitted.reshape(len(rows), -1) / (power(rows)[:, None] * steps)
    multiplier = PRICE * step**2 / (sensitivity * np.square(power(rows)))
    levels = quantize_rows(values, factors.in_steps(steps), multiplier=multiplier)
    return CodedWeight(levels, rows, channels, places, shift, shift_exponent)
