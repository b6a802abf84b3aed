"""What papers trained with, by name: `--recipe NAME` stands for the flags of recipes.json, any flag beside it wins.

A recipe says where its values are from, for which scripts and datasets it is, and where the paper's values belong to a pair of
networks, for which. Those are conditions and never filled in: a recipe for other data, networks or losses is refused.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from utils.cli.effects import flag_of, typed
from utils.cli.parser import Parser, spaced
from utils.errors import UserError

FILE = Path(__file__).with_name("recipes.json")
METHODS = ("distill", "prune_mode")  # whose weights and options the rest of a recipe is


@dataclass(frozen=True)
class Recipe:
    """`flags` by their names in the namespace; `teacher` and `student` are patterns of names, without a `repdistiller/`."""

    name: str
    source: str
    scripts: Sequence[str]
    datasets: Sequence[str]
    flags: Mapping[str, Any] = field(default_factory=dict)
    teacher: str | None = None
    student: str | None = None

    def words(self, *, without: Mapping[str, Any] | None = None) -> list[str]:
        """The flags as they are typed, but those by the names `without`: `["--n-epochs", "240", ...]`."""
        words = []
        for name, value in self.flags.items():
            if name not in (without or {}):
                values = [] if value is True else value if isinstance(value, list) else [value]
                words += [flag_of(name), *(f"{each:g}" if isinstance(each, float) else str(each) for each in values)]
        return words

    def described(self, *, without: Mapping[str, Any]) -> str:
        """What a plan says of the recipe where the flags `without` are given beside it."""
        return f"recipe {self.name}: {' '.join(self.words(without=without))} ({self.source})"


@cache
def recipes() -> dict[str, Recipe]:
    """All recipes by name, in the order of the file."""
    entries = json.loads(FILE.read_text())
    return {name: Recipe(name, **entry) for name, entry in entries.items()}


def with_recipe(parser: Parser, words: Sequence[str], args: argparse.Namespace, given: Mapping[str, Any]) -> argparse.Namespace:
    """The flags of the command line `words`, of which `args` and `given` were parsed, on top of those of its recipe.

    Raises UserError for a recipe of another script, dataset, network or method.
    """
    recipe = recipes()[args.recipe]
    _check(recipe, parser, args, given)
    filled = [*recipe.words(without=_replaced(parser, given)), *words]
    return parser.parse_args(filled)


def _replaced(parser: Parser, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given flags, and those that cannot stand beside them."""
    groups = ([action.dest for action in group._group_actions] for group in parser._mutually_exclusive_groups)
    rivals = {name for group in groups if given.keys() & set(group) for name in group}
    return dict.fromkeys(given.keys() | rivals)


def _check(recipe: Recipe, parser: Parser, args: argparse.Namespace, given: Mapping[str, Any]) -> None:
    if parser.prog not in recipe.scripts:
        raise UserError(f"--recipe {recipe.name}: is for {' and '.join(recipe.scripts)}, not for {parser.prog}")
    if args.dataset not in recipe.datasets:
        raise UserError(f"--recipe {recipe.name}: is for --dataset {' or '.join(recipe.datasets)}, not {args.dataset}")
    student = "s_model" if given.get("s_model") is not None else "t_model"
    for flag, pattern in (("t_model", recipe.teacher), (student, recipe.student)):
        name = given.get(flag)
        if pattern is None:
            continue
        if name is None:
            raise UserError(f"--recipe {recipe.name}: is for {pattern}, name the network with {flag_of(flag)}")
        if not fnmatchcase(name.removeprefix("repdistiller/"), pattern):
            raise UserError(f"{typed(flag, name)}: --recipe {recipe.name} is for {pattern}")
    for method in METHODS:
        if method in given and method in recipe.flags and given[method] != recipe.flags[method]:
            own = recipe.flags[method]
            own = spaced(own) if isinstance(own, list) else own
            raise UserError(f"{typed(method, given[method])}: --recipe {recipe.name} has the weights and options of {own}")
