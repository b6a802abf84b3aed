"""From a command line to the flags of a run: of a new one, or those that a resumed one was started with."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.cli.config_file import check_together, take_config
from utils.cli.effects import check_effects, flag_of, given_flags, typed
from utils.cli.parser import Parser, spaced
from utils.cli.recipes import recipes, with_recipe
from utils.cli.recorded import recorded_words
from utils.cli.sources import data_words
from utils.errors import UserError, printable
from utils.python_file import code_digests, code_in
from utils.runs.folder import CONFIG, SUMMARY, is_unfinished, read_config
from utils.runs.settings import MOVABLE_FLAGS, PLACEMENT_FLAGS
from utils.world import world_from_environment

NO_SETTINGS = frozenset(("resume", "auto_resume", "accept_data", "dry_run", "defaults", "may_download", "config", "given"))


def parse_flags(parser: Parser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of a new run, or with `--resume` those that the run was started with.

    `defaults` among them holds what each flag is where nobody gives it: what a run of an older version meant that does not
    know the flag. `given` has those of the command line, and of its --config. Raises UserError for bad flags, and for a given one
    that has no effect beside the others.
    """
    words, file = take_config(parser, list(sys.argv[1:] if argv is None else argv))
    args, given = parser.parse_args(words), given_flags(parser, words)
    found, brings_folder = data_words(parser, given)
    if found:
        words = [*found, *words]
        args = parser.parse_args(words)
        args.may_download = not brings_folder
    if getattr(args, "recipe", None) is not None and args.resume is None:
        args = with_recipe(parser, words, args, given)
        args.may_download = not brings_folder
        if args.dry_run and world_from_environment().is_main:
            print(recipes()[args.recipe].described(without=given))
    if getattr(args, "auto_resume", False) and not args.evaluate:
        args = _begun_flags(parser, args, given)
    elif getattr(args, "resume", None) is not None:
        folder = args.resume
        saved, args = _resumed_flags(parser, folder, given)
        if _is_complete(Path(folder), saved, args) and not args.dry_run and not args.evaluate:
            print(f"{folder}: complete, nothing was changed; --n-epochs above {saved.n_epochs} continues it")
            raise SystemExit(0)
    defaults = parser.parse_args([])
    for flags in (args, defaults):
        _complete(parser, flags)
    if file is not None:
        check_together(parser, file, args, given)
    check_effects(parser.rules, args, given)
    parser.check(args)
    args.defaults, args.given = vars(defaults), given
    return args


def flags_of(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that make a run what it is, as plain values."""
    return {name: value for name, value in vars(args).items() if name not in NO_SETTINGS}


def _complete(parser: Parser, args: argparse.Namespace) -> None:
    for complete in parser.completions:
        complete(args)


def _resumed_flags(parser: Parser, folder: str, given: Mapping[str, Any]) -> tuple[argparse.Namespace, argparse.Namespace]:
    """The flags of the run in `folder`, and those with which it goes on where some are `given`."""
    saved = _saved_flags(parser, folder, given)
    for name in given.keys() - PLACEMENT_FLAGS:
        value, before = given[name], getattr(saved, name)
        may_rise = name == "n_epochs" and saved.lr_schedule == "steps"  # the others fall to 0 at the end that was named
        is_moved = name in MOVABLE_FLAGS and before is not None
        if value != before and not is_moved and not (may_rise and value > before):
            rule = "may only be raised" if may_rise else "leave it out, a resumed run keeps its flags"
            raise UserError(f"{typed(name, value)}: contradicts {_shown(before)} of {folder}; {rule}")
    return saved, argparse.Namespace(**{**vars(saved), **given, "may_download": "data_dir" in given})


def _is_complete(folder: Path, saved: argparse.Namespace, args: argparse.Namespace) -> bool:
    """Whether the run in `folder`, whose flags are `saved`, has come to the end that `args` name."""
    return (folder / SUMMARY).exists() and args.n_epochs == saved.n_epochs


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
    own = {name: given[name] for name in given.keys() - {"auto_resume", "config", *_WHERE}}
    saved, resumed = _resumed_flags(parser, str(folder), own)
    asked, found = (argparse.Namespace(**vars(flags)) for flags in (args, resumed))
    for flags in (asked, found):
        _complete(parser, flags)
    for name, value in vars(asked).items():
        may_differ = PLACEMENT_FLAGS | {"auto_resume", "config", "may_download", "n_epochs", *_WHERE}
        is_moved = name in MOVABLE_FLAGS and value is not None and vars(found)[name] is not None
        is_derived = name in parser.derived and name not in given  # of other epochs, or by the rule of an older version
        if name not in may_differ and not is_moved and not is_derived and value != vars(found)[name]:
            flag = flag_of(name)
            raise UserError(f"--run-name {args.run_name}: {folder} has {flag} {_shown(vars(found)[name])}, not {_shown(value)}")
    if _is_complete(folder, saved, resumed):
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
        if code_in(value) and given.get(name) != value:
            flag = flag_of(name)
            began = f"began with {flag} {printable(_shown(value))}"
            if name in given:
                raise UserError(f"{typed(name, given[name])}: --resume {folder} {began}, and a resumed run keeps its flags")
            raise UserError(f"--resume {folder}: {began}, code that never runs because a file names it; give {flag} again")


def _check_digests(recorded: Any, given: Mapping[str, Any], *, folder: str) -> None:
    """Raises UserError where a file with a criterion or a loss is not the one that the run began with."""
    recorded = recorded if isinstance(recorded, dict) else {}
    for flag in given:
        for name, digest in code_digests({flag: given[flag]}).items():
            if recorded.get(name, digest) != digest:
                raise UserError(
                    f"{flag_of(flag)} {name}: is not the code that {folder} began with; put that file back to resume it"
                )


def _saved_flags(parser: Parser, folder: str, given: Mapping[str, Any]) -> argparse.Namespace:
    """The flags in a run's config.json, checked as if they had just been typed; those that name code must have been `given`."""
    config = read_config(folder, script=parser.prog)
    flags = config["flags"]
    _check_code(flags, given, folder=folder)
    _check_digests(config.get("code"), given, folder=folder)
    try:
        saved = parser.parse_args(recorded_words(parser, flags))
        parser.check(saved)
        return saved
    except UserError as error:
        raise UserError(f"--resume {folder}: its {CONFIG} does not fit this script: {error}") from error


def _shown(value: Any) -> str:
    return spaced(value) if isinstance(value, list) else str(value)
