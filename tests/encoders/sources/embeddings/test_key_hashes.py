"""Hashes of keys."""

import numpy as np
import pyarrow as pa

from orbithash.encoders.sources.embeddings.key_hashes import hash_keys, repeated


def test_equal_texts_have_equal_hashes_wherever_they_are():
    texts = ["", "a", "row1", "row2", "a longer key with ünïcode", "row1", "x" * 300]
    hashes = hash_keys(pa.array(texts))
    assert len(set(hashes.tolist())) == 6
    assert hashes[2] == hashes[5]
    np.testing.assert_array_equal(hash_keys(pa.array(["first", *texts])[3:]), hashes[2:])


def test_a_million_keys_have_different_hashes():
    keys = pa.array(np.arange(10**6)).cast(pa.string())
    count, twice = repeated([hash_keys(keys), hash_keys(keys[:3])])
    assert count == 10**6 + 3
    assert len(twice) == 3


def test_no_keys():
    assert repeated([hash_keys(pa.array([], pa.string()))])[0] == 0
