"""Helpers of the tests of the command line: processes, models, images, nodes, TensorBoard files."""

import contextlib
import os
import signal
import struct
import time
from pathlib import Path

import numpy as np
from PIL import Image

from orbithash.encoders.imagery.images import Rendering
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.networks.backbones.build import build_backbone
from orbithash.encoders.networks.card import HeadSpec, ModelCard
from orbithash.encoders.networks.hash_network import HashNetwork
from orbithash.encoders.networks.model import HashModel

BITS = 32

# Settings of a training that takes seconds.
TINY = ("--set", "backbone=mobilenet_v3_small", "--set", "image_size=32", "--set", "batch_size=4", "--set", "epochs=1")

# Reason for each refused image of the fixture `bad_images`, by name.
REASONS = {
    "text.jpg": "not a JPEG, PNG",
    "truncated.jpg": "truncated JPEG",
    "empty.tif": "the file is empty",
    "tiny.png": "1 x 1 pixels; at least 16 x 16",
    "cmyk.jpg": "CMYK colours; convert it to RGB",
    "bomb.png": "30000 x 30000 pixels; at most 50,000,000",
}


def family(root):
    """Return the descendants of the process `root`, by the parents in /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    members = {root}
    while grown := {pid for pid, parent in parents.items() if parent in members} - members:
        members |= grown
    return members - {root}


def kill(process, *others):
    """Send SIGKILL to the process and the others; collect the exit code of the process."""
    for pid in (process.pid, *others) if process.poll() is None else others:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def wait_for(condition, process=None, timeout_s=300.0):
    """Return the first true value of `condition()`; fail if the process ends before, or after the time-out."""
    deadline = time.monotonic() + timeout_s
    log = getattr(process, "err", Path(os.devnull))
    while not (value := condition()):
        if process is not None:
            assert process.poll() is None, f"it ended with {process.returncode}: {log.read_text()}"
        assert time.monotonic() < deadline, f"not within {timeout_s} s; its stderr: {log.read_text()}"
        time.sleep(0.02)
    return value


def save_random_model(folder, seed):
    """Write a model folder with random weights, whose codes of different scenes differ; return its path."""
    import torch

    torch.manual_seed(seed)
    network = HashNetwork(build_backbone("resnet18"), HeadSpec(BITS))
    card = ModelCard(
        method="dhcl",
        network=network.spec,
        thresholds=(0.0,) * BITS,
        label_code="none",
        label_weight=0,
        preprocessing=Preprocessing(Rendering(), resize=32, crop=32),
        classes=("one", "two"),
        dataset={},
        metrics={},
    )
    HashModel(card, network).save(folder)
    return folder


def save_vector_model(folder, dims=16, seed=0, name="dino", vector_dims=8):
    """Write a model folder that takes vectors, with random weights and a projection; return its path."""
    import torch

    from orbithash.encoders.networks.backbones.embedding import EmbeddingInput
    from orbithash.encoders.networks.card import BackboneSpec
    from orbithash.encoders.networks.projection import Projection

    torch.manual_seed(seed)
    backbone = EmbeddingInput(BackboneSpec("embedding", name, {}, "none", "none", 3, dims))
    network = HashNetwork(backbone, HeadSpec(BITS, norm="unit", activation="none"))
    projection = Projection.fit(torch.randn(64, dims), vector_dims)
    card = ModelCard(
        method="itq",
        network=network.spec,
        thresholds=(0.0,) * BITS,
        label_code="none",
        label_weight=0,
        preprocessing=Preprocessing(Rendering(), resize=32, crop=32),
        classes=(),
        dataset={},
        metrics={},
        projection=projection.spec,
    )
    HashModel(card, network, projection=projection).save(folder)
    return folder


def write_image(path, rng, colour=(128, 128, 128), side=40):
    noise = rng.integers(-30, 30, (side, side, 3)) + colour
    Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8)).save(path)


def user_environment():
    """Return the environment without the variables for Ray that tests, and commands in their process, have set."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def kill_a_node(nodes):
    """Kill one node of the fixture `nodes`."""
    nodes.stdin.write("\n")
    nodes.stdin.flush()
    assert nodes.stdout.readline() == "killed\n"


def joining(nodes):
    """Return Python code that makes a process join the cluster `nodes`."""
    return f"import os; os.environ.update(RAY_ADDRESS={nodes.address!r}, RAY_AUTH_MODE='disabled')"


def scalars(folder):
    """Return the scalars of TensorBoard's event files by name: (step, value) in the order of writing."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            # A record: length, checksum of the length, data, checksum of the data.
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    found.setdefault(value.tag, []).append((event.step, value.simple_value))
                else:
                    found[value.tag] = b"".join(value.tensor.string_val).decode()
    return found
