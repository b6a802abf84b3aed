"""Flags of the entry scripts: what is accepted, what a resumed run takes over, how a script ends."""

import argparse
import json
from pathlib import Path

import pytest

import initial_train
from utils import cli
from utils.errors import Interrupted, NonFiniteLoss, ParameterError, UserError


@pytest.fixture
def parser() -> cli.Parser:
    parser = cli.Parser(prog="train.py")
    parser.add_argument("--model")
    parser.add_argument("--names", nargs="+", default=[])
    cli.add_data_flags(parser)
    cli.add_training_flags(parser, lr=0.01, n_epochs=200, schedule=(60, 120), lr_drops=(0.2, 0.2))
    cli.add_run_flags(parser, log_name="train.txt")
    return parser


def start_run(folder: Path, parser: cli.Parser, *words: str) -> str:
    """A folder as a run with these flags leaves it."""
    flags = cli.flags_of(cli.parse_flags(parser, words))
    (folder / "config.json").write_text(json.dumps({"script": "train.py", "flags": flags}))
    return str(folder)


class TestSchedule:
    def test_is_the_default_unless_given(self, parser):
        args = cli.parse_flags(parser, [])
        assert (args.schedule, args.lr_drops) == ([60, 120], [0.2, 0.2])

    def test_of_fewer_epochs_it_is_in_proportion(self, parser):
        args = cli.parse_flags(parser, ["--n-epochs", "10"])
        assert (args.schedule, args.lr_drops) == ([3, 6], [0.2, 0.2])
        args = cli.parse_flags(parser, ["--n-epochs", "10", "--schedule", "60", "--lr-drops", "0.2"])
        assert (args.schedule, args.lr_drops) == ([60], [0.2])

    @pytest.mark.parametrize("words", ["--pretrained", "--load-path x.pt"])
    def test_weights_that_are_there_are_not_shaken_by_a_tenfold_rate(self, words):
        parser = initial_train.get_args_parser()
        args = cli.parse_flags(parser, ["--model", "resnet18", *words.split()])
        assert (args.schedule, args.lr_drops) == ([60, 120, 160], [0.2, 0.2, 0.2])
        args = cli.parse_flags(parser, ["--model", "resnet18"])
        assert (args.schedule, args.lr_drops) == ([1, 60, 120, 160], [10, 0.2, 0.2, 0.2])

    def test_as_given(self, parser):
        args = cli.parse_flags(parser, ["--schedule", "1", "60", "--lr-drops", "10", "0.2"])
        assert (args.schedule, args.lr_drops) == ([1, 60], [10.0, 0.2])

    def test_defaults_are_those_of_a_line_without_flags(self, parser):
        args = cli.parse_flags(parser, ["--schedule", "--lr-drops", "--lr", "3"])
        assert args.defaults == cli.flags_of(cli.parse_flags(parser, [])) | {
            "resume": None,
            "auto_resume": False,
            "accept_data": False,
            "dry_run": False,
            "may_download": True,
        }

    def test_rates_that_fall_by_themselves_need_none(self, parser):
        args = cli.parse_flags(parser, ["--lr-schedule", "linear"])
        assert (args.schedule, args.lr_drops) == ([], [])

    def test_none(self, parser):
        args = cli.parse_flags(parser, ["--schedule", "--lr-drops"])
        assert (args.schedule, args.lr_drops) == ([], [])


class TestResume:
    WORDS = "--model a --names x y --lr 0.3 --schedule 2 --lr-drops 0.1 --amp --checkpoint-minutes 0 --workers 3 --n-epochs 9"

    def test_needs_no_other_flag(self, parser, tmp_path):
        folder = start_run(tmp_path, parser, *self.WORDS.split())
        resumed, first = cli.parse_flags(parser, ["--resume", folder]), cli.parse_flags(parser, self.WORDS.split())
        own = {"resume": folder, "may_download": False, "given": {"resume": folder}}
        assert vars(resumed) == {**vars(first), **own}

    def test_flags_that_came_later_have_their_defaults(self, parser, tmp_path):
        folder = start_run(tmp_path, parser, *self.WORDS.split())
        parser.add_argument("--hint-stage", type=int, default=3)
        parser.add_argument("--turbo", action="store_true")
        args = cli.parse_flags(parser, ["--resume", folder])
        assert (args.hint_stage, args.turbo, args.lr) == (3, False, 0.3)
        assert cli.parse_flags(parser, ["--resume", folder, "--hint-stage", "3"]).hint_stage == 3
        with pytest.raises(UserError, match="--hint-stage 2: contradicts 3"):
            cli.parse_flags(parser, ["--resume", folder, "--hint-stage", "2"])

    def test_with_the_same_flags_is_no_contradiction(self, parser, tmp_path):
        folder = start_run(tmp_path, parser, *self.WORDS.split())
        assert cli.parse_flags(parser, [*self.WORDS.split(), "--resume", folder]).lr == 0.3

    def test_epochs_of_a_rate_that_falls_to_their_end_stay(self, parser, tmp_path):
        folder = start_run(tmp_path, parser, "--lr-schedule", "cosine", "--n-epochs", "9")
        with pytest.raises(UserError, match="--n-epochs 10: contradicts 9"):
            cli.parse_flags(parser, ["--resume", folder, "--n-epochs", "10"])

    def test_epochs_may_be_raised(self, parser, tmp_path):
        folder = start_run(tmp_path, parser, *self.WORDS.split())
        assert cli.parse_flags(parser, ["--resume", folder, "--n-epochs", "10"]).n_epochs == 10

    def test_placement_may_change_back_to_the_default_too(self, parser, tmp_path):
        folder = start_run(tmp_path, parser, "--device", "cuda", "--workers", "3")
        args = cli.parse_flags(parser, ["--resume", folder, "--device", "auto", "--data-dir", "/elsewhere", "--dry-run"])
        assert (args.device, args.workers, args.data_dir, args.dry_run) == ("auto", 3, "/elsewhere", True)
        assert args.may_download  # into a folder that was typed

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("--lr 0.2", "--lr 0.2: contradicts 0.3"),
            ("--schedule 3 --lr-drops 0.1", "--schedule 3: contradicts 2"),
            ("--n-epochs 8", "--n-epochs 8: contradicts 9 of .*; may only be raised"),
            ("--names x", "--names x: contradicts x y"),
            ("--seed 2", "--seed 2: contradicts 1"),
            ("--compile", "--compile: contradicts False"),
        ],
    )
    def test_contradictions(self, words, message, parser, tmp_path):
        folder = start_run(tmp_path, parser, *self.WORDS.split())
        with pytest.raises(UserError, match=message):
            cli.parse_flags(parser, ["--resume", folder, *words.split()])


class TestExecute:
    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (UserError("--lr 0: wrong"), 2),
            (NonFiniteLoss("at epoch 3"), 1),
            (Interrupted("stopped", signal_number=15), 143),
            (Interrupted("stopped", signal_number=2), 130),
        ],
    )
    def test_ends_with_one_line(self, error, status, capsys, monkeypatch):
        def fail() -> None:
            raise error

        monkeypatch.setattr("sys.argv", ["/somewhere/train.py"])
        with pytest.raises(SystemExit) as ended:
            cli.execute(fail)
        assert ended.value.code == status
        what = "" if isinstance(error, Interrupted) else "error: "  # who stops a run knows that it is none
        assert capsys.readouterr().err == f"train.py: {what}{error}\n"

    def test_without_an_environment_it_says_how_to_make_one(self, capsys):
        def main():
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

        with pytest.raises(SystemExit) as ended:
            cli.execute(main)
        line = capsys.readouterr().err
        assert ended.value.code == 2 and line.count("\n") == 1
        assert " has no torch" in line and (".venv/bin/activate" in line)

    def test_a_message_of_many_lines_becomes_one(self, capsys):
        def fail() -> None:
            raise UserError("first\n  second\n")

        with pytest.raises(SystemExit):
            cli.execute(fail)
        assert capsys.readouterr().err.endswith(": error: first second\n")

    def test_an_interrupt_outside_of_training(self):
        def interrupt() -> None:
            raise KeyboardInterrupt

        with pytest.raises(SystemExit) as ended:
            cli.execute(interrupt)
        assert ended.value.code == 130

    def test_a_good_end(self):
        with pytest.raises(SystemExit) as ended:
            cli.execute(lambda: None)
        assert ended.value.code == 0

    def test_a_mistake_of_ours_is_not_hidden(self):
        def fail() -> None:
            raise RuntimeError("a bug")

        with pytest.raises(RuntimeError, match="a bug"):
            cli.execute(fail)


class TestParameters:
    """Functions name parameters; the command line puts the flag that gave one in its place."""

    @pytest.mark.parametrize(
        ("error", "line"),
        [
            (ParameterError("lr", 0.5, "is too high"), "--lr 0.5: is too high"),
            (ParameterError("keep_ratio", 1.5, "must be at most 1"), "--names 1.5: must be at most 1"),  # by another name
            (ParameterError("names", ["x", "y"], "are no layers"), "--names x y: are no layers"),
            (ParameterError("amp", None, "needs another GPU"), "--amp: needs another GPU"),
            (ParameterError("rounds", 3, "are too few"), "rounds 3: are too few"),  # which no flag gives
            (UserError("--lr 0.5 and others"), "--lr 0.5 and others"),
        ],
    )
    def test_an_error_of_a_function_names_the_flag(self, error, line, parser):
        parser.parameters["keep_ratio"] = "names"
        with pytest.raises(UserError) as raised, parser.naming_flags():
            raise error
        assert str(raised.value) == line

    def test_a_script_ends_with_the_flag(self, parser, capsys):
        def main(args: argparse.Namespace) -> None:
            raise ParameterError("lr", args.lr, "is too high")

        with pytest.raises(SystemExit) as ended:
            cli.run_script(lambda: parser, main, ["--lr", "7"])
        assert ended.value.code == 2
        assert capsys.readouterr().err.endswith(": error: --lr 7: is too high\n")


class TestSettings:
    def test_have_the_values_of_their_flags(self, parser):
        words = "--lr 0.3 --n-epochs 9 --schedule 2 --lr-drops 0.1 --amp --dataset cifar10 --batch-size 32 --seed 5"
        settings = cli.session_settings("train.py", cli.parse_flags(parser, words.split()))
        assert (settings.training.lr, settings.training.schedule, settings.run.amp) == (0.3, [2], True)
        assert (settings.data.dataset, settings.data.batch_size, settings.run.seed) == ("cifar10", 32, 5)
        assert settings.flags["lr"] == 0.3 and settings.defaults["lr"] == 0.01

    def test_a_field_that_is_no_flag_keeps_its_default(self, parser):
        assert cli.session_settings("train.py", cli.parse_flags(parser, [])).training.ema is None  # without averaging flags


class TestChecks:
    def test_are_made_once_all_flags_are_known(self, parser):
        def check(name: str) -> None:
            raise UserError(f"unknown network {name}")

        parser.checks["model"] = check
        with pytest.raises(UserError, match="--lr-drops: 1 factors"):
            cli.parse_flags(parser, ["--model", "no", "--lr-drops", "2"])
        with pytest.raises(UserError, match=r"^--model: unknown network no$"):
            cli.parse_flags(parser, ["--model", "no"])
        assert cli.parse_flags(parser, []).model is None
