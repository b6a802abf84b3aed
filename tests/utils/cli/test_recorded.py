"""What a recorded flag may decide: never an action, never a place to write, never another flag."""

import pytest

from utils import cli
from utils.cli.recorded import recorded_words
from utils.errors import UserError


@pytest.fixture
def parser() -> cli.Parser:
    parser = cli.Parser(prog="train.py")
    parser.add_argument("--names", nargs="+", default=[])
    parser.add_argument("--decode")
    parser.add_argument("--output")
    parser.add_argument("--force", action="store_true")
    cli.add_data_flags(parser)
    cli.add_run_flags(parser, log_name="train.txt")
    return parser


def test_values_come_back_as_they_were(parser):
    flags = {"names": ["x", "y"], "seed": 7, "amp": True, "compile": False, "limit_batches": None, "data_dir": "-my data"}
    args = parser.parse_args(recorded_words(parser, flags))
    assert {name: getattr(args, name) for name in flags} == flags


def test_actions_and_places_are_not_taken_over(parser):
    flags = dict.fromkeys(("help", "force", "dry_run", "evaluate", "inspect"), True) | {
        "decode": "a",
        "output": "b",
        "resume": "c",
    }
    assert recorded_words(parser, flags) == []


@pytest.mark.parametrize("name", ["decode=x --", "dry-run", "turbo", "", "default_schedule", "may_download", "-h"])
def test_a_name_that_is_no_flag(name, parser):
    with pytest.raises(UserError, match="unrecognized arguments"):
        recorded_words(parser, {name: "x"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("names", ["--decode=/x", "--output=/y"]),
        ("names", ["a", "-h"]),
        ("names", [["a"]]),
        ("names", {"a": 1}),
        ("names", [None]),
        ("seed", {}),
    ],
)
def test_a_value_that_is_none(name, value, parser):
    with pytest.raises(UserError, match=f"--{name}: .* is no value of a flag"):
        recorded_words(parser, {name: value})
