"""Run a verb as a job on a Ray cluster: send it, follow its output, stop it.

The job runs on the cluster's machines, so it needs absolute paths of a shared file system, or URLs. A command that is
sent twice under one job name runs once.
"""

import asyncio
import logging
import os
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

from orbithash.cluster.output import is_debug, say
from orbithash.encoders.errors import InputError, listed

__all__ = ["Cluster", "Job", "Runtime", "check_words", "run_job", "stop_job"]

CONNECT_TIMEOUT_S = 10.0
# Interval between two requests for a job's status, and between two attempts to reconnect.
POLL_S = 1.0
# Maximum time to wait for a cluster that is still starting.
START_S = 30.0
# Maximum time without an answer of the cluster before following ends; the job continues.
LOST_S = 600.0

# Text arguments that are paths or URLs.
_PLACES = ("source", "archive", "data", "out")
# Text arguments that are names, even if a file of the same name exists here.
_NAMES = ("method", "methods", "name", "dataset", "protocol", "prefix", "metric", "index")

_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Cluster:
    """The cluster that jobs are sent to.

    Attributes:
        address: http://HOST:PORT of its dashboard.
        token_file: file with the cluster's token; None: RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or no token if neither
            is set.
    """

    address: str
    token_file: Path | None = None


@dataclass(frozen=True)
class Runtime:
    """The environment of a job.

    Attributes:
        python: Python command on the cluster's nodes.
        wheel: wheel of orbithash to install, for nodes with another version or without it; None: use theirs.
        variables: environment variables.
    """

    python: str
    wheel: Path | None
    variables: Mapping[str, str]

    @classmethod
    def of(cls, python: str, wheel: Path | None, variables: Sequence[str]) -> "Runtime":
        """Return the environment with variables given as NAME=VALUE, or as NAME for its value in this process."""
        if wheel is not None and not (wheel.is_file() and wheel.suffix == ".whl"):
            raise InputError(f"--wheel is {wheel}: not a wheel; `pip wheel --no-deps .` makes one")
        environment = {}
        for text in variables:
            name, equals, value = text.partition("=")
            if not (name.isascii() and name.isidentifier()):
                raise InputError(f"--env is {text!r}; give NAME=VALUE, or the NAME of a variable that is set here")
            if not equals and name not in os.environ:
                raise InputError(f"--env is {name}, which is not set here; set it, or give {name}=VALUE")
            environment[name] = value if equals else os.environ[name]
        return cls(python, wheel, environment)

    def to_ray(self) -> dict[str, Any]:
        """Return Ray's `runtime_env`."""
        modules = {} if self.wheel is None else {"py_modules": [str(self.wheel.absolute())]}
        return {"env_vars": {**self.variables}, **modules}


@dataclass(frozen=True)
class Job:
    """The state of a job; `exit_code` is None while it runs."""

    id: str
    status: str
    message: str
    exit_code: int | None

    @property
    def code(self) -> int:
        """Return the exit code for the command line: that of the job; 1 if it was stopped or lost."""
        return 0 if self.status not in ("FAILED", "STOPPED") else self.exit_code or 1


def check_words(app: Any, words: Sequence[str]) -> None:
    """Raise an error for an invalid command, or for paths that the cluster's machines cannot resolve.

    Args:
        app: the command line as a click command.
        words: the verb and its options.

    Raises:
        InputError: no verb, or relative or local paths.
        Exception: typer's own error for invalid options.
    """
    if not words or words[0].startswith("-"):
        raise InputError("no verb to run; give it after two dashes, as in submit -- train dhcl …")
    command, context, rest = app, None, [*words]
    while hasattr(command, "resolve_command"):
        context = context or command.make_context("orbithash", [*rest])
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, [*rest], parent=context)
    problems: list[str] = []
    assert context is not None, "the command line has verbs"
    for name, value in context.params.items():
        for each in value if isinstance(value, list | tuple) else [value]:
            is_place = isinstance(each, Path) or (name in _PLACES and isinstance(each, str) and "://" not in each)
            is_text = isinstance(each, str) and each and name not in _NAMES
            is_local = is_text and not Path(each).is_absolute() and _exists(each)
            if (is_place and not Path(each).is_absolute()) or is_local:
                problems.append(f"{name} is {str(each)!r}: give an absolute path on a file system that all nodes share")
    if problems:
        raise listed(problems, "the job runs on other machines")


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False


def run_job(
    cluster: Cluster,
    words: Sequence[str],
    job_id: str | None,
    runtime: Runtime,
    detach: bool,
    output: TextIO = sys.stdout,
) -> Job:
    """Send a job and copy its output to `output` until it ends; with `detach`, only send it."""
    job_id = send(cluster, words, job_id, runtime)
    say(f"job {job_id} on {cluster.address}")
    try:
        job = (
            Job(job_id, "PENDING", "", None)
            if detach
            else follow(cluster, job_id, partial(print, end="", flush=True, file=output))
        )
    except KeyboardInterrupt:
        say(f"the job continues; submit --stop {job_id} stops it, the same command with --id {job_id} follows it again")
        raise
    if job.code:
        # The message repeats the logs after its first line.
        say(f"job {job_id} {job.status.lower()}: {job.message.partition(', last available logs')[0]}")
    return job


def stop_job(cluster: Cluster, job_id: str) -> Job:
    """Stop a job and print its final state."""
    job = stop(cluster, job_id)
    say(f"job {job_id} {job.status.lower()}")
    return job


def send(cluster: Cluster, words: Sequence[str], job_id: str | None, runtime: Runtime) -> str:
    """Start `orbithash WORDS` on the cluster unless a job of this id exists; return the id."""
    if job_id is not None and not (job_id.isascii() and job_id.replace("-", "").replace("_", "").isalnum()):
        raise InputError(f"--id is {job_id!r}; letters, digits, - and _ are allowed")
    job_id = job_id or f"orbithash-{words[0]}-{secrets.token_hex(4)}"
    if is_debug():
        words = ["--debug", *words]
    entrypoint = shlex.join([runtime.python, "-m", "orbithash.cluster.cli.main", *words])
    with _client(cluster) as client:
        if there := _find(client, job_id):
            if there.entrypoint != entrypoint:
                raise InputError(f"the cluster has another job named {job_id} ({there.entrypoint}); give another --id")
            say(f"job {job_id} exists already ({there.status.lower()}); not sent again")
            return job_id
        deadline = time.monotonic() + START_S
        while True:
            try:
                client.submit_job(entrypoint=entrypoint, submission_id=job_id, runtime_env=runtime.to_ray())
                break
            except RuntimeError as error:
                # The cluster has just started.
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(POLL_S)
    return job_id


def follow(cluster: Cluster, job_id: str, show: Callable[[str], None]) -> Job:
    """Pass the job's output to `show` until the job ends, across lost connections; return its final state.

    Raises:
        InputError: there is no such job, or the cluster has not answered for `LOST_S`.
    """
    shown = 0
    lost_since: float | None = None

    async def tail(client: Any) -> None:
        nonlocal shown, lost_since
        passed = 0
        # A new connection delivers the output from the beginning.
        async for part in client.tail_job_logs(job_id):
            lost_since = None
            new = part[max(0, shown - passed) :]
            passed += len(part)
            if new:
                shown = passed
                show(new)

    while True:
        try:
            with _client(cluster) as client:
                if _find(client, job_id) is None:
                    raise InputError(f"the cluster has no job {job_id}")
                lost_since = None
                asyncio.run(tail(client))
                job = _job(_find(client, job_id), job_id)
                if job.status in _ENDED:
                    return job
        except _Lost as error:
            now = time.monotonic()
            if lost_since is None:
                lost_since = now
                say(f"the cluster does not answer ({error}); retrying")
            if now - lost_since > LOST_S:
                raise InputError(
                    f"{cluster.address} has not answered for {LOST_S:.0f} s; the job may still run"
                ) from error
        time.sleep(POLL_S)


def stop(cluster: Cluster, job_id: str) -> Job:
    """Stop a job; return its final state."""
    with _client(cluster) as client:
        if _find(client, job_id) is None:
            raise InputError(f"the cluster has no job {job_id}")
        client.stop_job(job_id)
        while (job := _job(_find(client, job_id), job_id)).status not in _ENDED:
            time.sleep(POLL_S)
    return job


class _Lost(InputError):
    """The cluster cannot be reached at the moment."""


@contextmanager
def _client(cluster: Cluster) -> Iterator[Any]:
    address = urlsplit(cluster.address if "://" in cluster.address else f"http://{cluster.address}")
    if address.scheme not in ("http", "https") or not address.hostname:
        raise InputError(f"--address is {cluster.address!r}; give http://HOST:PORT of the cluster's dashboard")
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise _Lost(
            f"no cluster answers at {cluster.address} ({error.strerror or error}); give --address http://HOST:PORT of "
            "its dashboard"
        ) from error
    _set_token(cluster.token_file)
    from aiohttp import ClientError
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    # It reports closed connections, which is how a log ends.
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.ERROR)
    try:
        yield JobSubmissionClient(address.geturl())
    except AuthenticationError as error:
        raise InputError(
            f"{cluster.address} requires a valid token; give --token-file, or set RAY_AUTH_TOKEN"
        ) from error
    except (RuntimeError, OSError, ClientError) as error:
        raise _Lost(f"{cluster.address}: {' '.join(str(error).split())[:200]}") from error


def _set_token(token_file: Path | None) -> None:
    """Set up authentication before ray is imported; by default Ray may write a token into the home folder."""
    if token_file is not None:
        if not token_file.is_file():
            raise InputError(f"--token-file is {token_file}: no such file")
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_file.absolute())
        os.environ.pop("RAY_AUTH_TOKEN", None)
    has_token = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    os.environ["RAY_AUTH_MODE"] = "token" if has_token else "disabled"


def _find(client: Any, job_id: str) -> Any:
    """Return the cluster's record of a job, or None if it has none."""
    try:
        return client.get_job_info(job_id)
    except RuntimeError as error:
        if "does not exist" in str(error) or "404" in str(error):
            return None
        raise


def _job(info: Any, job_id: str) -> Job:
    return Job(job_id, str(info.status.value), info.message or "", info.driver_exit_code)
