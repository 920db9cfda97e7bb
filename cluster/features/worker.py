"""The worker that computes features and keeps them; a share of its work is a few positions of one table."""

import os
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from orbithash.cluster.runtime import device_for
from orbithash.encoders.errors import ImageError
from orbithash.trainers.features.features import Wanted

__all__ = ["SHARE", "FeatureWorker", "Plan"]

# Returns the wanted features by name, given the device, `cpu` or `cuda`. It is sent to the workers.
Plan = Callable[[str], dict[str, Wanted]]

SHARE = pa.schema([("table", pa.string()), ("positions", pa.list_(pa.int64()))])

_DONE = pa.schema(
    [
        ("table", pa.string()),
        ("first", pa.int64()),
        ("num_rows", pa.int64()),
        ("node", pa.string()),
        ("began", pa.float64()),
        ("where", pa.string()),
        ("problems", pa.list_(pa.string())),
    ]
)


class FeatureWorker:
    """The networks of a plan, built once, which compute shares and write them into the store. No rows leave it."""

    def __init__(self, plan: Plan, folder: str, num_gpus: float) -> None:
        """`folder` is that of the store, or its URI; `num_gpus` are those of this worker."""
        import ray

        os.environ["ORBITHASH_FEATURES"] = folder
        self._wanted = plan(device_for(num_gpus))
        # The other nodes see only what is in the bucket, also of rows that a job before could not upload.
        for wanted in self._wanted.values():
            wanted.upload()
        self._node = ray.get_runtime_context().get_node_id()

    def __call__(self, shares: pa.Table) -> pa.Table:
        """Compute and keep the shares; return what was done, one row each.

        Refused images are problems of their share, one line each, so that all are found. Any other error ends the job.
        """
        rows = []
        for share in shares.to_pylist():
            positions, began, where = share["positions"], time.time(), ""
            problems: tuple[str, ...] = ()
            try:
                self._wanted[share["table"]].keep(np.array(positions, np.int64))
            except ImageError as err:
                where, problems = err.where, err.problems or (str(err),)
            done = {"first": positions[0], "num_rows": len(positions), "node": self._node, "began": began}
            rows.append({"table": share["table"], "where": where, "problems": problems, **done})
        return pa.Table.from_pylist(rows, schema=_DONE)
