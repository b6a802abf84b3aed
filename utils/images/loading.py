"""The images of a run, as its networks have seen them before, and whether its networks fit them."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.errors import ParameterError, UserError, naming
from utils.images.batches import ImageData
from utils.images.choice import Origins, agreed_normalisation, check_class_names, flagged_normalisation, image_remarks
from utils.images.dataset import Dataset, Normalisation, Wanted
from utils.images.datasets import load_dataset
from utils.images.settings import DataSettings, parsed_size
from utils.images.spec import read_image_spec
from utils.modes import without_trace
from utils.training.objective import logits_of
from utils.world import World


def load_images(
    settings: DataSettings,
    *,
    seed: int,
    device: torch.device,
    world: World,
    files: Origins | None = None,
    resumed: Origins | None = None,
    other_classes: Collection[str] = (),
    published: Normalisation | None = None,
    test_only: bool = False,
    may_write: bool = True,
) -> ImageData:
    """The dataset in batches on `device`, as the networks of `files`, or the run that goes on, have seen it.

    `resumed` is what that run says (`of_state`), and then alone counts; None for a new one. Where the set has to be downloaded,
    and `may_write` allows it, the main process does that while the others wait. The files of `other_classes` may know other
    classes than the dataset. `published` is what published weights were trained with, which
    flags override. Raises UserError for files that disagree.
    """
    files, flagged = files or {}, flagged_normalisation(settings.mean, settings.std)
    flagged = flagged or (published if resumed is None else None)
    known = files if resumed is None else resumed
    dataset = _read(settings, known=known, flagged=flagged, world=world, test_only=test_only, may_write=may_write)
    for origin, spec in {**files, **known}.items():
        if origin not in other_classes:
            check_class_names(origin, spec, dataset)
    data = ImageData(
        dataset,
        batch_size=settings.batch_size,
        seed=seed,
        device=device,
        world=world,
        workers=settings.workers,
        limit_batches=settings.limit_batches,
        crop_padding=settings.crop_padding,
        remarks=image_remarks(known, flagged, dataset) if resumed is None else (),
    )
    if data.train_steps == 0 and not test_only:
        images = len(dataset.train.labels)
        raise ParameterError(
            "data_dir", settings.data_dir, f"{images} training images are too few, 2 a process make the smallest batch"
        )
    return data


def _read(
    settings: DataSettings, *, known: Origins, flagged: Normalisation | None, world: World, test_only: bool, may_write: bool
) -> Dataset:
    """The set itself; of many processes the main one reads first, for it may have to download."""
    specs = [spec for spec in known.values() if spec is not None]
    if dist.is_initialized() and not world.is_main:
        dist.barrier()
    dataset = load_dataset(
        settings.dataset,
        data_dir=settings.data_dir,
        wanted=Wanted(
            download=world.is_main and settings.may_download and may_write,
            network=specs[0] if specs else None,
            normalisation=agreed_normalisation(known, flagged),
            asked_size=parsed_size(settings.image_size) if settings.image_size is not None else None,
            test_only=test_only,
            flip=not settings.no_flip,
            test_share=settings.test_share,
            skip_broken=settings.skip_broken,
        ),
    )
    if dist.is_initialized() and world.is_main:
        dist.barrier()
    return dataset


def of_state(state: Mapping[str, Any], *, origin: str) -> Origins:
    """What the saved state of a run says; nothing in those of older versions, which took the dataset's values."""
    names = state.get("class_names")
    with naming(origin):
        return {origin: read_image_spec(state, num_classes=len(names) if isinstance(names, list) else 0)}


def check_classes(num_classes: int, data: ImageData, *, origin: str, remark: str | None = None) -> None:
    """Raises UserError unless the network of `origin` (flag and file) has as many classes as the dataset.

    `remark`, what the user should know of how the file was read, goes to those on the images.
    """
    expected = len(data.dataset.classes)
    if num_classes != expected:
        raise UserError(f"{origin}: has {num_classes} classes, but --dataset {data.dataset.name} has {expected}")
    if remark is not None:
        data.remarks += (f"{origin}: {remark}",)


@torch.no_grad()
def check_images(
    network: nn.Module, data: ImageData, *, origin: str, trains: bool = False, num_classes: int | None = None
) -> None:
    """Raises UserError if the network of `origin` (flag and value) gives no finite logits for images of the dataset.

    `num_classes` are those of a network that knows others than the dataset. One that `trains` may give
    more beside its logits in training, which is remarked once. The network is left as it was.
    """
    with without_trace(network):
        result = _result_for_example(network.eval(), data, origin)
        if not _are_logits(result, data, num_classes):
            raise UserError(f"{origin}: must return {_logits_wanted(data, num_classes)}, not {_found(result)}")
        if not result.isfinite().all():
            raise UserError(f"{origin}: gives logits that are NaN or infinite for images of --dataset {data.dataset.name}")
        if trains:
            with naming(origin):
                network.train()
            result = _result_for_example(network, data, origin)
    if not _are_logits(logits_of(result), data, num_classes):
        raise UserError(
            f"{origin}: must return {_logits_wanted(data, num_classes)} in training too, or first of all, not {_found(result)}"
        )
    if not isinstance(result, Tensor):
        data.remarks += (f"{origin} returns {_found(result)} in training: it trains by the first entry, the logits",)


def _result_for_example(network: nn.Module, data: ImageData, origin: str) -> Any:
    height, width = data.example.shape[2:]
    try:
        return network(data.example)
    except Exception as error:  # networks refuse a size in any way: by an assertion, a shape that does not fit
        reason = str(error).partition("\n")[0]
        where = " in training" if network.training else ""
        raise UserError(
            f"{origin}: cannot take {width}x{height} images of --dataset {data.dataset.name}{where} ({reason})"
        ) from error


def _are_logits(result: Any, data: ImageData, num_classes: int | None) -> bool:
    return isinstance(result, Tensor) and result.shape == _shape_of_logits(data, num_classes)


def _shape_of_logits(data: ImageData, num_classes: int | None) -> tuple[int, int]:
    return len(data.example), num_classes or len(data.dataset.classes)


def _logits_wanted(data: ImageData, num_classes: int | None) -> str:
    return f"logits of shape {_shape_of_logits(data, num_classes)} for {len(data.example)} images"


def _found(result: Any) -> str:
    if isinstance(result, Tensor):
        return f"shape {tuple(result.shape)}"
    entries = f" of {len(result)}" if isinstance(result, tuple | list) else ""
    return f"a {type(result).__name__}{entries}"
