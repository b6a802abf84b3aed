"""The flags of the losses: which are used, their weights, and the options that each of them is registered with."""

import argparse
from collections.abc import Sequence

from distill.registry import (
    DISTILLERS,
    active_losses,
    add_own_loss,
    default_alpha,
    distiller_options,
    key_of,
    own_entries,
    weighted_losses,
)
from distill.settings import DistillationSettings
from utils import cli
from utils.errors import UserError, naming


def add_distillation_flags(parser: cli.Parser) -> None:
    group = parser.add_argument_group("distillation")
    group.add_argument("--distill", nargs="+", default=["none"], choices=("none", *DISTILLERS), metavar="NAME",
                       help=f"distillation losses: none, {', '.join(DISTILLERS)}, or your own, FILE.py:NAME")  # fmt: skip
    group.add_argument("--alpha", type=cli.non_negative_float,
                       help="weight of KD (default: 0.9, or 0 beside a loss that takes KD's place)")  # fmt: skip
    group.add_argument("--ce-weight", type=cli.non_negative_float, default=1.0, help="weight of the cross-entropy beside them")
    betas = ", ".join(f"{name} {DISTILLERS[name].beta:g}" for name in weighted_losses(DISTILLERS))
    group.add_argument("--betas", type=cli.non_negative_float, nargs="+", help=f"weights of the other losses (default: {betas})")
    rising = ", ".join(name for name, entry in DISTILLERS.items() if entry.rise)
    group.add_argument("--rise-epochs", type=cli.non_negative_float, metavar="N",
                       help=f"epochs over which the weights of {rising} rise (default: --n-epochs / 12, at least 1)")  # fmt: skip
    for keyword, option in distiller_options().items():
        kind = cli.option_kind(option.default, may_be_zero=option.is_weight or option.default == 0)
        group.add_argument(f"--{keyword.replace('_', '-')}", **kind, help=option.help)
    parser.own_code.add("distill")
    parser.completions += [_add_own_losses, _complete_alpha]
    parser.parameters["loss"] = "distill"
    cli.counts_in_training(parser, *cli.names_of(group))
    _say_what_counts(parser)


def _add_own_losses(args: argparse.Namespace) -> None:
    """Runs the files that --distill names, each once."""
    for name in own_entries(args.distill):
        if name not in DISTILLERS:
            with naming("--distill"):
                add_own_loss(name)


def losses_list() -> list[tuple[str, str]]:
    """A line on each loss for `--help`: its paper and what it looks at."""
    return [(name, f"{entry.paper}; {entry.compares}") for name, entry in DISTILLERS.items() if not own_entries([name])]


def check_distillation(args: argparse.Namespace) -> None:
    """Raises UserError for losses of `--distill` that do not go together, or not with the weights of the flags."""
    _check_losses(args.distill, has_teacher=args.t_path is not None, alpha=args.alpha, betas=args.betas)
    if args.resume is None:  # a run that has begun with a loss of no weight may end with it
        _check_effective(args.distill, alpha=args.alpha, betas=args.betas)
    for name in weighted_losses(args.distill):
        weights = {cli.flag_of(option): getattr(args, option) for option in DISTILLERS[name].weights}
        if weights and not any(weights.values()):
            given = " ".join(f"{flag} {value:g}" for flag, value in weights.items())
            raise UserError(f"{given}: the weights of a loss's parts must be 0 or more, and one of them above 0")


def distillation_settings(args: argparse.Namespace) -> DistillationSettings:
    """What the flags say that a student is taught by."""
    options = {keyword: getattr(args, keyword) for keyword in distiller_options()}
    return DistillationSettings(
        args.distill, args.alpha, args.betas, options, ce_weight=args.ce_weight, rise_epochs=args.rise_epochs
    )


def _complete_alpha(args: argparse.Namespace) -> None:
    if args.alpha is None:
        args.alpha = default_alpha(args.distill)


def _say_what_counts(parser: cli.Parser) -> None:
    parser.counts_only("alpha", where=lambda args: args.distill != ["none"], only="with --distill, where it weighs KD")
    parser.counts_only("ce_weight", where=lambda args: args.distill != ["none"], only="with --distill, beside other losses")
    rising = {name for name, entry in DISTILLERS.items() if entry.rise}
    parser.counts_only(
        "rise_epochs", where=lambda args: rising & set(args.distill), only=f"with --distill {' or '.join(sorted(rising))}"
    )
    weighted = ", ".join(weighted_losses(DISTILLERS))
    parser.counts_only("betas", where=lambda args: weighted_losses(args.distill), only=f"with --distill and one of {weighted}")
    for option in distiller_options():
        users = {name for name, entry in DISTILLERS.items() if option in entry.options}
        alone = " or ".join(sorted(users - {"kd"}))
        parser.counts_only(
            option,
            where=lambda args, users=users: users & active_losses(args.distill, alpha=args.alpha),
            only="with --distill and an --alpha above 0" if "kd" in users else f"with --distill {alone}",
        )


def _check_losses(names: Sequence[str], *, has_teacher: bool, alpha: float, betas: Sequence[float] | None) -> None:
    """Raises UserError for losses of `--distill` that do not go together, or not with their weights."""
    chosen = f"--distill {' '.join(names)}"
    if len(set(map(key_of, names))) < len(names) or ("none" in names and len(names) > 1):
        raise UserError(f"{chosen}: give each loss once, and none alone")
    if list(names) != ["none"] and not has_teacher:
        raise UserError(f"{chosen}: needs a trained teacher, give --t-path")
    if list(names) == ["kd"] and alpha == 0:
        raise UserError("--alpha 0: leaves --distill kd without any weight; choose --distill none instead")
    weighted = weighted_losses(names)
    if betas is not None and len(betas) != len(weighted):
        raise UserError(
            f"--betas: {len(betas)} values for the {len(weighted)} losses of --distill that have a beta; give one for each"
        )


def _check_effective(names: Sequence[str], *, alpha: float, betas: Sequence[float] | None) -> None:
    """Raises UserError for a loss that `--distill` names and whose weight is 0."""
    chosen = f"--distill {' '.join(names)}"
    if "kd" in names and alpha == 0:
        raise UserError(f"--alpha 0: leaves kd of {chosen} without any weight; leave kd out instead")
    for name, beta in zip(weighted_losses(names), betas or (), strict=False):
        if beta == 0:
            given = cli.typed("betas", list(betas))
            raise UserError(f"{given}: leaves {name} of {chosen} without any weight; leave {name} out instead")
