"""Integers of any sign in rows, mostly small, as few bits: an adaptive entropy coder in whole numbers alone.

The rows are coded side by side, column by column. What a row held so far says how large its next integer should be, and that
chooses one of a few distributions of magnitudes, each of which counts what it met. A range coder of interleaved states
(rANS: Duda, 2013; Giesen, "Interleaved entropy coders", 2014) codes the magnitudes, so that NumPy works on many integers at a
time; signs, and the lower bits of what is large, are bits as they are. Nothing depends on floating point, so that every
machine reads the same integers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantize.trellis import MACHINE
from utils.errors import UserError

PRECISION_BITS = 15  # of a probability
STATE_FLOOR, WORD_BITS = 1 << 16, 16  # a state is in [2^16, 2^32)
SYMBOLS_PER_LANE = 1 << 12  # a lane costs two bytes
MAX_LANES = 1 << 12
SYMBOLS_PER_BYTE = 512  # of a stream, at most: bounds what a reader does for a forged one

DIRECT = 16  # magnitudes that are tokens of their own
MAX_EXTRA_BITS = 19
TOKENS = DIRECT + 2 * (MAX_EXTRA_BITS + 1)
LEVEL_LIMIT = DIRECT + 2 * ((1 << MAX_EXTRA_BITS) - 1)  # magnitudes below it can be coded

FAMILIES = 3  # of distributions: integers of the even grid, of the odd one, and others
CLASSES = 26  # of expected magnitudes, two an octave
COUNT, PRIOR = 32, 2048  # the weight of an integer that was met, and of all that was expected before
UNIT = 368  # of an expected magnitude: 16 times the sum of the weights below
START = 2  # the magnitude that is expected of a row of which nothing is known, with the weight of so many integers:
START_WEIGHT = 4


@dataclass(frozen=True)
class Stream:
    """`words`: the states and the words of the range coder; `signs`: signs and lower bits, packed from the highest bit on."""

    words: bytes
    signs: bytes


@dataclass(frozen=True)
class Rows:
    """What both sides know of the rows (R,): their lengths, and whether they are levels of a trellis."""

    lengths: np.ndarray
    has_trellis: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """Where each row begins in the integers of all rows, one row after the other, (R,)."""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def total(self) -> int:
        return int(self.lengths.sum())


def encode_rows(values: np.ndarray, rows: Rows) -> tuple[Stream, np.ndarray]:
    """The integers (N,), row after row, and how many bits each row takes (R,). Raises UserError for a magnitude above 2^20."""
    magnitudes = np.abs(values.astype(np.int64))
    if values.size and magnitudes.max() >= LEVEL_LIMIT:
        raise UserError(f"cannot code a level of {magnitudes.max()}, magnitudes have to be below {LEVEL_LIMIT}")
    tokens, _, extra_bits = _tokens_of(magnitudes)
    columns, model = _Columns(rows), _Model()
    steps = []
    while (places := columns.places()) is not None:
        contexts, own = columns.contexts(), tokens[places]
        steps.append(model.intervals(contexts, own))
        columns.advance(own, steps[-1][1])
        model.count(contexts, own)
    bits = columns.bits() + _plain_bits(tokens, extra_bits, rows)
    return Stream(_pack_words(steps, rows.total), _pack_bits(values, magnitudes)), bits


def decode_rows(stream: Stream, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """The integers (N,) of `encode_rows`, int32, and the bits of each row.

    Raises UserError for anything that it did not write. Memory is in proportion to N, and N to the bytes of the stream.
    """
    if rows.total > SYMBOLS_PER_BYTE * len(stream.words):
        raise UserError(f"damaged, {len(stream.words)} bytes of words cannot hold {rows.total} integers")
    tokens = np.zeros(rows.total, np.uint8)
    columns, model, reader = _Columns(rows), _Model(), _Reader(stream.words, rows.total)
    while (places := columns.places()) is not None:
        contexts = columns.contexts()
        own = reader.read(model.table, contexts)
        tokens[places] = own
        columns.advance(own, model.intervals(contexts, own)[1])
        model.count(contexts, own)
    reader.finish()
    return _unpack_bits(stream.signs, tokens), columns.bits() + _plain_bits(tokens, _extra_bits_of(tokens), rows)


# ---- tokens ------------------------------------------------------------------------------------------------------------


def _tokens_of(magnitudes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token, lower bits, and number of lower bits of each magnitude: the token of a large one says size and parity."""
    halves = np.maximum(magnitudes - DIRECT, 0) // 2 + 1
    extra_bits = np.frexp(halves.astype(np.float64))[1] - 1  # exact: the position of the highest bit
    large = DIRECT + 2 * extra_bits + (magnitudes & 1)
    is_large = magnitudes >= DIRECT
    extra_bits = np.where(is_large, extra_bits, 0)
    return np.where(is_large, large, magnitudes), halves - (1 << extra_bits) * is_large, extra_bits


def _plain_bits(tokens: np.ndarray, extra_bits: np.ndarray, rows: Rows) -> np.ndarray:
    """How many signs and lower bits each row has (R,)."""
    sums = np.concatenate(([0], np.cumsum((tokens > 0) + extra_bits)))
    return sums[rows.starts + rows.lengths] - sums[rows.starts]


def _extra_bits_of(tokens: np.ndarray) -> np.ndarray:
    return np.where(tokens >= DIRECT, (tokens.astype(np.int64) - DIRECT) // 2, 0)


def _least_magnitudes() -> np.ndarray:
    """The least magnitude of each token, (TOKENS,)."""
    tokens = np.arange(TOKENS)
    extra_bits = _extra_bits_of(tokens)
    return np.where(tokens < DIRECT, tokens, DIRECT + 2 * ((1 << extra_bits) - 1) + (tokens & 1))


def _pack_bits(values: np.ndarray, magnitudes: np.ndarray) -> bytes:
    """A sign for each integer but zeros, then the lower bits of the large ones, those with fewer bits first."""
    _, lower, extra_bits = _tokens_of(magnitudes)
    pieces = [values[magnitudes > 0] < 0]
    for count in range(1, MAX_EXTRA_BITS + 1):
        own = lower[extra_bits == count]
        pieces.append((own[:, None] >> np.arange(count - 1, -1, -1) & 1).astype(bool).ravel())
    return np.packbits(np.concatenate(pieces)).tobytes()


def _unpack_bits(data: bytes, tokens: np.ndarray) -> np.ndarray:
    """The integers of the tokens, int32."""
    extra_bits = _extra_bits_of(tokens)
    needed = np.count_nonzero(tokens) + int(extra_bits.sum())
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    if len(data) != -(-needed // 8) or bits[needed:].any():
        raise UserError(f"damaged, {8 * len(data)} bits of signs where {needed} are expected")
    values = _least_magnitudes()[tokens].astype(np.int32)
    position = np.count_nonzero(tokens)
    negative = bits[:position].astype(bool)
    for count in range(1, MAX_EXTRA_BITS + 1):
        places = np.flatnonzero(extra_bits == count)
        own = bits[position : position + count * places.size].reshape(-1, count)
        values[places] += 2 * (own.astype(np.int32) @ (1 << np.arange(count - 1, -1, -1, dtype=np.int32)))
        position += count * places.size
    values[np.flatnonzero(tokens)[negative]] *= -1
    return values


# ---- the model ---------------------------------------------------------------------------------------------------------


class _Columns:
    """Goes through all rows side by side, longest first, and knows of each what its next integer is expected to be."""

    def __init__(self, rows: Rows):
        self.order = order = np.argsort(-rows.lengths, kind="stable")
        self.cost = np.zeros(order.size)  # bits that the range coder spent on each row; for reports alone
        self.bits_of_size = PRECISION_BITS - np.log2(np.maximum(np.arange((1 << PRECISION_BITS) + 1), 1))
        self.lengths = rows.lengths[order]
        self.starts = rows.starts[order]
        self.column = 0
        self.seen = np.full(order.size, 16 * START * START_WEIGHT, np.int64)  # 16 times the sum of the magnitudes
        self.recent = np.full(order.size, 16 * START, np.int64)  # a mean that forgets, in sixteenths
        self.last = np.full(order.size, START, np.int64)
        self.last_but_one = self.last.copy()
        self.has_trellis = rows.has_trellis[order]
        self.state = np.zeros(order.size, np.int64)
        self.magnitudes = np.minimum(_least_magnitudes(), 255)
        self.thresholds = _thresholds()

    def places(self) -> np.ndarray | None:
        """Where the column's integers are in those of all rows; None behind the last column. Rows that end here are dropped."""
        count = int(np.searchsorted(-self.lengths, -self.column))  # rows with more integers than that
        if count < self.lengths.size:
            for name in ("lengths", "starts", "seen", "recent", "last", "last_but_one", "has_trellis", "state"):
                setattr(self, name, getattr(self, name)[:count])
        return self.starts + self.column if count else None

    def contexts(self) -> np.ndarray:
        """The distribution for the next integer of each row."""
        mean = self.seen // (self.column + START_WEIGHT)
        expected = 10 * (mean + self.recent) + 32 * self.last + 16 * self.last_but_one
        family = np.where(self.has_trellis, self.state & 1, 2)
        return family * CLASSES + np.searchsorted(self.thresholds, expected)

    def advance(self, tokens: np.ndarray, sizes: np.ndarray) -> None:
        """Takes in the column: its tokens, and how long their intervals are."""
        self.cost[: sizes.size] += self.bits_of_size[sizes]
        magnitudes = self.magnitudes[tokens]
        self.seen += 16 * magnitudes
        self.recent += (16 * magnitudes - self.recent) >> 3
        self.last, self.last_but_one = magnitudes, self.last
        self.state = MACHINE[self.state, tokens & 1]
        self.column += 1

    def bits(self) -> np.ndarray:
        """What the range coder spent on each row (R,), in the order of the rows."""
        bits = np.empty_like(self.cost)
        bits[self.order] = self.cost
        return bits


def _thresholds() -> np.ndarray:
    """The expected magnitudes, in parts of `UNIT`, at which one class ends and the next begins, (CLASSES - 1,)."""
    return np.array([math.isqrt(UNIT * UNIT << number >> 12) for number in range(CLASSES - 1)])


class _Model:
    """How often each token was met in each context, and the table of the range coder that follows from it.

    `table` (contexts, TOKENS + 1) holds the cumulated probabilities, in parts of 2^15, each of at least 1.
    """

    def __init__(self) -> None:
        self.counts = np.tile(_expected_counts(), (FAMILIES, 1))
        self.table = np.zeros((len(self.counts), TOKENS + 1), np.int64)
        self._tabulate()

    def intervals(self, contexts: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the interval of each token begins, and how long it is."""
        starts = self.table[contexts, tokens]
        return starts, self.table[contexts, tokens + 1] - starts

    def count(self, contexts: np.ndarray, tokens: np.ndarray) -> None:
        met = np.bincount(contexts * TOKENS + tokens, minlength=self.counts.size)
        self.counts += COUNT * met.reshape(self.counts.shape)
        self._tabulate()

    def _tabulate(self) -> None:
        sums = np.cumsum(self.counts, 1)
        shares = sums * ((1 << PRECISION_BITS) - TOKENS) // sums[:, -1:]
        self.table[:, 1:] = shares + np.arange(1, TOKENS + 1)


def _expected_counts() -> np.ndarray:
    """Of the tokens in each class (CLASSES, TOKENS) before anything was met: of geometric distributions, in whole numbers."""
    least = _least_magnitudes()
    counts = np.zeros((CLASSES, TOKENS), np.int64)
    for number, threshold in enumerate((*_thresholds(), 2 * _thresholds()[-1])):
        left, mean = PRIOR << 20, int(threshold)
        for magnitude in range(8 * DIRECT):
            token = int(np.searchsorted(least[::2] if magnitude % 2 == 0 else least[1::2], magnitude, side="right")) * 2 - 2
            share = left * UNIT // (mean + UNIT)
            counts[number, token + magnitude % 2] += share
            left -= share
    return 1 + (counts >> 20)


# ---- the range coder ---------------------------------------------------------------------------------------------------


def _lanes(total: int) -> int:
    return min(max(total // SYMBOLS_PER_LANE, 1), MAX_LANES)


def _pack_words(steps: Sequence[tuple[np.ndarray, np.ndarray]], total: int) -> bytes:
    """The states that a reader starts with, and the words that it takes in, of intervals in the order of reading."""
    lanes = _lanes(total)
    state = np.full(lanes, STATE_FLOOR, np.int64)
    pieces = []
    for starts, sizes in reversed(steps):
        for first in reversed(range(0, starts.size, lanes)):
            size = sizes[first : first + lanes]
            own = state[: size.size]
            full = own >= size << (2 * WORD_BITS - PRECISION_BITS)
            pieces.append((own[full] & (1 << WORD_BITS) - 1).astype("<u2"))
            own = np.where(full, own >> WORD_BITS, own)
            quotient, remainder = np.divmod(own, size)
            state[: size.size] = (quotient << PRECISION_BITS) + remainder + starts[first : first + lanes]
    words = state.astype("<u4").tobytes() + b"".join(piece.tobytes() for piece in reversed(pieces))
    return words + bytes(max(0, _least_bytes(total) - len(words)))


def _least_bytes(total: int) -> int:
    return 2 * -(-total // (2 * SYMBOLS_PER_BYTE))


class _Reader:
    def __init__(self, data: bytes, total: int):
        self.lanes = _lanes(total)
        if len(data) < 4 * self.lanes or len(data) % 2:
            raise UserError(f"damaged, {len(data)} bytes of words, expected an even number, at least {4 * self.lanes}")
        self.state = np.frombuffer(data, "<u4", self.lanes).astype(np.int64)
        self.words = np.frombuffer(data, "<u2", offset=4 * self.lanes).astype(np.int64)
        self.position = 0
        self.total = total

    def read(self, table: np.ndarray, contexts: np.ndarray) -> np.ndarray:
        """The tokens in the given contexts."""
        edges = (table[:, :-1] + (np.arange(len(table)) << PRECISION_BITS)[:, None]).ravel()
        ends = table[:, 1:].ravel()
        tokens = np.empty(contexts.size, np.int64)
        for first in range(0, contexts.size, self.lanes):
            own = contexts[first : first + self.lanes]
            tokens[first : first + self.lanes] = self._read_lanes(edges, ends, own)
        return tokens

    def _read_lanes(self, edges: np.ndarray, ends: np.ndarray, contexts: np.ndarray) -> np.ndarray:
        state = self.state[: contexts.size]
        base = contexts << PRECISION_BITS
        slot = state & (1 << PRECISION_BITS) - 1
        found = np.searchsorted(edges, base + slot, side="right") - 1
        start = edges[found] - base
        state = (ends[found] - start) * (state >> PRECISION_BITS) + slot - start
        short = np.flatnonzero(state < STATE_FLOOR)
        words = self.words[self.position : self.position + short.size]
        if words.size < short.size:
            raise UserError("damaged, the words of the range coder end early")
        state[short] = (state[short] << WORD_BITS) + words
        self.position += short.size
        self.state[: contexts.size] = state
        return found - contexts * TOKENS

    def finish(self) -> None:
        """Raises UserError unless every state is back where the writer began and only padding is left."""
        left = self.words[self.position :]
        read = 4 * self.lanes + 2 * self.position
        padding = max(0, _least_bytes(self.total) - read)
        if (self.state != STATE_FLOOR).any() or left.any() or 2 * left.size != padding:
            raise UserError("damaged, the range coder does not end where it began")
