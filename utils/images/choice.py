"""How the images of a command are normalised: as the network's file says, or its run, the flags, or else the dataset."""

import math
from collections.abc import Mapping, Sequence

from utils.errors import UserError, printable
from utils.images.dataset import Dataset, Normalisation
from utils.images.spec import ImageSpec

ROUNDING = 5e-5  # what people type has four digits
SHOWN_CLASSES, SHOWN_CHARACTERS = 4, 20

Origins = Mapping[str, ImageSpec | None]  # what files say, by flag and name, as in "--t-path a.pt"; None: nothing


def flagged_normalisation(mean: Sequence[float] | None, std: Sequence[float] | None) -> Normalisation | None:
    """The values of --mean and --std. Raises UserError for one of them without the other."""
    if (mean is None) != (std is None):
        given, missing = ("--mean", "--std") if std is None else ("--std", "--mean")
        raise UserError(f"{given} {_spaced(mean or std)}: give {missing} as well, images are normalised by both")
    return (tuple(mean), tuple(std)) if mean is not None else None


def agreed_normalisation(files: Origins, flagged: Normalisation | None) -> Normalisation | None:
    """The one normalisation of all files and flags, None where none of them says any.

    Raises UserError for two that disagree: networks that work together are shown the same images.
    """
    said = [(origin, spec.normalisation) for origin, spec in files.items() if spec is not None]
    if flagged is not None:
        said.append(("--mean and --std", flagged))
    for origin, values in said[1:]:
        first_origin, first = said[0]
        if not _agree(first, values):
            raise UserError(
                f"{origin}: {_described(values)}, but {_described(first)} is what {first_origin} was trained with; "
                "all networks of a run see the same images"
            )
    return said[0][1] if said else None


def check_class_names(origin: str, spec: ImageSpec | None, dataset: Dataset) -> None:
    """Raises UserError if the file of `origin` says that its classes are called or ordered otherwise than the dataset's.

    Another number of them is `check_classes`'s to refuse, for a network may be trained on for other classes.
    """
    if spec is None or spec.class_names == dataset.classes or len(spec.class_names) != len(dataset.classes):
        return
    pairs = zip(spec.class_names, dataset.classes, strict=False)
    first = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), SHOWN_CLASSES)
    raise UserError(
        f"{origin}: its {len(spec.class_names)} classes are {_beginning(spec.class_names, first)}, "
        f"those of --dataset {dataset.name} are {_beginning(dataset.classes, first)} ({len(dataset.classes)} in all)"
    )


def image_remarks(files: Origins, flagged: Normalisation | None, dataset: Dataset) -> list[str]:
    """What a user should know before networks of `files` are given images of `dataset`."""
    remarks = []
    speaking = next((origin for origin, spec in files.items() if spec is not None), None)
    source = f"those of {speaking}" if speaking is not None else f"those of --dataset {dataset.name}"
    for origin, spec in files.items():
        if spec is None and flagged is None:
            remarks.append(
                f"{origin} does not say which mean and std its images were normalised with: {source} are taken, "
                "--mean and --std give others"
            )
        elif spec is not None and spec.image_size != dataset.images.image_size:
            sizes = (f"{width}x{height}" for height, width in (spec.image_size, dataset.images.image_size))
            remarks.append("{} is for images of {}, those of --dataset {name} are {}".format(origin, *sizes, name=dataset.name))
    return remarks


def _agree(first: Normalisation, second: Normalisation) -> bool:
    values = zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True)
    return all(math.isclose(ours, theirs, rel_tol=0, abs_tol=ROUNDING) for ours, theirs in values)


def _described(values: Normalisation) -> str:
    return f"mean {_spaced(values[0])} and std {_spaced(values[1])}"


def _spaced(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _beginning(names: Sequence[str], first_difference: int) -> str:
    """The first names, and the first one that differs where it is not among them."""
    text = ", ".join(printable(name, SHOWN_CHARACTERS) for name in names[:SHOWN_CLASSES])
    if SHOWN_CLASSES <= first_difference < len(names):
        name = printable(names[first_difference], SHOWN_CHARACTERS)
        text += f", ..., {name} (number {first_difference + 1})"
    return text + (", ..." if len(names) > max(SHOWN_CLASSES, first_difference + 1) else "")
