"""The flags that the entry scripts share, by component, and the settings that each component's flags make."""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import TypeVar

from utils.cli.parser import Parser, counts_in_training, names_of, spaced
from utils.cli.recipes import recipes
from utils.cli.resumption import flags_of
from utils.cli.values import (
    LARGEST_FLOAT,
    channel_mean,
    channel_std,
    checked,
    decay_value,
    momentum_value,
    non_negative_float,
    non_negative_int,
    padding_width,
    positive_float,
    positive_int,
    process_count,
    run_path,
    seed_value,
    share_value,
    smoothing_value,
)
from utils.errors import UserError
from utils.images.settings import DATASET_NAMES, FOLDER_DATASETS, DataSettings, parsed_size
from utils.images.spec import CHANNELS
from utils.runs.settings import RunSettings
from utils.training.learning_rate import LR_SCHEDULES, LearningRate
from utils.training.settings import SHIPPED, SessionSettings, TrainingSettings
from utils.world import world_from_environment

PLACES = frozenset(("data_dir", "save_dir", "workers", "device"))  # taken whatever a script is asked to do
T = TypeVar("T")


def settings_of(kind: type[T], args: argparse.Namespace) -> T:
    """The settings of one component, a dataclass whose fields are named as flags; one that is no flag here keeps its default."""
    return kind(**{field.name: getattr(args, field.name) for field in fields(kind) if hasattr(args, field.name)})


def session_settings(script: str, args: argparse.Namespace) -> SessionSettings:
    """What the flags of a script that trains say of its run."""
    data, training, run = (settings_of(kind, args) for kind in (DataSettings, TrainingSettings, RunSettings))
    return SessionSettings(script, data, training, run, flags=flags_of(args), defaults=args.defaults, given=args.given)


def add_data_flags(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="digits", choices=DATASET_NAMES, help="what to train and test on")
    group.add_argument("--data-dir", default="./data", help="where the dataset is, or is downloaded to")
    group.add_argument("--mean", type=channel_mean, nargs=CHANNELS, metavar=("R", "G", "B"),
                       help="mean of the channels (default: as the file of the network says, or the dataset)")  # fmt: skip
    group.add_argument("--std", type=channel_std, nargs=CHANNELS, metavar=("R", "G", "B"),
                       help="standard deviation of the channels, likewise")  # fmt: skip
    group.add_argument("--batch-size", type=positive_int, default=128, help="images a step, over all processes")
    group.add_argument(
        "--workers", type=process_count, default=min(8, os.cpu_count() or 1), help="processes that decode streamed images"
    )
    group.add_argument("--image-size", type=checked(parsed_size), metavar="N|HxW",
                       help="bring all images to this height and width (default: that of all images if it is one of at most 64, "
                       "else 224; where a network is only tested, its own)")  # fmt: skip
    group.add_argument("--test-share", type=share_value, metavar="SHARE",
                       help="so much of each class is for testing, in a folder of class folders without a split")  # fmt: skip
    group.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be read")
    parser.counts_only("test_share", "skip_broken", where=lambda args: args.dataset in FOLDER_DATASETS,
                       only=f"with --dataset {'|'.join(sorted(FOLDER_DATASETS))}")  # fmt: skip
    group.add_argument("--limit-batches", type=positive_int, help="at most so many batches an epoch, in training and in testing")
    parser.set_defaults(may_download=True)  # False where it is a recorded --data-dir that would be written to


def add_config_flag(parser: Parser) -> None:
    """A file in the place of any flags; `parse_flags` puts them in front of the command line."""
    parser.add_argument("--config", metavar="FILE.toml",
                        help="take flags from here, such as a run's config.toml; any flag beside it wins")  # fmt: skip


def add_training_flags(
    parser: Parser,
    *,
    lr: float,
    n_epochs: int,
    schedule: Sequence[int],
    lr_drops: Sequence[float],
    may_skip_training: bool = False,
    fine_tunes: Callable[[argparse.Namespace], bool] = lambda args: True,
) -> None:
    """The flags of a training; where it may be skipped, it may have 0 epochs.

    The default schedule is that of `n_epochs`: of fewer it is in proportion, and the rate rises neither there, nor where
    `fine_tunes(args)` says that training goes on with weights.
    """
    epochs = {"type": non_negative_int, "help": "epochs of training, 0 for none"} if may_skip_training else {"type": positive_int}
    group = parser.add_argument_group("training")
    group.add_argument("--lr", type=positive_float, default=lr, help="learning rate of epoch 0")
    group.add_argument("--schedule", type=non_negative_int, nargs="*", metavar="EPOCH",
                       help="epochs, from 0, where the learning rate is multiplied (default: "
                       f"{spaced(schedule) or 'none'}; of fewer than {n_epochs} epochs in proportion)")  # fmt: skip
    group.add_argument("--lr-drops", type=positive_float, nargs="*", metavar="FACTOR",
                       help=f"its factor at each epoch of --schedule, above 1 too (default: {spaced(lr_drops)})")  # fmt: skip
    group.add_argument(
        "--lr-schedule",
        default="steps",
        choices=LR_SCHEDULES,
        help="how the rate falls: by --schedule, or from step to step to 0",
    )
    group.add_argument(
        "--warmup-epochs", type=non_negative_int, default=0, metavar="N", help="first epochs, over which the rate rises linearly"
    )
    group.add_argument("--n-epochs", default=n_epochs, **{"help": "epochs of training", **epochs})
    group.add_argument("--momentum", type=momentum_value, default=0.9, help="momentum of SGD, Nesterov's")
    group.add_argument("--no-nesterov", action="store_true", help="plain momentum, as in most published codes")
    group.add_argument("--weight-decay", type=non_negative_float, default=5e-4, help="weight decay of SGD")
    group.add_argument(
        "--label-smoothing", type=smoothing_value, default=0.0, metavar="S", help="share of the target that all classes get alike"
    )
    group.add_argument("--recalibrate-bn", type=positive_int, metavar="N",
                       help="estimate batch norm's statistics over N training batches before each evaluation")  # fmt: skip
    parser.parameters["batches"] = "recalibrate_bn"
    group.add_argument("--crop-padding", type=padding_width, metavar="PIXELS",
                       help="small images are cropped out of a frame of so many zeros (default: 4)")  # fmt: skip
    group.add_argument("--no-flip", action="store_true", help="do not mirror images: left and right mean something in this set")
    usual = LearningRate(lr, n_epochs, schedule=tuple(schedule), lr_drops=tuple(lr_drops))
    parser.completions.append(partial(_complete_schedule, usual=usual, fine_tunes=fine_tunes))
    parser.derived |= {"schedule", "lr_drops"}
    counts_in_training(parser, *names_of(group))
    by_itself = "with --lr-schedule steps, the others fall from step to step by themselves"
    parser.counts_only("schedule", "lr_drops", where=lambda args: args.lr_schedule == "steps", only=by_itself)


def add_recipe_flag(parser: Parser) -> None:
    """A name for the flags of a publication; `parse_flags` fills them in."""
    names = [name for name, recipe in recipes().items() if parser.prog in recipe.scripts]
    parser.add_argument("--recipe", choices=names, metavar="NAME",
                        help="train as a paper did, by the flags in docs/flags.md; any flag beside it wins")  # fmt: skip
    counts_in_training(parser, "recipe")


def add_averaging_flags(parser: Parser) -> None:
    group = parser.add_argument_group("averaging")
    group.add_argument("--ema", type=decay_value, metavar="DECAY", help="also average the weights over the steps, exponentially")
    group.add_argument("--ships", default="average", choices=SHIPPED, help="with --ema, the network that is scored and shipped")
    counts_in_training(parser, *names_of(group))
    parser.counts_only("ships", where=lambda args: args.ema is not None, only="with --ema")


def add_run_flags(parser: Parser, *, log_name: str) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=seed_value, default=1, help="seed of everything random")
    group.add_argument("--save-dir", default="./saves", help="folder of all runs")
    group.add_argument("--run-name", help="folder of this run inside --save-dir (default: the Unix time)")
    group.add_argument("--log-name", default=log_name, help="text log inside --save-dir; runs may share it")
    group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: CUDA where there is a device")
    group.add_argument(
        "--dev-idx", type=non_negative_int, help="which CUDA device (default: the first; with torchrun one a process)"
    )
    group.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    group.add_argument("--compile", action="store_true", help="torch.compile the training step")
    group.add_argument("--sync-bn", action="store_true", help="batch statistics over all processes (CUDA)")
    group.add_argument("--resume", type=run_path, metavar="RUN", help="resume the run in this folder; needs no other flag")
    group.add_argument(
        "--accept-data", action="store_true", help="with --resume, accept other images than those the run began with"
    )
    parser.counts_only("accept_data", where=lambda args: args.resume is not None, only="with --resume")
    group.add_argument(
        "--auto-resume", action="store_true", help="start the run of --run-name, resume it, or leave it alone if complete"
    )
    group.add_argument(
        "--checkpoint-interval", type=positive_int, default=1, metavar="EPOCHS", help="epochs between saved states"
    )
    group.add_argument(
        "--checkpoint-minutes", type=non_negative_float, metavar="MINUTES", help="also save within epochs, so often"
    )
    group.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
    group.add_argument("--evaluate", action="store_true", help="only score the network; writes nothing")
    counts_in_training(parser, "seed", "run_name", "log_name", "compile", "sync_bn", "auto_resume")
    counts_in_training(parser, "checkpoint_interval", "checkpoint_minutes", "dry_run")
    parser.counts_only(
        "sync_bn",
        where=lambda args: world_from_environment().size > 1,
        only="among several processes on CUDA devices, as torchrun starts them",
    )
    parser.counts_only("dev_idx", where=lambda args: args.device != "cpu", only="for CUDA devices, without --device cpu")


def _complete_schedule(
    args: argparse.Namespace, *, usual: LearningRate, fine_tunes: Callable[[argparse.Namespace], bool]
) -> None:
    """Gives --schedule and --lr-drops their defaults. Raises UserError for rates that cannot be those of a training."""
    if args.warmup_epochs >= max(args.n_epochs, 1):
        raise UserError(f"--warmup-epochs {args.warmup_epochs}: must be fewer than the {args.n_epochs} of --n-epochs")
    if args.lr_schedule != "steps":
        args.schedule, args.lr_drops = [], []
    if args.schedule is None and args.lr_drops is None:
        args.schedule, args.lr_drops = usual.fitted(args.n_epochs, rises=not fine_tunes(args))
    schedule, lr_drops = args.schedule or [], args.lr_drops or []
    if len(schedule) != len(lr_drops):
        raise UserError(f"--lr-drops: {len(lr_drops)} factors for the {len(schedule)} epochs of --schedule; give one for each")
    if sorted(set(schedule)) != schedule:
        raise UserError(f"--schedule {spaced(schedule)}: epochs must rise from one to the next")
    highest = max((args.lr * math.prod(lr_drops[:count]) for count in range(len(lr_drops) + 1)), default=0.0)
    if not highest <= LARGEST_FLOAT:
        raise UserError(f"--lr-drops {spaced(lr_drops)}: multiply --lr {args.lr} to {highest:g}, too large a learning rate")
    args.schedule, args.lr_drops = schedule, lr_drops
