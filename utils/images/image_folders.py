"""Folders of image files as a dataset: which files belong to it, which are broken, and whether it fits into memory."""

import contextlib
import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from tqdm import tqdm

from utils.errors import UserError, naming, printable
from utils.images.class_folders import SPLIT_SEED, Listed, list_classes, split_by_share, test_folder
from utils.images.dataset import (
    Dataset,
    ImageFiles,
    Normalisation,
    SmallImages,
    Wanted,
    in_memory,
    normalisation_of,
    sized,
    why_size,
)
from utils.images.decoding import BrokenImage, describe_broken, grey_bits_of, image_size, largest_grey, read_image
from utils.images.folders import describe_left_out
from utils.images.preparation import SMALL_SIDE_PIXELS, STREAMED_SIDE_PIXELS, is_small, test_transform
from utils.images.spec import WIDEST_GREY_BITS, ImageSpec
from utils.seed import generator
from utils.world import world_from_environment

SAMPLED_FILES = 512
OPENED_FILES = 50_000
SHOWN_NAMES = 4
T = TypeVar("T")


def read_image_folders(name: str, data_dir: Path, wanted: Wanted, *, small: bool = True) -> Dataset:
    if not data_dir.is_dir():
        raise UserError(
            f"--data-dir {data_dir}: no such folder; --dataset {name} reads train/<class>/* and test|val|valid/<class>/*"
        )
    train, test, remarks = _list_splits(data_dir, wanted)
    grey_bits = _grey_bits(train, wanted)
    reader = _Reader(train, test, wanted=wanted, grey_bits=grey_bits)
    dataset = (reader.in_memory() if small and not wanted.streamed else None) or reader.streamed()
    broken = sorted(reader.broken)
    if broken:
        remarks = [*remarks, f"{len(broken)} broken images are left out: {_beginning(broken)}"]
    drawn = test.paths if wanted.test_share is not None else ()
    return replace(
        dataset,
        name=name,
        remarks=(*remarks, *dataset.remarks),
        test_files=tuple(os.path.relpath(path, data_dir) for path in drawn),
        broken=tuple(os.path.relpath(path, data_dir) for path in broken),
        fingerprint="" if wanted.test_only else fingerprint(data_dir, (*train.paths, *test.paths)),
    )


def fingerprint(data_dir: Path, paths: Sequence[str]) -> str:
    """SHA-256 over the files' names below `data_dir`, in their order, and their sizes."""
    state = hashlib.sha256()
    for path in paths:
        state.update(os.fsencode(f"{os.path.relpath(path, data_dir)}\0{os.stat(path).st_size}\n"))
    return state.hexdigest()


def _beginning(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:SHOWN_NAMES])) + (", ..." if len(names) > SHOWN_NAMES else "")


# ---- which files ---------------------------------------------------------------------------------------------------------


def _list_splits(data_dir: Path, wanted: Wanted) -> tuple[Listed, Listed, list[str]]:
    """Training images, none where they are not asked for, test images with the same classes, and what to say of them."""
    test_dir, train_dir = test_folder(data_dir), data_dir / "train"
    if wanted.test_share is not None:
        if test_dir is not None:
            raise UserError(f"--test-share {wanted.test_share:g}: {data_dir} has a split of its own, the folder {test_dir.name}")
        root = train_dir if train_dir.is_dir() else data_dir
        with naming("--data-dir"):
            listed = list_classes(root)
            train, test = split_by_share(listed, wanted.test_share, root=root)
        return _agreed(train, test, wanted, names=("", ""), remarks=_remarks_on_files([listed]))
    if test_dir is None:
        raise UserError(
            f"--data-dir {data_dir}: needs the folders train and test (or val, or valid) with one folder a class; "
            "--test-share 0.2 splits a folder of class folders"
        )
    with naming("--data-dir"):
        test = list_classes(test_dir)
    if wanted.test_only and wanted.normalisation is not None:
        test = _renumbered(test, wanted.network) if wanted.network is not None else test
        none = Listed(test.classes, (), torch.tensor([], dtype=torch.int64), Counter())
        return none, test, [*_remarks_on_files([test]), *_remarks_on_absent(test, test_dir.name, data_dir)]
    if not train_dir.is_dir():
        need = "give --mean and --std, for the network does not bring them" if wanted.test_only else "training needs it"
        raise UserError(f"--data-dir {data_dir}: has no folder train beside {test_dir.name}: {need}")
    with naming("--data-dir"):
        train = list_classes(train_dir)
    return _agreed(
        train, test, wanted, names=("train", test_dir.name), remarks=_remarks_on_files([train, test]), data_dir=data_dir
    )


def _renumbered(test: Listed, network: ImageSpec) -> Listed:
    """The test images by the network's own classes, where these have all the names that they need."""
    if not set(test.classes) <= set(network.class_names):
        return test
    return _with_classes(test, network.class_names)


def _with_classes(listed: Listed, classes: tuple[str, ...]) -> Listed:
    numbers = torch.tensor([classes.index(name) for name in listed.classes])
    return replace(listed, classes=classes, labels=numbers[listed.labels])


def _agreed(
    train: Listed, test: Listed, wanted: Wanted, *, names: tuple[str, str], remarks: list[str], data_dir: Path | None = None
) -> tuple[Listed, Listed, list[str]]:
    """Both splits by the classes of the training images. Raises UserError for a class that has none."""
    odd = sorted(set(test.classes) - set(train.classes))
    if odd:
        raise UserError(f"--data-dir {data_dir}: {names[0]} and {names[1]} have different class folders, {_alike(odd[0], train)}")
    empty = [name for label, name in enumerate(train.classes) if not (train.labels == label).any()]
    if empty:
        raise UserError(f"--data-dir: the class folder {data_dir / names[0] / empty[0]} holds no image of any kind that is read")
    test = _with_classes(test, train.classes)
    remarks = [*remarks, *_remarks_on_absent(test, names[1], data_dir)]
    if len(train.classes) == 1:
        remarks = [*remarks, f"there is a single class, {printable(train.classes[0])}: nothing can be learnt from it"]
    return train, test, remarks


def _remarks_on_absent(test: Listed, name: str, data_dir: Path | None) -> list[str]:
    """Which classes have no test image. Raises UserError where none has any."""
    absent = [own for label, own in enumerate(test.classes) if not (test.labels == label).any()]
    if len(absent) == len(test.classes):
        raise UserError(f"--data-dir {data_dir}: {name} holds no image")
    scored = len(test.classes) - len(absent)
    return [f"{name} has no image of {_beginning(absent)}: {scored} of {len(test.classes)} classes are scored"] if absent else []


def _alike(name: str, train: Listed) -> str:
    """How the class `name` of the test images differs, also where a person would not see it."""
    plain = unicodedata.normalize("NFC", name)
    same = next((own for own in train.classes if unicodedata.normalize("NFC", own) == plain), None)
    if same is None:
        return f"such as {printable(repr(name))}"
    return f"{same!a} and {name!a}, which look the same: give both the same spelling"


def _remarks_on_files(listed: Sequence[Listed]) -> list[str]:
    left_out = sum((each.left_out for each in listed), Counter())
    return [f"files that are no images were left out: {describe_left_out(left_out)}"] if left_out else []


def _grey_bits(train: Listed, wanted: Wanted) -> int:
    """What the network says, or else what holds the largest number of all training images, if some are grey of 16 bits."""
    if wanted.network is not None:
        return wanted.network.grey_bits
    sample = torch.randperm(len(train.paths), generator=generator(SPLIT_SEED, "grey"))[:SAMPLED_FILES].tolist()
    if not any(_in_threads(_grey_or_none, [train.paths[row] for row in sample], "looking at images")):
        return WIDEST_GREY_BITS
    return grey_bits_of(_in_threads(_grey_or_none, train.paths, "looking at images")) or WIDEST_GREY_BITS


def _grey_or_none(path: str) -> int:
    try:
        return largest_grey(path)
    except BrokenImage:
        return 0


def _in_threads(function: Callable[[str], T], paths: Sequence[str], description: str) -> list[T]:
    with _bar(description, len(paths)) as bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        results = []
        for result in pool.map(function, paths):
            results.append(result)
            bar.update()
    return results


def _bar(description: str, total: int) -> tqdm:
    """Shown on a terminal once it takes more than a second, by one process."""
    disable = None if world_from_environment().is_main else True
    return tqdm(total=total, desc=description, unit="image", disable=disable, delay=1, leave=False)


# ---- their images --------------------------------------------------------------------------------------------------------


class _Reader:
    """The images of both splits, in memory where they are small and of one size, or checked and left where they are.

    `broken` are the paths of those that cannot be read, once they are known. Raises UserError, naming them all, unless they
    are to be left out.
    """

    def __init__(self, train: Listed, test: Listed, *, wanted: Wanted, grey_bits: int):
        self.splits, self.wanted, self.grey_bits = (train, test), wanted, grey_bits
        self.broken: list[str] = []
        self._odd = ""  # why the images are not of one small size

    def in_memory(self) -> Dataset | None:
        """The set as uint8 tensors, or None where some image is large or of another size, and no size was asked for."""
        first = self._first_sizes()
        size = self.wanted.size or next(iter(first), None)
        if size is None or (self.wanted.size is None and not self._is_one_small_size(first)):
            return None
        decoded = [self._decode(split, size) for split in self.splits]
        if any(each is None for each in decoded):
            return None
        train, test = decoded
        dataset = in_memory("", self.splits[0].classes, train, test, normalisation=self.wanted.normalisation)
        reason = why_size(self.wanted) if self.wanted.size is not None else "that of all images"
        others = [sized(own) for own in first if own != size]
        remarks = (f"images of {', '.join(others[:SHOWN_NAMES])} are brought to {sized(size)}, {reason}",) if others else ()
        return replace(dataset, size=size, size_reason=reason, grey_bits=self.grey_bits, remarks=remarks)

    def _first_sizes(self) -> dict[tuple[int, int], str]:
        """Height and width of the first readable image of each class of each split, with its path."""
        sizes: dict[tuple[int, int], str] = {}
        for split in self.splits:
            for path in _first_of_each_class(split):
                with contextlib.suppress(BrokenImage):
                    sizes.setdefault(image_size(path), path)
        return sizes

    def _is_one_small_size(self, sizes: dict[tuple[int, int], str]) -> bool:
        if len(sizes) == 1 and is_small(next(iter(sizes))):
            return True
        if len(sizes) > 1:
            self._odd = self._describe_odd(*list(sizes.items())[:2])
        return False

    def _describe_odd(self, first: tuple[tuple[int, int], str], second: tuple[tuple[int, int], str]) -> str:
        one, other = (f"{printable(path)} {sized(size)}" for size, path in (first, second))
        return f"the images have several sizes, {one} and {other}"

    def _decode(self, split: Listed, size: tuple[int, int]) -> SmallImages | None:
        """Its readable images, each brought to `size` where one was asked for; None if some image has another size."""
        images = np.empty((len(split.paths), *size, 3), np.uint8)
        transform = test_transform(size)
        broken: dict[int, BrokenImage] = {}

        def decode(rows: range) -> str | None:
            for row in rows:
                try:
                    image = read_image(split.paths[row], grey_bits=self.grey_bits)
                except BrokenImage as error:
                    broken[row] = error
                    continue
                if self.wanted.size is not None:
                    images[row] = transform(image).permute(1, 2, 0).numpy()
                elif image.size[::-1] == size:
                    images[row] = np.asarray(image)
                else:
                    return split.paths[row]
            return None

        with _bar("reading images", len(split.paths)) as bar, ThreadPoolExecutor(os.cpu_count()) as pool:
            chunks = list(_chunks(len(split.paths)))
            for rows, odd in zip(chunks, pool.map(decode, chunks), strict=True):
                if odd is not None:
                    self._odd = self._describe_odd((size, split.paths[0]), (image_size(odd), odd))
                    return None
                bar.update(len(rows))
        self._leave_out([broken[row] for row in sorted(broken)], [split.paths[row] for row in sorted(broken)])
        rows = torch.tensor([row for row in range(len(split.paths)) if row not in broken], dtype=torch.int64)
        kept = torch.from_numpy(images).permute(0, 3, 1, 2)
        return SmallImages((kept[rows] if broken else kept).contiguous(), split.labels[rows])

    def streamed(self) -> Dataset:
        """The set as lists of files."""
        self.broken.clear()
        self._check()
        gone = set(self.broken)
        train, test = (_files(split, gone) for split in self.splits)
        size = self.wanted.size or (STREAMED_SIDE_PIXELS,) * 2
        mean, std = self.wanted.normalisation or _sampled_normalisation(train, self.grey_bits)
        reason = why_size(self.wanted) if self.wanted.size is not None else self._odd or "the usual one of large images"
        remarks = (
            (f"{self._odd}: crops of {sized(size)} are taken; --image-size brings all to another size",) if self._odd else ()
        )
        return Dataset("", self.splits[0].classes, train, test, mean, std, True, size, reason, self.grey_bits, remarks)

    def _check(self) -> None:
        """Opens the files and decodes some of them; of a large set a fixed sample, for it would take minutes at every start.

        All of them where broken ones are to be left out.
        """
        paths = [path for split in self.splits for path in split.paths]
        order = torch.randperm(len(paths), generator=generator(SPLIT_SEED, "check")).tolist()
        most = (len(paths), len(paths)) if self.wanted.skip_broken else (OPENED_FILES, SAMPLED_FILES)
        decoded = {paths[row] for row in order[: most[1]]}
        opened = sorted(paths[row] for row in order[: most[0]])

        def problem(path: str) -> BrokenImage | None:
            try:
                read_image(path, grey_bits=self.grey_bits) if path in decoded else image_size(path)
            except BrokenImage as error:
                return error
            return None

        found = {
            path: error for path, error in zip(opened, _in_threads(problem, opened, "checking images"), strict=True) if error
        }
        self._leave_out(list(found.values()), list(found))

    def _leave_out(self, errors: Sequence[BrokenImage], paths: Sequence[str]) -> None:
        if errors and not self.wanted.skip_broken:
            remedy = "" if len(errors) == 1 else "; --skip-broken leaves them out"
            raise UserError(f"--data-dir: {describe_broken(errors)}{remedy}")
        self.broken += paths


def _files(split: Listed, gone: set[str]) -> ImageFiles:
    rows = [row for row, path in enumerate(split.paths) if path not in gone]
    return ImageFiles(tuple(split.paths[row] for row in rows), split.labels[torch.tensor(rows, dtype=torch.int64)])


def _first_of_each_class(split: Listed) -> list[str]:
    return list({int(label): path for path, label in zip(reversed(split.paths), split.labels.flip(0), strict=True)}.values())


def _chunks(length: int, size: int = 1024) -> Iterator[range]:
    return (range(start, min(start + size, length)) for start in range(0, length, size))


def _sampled_normalisation(files: ImageFiles, grey_bits: int) -> Normalisation:
    """Mean and standard deviation over a fixed sample of the training images, each brought to 64x64."""
    rows = torch.randperm(len(files.paths), generator=generator(SPLIT_SEED, "normalisation"))[:SAMPLED_FILES]
    images = (read_image(files.paths[row], grey_bits=grey_bits) for row in rows.tolist())
    sample = [np.asarray(image.resize((SMALL_SIDE_PIXELS,) * 2)) for image in images]
    return normalisation_of(torch.from_numpy(np.stack(sample)).permute(0, 3, 1, 2))
