"""The training loop: any method, in one process or in every rank of a DDP or FSDP group.

With `accumulate`, a step's batch goes through the network in micro-batches, each shared by the ranks, and the optimizer
steps with the mean of their gradients. A loss that is a mean over images is the same as without. A loss that compares
images compares those of a micro-batch, and batch norm uses the statistics of a micro-batch. A method's work around a
step (a second player, a memory, a momentum encoder) is done once, with the whole batch.

With `precision=bfloat16`, backbones train in bfloat16 where torch's autocast supports it. Weights, optimizer, hashes,
losses and all codes stay float32. With `precision=tf32`, a GPU multiplies in TensorFloat-32 in the steps of training
only; a CPU computes as in float32. Both were run on CPUs only.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from orbithash.encoders.networks.devices import check_device, tensor_float32
from orbithash.encoders.networks.model import HashModel
from orbithash.trainers.data.loading import Part
from orbithash.trainers.distributed import (
    broadcast_state,
    from_first_rank,
    gather_objects,
    meet,
    rank,
    synchronise_batch_norm,
    world_size,
)
from orbithash.trainers.loop.backbones import compile_in_training, train_in_bfloat16
from orbithash.trainers.loop.batches import mixed_seed
from orbithash.trainers.loop.checkpoint import load_checkpoint, save_checkpoint
from orbithash.trainers.loop.export import make_card
from orbithash.trainers.loop.parts import load_training_part, load_validation_parts
from orbithash.trainers.loop.run import Run, check_batch, check_labels
from orbithash.trainers.loop.sharding import gathered, is_sharded, load_shares, shard, whole_weights
from orbithash.trainers.loop.steps import fit, train_epoch, wrap
from orbithash.trainers.methods import Fitted, Method, get_method
from orbithash.trainers.methods.fine_tuning import FineTuningConfig
from orbithash.trainers.metrics.retrieval import VALIDATION_SIZES, labelled

__all__ = ["Observer", "is_checkpointed", "is_validated", "train", "validate"]


class Observer(Protocol):
    """Receives the progress of training. Every rank has one and calls it at the same moments."""

    def on_step(self, epoch: int, step: int, num_steps: int, images_per_s: float) -> None:
        """Called after each step; `epoch` and `step` count from 1, the rate is over all ranks."""

    def on_epoch(self, history: list[dict[str, Any]], write_checkpoint: Callable[[Path], None]) -> None:
        """Called after each epoch, with one record per epoch and a function that writes a checkpoint folder.

        Of a sharded run, only the first rank can write checkpoints, of epochs for which `is_checkpointed` is true.
        """


def train(
    run: Run,
    observer: Observer,
    resume_from: Path | None = None,
    device: str | torch.device = "cpu",
    loading: str = "auto",
    validates: bool = True,
) -> None:
    """Train `run` to its last epoch; a fitted method has one epoch, without steps.

    Args:
        run: method, settings and data.
        observer: receives progress and checkpoints.
        resume_from: checkpoint folder to resume from; None: a new run.
        device: `cpu`, `cuda` or `cuda:N`.
        loading: one of `LOADINGS`: images are kept in memory, decoded when needed (stream), or in memory if they fit
            (auto). The result is the same.
        validates: whether epochs are validated here; otherwise the caller gives their checkpoints to `validate`.

    Raises:
        InputError: the run cannot be trained; `check_run` finds most reasons before a start.
    """
    device = check_device(device)
    if device.type == "cuda" and device.index is not None:
        # Collectives use the current device.
        torch.cuda.set_device(device)
    config = run.config
    check_batch(run, world_size())
    check_labels(run)
    method = run.build()
    synchronise_batch_norm(method, device)
    method = method.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if isinstance(config, FineTuningConfig) and config.compile:
        compile_in_training(method, device)
    if config.precision == "bfloat16":
        train_in_bfloat16(method)
    training = load_training_part(run, method, device, loading)
    if validates:
        reference, validation = load_validation_parts(run, method, training.features, device, loading)
    encoder = _encoder(run, method, device)
    history: list[dict[str, Any]] = []

    def complete(record: dict[str, Any], **stateful: nn.Module | Optimizer) -> None:
        """Validate an epoch and pass its record to the observer, with the state of a checkpoint."""
        if validates and is_validated(run, record["epoch"]):
            with whole_weights(method):
                record |= _validated(method, encoder, reference, validation)
        history.append(record | {"score": _score(run, method, record)})
        state = {name: each.state_dict() for name, each in stateful.items()}
        if is_sharded(config) and is_checkpointed(run, record["epoch"]):
            # By all ranks, for the one that writes it.
            state = gathered(state)
        observer.on_epoch(history, lambda folder: save_checkpoint(folder, **state, history=history))

    if isinstance(method, Fitted):
        if resume_from is None:
            complete(fit(method, training, device), method=method)
        return
    state = None if resume_from is None else load_checkpoint(resume_from)
    if state is None:
        from_first_rank(lambda: method.begin(training))
        broadcast_state(method)
    else:
        method.load_state_dict(state["method"])
        history = state["history"]
    if is_sharded(config):
        shard(method, device)
    optimizer = method.build_optimizer()
    base_rates = [group["lr"] for group in optimizer.param_groups]
    if state is not None:
        load_shares(optimizer, state["optimizer"])
        # Otherwise its tensors would stay in memory.
        del state

    for epoch in range(len(history), config.epochs):
        # One rank may have written a checkpoint.
        meet()
        # Numbers drawn from torch's generator are then the same in a resumed run.
        torch.manual_seed(mixed_seed(config.seed, epoch, rank()))
        factor = method.start_epoch(epoch, training)
        rates = [rate * factor for rate in base_rates]
        parallel = wrap(method)
        method.train()
        with tensor_float32(config.precision == "tf32"):
            record = train_epoch(run, method, parallel, optimizer, rates, encoder, training, epoch, observer.on_step)
        method.end_epoch()
        method.eval()
        complete(record, method=method, optimizer=optimizer)


def is_validated(run: Run, epoch: int) -> bool:
    """Return whether an epoch, counted from 1, is evaluated on the validation part."""
    due = epoch % run.config.validate_every == 0 or epoch == run.config.epochs
    images = run.manifest.part("validation")
    if get_method(run.method).validates_by_labels:
        return due and bool(images.is_labelled.any())
    return due and bool(images)


def is_checkpointed(run: Run, epoch: int) -> bool:
    """Return whether an epoch, counted from 1, ends with a checkpoint."""
    return epoch % run.config.checkpoint_every == 0 or epoch == run.config.epochs or is_validated(run, epoch)


def validate(run: Run, checkpoint: Path, device: str | torch.device = "cpu", loading: str = "auto") -> dict[str, Any]:
    """Return the number, metrics and score of a checkpoint's epoch as `train` would compute them, with one rank."""
    device = check_device(device)
    method = run.build().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    # Before the checkpoint is loaded: features are those of the networks with their initial weights.
    parts = load_validation_parts(run, method, None, device, loading)
    state = load_checkpoint(checkpoint)
    method.load_state_dict(state["method"])
    method.eval()
    found = _validated(method, _encoder(run, method, device), *parts)
    record = state["history"][-1]
    return {"epoch": record["epoch"], **found, "score": _score(run, method, record | found)}


def _encoder(run: Run, method: Method, device: torch.device) -> HashModel:
    """Return a model of the networks in training, which encodes as the final model will."""
    return HashModel(make_card(run, method, {}), method.network, device=device, text_head=method.text_head)


def _validated(method: Method, encoder: HashModel, reference: Part, validation: Part) -> dict[str, float]:
    """Return the metrics of an epoch, and the numbers of queries and of searched images; empty without metrics."""
    metrics = method.validate(encoder, reference, validation)
    if not metrics:
        return {}
    is_query = labelled(validation.labels) if method.validates_by_labels else np.ones(len(validation.ids), np.bool_)
    shares = gather_objects((int(np.count_nonzero(is_query)), len(reference.ids)))
    sizes = dict(zip(VALIDATION_SIZES, map(sum, zip(*shares, strict=True)), strict=True))
    return {f"validation/{name}": value for name, value in metrics.items()} | sizes


def _score(run: Run, method: Method, record: dict[str, Any]) -> float:
    """Return the score of an epoch, of which the best is the highest: the selection metric, or the epoch's number."""
    if method.selection_metric is None or not run.manifest.part("validation"):
        return float(record["epoch"])
    # -1 for an epoch without validation: metrics are at least 0, and the last epoch is always validated.
    return float(record.get(f"validation/{method.selection_metric}", -1))
