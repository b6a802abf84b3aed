"""Which images choose the step of a compressed network: held out, as they are tested, and enough of them."""

from dataclasses import replace

import pytest
import torch

from quantize.level_run import top1, training_images
from utils.errors import UserError
from utils.images.batches import ImageData
from utils.images.dataset import SmallImages
from utils.images.loading import load_images
from utils.images.settings import DataSettings
from utils.world import World


@pytest.fixture(scope="module")
def digits():
    return load_images(DataSettings("digits", batch_size=32), seed=0, device=torch.device("cpu"), world=World()).dataset


def data_of(dataset, *, batch_size=32, **options):
    return ImageData(dataset, batch_size=batch_size, seed=0, device=torch.device("cpu"), **options)


def rows_of(images, everything):
    """The rows of `everything` (N, ...) that the images are, which have to be among them."""
    distances = torch.cdist(images.flatten(1), everything.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    assert float(distances.min(1).values.max()) < 1e-3
    return set(distances.argmin(1).tolist())


def test_held_out_images_are_not_augmented_and_none_of_the_others(digits):
    data = data_of(digits)
    everything = torch.cat(data.plain_batches(len(digits.train.labels)))
    calibration, held_out = training_images(data)
    images, labels = (torch.cat(parts) for parts in zip(*held_out, strict=True))
    assert sum(map(len, calibration)) == 512 and len(images) == len(digits.train.labels) - 512 == len(labels)
    seen = torch.cat([batch.indices for batch in data.train_batches("calibration")])[:512]
    rows = rows_of(images, everything)
    assert len(rows) == len(images)
    assert rows.isdisjoint(seen.tolist())
    assert all(torch.equal(first[0], second[0]) for first, second in zip(held_out, training_images(data)[1], strict=True))


@pytest.mark.parametrize("batch_size", [16, 64, 500])
def test_a_limit_gives_half_of_its_images_to_each(digits, batch_size):
    calibration, held_out = training_images(data_of(digits, batch_size=batch_size, limit_batches=1))
    assert sum(map(len, calibration)) == sum(len(labels) for _, labels in held_out) == batch_size // 2


def test_one_image_is_too_few(digits):
    few = replace(digits, train=SmallImages(digits.train.images[:1], digits.train.labels[:1]))
    with pytest.raises(UserError, match="1 training images: too few to hold any out"):
        training_images(data_of(few, batch_size=1))


def test_accuracy_is_of_all_batches():
    batches = [(torch.eye(3)[[0, 1]], torch.tensor([0, 2])), (torch.eye(3)[[2]], torch.tensor([2]))]
    assert top1(torch.nn.Identity(), batches) == pytest.approx(200 / 3)
