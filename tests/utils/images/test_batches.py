"""Batches: which images, how they are cropped and mirrored, and that an epoch can be entered anywhere."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as transforms

from utils.errors import UserError
from utils.images.batches import Batch, ImageData
from utils.images.datasets import Dataset, SmallImages, load_dataset
from utils.seed import derived_seed
from utils.world import World

CPU = torch.device("cpu")
MEAN, STD = (0.1, 0.4, 0.7), (0.2, 0.3, 0.5)


def small_dataset(*, train: int = 22, test: int = 10, side: int = 6, flip: bool = True) -> Dataset:
    """Random images whose label is their row, so that a batch shows where it comes from."""
    random = torch.Generator().manual_seed(0)
    splits = [
        SmallImages(torch.randint(256, (count, 3, side, side), generator=random, dtype=torch.uint8), torch.arange(count))
        for count in (train, test)
    ]
    return Dataset("small", ("a", "b"), *splits, MEAN, STD, flip)


def image_data(dataset: Dataset, **options) -> ImageData:
    return ImageData(dataset, **{"batch_size": 8, "seed": 5, "device": CPU, **options})


def pixels(images: torch.Tensor) -> np.ndarray:
    """Normalised images back as (b, 3, H, W) integers."""
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (MEAN, STD))
    return np.round((images.numpy() * std + mean) * 255).astype(int)


def equal(left: list[Batch], right: list[Batch]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.weight == b.weight for a, b in pairs)


class TestAugmentation:
    @pytest.mark.parametrize("flip", [True, False])
    def test_is_a_crop_of_the_padded_original_mirrored_or_not(self, flip):
        dataset = small_dataset(flip=flip)
        seen = set()
        for epoch in range(60):
            for batch in image_data(dataset).train_batches(epoch):
                for image, row in zip(pixels(batch.images), batch.labels.tolist(), strict=True):
                    seen.add(find_crop(image, dataset.train.images[row].numpy()))
        offsets = {(y, x) for y, x, _ in seen}
        assert offsets == {(y, x) for y in range(9) for x in range(9)}
        assert {mirrored for *_, mirrored in seen} == ({False, True} if flip else {False})

    @pytest.mark.parametrize("padding", [0, 1])
    def test_is_as_wide_as_it_is_asked_to_be(self, padding):
        dataset = small_dataset(flip=False)
        data = image_data(dataset, crop_padding=padding)
        seen = {
            find_crop(image, dataset.train.images[row].numpy())[:2]
            for epoch in range(10)
            for batch in data.train_batches(epoch)
            for image, row in zip(pixels(batch.images), batch.labels.tolist(), strict=True)
        }
        beside = range(4 - padding, 5 + padding)
        assert seen == {(y, x) for y in beside for x in beside}

    def test_offsets_and_mirroring_are_evenly_spread(self):
        dataset = small_dataset(train=2000, side=9)
        crops = [
            find_crop(image, dataset.train.images[row].numpy())
            for batch in image_data(dataset, batch_size=500).train_batches(0)
            for image, row in zip(pixels(batch.images), batch.labels.tolist(), strict=True)
        ]
        y, x, mirrored = np.array(crops).T
        for offsets in (y, x):
            assert np.bincount(offsets, minlength=9).min() > 2000 / 9 * 0.7
        assert 0.45 < mirrored.mean() < 0.55
        assert abs(np.corrcoef(y, x)[0, 1]) < 0.1
        assert abs(np.corrcoef(y, mirrored)[0, 1]) < 0.1

    def test_differs_from_epoch_to_epoch(self):
        data = image_data(small_dataset())
        assert not equal(list(data.train_batches(0)), list(data.train_batches(1)))
        assert not equal(list(data.train_batches(0)), list(data.train_batches("scoring")))

    def test_differs_from_seed_to_seed(self):
        dataset = small_dataset()
        assert not equal(list(image_data(dataset).train_batches(0)), list(image_data(dataset, seed=6).train_batches(0)))


def find_crop(image: np.ndarray, original: np.ndarray) -> tuple[int, int, bool]:
    """Offsets and mirroring that make `image` of the zero-padded `original`."""
    padded = np.pad(original, ((0, 0), (4, 4), (4, 4)))
    height, width = original.shape[1:]
    for y in range(9):
        for x in range(9):
            crop = padded[:, y : y + height, x : x + width]
            for mirrored in (False, True):
                if np.array_equal(image, crop[:, :, ::-1] if mirrored else crop):
                    return y, x, mirrored
    raise AssertionError("no crop of its original")


class TestTrainBatches:
    def test_show_every_image_once_an_epoch(self):
        labels = torch.cat([batch.labels for batch in image_data(small_dataset()).train_batches(3)])
        assert sorted(labels.tolist()) == list(range(22))

    def test_come_in_an_order_of_their_own_each_epoch(self):
        orders = [
            [label for batch in image_data(small_dataset()).train_batches(e) for label in batch.labels.tolist()] for e in (0, 1)
        ]
        assert orders[0] != orders[1] != list(range(22))

    @pytest.mark.parametrize(("train", "sizes"), [(24, [8, 8, 8]), (26, [8, 8, 8, 2]), (25, [8, 8, 8]), (7, [7]), (1, [])])
    def test_a_last_batch_of_one_image_is_left_out(self, train, sizes):
        data = image_data(small_dataset(train=train))
        assert [len(batch.labels) for batch in data.train_batches(0)] == sizes
        assert data.train_steps == len(sizes)
        assert data.train_images == sum(sizes)

    @pytest.mark.parametrize("start", [0, 1, 2, 3])
    def test_can_be_entered_at_any_batch(self, start):
        data = image_data(small_dataset())
        assert equal(list(data.train_batches(4))[start:], list(data.train_batches(4, start=start)))

    def test_limit(self):
        data = image_data(small_dataset(), limit_batches=2)
        assert equal(list(data.train_batches(0)), list(image_data(small_dataset()).train_batches(0))[:2])
        assert len(list(data.test_batches())) == data.test_steps == 2
        assert data.train_images == 16


class TestTestBatches:
    def test_are_the_originals_in_their_order_normalised(self):
        dataset = small_dataset()
        batches = list(image_data(dataset).test_batches())
        assert [len(batch.labels) for batch in batches] == [8, 2]
        images = torch.cat([batch.images for batch in batches])
        expected = transforms.normalize(dataset.test.images.float() / 255, MEAN, STD)
        torch.testing.assert_close(images, expected)
        assert torch.cat([batch.labels for batch in batches]).tolist() == list(range(10))

    def test_normalised_training_images_have_mean_0_and_deviation_1(self):
        dataset = load_dataset("digits")
        data = image_data(Dataset("digits", dataset.classes, dataset.train, dataset.train, dataset.mean, dataset.std))
        images = torch.cat([batch.images for batch in data.test_batches()])
        assert images.mean((0, 2, 3)).abs().max() < 1e-4
        assert (images.std((0, 2, 3)) - 1).abs().max() < 1e-3

    def test_example(self):
        assert image_data(small_dataset(), batch_size=128).example.shape == (8, 3, 6, 6)
        assert image_data(small_dataset(test=5), batch_size=2).example.shape == (5, 3, 6, 6)

    def test_example_shows_several_classes_and_is_the_same_in_every_run_and_process(self):
        dataset = sorted_dataset()
        worlds = [World(rank, 2, rank) for rank in range(2)]
        examples = [image_data(dataset, seed=seed, world=world).example for seed in (1, 2) for world in worlds]
        assert all(torch.equal(example, examples[0]) for example in examples)
        shown = {int(row) for row in rows_of(examples[0], dataset)}
        assert len(shown) == 8 and {row // 25 for row in shown} == {0, 1, 2, 3}


def sorted_dataset() -> Dataset:
    """100 test images of four classes, one class after the other, as folders give them."""
    dataset = small_dataset(test=100)
    return replace(dataset, test=dataset.test._replace(labels=torch.arange(100) // 25))


def rows_of(images: torch.Tensor, dataset: Dataset) -> list[int]:
    """Which test images these are."""
    return [int((dataset.test.images.numpy() == image).all((1, 2, 3)).nonzero()[0][0]) for image in pixels(images)]


class TestLimitedTest:
    def rows(self, dataset: Dataset, **options) -> list[int]:
        return [row for batch in image_data(dataset, **options).test_batches() for row in rows_of(batch.images, dataset)]

    @pytest.mark.parametrize("limit", [1, 2, 5])
    def test_every_class_has_its_share(self, limit):
        rows = self.rows(sorted_dataset(), limit_batches=limit)
        assert len(set(rows)) == 8 * limit
        assert np.bincount([row // 25 for row in rows]).tolist() == [2 * limit] * 4

    def test_a_rare_class_is_not_more_frequent_than_it_is(self):
        dataset = sorted_dataset()
        labels = (torch.arange(100) >= 75).long()
        rows = self.rows(replace(dataset, test=dataset.test._replace(labels=labels)), limit_batches=2)
        assert sum(row >= 75 for row in rows) == 4

    def test_the_draw_depends_on_neither_seed_nor_processes(self):
        dataset = sorted_dataset()
        alone = self.rows(dataset, limit_batches=3)
        assert self.rows(dataset, limit_batches=3, seed=77) == alone
        parts = [self.rows(dataset, limit_batches=3, world=World(rank, 2, rank)) for rank in range(2)]
        assert sorted(parts[0] + parts[1]) == sorted(alone)

    def test_a_limit_that_cuts_nothing_off_changes_nothing(self):
        assert self.rows(sorted_dataset(), limit_batches=13) == list(range(100))


@pytest.mark.parametrize("processes", [2, 3])
class TestManyProcesses:
    def batches(self, processes: int, dataset: Dataset, *, epoch: int | None) -> list[list[Batch]]:
        worlds = [World(rank, processes, rank) for rank in range(processes)]
        data = [image_data(dataset, batch_size=6, world=world) for world in worlds]
        return [list(one.train_batches(epoch) if epoch is not None else one.test_batches()) for one in data]

    def test_training_batches_are_shared_out(self, processes):
        dataset = small_dataset(train=24)
        whole = list(image_data(dataset, batch_size=6).train_batches(0))
        for batch, *parts in zip(whole, *self.batches(processes, dataset, epoch=0), strict=True):
            assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
            assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)

    def test_weights_make_the_mean_over_processes_the_mean_over_the_batch(self, processes):
        for parts in zip(*self.batches(processes, small_dataset(train=23), epoch=0), strict=True):
            labels = torch.cat([part.labels for part in parts]).double()
            means = [part.weight * part.labels.double().mean() for part in parts]
            assert float(sum(means) / processes) == pytest.approx(float(labels.mean()))

    def test_every_test_image_is_counted_once(self, processes):
        parts = self.batches(processes, small_dataset(test=13), epoch=None)
        labels = [label for batches in parts for batch in batches for label in batch.labels.tolist()]
        assert sorted(labels) == list(range(13))


class TestStreamed:
    def data(self, folder, **options) -> ImageData:
        return image_data(load_dataset("folder", data_dir=folder), batch_size=4, **options)

    def test_have_no_frame_to_be_cropped_out_of(self, mixed_size_images):
        with pytest.raises(UserError, match="--crop-padding 2: is for small images"):
            self.data(mixed_size_images, crop_padding=2)

    def test_gives_normalised_crops(self, mixed_size_images):
        batches = list(self.data(mixed_size_images).train_batches(0))
        assert [tuple(batch.images.shape) for batch in batches] == [(4, 3, 224, 224), (2, 3, 224, 224)]
        assert batches[0].images.mean().abs() < 0.5

    def test_workers_change_nothing(self, mixed_size_images):
        alone, helped = (self.data(mixed_size_images, workers=workers) for workers in (0, 1))
        for epoch in (0, 1):
            assert equal(list(alone.train_batches(epoch)), list(helped.train_batches(epoch)))
        assert equal(list(alone.test_batches()), list(helped.test_batches()))

    def test_can_be_entered_at_any_batch(self, mixed_size_images):
        data = self.data(mixed_size_images)
        assert equal(list(data.train_batches(2))[1:], list(data.train_batches(2, start=1)))

    @pytest.mark.parametrize("workers", [0, 1])
    def test_moves_no_global_stream(self, workers, mixed_size_images):
        data = self.data(mixed_size_images, workers=workers)
        before = torch.get_rng_state()
        list(data.train_batches(0))
        list(data.test_batches())
        assert torch.equal(torch.get_rng_state(), before)


def test_derived_seeds_fit_a_generator():
    assert torch.Generator().manual_seed(derived_seed(2**63 - 1, "augmentation", 10**9)).initial_seed() < 2**63
