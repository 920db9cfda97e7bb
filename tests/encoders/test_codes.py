"""Codes against computations bit by bit, and against inner products of +1 and -1."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from orbithash.encoders.codes import check_bits, check_codes, hamming, num_bytes, pack, unpack
from orbithash.encoders.errors import InputError

ALL_BITS = st.integers(8, 512)
FEW = st.integers(0, 5)


def bit_arrays(num_rows=FEW, bits=ALL_BITS):
    return st.tuples(num_rows, bits).flatmap(lambda shape: arrays(np.bool_, shape))


@given(bit_arrays())
def test_packing_round_trip(bits):
    length = bits.shape[1]
    codes = pack(bits)
    assert (codes.dtype, codes.shape) == (np.uint8, (len(bits), num_bytes(length)))
    assert check_codes(codes, length) is codes
    np.testing.assert_array_equal(unpack(codes, length), bits)
    assert unpack(codes, length).dtype == np.bool_


@given(bit_arrays(num_rows=st.just(1)))
def test_bit_order(bits):
    code = pack(bits)[0]
    for j, bit in enumerate(bits[0]):
        assert bool(code[j // 8] & (128 >> (j % 8))) == bit
    assert sum(int(byte).bit_count() for byte in code) == bits.sum(), "pad bits are zero"


@given(st.integers(0, 2**32 - 1), ALL_BITS, st.integers(0, 6), st.integers(0, 6))
def test_distances_equal_those_from_inner_products_of_signs(seed, length, num_queries, num_codes):
    rng = np.random.default_rng(seed)
    queries, database = rng.random((num_queries, length)) < 0.5, rng.random((num_codes, length)) < 0.5
    signs = [np.where(bits, 1, -1) for bits in (queries, database)]
    distances = hamming(pack(queries), pack(database))
    np.testing.assert_array_equal(distances, (length - signs[0] @ signs[1].T) // 2)
    assert distances.dtype == np.int32
    assert distances.shape == (num_queries, num_codes)


@given(bit_arrays(num_rows=st.just(2)))
def test_padding_does_not_change_distances(bits):
    """Longer codes of whole bytes with the same bits have the same distances."""
    padded = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 8)))
    code, longer = pack(bits), pack(padded)
    np.testing.assert_array_equal(code, longer)
    assert hamming(code[:1], code[1:]) == hamming(longer[:1], longer[1:]) == (bits[0] != bits[1]).sum()


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), ALL_BITS)
def test_distance_is_a_metric(seed, length):
    rng = np.random.default_rng(seed)
    codes = pack(rng.random((5, length)) < 0.5)
    distances = hamming(codes, codes)
    assert (np.diag(distances) == 0).all()
    np.testing.assert_array_equal(distances, distances.T)
    assert (distances[:, None, :] <= distances[:, :, None] + distances[None, :, :]).all()
    assert hamming(codes[:1], pack(~unpack(codes[:1], length)))[0, 0] == length


@given(bit_arrays(num_rows=st.just(6), bits=st.integers(8, 40)))
def test_leading_axes_do_not_matter(bits):
    length = bits.shape[1]
    stacked = bits.reshape(2, 3, length)
    np.testing.assert_array_equal(pack(stacked), pack(bits).reshape(2, 3, -1))
    np.testing.assert_array_equal(unpack(pack(stacked), length), stacked)
    np.testing.assert_array_equal(unpack(pack(bits[0]), length), bits[0])


@given(ALL_BITS.filter(lambda bits: bits % 8), st.data())
def test_a_set_pad_bit_is_refused(length, data):
    codes = np.zeros((3, num_bytes(length)), np.uint8)
    row, pad = data.draw(st.integers(0, 2)), data.draw(st.integers(0, -length % 8 - 1))
    codes[row, -1] = 1 << pad
    with pytest.raises(InputError, match=f"{-length % 8} pad bits"):
        check_codes(codes, length)
    with pytest.raises(InputError, match="pad bits"):
        unpack(codes, length)
    codes[row, -1] = 1 << (-length % 8)
    assert unpack(codes, length)[row, -1], "the last bit is not a pad bit"


@given(ALL_BITS, st.integers(0, 70))
def test_another_width_is_refused(length, width):
    codes = np.zeros((2, width), np.uint8)
    if width == num_bytes(length):
        assert check_codes(codes, length) is codes
    else:
        with pytest.raises(InputError, match=rf"has {num_bytes(length)} bytes, got shape \(2, {width}\)"):
            check_codes(codes, length)


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64, np.float32, np.bool_])
def test_another_type_is_refused(dtype):
    with pytest.raises(InputError, match="codes must be uint8, got"):
        check_codes(np.zeros((1, 2), dtype), 16)
    with pytest.raises(InputError, match="codes must be uint8, got"):
        unpack(np.zeros((1, 2), dtype), 16)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_only_bool_is_packed(dtype):
    with pytest.raises(InputError, match="bits to pack must be bool"):
        pack(np.ones((2, 16), dtype))


def test_a_scalar_is_not_a_code():
    with pytest.raises(InputError, match=r"got shape \(\)"):
        check_codes(np.uint8(3) * np.ones((), np.uint8), 8)


@pytest.mark.parametrize(
    ("queries", "database"),
    [((1, 2), (1, 3)), ((2,), (1, 2)), ((1, 2), (2,)), ((1, 1, 2), (1, 2)), ((1, 2), (1, 1, 2))],
)
def test_distances_need_two_lists_of_one_width(queries, database):
    with pytest.raises(InputError, match="with the same B, got"):
        hamming(np.zeros(queries, np.uint8), np.zeros(database, np.uint8))


def test_the_largest_distance_fits():
    zeros, ones = np.zeros((1, 64), np.uint8), np.full((1, 64), 255, np.uint8)
    assert hamming(zeros, ones)[0, 0] == 512


@pytest.mark.parametrize("bits", [8, 9, 512, np.int64(64)])
def test_allowed_lengths(bits):
    assert check_bits(bits) == bits
    assert type(check_bits(bits)) is int


@pytest.mark.parametrize("bits", [7, 0, -8, 513, 16.0, "16", None, True])
def test_other_lengths_are_refused(bits):
    with pytest.raises(InputError, match="an integer from 8 to 512 is required"):
        check_bits(bits)


@pytest.mark.parametrize(("bits", "expected"), [(8, 1), (9, 2), (16, 2), (17, 3), (511, 64), (512, 64)])
def test_bytes_of_a_code(bits, expected):
    assert num_bytes(bits) == expected
