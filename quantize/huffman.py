"""Canonical Huffman coding of integer symbols: Huffman, "A Method for the Construction of Minimum-Redundancy Codes", 1952.

The code lengths alone describe the code: codewords ascend in the order of (length, symbol), as in DEFLATE (RFC 1951,
3.2.2). Lengths are limited to 31 bits by package-merge (Larmore and Hirschberg, JACM 1990), which is optimal under the
limit and gives an ordinary Huffman code wherever that needs no more. NumPy packs the bits, `bitarray` walks them in C.
"""

import numpy as np
from bitarray import bitarray
from bitarray.util import canonical_decode

from utils.errors import UserError

MAX_CODE_BITS = 31  # bitarray's canonical decoder takes no more, and a length then fits five bits
MAX_ALPHABET = 1 << 17  # 2^16 values and a zero fit; bounds what the tables of a code can cost
WORD_BITS = 32  # of the stream, while it is packed
CHUNK_SYMBOLS = 1 << 15  # packed at a time, so that they stay in the cache


def encode(symbols: np.ndarray) -> tuple[bytes, np.ndarray]:
    """The symbols as one bit stream, and the code that it is written in.

    `symbols` holds integers in [0, 2^17), in any shape, read in C order. Returns the payload, its last byte padded with
    zero bits, and the code lengths in bits as uint8 indexed by symbol, 0 for one that does not occur. A lone distinct
    symbol costs one bit each time. Raises UserError for anything but integers in that range.
    """
    symbols = _checked_symbols(symbols)
    frequencies = np.bincount(symbols)
    lengths = code_lengths(frequencies)
    payload_bits = int(frequencies @ lengths.astype(np.int64))
    return _pack(symbols, lengths, payload_bits=payload_bits), lengths


def decode(payload: bytes, code_lengths: np.ndarray, count: int) -> np.ndarray:
    """The `count` symbols of a payload, as the smallest unsigned type that holds the alphabet; shape (count,).

    Raises UserError unless `code_lengths` is a complete prefix code and the payload is exactly `count` of its codewords
    with less than a byte of zero padding. Memory stays in proportion to the payload, whatever `count` says.
    """
    lengths = _checked_lengths(code_lengths)
    if not 0 <= count <= 8 * len(payload):
        raise UserError(f"Huffman payload: {len(payload)} bytes cannot hold {count} symbols, at least one bit each")
    bits = bitarray(endian="big")
    bits.frombytes(payload)
    order = _canonical_order(lengths)
    per_length = np.bincount(lengths[order], minlength=1).tolist()
    symbol_type = np.min_scalar_type(max(lengths.size - 1, 0))
    try:
        symbols = np.fromiter(canonical_decode(bits, per_length, order.tolist()), dtype=symbol_type, count=count)
    except ValueError as error:
        raise UserError(f"Huffman payload: damaged, {count} symbols expected ({error})") from error
    _check_end(bits, int(np.bincount(symbols, minlength=lengths.size) @ lengths.astype(np.int64)))
    return symbols


def code_lengths(frequencies: np.ndarray) -> np.ndarray:
    """Optimal code lengths, at most 31 bits, for symbol frequencies (S,), by package-merge; 0 where a frequency is 0.

    Each of the levels, one a bit of length, merges the symbols with pairs ("packages") of the level before. A symbol is
    as long as the number of levels at which it is among the cheapest 2n - 2 items, followed down through the packages.
    """
    lengths = np.zeros(frequencies.size, np.uint8)
    used = np.flatnonzero(frequencies)
    if used.size < 2:
        lengths[used] = 1
        return lengths
    used = used[np.argsort(frequencies[used], kind="stable")]
    taken = 2 * used.size - 2
    for is_symbol in reversed(_merge_levels(frequencies[used].astype(np.int64))):
        symbols_taken = np.count_nonzero(is_symbol[:taken])
        lengths[used[:symbols_taken]] += 1
        taken = 2 * (taken - symbols_taken)
    return lengths


def entropy_bits(frequencies: np.ndarray) -> float:
    """Shannon's order-0 bound for a message with these symbol frequencies, in bits for the whole message."""
    frequencies = frequencies[frequencies > 0].astype(np.float64)
    return float(frequencies @ (np.log2(frequencies.sum()) - np.log2(frequencies)))


def _merge_levels(weights: np.ndarray) -> list[np.ndarray]:
    """For each level, from the longest codes up: which items of its sorted list are symbols and not packages."""
    levels = []
    packages = np.empty(0, np.int64)
    for _ in range(min(MAX_CODE_BITS, weights.size - 1)):
        items = np.concatenate((weights, packages))
        order = np.argsort(items, kind="stable")
        levels.append(order < weights.size)
        items = items[order]
        packages = items[: items.size // 2 * 2].reshape(-1, 2).sum(1)
    return levels


def _canonical_order(lengths: np.ndarray) -> np.ndarray:
    """The symbols that occur, by (length, symbol)."""
    order = np.argsort(lengths, kind="stable")
    return order[lengths[order] > 0]


def _codewords(lengths: np.ndarray) -> np.ndarray:
    """The codeword of each symbol as a number, uint64 (S,): the sum of the code space, as a fraction of 1, before it."""
    order = _canonical_order(lengths)
    unused_bits = MAX_CODE_BITS - lengths[order].astype(np.int64)
    space = np.left_shift(1, unused_bits)
    codewords = np.zeros(lengths.size, np.uint64)
    codewords[order] = (np.cumsum(space) - space) >> unused_bits
    return codewords


def _pack(symbols: np.ndarray, lengths: np.ndarray, *, payload_bits: int) -> bytes:
    """The codewords one after the other, each from its highest bit on.

    A codeword lies in the word in which it begins and the next one. What all codewords of a word add to it is summed by
    `bincount`, exactly: they share no bit, and float64 holds sums below 2^32.
    """
    codewords, bit_lengths = _codewords(lengths), lengths.astype(np.int64)
    words = np.zeros(payload_bits // WORD_BITS + 3)
    position = 0
    for start in range(0, symbols.size, CHUNK_SYMBOLS):
        chunk = symbols[start : start + CHUNK_SYMBOLS]
        used = bit_lengths[chunk]
        ends = position % WORD_BITS + np.cumsum(used)
        word, bit = np.divmod(ends - used, WORD_BITS)
        placed = codewords[chunk] << (2 * WORD_BITS - bit - used).astype(np.uint64)
        first, count = position // WORD_BITS, int(word[-1]) + 1
        words[first : first + count] += np.bincount(word, weights=placed >> np.uint64(WORD_BITS))
        words[first + 1 : first + 1 + count] += np.bincount(word, weights=placed & np.uint64(2**WORD_BITS - 1))
        position += int(used.sum())
    return words.astype(">u4").tobytes()[: (payload_bits + 7) // 8]


def _checked_symbols(symbols: np.ndarray) -> np.ndarray:
    symbols = np.asarray(symbols).reshape(-1)
    if symbols.size == 0:
        return symbols.astype(np.int64)
    if not np.issubdtype(symbols.dtype, np.integer):
        raise UserError(f"Huffman coding: symbols of type {symbols.dtype}, expected integers")
    if symbols.min() < 0 or symbols.max() >= MAX_ALPHABET:
        raise UserError(f"Huffman coding: symbols {symbols.min()} to {symbols.max()}, expected 0 to {MAX_ALPHABET - 1}")
    return symbols


def _checked_lengths(lengths: np.ndarray) -> np.ndarray:
    """The code lengths as uint8 if they describe a complete prefix code, the code of one symbol, or none."""
    lengths = np.asarray(lengths)
    if lengths.size == 0:
        return np.zeros(0, np.uint8)
    if lengths.ndim != 1 or lengths.size > MAX_ALPHABET or not np.issubdtype(lengths.dtype, np.integer):
        raise UserError(f"Huffman code: lengths of {lengths.dtype} {lengths.shape}, expected at most {MAX_ALPHABET} integers")
    if lengths.min() < 0 or lengths.max() > MAX_CODE_BITS:
        raise UserError(f"Huffman code: lengths {lengths.min()} to {lengths.max()} bits, expected 0 to {MAX_CODE_BITS}")
    used = lengths[lengths > 0].astype(np.int64)
    kraft = int(np.left_shift(1, MAX_CODE_BITS - used).sum())
    lone_symbol = used.size == 1 and used[0] == 1
    if used.size and kraft != 1 << MAX_CODE_BITS and not lone_symbol:
        raise UserError(f"Huffman code: Kraft sum {kraft / 2**MAX_CODE_BITS:.6f} of the code lengths, expected 1")
    return lengths.astype(np.uint8)


def _check_end(bits: bitarray, used_bits: int) -> None:
    """Refuses anything after the last codeword but the zero bits that fill its byte."""
    if len(bits) - used_bits >= 8 or bits[used_bits:].any():
        raise UserError(f"Huffman payload: {len(bits)} bits, expected {used_bits} and zero padding to a whole byte")
