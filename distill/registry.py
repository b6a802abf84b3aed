"""The losses by name: where each is, its usual weight, the flags that it reads and what it needs, known without importing it.

A new loss is a file of this folder with a `Distiller`, and its entry in `DISTILLERS`: flags, their help and rules, plans, studies
and tests ask here. The options of an entry are the keyword-only arguments of its class.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.citations import source_of
from utils.errors import ParameterError, UserError, shown
from utils.python_file import function_of, load_function, names_function

if TYPE_CHECKING:
    from distill.base import Distiller
    from models.outputs import Outputs

RESERVED = ("none", "ce", "loss", "top1", "top5", "images", "epoch", "split")  # what metrics of a run are called
STEP_FACTS = ("labels", "indices", "epochs")  # what `Distiller` says that a loss may be told
WORDS = {"labels": "labels", "indices": "which image it is", "epochs": "how far training is"}
RUN_FACTS = {"train_labels": "the classes of all training images"}


@dataclass(frozen=True)
class Option:
    """An option of a loss: a keyword of `build_distiller`, and with dashes for underscores a flag (a switch, if a bool).

    None: a whole number, which depends on the networks where it is not given. `is_weight`: it weighs a part of the loss, which
    0 leaves out.
    """

    default: bool | int | float | None
    help: str
    is_weight: bool = False


@dataclass(frozen=True)
class DistillerEntry:
    """A loss: its class as `module:Class`, its paper's usual beta (None: weighted by alpha alone), its options by keyword.

    `replaces_kd`: the loss takes KD's place, whose alpha is 0 then unless it is given. `rise` is the share of the epochs
    over which the weight rises linearly to beta. `title` is what tables call it, its name in capitals by default. `needs`
    names what it asks for beside outputs, of STEP_FACTS and RUN_FACTS. Without `reads_maps` it compares logits alone.
    """

    place: str
    beta: float | None
    options: Mapping[str, Option] = field(default_factory=dict)
    replaces_kd: bool = False
    rise: float = 0.0
    title: str | None = None
    needs: frozenset[str] = frozenset()
    reads_maps: bool = True

    @property
    def paper(self) -> str:
        """Authors, venue and year as its file says after its name, which is not imported for it."""
        spec = find_spec(self.place.partition(":")[0], __package__)
        docstring = Path(spec.origin).read_text(encoding="utf-8").partition('"""')[2]
        return source_of(docstring.partition(": ")[2])

    @property
    def compares(self) -> str:
        """What it looks at, in words."""
        facts = [WORDS[fact] for fact in STEP_FACTS if fact in self.needs]
        return ", ".join(["feature maps" if self.reads_maps else "logits", *facts])

    @property
    def weights(self) -> list[str]:
        """The options that weigh the parts of the loss."""
        return [key for key, option in self.options.items() if option.is_weight]

    @property
    def kind(self) -> type[Distiller]:
        """The class of the loss, imported when it is asked for."""
        module, _, name = self.place.partition(":")
        return getattr(import_module(module, __package__), name)

    def build(self, student: Outputs, teacher: Outputs, **options: Any) -> Distiller:
        """The loss for two networks of which these are sample outputs; options that are not given have their defaults."""
        return self.kind(student, teacher, **{key: option.default for key, option in self.options.items()} | options)


TEMPERATURE = Option(4.0, "temperature of softened class probabilities")
STANDARDIZE = Option(
    False,
    "bring each image's logits to mean 0 and deviation 1 before the temperature; published with --kd-t 2 and a weight of 9, "
    "--alpha of KD or --betas of DKD",
)
OFFICIAL_RISE = 20 / 240  # epochs, of the official code of DKD and of ReviewKD on CIFAR-100

DISTILLERS: dict[str, DistillerEntry] = {
    "afd": DistillerEntry(".afd:AFD", beta=200.0),
    "at": DistillerEntry(
        ".at:AT",
        beta=1000.0,
        options={"at_stages": Option(0, "how many of the last stages AT compares (default: all, of four or more the last two)")},
    ),
    "crd": DistillerEntry(
        ".crd:CRD",
        beta=0.8,
        options={
            "crd_negatives": Option(16384, "images of other classes that CRD compares each image with"),
            "crd_width": Option(128, "dimensions of CRD's projections"),
            "crd_t": Option(0.07, "temperature of CRD's scores"),
            "crd_momentum": Option(0.5, "share of an image's old projection that CRD's bank keeps"),
        },
        needs=frozenset(("train_labels", "indices")),
    ),
    "ctkd": DistillerEntry(
        ".ctkd:CTKD",
        reads_maps=False,
        beta=0.9,
        options={"ctkd_epochs": Option(10, "first epochs, over which CTKD's temperature learns more and more against KD")},
        replaces_kd=True,
        needs=frozenset(("epochs",)),
    ),
    "dist": DistillerEntry(
        ".dist:DIST",
        reads_maps=False,
        beta=1.0,
        options={
            "kd_t": TEMPERATURE,
            "dist_beta": Option(2.0, "weight of DIST's relation between the classes of an image", is_weight=True),
            "dist_gamma": Option(2.0, "weight of DIST's relation between the images of a batch", is_weight=True),
        },
        replaces_kd=True,
    ),
    "dkd": DistillerEntry(
        ".dkd:DKD",
        reads_maps=False,
        beta=1.0,
        options={
            "kd_t": TEMPERATURE,
            "kd_standardize": STANDARDIZE,
            "dkd_alpha": Option(1.0, "weight of DKD's target class", is_weight=True),
            # the official code's for any pair of networks; it has 2 for ResNet-20 by ResNet-56
            "dkd_beta": Option(8.0, "weight of DKD's other classes", is_weight=True),
        },
        replaces_kd=True,
        rise=OFFICIAL_RISE,
        needs=frozenset(("labels",)),
    ),
    "fitnet": DistillerEntry(
        ".fitnet:FitNet",
        beta=100.0,
        options={"fitnet_stage": Option(None, "which stage FitNet compares, from 1 (default: 2, or the last of fewer)")},
        title="FitNet",
    ),
    "hap": DistillerEntry(
        ".hap:HAP",
        beta=700.0,
        options={"hap_ts": Option(None, "how many of the teacher's last blocks HAP compares with (default: 3, or all of fewer)")},
    ),
    "kd": DistillerEntry(".kd:KD", beta=None, options={"kd_t": TEMPERATURE, "kd_standardize": STANDARDIZE}, reads_maps=False),
    "nkd": DistillerEntry(
        ".nkd:NKD",
        reads_maps=False,
        beta=1.0,
        options={
            "nkd_t": Option(3.0, "temperature of NKD's other classes"),
            "nkd_gamma": Option(3.5, "weight of NKD's other classes"),
        },
        replaces_kd=True,
        needs=frozenset(("labels",)),
    ),
    "pkt": DistillerEntry(".pkt:PKT", beta=30000.0),
    "reviewkd": DistillerEntry(
        ".reviewkd:ReviewKD",
        beta=5.0,  # the official code's for most pairs of networks; it has 0.6 for ResNet-20 by ResNet-56
        replaces_kd=True,
        rise=OFFICIAL_RISE,
        title="ReviewKD",
    ),
    "rkd": DistillerEntry(
        ".rkd:RKD",
        beta=1.0,
        options={
            "rkd_distance": Option(25.0, "weight of RKD's distances", is_weight=True),
            "rkd_angle": Option(50.0, "weight of RKD's angles", is_weight=True),
        },
    ),
    "sp": DistillerEntry(".sp:SP", beta=3000.0),
    "wttm": DistillerEntry(
        ".wttm:WTTM",
        reads_maps=False,
        beta=4.0,
        options={"wttm_gamma": Option(0.2, "exponent of the teacher's probabilities in WTTM")},
        replaces_kd=True,
    ),
}


@dataclass(frozen=True)
class OwnEntry(DistillerEntry):
    """A loss in somebody's own file, whose place is `FILE.py:NAME`."""

    def build(self, student: Outputs, teacher: Outputs, **facts: Any) -> Distiller:
        from distill.own import OwnLoss

        return OwnLoss(student, teacher, name=self.place, **facts)


def add_own_loss(name: str) -> None:
    """Registers the loss `FILE.py:NAME`, whose file runs, under that name. Its attributes `beta`, the usual weight (1 without),
    and `reads_maps` (True without) count. Raises UserError for what cannot be a loss."""
    from distill.own import init_facts, step_facts

    if key_of(name) in {*DISTILLERS, *RESERVED}:
        raise UserError(f"{name}: something else is called so here, name it otherwise than {key_of(name)}")
    needs = frozenset((*step_facts(name), *init_facts(name)))
    found = load_function(name)
    beta, maps = getattr(found, "beta", 1.0), getattr(found, "reads_maps", True)
    if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 < beta < float("inf"):
        raise UserError(f"{name}: its beta is {shown(beta)}, expected a number above 0")
    DISTILLERS[name] = OwnEntry(name, beta=float(beta), needs=needs, reads_maps=bool(maps))


def key_of(name: str) -> str:
    """What a loss is called in metrics and formulas: NAME of `FILE.py:NAME`."""
    return function_of(name) if names_function(name) else name


def own_entries(names: Iterable[str]) -> list[str]:
    """Those of the names that are losses of one's own."""
    return [name for name in names if names_function(name)]


def check_facts(name: str, given: Collection[str]) -> None:
    """Raises ParameterError where what a loss has to know of the run is not among the names `given`."""
    missing = entry_of(name).needs.intersection(RUN_FACTS).difference(given)
    if missing:
        raise ParameterError("loss", name, f"needs {min(missing)} ({RUN_FACTS[min(missing)]}), which it was not given")


def entry_of(name: str) -> DistillerEntry:
    """Raises ParameterError for a name that no loss has."""
    if name not in DISTILLERS:
        raise ParameterError("loss", name, f"unknown, choose from {', '.join(sorted(DISTILLERS))}")
    return DISTILLERS[name]


def distiller_options(names: Iterable[str] | None = None) -> dict[str, Option]:
    """Options of the named losses (of all by default) by keyword: `{"kd_t": Option(4.0, "temperature ..."), ...}`.

    The command line turns each into a flag, `--kd-t`, so that a new loss brings its flags along.
    """
    return {key: option for name in (DISTILLERS if names is None else names) for key, option in entry_of(name).options.items()}


def weighted_losses(names: Iterable[str]) -> list[str]:
    """Of the named losses those that have a beta; alpha weighs KD."""
    return [name for name in names if name != "none" and DISTILLERS[name].beta is not None]


def active_losses(names: Sequence[str], *, alpha: float) -> set[str]:
    """The losses that a student which is taught by `names` trains by, KD included, which is there beside every other loss."""
    if list(names) == ["none"]:
        return set()
    return {*weighted_losses(names), *(["kd"] if alpha > 0 else [])}


def reads_maps(names: Sequence[str], *, alpha: float) -> bool:
    """Whether one of the losses that a student which is taught by `names` trains by compares more than logits."""
    return any(DISTILLERS[name].reads_maps for name in active_losses(names, alpha=alpha))


def logit_losses(names: Sequence[str], *, alpha: float) -> list[str]:
    """Those of the losses that compare logits, in order of their names: the teacher must know the student's classes."""
    return sorted(name for name in active_losses(names, alpha=alpha) if not DISTILLERS[name].reads_maps)


def flags_read(names: Sequence[str]) -> list[str]:
    """The flags that a student reads which is taught by `names` at their usual weights, of those that say how it is taught."""
    if list(names) == ["none"]:
        return []
    flags = ["alpha", "ce_weight", *(["betas"] if weighted_losses(names) else [])]
    flags += ["rise_epochs"] if any(DISTILLERS[name].rise for name in names) else []
    return [*flags, *distiller_options(sorted(active_losses(names, alpha=default_alpha(names))))]


def default_alpha(names: Sequence[str]) -> float:
    """The weight of KD beside the named losses: 0 where one takes its place and KD is not asked for by name."""
    replaced = any(DISTILLERS[name].replaces_kd for name in names if name != "none")
    return 0.0 if replaced and "kd" not in names else 0.9
