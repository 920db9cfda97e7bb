"""`bench gpu`: training and encoding on one device beside loops of torch alone and beside the decoding of images.

The loops of torch get tensors that are on the device already, so they show the limit that the network sets. Decoding
shows the limit that the CPUs set. On a CPU the same measurements run, to try the command: they say nothing about GPUs.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orbithash.cluster.bench.inputs import write_bench_scenes
from orbithash.cluster.bench.report import environment, print_table, show
from orbithash.cluster.output import say
from orbithash.encoders.codes import unpack
from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.rendering import Pixels
from orbithash.encoders.networks.card import PRECISIONS, HeadSpec, ModelCard
from orbithash.encoders.networks.devices import check_device, exact_float32, tensor_float32
from orbithash.encoders.networks.hash_network import HashNetwork
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.networks.reading import read_batches
from orbithash.encoders.sources.sources import list_source
from orbithash.trainers.config import load_config
from orbithash.trainers.loop.loop import train
from orbithash.trainers.loop.run import Run, make_run
from orbithash.trainers.methods import get_method

__all__ = ["NETWORKS", "GpuBench", "bench_gpu", "show_gpu"]

# A small and a large convolutional network, and a transformer.
NETWORKS = ("mobilenet_v2", "resnet50", "timm:vit_base_patch16_224")

_METHOD, _BITS = "dhcl", 64
_MAX_SCENES, _NUM_CLASSES = 540, 2
# The split needs 5 images of each class.
_MIN_IMAGES = 12
_TRAINING = ("float32", "tf32", "bfloat16")


@dataclass(frozen=True)
class GpuBench:
    """What to measure.

    Attributes:
        device: `cpu`, `cuda` or `cuda:N`.
        networks: names of backbones; they have random weights.
        count: number of generated images.
        batch_size: images per step of training and of the loops of torch.
        precision: precision of training, one of those of the setting `precision`.
        compared: number of images whose codes are compared with those of a CPU.
    """

    device: str = "cuda"
    networks: tuple[str, ...] = NETWORKS
    count: int = 4096
    batch_size: int = 128
    precision: str = "bfloat16"
    compared: int = 256

    def check(self) -> None:
        """Raise `InputError` for values that are not allowed, and for networks that do not exist."""
        check_device(self.device)
        if self.batch_size < 2:
            raise InputError(f"--batch-size is {self.batch_size}; at least 2 are needed")
        least = max(_MIN_IMAGES, 2 * self.batch_size)
        if self.count < least:
            raise InputError(f"--count is {self.count}; at least {least} images are needed, and two batches")
        if not 1 <= self.compared <= self.count // 2:
            raise InputError(
                f"--compared is {self.compared}; from 1 to {self.count // 2}, half the images, are allowed"
            )
        if self.precision not in _TRAINING:
            raise InputError(f"--precision is {self.precision!r}; {', '.join(_TRAINING)} are allowed")
        for network in self.networks:
            load_config(get_method(_METHOD).Config, settings=self.settings(network))

    def settings(self, network: str) -> list[str]:
        """Return the settings of training a network."""
        return [
            f"backbone={network}",
            f"batch_size={self.batch_size}",
            f"bits={_BITS}",
            f"precision={self.precision}",
            "norm=frozen-batch",
            "epochs=2",
            "warm_up_epochs=0",
            "validate_every=2",
        ]


def bench_gpu(asked: GpuBench) -> dict[str, Any]:
    """Return images per second of each network, and the share of the bits of codes that differ from a CPU's.

    Training is an epoch of DHCL after a first one, without validation; encoding starts from decoded images.
    """
    asked.check()
    device = torch.device(asked.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = _write_images(Path(temporary), asked.count)
        measured = {name: _measure(asked, name, folder, device) for name in asked.networks}
    return {
        **environment("gpu", "torch", "torchvision", "timm"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "decoding_threads": torch.get_num_threads(),
        "images": asked.count,
        "images_per_step": asked.batch_size,
        "training_precision": asked.precision,
        "networks": measured,
    }


def show_gpu(result: dict[str, Any], as_json: bool) -> None:
    """Print a result as JSON, or as lines and a table with a column for each network."""
    if as_json:
        show(result, as_json)
        return
    networks = result["networks"]
    show({name: value for name, value in result.items() if name != "networks"}, as_json)
    rows = [[key, *(f"{networks[name][key]:.4g}" for name in networks)] for key in next(iter(networks.values()))]
    print_table(["", *networks], rows, width=120)


def _write_images(root: Path, count: int) -> Path:
    """Write `count` images in folders of a few classes, copies of at most `_MAX_SCENES` scenes; return the folder."""
    scenes = write_bench_scenes(root / "scenes", min(count, _MAX_SCENES))
    drawn = [item.path for item in list_source(str(scenes))]
    for number in range(count):
        source = Path(drawn[number % len(drawn)])
        target = root / "images" / f"class{number % _NUM_CLASSES}" / f"{number}{source.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return root / "images"


def _measure(asked: GpuBench, name: str, folder: Path, device: torch.device) -> dict[str, Any]:
    say(f"{name}: training")
    run = make_run(_METHOD, folder, settings=asked.settings(name), protocol="random", validation=0.0)
    result: dict[str, Any] = {"input_px": run.config.image_size, "training_images_per_s": _training(run, device)}
    result["torch_training_images_per_s"] = _torch_training(run, asked, device)
    say(f"{name}: encoding")
    pixels, result["decoding_images_per_s"] = _decoded(run, folder)
    for precision in PRECISIONS:
        model = _model(run, precision)
        on_cpu = model.encode_prepared(pixels[: asked.compared])
        model = model.to(device)
        codes, rate = _timed(device, len(pixels), lambda model=model: model.encode_prepared(pixels))  # type: ignore[misc]
        result[f"encoding_{precision}_images_per_s"] = rate
        result[f"torch_encoding_{precision}_images_per_s"] = _torch_encoding(model, pixels, asked, precision)
        result[f"bits_unlike_cpu_{precision}"] = float(unpack(codes[: asked.compared] ^ on_cpu, _BITS).mean())
    return result


class _History:
    """An observer that keeps the history and writes nothing."""

    def on_step(self, epoch: int, step: int, num_steps: int, images_per_s: float) -> None:
        pass

    def on_epoch(self, history: list[dict[str, Any]], write_checkpoint: Callable[[Path], None]) -> None:
        self.history = history


def _training(run: Run, device: torch.device) -> float:
    """Return images per second of the second epoch; the first one warms up."""
    observer = _History()
    train(run, observer, device=device)
    return float(observer.history[-1]["images_per_s"])


def _torch_training(run: Run, asked: GpuBench, device: torch.device) -> float:
    """Return images per second of forward passes, backward passes and steps of AdamW with one batch on the device."""
    network = _network(run).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters())
    side = run.config.image_size
    images = torch.randn(asked.batch_size, 3, side, side, device=device).to(memory_format=torch.channels_last)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=asked.precision == "bfloat16"):
            hashes = network(images).hashes
        hashes.float().square().mean().backward()
        optimizer.step()

    with tensor_float32(asked.precision == "tf32"):
        return _repeated(step, asked, device)


def _torch_encoding(model: HashModel, pixels: Pixels, asked: GpuBench, precision: str) -> float:
    """Return images per second of forward passes with one batch on the device."""
    images = model.normalise(pixels[: asked.batch_size])

    def step() -> None:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            model.network(images)

    with torch.inference_mode(), exact_float32(model.device):
        return _repeated(step, asked, model.device)


def _repeated(step: Callable[[], None], asked: GpuBench, device: torch.device) -> float:
    """Return images per second of a step, which is repeated for as many images as there are."""
    num_steps = asked.count // asked.batch_size

    def steps() -> None:
        for _ in range(num_steps):
            step()

    return _timed(device, num_steps * asked.batch_size, steps)[1]


def _timed(device: torch.device, num_images: int, work: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of `work` and its images per second; a first call warms up."""
    work()
    _wait(device)
    begun = time.perf_counter()
    result = work()
    _wait(device)
    return result, num_images / (time.perf_counter() - begun)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _decoded(run: Run, folder: Path) -> tuple[Pixels, float]:
    """Return the prepared images of the training part, and images per second of decoding them."""
    paths = [folder / image.path for image in run.images("train")]
    begun = time.perf_counter()
    pixels = np.concatenate(list(read_batches(paths, run.preprocessing())))
    return pixels, len(paths) / (time.perf_counter() - begun)


def _network(run: Run) -> HashNetwork:
    network: HashNetwork = run.build().network
    return network


def _model(run: Run, precision: str) -> HashModel:
    """Return a model with random weights."""
    # Without the classifier, as an exported model without label bits.
    network = HashNetwork(_network(run).backbone, HeadSpec(_BITS))
    thresholds, preprocessing = (0.0,) * _BITS, run.preprocessing()
    card = ModelCard(_METHOD, network.spec, thresholds, "none", 1, preprocessing, (), {}, {}, precision=precision)
    return HashModel(card, network)
