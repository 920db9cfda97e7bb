"""`bench loading` compares views from a folder and from packed rows; their equality is a part of it."""

import json

import pytest

from orbithash.cluster.bench.training.loading import bench_loading
from orbithash.encoders.errors import InputError


def test_bench_loading(cli, tmp_path):
    ended = cli("bench", "loading", "--count", 90, "--rounds", 1, "--json", "--report", tmp_path / "page.html")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    assert (result["bench"], result["images"], result["rounds"]) == ("loading", 64, 1)
    speeds = {name: value for name, value in result.items() if name.endswith("_per_s")}
    assert len(speeds) == 4
    assert min(speeds.values()) > 0
    ratio = speeds["packed_images_per_s"] / speeds["folder_images_per_s"]
    assert result["packed_to_folder"] == pytest.approx(ratio)
    assert "loading" in (tmp_path / "page.html").read_text()


def test_invalid_settings_of_bench_loading():
    for given, name in (((89, 1), "--count"), ((90, 0), "--rounds")):
        with pytest.raises(InputError, match=name):
            bench_loading(*given)
