"""One image file as people have it, as RGB of 8 bits a channel and the right way up.

Photos carry a tag that says how the camera was held (EXIF), and every viewer turns them by it. Grey images of 16 and 32 bits
may hold numbers of 8, 10, 12, 14 or 16 bits, as microscopes, X-ray and depth cameras write them: which, only all images of a
set together can tell (`largest_grey`, `grey_bits_of`), so that what is white belongs to a network like its normalisation.
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils.errors import UserError, printable
from utils.images.spec import GREY_BITS, WIDEST_GREY_BITS

MAX_PIXELS = 256 << 20  # of an image; Pillow would warn from a third of that on
ORIENTATION = 0x0112  # the EXIF tag
SHOWN_BROKEN = 10  # files in a message
# What Pillow opens and does not show by itself: without another program (which it would start), or at all
_NO_PICTURES = frozenset(("EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"))
_DEEP_ENDINGS = frozenset(
    (".png", ".apng", ".tif", ".tiff", ".pgm", ".pnm", ".ppm", ".im", ".jp2", ".j2k", ".spi", ".fits", ".fit")
)
T = TypeVar("T")
_IMAGE_ERRORS = (OSError, UnidentifiedImageError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class BrokenImage(UserError):
    """An image that cannot be read; the message names it."""


@cache
def image_endings() -> frozenset[str]:
    """The endings of file names, in small letters, of every kind of image that Pillow reads."""
    endings = Image.registered_extensions()  # has Pillow look for what it can open
    return frozenset(ending for ending, kind in endings.items() if kind in Image.OPEN and kind not in _NO_PICTURES)


def read_image(path: str, *, grey_bits: int = WIDEST_GREY_BITS) -> Image.Image:
    """The image at `path` in RGB, 8 bits a channel. Raises BrokenImage, naming the file, if it cannot be read.

    Grey numbers of more than 8 bits are scaled from 0 to 2 ** `grey_bits` - 1, floating-point ones from 0 to 1, to 0 to 255.
    Transparency is left out and the colour below it is shown, as torchvision's ImageFolder does it.
    """
    return _read(path, lambda image: _to_rgb(image, grey_bits))


def image_size(path: str) -> tuple[int, int]:
    """Height and width as it is seen, from the head of the file. Raises BrokenImage."""
    return _read(path, _seen_size)


def largest_grey(path: str) -> int:
    """The largest number of a grey image of 16 or 32 bits; 0 for every other image. Raises BrokenImage."""
    if not path.lower().endswith(tuple(_DEEP_ENDINGS)):
        return 0
    return _read(path, lambda image: int(np.asarray(image).max()) if image.mode.startswith("I") else 0)


def grey_bits_of(largest: Iterable[int]) -> int | None:
    """How many bits hold all these numbers: the fewest of GREY_BITS, the most where none do; None where all are 0."""
    highest = max(largest, default=0)
    return next((bits for bits in GREY_BITS if highest < 1 << bits), WIDEST_GREY_BITS) if highest else None


def _read(path: str, take: Callable[[Image.Image], T]) -> T:
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow has no other place for it
    try:
        with Image.open(path) as image:
            return take(image)
    except _IMAGE_ERRORS as error:
        raise BrokenImage(f"the image {printable(path)} cannot be read ({printable(str(error))})") from error


def _seen_size(image: Image.Image) -> tuple[int, int]:
    return (image if _orientation(image) == 1 else _upright(image)).size[::-1]


def _orientation(image: Image.Image) -> int:
    found = image.getexif().get(ORIENTATION, 1)
    return found if isinstance(found, int) else 1


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # where Pillow turns it by itself, as it does with TIFF, it takes the tag away
    return ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image, grey_bits: int) -> Image.Image:
    if _orientation(image) != 1:
        image = _upright(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_bytes(np.asarray(image), grey_bits))
    elif isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours as from the palette at once, of which Pillow warns
    return image.convert("RGB")


def _to_bytes(values: np.ndarray, grey_bits: int) -> np.ndarray:
    """Grey values of more than 8 bits as uint8, rounded; converting them otherwise would cut them off at 255."""
    white = 1 if np.issubdtype(values.dtype, np.floating) else (1 << grey_bits) - 1
    lowest, highest = values.min(), values.max()
    if not 0 <= lowest <= highest <= white:  # NaN is neither
        raise ValueError(f"its grey values go from {lowest} to {highest}, expected 0 to {white}")
    return np.rint(values * (255 / white)).astype(np.uint8)


def describe_broken(broken: Iterable[BrokenImage]) -> str:
    """All broken files in one line, the first of them by name."""
    found = list(broken)
    listed = "; ".join(map(str, found[:SHOWN_BROKEN]))
    if len(found) == 1:
        return listed
    more = f"; and {len(found) - SHOWN_BROKEN} more" if len(found) > SHOWN_BROKEN else ""
    return f"{len(found)} images cannot be read: {listed}{more}"
