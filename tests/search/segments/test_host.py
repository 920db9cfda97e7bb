"""A shard that follows its archive."""

import numpy as np
import pytest
from shard_cases import ChangingArchive, Shards, check_version


@pytest.mark.parametrize("seed", range(8))
def test_versions_equal_a_loop_over_their_rows(seed, tmp_path):
    case = ChangingArchive.create(tmp_path / "archive", seed)
    rng = np.random.default_rng(seed)
    folder = tmp_path / "segments" if seed % 2 else None
    num_shards, shift = int(rng.integers(1, 9)), int(rng.integers(0, 7))
    shards = Shards.of(case, num_shards, shift, folder=folder)
    followed = []
    for _ in range(8):
        followed.append(case.newest)
        assert shards.follow(case.newest) == len(case.versions[case.newest])
        for version in {followed[-1], *rng.choice(followed, 2).tolist()}:
            check_version(case, shards, int(version))
        if rng.random() < 0.3:
            shards.merge_all()
            check_version(case, shards, followed[-1])
        if rng.random() < 0.15:
            shards.close()
            shards = Shards.of(case, num_shards, shift, folder=folder)
            followed = []
        case.change()
    shards.close()
