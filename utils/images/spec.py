"""What a user of a network must know: how large its images are, how they are normalised, and what its classes are called.

It travels in every file that holds a network, so that what a network computes never depends on the images that happen to
lie beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils.errors import UserError, printable, shown

FIELDS = ("class_names", "image_size", "mean", "std")
GREY_BITS_FIELD = "grey_bits"  # in the files of sets with grey images of more than 8 bits
GREY_BITS = (8, 10, 12, 14, 16)
WIDEST_GREY_BITS = GREY_BITS[-1]
CHANNELS = 3
MAX_SIDE_PIXELS = 4096
MAX_NAME_CHARACTERS = 1024  # a folder's name has at most 255 bytes, each of them at most four characters when it is escaped
MIN_STD = 1e-6


@dataclass(frozen=True)
class ImageSpec:
    """Names of the classes in the order of the logits, height and width in pixels, and the normalisation.

    `mean` and `std` are of the three channels, red, green and blue, of images scaled to [0, 1]. In grey images of 16 and 32
    bits white is 2 ** `grey_bits` - 1.
    """

    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    grey_bits: int = WIDEST_GREY_BITS

    def as_fields(self) -> dict[str, Any]:
        """The members as plain values, as a checkpoint, an archive and an export hold them; without the usual `grey_bits`."""
        fields = {name: list(getattr(self, name)) for name in FIELDS}
        return fields if self.grey_bits == WIDEST_GREY_BITS else {**fields, GREY_BITS_FIELD: self.grey_bits}

    def __str__(self) -> str:
        height, width = self.image_size
        names = ", ".join(printable(name, 20) for name in self.class_names[:8]) + (", ..." if len(self.class_names) > 8 else "")
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in self.normalisation)
        return f"{width}x{height}, mean {mean}, std {std}, classes {names}"

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation."""
        return self.mean, self.std


def read_image_spec(fields: Mapping[str, Any], *, num_classes: int) -> ImageSpec | None:
    """The members among `fields`, which may come from anybody; None where there are none, as in files of older versions.

    Raises UserError, in one line, for a member that is missing beside others, or that is not what `ImageSpec` says.
    """
    present = [name for name in FIELDS if name in fields]
    if not present:
        return None
    for name in FIELDS:
        if name not in fields:
            raise UserError(f"it has {present[0]} but no {name}, expected {', '.join(FIELDS)} together")
        if not _CHECKS[name](fields[name]):
            raise UserError(f"its {name} is {shown(fields[name], 100)}, expected {_EXPECTED[name]}")
    grey_bits = fields.get(GREY_BITS_FIELD, WIDEST_GREY_BITS)
    if type(grey_bits) is not int or grey_bits not in GREY_BITS:
        raise UserError(f"its {GREY_BITS_FIELD} is {shown(grey_bits, 100)}, expected one of {', '.join(map(str, GREY_BITS))}")
    if len(fields["class_names"]) != num_classes:
        raise UserError(f"it names {len(fields['class_names'])} classes, but has {num_classes}")
    means, deviations = (tuple(map(float, fields[name])) for name in ("mean", "std"))
    return ImageSpec(tuple(fields["class_names"]), tuple(fields["image_size"]), means, deviations, grey_bits)


def is_mean(value: float) -> bool:
    """Whether `value` can be the mean of a channel of images scaled to [0, 1]."""
    return 0 <= value <= 1


def is_std(value: float) -> bool:
    """Whether `value` can be the standard deviation of such a channel, or the 1 of those who don't divide."""
    return MIN_STD <= value <= 1


def _is_name(value: Any) -> bool:
    return (
        isinstance(value, str) and len(value) <= MAX_NAME_CHARACTERS and not any("\ud800" <= sign <= "\udfff" for sign in value)
    )


def _is_list(value: Any, length: int | None = None) -> bool:
    return isinstance(value, list | tuple) and length in (None, len(value))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


_CHECKS = {
    "class_names": lambda value: _is_list(value) and all(map(_is_name, value)),
    "image_size": lambda value: _is_list(value, 2) and all(type(side) is int and 1 <= side <= MAX_SIDE_PIXELS for side in value),
    "mean": lambda value: _is_list(value, CHANNELS) and all(_is_number(mean) and is_mean(mean) for mean in value),
    "std": lambda value: _is_list(value, CHANNELS) and all(_is_number(std) and is_std(std) for std in value),
}
_EXPECTED = {
    "class_names": f"a list of names of at most {MAX_NAME_CHARACTERS} characters each",
    "image_size": f"height and width, 1 to {MAX_SIDE_PIXELS} pixels",
    "mean": f"{CHANNELS} numbers from 0 to 1",
    "std": f"{CHANNELS} numbers from {MIN_STD:g} to 1",
}
