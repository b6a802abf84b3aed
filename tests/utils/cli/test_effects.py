"""A flag that is given counts or is refused by its name."""

import importlib
import json
import re

import pytest

from distill import DISTILLERS, distiller_options
from prune.criteria import CRITERIA
from utils import cli
from utils.cli.effects import given_flags, typed
from utils.errors import UserError


@pytest.fixture
def parser() -> cli.Parser:
    parser = cli.Parser(prog="train.py")
    parser.add_argument("--mode", default="plain", choices=("plain", "weighted"))
    parser.add_argument("--weight", type=float, default=2.0)
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--names", nargs="*", default=[])
    parser.counts_only("weight", where=lambda args: args.mode == "weighted", only="with --mode weighted")
    cli.add_training_flags(parser, lr=0.1, n_epochs=2, schedule=(), lr_drops=())
    cli.add_run_flags(parser, log_name="train.txt")
    return parser


def test_what_is_given_is_what_is_typed_and_not_what_differs_from_the_default(parser):
    words = ["--weight", "2", "--quiet", "--names", "--mode=plain"]
    assert given_flags(parser, words) == {"mode": "plain", "weight": 2.0, "quiet": True, "names": []}


def test_without_effect_is_refused_at_its_default_value_too(parser):
    with pytest.raises(UserError) as error:
        cli.parse_flags(parser, ["--weight", "2"])
    assert str(error.value) == "--weight 2: only with --mode weighted; here it has no effect"


def test_counts_where_the_rule_holds(parser):
    assert cli.parse_flags(parser, ["--weight", "3", "--mode", "weighted"]).weight == 3
    assert cli.parse_flags(parser, []).weight == 2


def test_the_flags_of_a_resumed_run_are_not_given(parser, tmp_path):
    flags = cli.flags_of(cli.parse_flags(parser, []))
    (tmp_path / "config.json").write_text(json.dumps({"script": "train.py", "flags": flags}))
    assert cli.parse_flags(parser, ["--resume", str(tmp_path)]).weight == 2
    with pytest.raises(UserError, match="--weight 2: only with"):
        cli.parse_flags(parser, ["--resume", str(tmp_path), "--weight", "2"])


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("betas", [50.0, 0.5], "--betas 50 0.5"),
        ("amp", True, "--amp"),
        ("run_name", "a", "--run-name a"),
        ("names", [], "--names"),
    ],
)
def test_as_it_was_typed(name, value, text):
    assert typed(name, value) == text


def pruning_flags(*words: str):
    parser = importlib.import_module("pruning").get_args_parser()
    return cli.parse_flags(parser, ["--t-path", "teacher.pt", "--s-copy-t", "--prune-rates", "0.5", *words])


def is_accepted(*words: str) -> bool:
    try:
        pruning_flags(*words)
    except UserError as error:
        assert "has no effect" in str(error)
        return False
    return True


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_criterion_brings_the_rules_of_what_it_asks_for(criterion):
    inputs = CRITERIA[criterion].inputs
    sampled = ("grad", "importance", "feature_maps", "removal_order")
    readers = {"--gamma 0.5": ("gamma",), "--gm-distance euclidean": ("gm_distance",), "--samp-batches 2": sampled}
    for words, read in readers.items():
        assert is_accepted("--prune-mode", criterion, *words.split()) == (not inputs.isdisjoint(read))


@pytest.mark.parametrize("loss", DISTILLERS)
def test_a_loss_brings_the_rules_of_its_options(loss):
    beside = [] if DISTILLERS[loss].replaces_kd else ["kd"]
    counting = {option for name in (loss, *beside) for option in DISTILLERS[name].options}
    for option, value in distiller_options().items():
        words = [f"--{option.replace('_', '-')}", *([] if isinstance(value.default, bool) else [str(value.default or 1)])]
        assert is_accepted("--distill", loss, *words) == (option in counting)


@pytest.mark.parametrize("script", ["initial_train", "pruning", "quantize_encode"])
def test_every_flag_of_training_is_refused_beside_evaluate(script):
    parser = importlib.import_module(script).get_args_parser()
    for words in (
        "--lr 1",
        "--n-epochs 3",
        "--schedule",
        "--seed 1",
        "--run-name a",
        "--log-name a",
        "--compile",
    ):
        with pytest.raises(UserError, match="here it has no effect"):
            cli.parse_flags(parser, ["--evaluate", *words.split()])
    for words in ("--batch-size 4", "--limit-batches 1", "--workers 0", "--data-dir a", "--device cpu", "--amp"):
        assert cli.parse_flags(parser, ["--evaluate", *words.split()]).evaluate


@pytest.mark.parametrize("script", ["initial_train", "pruning", "quantize_encode", "export", "report"])
def test_help_says_each_default_once_and_none_where_there_is_none(script):
    parser = importlib.import_module(script).get_args_parser()
    for action in parser._actions:
        text = parser.formatter_class(prog=script)._expand_help(action) if action.help else ""
        has_default = action.default not in (None, False, [], "==SUPPRESS==") or "(default:" in (action.help or "")
        assert text.count("(default:") == int(has_default), text
        assert not re.search(r"default: (None|False|\[)", text)
