"""`orbithash pack`: its output, and what it and `train` refuse in one line."""

import numpy as np
import pytest
from cluster_parts import write_image


@pytest.fixture
def images(tmp_path):
    for name in ("beach", "river"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            write_image(tmp_path / "images" / name / f"{i}.png", np.random.default_rng(i), (100, 90, 80))
    return tmp_path / "images"


def test_pack_says_what_it_wrote(cli, images, tmp_path):
    ended = cli("pack", images, "--out", tmp_path / "x.lance")
    assert ended.code == 0, ended.err
    size = sum(path.stat().st_size for path in images.rglob("*.png")) / 2**20
    expected = f"packed 12 images of folder: 12 files, {size:.1f} MiB; train with --data {tmp_path / 'x.lance'}\n"
    assert ended.out == expected


def test_what_is_refused(refused, images, tmp_path):
    refused("pack", images, "--out", tmp_path / "x", words=["ends in .lance"])
    refused("pack", tmp_path / "none", "--out", tmp_path / "x.lance", words=["does not exist"])
    (tmp_path / "half.lance" / "data").mkdir(parents=True)
    run = ("--out", tmp_path / "run")
    refused(
        "train", "itq", "--data", tmp_path / "half.lance", *run, words=["that was not finished", "`orbithash pack`"]
    )
    refused("train", "itq", "--data", tmp_path / "none.lance", *run, words=["is absent"])
    refused("train", "itq", "--data", "https://host/images", *run, words=["only s3:// and gs:// are read"])
    refused("features", "s3://bucket/images?secret_key=abc", words=["with a secret"])
    refused("tune", "mhcln", "--data", tmp_path / "half.lance", words=["that was not finished"])
    refused("reproduce", "mhcln", "--data", tmp_path / "half.lance", words=["that was not finished"])
