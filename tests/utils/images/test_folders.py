"""Which files of a folder are images: as people have them, from Macs, notebooks, and sets put together from links."""

import os
from collections import Counter
from pathlib import Path

import pytest
import torchvision
from PIL import Image

from utils.errors import UserError
from utils.images.class_folders import list_classes, split_by_share
from utils.images.decoding import image_endings
from utils.images.folders import describe_left_out, find_images


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


@pytest.fixture
def folder(tmp_path):
    touch(*(tmp_path / "set" / name / f"{number}.png" for name in ("cat", "dog") for number in range(10)))
    return tmp_path / "set"


def test_every_kind_that_pillow_opens_and_no_other():
    assert {".jpg", ".png", ".tif", ".webp", ".gif", ".jp2", ".ico"} <= image_endings()
    assert not {".eps", ".pdf", ".txt", ".h5", ""} & image_endings()


def test_what_no_person_sees_is_passed_over_and_counted(folder):
    touch(folder / "cat" / ".ipynb_checkpoints" / "0.png", folder / "cat" / "._0.png", folder / "__MACOSX" / "0.png")
    touch(folder / ".DS_Store", folder / "cat" / "notes.txt", folder / "cat" / "README", folder / "cat" / "extra.jpg" / "1.png")
    listed = list_classes(folder)
    assert listed.classes == ("cat", "dog") and len(listed.paths) == 21
    assert listed.left_out == Counter({"hidden": 4, ".txt": 1, "no ending": 1})
    assert describe_left_out(listed.left_out) == "4 hidden, 1 .txt, 1 no ending"


def test_links_are_followed_as_torchvision_does(folder, tmp_path):
    touch(tmp_path / "elsewhere" / "more.png")
    (folder / "cat" / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "wolf").symlink_to(folder / "dog")
    (folder / "dog" / "one.png").symlink_to(tmp_path / "elsewhere" / "more.png")
    listed = list_classes(folder)
    theirs = torchvision.datasets.ImageFolder(folder).imgs
    assert [path for path, _ in theirs] == list(listed.paths) and [label for _, label in theirs] == listed.labels.tolist()


def test_links_that_lead_nowhere_or_back(folder):
    (folder / "cat" / "gone.png").symlink_to(folder / "nowhere")
    (folder / "cat" / "round").symlink_to(folder)
    found = find_images(folder)
    assert len(found.paths) == 20
    assert found.left_out == Counter({"links back": 1, "links to nothing, or no files": 1})


def test_a_name_of_others_is_shown_in_print(folder):
    touch(folder / "cat" / "a.\x1b[31m")
    assert describe_left_out(find_images(folder).left_out) == r"1 .\x1b[31m"


class TestShare:
    def test_each_class_gives_its_share_and_every_image_is_used_once(self, folder):
        train, test = split_by_share(list_classes(folder), 0.2, root=folder)
        assert test.labels.tolist() == [0, 0, 1, 1] and len(train.paths) == 16
        assert sorted((*train.paths, *test.paths)) == find_images(folder).paths

    def test_it_is_the_same_wherever_the_set_lies(self, folder, tmp_path):
        before = [Path(path).relative_to(folder) for path in split_by_share(list_classes(folder), 0.3, root=folder)[1].paths]
        folder.rename(tmp_path / "moved")
        moved = tmp_path / "moved"
        after = [Path(path).relative_to(moved) for path in split_by_share(list_classes(moved), 0.3, root=moved)[1].paths]
        assert before == after

    def test_a_new_image_moves_few_others(self, folder):
        before = set(split_by_share(list_classes(folder), 0.5, root=folder)[1].paths)
        touch(folder / "cat" / "new.png")
        after = set(split_by_share(list_classes(folder), 0.5, root=folder)[1].paths)
        assert len(before ^ after) <= 2

    def test_no_split_is_empty(self, folder):
        for share, expected in ((0.001, 2), (0.999, 18)):
            assert len(split_by_share(list_classes(folder), share, root=folder)[1].paths) == expected

    def test_a_class_of_one_image(self, folder):
        for path in list((folder / "dog").iterdir())[1:]:
            path.unlink()
        with pytest.raises(UserError, match="the class dog has 1 images, a split needs 2"):
            split_by_share(list_classes(folder), 0.2, root=folder)


def test_no_class_folders(tmp_path):
    os.mkdir(tmp_path / ".hidden")
    Image.new("L", (1, 1)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="has no class folders"):
        list_classes(tmp_path)
