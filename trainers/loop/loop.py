"""The one training loop: any method, in one process or in every rank of a DDP group.

With `accumulate`, a step's batch goes through the network in pieces, each shared by the ranks, and the optimizer steps
with the mean of their gradients. A loss that is a mean over images is the same as without. One that compares the images
of a batch compares those of a piece, and batch norm normalises by a piece. What a method does around a step (a second
player, a memory, a momentum encoder) it does once, with the whole batch.

With `precision=bfloat16`, the backbone runs in bfloat16 where torch's autocast finds that safe. All else stays float32:
weights, optimizer, hashes, losses, and every pass that makes codes. It was tried on CPUs only.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.networks.card import ModelCard, TextSpec
from orbithash.encoders.networks.hash_network import HashNetwork
from orbithash.encoders.networks.model import HashModel
from orbithash.trainers.config import TrainConfig
from orbithash.trainers.data.loading import (
    Augmentation,
    Images,
    Part,
    StreamedImages,
    fits_in_memory,
    load_images,
    views_of_steps,
)
from orbithash.trainers.data.memory_use import memory_mb, peak_memory_mb, reset_peak_memory
from orbithash.trainers.datasets import Image
from orbithash.trainers.distributed import broadcast_state, rank, sum_over_ranks, synchronise_batch_norm, world_size
from orbithash.trainers.loop.checkpoint import load_checkpoint, save_checkpoint
from orbithash.trainers.loop.run import Run, check_batch, check_labels
from orbithash.trainers.loop.tables import load_tables
from orbithash.trainers.methods import Batch, Method

__all__ = [
    "Observer",
    "best_epoch",
    "export_models",
    "is_checkpointed",
    "is_validated",
    "load_training_part",
    "train",
    "validate",
]

# Training images are kept this much larger than the network's input, so that a crop of them needs little upsampling.
STORED_MARGIN = 1.2


class Observer(Protocol):
    """Who is told how training goes. Every rank has one, and calls it at the same moments."""

    def on_step(self, epoch: int, step: int, num_steps: int, images_per_s: float) -> None:
        """After each step; epoch and step count from 1, the rate is over all ranks."""

    def on_epoch(self, history: list[dict[str, Any]], write_checkpoint: Callable[[Path], None]) -> None:
        """After each epoch: a record of every epoch so far, and what writes the run's whole state into a folder."""


def train(
    run: Run,
    observer: Observer,
    resume_from: Path | None = None,
    device: str = "cpu",
    loading: str = "auto",
    validates: bool = True,
) -> None:
    """Trains `run` to its last epoch, from a checkpoint folder where one is given.

    `loading` is one of `LOADINGS`: images are kept in memory, decoded as they are needed, or either, whichever fits.
    The result is the same. Without `validates`, somebody else calls `validate` with the checkpoints of epochs that
    `is_validated` names.
    """
    config = run.config
    check_batch(run, world_size())
    check_labels(run)
    method = run.build()
    synchronise_batch_norm(method)
    method = method.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.precision == "bfloat16":
        _train_in_bfloat16(method)
    training = load_training_part(run, method, device, loading)
    if validates:
        reference, validation = _validation_parts(run, method, training.features, device, loading)
    optimizer = method.build_optimizer()
    base_rates = [group["lr"] for group in optimizer.param_groups]
    history: list[dict[str, Any]] = []
    if resume_from is not None:
        state = load_checkpoint(resume_from)
        method.load_state_dict(state["method"])
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]
    else:
        if rank() == 0:
            method.begin(training)
        broadcast_state(method)

    def write_checkpoint(folder: Path) -> None:
        save_checkpoint(folder, method=method.state_dict(), optimizer=optimizer.state_dict(), history=history)

    encoder = _encoder(run, method, device)
    for epoch in range(len(history), config.epochs):
        # Whatever draws from torch's own generator draws the same after an interruption.
        torch.manual_seed(_seed(config.seed, epoch, rank()))
        factor = method.start_epoch(epoch, training)
        for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * factor
        parallel = _wrap(method)
        method.train()
        record = _train_epoch(run, method, parallel, optimizer, encoder, training, epoch, observer)
        method.end_epoch()
        method.eval()
        if validates and is_validated(run, epoch + 1):
            record |= _validated(method, encoder, reference, validation)
        history.append(record | {"score": _score(run, method, record)})
        observer.on_epoch(history, write_checkpoint)


def is_validated(run: Run, epoch: int) -> bool:
    """Whether an epoch, counted from 1, is one that the validation part is asked about."""
    due = epoch % run.config.validate_every == 0 or epoch == run.config.epochs
    return due and bool(run.manifest.part("validation"))


def is_checkpointed(run: Run, epoch: int) -> bool:
    """Return whether an epoch, counted from 1, ends with a checkpoint."""
    return epoch % run.config.checkpoint_every == 0 or epoch == run.config.epochs or is_validated(run, epoch)


def validate(run: Run, checkpoint: Path, device: str = "cpu", loading: str = "auto") -> dict[str, Any]:
    """What `train` would have noted after the epoch of a checkpoint, with one rank: its number, metrics and score."""
    method = run.build().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    # First: features are of the networks that training began with.
    features = load_tables(run.root, run.manifest.part("train"), method, run.preprocessing(), device)
    parts = _validation_parts(run, method, features, device, loading)
    state = load_checkpoint(checkpoint)
    method.load_state_dict(state["method"])
    method.eval()
    found = _validated(method, _encoder(run, method, device), *parts)
    record = state["history"][-1]
    return {"epoch": record["epoch"], **found, "score": _score(run, method, record | found)}


def best_epoch(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of the epoch that becomes the model: the last of those with the best score, as Ray Train keeps it."""
    return max(history, key=lambda record: (float(record["score"]), int(record["epoch"])))


def export_models(
    run: Run, checkpoint: Path, metrics: dict[str, Any] | None = None
) -> tuple[HashModel, list[HashModel]]:
    """The model of a checkpoint and those of its nested lengths; without `metrics`, with those it was written with."""
    state = load_checkpoint(checkpoint)
    # The checkpoint has all weights; those that training began with may be gone by now.
    unweighted = dataclasses.replace(run, config=run.config.model_copy(update={"weights": None}))
    method = unweighted.build()
    method.load_state_dict(state["method"])
    card = make_card(run, method, state["history"][-1] if metrics is None else metrics)
    model = HashModel(card, method.network, text_head=method.text_head, text_encoder=method.text_encoder())
    return model, [model.shortened(bits) for bits in method.nested_bits]


def make_card(run: Run, method: Method, metrics: dict[str, Any]) -> ModelCard:
    """What the model folder says of a network of this run."""
    label_code, label_weight = method.label_code
    head, text_encoder = method.network.spec.head, method.text_encoder()
    text = None
    if method.text_head is not None:
        assert text_encoder is not None, "a text head reads a text encoder's features"
        text = TextSpec(text_encoder.sha256, text_encoder.num_features, method.text_head.spec)
    return ModelCard(
        method=run.method,
        network=method.network.spec,
        thresholds=(head.threshold,) * head.bits,
        label_code=label_code,
        label_weight=label_weight,
        preprocessing=run.preprocessing(),
        classes=run.manifest.classes,
        dataset={
            "name": run.manifest.dataset,
            "protocol": run.manifest.protocol,
            "seed": run.manifest.seed,
            "manifest_sha256": run.manifest.sha256,
        },
        metrics=metrics,
        text=text,
    )


def load_training_part(run: Run, method: Method, device: str = "cpu", loading: str = "auto") -> Part:
    """The training part as the method's batches are drawn from it; `loading` as in `train`."""
    preprocessing = run.preprocessing()
    stored = round(preprocessing.crop * STORED_MARGIN)
    larger = dataclasses.replace(preprocessing, resize=stored, crop=stored)
    images, labels = run.manifest.part("train"), run.labels()["train"]
    return Part(
        images=_images(run, images, larger, loading) if method.trains_on_images else None,
        labels=labels,
        ids=[image.id for image in images],
        features=load_tables(run.root, images, method, preprocessing, device),
    )


def _images(run: Run, images: list[Image], preprocessing: Preprocessing, loading: str) -> Images:
    fits = loading == "memory" or (loading == "auto" and fits_in_memory(len(images), preprocessing))
    return (load_images if fits else StreamedImages)(run.root, images, preprocessing)


def _validation_parts(
    run: Run, method: Method, features: dict[str, npt.NDArray[np.float32]], device: str, loading: str
) -> tuple[Part, Part]:
    """This rank's shares of the training part, whose features are given, and of the validation part, as encoded."""
    preprocessing = run.preprocessing()
    labels = run.labels()

    def share(split: str, features: dict[str, npt.NDArray[np.float32]]) -> Part:
        mine = slice(rank(), None, world_size())
        images = run.manifest.part(split)[mine]
        return Part(
            images=_images(run, images, preprocessing, loading) if method.trains_on_images else None,
            labels=labels[split][mine],
            ids=[image.id for image in images],
            features={name: table[mine] for name, table in features.items()},
        )

    held_back = run.manifest.part("validation")
    if not held_back:
        nothing = Part(None, np.empty(0, np.int64), [])
        return nothing, nothing
    tables = load_tables(run.root, held_back, method, preprocessing, device, training=False)
    return share("train", features), share("validation", tables)


def _encoder(run: Run, method: Method, device: str) -> HashModel:
    """The networks that are being trained, as an archive would be encoded by them."""
    return HashModel(make_card(run, method, {}), method.network, device=device, text_head=method.text_head)


def _validated(method: Method, encoder: HashModel, reference: Part, validation: Part) -> dict[str, float]:
    metrics = method.validate(encoder, reference, validation)
    return {f"validation/{name}": value for name, value in metrics.items()}


def _seed(seed: int, *more: int) -> int:
    """One seed of several numbers."""
    return int(np.random.SeedSequence([seed, *more]).generate_state(1, np.uint32)[0])


def _score(run: Run, method: Method, record: dict[str, Any]) -> float:
    """What the best epoch has most of: the metric that chooses, or the epoch's number where none does."""
    if method.selection_metric is None or not run.manifest.part("validation"):
        return float(record["epoch"])
    # Metrics are at least 0, and the last epoch is always validated: one that was not is never the best.
    return float(record.get(f"validation/{method.selection_metric}", -1))


def _wrap(method: Method) -> nn.Module:
    """DDP around what trains in this epoch; it is made anew each time because the warm-up changes what that is."""
    if world_size() == 1:
        return method
    device = next(method.parameters()).device
    # Buffers are written alike on every rank, from the whole batch: they need no syncing in every step.
    return DistributedDataParallel(
        method,
        device_ids=[device] if device.type == "cuda" else None,
        forward_sync_buffers=False,
        # Gradients are reduced where they are, not copied to and fro.
        gradient_as_bucket_view=True,
    )


def _train_epoch(
    run: Run,
    method: Method,
    parallel: nn.Module,
    optimizer: torch.optim.Optimizer,
    encoder: HashModel,
    training: Part,
    epoch: int,
    observer: Observer,
) -> dict[str, Any]:
    steps = method.order(training.labels, epoch)
    num_steps, batch_size = steps.shape
    sums: dict[str, float] = {}
    reset_peak_memory(encoder.device)
    memory = memory_mb(encoder.device)
    start = time.perf_counter()
    waited = 0.0
    stream = _batches(run.config, steps, encoder, training, epoch)
    for step in range(1, num_steps + 1):
        asked = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - asked
        losses = _step(run.config, method, parallel, optimizer, batch)
        if not math.isfinite(losses["loss"]):
            raise InputError(
                f"the loss is {losses['loss']} in epoch {epoch + 1}, step {step}; a smaller lr or scale may help"
            )
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value
        observer.on_step(epoch + 1, step, num_steps, step * batch_size / (time.perf_counter() - start))
    seconds = time.perf_counter() - start
    # Where the network is: NCCL knows no tensors of the CPU.
    totals = torch.tensor(list(sums.values()), dtype=torch.float64, device=encoder.device)
    means = sum_over_ranks(totals) / num_steps / world_size()
    return {
        "epoch": epoch + 1,
        "lr": optimizer.param_groups[0]["lr"],
        **{f"train/{name}": float(mean) for name, mean in zip(sums, means, strict=True)},
        "images_per_s": num_steps * batch_size / seconds,
        "step_s": seconds / num_steps,
        "seconds": seconds,
        "waited_for_data_s": waited,
        "memory_mb": memory,
        "peak_memory_mb": peak_memory_mb(encoder.device),
    }


def _batches(
    config: TrainConfig, steps: npt.NDArray[np.int64], encoder: HashModel, training: Part, epoch: int
) -> Iterator[Batch]:
    """This rank's share of each step: of each of its consecutive pieces, the r-th part."""
    shares = steps.reshape(len(steps), config.accumulate, world_size(), -1)
    mine = shares[:, :, rank()].reshape(len(steps), -1)
    views: Iterator[npt.NDArray[np.uint8] | None] = iter([None] * len(mine))
    if training.images is not None:
        augmentation = Augmentation(config.min_crop_area, config.colour_jitter, config.grayscale)
        views = views_of_steps(training.images, mine, config.image_size, augmentation, config.seed, epoch)
    for step, (rows, images) in enumerate(zip(mine, views, strict=True)):

        def on_device(values: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(values).to(encoder.device)

        yield Batch(
            rows=on_device(rows),
            labels=on_device(training.labels[rows]),
            images=None if images is None else encoder.normalise(images),
            features={name: on_device(table[rows]) for name, table in training.features.items()},
            seed=_seed(config.seed, epoch, step, 1),
        )


def _pieces(batch: Batch, count: int) -> Iterator[Batch]:
    """A batch cut into consecutive pieces of equal size; each but the first has a seed of its own."""
    size = len(batch.rows) // count
    for number in range(count):
        mine = slice(number * size, (number + 1) * size)
        yield Batch(
            rows=batch.rows[mine],
            labels=batch.labels[mine],
            images=None if batch.images is None else batch.images[mine],
            features={name: table[mine] for name, table in batch.features.items()},
            seed=_seed(batch.seed, number) if number else batch.seed,
        )


def _step(
    config: TrainConfig, method: Method, parallel: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch
) -> dict[str, float]:
    losses = method.before_step(batch, optimizer)
    optimizer.zero_grad(set_to_none=True)
    for number, piece in enumerate(_pieces(batch, config.accumulate), start=1):
        is_last = number == config.accumulate
        # Ranks exchange gradients once, when those of all pieces are summed.
        with nullcontext() if is_last or parallel is method else parallel.no_sync():  # type: ignore[operator]
            of_piece = {name: value / config.accumulate for name, value in parallel(piece).items()}
            of_piece["loss"].backward()
        for name, value in of_piece.items():
            losses[name] = losses[name] + value.detach() if name in losses else value.detach()
    if config.clip_value is not None:
        torch.nn.utils.clip_grad_value_(parallel.parameters(), config.clip_value)
    if config.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(parallel.parameters(), config.clip_norm)
    optimizer.step()
    method.after_step(batch)
    return {name: float(value.detach()) for name, value in losses.items()}


def _train_in_bfloat16(method: Method) -> None:
    """Makes every backbone compute in bfloat16 while it trains; what it returns is float32 as ever."""

    def wrap(backbone: nn.Module) -> None:
        forward = backbone.forward

        def cast(images: Tensor) -> Tensor:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=backbone.training):
                maps: Tensor = forward(images)
            return maps.float()

        # On the object, not around it: the names of the weights stay as they are.
        backbone.forward = cast

    for module in method.modules():
        if isinstance(module, HashNetwork):
            wrap(module.backbone)
