"""The entropy coder of levels: what goes in comes out, near the entropy, and nothing else is accepted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.level_coder import LEVEL_LIMIT, SYMBOLS_PER_BYTE, Rows, Stream, decode_rows, encode_rows
from utils.errors import UserError


def rows_of(*lengths, trellis=True):
    return Rows(np.array(lengths, np.int64), np.full(len(lengths), trellis))


def laplace(scale, shape, seed=0):
    return np.rint(np.random.default_rng(seed).laplace(scale=scale, size=shape)).astype(np.int32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.one_of(st.integers(-3, 3), st.integers(1 - LEVEL_LIMIT, LEVEL_LIMIT - 1)), max_size=20), max_size=8))
def test_round_trip(lists):
    values = np.array([number for row in lists for number in row], np.int64)
    rows = Rows(np.array([len(row) for row in lists], np.int64), np.arange(len(lists)) % 2 == 0)
    stream, bits = encode_rows(values, rows)
    decoded, same_bits = decode_rows(stream, rows)
    assert np.array_equal(decoded, values) and decoded.dtype == np.int32
    assert np.array_equal(bits, same_bits) and bits.shape == (len(lists),)


@pytest.mark.parametrize("scale", [0.3, 1.5, 6.0])
def test_the_size_is_near_the_entropy(scale):
    values = laplace(scale, 64_000)
    stream, bits = encode_rows(values, rows_of(*[250] * 256, trellis=False))
    _, counts = np.unique(values, return_counts=True)
    entropy = -(counts @ np.log2(counts / values.size))
    size = 8 * (len(stream.words) + len(stream.signs))
    assert 0.99 * entropy < bits.sum() < 1.02 * entropy
    assert size == pytest.approx(bits.sum(), rel=0.01)


def test_rows_of_different_scales_take_less_than_their_common_entropy():
    """What a row held so far says how large its numbers are: no parameter of a row is stored."""
    scales = np.repeat(2.0 ** np.arange(-2, 4), 20)
    values = laplace(scales[:, None], (120, 200))
    stream, _ = encode_rows(values.ravel(), rows_of(*[200] * 120))
    _, counts = np.unique(values, return_counts=True)
    assert 8 * (len(stream.words) + len(stream.signs)) < -0.9 * (counts @ np.log2(counts / values.size))


def test_many_lanes_and_rows_of_many_lengths():
    lengths = np.random.default_rng(0).integers(0, 300, 200)
    values = laplace(2.0, lengths.sum())
    rows = rows_of(*lengths)
    assert np.array_equal(decode_rows(encode_rows(values, rows)[0], rows)[0], values)


def test_numbers_that_are_too_large():
    with pytest.raises(UserError, match=f"magnitudes have to be below {LEVEL_LIMIT}"):
        encode_rows(np.array([LEVEL_LIMIT]), rows_of(1))


def test_zeros_take_no_less_than_the_bound_allows():
    count = 1 << 17
    stream, _ = encode_rows(np.zeros(count, np.int32), rows_of(*[1 << 10] * 128))
    assert len(stream.words) >= count // SYMBOLS_PER_BYTE
    decoded, _ = decode_rows(stream, rows_of(*[1 << 10] * 128))
    assert not decoded.any()
    with pytest.raises(UserError, match="cannot hold"):
        decode_rows(stream, rows_of(*[1 << 20] * 128))


def test_what_was_not_written_is_refused():
    values, rows = laplace(2.0, 3000), rows_of(*[300] * 10)
    stream, _ = encode_rows(values, rows)
    words, signs = stream.words, stream.signs
    forged = [Stream(words[:-2], signs), Stream(words + b"\0\0", signs), Stream(words[:-1], signs), Stream(words, signs + b"\0"),
              Stream(words, signs[:-1]), Stream(words[:2], signs), Stream(b"", signs)]  # fmt: skip
    for other in forged:
        with pytest.raises(UserError, match="damaged"):
            decode_rows(other, rows)
    stream_of = np.random.default_rng(1)
    for _ in range(30):
        place, value = stream_of.integers(len(words)), stream_of.integers(1, 256)
        other = bytearray(words)
        other[place] ^= value
        with pytest.raises(UserError, match="damaged"):
            decode_rows(Stream(bytes(other), signs), rows)
