"""`bench manifest` measures a rank's start and hashing, each beside its baseline."""

import json

import pytest

from orbithash.cluster.bench.training import manifest
from orbithash.cluster.bench.training.manifest import bench_manifest
from orbithash.encoders.errors import InputError


def test_bench_manifest(cli, monkeypatch):
    monkeypatch.setattr(manifest, "_ROUNDS", 1)
    ended = cli("bench", "manifest", "--count", "2000", "--files", "300", "--file-bytes", "10", "--json")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    assert (result["bench"], result["images"], result["files"], result["file_bytes"]) == ("manifest", 2000, 300, 10)
    assert min(value for name, value in result.items() if name.endswith(("_s", "ratio"))) > 0
    ratio = result["all_threads_files_per_s"] / result["one_thread_files_per_s"]
    assert result["ratio_to_one_thread"] == pytest.approx(ratio)
    assert result["ratio_of_remembered"] > 0


def test_invalid_settings_of_bench_manifest():
    for given, name in (((0, 1, 1), "--count"), ((1, 0, 1), "--files"), ((1, 1, 2**25), "--file-bytes")):
        with pytest.raises(InputError, match=f"{name} is .*; from 1 to"):
            bench_manifest(*given)
