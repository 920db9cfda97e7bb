"""A memory bank: one embedding per training image, replicated on every rank or sharded among the ranks."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orbithash.trainers.distributed import gather_objects, rank, sum_over_ranks, world_size

__all__ = ["NORM_FLOOR", "Memory"]

# Minimum divisor when a vector is scaled to unit length: zeros stay zeros.
NORM_FLOOR = 1e-6


class Memory(nn.Module):
    """Embeddings float [N, K] by row of the training part, without gradient.

    `whole` is saved in checkpoints. `open` is called before an epoch and `close` after it; in between, `share` has the
    rows `numbers`: all rows, or with `sharded` every W-th row on each of W ranks. While a sharded memory is open,
    `whole` is empty: a rank holds the whole memory only between epochs, when no activations are allocated. A checkpoint
    can be resumed by any number of ranks.
    """

    whole: Tensor
    share: Tensor
    numbers: Tensor

    def __init__(self, num_rows: int, num_bits: int, sharded: bool) -> None:
        super().__init__()
        self.num_rows, self.sharded = num_rows, sharded
        self.register_buffer("whole", torch.zeros(num_rows, num_bits))

    def open(self) -> None:
        """Take this rank's share. It is not a buffer, because DDP would broadcast the first rank's."""
        self._first, self._stride = (rank(), world_size()) if self.sharded else (0, 1)
        self.numbers = torch.arange(self._first, self.num_rows, self._stride, device=self.whole.device)
        self.share = self.whole
        if self.sharded:
            self.share = self.whole[self._first :: self._stride].clone()
            self.whole = self.whole.new_empty(0, self.whole.shape[1])

    def close(self) -> None:
        """Join the shares on every rank; `RuntimeError` if replicas of the memory differ."""
        if self.sharded:
            whole = self.share.new_zeros(self.num_rows, self.share.shape[1])
            whole[self._first :: self._stride] = self.share
            self.whole = sum_over_ranks(whole)
        else:
            self._check_replicas()

    def _check_replicas(self) -> None:
        # Weighted by position, so that swapped rows change the sum. The tolerance allows for rounding of processors.
        weights = torch.linspace(1, 2, self.num_rows, dtype=torch.float64, device=self.share.device)
        sums = np.array(gather_objects((weights @ self.share.double()).tolist()))
        if not np.allclose(sums, sums[0], rtol=0, atol=1e-3, equal_nan=True):
            raise RuntimeError("the ranks' memories have diverged: they did not write the same embeddings")

    def own(self, rows: Tensor) -> Tensor:
        """Return which of the rows int64 [N] are in this rank's share, as positions int64 [n] in `rows`."""
        return (rows % self._stride == self._first).nonzero()[:, 0]

    @torch.no_grad()
    def write(self, rows: Tensor, embeddings: Tensor, keep: float, own: Tensor | None = None) -> None:
        """Replace each row m of `rows` int64 [N] by keep * m + (1 - keep) * e, scaled to unit length.

        e are the embeddings [N, K] of these rows. Every rank passes the rows of all ranks, and with a sharded memory
        its `own` ones, which are computed on the CPU: their number would have to be read from a GPU.
        """
        if own is not None:
            rows, embeddings = rows[own], embeddings[own]
        positions = rows // self._stride
        mixed = keep * self.share[positions] + (1 - keep) * embeddings.to(self.share.dtype)
        self.share[positions] = F.normalize(mixed, dim=1, eps=NORM_FLOOR)
