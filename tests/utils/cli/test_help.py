"""What --help shows, and what is said of a mistyped name."""

import importlib
import re

import pytest

from distill.registry import DISTILLERS
from prune.criteria import CRITERIA, aliases
from utils import cli
from utils.citations import source_of
from utils.errors import UserError
from utils.version import VERSION

SCRIPTS = ("initial_train", "pruning", "quantize_encode")


def parser_of(script):
    return importlib.import_module(script).get_args_parser()


def printed(capsys, script, flag):
    with pytest.raises(SystemExit) as ended:
        parser_of(script).parse_args([flag])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_begins_with_ten_flags_and_names_all_others(capsys, monkeypatch, script):
    monkeypatch.setenv("COLUMNS", "80")
    text, parser = printed(capsys, script, "--help"), parser_of(script)
    assert max(map(len, text.splitlines())) <= 80
    explained, others = text.split("other flags, all explained by --help-all:")
    assert len(parser.first) == 10
    assert re.findall(r"^  (--[\w-]+)", explained, re.MULTILINE) == [cli.flag_of(name) for name in parser.first]
    flags = {action.option_strings[-1] for action in parser._actions if action.option_strings}
    assert set(re.findall(r"--[\w-]+", others)) == flags - {cli.flag_of(name) for name in parser.first}


def test_help_all_explains_every_flag(capsys):
    text, parser = printed(capsys, "pruning", "--help-all"), parser_of("pruning")
    explained = set(re.findall(r"^  (?:-h, )?(--[\w-]+)", text, re.MULTILINE))
    assert explained == {action.option_strings[-1] for action in parser._actions}


def test_help_has_a_line_on_each_criterion_and_loss(capsys):
    text = printed(capsys, "pruning", "--help")
    for name, entry in CRITERIA.items():
        assert f"  {entry.alias} " in text and f"{entry.paper}; {entry.needs}\n" in text, name
    for name, entry in DISTILLERS.items():
        assert f"{entry.paper}; {entry.compares}\n" in text, name
    assert re.search(r"^  fpgm +He et al., CVPR 2019; the weights$", text, re.MULTILINE)
    assert re.search(r"^  at +Zagoruyko & Komodakis, ICLR 2017; feature maps$", text, re.MULTILINE)


def test_a_source_is_authors_venue_and_year():
    assert source_of('Li et al., "A title, in 2 parts", ICLR 2017: `sum |w|`.\n\nMore of 2020.') == "Li et al., ICLR 2017"
    assert source_of("The random baseline: uniform in [0, 1). Without a generator.") == "The random baseline: uniform in [0, 1)"


@pytest.mark.parametrize("name", DISTILLERS)
def test_an_entry_says_what_its_class_compares(name):
    assert DISTILLERS[name].reads_maps == DISTILLERS[name].kind.reads_maps


def test_version(capsys):
    assert printed(capsys, "pruning", "--version").startswith(f"pruning.py {VERSION}, commit ")


@pytest.mark.parametrize(("alias", "name"), aliases().items())
def test_a_readable_name_is_recorded_as_the_criterion(alias, name):
    args = parser_of("pruning").parse_args(["--prune-mode", alias])
    assert args.prune_mode == parser_of("pruning").parse_args(["--prune-mode", name]).prune_mode == name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prune-mod", "l1"], "unrecognized arguments: --prune-mod l1; did you mean --prune-mode?"),
        (["--prune-mode", "fgpm"], "--prune-mode: invalid choice: 'fgpm', did you mean fpgm? (choose from random, l1,"),
        (["--prune-mode", "filter-gn"], "did you mean filter-gm"),
        (["--dataset", "cifr10"], "--dataset: invalid choice: 'cifr10', did you mean cifar10"),
        (["--distill", "fitnets"], "--distill: invalid choice: 'fitnets', did you mean fitnet"),
        (["--zzz"], "unrecognized arguments: --zzz"),
    ],
)
def test_a_mistyped_word_brings_the_nearest(words, message):
    with pytest.raises(UserError) as error:
        parser_of("pruning").parse_args(words)
    assert message in str(error.value)
