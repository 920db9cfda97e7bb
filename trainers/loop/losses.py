"""Sums of the losses of an epoch, on the device that computes them.

Reading a number from a GPU waits for all work that the GPU was given before, so that it has nothing to do until the
next step arrives. Losses are therefore read at the end of an epoch, and every `GPU_INTERVAL` steps, to end a run whose
loss is no longer finite.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from orbithash.encoders.errors import InputError

__all__ = ["GPU_INTERVAL", "LossSums"]

# Steps between two checks on a GPU. On a CPU each step is checked.
GPU_INTERVAL = 100


class LossSums:
    """Adds up the losses of the steps of epoch `epoch`, counted from 1, in float64."""

    def __init__(self, epoch: int, device: torch.device) -> None:
        self._epoch, self._device = epoch, device
        self._interval = GPU_INTERVAL if device.type == "cuda" else 1
        self._sums: dict[str, Tensor] = {}
        # The first step with a loss that is not finite, 0 for none, and that loss.
        self._bad_step = torch.zeros((), dtype=torch.int64, device=device)
        self._bad_loss = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def names(self) -> list[str]:
        """Names of the losses, in the order in which they came."""
        return list(self._sums)

    def add(self, step: int, losses: Mapping[str, Tensor]) -> None:
        """Add the scalar losses of a step, counted from 1; `InputError` if a "loss" was not finite, see `check`."""
        for name, value in losses.items():
            wide = value.detach().double()
            self._sums[name] = self._sums[name] + wide if name in self._sums else wide
        loss = losses["loss"].detach()
        is_first = (self._bad_step == 0) & ~loss.isfinite()
        self._bad_loss = torch.where(is_first, loss.double(), self._bad_loss)
        self._bad_step = torch.where(is_first, step, self._bad_step)
        if step % self._interval == 0:
            self.check()

    def check(self) -> None:
        """Raise `InputError`, which names the step, if a "loss" was not finite."""
        if step := int(self._bad_step):
            raise InputError(
                f"the loss is {float(self._bad_loss)} in epoch {self._epoch}, step {step}; try a smaller lr or scale"
            )

    def totals(self) -> Tensor:
        """Return the sums float64 [losses], in the order of `names`."""
        self.check()
        return torch.stack([self._sums[name] for name in self.names])
