"""How a process joins Ray."""

import math
import os
import re
import secrets
import socket
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from orbithash.cluster.output import say
from orbithash.encoders.errors import InputError

__all__ = ["check_resources", "connected", "cpus_per_worker", "keeping_memory", "parse_workers", "worker_error"]

CONNECT_TIMEOUT_S = 10.0

PATIENCE_VARIABLE = "ORBITHASH_WAIT_FOR_NODES_S"
MAX_PATIENCE_S = 86400.0


@contextmanager
def connected(min_cpus: int = 1) -> Iterator[None]:
    """Ray, for as long as the block lasts: the cluster that `RAY_ADDRESS` names, or one on this machine alone.

    A cluster of our own listens on the loopback interface and asks for a token that only this process and its workers
    know; it counts at least `min_cpus` CPUs, however few this machine has. A process that has joined already keeps what
    it has.
    """
    # The worker's folder is not a project to ship: the package is installed on every node.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    # What Ray's core writes to stderr by itself is not for users; it is in its log files too.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Nor is what a node tells of dead workers, which Ray prints on stdout, in the middle of our JSON: skip every line.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    if not os.environ.get("RAY_ADDRESS"):
        _set_token()
        # By its name meant for other systems; here it is what makes every process of Ray listen on loopback only.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # A record of each search would fill the memory of Ray's control service, for a dashboard that is not there.
        os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if os.environ.get("RAY_ADDRESS"):
        try:
            _check_answers(os.environ["RAY_ADDRESS"])
            with _without_stderr():
                ray.init(address=os.environ["RAY_ADDRESS"], **quiet)
        except (OSError, RuntimeError, ValueError) as err:
            raise InputError(f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}: no cluster answers there ({err})") from err
    else:
        num_cpus = min_cpus if len(os.sched_getaffinity(0)) < min_cpus else None
        with _without_stderr():
            # By name: another cluster on this machine, or what is left of one, is not ours.
            ray.init("local", include_dashboard=False, num_cpus=num_cpus, _node_ip_address="127.0.0.1", **quiet)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Nothing reaches stderr in the block, not even from C++: Ray's core says there which log level it was told."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _check_answers(address: str) -> None:
    """`OSError` where nothing listens at HOST:PORT, which ray would go on trying for twenty minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()


def _set_token() -> None:
    """Settles authentication before ray is imported: left to itself, a local start writes a token into the home."""
    mode = os.environ.setdefault("RAY_AUTH_MODE", "token")
    if mode == "token" and not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def check_resources(what: str, bundles: Sequence[Mapping[str, float]]) -> None:
    """`InputError` at once where the cluster cannot ever hold these bundles, instead of a wait for them.

    With `ORBITHASH_WAIT_FOR_NODES_S` in the environment the cluster's autoscaler is asked for nodes, and they are
    waited for so many seconds.
    """
    import ray

    wanted: Counter[str] = Counter()
    for bundle in bundles:
        wanted.update({name: amount for name, amount in bundle.items() if amount})

    def lacking() -> tuple[str, float, float] | None:
        have = ray.cluster_resources()
        return next((each for name in wanted if (each := (name, wanted[name], have.get(name, 0)))[1] > each[2]), None)

    patience_s = _patience_s()
    if patience_s and lacking():
        say(f"{what}: waiting up to {patience_s:g} s for the cluster to bring nodes")
        _wait_for_room(bundles, patience_s)
    if lack := lacking():
        name, amount, there = lack
        raise InputError(
            f"{what} needs {amount:g} {name}s, the cluster has {there:g}"
            + (f" after {patience_s:g} s" if patience_s else "")
            + f"; ask for fewer, or set {PATIENCE_VARIABLE} where nodes come by themselves"
        )


def _patience_s() -> float:
    """How long a command waits for nodes; 0 for not at all."""
    text = os.environ.get(PATIENCE_VARIABLE) or "0"
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds <= MAX_PATIENCE_S:
        raise InputError(f"{PATIENCE_VARIABLE} is {text!r}; seconds from 0 to {MAX_PATIENCE_S:.0f} are allowed")
    return seconds


def _wait_for_room(bundles: Sequence[Mapping[str, float]], seconds: float) -> None:
    """Reserves the bundles, which is what an autoscaler brings nodes for, and lets go of them."""
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([{name: amount for name, amount in each.items() if amount} for each in bundles])
    try:
        group.wait(seconds)
    finally:
        remove_placement_group(group)


def cpus_per_worker(num_workers: int, num_gpus: float = 0) -> int:
    """The most CPUs that each of so many workers can have, with GPUs beside them, on the nodes as they are now.

    At least 1. Workers for which there is no room yet do not make the share of the others smaller.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def room(num_cpus: int) -> int:
        """Workers that fit; none lies on two nodes."""
        return sum(
            int(min(node.get("CPU", 0) // num_cpus, node.get("GPU", 0) // num_gpus if num_gpus else math.inf))
            for node in nodes
        )

    wanted = min(num_workers, room(1))
    largest = max((int(node.get("CPU", 0)) for node in nodes), default=1)
    return next((num_cpus for num_cpus in range(largest, 1, -1) if room(num_cpus) >= wanted), 1)


def parse_workers(text: str, option: str = "--workers") -> tuple[int, int]:
    """`MIN:MAX`, or one number for both, as it was given with `option`."""
    try:
        low, high = (int(part) for part in (text.split(":") if ":" in text else (text, text)))
    except ValueError:
        low = high = 0
    if not 1 <= low <= high:
        raise InputError(f"{option} is {text!r}; MIN:MAX with 1 <= MIN <= MAX, such as 1:8, or one number is needed")
    return low, high


def worker_error(err: Exception) -> Exception:
    """What went wrong in a worker, in one line: out of the text of its traceback, which is all that Ray brings."""
    named = re.findall(r"^(\w[\w.]*): (.+)$", str(err), re.MULTILINE)
    causes = [(name, message) for name, message in named if not name.startswith("ray.")]
    if not causes:
        return err
    name, message = causes[-1]
    if name.rpartition(".")[2] == InputError.__name__:
        return InputError(message)
    return RuntimeError(f"a worker failed: {name}: {message}")


def keeping_memory() -> dict[str, str]:
    """Environment variables of a process that trains on a CPU: it keeps the memory of one step for the next.

    The C library gives the memory of every large tensor back to the system and asks for it anew, page by page, which
    takes time (docs/results.md). The allocator that Ray ships does as it is told. Empty where Ray ships none.
    """
    import ray

    library = Path(ray.__file__).parent / "core" / "libjemalloc.so"
    if not library.exists():
        return {}
    others = [os.environ["LD_PRELOAD"]] if os.environ.get("LD_PRELOAD") else []
    return {"LD_PRELOAD": ":".join([*others, str(library)]), "MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1"}
