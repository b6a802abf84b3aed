"""What is done to an image before a network is tested on it, in the evaluation of every script, in predict.py and in exports."""

from typing import Any

from torchvision.transforms import v2

SMALL_SIDE_PIXELS = 64  # images of at most this are shown whole
STREAMED_SIDE_PIXELS, RESIZED_SIDE_PIXELS = 224, 256  # of ImageNet's evaluation: the middle of an image that is a little larger


def is_small(size: tuple[int, int]) -> bool:
    """Whether images of this height and width are shown whole, and augmented by shifting them."""
    return max(size) <= SMALL_SIDE_PIXELS


def resized_side(size: tuple[int, int]) -> int:
    """The shorter side to which a large image is scaled before the middle of `size` is cut out."""
    return round(min(size) * RESIZED_SIDE_PIXELS / STREAMED_SIDE_PIXELS)


def test_transform(size: tuple[int, int]) -> v2.Transform:
    """What makes an image (PIL, RGB) one of `size` (height, width) for a network that was tested on such: (3, H, W) uint8.

    Large images are scaled and the middle is cropped out; small ones are scaled where they have another size.
    """
    if is_small(size):
        return v2.Compose([v2.Resize(size), v2.PILToTensor()])
    return v2.Compose([v2.Resize(resized_side(size)), v2.CenterCrop(size), v2.PILToTensor()])


def describe_preparation(size: tuple[int, int]) -> dict[str, Any]:
    """The same in words and numbers, for those who do it by other means."""
    steps = {"resize": list(size)} if is_small(size) else {"resize_shorter_side": resized_side(size), "center_crop": list(size)}
    scale = "to [0, 1], then (value - mean) / std"
    return {"orientation": "by EXIF", **steps, "interpolation": "bilinear, antialiased", "colours": "RGB", "values": scale}
