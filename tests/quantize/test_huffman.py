"""Canonical Huffman coding against codes worked out by hand, an independent heap, and an exhaustive search."""

import heapq
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize import huffman
from quantize.codebook import find_codebook
from quantize.huffman import code_lengths, decode, encode, entropy_bits

RFC_1951_LENGTHS = np.array([3, 3, 3, 3, 3, 2, 4, 4])  # section 3.2.2: A to H


def heap_cost(frequencies):
    """Bits of a Huffman code for the whole message: every merge adds one bit to all symbols below it."""
    heap = [frequency for frequency in frequencies if frequency]
    heapq.heapify(heap)
    cost = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        cost += merged
        heapq.heappush(heap, merged)
    return cost


def kraft_sum(lengths):
    return sum(2.0 ** -int(length) for length in lengths if length)


def fibonacci_numbers(count):
    numbers = [1, 1]
    while len(numbers) < count:
        numbers.append(numbers[-1] + numbers[-2])
    return numbers


def test_lengths_of_the_textbook_example():
    """Cormen et al., Introduction to Algorithms, figure 16.3: a to f occur 45, 13, 12, 16, 9 and 5 times."""
    assert code_lengths(np.array([45, 13, 12, 16, 9, 5])).tolist() == [1, 3, 3, 3, 4, 4]


def test_codewords_are_those_of_rfc_1951():
    payload = bytes([0b00_010_111, 0b1_1110_000])  # F = 00, A = 010, H = 1111, G = 1110, three bits of padding
    assert decode(payload, RFC_1951_LENGTHS, 4).tolist() == [5, 0, 7, 6]


def test_encoder_writes_canonical_codewords():
    payload, lengths = encode(np.array([2, 2, 2, 2, 1, 1, 0]))
    assert lengths.tolist() == [2, 2, 1]  # 2 = 0, 0 = 10, 1 = 11
    assert payload == bytes([0b0000_11_11, 0b10_000000])


@given(st.lists(st.integers(0, 300), max_size=200), st.sampled_from([np.uint16, np.int64]))
def test_round_trip(symbols, dtype):
    symbols = np.array(symbols, dtype)
    payload, lengths = encode(symbols)
    assert decode(payload, lengths, symbols.size).tolist() == symbols.tolist()
    assert len(payload) == -(-heap_cost(np.bincount(symbols)) // 8) or len(set(symbols.tolist())) == 1


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=60).filter(lambda counts: np.count_nonzero(counts) > 1))
def test_lengths_are_optimal_and_complete(frequencies):
    lengths = code_lengths(np.array(frequencies))
    assert kraft_sum(lengths) == 1
    assert int(lengths.astype(int) @ frequencies) == heap_cost(frequencies)


@given(st.lists(st.integers(1, 100), min_size=5, max_size=7))
def test_limited_lengths_are_the_best_there_are(frequencies):
    """Every choice of lengths from 1 to 3 whose Kraft sum does not exceed 1, tried out."""
    possible = [lengths for lengths in itertools.product((1, 2, 3), repeat=len(frequencies)) if kraft_sum(lengths) <= 1]
    best = min(sum(map(int.__mul__, lengths, frequencies)) for lengths in possible)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huffman, "MAX_CODE_BITS", 3)
        lengths = code_lengths(np.array(frequencies))
    assert lengths.max() <= 3 and int(lengths.astype(int) @ frequencies) == best


def test_skew_that_an_unlimited_code_would_answer_with_39_bits():
    lengths = code_lengths(np.array(fibonacci_numbers(40)))
    assert lengths.max() == 31 and kraft_sum(lengths) == 1
    last = np.flatnonzero(lengths == 31)[-1]  # its codeword is all ones
    assert decode(b"\xff\xff\xff\xfe", lengths, 1).tolist() == [last]


def test_all_of_65536_symbols():
    symbols = np.random.default_rng(0).permutation(65536)
    payload, lengths = encode(symbols)
    assert set(lengths.tolist()) == {16} and len(payload) == 2 * 65536
    np.testing.assert_array_equal(decode(payload, lengths, symbols.size), symbols)


def test_one_distinct_symbol_costs_a_bit_each():
    payload, lengths = encode(np.full(9, 3))
    assert (payload, lengths.tolist()) == (b"\0\0", [0, 0, 0, 1])
    assert decode(payload, lengths, 9).tolist() == [3] * 9


def test_empty_input():
    payload, lengths = encode(np.array([], np.int64))
    assert (payload, lengths.size) == (b"", 0)
    assert decode(payload, lengths, 0).size == 0


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_long_codewords_across_words_and_chunks(monkeypatch, chunk):
    """Symbols all alike, written in a code with lengths from 2 to 31 that is made for others."""
    lengths = code_lengths(np.array(fibonacci_numbers(40)))
    monkeypatch.setattr(huffman, "code_lengths", lambda frequencies: lengths)
    monkeypatch.setattr(huffman, "CHUNK_SYMBOLS", chunk)
    symbols = np.random.default_rng(0).integers(0, 40, (20, 10))
    symbols[-1, -1] = 39
    payload, _ = encode(symbols)
    assert len(payload) == -(-int(lengths.astype(int)[symbols].sum()) // 8)
    np.testing.assert_array_equal(decode(payload, lengths, 200), symbols.ravel())


def test_entropy_by_hand():
    assert entropy_bits(np.array([4, 2, 0, 1, 1])) == pytest.approx(4 * 1 + 2 * 2 + 3 + 3)


def test_five_bit_weights_come_within_a_hundredth_of_shannons_bound():
    weights = np.random.default_rng(0).normal(size=36864).astype(np.float32)
    _, index = find_codebook(weights, 5)
    payload, _ = encode(index)
    assert entropy_bits(np.bincount(index)) <= 8 * len(payload) <= 1.01 * entropy_bits(np.bincount(index))


@pytest.mark.parametrize(
    ("symbols", "message"),
    [
        (np.array([0.5]), "float64"),
        (np.array([-1, 2]), "symbols -1 to 2"),
        (np.array([1 << 40]), f"symbols {1 << 40} to"),
    ],
)
def test_encoding_refuses(symbols, message):
    with pytest.raises(ValueError, match=message) as error:
        encode(symbols)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("payload", "lengths", "count", "message"),
    [
        (b"\0", [2, 2, 2], 1, "Kraft sum 0.75"),
        (b"\0", [1, 1, 1], 1, "Kraft sum 1.5"),
        (b"\0", [2], 1, "Kraft sum 0.25"),
        (b"\0", [1, 32], 1, "lengths 1 to 32 bits"),
        (b"\0", [-1, 1], 1, "lengths -1 to 1 bits"),
        (b"\0", [[1, 1]], 1, r"\(1, 2\)"),
        (b"\0", [0.5, 0.5], 1, "float64"),
        (b"\0", [1, 1], 9, "cannot hold 9"),
        (b"\0", [1, 1], 10**18, "cannot hold"),
        (b"\0", [1, 1], -1, "cannot hold -1"),
        (b"\0\0", [1, 1], 8, "expected 8 and zero padding"),
        (b"\1", [1, 1], 7, "expected 7 and zero padding"),
        (b"\0", [], 1, "damaged, 1 symbols expected"),
        (b"\0", [2, 2, 2, 2], 5, "damaged, 5 symbols expected"),
        (b"\x80", [1], 1, "damaged, 1 symbols expected"),
    ],
)
def test_decoding_refuses(payload, lengths, count, message):
    with pytest.raises(ValueError, match=message) as error:
        decode(payload, np.array(lengths), count)
    assert "\n" not in str(error.value)
