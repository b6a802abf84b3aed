"""The flags of the losses: which are used, their weights, and the options that each of them is registered with."""

import argparse

from torch import nn

from distill import DISTILLERS, distiller_options
from distill.base import check_weights
from distill.objective import (
    DistillationObjective,
    active_losses,
    build_objective,
    check_effective,
    check_losses,
    default_alpha,
    weighted_losses,
)
from models.network_file import NetworkFile
from utils import cli
from utils.images.batches import ImageData


def add_distillation_flags(parser: cli.Parser) -> None:
    group = parser.add_argument_group("distillation")
    group.add_argument("--distill", nargs="+", default=["none"], choices=("none", *DISTILLERS), help="distillation losses")
    group.add_argument("--alpha", type=cli.non_negative_float,
                       help="weight of KD (default: 0.9, or 0 beside a loss that takes KD's place)")  # fmt: skip
    group.add_argument("--ce-weight", type=cli.non_negative_float, default=1.0, help="weight of the cross-entropy beside them")
    betas = ", ".join(f"{name} {DISTILLERS[name].beta:g}" for name in weighted_losses(DISTILLERS))
    group.add_argument("--betas", type=cli.non_negative_float, nargs="+", help=f"weights of the other losses (default: {betas})")
    rising = ", ".join(name for name, entry in DISTILLERS.items() if entry.rise)
    group.add_argument("--rise-epochs", type=cli.non_negative_float, metavar="N",
                       help=f"epochs over which the weights of {rising} rise (default: a twelfth of --n-epochs)")  # fmt: skip
    for keyword, option in distiller_options().items():
        group.add_argument(
            f"--{keyword.replace('_', '-')}", **cli.option_kind(option.default, may_be_zero=option.is_weight), help=option.help
        )
    parser.completions.append(_complete_alpha)
    cli.counts_in_training(parser, *cli.names_of(group))
    _say_what_counts(parser)


def check_distillation(args: argparse.Namespace) -> None:
    """Raises UserError for losses of `--distill` that do not go together, or not with the weights of the flags."""
    check_losses(args.distill, has_teacher=args.t_path is not None, alpha=args.alpha, betas=args.betas)
    if args.resume is None:  # a run that has begun with a loss of no weight may end with it
        check_effective(args.distill, alpha=args.alpha, betas=args.betas)
    for name in weighted_losses(args.distill):
        weights = {option: getattr(args, option) for option in DISTILLERS[name].weights}
        if weights:
            check_weights(weights)


def flagged_objective(
    args: argparse.Namespace, student: nn.Module, teacher: NetworkFile | None, data: ImageData
) -> DistillationObjective:
    """The loss that `student` trains by on `data` under the flags."""
    return build_objective(
        student,
        teacher.network if teacher is not None else None,
        args.distill,
        images=data.example,
        alpha=args.alpha,
        betas=args.betas,
        options=vars(args),
        n_epochs=args.n_epochs,
        rise_epochs=args.rise_epochs,
        ce_weight=args.ce_weight,
        facts={"train_labels": data.dataset.train.labels},
        label_smoothing=args.label_smoothing,
        seed=args.seed,
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
