"""Batches of an epoch: this rank's share of each step, with what its method draws, on the device."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orbithash.encoders.imagery.rendering import Pixels
from orbithash.encoders.networks.model import HashModel
from orbithash.trainers.config import TrainConfig
from orbithash.trainers.data.augmentation import Augmentation, draw_view
from orbithash.trainers.data.device_augmentation import ViewDraws, views_of
from orbithash.trainers.data.loading import Part, originals_of_steps, views_of_steps
from orbithash.trainers.dealing import deal
from orbithash.trainers.distributed import rank, world_size
from orbithash.trainers.loop.uploads import uploaded
from orbithash.trainers.methods import Batch, Method
from orbithash.trainers.methods.fine_tuning import FineTuningConfig

__all__ = ["Step", "batches_of_epoch", "micro_batches", "mixed_seed", "steps_on_cpu"]


class Step(NamedTuple):
    """The batch of a step on its way to the method.

    Attributes:
        batch: this rank's share.
        draws: the draws of each micro-batch; empty if the batch is not split.
        views: the draws of the views that the device makes of the images; None if the images are views.
    """

    batch: Batch
    draws: tuple[Mapping[str, Tensor], ...] = ()
    views: ViewDraws | None = None


def mixed_seed(seed: int, *more: int) -> int:
    """Return one seed made of several numbers."""
    return int(np.random.SeedSequence([seed, *more]).generate_state(1, np.uint32)[0])


def batches_of_epoch(
    config: TrainConfig,
    method: Method,
    steps: npt.NDArray[np.int64],
    encoder: HashModel,
    training: Part,
    epoch: int,
) -> Iterator[Step]:
    """Yield this rank's share of each step on the device of `encoder`, with normalised views of the images."""
    for step in uploaded(steps_on_cpu(config, method, steps, training, epoch), encoder.device):
        yield _with_views(config, step, encoder.normalise)


def _with_views(config: TrainConfig, step: Step, normalise: Callable[[Tensor], Tensor]) -> Step:
    """Return the step of `steps_on_cpu`, on the device now, with the network's input in place of images."""
    images = step.batch.images
    if images is None:
        return step
    if step.views is not None:
        images = views_of(images, step.views, config.image_size, _augmentation(config))
    return step._replace(batch=step.batch._replace(images=normalise(images)), views=None)


def _augmentation(config: TrainConfig) -> Augmentation:
    return Augmentation(config.min_crop_area, config.colour_jitter, config.grayscale, config.interpolation)


def steps_on_cpu(
    config: TrainConfig, method: Method, steps: npt.NDArray[np.int64], training: Part, epoch: int
) -> Iterator[Step]:
    """Yield the steps of `batches_of_epoch` on the CPU.

    Images are views [B, side, side, C], or with augment_on=device larger ones with the draws of their views.
    """
    dealing = deal(steps.shape[1], method.group_size, config.accumulate, world_size())
    mine = steps[:, dealing.positions(rank())]
    pixels: Iterator[Pixels | None] = iter([None] * len(mine))
    on_device = isinstance(config, FineTuningConfig) and config.augment_on == "device"
    if training.images is not None and on_device:
        pixels = originals_of_steps(training.images, mine)
    elif training.images is not None:
        pixels = views_of_steps(training.images, mine, config.image_size, _augmentation(config), config.seed, epoch)
    for number, (rows, images) in enumerate(zip(mine, pixels, strict=True)):
        batch = Batch(
            rows=torch.from_numpy(rows),
            labels=torch.from_numpy(training.labels[rows]),
            images=None if images is None else torch.from_numpy(images),
            features={name: torch.from_numpy(table[rows]) for name, table in training.features.items()},
            seed=mixed_seed(config.seed, epoch, number, 1),
            dealing=dealing,
        )
        step = _with_draws(method, batch, steps[number], training)
        if images is not None and on_device:
            generators = (np.random.default_rng([config.seed, epoch, row]) for row in rows.tolist())
            draws = [draw_view(images.shape[1], rng, _augmentation(config)) for rng in generators]
            step = step._replace(views=ViewDraws.stack(draws))
        yield step


def _with_draws(method: Method, batch: Batch, rows: npt.NDArray[np.int64], training: Part) -> Step:
    """Return the step of a batch; `rows` are those of all ranks in the order of the step."""

    def draws(part: Batch, start: int) -> Mapping[str, Tensor]:
        gathered = rows[start + part.gathered_positions.numpy()]
        return method.draw(part, torch.from_numpy(gathered), torch.from_numpy(training.labels[gathered]))

    of_parts, start = [], 0
    for part in micro_batches(Step(batch)):
        of_parts.append(draws(part, start))
        start += part.num_rows
    if len(of_parts) == 1:
        return Step(batch._replace(draws=of_parts[0]))
    of_whole = draws(batch, 0) if method.draws_for_whole_steps else {}
    return Step(batch._replace(draws=of_whole), tuple(of_parts))


def micro_batches(step: Step) -> Iterator[Batch]:
    """Split the batch of a step into its micro-batches; all but the first get a new seed."""
    batch = step.batch
    assert batch.dealing is not None
    dealings = list(batch.dealing.micro_batches())
    if len(dealings) == 1:
        yield batch
        return
    end = 0
    for number, dealing in enumerate(dealings):
        start, end = end, end + dealing.of_ranks[rank()]
        mine = slice(start, end)
        yield Batch(
            rows=batch.rows[mine],
            labels=batch.labels[mine],
            images=None if batch.images is None else batch.images[mine],
            features={name: table[mine] for name, table in batch.features.items()},
            seed=mixed_seed(batch.seed, number) if number else batch.seed,
            dealing=dealing,
            draws=step.draws[number] if step.draws else {},
        )
