"""The training objective of distillation: cross-entropy, KD and feature losses of a student beside a frozen teacher."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from distill.base import Distiller, full_precision
from distill.registry import (
    DISTILLERS,
    check_facts,
    key_of,
    logit_losses,
    own_entries,
    reads_maps,
    weighted_losses,
)
from distill.settings import DistillationSettings
from models.batch_norm import UnevenBatchNorm2d
from models.graph import ChannelGraph
from models.graph.roles import BATCH_NORMS
from models.narrow.proof import check_outputs
from models.network_file import NetworkFile
from models.outputs import Outputs
from utils.errors import ParameterError, UserError
from utils.seed import derived_seed, preserved_random_state
from utils.training.objective import Objective, cross_entropy_formula, logits_of
from utils.training.session import Session

SHORTEST_RISE = 1.0  # epochs: a pruned network that starts at nearly full weight of DKD may end at chance


class FrozenTeacher:
    """A private copy of a network in eval mode that builds no graph: `teacher(images) -> Outputs`.

    Without `maps` the outputs are the logits alone, by the network's own forward pass.
    No nn.Module, so that an objective that holds it neither trains, saves, moves, nor synchronises it. The copy stays on
    the network's device. `fold_batch_norm` merges batch norms into the convolutions before them, the same function up to
    rounding, and may need an `example` of the images, see `ChannelGraph`; `graph` of a network that may have the same
    architecture spares a trace. `channels_last` sets the layout of its weights, for images of that layout.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        maps: bool = True,
        fold_batch_norm: bool = False,
        channels_last: bool = False,
        example: Tensor | None = None,
        graph: ChannelGraph | None = None,
    ):
        if maps and isinstance(getattr(network, "outputs", None), nn.Module):
            raise UserError(f"{type(network).__name__} has a layer `outputs`, the name of what gives the feature maps")
        network = copy.deepcopy(network).eval().requires_grad_(False)
        if fold_batch_norm:
            _fold_batch_norms(network, _graph_of(network, example, known=graph))
        if channels_last:
            network = network.to(memory_format=torch.channels_last)
        self.network, self.maps = network, maps

    def __call__(self, images: Tensor) -> Outputs:
        with torch.no_grad():  # not inference_mode: the losses save these tensors for the student's backward pass
            return outputs_of(self.network, images, maps=self.maps)


def outputs_of(network: nn.Module, images: Tensor, *, maps: bool) -> Outputs:
    """Logits and feature maps, or without `maps` the logits alone, which the network's own forward pass gives."""
    return network.outputs(images) if maps else Outputs(logits_of(network(images)))


class DistillationObjective(Objective):
    """`ce_weight * CE + alpha * KD + sum of beta_i * L_i` for images (b, 3, h, w), labels (b,) and rows in the training set (b,).

    `losses` lists (name, distiller, beta); `kd` is the distiller weighted by alpha, or None. `rise_epochs` says for some of
    them over how many epochs their weight rises from step to step to its full value, which it has from the end of these on;
    that is part of the objective's state. Without a teacher the objective is the cross-entropy alone. Its parameters are the
    student's and those of the losses (AFD's), all used in every step. The losses see the images of one process, so SP's and
    HAP's similarities are within its part of a batch.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        teacher: FrozenTeacher | None = None,
        losses: Sequence[tuple[str, Distiller, float]] = (),
        kd: Distiller | None = None,
        alpha: float = 0.9,
        rise_epochs: Mapping[str, float] | None = None,
        label_smoothing: float = 0.0,
        ce_weight: float = 1.0,
    ):
        super().__init__()
        weighted = [*([("kd", kd, alpha)] if kd is not None else []), *losses]
        if bool(weighted) != (teacher is not None):
            raise ValueError("a teacher and a loss to learn from it belong together: give both or neither")
        self.student = student
        self.teacher = teacher
        self.label_smoothing, self.ce_weight = label_smoothing, ce_weight
        # how much of the training is done is said before every step: no part of the state
        self.register_buffer("epochs", torch.tensor(0.0), persistent=False)
        self.distillers = nn.ModuleDict({name: distiller for name, distiller, _ in weighted})
        self.reads_maps = any(distiller.reads_maps for distiller in self.distillers.values())
        self.weights = {name: weight for name, _, weight in weighted}
        self.rises = nn.ModuleDict({name: _Rise(epochs) for name, epochs in (rise_epochs or {}).items()})

    def exchange(self, network: nn.Module) -> None:
        self.student = network

    def begin_step(self, epoch: int, step: int, *, steps: int) -> None:
        """Sets the weights that rise, and what losses are told of the time, to those of a step."""
        self.epochs.fill_(epoch + step / steps)
        for rise in self.rises.values():
            rise.begin_step(epoch + (step + 1) / steps)

    def formula(self) -> str:
        """The whole loss with its weights and options: `CE + 0.9 KD (T 4) + 1000 AT`."""
        weight = f"{self.ce_weight:g} " if self.ce_weight != 1 else ""
        cross_entropy = [weight + cross_entropy_formula(self.label_smoothing)] if self.ce_weight else []
        return " + ".join([*cross_entropy, *map(self._term_text, self.distillers)])

    def _term_text(self, name: str) -> str:
        weight, setting = f"{self.weights[name]:g}", self.distillers[name].setting()
        if name in self.rises and self.rises[name].epochs > 0:
            weight = f"({weight}, rising over {self.rises[name].epochs:.3g} epochs)"
        return f"{weight} {name.upper()} ({setting})" if setting else f"{weight} {name.upper()}"

    def forward(self, images: Tensor, labels: Tensor, indices: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(loss, logits, terms): the 0-dim loss, and detached the (b, classes) logits and each term before its weight."""
        if self.teacher is None:
            logits = logits_of(self.student(images))
            loss = self._cross_entropy(logits, labels)
            return loss, logits.detach(), {"ce": loss.detach()}
        student, teacher = outputs_of(self.student, images, maps=self.reads_maps), self.teacher(images)
        loss = self._cross_entropy(student.logits, labels)
        terms = {"ce": loss.detach()}
        loss = self.ce_weight * loss
        for name, distiller in self.distillers.items():
            term = distiller(student, teacher, labels=labels, indices=indices, epochs=self.epochs)
            terms[name] = term.detach()
            weight = self.weights[name]
            loss = loss + (weight * self.rises[name].share if name in self.rises else weight) * term
        return loss, student.logits.detach(), terms

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(full_precision(logits), labels, label_smoothing=self.label_smoothing)


class _Rise(nn.Module):
    """The share of its weight that a loss has: a tensor, so that a compiled step is one graph for all epochs."""

    def __init__(self, epochs: float):
        super().__init__()
        self.register_buffer("epochs", torch.tensor(float(epochs)))  # a raised number of epochs must not change it
        self.register_buffer("share", torch.tensor(1.0))

    def begin_step(self, epochs: float) -> None:
        """`epochs` are those that are done at the end of the step."""
        self.share.copy_((epochs / self.epochs).clamp(max=1))


def build_objective(
    student: nn.Module,
    teacher: nn.Module | FrozenTeacher | None,
    names: Sequence[str],
    *,
    images: Tensor,
    alpha: float,
    betas: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    n_epochs: int = 1,
    rise_epochs: float | None = None,
    label_smoothing: float = 0.0,
    ce_weight: float = 1.0,
    facts: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> DistillationObjective:
    """The objective of the losses `names` for `student`, on the device of `images`, new parameters of the losses included.

    A `teacher` that is frozen already must give feature maps where `names` read some.
    `images` (b, 3, h, w) are a sample for shapes. `betas` weighs the losses of `weighted_losses(names)`, each paper's by
    default; `alpha` weighs KD, which is there beside every other loss. `options` may hold more than these losses read. Weights
    that rise do so over `rise_epochs`, without it over each loss's share of `n_epochs`. `facts` is what is known of the run, of
    RUN_FACTS in distill/registry.py. New parameters are drawn from `seed`, in the order of
    `names`, and from no stream that training uses. Raises UserError where a loss cannot compare the two networks.
    """
    if list(names) == ["none"]:
        return DistillationObjective(student, label_smoothing=label_smoothing)
    maps = reads_maps(names, alpha=alpha)
    if maps:
        check_outputs(student, images)
    frozen = teacher if isinstance(teacher, FrozenTeacher) else _training_teacher(teacher, images, maps=maps)
    samples = sample_outputs(student, images, maps=maps), frozen(images)
    with preserved_random_state():
        torch.manual_seed(derived_seed(seed, "distillers"))
        given = {**(options or {}), **(facts or {})}
        built = {
            name: _build(name, *samples, given).to(images.device)
            for name in dict.fromkeys([*names, *(["kd"] if alpha > 0 else [])])
        }
        for name in own_entries(names):
            built[name].check(*samples)
    weighted = weighted_losses(names)
    betas = betas or [DISTILLERS[name].beta for name in weighted]
    losses = [(key_of(name), built[name], beta) for name, beta in zip(weighted, betas, strict=True)]
    return DistillationObjective(
        student,
        teacher=frozen,
        losses=losses,
        kd=built["kd"] if alpha > 0 else None,
        alpha=alpha,
        rise_epochs={
            name: max(DISTILLERS[name].rise * n_epochs, SHORTEST_RISE) if rise_epochs is None else rise_epochs
            for name in weighted
            if DISTILLERS[name].rise
        },
        label_smoothing=label_smoothing,
        ce_weight=ce_weight,
    )


def _build(name: str, student: Outputs, teacher: Outputs, options: Mapping[str, Any]) -> Distiller:
    entry = DISTILLERS[name]
    given = {key: options[key] for key in (*entry.options, *entry.needs) if options.get(key) is not None}
    check_facts(name, given)
    return entry.build(student, teacher, **given)


_UNTAUGHT = "the teacher was trained for other classes, so its classifier is new and its logits teach nothing"


def session_teacher(
    session: Session, settings: DistillationSettings, teacher: NetworkFile | None, *, graph: ChannelGraph | None = None
) -> FrozenTeacher | None:
    """The network that the losses of a run learn from, None without any; `graph` as in `FrozenTeacher`.

    Raises UserError where they compare logits and the teacher's classifier is new.
    """
    if teacher is None or list(settings.losses) == ["none"]:
        return None
    by_logits = logit_losses(settings.losses, alpha=settings.alpha)
    if teacher.transferred and by_logits == ["kd"] and list(settings.losses) != ["kd"]:
        raise ParameterError("alpha", settings.alpha, f"{_UNTAUGHT}: choose 0")
    if teacher.transferred and by_logits:
        raise ParameterError("loss", by_logits[0], f"{_UNTAUGHT}: choose losses of feature maps, and an alpha of 0")
    maps = reads_maps(settings.losses, alpha=settings.alpha)
    return _training_teacher(teacher.network, session.data.example, maps=maps, graph=graph)


def _training_teacher(network: nn.Module, images: Tensor, *, maps: bool, graph: ChannelGraph | None = None) -> FrozenTeacher:
    return FrozenTeacher(network, maps=maps, channels_last=True, fold_batch_norm=True, example=images, graph=graph)


def session_objective(
    session: Session, settings: DistillationSettings, student: nn.Module, teacher: FrozenTeacher | None
) -> DistillationObjective:
    """`build_objective` as the settings of a run say, once it has its data."""
    data, training = session.data, session.settings.training
    return build_objective(
        student,
        teacher,
        settings.losses,
        images=data.example,
        alpha=settings.alpha,
        betas=settings.betas,
        options=settings.options,
        n_epochs=training.n_epochs,
        rise_epochs=settings.rise_epochs,
        ce_weight=settings.ce_weight,
        facts={"train_labels": data.dataset.train.labels},
        label_smoothing=training.label_smoothing,
        seed=session.settings.run.seed,
    )


def sample_outputs(network: nn.Module, images: Tensor, *, maps: bool = True) -> Outputs:
    """What `build_distiller` needs of a network: its outputs for a few images, leaving no trace in it."""
    return FrozenTeacher(network, maps=maps)(images)


def _graph_of(network: nn.Module, example: Tensor | None, *, known: ChannelGraph | None) -> ChannelGraph:
    if known is None:
        return ChannelGraph(network, example)
    try:
        return known.rebound(network)
    except UserError:  # of another architecture
        return ChannelGraph(network, example)


def _fold_batch_norms(network: nn.Module, graph: ChannelGraph) -> None:
    try:
        pairs = graph.conv_norm_pairs
    except UserError:  # a network without a graph runs as it is
        return
    for conv_name, norm_name in pairs.items():
        conv, norm = network.get_submodule(conv_name), network.get_submodule(norm_name)
        plain = type(conv) is nn.Conv2d and type(norm) in (*BATCH_NORMS, UnevenBatchNorm2d)  # others do more
        if plain and norm.track_running_stats:
            fused = fuse_conv_bn_eval(conv, norm)
            network.set_submodule(conv_name, fused.requires_grad_(False))
            network.set_submodule(norm_name, nn.Identity())
