"""An export on Ray Data writes the files that one process writes."""

import dataclasses
import subprocess
import sys

import pytest
from cluster_parts import user_environment
from export_archives import make_archive

from orbithash.cluster.exporting.export import ExportOptions, export

PARTS = ExportOptions(part_bytes=16_000, row_group_bytes=3_000)


def contents_of(folder):
    """Return the bytes of all files in a folder by their relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("ray_cluster")
def test_workers_write_the_same_bytes(archive, tmp_path):
    export(archive.path, tmp_path / "here", PARTS)
    result = export(archive.path, tmp_path / "there", dataclasses.replace(PARTS, workers=(2, 4)))
    assert (result.contents.rows, result.format_name) == (300, "stac")
    assert contents_of(tmp_path / "there") == contents_of(tmp_path / "here")
    assert len(contents_of(tmp_path / "here")) > 5


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_folder_of_geoparquet_with_a_filter_or_without_rows(archive, tmp_path):
    options = dataclasses.replace(PARTS, format_name="parquet", workers=(1, 2), filter="label = 'kind 2'")
    result = export(archive.path, tmp_path / "a.parquet", options)
    assert result.contents.rows == 100
    assert sorted(contents_of(tmp_path / "a.parquet"))[0] == "part-00000.parquet"
    empty = make_archive(tmp_path / "nothing", 0)
    for name, path in (("none", archive.path), ("empty", empty.path)):
        options = dataclasses.replace(PARTS, workers=(1, 1), filter="label = 'none'")
        result = export(path, tmp_path / name, options)
        assert (result.contents.rows, result.files) == (0, 1)
        assert set(contents_of(tmp_path / name)) == {
            "collection.json",
            "data/part-00000.parquet",
            "items/part-00000.json",
        }


@pytest.mark.slow
def test_a_cluster_is_started_for_the_command(archive, tmp_path):
    # Ray reads how its processes identify themselves when it is imported, so not before that is set up.
    command = "from orbithash.cluster.cli.main import main; main()"
    out = tmp_path / "out"
    ended = subprocess.run(
        [sys.executable, "-c", command, "export", archive.path, str(out), "--workers", "1:2"],
        capture_output=True,
        text=True,
        env=user_environment(),
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "wrote 300 rows" in ended.stdout
    assert "Warning" not in ended.stderr
    assert (out / "data" / "part-00000.parquet").is_file()
