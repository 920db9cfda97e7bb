import numpy as np
import pytest
from search_parts import random_case, random_codes

from orbithash.encoders.errors import InputError
from orbithash.search.index import duplicates
from orbithash.search.index.duplicates import duplicate_groups


def oracle(ids, codes, radius):
    """Return the groups by walking from row to row."""
    left = dict(zip(ids.tolist(), (int.from_bytes(code.tobytes()) for code in codes), strict=True))
    groups = []
    while left:
        row, code = left.popitem()
        group, edge = [row], [code]
        while edge:
            code = edge.pop()
            near = [row for row, other in left.items() if (code ^ other).bit_count() <= radius]
            group += near
            edge += [left.pop(row) for row in near]
        groups.append(sorted(group))
    return sorted((group for group in groups if len(group) > 1), key=lambda group: (-len(group), group[0]))


@pytest.mark.parametrize("seed", range(500, 540))
def test_groups_equal_a_walk(seed, monkeypatch):
    if seed % 2:
        # A small limit, so that links come in many batches.
        monkeypatch.setattr(duplicates, "_MAX_LINKS", 5)
    case = random_case(seed, max_rows=250)
    for radius in (0, 1, 3, case.bits // 4, case.bits):
        found = duplicate_groups(case.ids, case.codes, case.bits, radius)
        assert [group.tolist() for group in found] == oracle(case.ids, case.codes, radius)


def test_a_chain_is_one_group_however_far_its_ends_are():
    codes = np.packbits(np.tri(17, 16, -1, np.uint8), axis=1)
    (group,) = duplicate_groups(np.arange(17, dtype=np.uint64), codes, 16, 1)
    assert group.tolist() == list(range(17))
    assert duplicate_groups(np.arange(17, dtype=np.uint64), codes, 16, 0) == []


@pytest.mark.parametrize("radius", [-1, 17])
def test_a_radius_out_of_range_is_refused(radius):
    codes = random_codes(np.random.default_rng(0), 3, 16)
    with pytest.raises(InputError, match="from 0 to the 16 bits"):
        duplicate_groups(np.arange(3, dtype=np.uint64), codes, 16, radius)
