"""Randomness that can be repeated: every stream is a function of the seed and of what it is for.

What is drawn for training (the order of the images, their crops and flips) comes from `generator(seed, purpose, ...)`, not
from one long stream: any epoch can then be entered at any batch with the numbers it would have had, on any device and
with any number of processes or workers. Global streams (initialisation, dropout) are seeded once and can be saved.
"""

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seeds the global streams of Python, NumPy and torch (CPU and every CUDA device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derived_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed that is unrelated for different purposes, such as `("order", epoch)`."""
    text = ":".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator of its own for one purpose; what it draws does not depend on what others drew."""
    return torch.Generator().manual_seed(derived_seed(seed, *purpose))


def random_state(*, cuda: bool = True) -> dict[str, Any]:
    """The state of every global stream, as tensors and plain values; without `cuda` the GPU is not looked for."""
    version, keys, gauss = random.getstate()
    name, words, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(keys), gauss],
        "numpy": [name, torch.from_numpy(words.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if cuda and torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Puts every global stream back to what `random_state` returned; a CUDA stream only where there is a CUDA device."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, words, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def preserved_random_state(*, cuda: bool = True) -> Iterator[None]:
    """Whatever is drawn inside leaves the global streams as they were; without `cuda` those of the CPU alone."""
    state = random_state(cuda=cuda)
    try:
        yield
    finally:
        restore_random_state(state)
