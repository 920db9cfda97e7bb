"""`bench export` measures both contestants, and an export of a million rows takes bounded memory."""

import json

import pyarrow.parquet as pq
import pytest

from orbithash.cluster.bench.export import _alone, _export, bench_export, write_random_archive
from orbithash.encoders.errors import InputError


def test_bench_export(cli):
    ended = cli("bench", "export", "--rows", "2000", "--thumbnail", "100", "--json")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    assert (result["bench"], result["rows"]) == ("export", 2000)
    assert min(result[name] for name in result if name.startswith(("export_", "pyarrow_"))) > 0
    assert result["share_of_pyarrow"] == pytest.approx(result["export_rows_per_s"] / result["pyarrow_rows_per_s"])


def test_invalid_settings_of_bench_export():
    with pytest.raises(InputError, match="--rows is 0; from 1 to"):
        bench_export(0, 10)
    with pytest.raises(InputError, match="--thumbnail is -1"):
        bench_export(10, -1)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_rows(tmp_path):
    peaks, sizes = [], []
    for rows in (500_000, 1_000_000):
        _alone(write_random_archive, tmp_path / str(rows), rows, 500)
        out = tmp_path / f"{rows}.parquet"
        _, peak = _alone(_export, tmp_path / str(rows), out)
        peaks.append(peak)
        assert pq.read_metadata(out).num_rows == rows
        sizes.append(out.stat().st_size / 2**20)
    # Both archives are larger than a part. Measured: 988, 1122 and 1141 MiB at 0.5, 1 and 2 million rows.
    assert sizes[1] - sizes[0] > 300
    assert peaks[1] < 1300, peaks
    assert peaks[1] - peaks[0] < 250, peaks
