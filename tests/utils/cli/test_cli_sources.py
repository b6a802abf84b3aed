"""Images that nobody names are those that the checkpoint was trained on."""

import pytest

from pruning import get_args_parser
from utils import cli
from utils.checkpoints import load_checkpoint, save_checkpoint
from utils.errors import UserError


@pytest.fixture
def parsed(tmp_path, trained_run):
    """Flags beside the network of a run on other images than `digits`."""

    def parse(recorded, *words):
        checkpoint = load_checkpoint(trained_run / "model_best.pt")
        checkpoint["config"] = {**checkpoint["config"], **recorded}
        save_checkpoint(tmp_path / "model.pt", checkpoint)
        return cli.parse_flags(get_args_parser(), ["--t-path", str(tmp_path / "model.pt"), "--s-copy-t", *words])

    return parse


def images_of(args):
    return args.dataset, args.data_dir, args.test_share, args.skip_broken, args.may_download


def test_dataset_and_folder_come_from_the_checkpoint(parsed, tmp_path):
    recorded = {"dataset": "folder", "data_dir": str(tmp_path), "test_share": 0.25, "skip_broken": True}
    assert images_of(parsed(recorded)) == ("folder", str(tmp_path), 0.25, True, False)
    assert images_of(parsed(recorded, "--test-share", "0.5", "--data-dir", ".")) == ("folder", ".", 0.5, True, True)


def test_what_is_named_counts(parsed, tmp_path):
    recorded = {"dataset": "folder", "data_dir": str(tmp_path), "test_share": 0.25}
    assert images_of(parsed(recorded, "--dataset", "cifar10")) == ("cifar10", "./data", None, False, True)


def test_a_set_that_is_downloaded_need_not_be_where_it_was(parsed):
    recorded = {"dataset": "cifar100", "data_dir": "/nowhere"}
    assert images_of(parsed(recorded)) == ("cifar100", "./data", None, False, True)


def test_a_recipe_sees_the_images_of_the_checkpoint(parsed):
    with pytest.raises(UserError, match=r"--recipe cifar100-kd: is for --dataset cifar100, not cifar10"):
        parsed({"dataset": "cifar10"}, "--recipe", "cifar100-kd")


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ({"dataset": "folder", "data_dir": "/nowhere"}, "model.pt, of a network trained on 'folder': '/nowhere' is not there"),
        ({"dataset": "faces"}, "of a network trained on 'faces': --dataset: invalid choice: 'faces'"),
        ({"dataset": "folder", "data_dir": "/", "test_share": "x"}, "of a network trained on 'folder': --test-share: 'x' is not"),
    ],
)
def test_images_that_are_not_there(parsed, recorded, message):
    with pytest.raises(UserError) as error:
        parsed(recorded)
    assert message in str(error.value)


def test_a_folder_of_a_run_stands_for_its_network(trained_run, run_script):
    by_folder = run_script("initial_train", "--evaluate", "--load-path", str(trained_run), "--device", "cpu")
    by_file = run_script("initial_train", "--evaluate", "--load-path", str(trained_run / "model_best.pt"), "--device", "cpu")
    assert by_folder.status == by_file.status == 0, by_folder.errors
    assert by_folder.output == by_file.output
