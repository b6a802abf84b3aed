"""Which test images a network classifies rightly: what two runs need to be compared image by image."""

import base64
import binascii
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from utils.errors import UserError
from utils.world import World

MAX_IMAGES = 10**7  # of a test set


class TestHits(NamedTuple):
    """Of N test images in the order of the evaluation: `hits` (N,) bool, and a digest of their labels that tells sets apart."""

    hits: np.ndarray
    labels: str

    __test__ = False  # no test, whatever pytest takes it for by its name

    def document(self) -> dict[str, Any]:
        """As JSON holds it: a bit an image, in base64."""
        bits = base64.b64encode(np.packbits(self.hits).tobytes()).decode()
        return {"images": len(self.hits), "labels": self.labels, "bits": bits}


def gather_hits(labels: Sequence[Tensor], hits: Sequence[Tensor], world: World) -> TestHits:
    """Puts together what each process has of every batch, in the order of the processes."""
    own = [(batch.cpu(), hit.cpu()) for batch, hit in zip(labels, hits, strict=True)]
    parts: list[Any] = [own]
    if world.size > 1:
        parts = [None] * world.size
        dist.all_gather_object(parts, own)
    # of a small last batch not every process has a part
    in_order = [pair for batch in itertools.zip_longest(*parts) for pair in batch if pair is not None]
    all_labels, all_hits = (torch.cat(tensors).numpy() for tensors in zip(*in_order, strict=True))
    return TestHits(all_hits, hashlib.sha256(all_labels.astype("<i8").tobytes()).hexdigest()[:16])


def read_hits(document: Any) -> TestHits:
    """What `TestHits.document` gave. Raises UserError for anything else: others may have written the file."""
    try:
        images, labels, bits = (document[name] for name in ("images", "labels", "bits"))
        if type(images) is not int or not 0 < images <= MAX_IMAGES or not isinstance(labels, str) or not isinstance(bits, str):
            raise ValueError("its values are of other kinds")
        packed = np.frombuffer(base64.b64decode(bits, validate=True), dtype=np.uint8)
        if len(packed) != -(-images // 8):
            raise ValueError(f"{len(packed)} bytes for {images} images")
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise UserError(f"its hits are damaged ({error})") from error
    return TestHits(np.unpackbits(packed, count=images).astype(bool), labels)
