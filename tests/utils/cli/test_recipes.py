"""Recipes by name: what they fill in, what wins beside them, what they are refused for, and their table in the documents."""

import importlib.util
import json
from pathlib import Path

import pytest

import initial_train
import pruning
from utils import cli
from utils.cli.recipes import recipes
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
PARSERS = {"initial_train.py": initial_train.get_args_parser, "pruning.py": pruning.get_args_parser}
DKD = ["--recipe", "cifar100-dkd-resnet56-resnet20", "--dataset", "cifar100", "--t-path", "t.pt"]
PAIR = ["--t-model", "repdistiller/resnet56", "--s-model", "repdistiller/resnet20"]


def parse(*words, script="pruning.py"):
    return cli.parse_flags(PARSERS[script](), list(words))


def words_for(recipe):
    words = ["--recipe", recipe.name, "--dataset", recipe.datasets[0]]
    if "pruning.py" not in recipe.scripts:
        return [*words, "--model", "resnet20"]
    student = (recipe.student or "resnet20").replace("*", "56")
    teacher = recipe.teacher or student
    network = [name if name.startswith("resnet") and name[6:] in ("18", "34", "56", "20") else f"repdistiller/{name}"
               for name in (teacher, student)]  # fmt: skip
    return [*words, "--t-path", "t.pt", "--t-model", network[0], "--s-model", network[1]]


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_fills_in_its_flags(name):
    recipe = recipes()[name]
    args = parse(*words_for(recipe), script=recipe.scripts[0])
    for flag, value in recipe.flags.items():
        assert getattr(args, flag) == value or [str(each) for each in getattr(args, flag)] == value, flag
    assert args.recipe == name and recipe.source


def test_a_recipe_says_what_was_published():
    args = parse(*DKD, *PAIR)
    assert (args.n_epochs, args.batch_size, args.lr, args.schedule, args.lr_drops) == (240, 64, 0.05, [150, 180, 210], [0.1] * 3)
    assert (args.no_nesterov, args.dkd_beta, args.rise_epochs, args.ce_weight) == (True, 2.0, 20.0, 1.0)
    args = parse("--recipe", "cifar100-kd", "--dataset", "cifar100", "--t-path", "t.pt", "--s-model", "resnet20")
    assert (args.ce_weight, args.alpha, args.kd_t) == (0.1, 0.9, 4.0)


def test_a_flag_beside_a_recipe_wins_before_and_behind_it():
    assert parse("--n-epochs", "3", *DKD, *PAIR).n_epochs == 3
    assert parse(*DKD, *PAIR, "--dkd-beta", "8", "--seed", "7").dkd_beta == 8
    args = parse("--recipe", "fpgm", "--dataset", "cifar10", "--s-model", "resnet56", "--budget", "macs=0.5")
    assert args.budget == "macs=0.5" and args.prune_mode == "filter-gm"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "sfp", "--s-model", "resnet56"], "--recipe sfp: is for --dataset cifar10, not digits"),
        ([*DKD, *PAIR[2:]], "--recipe cifar100-dkd-resnet56-resnet20: is for resnet56, name the network with --t-model"),
        ([*DKD, "--t-model", "resnet110", *PAIR[2:]], "--t-model resnet110: --recipe cifar100-dkd-resnet56-resnet20 is for"),
        ([*DKD, *PAIR[:2], "--s-model", "alexnet"], "--s-model alexnet: --recipe cifar100-dkd-resnet56-resnet20 is for resnet20"),
        ([*DKD, *PAIR, "--distill", "hap"], "--distill hap: --recipe cifar100-dkd-resnet56-resnet20 has the weights"),
        (["--recipe", "cifar100", "--dataset", "cifar100"], "--recipe: invalid choice: 'cifar100'"),
    ],
)
def test_a_recipe_for_something_else_is_refused_in_one_line(words, message):
    with pytest.raises(UserError) as error:
        parse(*words)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_dry_run_prints_the_flags_that_the_recipe_gives(capsys):
    parse(*DKD, *PAIR, "--dry-run", "--lr", "0.1")
    said = capsys.readouterr().out
    assert said.startswith("recipe cifar100-dkd-resnet56-resnet20: --n-epochs 240 --batch-size 64 --schedule 150 180 210 ")
    assert "--lr 0.05" not in said and "mdistiller" in said


def test_a_recorded_run_with_a_recipe_keeps_its_own_flags(tmp_path):
    args = parse(*DKD, *PAIR, "--n-epochs", "3")
    flags = {**cli.flags_of(args), "lr": 0.07}
    (tmp_path / "config.json").write_text(json.dumps({"script": "pruning.py", "flags": flags}))
    resumed = parse("--resume", str(tmp_path))
    assert (resumed.lr, resumed.n_epochs, resumed.recipe) == (0.07, 3, "cifar100-dkd-resnet56-resnet20")


def test_the_table_of_the_documents_is_that_of_the_file():
    spec = importlib.util.spec_from_file_location("write_settings", ROOT / "docs" / "write_settings.py")
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    page = (ROOT / "docs" / "flags.md").read_text()
    assert writer.page_with_table(page) == page, "run python docs/write_settings.py"
    assert writer.settings_table() in page
