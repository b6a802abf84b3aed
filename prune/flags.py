"""The flags that say what is pruned and how, and where each of them counts."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from prune.criteria import CRITERIA, GM_DISTANCES, add_own_criterion, aliases, criteria_with
from prune.settings import (
    ALLOCATIONS,
    SENSITIVITY_SUFFIX,
    SPARSITIES,
    TRAIN_FORMS,
    NetworkSettings,
    PruningSettings,
    Sparsity,
    parse_budget,
)
from utils import cli
from utils.errors import naming
from utils.python_file import names_function

AUTO = "auto"
CALLED = {  # what functions call what these flags give
    "keep_ratio": "prune_rates",
    "keep_ratios": "prune_rates",
    "criterion": "prune_mode",
    "exclude": "exclude_layers",
    "coupled": "couple_channels",
    "linear": "prune_linear",
    "multiple": "channel_multiple",
    "interval": "prune_interval",
    "form": "train_form",
    "images": "reconstruct",
}
READ_BY_CRITERIA = {  # flag: what a criterion asks for
    "samp_batches": ("grad", "importance", "feature_maps", "removal_order"),
    "gamma": ("gamma",),
    "gm_distance": ("gm_distance",),
}


def add_pruning_flags(parser: cli.Parser) -> None:
    group = parser.add_argument_group("pruning")
    group.add_argument("--prune-rates", type=rate_or_file, nargs="+", default=[1.0], metavar="R",
                       help="proportion of filters retained, one for all layers or one a layer; 1 prunes none; or the file "
                            "that --sensitivity wrote")  # fmt: skip
    group.add_argument("--sensitivity", metavar="FILE.json",
                       help="only measure what each layer loses alone, without training, and write it there")  # fmt: skip
    group.add_argument("--sensitivity-drop", type=cli.non_negative_float, default=1.0, metavar="POINTS",
                       help="with such a file, each layer keeps the least proportion at which it lost no more")  # fmt: skip
    group.add_argument("--budget", type=cli.checked(parse_budget), metavar="COST=SHARE",
                       help="what may be left of the dense cost, macs=0.5, params=0.5 or latency=0.5, in place of "
                            "--prune-rates")  # fmt: skip
    group.add_argument("--allocation", default="uniform", choices=ALLOCATIONS,
                       help="a budget leaves the same of every layer, or the best scores per cost of all layers")  # fmt: skip
    group.add_argument("--couple-channels", action="store_true",
                       help="channels that meet in sums and the like go together, residual streams as well")  # fmt: skip
    group.add_argument("--prune-linear", action="store_true",
                       help="hidden units of MLPs, between two linear layers, are pruned as filters are")  # fmt: skip
    group.add_argument("--prune-mode", default="filter-nggm", choices=CRITERIA, metavar="NAME",
                       help=f"which filters go, those that it scores lowest: {', '.join(aliases())}, "
                            "or a function of your own, FILE.py:NAME")  # fmt: skip
    group.add_argument("--soft-prune", action="store_true", help="SFP: pruned filters may grow back")
    group.add_argument(
        "--prune-interval", type=cli.positive_int, metavar="EPOCHS", help="epochs between soft prunings (default: 1)"
    )
    group.add_argument("--prune-steps", type=cli.positive_int, default=1, metavar="N",
                       help="hard pruning takes N equal steps, before the first N epochs")  # fmt: skip
    group.add_argument("--reconstruct", type=image_count, metavar="N",
                       help="after the choice, mend what is left by least squares over N training images without labels, "
                            "layer by layer; auto: as many as the largest layer needs")  # fmt: skip
    group.add_argument("--samp-batches", type=cli.positive_int, metavar="N",
                       help="training batches that filters are scored by (default: all)")  # fmt: skip
    group.add_argument("--gamma", type=cli.proportion, default=0.5, help="weight of the distances in filter-nggm")
    group.add_argument("--gm-distance", default="euclidean", choices=GM_DISTANCES, help="distances of filter-gm and filter-nggm")
    group.add_argument("--exclude-layers", nargs="+", default=[], metavar="NAME",
                       help="layers that keep all filters, by name or pattern (layer4.*)")  # fmt: skip
    group.add_argument("--channel-multiple", type=channel_multiple, default=1, metavar="M",
                       help="round kept filters to a multiple of M, for speed; auto: the one that is measured to be best, "
                            "with --budget latency=SHARE")  # fmt: skip
    group.add_argument("--train-form", default="auto", choices=TRAIN_FORMS,
                       help="hard pruning trains the small network or the large one with zeros; auto: the faster")  # fmt: skip
    parser.parameters |= CALLED
    parser.spellings["prune_mode"] = aliases()
    parser.own_code.add("prune_mode")
    parser.completions.append(_add_own_criterion)
    cli.counts_in_training(parser, *cli.names_of(group))
    _say_what_counts(parser)


def pruning_settings(args: argparse.Namespace) -> PruningSettings:
    """What the flags say that is pruned, and how."""
    file = rates_file(args)
    return PruningSettings(
        keep_ratios=args.prune_rates if file is None else (1.0,),
        ratios_file=Path(file) if file is not None else None,
        sensitivity_drop=args.sensitivity_drop,
        sensitivity=Path(args.sensitivity) if args.sensitivity is not None else None,
        budget=parse_budget(args.budget) if args.budget is not None else None,
        allocation=args.allocation,
        criterion=args.prune_mode,
        gamma=args.gamma,
        gm_distance=args.gm_distance,
        samp_batches=args.samp_batches,
        exclude=args.exclude_layers,
        coupled=args.couple_channels,
        linear=args.prune_linear,
        multiple=None if args.channel_multiple == AUTO else args.channel_multiple,
        soft_interval=(args.prune_interval or 1) if args.soft_prune else None,
        steps=args.prune_steps,
        train_form=args.train_form,
        reconstruct=0 if args.reconstruct == AUTO else args.reconstruct,
    )


def network_settings(args: argparse.Namespace) -> NetworkSettings:
    """Which networks the flags name."""
    return cli.settings_of(NetworkSettings, args)


def _add_own_criterion(args: argparse.Namespace) -> None:
    """Runs the file that --prune-mode names, once."""
    if names_function(args.prune_mode) and args.prune_mode not in CRITERIA:
        with naming("--prune-mode"):
            add_own_criterion(args.prune_mode)


def reads(args: argparse.Namespace, inputs: Sequence[str]) -> bool:
    """Whether the criterion asks for one of these inputs."""
    return bool(CRITERIA[args.prune_mode].inputs & set(inputs))


def criteria_list() -> list[tuple[str, str]]:
    """A line on each criterion for `--help`: its paper and what it looks at."""
    return [(alias, f"{CRITERIA[name].paper}; {CRITERIA[name].needs}") for alias, name in aliases().items()]


def criterion_flags(name: str) -> list[str]:
    """The flags that a criterion reads, of those that not every one does."""
    return [flag for flag, inputs in READ_BY_CRITERIA.items() if CRITERIA[name].inputs & set(inputs)]


def rate_or_file(text: str) -> float | str:
    return text if text.endswith(SENSITIVITY_SUFFIX) else cli.keep_proportion(text)


def rates_file(args: argparse.Namespace) -> str | None:
    """The file that --prune-rates names in place of proportions."""
    return next((rate for rate in args.prune_rates if isinstance(rate, str)), None)


def image_count(text: str) -> int | str:
    return text if text == AUTO else cli.positive_int(text)


def channel_multiple(text: str) -> int | str:
    return text if text == AUTO else cli.positive_int(text)


def prunes(args: argparse.Namespace) -> bool:
    """Whether any layer is to lose filters."""
    return args.budget is not None or args.sensitivity is not None or rates_file(args) is not None or min(args.prune_rates) < 1


def say_what_trains(parser: cli.Parser) -> None:
    """Refuses, beside --sensitivity, whatever only has an effect on a run; called once all flags are there."""
    names = ["soft_prune", "prune_interval", "prune_steps", "budget", "allocation", "train_form", "prune_rates"]
    names += ["reconstruct"]
    names += ["save_dir", "run_name", "log_name", "resume", "auto_resume", "dry_run", "compile", "sync_bn"]
    names += ["checkpoint_interval", "checkpoint_minutes"]
    for title in ("training", "averaging", "distillation"):
        names += parser.names_in(title)
    names.remove("crop_padding")  # of the batches that filters are scored by
    parser.counts_only(*names, where=lambda args: args.sensitivity is None, only="without --sensitivity, which trains nothing")
    parser.counts_only(
        "t_path",
        where=lambda args: args.sensitivity is None or args.s_copy_t,
        only="without --sensitivity, or with --s-copy-t: nothing is learnt from a teacher there",
    )
    users = criteria_with(*READ_BY_CRITERIA["samp_batches"])
    parser.counts_only(
        "crop_padding",
        where=lambda args: args.sensitivity is None or reads(args, READ_BY_CRITERIA["samp_batches"]),
        only=f"without --sensitivity, or with --prune-mode {' or '.join(users)}, which read training batches",
    )


def _say_what_counts(parser: cli.Parser) -> None:
    below = "--prune-rates below 1 or a --budget, where filters are pruned"
    where_pruned = ("prune_mode", "soft_prune", "exclude_layers", "channel_multiple", "couple_channels", "prune_linear")
    parser.counts_only(*where_pruned, where=prunes, only=f"with {below}")
    parser.counts_only("prune_rates", where=lambda args: args.budget is None, only="without --budget")
    parser.counts_only(
        "sensitivity_drop",
        where=lambda args: rates_file(args) is not None,
        only="with the file of --sensitivity in --prune-rates",
    )
    parser.counts_only("allocation", where=lambda args: args.budget is not None, only="with --budget")
    for flag, read in READ_BY_CRITERIA.items():
        users = criteria_with(*read)
        parser.counts_only(
            flag,
            where=lambda args, read=read: prunes(args) and reads(args, read),
            only=f"with --prune-mode {' or '.join(users)} and {below}",
        )
    parser.counts_only(
        "prune_steps", where=lambda args: prunes(args) and not args.soft_prune, only=f"with {below}, and without --soft-prune"
    )
    parser.counts_only(
        "reconstruct",
        where=lambda args: prunes(args) and not args.soft_prune,
        only=f"with {below}, and without --soft-prune, whose filters grow back",
    )
    parser.counts_only("prune_interval", where=lambda args: args.soft_prune, only="with --soft-prune, hard pruning chooses once")
    parser.counts_only(  # without rates below 1 still for what an earlier pruning left in the student's file
        "train_form",
        where=lambda args: not args.soft_prune and (prunes(args) or args.s_path or args.s_copy_t),
        only="where filters are pruned for good, without --soft-prune",
    )


def add_sparsity_flags(parser: cli.Parser) -> None:
    """What makes channels small in training, before a pruning."""
    group = parser.add_argument_group("sparsity")
    group.add_argument("--sparsity", choices=SPARSITIES,
                       help="make channels small for a later pruning: bn is Network Slimming, group DepGraph")  # fmt: skip
    usual = ", ".join(f"{kind} {strength:g}" for kind, strength in SPARSITIES.items())
    group.add_argument("--sparsity-strength", type=cli.positive_float, metavar="S",
                       help=f"what the penalty is multiplied with (default: {usual})")  # fmt: skip
    parser.counts_only("sparsity_strength", where=lambda args: args.sparsity is not None, only="with --sparsity")
    cli.counts_in_training(parser, *cli.names_of(group))


def sparsity_of(args: argparse.Namespace) -> Sparsity | None:
    """The penalty that the flags ask for, if any."""
    if args.sparsity is None:
        return None
    return Sparsity(args.sparsity, args.sparsity_strength or SPARSITIES[args.sparsity])
