"""Runs side by side, each in a Ray task that starts the workers of its run."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from orbithash.cluster.output import say, track
from orbithash.cluster.runtime import check_resources, cpus_per_worker, device_for, worker_error
from orbithash.encoders.errors import InputError

__all__ = ["Outcome", "attempt", "num_that_fit", "run_side_by_side"]


# Runs at a time if no number is given: each may hold its images in memory, and evaluates on the driver's node.
MAX_BY_DEFAULT = 4


class Outcome(NamedTuple):
    """What one run returned, or why it failed, in one line; "" if it did not."""

    result: Any
    problem: str = ""


def num_that_fit(num_workers: int, gpus_per_worker: float) -> int:
    """Return how many runs of `num_workers` workers, one CPU each, the cluster has room for; 1 to `MAX_BY_DEFAULT`.

    Call it while connected to Ray.
    """
    import ray

    present = ray.cluster_resources()
    fitting = [present.get("CPU", 0) // num_workers]
    if gpus_per_worker:
        fitting.append(present.get("GPU", 0) // (num_workers * gpus_per_worker))
    return max(1, min(MAX_BY_DEFAULT, int(min(fitting))))


def attempt(run: Callable[[], Any]) -> Outcome:
    """Call `run` and return its outcome; only errors that end a single run are caught."""
    try:
        return Outcome(run())
    except (InputError, RuntimeError) as err:
        return Outcome(None, str(err).partition("\n")[0] or type(err).__name__)


def run_side_by_side(
    runs: Sequence[Callable[[], Any]],
    names: Sequence[str],
    concurrent: int,
    num_workers: int,
    gpus_per_worker: float,
) -> list[Outcome]:
    """Call each function in a process of its own, `concurrent` at a time, and return their outcomes in their order.

    A run that fails ends none of the others. Call it while connected to Ray. The processes are on the driver's node,
    whose files they write.

    Args:
        runs: functions that can be pickled; each may start workers on Ray.
        names: what progress calls them.
        concurrent: number of runs at a time.
        num_workers: workers that each run starts.
        gpus_per_worker: GPUs of each worker.

    Raises:
        InputError: the cluster has too few resources for `concurrent` runs at a time.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    total = concurrent * num_workers
    check_resources(f"--concurrent {concurrent}", [{"CPU": 1, "GPU": gpus_per_worker}] * total)
    num_threads = num_workers * cpus_per_worker(total, gpus_per_worker)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # No CPU of its own: it waits for its workers, and evaluates when they have ended.
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(_work)
    outcomes: dict[int, Outcome] = {}
    running: dict[Any, int] = {}
    waiting = list(range(len(runs)))
    try:
        with track("reproducing", len(runs), "runs") as advance_to:
            while waiting or running:
                while waiting and len(running) < concurrent:
                    number = waiting.pop(0)
                    running[task.remote(runs[number], num_threads)] = number
                ended, _ = ray.wait(list(running))
                number = running.pop(ended[0])
                try:
                    outcomes[number] = ray.get(ended[0])
                except ray.exceptions.RayError as err:
                    outcomes[number] = Outcome(None, str(worker_error(err)).partition("\n")[0])
                problem = outcomes[number].problem
                say(f"{names[number]}: {problem or 'trained and evaluated'}")
                advance_to(len(outcomes), "")
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
    return [outcomes[number] for number in range(len(runs))]


def _work(run: Callable[[], Any], num_threads: int) -> Outcome:
    import torch

    # Its workers have the GPUs, and Ray does not hide them from a task that reserves none.
    device_for(0)
    # Ray gives a task without CPUs one thread.
    torch.set_num_threads(num_threads)
    return attempt(run)
