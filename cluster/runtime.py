"""Join Ray, check resources, and end what was started."""

import contextlib
import math
import os
import re
import secrets
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from orbithash.cluster.output import is_debug, say
from orbithash.encoders.errors import InputError

__all__ = [
    "Shortage",
    "check_gpu_share",
    "check_resources",
    "connected",
    "cpus_per_worker",
    "device_for",
    "keeping_memory",
    "parse_workers",
    "worker_error",
]

CONNECT_TIMEOUT_S = 10.0
# Processes of our own cluster that still run this long after its end are killed.
EXIT_TIMEOUT_S = 5.0

# A machine that is busy for a moment may start Ray the second time.
START_ATTEMPTS = 2

PATIENCE_VARIABLE = "ORBITHASH_WAIT_FOR_NODES_S"
MAX_PATIENCE_S = 86400.0


@contextmanager
def connected(min_cpus: int = 1) -> Iterator[None]:
    """Join Ray for the duration of the block: the cluster at `RAY_ADDRESS`, or a new one on this machine alone.

    A new cluster listens on the loopback interface and requires a token that only this process and its workers have.
    It has at least `min_cpus` logical CPUs even if the machine has fewer. All of its processes have ended when the
    block has. If this process has already joined Ray, the block uses that connection and leaves it open.

    The output of workers is hidden on a new cluster, and shown on stderr on an existing cluster or with --debug.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    shows_logs = _shows_logs(bool(address))
    # The package is installed on every node; the working folder is not a project to upload.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    if not is_debug():
        # Messages of Ray's C++ core on stderr; its log files keep them.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if not shows_logs:
        # Ray prints messages about dead workers even with log_to_driver=False: skip every line.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    if not address:
        _set_token()
        # Despite its name, 0 makes every process of Ray listen on the loopback interface only.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # Records of tasks would fill the memory of Ray's control service; only a dashboard reads them.
        os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    options = {
        "log_to_driver": shows_logs,
        "logging_level": "INFO" if is_debug() else "WARNING" if shows_logs else "ERROR",
        "configure_logging": True,
    }
    # Ray prints the stdout of workers on stdout, which carries the JSON of a command.
    output = contextlib.redirect_stdout(sys.stderr) if shows_logs else contextlib.nullcontext()
    with output:
        with contextlib.nullcontext() if is_debug() else _without_stderr():
            if address:
                _join(address, options)
            else:
                _start(min_cpus, options)
        session = None if address else ray.get_runtime_context().get_session_name()
        processes = _processes_of(session)
        try:
            yield
        finally:
            processes += _processes_of(session)
            ray.shutdown()
            _end(processes)


def _shows_logs(is_existing: bool) -> bool:
    """Return whether the output of workers is shown; the variable RAY_LOG_TO_DRIVER of Ray has the last word."""
    asked = os.environ.get("RAY_LOG_TO_DRIVER", "")
    return asked.lower() in ("1", "true") if asked else is_existing or is_debug()


def _join(address: str, options: dict[str, Any]) -> None:
    import ray

    try:
        _check_answers(address)
        ray.init(address=address, **options)
    except (OSError, RuntimeError, ValueError) as err:
        raise InputError(f"RAY_ADDRESS={address}: no cluster answers there ({err})") from err


def _start(min_cpus: int, options: dict[str, Any]) -> None:
    for _ in range(START_ATTEMPTS):
        before = {process.pid for process in _processes_of("session_")}
        if _has_started(min_cpus, options):
            return
        _end([process for process in _processes_of("session_") if process.pid not in before])
    raise InputError(
        f"Ray did not start within 30 s, {START_ATTEMPTS} times: this machine is busy or short of memory; run the "
        "command again later, or set RAY_ADDRESS to a running cluster"
    )


def _has_started(min_cpus: int, options: dict[str, Any]) -> bool:
    """Start a local cluster and return True, or False if it took too long."""
    import ray

    num_cpus = min_cpus if len(os.sched_getaffinity(0)) < min_cpus else None
    try:
        # "local": never join another cluster on this machine, or the remains of one.
        ray.init("local", include_dashboard=False, num_cpus=num_cpus, _node_ip_address="127.0.0.1", **options)
    except OSError as err:
        if "AF_UNIX" not in str(err):
            raise
        folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR")
        raise InputError(
            f"the folder for temporary files is {folder!r}: its path is too long for Ray's sockets, whose paths have "
            "at most 107 bytes; set RAY_TMPDIR to a shorter one, such as /tmp"
        ) from err
    except Exception as err:
        # Ray raises no narrower type; its limit of 30 s is fixed.
        if "timed out during startup" not in str(err):
            raise
        return False
    return True


def _processes_of(session: str | None) -> list[Any]:
    """Return the processes of the Ray session that this process has started, as `psutil.Process`.

    A part of its name is enough; all names begin with "session_".
    """
    # Ray ships psutil: it can be imported once ray is.
    import psutil

    found: list[Any] = []
    for child in psutil.Process().children() if session else ():
        # The process, or a part of it, can end at any time.
        with contextlib.suppress(psutil.Error):
            if any(session in word for word in child.cmdline()):
                found += [child, *child.children(recursive=True)]
    return found


def _end(processes: Sequence[Any]) -> None:
    """Wait until the processes have ended; kill those that do not end by themselves.

    Ray kills its node manager after a second. A worker that does not notice, such as one that hangs while it exits,
    would live on with all of its memory.
    """
    import psutil

    def is_running(process: Any) -> bool:
        with contextlib.suppress(psutil.Error):
            return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
        return False

    running = list(set(processes))
    kill_at = time.monotonic() + EXIT_TIMEOUT_S
    while running := [process for process in running if is_running(process)]:
        if time.monotonic() > kill_at:
            for process in running:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        time.sleep(0.02)


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Discard everything written to stderr in the block, from C++ too: Ray's core reports its log level there."""
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
    """Raise `OSError` if nothing listens at HOST:PORT; Ray would try again for twenty minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()


def _set_token() -> None:
    """Set up authentication before ray is imported; by default Ray writes a token into the home folder."""
    mode = os.environ.setdefault("RAY_AUTH_MODE", "token")
    if mode == "token" and not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


class Shortage(NamedTuple):
    """What a cluster lacks: the need and what there is, as the first half of an error message, and the advice."""

    found: str
    advice: str


def check_resources(
    what: str,
    bundles: Sequence[Mapping[str, float]],
    find_more: Callable[[], Shortage | None] = lambda: None,
) -> None:
    """Raise `InputError` if the cluster does not have the resources of these bundles, instead of waiting for them.

    If the environment sets `ORBITHASH_WAIT_FOR_NODES_S`, request nodes from the cluster's autoscaler first and wait
    for them, at most this number of seconds.

    Args:
        what: what needs the resources, the subject of the error message.
        bundles: resources by name, such as {"CPU": 1, "GPU": 0.5}, memory in bytes; each bundle must fit on one node.
        find_more: returns a shortage that the sums over the cluster do not show, such as nodes that are too small.
    """
    needed: Counter[str] = Counter()
    for bundle in bundles:
        needed.update({name: amount for name, amount in bundle.items() if amount})

    def find() -> Shortage | None:
        return _shortage_in_all(what, needed) or find_more()

    patience_s = _patience_s()
    if patience_s and find():
        say(f"{what}: waiting up to {patience_s:g} s for the cluster to add nodes")
        _wait_for_resources(bundles, patience_s)
    if shortage := find():
        raise InputError(
            shortage.found
            + (f" after {patience_s:g} s" if patience_s else "")
            + f"; {shortage.advice}, or set {PATIENCE_VARIABLE} if the cluster adds nodes by itself"
        )


def _shortage_in_all(what: str, needed: Mapping[str, float]) -> Shortage | None:
    """Return the first resource of which all nodes together have too little."""
    import ray

    present = ray.cluster_resources()
    for name, amount in needed.items():
        if amount > present.get(name, 0):
            is_memory = name == "memory"
            asked = f"{amount / 1e9:,.2f} GB of memory" if is_memory else f"{amount:g} {name}s"
            has = f"{present.get(name, 0) / 1e9:,.2f} GB" if is_memory else f"{present.get(name, 0):g}"
            advice = "use more or larger nodes" if is_memory else "ask for fewer"
            return Shortage(f"{what} needs {asked}, the cluster has {has}", advice)
    return None


def _patience_s() -> float:
    """Return the maximum time to wait for nodes, seconds; 0: do not wait."""
    text = os.environ.get(PATIENCE_VARIABLE) or "0"
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds <= MAX_PATIENCE_S:
        raise InputError(f"{PATIENCE_VARIABLE} is {text!r}; seconds from 0 to {MAX_PATIENCE_S:.0f} are allowed")
    return seconds


def _wait_for_resources(bundles: Sequence[Mapping[str, float]], seconds: float) -> None:
    """Reserve the bundles, which makes an autoscaler add nodes, and release them again."""
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([{name: amount for name, amount in each.items() if amount} for each in bundles])
    try:
        group.wait(seconds)
    finally:
        remove_placement_group(group)


def cpus_per_worker(num_workers: int, num_gpus: float = 0) -> int:
    """Return the maximum number of CPUs that each worker can have on the present nodes; at least 1.

    Workers that do not fit on the present nodes do not reduce the share of the others.

    Args:
        num_workers: number of workers, of equal size.
        num_gpus: GPUs of each worker.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def num_fitting(num_cpus: int) -> int:
        """Return how many workers with this number of CPUs fit; a worker uses one node."""
        return sum(
            int(min(node.get("CPU", 0) // num_cpus, node.get("GPU", 0) // num_gpus if num_gpus else math.inf))
            for node in nodes
        )

    num_placed = min(num_workers, num_fitting(1))
    largest = max((int(node.get("CPU", 0)) for node in nodes), default=1)
    return next((num_cpus for num_cpus in range(largest, 1, -1) if num_fitting(num_cpus) >= num_placed), 1)


def check_gpu_share(option: str, num_gpus: float, *, is_whole: bool) -> None:
    """Raise `InputError` for a number of GPUs that a worker or a trial cannot have.

    Ray gives out whole GPUs, or a part of one. NCCL, through which training workers communicate, accepts one rank
    per GPU: with `is_whole`, parts are refused too.
    """
    if not (math.isfinite(num_gpus) and num_gpus >= 0):
        raise InputError(f"{option} is {num_gpus:g}; a number of GPUs, 0 or more, is needed")
    if num_gpus != int(num_gpus) and (is_whole or num_gpus > 1):
        allowed = "a whole number" if is_whole else "a whole number, or a part of one GPU such as 0.25,"
        reason = ": training workers cannot share a GPU" if is_whole else ""
        raise InputError(f"{option} is {num_gpus:g}; {allowed} is needed{reason}")


def device_for(num_gpus: float) -> str:
    """Return the torch device of a Ray task with this number of GPUs, "cuda" or "cpu".

    Call it before CUDA is used: without GPUs of its own the task must not see any. Ray hides GPUs only from tasks
    that reserve some.
    """
    if num_gpus:
        return "cuda"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return "cpu"


def parse_workers(text: str, option: str = "--workers") -> tuple[int, int]:
    """Return MIN and MAX of `MIN:MAX`, or of one number for both; `option` is named in the error."""
    try:
        low, high = (int(part) for part in (text.split(":") if ":" in text else (text, text)))
    except ValueError:
        low = high = 0
    if not 1 <= low <= high:
        raise InputError(f"{option} is {text!r}; MIN:MAX with 1 <= MIN <= MAX, such as 1:4, or one number is needed")
    return low, high


def worker_error(err: Exception) -> Exception:
    """Return the error of a worker, in one line; Ray delivers only the text of its traceback."""
    named = re.findall(r"^(\w[\w.]*): (.+)$", str(err), re.MULTILINE)
    causes = [(name, message) for name, message in named if not name.startswith("ray.")]
    if not causes:
        return err
    name, message = causes[-1]
    if name.rpartition(".")[2] == InputError.__name__:
        return InputError(message)
    return RuntimeError(f"a worker failed: {name}: {message}")


def keeping_memory() -> dict[str, str]:
    """Return environment variables that make a training process on CPUs reuse the memory of each step for the next.

    The C library returns the memory of every large tensor to the system and requests it again, page by page, which
    takes time (docs/results/encoding.md). The allocator that Ray ships can be configured not to do this. Empty if Ray
    ships none.
    """
    import ray

    library = Path(ray.__file__).parent / "core" / "libjemalloc.so"
    if not library.exists():
        return {}
    others = [os.environ["LD_PRELOAD"]] if os.environ.get("LD_PRELOAD") else []
    return {"LD_PRELOAD": ":".join([*others, str(library)]), "MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1"}
