"""The one training loop: any method, in one process or in every rank of a DDP group."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from orbithash.encoders.card import ModelCard
from orbithash.encoders.errors import InputError
from orbithash.encoders.images import Rendering
from orbithash.encoders.model import HashModel
from orbithash.encoders.preprocessing import Preprocessing
from orbithash.trainers.checkpoint import load_checkpoint, save_checkpoint
from orbithash.trainers.config import TrainConfig
from orbithash.trainers.datasets import Manifest
from orbithash.trainers.distributed import gather_rows, rank, sum_over_ranks, world_size
from orbithash.trainers.loading import Batch, Part, batches, load_part
from orbithash.trainers.methods import Method, get_method
from orbithash.trainers.metrics import mean_average_precision

__all__ = ["SELECTION_METRIC", "Observer", "Run", "export_model", "train"]

# On the validation part, searched in the training part: what chooses the epoch whose weights become the model.
SELECTION_METRIC = "ap_min@20"

# DHCL's value clipping, harmless to the rest: no gradient element beyond it.
CLIP_VALUE = 10.0

# Training images are kept this much larger than the network's input, so that a crop of them needs little upsampling.
STORED_MARGIN = 1.2


@dataclasses.dataclass(frozen=True)
class Run:
    """What is trained on what. `root` is the data folder that the manifest's paths are relative to."""

    method: str
    config: TrainConfig
    manifest: Manifest
    root: Path

    def preprocessing(self) -> Preprocessing:
        """What an image goes through before the network, in validation and ever after."""
        side = self.config.image_size
        return Preprocessing(Rendering(), resize=side, crop=side)

    def build(self) -> Method:
        """The method with its initial weights, the same on every rank."""
        torch.manual_seed(self.config.seed)
        return get_method(self.method)(self.config, len(self.manifest.classes))


class Observer(Protocol):
    """Who is told how training goes. Every rank has one, and calls it at the same moments."""

    def on_step(self, epoch: int, step: int, num_steps: int, images_per_s: float) -> None:
        """After each step; epoch and step count from 1, the rate is over all ranks."""

    def on_epoch(self, history: list[dict[str, Any]], write_checkpoint: Callable[[Path], None]) -> None:
        """After each epoch: a record of every epoch so far, and what writes the run's whole state into a folder."""


def train(run: Run, observer: Observer, resume_from: Path | None = None, device: str = "cpu") -> None:
    """Trains `run` to its last epoch, from a checkpoint folder where one is given."""
    config = run.config
    _check_batch(config.batch_size, len(run.manifest.part("train")))
    training, reference, validation = _load(run)
    method = run.build().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = method.build_optimizer()
    base_rates = [group["lr"] for group in optimizer.param_groups]
    history: list[dict[str, Any]] = []
    if resume_from is not None:
        state = load_checkpoint(resume_from)
        method.load_state_dict(state["method"])
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]

    def write_checkpoint(folder: Path) -> None:
        save_checkpoint(folder, method=method.state_dict(), optimizer=optimizer.state_dict(), history=history)

    encoder = HashModel(make_card(run, method, {}), method.network, device=device)
    for epoch in range(len(history), config.epochs):
        factor = method.start_epoch(epoch)
        for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * factor
        parallel = _wrap(method)
        method.train()
        record = _train_epoch(run, parallel, optimizer, encoder, training, epoch, observer)
        method.eval()
        if (epoch + 1) % config.validate_every == 0 or epoch + 1 == config.epochs:
            record[f"validation/{SELECTION_METRIC}"] = _validate(encoder, reference, validation)
        history.append(record)
        observer.on_epoch(history, write_checkpoint)


def best_epoch(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of the epoch with the best validation metric, the first of equals."""
    return max(history, key=lambda record: float(record.get(f"validation/{SELECTION_METRIC}", -1.0)))


def export_model(run: Run, checkpoint: Path) -> HashModel:
    """The model of a checkpoint, with the validation metric of its epoch."""
    state = load_checkpoint(checkpoint)
    # The checkpoint has all weights; those that training began with may be gone by now.
    unweighted = dataclasses.replace(run, config=run.config.model_copy(update={"weights": None}))
    method = unweighted.build()
    method.load_state_dict(state["method"])
    return HashModel(make_card(run, method, state["history"][-1]), method.network)


def make_card(run: Run, method: Method, metrics: dict[str, Any]) -> ModelCard:
    """What the model folder says of a network of this run."""
    label_code, label_weight = method.label_code
    return ModelCard(
        method=run.method,
        network=method.network.spec,
        thresholds=(0.0,) * method.network.spec.bits,
        label_code=label_code,
        label_weight=label_weight,
        preprocessing=run.preprocessing(),
        classes=run.manifest.classes,
        dataset={
            "name": run.manifest.dataset,
            "protocol": run.manifest.protocol,
            "manifest_sha256": run.manifest.sha256,
        },
        metrics=metrics,
    )


def _check_batch(batch_size: int, num_images: int) -> None:
    if batch_size % world_size() or batch_size < 2 * world_size():
        raise InputError(
            f"batch_size {batch_size} over {world_size()} workers; it must be a multiple of the number of workers and "
            "leave each at least 2 images"
        )
    if num_images < batch_size:
        raise InputError(f"batch_size {batch_size} is more than the {num_images} training images; make it smaller")


def _load(run: Run) -> tuple[Part, Part, Part]:
    """The training part as it is augmented, and it and the validation part as they are encoded."""
    preprocessing = run.preprocessing()
    stored = round(preprocessing.crop * STORED_MARGIN)
    larger = dataclasses.replace(preprocessing, resize=stored, crop=stored)
    images, held_back = run.manifest.part("train"), run.manifest.part("validation")
    return (
        load_part(run.root, images, larger),
        # Each rank encodes its share, see `_validate`.
        load_part(run.root, images[rank() :: world_size()], preprocessing),
        load_part(run.root, held_back[rank() :: world_size()], preprocessing),
    )


def _wrap(method: Method) -> nn.Module:
    """DDP around what trains in this epoch; it is made anew each time because the warm-up changes what that is."""
    if world_size() == 1:
        return method
    device = next(method.parameters()).device
    # Frozen statistics are the only buffers: equal everywhere from the start, they need no syncing in every step.
    return DistributedDataParallel(
        method, device_ids=[device] if device.type == "cuda" else None, forward_sync_buffers=False
    )


def _train_epoch(
    run: Run,
    parallel: nn.Module,
    optimizer: torch.optim.Optimizer,
    encoder: HashModel,
    training: Part,
    epoch: int,
    observer: Observer,
) -> dict[str, Any]:
    config = run.config
    num_steps = len(training.ids) // config.batch_size
    sums: dict[str, float] = {}
    start = time.perf_counter()
    waited = 0.0
    stream = batches(training, config.image_size, config.batch_size, config.seed, epoch, rank(), world_size())
    for step in range(1, num_steps + 1):
        asked = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - asked
        losses = _step(parallel, optimizer, encoder, batch)
        if not math.isfinite(losses["loss"]):
            raise InputError(
                f"the loss is {losses['loss']} in epoch {epoch + 1}, step {step}; a smaller lr or scale may help"
            )
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value
        observer.on_step(epoch + 1, step, num_steps, step * config.batch_size / (time.perf_counter() - start))
    seconds = time.perf_counter() - start
    # Where the network is: NCCL knows no tensors of the CPU.
    totals = torch.tensor(list(sums.values()), dtype=torch.float64, device=encoder.device)
    means = sum_over_ranks(totals) / num_steps / world_size()
    return {
        "epoch": epoch + 1,
        "lr": optimizer.param_groups[0]["lr"],
        **{f"train/{name}": float(mean) for name, mean in zip(sums, means, strict=True)},
        "images_per_s": num_steps * config.batch_size / seconds,
        "step_s": seconds / num_steps,
        "seconds": seconds,
        "waited_for_data_s": waited,
    }


def _step(parallel: nn.Module, optimizer: torch.optim.Optimizer, encoder: HashModel, batch: Batch) -> dict[str, float]:
    losses = parallel(encoder.normalise(batch.images), torch.from_numpy(batch.labels).to(encoder.device))
    optimizer.zero_grad(set_to_none=True)
    losses["loss"].backward()
    torch.nn.utils.clip_grad_value_(parallel.parameters(), CLIP_VALUE)
    optimizer.step()
    return {name: float(value.detach()) for name, value in losses.items()}


def _validate(encoder: HashModel, reference: Part, validation: Part) -> float:
    """Expected `ap_min@20` of validation queries in the training part, encoded by shares and scored by every rank."""
    labels, codes = [], []
    for part in (validation, reference):
        codes.append(gather_rows(encoder.encode_prepared(part.images)))
        labels.append(gather_rows(part.labels[:, None].view(np.uint8)).view(np.int64)[:, 0])
    return mean_average_precision(codes[0], codes[1], labels[0], labels[1], encoder.bits, k=20)
