"""--config: flags from a file, each error with its place, and the file that a run leaves."""

import pytest

from pruning import get_args_parser
from utils import cli
from utils.cli.config_file import config_text
from utils.errors import UserError

tomllib = pytest.importorskip("tomllib")  # Python 3.11, or tomli


@pytest.fixture
def parsed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def parse(text, *words):
        (tmp_path / "run.toml").write_text(text)
        return cli.parse_flags(get_args_parser(), ["--t-model", "resnet8", *words, "--config", "run.toml"])

    return parse


def test_flags_come_from_the_file_and_typed_ones_win(parsed):
    text = '# mine\nprune-rates = [0.6]\nprune_mode = "fpgm"\nlr = 0.5\nsoft-prune = true\namp = false\nseed = 7\n'
    args = parsed(text, "--lr", "0.25")
    assert (args.prune_rates, args.prune_mode, args.lr, args.soft_prune, args.amp, args.seed) == (
        [0.6],
        "filter-gm",
        0.25,
        True,
        False,
        7,
    )
    assert "config" not in cli.flags_of(args)


def test_a_typed_flag_wins_over_a_wrong_value_of_the_file(parsed):
    assert parsed('lr = "much"\n', "--lr", "0.25").lr == 0.25


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = 0.5\nlrr = 3\n", "--config run.toml line 2, lrr: is no flag of pruning.py"),
        ("prune-rate = [0.6]\n", "run.toml line 1, prune-rate: is no flag of pruning.py; did you mean --prune-rates"),
        ("lr = -1\n", "run.toml line 1, lr: --lr: '-1' is not a number above 0"),
        ("\nlr = 1\nlr = 2\n", "run.toml line 3, lr: stands in line 2 already"),
        ("prune-rates = [0.5]\nprune_rates = [0.6]\n", "line 2, prune_rates: stands in line 1 already"),
        ("lr = 0.1\ngamma = 0.3\n", "run.toml line 2, gamma: --gamma 0.3: only with --prune-mode"),
        ("amp = 3\n", "run.toml line 1, amp: --amp: ignored explicit argument"),
        ("lr = {a = 1}\n", "line 1, lr: {'a': 1} is no value of a flag"),
        ('exclude-layers = ["--force"]\n', "line 1, exclude-layers: ['--force'] is no value of a flag"),
        ("lr = \n", "run.toml: is no TOML: Invalid value (at line 1, column 6)"),
        ('t-path = "a.pt"\ns-model = "nets.py:small"\n', "line 2, s-model: 'nets.py:small' is code, which never runs"),
        ('resume = "saves/1"\n', "line 1, resume: --resume counts on the command line only"),
        ('config = "b.toml"\n', "line 1, config: --config counts on the command line only"),
        ('dataset = "cifar11"\n', "line 1, dataset: --dataset: invalid choice: 'cifar11', did you mean cifar10"),
    ],
)
def test_an_error_names_file_line_and_key(parsed, text, message):
    with pytest.raises(UserError) as error:
        parsed(text)
    assert message in str(error.value)


def test_a_file_that_cannot_be_read(parsed, tmp_path):
    for words in (["--config", "none.toml"], ["--config", str(tmp_path)], ["--config", "/dev/zero"]):
        with pytest.raises(UserError, match=f"--config {words[1]}"):
            cli.parse_flags(get_args_parser(), words)


def test_what_a_run_writes_gives_its_flags(parsed):
    words = [
        "--prune-rates",
        "0.5",
        "--prune-mode",
        "l1",
        "--exclude-layers",
        'a "b"\u00e9\\',
        "--lr",
        "1e-05",
        "--amp",
        "--schedule",
    ]
    words += ["--lr-drops", "--run-name", "mine"]
    args = parsed("", *words)
    text = config_text("pruning.py", args.given)
    assert tomllib.loads(text)["prune-mode"] == "filter-a" and "run-name" not in text
    again = cli.flags_of(parsed(text))
    assert again == cli.flags_of(args) | {"run_name": None}


def test_code_is_written_as_a_remark():
    text = config_text("pruning.py", {"t_model": "nets.py:small", "lr": 0.1})
    assert tomllib.loads(text) == {"lr": 0.1} and '# code, to be typed: t-model = "nets.py:small"' in text


def test_a_resumed_run_takes_none(parsed):
    with pytest.raises(UserError, match=r"--config run.toml: not with --resume"):
        parsed("lr = 1\n", "--resume", "saves/1")
