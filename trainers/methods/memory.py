"""A memory of one embedding for each training image, on every rank or dealt among the ranks."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orbithash.trainers.distributed import gather_objects, gather_with_gradient, rank, sum_over_ranks, world_size

__all__ = ["NORM_FLOOR", "Memory"]

# Below this length a vector is divided by it instead: zeros stay zeros.
NORM_FLOOR = 1e-6


class Memory(nn.Module):
    """Embeddings float [N, K] by row of the training part, without gradient.

    `whole` is what checkpoints hold. `open` and `close` enclose an epoch; in between, `share` holds rows
    `numbers`: all of them, or with `sharded` every W-th one of W ranks, and then `whole` is empty. So the whole memory
    takes room on a rank only between epochs, when no activations do, and a checkpoint serves any number of ranks.
    """

    whole: Tensor
    share: Tensor
    numbers: Tensor

    def __init__(self, num_rows: int, num_bits: int, sharded: bool) -> None:
        super().__init__()
        self.num_rows, self.sharded = num_rows, sharded
        self.register_buffer("whole", torch.zeros(num_rows, num_bits))

    def open(self) -> None:
        """Takes this rank's share. Not a buffer: DDP would give every rank the first one's."""
        self._first, self._stride = (rank(), world_size()) if self.sharded else (0, 1)
        self.numbers = torch.arange(self._first, self.num_rows, self._stride, device=self.whole.device)
        self.share = self.whole
        if self.sharded:
            self.share = self.whole[self._first :: self._stride].clone()
            self.whole = self.whole.new_empty(0, self.whole.shape[1])

    def close(self) -> None:
        """Puts the shares together again, on every rank; `RuntimeError` where what should be one memory is several."""
        if self.sharded:
            whole = self.share.new_zeros(self.num_rows, self.share.shape[1])
            whole[self._first :: self._stride] = self.share
            self.whole = sum_over_ranks(whole)
        else:
            self._check_replicas()

    def _check_replicas(self) -> None:
        # Weighted by place, so that rows that changed places show. Processors may round differently.
        weights = torch.linspace(1, 2, self.num_rows, dtype=torch.float64, device=self.share.device)
        sums = np.array(gather_objects((weights @ self.share.double()).tolist()))
        if not np.allclose(sums, sums[0], rtol=0, atol=1e-3, equal_nan=True):
            raise RuntimeError("the ranks' memories have diverged: they did not write the same embeddings")

    @torch.no_grad()
    def write(self, rows: Tensor, embeddings: Tensor, keep: float) -> None:
        """Each m of `rows` int64 [B], of every rank, becomes keep * m + (1 - keep) * e of unit length.

        e are the rows' embeddings [B, K]; each rank brings its own rows.
        """
        rows, embeddings = gather_with_gradient(rows), gather_with_gradient(embeddings)
        is_here = rows % self._stride == self._first
        places = rows[is_here] // self._stride
        mixed = keep * self.share[places] + (1 - keep) * embeddings[is_here].to(self.share.dtype)
        self.share[places] = F.normalize(mixed, dim=1, eps=NORM_FLOOR)
