"""The driver of the workers that compute features: it looks up what is missing, and deals it to them.

    look up (driver) -> compute and keep (actor pool) -> look up again (driver)

Each worker writes its rows into the store itself; only their positions go through Ray. A share is lost if the job ends
in the middle of it, and the next job computes what is not kept. A store that nodes do not share is found when a node
has done its first share: the driver does not see its rows.
"""

import functools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orbithash.cluster.encoding.encode import quiet_data
from orbithash.cluster.features.worker import SHARE, FeatureWorker, Plan
from orbithash.cluster.output import say, track
from orbithash.cluster.runtime import check_gpu_share, check_resources, connected, cpus_per_worker, worker_error
from orbithash.encoders.errors import InputError, listed
from orbithash.encoders.networks.reading import READ_BATCH_SIZE
from orbithash.trainers.datasets.layouts import first_problems
from orbithash.trainers.features.features import Wanted
from orbithash.trainers.features.store import PART_ROWS, store_folder, store_uri
from orbithash.trainers.loop.parts import wanted_features
from orbithash.trainers.loop.run import Run
from orbithash.trainers.methods import get_method

__all__ = ["FilledStore", "device_here", "fill", "fill_for_training"]

# Shares of each worker, unless they would be larger than a part of the store: the workers end at about the same time.
SHARES_PER_WORKER = 32

# Shares that wait at a worker, beside the one in work.
NUM_WAITING = 1

MAX_BLOCKS = 4096


@dataclass(frozen=True)
class FilledStore:
    """What a job has done.

    Attributes:
        num_images: features that are wanted: distinct images, once for each table of the method.
        num_computed: of these, those that the workers computed.
        num_kept_before: of these, those that the store had.
        start_s: seconds until the first worker began.
        seconds: seconds of the workers after that.
        images_per_s: computed features per second of `seconds`; 0 if none was computed.
        folder: folder or URI of the store.
    """

    num_images: int
    num_computed: int
    num_kept_before: int
    start_s: float
    seconds: float
    images_per_s: float
    folder: str


def fill_for_training(run: Run, num_workers: int = 1, gpus_per_worker: float = 0) -> FilledStore:
    """Compute the features of images that training of the run asks for; see `fill`.

    Raises:
        InputError: as `fill`; also for a method that trains its backbone, and for data that are vectors.
    """
    if run.config.is_of_embeddings:
        raise InputError(f"{run.root} has vectors, which need no features; train on it directly")
    sources = [table.source for table in get_method(run.method).tables_of(run.config).values()]
    if set(sources) <= {"caption"}:
        raise InputError(
            f"{run.method} trains its backbone, so no features of images are kept; choose a method with a frozen "
            "backbone, such as mhcln, or train directly"
        )
    if gpus_per_worker and run.config.encoding_precision == "bfloat16" and device_here(gpus_per_worker) == "cpu":
        raise InputError(
            "features in bfloat16 of GPUs are kept apart from those of CPUs, and this process has no GPU to look them "
            "up; start the command on a node with a GPU, or omit --gpus-per-worker"
        )
    if "caption" in sources:
        say("the features of captions are computed when training starts")
    return fill(functools.partial(wanted_features, run), num_workers, gpus_per_worker)


def fill(plan: Plan, num_workers: int, gpus_per_worker: float = 0) -> FilledStore:
    """Let Ray Data workers compute the features of a plan that are not kept, and keep them.

    Args:
        plan: what is wanted; the driver calls it to look up rows, and the workers to compute them.
        num_workers: number of workers, which share the CPUs.
        gpus_per_worker: GPUs of each, also a fraction of one; 0: they compute on CPUs.

    Raises:
        InputError: wrong options, too few resources, no room for the features, nodes without a shared store, images
            that are refused, or a store that cannot be written. What was computed is kept.
    """
    if num_workers < 1:
        raise InputError(f"--workers is {num_workers}; at least 1 is needed")
    check_gpu_share("--gpus-per-worker", gpus_per_worker, is_whole=False)
    wanted = plan(device_here(gpus_per_worker))
    folder = store_uri() or str(store_folder())
    missing = {name: rows.missing() for name, rows in wanted.items()}
    num_images = sum(len(rows) for rows in wanted.values())
    num_missing = sum(len(positions) for positions in missing.values())
    say(f"{num_images} features of images, {num_images - num_missing} of them kept before in {folder}")
    start_s = seconds = 0.0
    if num_missing:
        # The sum at once: the kinds of one job are all in use.
        num_bytes = sum(wanted[name].num_bytes(len(positions)) for name, positions in missing.items())
        next(iter(wanted.values())).make_room(num_bytes)
        with connected():
            check_resources(
                f"computing features with {num_workers} workers", [{"CPU": 1, "GPU": gpus_per_worker}] * num_workers
            )
            _check_shared()
            begun = time.time()
            first = _compute(plan, folder, wanted, missing, num_workers, gpus_per_worker)
            start_s, seconds = first - begun, time.time() - first
        if lost := sum(len(rows.missing()) for rows in wanted.values()):
            raise _not_shared(folder, lost)
    rate = num_missing / seconds if seconds else 0.0
    return FilledStore(num_images, num_missing, num_images - num_missing, start_s, seconds, rate, folder)


def device_here(gpus_per_worker: float) -> str:
    """Return the device of the driver: a GPU only if the workers use GPUs."""
    import torch

    return "cuda" if gpus_per_worker and torch.cuda.is_available() else "cpu"


def _compute(
    plan: Plan,
    folder: str,
    wanted: dict[str, Wanted],
    missing: dict[str, npt.NDArray[np.int64]],
    num_workers: int,
    gpus: float,
) -> float:
    """Run the workers over the missing rows; return when the first of them began, seconds of the epoch."""
    import ray.data
    from ray.exceptions import RayError

    first, num_done = time.time(), 0
    where = ""
    # A dict, because tables have the same images.
    problems: dict[str, None] = {}
    nodes: set[str] = set()
    total = sum(len(positions) for positions in missing.values())
    with quiet_data(), track("computing features", total, "images") as advance_to:
        done = ray.data.from_arrow(list(_blocks(missing, num_workers))).map_batches(
            FeatureWorker,
            fn_constructor_kwargs={"plan": plan, "folder": folder, "num_gpus": gpus},
            compute=ray.data.ActorPoolStrategy(size=num_workers, max_tasks_in_flight_per_actor=1 + NUM_WAITING),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=cpus_per_worker(num_workers, gpus),
            num_gpus=gpus,
        )
        try:
            for number, share in enumerate(done.iter_rows()):
                first = min(first, share["began"]) if number else share["began"]
                num_done += share["num_rows"]
                if share["problems"]:
                    where = share["where"]
                    problems |= dict.fromkeys(share["problems"])
                elif share["node"] not in nodes:
                    nodes.add(share["node"])
                    if share["first"] in wanted[share["table"]].missing():
                        raise _not_shared(folder, share["num_rows"])
                advance_to(num_done, f"{len(problems)} images refused" if problems else "")
        except RayError as err:
            raise worker_error(err) from err
    if problems:
        raise listed(first_problems(sorted(problems)), where)
    return first


def _blocks(missing: dict[str, npt.NDArray[np.int64]], num_workers: int) -> Iterator[pa.Table]:
    """Yield blocks of shares with `SHARE`; a share is a number of batches that are decoded together."""
    total = sum(len(positions) for positions in missing.values())
    size = READ_BATCH_SIZE * -(-total // (READ_BATCH_SIZE * SHARES_PER_WORKER * num_workers))
    size = min(size, PART_ROWS)
    shares = [
        {"table": name, "positions": positions[start : start + size]}
        for name, positions in missing.items()
        for start in range(0, len(positions), size)
    ]
    per_block = -(-len(shares) // MAX_BLOCKS)
    for start in range(0, len(shares), per_block):
        yield pa.Table.from_pylist(shares[start : start + per_block], schema=SHARE)


def _check_shared() -> None:
    """Raise `InputError` if the cluster has several nodes and no folder is named that they could share."""
    import ray

    num_nodes = sum(node["Alive"] for node in ray.nodes())
    if num_nodes > 1 and not (os.environ.get("ORBITHASH_FEATURES") or os.environ.get("ORBITHASH_CACHE")):
        raise InputError(
            f"the cluster has {num_nodes} nodes and ORBITHASH_FEATURES is not set; set it, here and on every node, to "
            "a folder or bucket that they share"
        )


def _not_shared(folder: str, num_rows: int) -> InputError:
    return InputError(
        f"{folder}: {num_rows} features that a worker has written are not visible here; set ORBITHASH_FEATURES to a "
        "folder or bucket that all nodes share"
    )
