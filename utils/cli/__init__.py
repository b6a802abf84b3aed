"""Flags and exits that the entry scripts share. Bad input ends in one line on stderr and status 2, never in a traceback."""

import argparse
import errno
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from utils.cli.recorded import recorded_words
from utils.distributed import is_lost_process, leave
from utils.effects import Rule, check_effects, given_flags, typed
from utils.errors import Interrupted, NonFiniteLoss, UserError, printable, shown
from utils.images.datasets import DATASETS
from utils.images.spec import CHANNELS, MIN_STD, is_mean, is_std
from utils.memory import keep_freed_memory
from utils.python_file import names_function
from utils.runs.folder import CONFIG, SUMMARY, is_unfinished, read_config
from utils.runs.state import PLACEMENT_FLAGS
from utils.streams import NAMES, outlive_lost_streams, print_error, take_losses
from utils.training.averaging import SHIPPED
from utils.training.learning_rate import LR_SCHEDULES
from utils.world import world_from_environment

SILENCE_SECONDS = 5.0
PLACES = frozenset(("data_dir", "save_dir", "workers", "device"))  # taken whatever a script is asked to do


class HelpFormatter(argparse.HelpFormatter):
    """Says each default once, where there is one that the help text does not say itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, False, []) or action.default is argparse.SUPPRESS or "(default:" in action.help:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {_spaced(action.default)})"
        return f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and that knows where each flag counts."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **options)
        self.rules: list[Rule] = []
        self.completions: list[Callable[[argparse.Namespace], None]] = []  # set the defaults that depend on other flags

    def counts_only(self, *names: str, where: Callable[[argparse.Namespace], bool], only: str) -> None:
        """The flags `names` (as in the namespace) have an effect only `where(args)`; `only` ends the sentence "it counts only".

        Given elsewhere they are refused by `parse_flags`.
        """
        self.rules.append(Rule(frozenset(names), where, only))

    def names_in(self, title: str) -> list[str]:
        """The flags of the argument group of this title, as they are called in the namespace."""
        return [name for group in self._action_groups if group.title == title for name in names_of(group)]

    def names(self) -> set[str]:
        """All flags so far, as they are called in the namespace."""
        return {action.dest for action in self._actions} - {"help"}

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        """As argparse's, for words that a file system, a log and a JSON file can take. Raises UserError for others."""
        words = list(sys.argv[1:] if args is None else args)
        pairs = [_flag_and_value(word, previous) for word, previous in zip(words, ["", *words], strict=False)]
        for flag, value in pairs:
            _check_text(flag, value)
        parsed = super().parse_args(words, namespace)
        for flag, value in pairs:  # afterwards: a long number is no number of its flag, and that says more
            _check_length(flag, value)
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def _flag_and_value(word: str, previous: str) -> tuple[str, str]:
    """What a word of a command line gives, and the flag it belongs to as far as that can be seen without the parser."""
    if word.startswith("--") and "=" in word:
        flag, value = word.split("=", 1)
        return flag, value
    return previous if previous.startswith("--") and "=" not in previous else "", word


def _check_text(flag: str, value: str) -> None:
    """Raises UserError for what is no text, which neither a log nor a JSON file could hold."""
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{_origin(flag, value)}: is no text in UTF-8 without zero bytes")


def _check_length(flag: str, value: str) -> None:
    """Raises UserError for a value that no file system takes as a path."""
    longest = max(len(part) for part in value.encode().split(b"/"))
    if flag not in FREE_TEXT_FLAGS and (longest > LONGEST_NAME or len(value.encode()) > LONGEST_PATH):
        limits = f"{LONGEST_NAME} bytes a name, {LONGEST_PATH} a path"
        raise UserError(f"{_origin(flag, value)}: is too long for a file system, which takes {limits}")


def _origin(flag: str, value: str) -> str:
    return f"{printable(flag, SHOWN_VALUE)} {shown(value, SHOWN_VALUE)}".lstrip()


# bounds that nothing sensible meets: counts fit into 64 bits, squares of factors into float32
LARGEST_INT, LARGEST_FLOAT, SMALLEST_FLOAT = 2**63 - 1, 1e18, 1e-18
SHOWN_VALUE = 60  # characters of a value in a message
LONGEST_PATH, LONGEST_NAME = 4095, 255  # bytes, of what Linux takes
FREE_TEXT_FLAGS = ("--title",)  # become no name


def number(kind: Callable[[str], Any], description: str, accepts: Callable[[Any], bool]) -> Callable[[str], Any]:
    """An argparse type: a finite `kind` of number that `accepts` holds for, described as `description` in its error.

    Larger ones than LARGEST_INT and LARGEST_FLOAT are refused, whatever `accepts` says.
    """
    largest = LARGEST_INT if kind is int else LARGEST_FLOAT

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:  # of whole numbers of thousands of digits as well
            value = math.nan
        if value != value or not accepts(value):
            raise argparse.ArgumentTypeError(f"{shown(text, SHOWN_VALUE)} is not {description}")
        if value > largest:
            raise argparse.ArgumentTypeError(f"{shown(text, SHOWN_VALUE)} is too large, at most {largest:g} is possible")
        return value

    return parse


positive_int = number(int, "a whole number of 1 or more", lambda value: value >= 1)
non_negative_int = number(int, "a whole number of 0 or more", lambda value: value >= 0)
process_count = number(int, "a whole number from 0 to 1024", lambda value: 0 <= value <= 1024)
positive_float = number(float, f"a number above 0, of {SMALLEST_FLOAT:g} or more", lambda value: value >= SMALLEST_FLOAT)
non_negative_float = number(float, "a number of 0 or more", lambda value: value >= 0)
momentum_value = number(float, "a number from 0 to below 1", lambda value: 0 <= value < 1)
decay_value = number(float, "a decay above 0 and below 1", lambda value: 0 < value < 1)
smoothing_value = number(float, "a share from 0 to below 1", lambda value: 0 <= value < 1)
padding_width = number(int, "a whole number from 0 to 32", lambda value: 0 <= value <= 32)
proportion = number(float, "a proportion from 0 to 1", lambda value: 0 <= value <= 1)
keep_proportion = number(float, "a proportion above 0 and at most 1", lambda value: 0 < value <= 1)
channel_mean = number(float, "a mean from 0 to 1, of images scaled to [0, 1]", is_mean)
channel_std = number(float, f"a deviation from {MIN_STD:g} to 1, of images scaled to [0, 1]", is_std)
seed_value = number(int, "a whole number from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63)


def checked(check: Callable[[str], None]) -> Callable[[str], str]:
    """An argparse type: a text that `check` raises no UserError for."""

    def parse(text: str) -> str:
        try:
            check(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return text

    return parse


def option_kind(default: bool | int | float, *, may_be_zero: bool = False) -> dict[str, Any]:
    """How a flag is read whose default is this: a switch, a whole number of 1 or more, or a number above 0, or from 0 on."""
    if isinstance(default, bool):
        return {"action": "store_true"}
    if isinstance(default, int):
        return {"type": non_negative_int if may_be_zero else positive_int, "default": default}
    return {"type": non_negative_float if may_be_zero else positive_float, "default": default}


def add_data_flags(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="digits", choices=DATASETS, help="what to train and test on")
    group.add_argument("--data-dir", default="./data", help="where the dataset is, or is downloaded to")
    group.add_argument("--mean", type=channel_mean, nargs=CHANNELS, metavar=("R", "G", "B"),
                       help="mean of the channels (default: as the file of the network says, or the dataset)")  # fmt: skip
    group.add_argument("--std", type=channel_std, nargs=CHANNELS, metavar=("R", "G", "B"),
                       help="standard deviation of the channels, likewise")  # fmt: skip
    group.add_argument("--batch-size", type=positive_int, default=128, help="images a step, over all processes")
    group.add_argument(
        "--workers", type=process_count, default=min(8, os.cpu_count() or 1), help="processes that decode streamed images"
    )
    group.add_argument("--limit-batches", type=positive_int, help="at most so many batches an epoch, in training and in testing")
    parser.set_defaults(may_download=True)  # False where it is a recorded --data-dir that would be written to


def add_training_flags(parser: Parser, *, lr: float, n_epochs: int, schedule: Sequence[int], lr_drops: Sequence[float]) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--lr", type=positive_float, default=lr, help="learning rate of epoch 0")
    group.add_argument("--schedule", type=non_negative_int, nargs="*", metavar="EPOCH",
                       help=f"epochs, from 0, where the learning rate is multiplied (default: {_spaced(schedule)})")  # fmt: skip
    group.add_argument("--lr-drops", type=positive_float, nargs="*", metavar="FACTOR",
                       help=f"its factor at each epoch of --schedule, above 1 too (default: {_spaced(lr_drops)})")  # fmt: skip
    group.add_argument(
        "--lr-schedule",
        default="steps",
        choices=LR_SCHEDULES,
        help="how the rate falls: by --schedule, or from step to step to 0",
    )
    group.add_argument(
        "--warmup-epochs", type=non_negative_int, default=0, metavar="N", help="first epochs, over which the rate rises linearly"
    )
    group.add_argument("--n-epochs", type=positive_int, default=n_epochs, help="epochs of training")
    group.add_argument("--momentum", type=momentum_value, default=0.9, help="momentum of SGD, Nesterov's")
    group.add_argument("--no-nesterov", action="store_true", help="plain momentum, as in most published codes")
    group.add_argument("--weight-decay", type=non_negative_float, default=5e-4, help="weight decay of SGD")
    group.add_argument(
        "--label-smoothing", type=smoothing_value, default=0.0, metavar="S", help="share of the target that all classes get alike"
    )
    group.add_argument("--crop-padding", type=padding_width, metavar="PIXELS",
                       help="small images are cropped out of a frame of so many zeros (default: 4)")  # fmt: skip
    parser.set_defaults(default_schedule=tuple(schedule), default_lr_drops=tuple(lr_drops))
    counts_in_training(parser, *names_of(group))
    by_itself = "with --lr-schedule steps, the others fall from step to step by themselves"
    parser.counts_only("schedule", "lr_drops", where=lambda args: args.lr_schedule == "steps", only=by_itself)


def add_averaging_flags(parser: Parser) -> None:
    group = parser.add_argument_group("averaging")
    group.add_argument("--ema", type=decay_value, metavar="DECAY", help="also average the weights over the steps, exponentially")
    group.add_argument("--ships", default="average", choices=SHIPPED, help="with --ema, the network that is scored and shipped")
    counts_in_training(parser, *names_of(group))
    parser.counts_only("ships", where=lambda args: args.ema is not None, only="with --ema")


def names_of(group: argparse._ArgumentGroup) -> list[str]:
    """The flags of an argument group, as they are called in the namespace."""
    return [action.dest for action in group._group_actions]


def counts_in_training(parser: Parser, *names: str) -> None:
    """These flags have no effect where a network is only scored."""
    parser.counts_only(*names, where=lambda args: not args.evaluate, only="where a network is trained, without --evaluate")


def _spaced(values: Sequence[float]) -> str:
    return " ".join(map(str, values)) or "none"


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
    group.add_argument("--resume", metavar="RUN", help="go on with the run in this folder; needs no other flag")
    group.add_argument(
        "--auto-resume", action="store_true", help="begin the run of --run-name, go on with it, or leave it alone if complete"
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


def parse_flags(parser: Parser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of a new run, or with `--resume` those that the run was started with.

    `defaults` among them holds what each flag is where nobody gives it: what a run of an older version meant that does not
    know the flag. Raises UserError for bad flags, and for a given one that has no effect beside the others.
    """
    args, given = parser.parse_args(argv), given_flags(parser, argv)
    if getattr(args, "auto_resume", False) and not args.evaluate:
        args = _begun_flags(parser, args, given)
    elif getattr(args, "resume", None) is not None:
        args = _resumed_flags(parser, args.resume, given)
    defaults = parser.parse_args([])
    for flags in (args, defaults):
        _complete(parser, flags)
    check_effects(parser.rules, args, given)
    args.defaults = vars(defaults)
    return args


def _complete(parser: Parser, args: argparse.Namespace) -> None:
    for complete in parser.completions:
        complete(args)
    if hasattr(args, "default_schedule"):
        _complete_schedule(args)
        for name in ("default_schedule", "default_lr_drops"):
            delattr(args, name)


def _resumed_flags(parser: Parser, folder: str, given: Mapping[str, Any]) -> argparse.Namespace:
    saved = _saved_flags(parser, folder, given)
    for name in given.keys() - PLACEMENT_FLAGS:
        value, before = given[name], getattr(saved, name)
        may_rise = name == "n_epochs" and saved.lr_schedule == "steps"  # the others fall to 0 at the end that was named
        if value != before and not (may_rise and value > before):
            rule = "may only be raised" if may_rise else "leave it out, a resumed run keeps its flags"
            raise UserError(f"{typed(name, value)}: contradicts {_shown(before)} of {folder}; {rule}")
    return argparse.Namespace(**{**vars(saved), **given, "may_download": "data_dir" in given})


def _begun_flags(parser: Parser, args: argparse.Namespace, given: Mapping[str, Any]) -> argparse.Namespace:
    """The flags with which the run of --run-name goes on, or `args` if it has not begun. Ends the process if it is complete.

    All of them are those of the command line. Raises UserError for another run of that name, and for a network in the folder of
    a run that is not complete.
    """
    if args.resume is not None:
        raise UserError(f"--auto-resume: not with --resume {args.resume}, which names a run that has begun")
    if args.run_name is None:
        raise UserError("--auto-resume: needs --run-name, by which a run is known again")
    folder = Path(args.save_dir) / args.run_name
    if not (folder / CONFIG).exists():
        _check_sources(args)
        return args
    saved = _saved_flags(parser, str(folder), given)
    resumed = _resumed_flags(parser, str(folder), {name: given[name] for name in given.keys() - {"auto_resume", *_WHERE}})
    asked, found = (argparse.Namespace(**vars(flags)) for flags in (args, resumed))
    for flags in (asked, found):
        _complete(parser, flags)
    for name, value in vars(asked).items():
        if name not in PLACEMENT_FLAGS | {"auto_resume", "may_download", "n_epochs", *_WHERE} and value != vars(found)[name]:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"--run-name {args.run_name}: {folder} has {flag} {_shown(vars(found)[name])}, not {_shown(value)}")
    if (folder / SUMMARY).exists() and resumed.n_epochs == saved.n_epochs:
        print(f"{folder}: complete")
        raise SystemExit(0)
    _check_sources(args)
    return argparse.Namespace(**{**vars(resumed), "resume": str(folder), "dry_run": args.dry_run})


_WHERE = ("save_dir", "run_name")


def _check_sources(args: argparse.Namespace) -> None:
    """Raises UserError for a network in the folder of a run that is not complete: what lies there may yet be replaced."""
    for name in ("t_path", "s_path", "load_path"):
        path = getattr(args, name, None)
        if path is not None and is_unfinished(Path(path).parent):
            raise UserError(f"{typed(name, path)}: the run that writes it is not complete yet")


def _check_code(saved: Mapping[str, Any], given: Mapping[str, Any], *, folder: str) -> None:
    """Raises UserError for a Python file that only config.json names: code runs because somebody typed its name.

    It is not even looked at: it may be a pipe or a device.
    """
    for name, value in saved.items():
        if names_function(value) and given.get(name) != value:
            flag = f"--{name.replace('_', '-')}"
            began = f"began with {flag} {printable(value)}"
            if name in given:
                raise UserError(f"{typed(name, given[name])}: --resume {folder} {began}, and a resumed run keeps its flags")
            raise UserError(f"--resume {folder}: {began}, code that never runs because a file names it; give {flag} again")


def _saved_flags(parser: Parser, folder: str, given: Mapping[str, Any]) -> argparse.Namespace:
    """The flags in a run's config.json, checked as if they had just been typed; those that name code must have been `given`."""
    flags = read_config(folder, script=parser.prog)["flags"]
    _check_code(flags, given, folder=folder)
    try:
        return parser.parse_args(recorded_words(parser, flags))
    except UserError as error:
        raise UserError(f"--resume {folder}: its {CONFIG} does not fit this script: {error}") from error


def _shown(value: Any) -> str:
    return _spaced(value) if isinstance(value, list) else str(value)


def _complete_schedule(args: argparse.Namespace) -> None:
    if args.warmup_epochs >= args.n_epochs:
        raise UserError(f"--warmup-epochs {args.warmup_epochs}: must be fewer than the {args.n_epochs} of --n-epochs")
    if args.lr_schedule != "steps":
        args.schedule, args.lr_drops = [], []
    if args.schedule is None and args.lr_drops is None:
        args.schedule, args.lr_drops = list(args.default_schedule), list(args.default_lr_drops)
    schedule, lr_drops = args.schedule or [], args.lr_drops or []
    if len(schedule) != len(lr_drops):
        raise UserError(f"--lr-drops: {len(lr_drops)} factors for the {len(schedule)} epochs of --schedule; give one for each")
    if sorted(set(schedule)) != schedule:
        raise UserError(f"--schedule {_spaced(schedule)}: epochs must rise from one to the next")
    highest = max((args.lr * math.prod(lr_drops[:count]) for count in range(len(lr_drops) + 1)), default=0.0)
    if not highest <= LARGEST_FLOAT:
        raise UserError(f"--lr-drops {_spaced(lr_drops)}: multiply --lr {args.lr} to {highest:g}, too large a learning rate")
    args.schedule, args.lr_drops = schedule, lr_drops


def require(args: argparse.Namespace, *names: str) -> None:
    """Raises UserError for a flag that was not given."""
    for name in names:
        if getattr(args, name) is None:
            raise UserError(f"--{name.replace('_', '-')} is required")


def execute(main: Callable[[], None]) -> NoReturn:
    """Runs an entry script's `main` and exits: 2 for bad input, 1 for a failed training, 128 + number for a signal.

    Output that got lost is a failure (1, or as if by SIGPIPE) where no run has it in its text log.
    """
    status: Any = 0
    outlive_lost_streams()
    keep_freed_memory()
    try:
        main()
        leave()  # not after an error: a group that lost a member cannot be left in good order
    except UserError as error:
        status = _complain(error, status=2)
    except OSError as error:
        if error.filename is None:
            raise
        status = _complain(f"{printable(os.fsdecode(error.filename))}: {error.strerror}", status=2)
    except NonFiniteLoss as error:
        status = _complain(error, status=1)
    except Interrupted as error:
        status = _complain(error, status=128 + error.signal_number, what="")
    except KeyboardInterrupt:
        status = 130
    except SystemExit as end:  # of --help
        status = end.code
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        first_line = str(error).partition("\n")[0]
        status = _complain(f"another process has ended, its own message says why ({first_line})", status=1, is_echo=True)
    sys.exit(status or _output_status())


def _output_status() -> int:
    """0, unless something that was printed is nowhere else. A reader that went away has read what it wanted: not a word then."""
    loss = take_losses().get(NAMES["stdout"])
    if loss is None:
        return 0
    if loss.errno == errno.EPIPE:
        return 128 + signal.SIGPIPE
    return _complain(f"{NAMES['stdout']} cannot be written: {loss.strerror}", status=1)


def _complain(error: Exception | str, *, status: int, is_echo: bool = False, what: str = "error") -> int:
    """Prints one line. Of many processes the one whose error it is speaks, and the main one where all have the same.

    So the main process speaks at once, unless its error is the echo of another's. Any other waits meanwhile, and only
    speaks if torchrun has not ended it by then, as it does when the first process ends.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0" and isinstance(error, Interrupted):
        return status  # the processes agreed to stop
    if rank != "0" or is_echo:
        time.sleep(SILENCE_SECONDS)
    place = f" (process {rank})" if rank != "0" else ""
    head = f"{Path(sys.argv[0]).name}: {what}{place}".removesuffix(": ")
    print_error(f"{head}: {' '.join(str(error).split())}")
    return status
