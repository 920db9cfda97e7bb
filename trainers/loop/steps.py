"""The steps of an epoch: batches, losses, gradients, and their measurements."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from orbithash.encoders.imagery.rendering import Pixels
from orbithash.encoders.networks.backbones.layers import keep_bfloat16_in_training
from orbithash.encoders.networks.hash_network import HashNetwork
from orbithash.encoders.networks.model import HashModel
from orbithash.trainers.config import TrainConfig
from orbithash.trainers.data.loading import Augmentation, Part, views_of_steps
from orbithash.trainers.data.memory_use import memory_mb, peak_memory_mb, reset_peak_memory
from orbithash.trainers.dealing import deal
from orbithash.trainers.distributed import broadcast_state, from_first_rank, rank, sum_over_ranks, world_size
from orbithash.trainers.loop.losses import LossSums
from orbithash.trainers.loop.run import Run
from orbithash.trainers.loop.uploads import uploaded
from orbithash.trainers.methods import Batch, Fitted, Method

__all__ = ["fit", "mixed_seed", "train_epoch", "train_in_bfloat16", "wrap"]


def mixed_seed(seed: int, *more: int) -> int:
    """Return one seed made of several numbers."""
    return int(np.random.SeedSequence([seed, *more]).generate_state(1, np.uint32)[0])


def wrap(method: Method) -> nn.Module:
    """Wrap the method in DDP, anew in each epoch, because the trained parameters change with the warm-up."""
    if world_size() == 1:
        return method
    device = next(method.parameters()).device
    # Every rank computes the same buffers from the whole batch, so they need no synchronisation.
    return DistributedDataParallel(
        method,
        device_ids=[device] if device.type == "cuda" else None,
        forward_sync_buffers=False,
        # Gradients are reduced in place, without copies.
        gradient_as_bucket_view=True,
    )


def train_epoch(
    run: Run,
    method: Method,
    parallel: nn.Module,
    optimizer: torch.optim.Optimizer,
    rates: Sequence[float],
    encoder: HashModel,
    training: Part,
    epoch: int,
    on_step: Callable[[int, int, int, float], None],
) -> dict[str, Any]:
    """Train one epoch, counted from 0, and return its record: losses, rates, times and memory.

    `parallel` is the method as wrapped by `wrap`; `on_step` is `Observer.on_step`. `rates` are the learning rates of
    the optimizer's groups in this epoch; the method changes them with each step.
    """
    steps = method.order(training.labels, epoch)
    num_steps, batch_size = steps.shape
    sums = LossSums(epoch + 1, encoder.device)
    reset_peak_memory(encoder.device)
    memory = memory_mb(encoder.device)
    start = time.perf_counter()
    waited = 0.0
    stream = _batches(run.config, method, steps, encoder, training, epoch)
    for step in range(1, num_steps + 1):
        requested = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - requested
        factor = method.step_factor(epoch * num_steps + step - 1, run.config.epochs * num_steps)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        sums.add(step, _step(run.config, method, parallel, optimizer, batch))
        on_step(epoch + 1, step, num_steps, step * batch_size / (time.perf_counter() - start))
    # Waits for the last step on a GPU. The totals stay there, because NCCL does not support tensors on the CPU.
    totals = sums.totals()
    seconds = time.perf_counter() - start
    means = (sum_over_ranks(totals) / num_steps / world_size()).tolist()
    return {
        "epoch": epoch + 1,
        "lr": optimizer.param_groups[0]["lr"],
        **{f"train/{name}": mean for name, mean in zip(sums.names, means, strict=True)},
        "images_per_s": num_steps * batch_size / seconds,
        "step_s": seconds / num_steps,
        "seconds": seconds,
        "waited_for_data_s": waited,
        "memory_mb": memory,
        "peak_memory_mb": peak_memory_mb(encoder.device),
    }


def fit(method: Fitted, training: Part, device: torch.device) -> dict[str, Any]:
    """Fit a method on the first rank, copy its state to all ranks and return the record of its only epoch."""
    reset_peak_memory(device)
    memory = memory_mb(device)
    start = time.perf_counter()
    metrics = from_first_rank(lambda: method.fit(training))
    broadcast_state(method)
    return {
        "epoch": 1,
        **{f"train/{name}": value for name, value in metrics.items()},
        "seconds": time.perf_counter() - start,
        "memory_mb": memory,
        "peak_memory_mb": peak_memory_mb(device),
    }


def _batches(
    config: TrainConfig,
    method: Method,
    steps: npt.NDArray[np.int64],
    encoder: HashModel,
    training: Part,
    epoch: int,
) -> Iterator[Batch]:
    """Yield this rank's share of each step on the device of `encoder`."""
    for batch in uploaded(_batches_on_cpu(config, method, steps, training, epoch), encoder.device):
        yield batch if batch.images is None else batch._replace(images=encoder.normalise(batch.images))


def _batches_on_cpu(
    config: TrainConfig, method: Method, steps: npt.NDArray[np.int64], training: Part, epoch: int
) -> Iterator[Batch]:
    """Yield the batches of `_batches`, with prepared images [B, S, S, C] as they were decoded."""
    dealing = deal(steps.shape[1], method.group_size, config.accumulate, world_size())
    mine = steps[:, dealing.positions(rank())]
    views: Iterator[Pixels | None] = iter([None] * len(mine))
    if training.images is not None:
        augmentation = Augmentation(config.min_crop_area, config.colour_jitter, config.grayscale, config.interpolation)
        views = views_of_steps(training.images, mine, config.image_size, augmentation, config.seed, epoch)
    for step, (rows, images) in enumerate(zip(mine, views, strict=True)):
        yield Batch(
            rows=torch.from_numpy(rows),
            labels=torch.from_numpy(training.labels[rows]),
            images=None if images is None else torch.from_numpy(images),
            features={name: torch.from_numpy(table[rows]) for name, table in training.features.items()},
            seed=mixed_seed(config.seed, epoch, step, 1),
            dealing=dealing,
        )


def _micro_batches(batch: Batch) -> Iterator[Batch]:
    """Split a batch into its micro-batches; all but the first get a new seed."""
    assert batch.dealing is not None
    end = 0
    for number, dealing in enumerate(batch.dealing.micro_batches()):
        start, end = end, end + dealing.of_ranks[rank()]
        mine = slice(start, end)
        yield Batch(
            rows=batch.rows[mine],
            labels=batch.labels[mine],
            images=None if batch.images is None else batch.images[mine],
            features={name: table[mine] for name, table in batch.features.items()},
            seed=mixed_seed(batch.seed, number) if number else batch.seed,
            dealing=dealing,
        )


def _step(
    config: TrainConfig, method: Method, parallel: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch
) -> dict[str, Tensor]:
    """Return the losses of a step."""
    losses = method.before_step(batch, optimizer)
    optimizer.zero_grad(set_to_none=True)
    for number, micro_batch in enumerate(_micro_batches(batch), start=1):
        is_last = number == config.accumulate
        # Ranks exchange gradients once, after the last micro-batch.
        with nullcontext() if is_last or parallel is method else parallel.no_sync():  # type: ignore[operator]
            # A quotient, which is exactly the number of micro-batches if they are equally large.
            divisor = batch.num_rows / micro_batch.num_rows
            of_micro_batch = {name: value / divisor for name, value in parallel(micro_batch).items()}
            of_micro_batch["loss"].backward()
        for name, value in of_micro_batch.items():
            losses[name] = losses[name] + value.detach() if name in losses else value.detach()
    if config.clip_value is not None:
        torch.nn.utils.clip_grad_value_(parallel.parameters(), config.clip_value)
    if config.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(parallel.parameters(), config.clip_norm)
    optimizer.step()
    method.after_step(batch)
    return losses


def train_in_bfloat16(method: Method) -> None:
    """Make every backbone compute in bfloat16 in training mode, and still return float32; evaluation is unchanged."""

    def wrap(backbone: nn.Module) -> None:
        forward = backbone.forward

        def cast(images: Tensor) -> Tensor:
            if not backbone.training:
                # At the precision of the caller, see `ImageFeatures`.
                unchanged: Tensor = forward(images)
                return unchanged
            with torch.autocast(images.device.type, torch.bfloat16):
                maps: Tensor = forward(images)
            return maps.float()

        # Replaced on the object: a wrapping module would change the names of the weights.
        backbone.forward = cast
        keep_bfloat16_in_training(backbone)

    for module in method.modules():
        if isinstance(module, HashNetwork):
            wrap(module.backbone)
