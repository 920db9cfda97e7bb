"""The verb `wald`: written pairs and the report of skipped images."""

import numpy as np
from PIL import Image


def test_pairs_of_a_folder(cli, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("beach", "river"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "data" / "beach" / "bad.png").write_text("no image")
    ended = cli("wald", tmp_path / "data", tmp_path / "out", "--factor", 2)
    assert (ended.code, ended.out) == (0, "")
    assert "skipped: beach/bad.png: not a JPEG, PNG" in ended.err
    assert f"wrote 4 pairs to {tmp_path / 'out'}; skipped 1 images" in ended.err
    assert len(list((tmp_path / "out").rglob("*.png"))) == 8
    again = cli("wald", tmp_path / "data", tmp_path / "out")
    assert again.code == 2
    assert again.err.startswith(f"error: {tmp_path / 'out'} is not an empty folder")


def test_pairs_of_images_without_classes(cli, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "data" / f"{i}.png")
    ended = cli("wald", tmp_path / "data", tmp_path / "out", "--factor", 2)
    assert ended.code == 0
    assert f"wrote 3 pairs to {tmp_path / 'out'}; skipped 0 images" in ended.err
    assert sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")) == [
        f"{source}/{i}.png" for source in ("first", "second") for i in range(3)
    ]
