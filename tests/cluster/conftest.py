"""Fixtures for the tests of the command line: scenes, models with random weights, an archive, processes."""

import re
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
from cluster_parts import BITS, family, kill, save_random_model, user_environment, write_image
from PIL import Image

from orbithash.cluster.cli import main as command_line
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.sources.records import read_record
from orbithash.encoders.sources.sources import list_source
from orbithash.trainers.scenes import write_scenes

NUM_SCENES = 40

# Three nodes, the first with the control service; a line on stdin kills the last remaining one.
NODES = """
import os, sys
os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False,
                  "object_store_memory": 200 * 2**20})
nodes = [cluster.add_node(num_cpus=2, object_store_memory=200 * 2**20) for _ in range(2)]
cluster.wait_for_nodes()
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(nodes.pop(), allow_graceful=False)
    print("killed", flush=True)
"""


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run `orbithash ARGS…` in this process."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["orbithash", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        out, err = capsys.readouterr()
        return Ended(ended.value.code or 0, out, err)

    return call


@pytest.fixture
def refused(cli, tmp_path):
    """Assert that a command is refused: one line with all words, and no change on disk."""

    def check(*args, words, lines=1, prints_help=False):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        ended = cli(*args)
        assert ended.code == 2, ended.err
        message = ended.err[ended.err.index("error: ") :].splitlines()
        assert len(message) == lines, ended.err
        for word in words:
            assert str(word) in "\n".join(message), f"{word!r} is not in {message}"
        # No traceback, no colours, no name of an exception.
        assert not re.search(r"Traceback|\x1b|Error:", ended.err), ended.err
        assert prints_help or ended.out == ""
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    return check


@pytest.fixture
def start(tmp_path):
    """Start `orbithash ARGS…` as a process; it and all its descendants are killed when the test ends.

    `before` is Python code that runs first. The process has the paths of its output, `out` and `err`.
    """
    env = user_environment()
    started = []

    def call(*args, before=""):
        program = f"{before}\nfrom orbithash.cluster.cli.main import main\nmain()"
        out, err = tmp_path / f"stdout{len(started)}", tmp_path / f"stderr{len(started)}"
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-c", program, *map(str, args)],
                stdout=stdout,
                stderr=stderr,
                env=env,
                start_new_session=True,
            )
        process.out, process.err = out, err
        started.append(process)
        return process

    yield call
    for process in started:
        # By descent: Ray's processes have process groups of their own.
        kill(process, *family(process.pid))


@pytest.fixture
def nodes():
    """A process that runs a cluster of three nodes; has its `address`. See `joining` and `kill_a_node`."""
    process = subprocess.Popen(
        [sys.executable, "-c", NODES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=user_environment(),
        text=True,
    )
    try:
        process.address = process.stdout.readline().strip()
        assert process.address, "the cluster did not start"
        yield process
    finally:
        kill(process, *family(process.pid))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder of small generated scenes."""
    folder = tmp_path_factory.mktemp("source") / "scenes"
    write_scenes(folder, NUM_SCENES, 0, 64)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("models") / "model", seed=0)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="session")
def archive(scenes, model, tmp_path_factory):
    """An archive with the codes of all scenes; tests must not change it."""
    folder = tmp_path_factory.mktemp("archives") / "archive"
    loaded = HashModel.load(model)
    items = list_source(scenes)
    records = [read_record(item, loaded.preprocessing) for item in items]
    columns = {name: [getattr(r, name) for r in records] for name in ("uri", "datetime", "lon", "lat", "thumbnail")}
    table = Archive.table(
        loaded.encode_prepared(np.stack([record.pixels for record in records])),
        BITS,
        key=[item.key for item in items],
        label=[item.label for item in items],
        **columns,
    )
    made = Archive.create(folder, BITS, loaded.model_id)
    made.commit(Archive.write_fragments(folder, table))
    return folder


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """Thirty images of three classes that differ in colour."""
    folder = tmp_path_factory.mktemp("labelled") / "data"
    rng = np.random.default_rng(0)
    for name, colour in (("beach", (200, 180, 90)), ("forest", (30, 90, 40)), ("river", (40, 60, 160))):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            write_image(folder / name / f"{name}{i}.png", rng, colour)
    return folder


@pytest.fixture(scope="session")
def bad_images(tmp_path_factory):
    """Two good images and one image of each refused kind; `REASONS` has the reasons."""
    import struct
    import zlib

    folder = tmp_path_factory.mktemp("bad") / "images"
    folder.mkdir()
    rng = np.random.default_rng(1)
    good = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    good.save(folder / "good.jpg")
    Image.fromarray(rng.integers(0, 65535, (64, 64), dtype=np.uint16)).save(folder / "sixteen_bit.png")
    (folder / "text.jpg").write_text("this is no image\n" * 50)
    whole = (folder / "good.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.tif").touch()
    Image.new("RGB", (1, 1)).save(folder / "tiny.png")
    good.convert("CMYK").save(folder / "cmyk.jpg")

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    # 2.7 GB of black in a file of 2.6 MB.
    squeeze, row = zlib.compressobj(9), bytes(1 + 3 * 30_000)
    pixels = b"".join(squeeze.compress(row) for _ in range(30_000)) + squeeze.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    (folder / "bomb.png").write_bytes(data)
    return folder
