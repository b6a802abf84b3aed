"""The step of a compressed network that is found for what a user cares about: a size of the file, or a loss of accuracy."""

from collections.abc import Callable
from dataclasses import dataclass

from quantize.compression import Compressed, Compressor
from quantize.table import ArchiveReport
from utils.errors import ParameterError

STEPS_PER_OCTAVE = 4
FINEST, COARSEST = -40, 8  # from errors far below what float16 would leave to nothing but zeros


@dataclass(frozen=True)
class Candidate:
    """A compressed network with the bytes of its archive; `drop` is what it loses on held-out images, in points of top-1."""

    compressed: Compressed
    step: float
    data: bytes
    report: ArchiveReport
    drop: float | None = None


class Search:
    """Bisection over steps, which are whole quarters of an octave of `compressor.unit`.

    `pack` gives a network's bytes, `drop_of` what a network loses in points.
    """

    def __init__(
        self,
        compressor: Compressor,
        *,
        pack: Callable[[Compressed], tuple[bytes, ArchiveReport]],
        drop_of: Callable[[Compressed], float],
        on_candidate: Callable[[Candidate], object] | None = None,
    ):
        self.compressor, self.pack, self.drop_of, self.on_candidate = compressor, pack, drop_of, on_candidate

    def within_bytes(self, max_bytes: int) -> Candidate:
        """The network with the finest step of those whose archive has at most `max_bytes`. Raises ParameterError for too few."""
        coarsest = self._candidate(COARSEST)
        if len(coarsest.data) > max_bytes:
            raise ParameterError(
                "max_bytes", max_bytes, f"the least that an archive of this network takes is {len(coarsest.data)}"
            )
        return self._bisect(coarsest, lambda candidate: len(candidate.data) <= max_bytes)

    def within_drop(self, max_drop: float) -> Candidate:
        """The network with the coarsest step of those that lose at most `max_drop` points. Raises ParameterError for too few.

        Accuracy is not monotonous in the step: the candidate that is given keeps the bound, a coarser one may do so as well.
        """
        finest = self._candidate(FINEST, measured=True)
        if finest.drop > max_drop:
            raise ParameterError("max_drop", max_drop, f"the least that this network loses is {finest.drop:.2f} points")
        return self._bisect(finest, lambda candidate: candidate.drop <= max_drop, measured=True)

    def _bisect(self, found: Candidate, holds: Callable[[Candidate], bool], *, measured: bool = False) -> Candidate:
        """From one end, at which it holds, towards the other one."""
        inside, outside = (FINEST, COARSEST + 1) if measured else (COARSEST, FINEST - 1)
        while abs(outside - inside) > 1:
            middle = (inside + outside) // 2
            candidate = self._candidate(middle, measured=measured)
            if holds(candidate):
                inside, found = middle, candidate
            else:
                outside = middle
        return found

    def _candidate(self, number: int, *, measured: bool = False) -> Candidate:
        step = self.compressor.unit * 2 ** (number / STEPS_PER_OCTAVE)
        compressed = self.compressor.compress(step)
        candidate = Candidate(compressed, step, *self.pack(compressed), self.drop_of(compressed) if measured else None)
        if self.on_candidate is not None:
            self.on_candidate(candidate)
        return candidate
