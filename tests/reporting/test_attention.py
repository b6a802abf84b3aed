import json
import shutil

import numpy as np
import pytest
import torch

from distill.hap import attention_similarity
from models import build_model
from models.network_file import describe_network
from reporting import attention
from utils.checkpoints import save_checkpoint
from utils.errors import UserError
from utils.images.datasets import load_dataset


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a pruning run with new weights, its teacher's beside it; nothing in it was trained."""
    saves = tmp_path_factory.mktemp("saves")
    for seed, name in enumerate(("teacher", "pruned")):
        torch.manual_seed(seed)
        (saves / name).mkdir()
        state = build_model("resnet20", num_classes=10).state_dict()
        save_checkpoint(saves / name / "model_best.pt", describe_network(state, model="resnet20", num_classes=10, config={}))
    flags = {
        "t_path": "saves/teacher/model_best.pt",
        "t_model": "resnet20",
        "dataset": "digits",
        "data_dir": "./data",
        "hap_ts": 3,
    }
    (saves / "pruned" / "config.json").write_text(json.dumps({"script": "pruning.py", "flags": flags}))
    return saves / "pruned"


@pytest.fixture(scope="module")
def pair(run):
    return attention.load_pair(run)


def test_the_teacher_is_found_beside_the_run(pair):
    """Its --t-path is relative to a folder that is not the current one."""
    weights = [file.network.state_dict()["conv_1_3x3.weight"] for file in (pair.teacher, pair.student)]
    assert not torch.equal(*weights)


def test_maps_are_the_mean_of_squares_of_every_block(pair):
    images, _ = attention._test_images(pair.dataset, [0, 5])
    maps = attention._network_maps(pair.student, images)
    assert [block_map.shape for block_map in maps.values()] == [(2, 32, 32)] * 3 + [(2, 16, 16)] * 3 + [(2, 8, 8)] * 3
    with torch.no_grad():
        block = pair.student.network.outputs(images).blocks[4].double().numpy()
    energy = (block**2).mean(axis=1)
    expected = energy / np.sqrt((energy**2).sum(axis=(1, 2), keepdims=True))
    np.testing.assert_allclose(maps[4], expected, atol=1e-6)


def test_images_are_those_of_the_test_set(pair):
    positions = [359, 0, 100]
    dataset = pair.dataset
    images, labels = attention._test_images(dataset, positions)
    assert labels.tolist() == dataset.test.labels[positions].tolist()
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (dataset.mean, dataset.std))
    for image, position in zip(images, positions, strict=True):
        torch.testing.assert_close((image * std + mean) * 255, dataset.test.images[position].float(), atol=1e-3, rtol=0)


def test_streamed_images_are_read_by_position(mixed_size_images):
    dataset = load_dataset("folder", data_dir=mixed_size_images)
    assert dataset.streamed
    images, labels = attention._test_images(dataset, [4, 1])
    assert images.shape == (2, 3, 224, 224)
    assert labels.tolist() == dataset.test.labels[[4, 1]].tolist()


def test_without_a_choice_there_are_the_first_images_of_the_first_classes(pair):
    labels = pair.dataset.test.labels.tolist()
    positions = attention._first_of_each_class(pair.dataset, classes=4, images=2)
    assert [labels[position] for position in positions] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [position for position, label in enumerate(labels) if label == 2][:2] == positions[4:6]


def test_similarities_are_those_that_hap_compares(pair):
    figure = attention._draw_similarities(pair)
    matrices = [axes.images[0].get_array().data for axes in figure.axes if axes.get_title().startswith(("teacher", "student"))]
    positions = attention._first_of_each_class(pair.dataset, classes=8, images=8)
    images, _ = attention._test_images(pair.dataset, positions)
    with torch.no_grad():
        teacher, student = (
            attention_similarity(file.network.outputs(images).blocks[-3:]).numpy() for file in (pair.teacher, pair.student)
        )
    for row in range(3):
        np.testing.assert_allclose(matrices[3 * row], teacher[row], atol=1e-6)
        np.testing.assert_allclose(matrices[3 * row + 1], student[row], atol=1e-6)
        np.testing.assert_allclose(matrices[3 * row + 2], student[row] - teacher[row], atol=1e-6)


def test_the_grid_has_a_row_for_each_network_and_image(pair):
    figure = attention._draw_maps(pair, [3, 4, 5])
    rows = [[bool(axes.images) for axes in figure.axes[start : start + 10]] for start in range(0, 60, 10)]
    assert rows == [[True] * 10, [False] + [True] * 9] * 3  # the photograph stands beside the teacher's row


def test_very_deep_networks_are_thinned_out_to_the_last_block(pair):
    deep = build_model("resnet110", num_classes=10)
    file = attention.NetworkFile(deep, "resnet110", 10)
    maps = attention._network_maps(file, attention._test_images(pair.dataset, [0])[0])
    assert len(maps) == attention.MAX_BLOCKS
    assert (min(maps), max(maps)) == (0, 53)


def test_both_pictures_come_as_png(run):
    pictures = attention.attention_pictures(run, images=[1])
    assert [picture.name for picture in pictures] == ["attention_maps", "similarities"]
    assert all(picture.png.startswith(b"\x89PNG") for picture in pictures)


@pytest.mark.parametrize("position", [360, 10**9])
def test_an_image_that_the_test_set_has_not_got(run, position):
    with pytest.raises(UserError, match=f"--images {position}: the test set of digits has images 0 to 359"):
        attention.attention_pictures(run, images=[position])


def test_a_run_without_a_teacher(run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"flags": {"model": "resnet20"}}))
    with pytest.raises(UserError, match="has no teacher"):
        attention.load_pair(tmp_path)
    with pytest.raises(UserError, match=r"no config\.json there"):
        attention.load_pair(tmp_path / "nowhere")


def test_a_teacher_that_is_gone_is_named(run, tmp_path):
    shutil.copytree(run, tmp_path / "alone")
    with pytest.raises(UserError, match=r"saves/teacher/model_best\.pt: no such file"):
        attention.load_pair(tmp_path / "alone")
