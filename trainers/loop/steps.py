"""The steps of an epoch: batches, losses, gradients, and their measurements."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from orbithash.encoders.networks.model import HashModel
from orbithash.trainers.config import TrainConfig
from orbithash.trainers.data.loading import Part
from orbithash.trainers.data.memory_use import memory_mb, peak_memory_mb, reset_peak_memory
from orbithash.trainers.distributed import broadcast_state, from_first_rank, sum_over_ranks, world_size
from orbithash.trainers.loop.batches import Step, batches_of_epoch, micro_batches
from orbithash.trainers.loop.losses import LossSums
from orbithash.trainers.loop.run import Run
from orbithash.trainers.methods import Fitted, Method

__all__ = ["fit", "train_epoch", "wrap"]


def wrap(method: Method) -> nn.Module:
    """Wrap the method in DDP, anew in each epoch, because the trained parameters change with the warm-up.

    A sharded method exchanges its gradients by itself.
    """
    if world_size() == 1 or isinstance(method, FSDPModule):
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
    stream = batches_of_epoch(run.config, method, steps, encoder, training, epoch)
    for number in range(1, num_steps + 1):
        requested = time.perf_counter()
        step = next(stream)
        waited += time.perf_counter() - requested
        factor = method.step_factor(epoch * num_steps + number - 1, run.config.epochs * num_steps)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        sums.add(number, _step(run.config, method, parallel, optimizer, step))
        on_step(epoch + 1, number, num_steps, number * batch_size / (time.perf_counter() - start))
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


def _step(
    config: TrainConfig, method: Method, parallel: nn.Module, optimizer: torch.optim.Optimizer, step: Step
) -> dict[str, Tensor]:
    """Return the losses of a step."""
    batch = step.batch
    losses = method.before_step(batch, optimizer)
    optimizer.zero_grad(set_to_none=True)
    for number, micro_batch in enumerate(micro_batches(step), start=1):
        is_last = number == config.accumulate
        # Ranks exchange gradients once, after the last micro-batch. A sharded method exchanges those of each
        # micro-batch: otherwise every rank would hold whole gradients in between.
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
