"""A verb as a job of a Ray cluster: sent, followed, stopped.

The job runs on the cluster with the cluster's files, so what it reads and writes has to be named by absolute paths of a
shared file system, or by URLs. Its name makes it idempotent: a command that is sent twice under one name runs once.
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

from orbithash.cluster.output import say
from orbithash.encoders.errors import InputError, listed

__all__ = ["Cluster", "Job", "Runtime", "check_words", "run_job", "stop_job"]

CONNECT_TIMEOUT_S = 10.0
# Between two looks at a job, and two attempts to reach a cluster that was lost.
POLL_S = 1.0
# How long a cluster has that is still starting.
START_S = 30.0
# A cluster that does not answer for so long is given up; the job goes on.
LOST_S = 600.0

# Arguments that are files of the cluster though the command line takes them as text, for they may be URLs.
_PLACES = ("source", "archive")

_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Cluster:
    """Where jobs are sent.

    Attributes:
        address: http://HOST:PORT of its dashboard.
        token_file: with the token that it asks for; None: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or none.
    """

    address: str
    token_file: Path | None = None


@dataclass(frozen=True)
class Runtime:
    """What a job runs in.

    Attributes:
        python: the cluster's.
        wheel: of orbithash itself, where the nodes have another version or none.
        variables: of its environment.
    """

    python: str
    wheel: Path | None
    variables: Mapping[str, str]

    @classmethod
    def of(cls, python: str, wheel: Path | None, variables: Sequence[str]) -> "Runtime":
        """Of variables as NAME=VALUE, or NAME for the value that it has here."""
        if wheel is not None and not (wheel.is_file() and wheel.suffix == ".whl"):
            raise InputError(f"--wheel is {wheel}: not a wheel; `pip wheel --no-deps .` makes one")
        environment = {}
        for text in variables:
            name, equals, value = text.partition("=")
            if not (name.isascii() and name.isidentifier()):
                raise InputError(
                    f"--env is {text!r}; NAME=VALUE, or the NAME of a variable that is set here, is needed"
                )
            if not equals and name not in os.environ:
                raise InputError(f"--env is {name}, which is not set here; set it, or give {name}=VALUE")
            environment[name] = value if equals else os.environ[name]
        return cls(python, wheel, environment)

    def to_ray(self) -> dict[str, Any]:
        """As Ray takes it."""
        modules = {} if self.wheel is None else {"py_modules": [str(self.wheel.absolute())]}
        return {"env_vars": {**self.variables}, **modules}


@dataclass(frozen=True)
class Job:
    """How a job stands; `exit_code` is None while it runs."""

    id: str
    status: str
    message: str
    exit_code: int | None

    @property
    def code(self) -> int:
        """What the command that sent it ends with: as the job itself did, 1 where it was stopped or broke."""
        return 0 if self.status not in ("FAILED", "STOPPED") else self.exit_code or 1


def check_words(app: Any, words: Sequence[str]) -> None:
    """`InputError` for words that are no command, or one that names files which the cluster could not find.

    `app` is the command line as click knows it.
    """
    if not words or words[0].startswith("-"):
        raise InputError("there is nothing to run: give the verb after two dashes, as in submit -- train dhcl …")
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
            is_local = isinstance(each, str) and not Path(each).is_absolute() and _exists(each)
            if (is_place and not Path(each).is_absolute()) or is_local:
                problems.append(f"{name} is {str(each)!r}: give an absolute path of a file system that the nodes share")
    if problems:
        raise listed(problems, "the job runs elsewhere")


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
    """Sends a job, follows it to its end, and hands on to `output` what it prints; with `detach` it is only sent."""
    job_id = send(cluster, words, job_id, runtime)
    say(f"job {job_id} on {cluster.address}")
    try:
        job = (
            Job(job_id, "PENDING", "", None)
            if detach
            else follow(cluster, job_id, partial(print, end="", flush=True, file=output))
        )
    except KeyboardInterrupt:
        say(f"the job goes on; submit --stop {job_id} ends it, the same command with --id {job_id} follows it again")
        raise
    if job.code:
        # After its first line come the logs once more.
        say(f"job {job_id} {job.status.lower()}: {job.message.partition(', last available logs')[0]}")
    return job


def stop_job(cluster: Cluster, job_id: str) -> Job:
    """Ends a job and says how it ended."""
    job = stop(cluster, job_id)
    say(f"job {job_id} {job.status.lower()}")
    return job


def send(cluster: Cluster, words: Sequence[str], job_id: str | None, runtime: Runtime) -> str:
    """Starts `orbithash WORDS` on the cluster, unless a job of that id is there; returns the id."""
    if job_id is not None and not (job_id.isascii() and job_id.replace("-", "").replace("_", "").isalnum()):
        raise InputError(f"--id is {job_id!r}; letters, digits, - and _ are allowed")
    job_id = job_id or f"orbithash-{words[0]}-{secrets.token_hex(4)}"
    entrypoint = shlex.join([runtime.python, "-m", "orbithash.cluster.cli.main", *words])
    with _client(cluster) as client:
        if there := _find(client, job_id):
            if there.entrypoint != entrypoint:
                raise InputError(f"the cluster has another job {job_id} ({there.entrypoint}); give another --id")
            say(f"job {job_id} is there already ({there.status.lower()}); it is not sent again")
            return job_id
        deadline = time.monotonic() + START_S
        while True:
            try:
                client.submit_job(entrypoint=entrypoint, submission_id=job_id, runtime_env=runtime.to_ray())
                break
            except RuntimeError as error:
                # Of a cluster that has just started.
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(POLL_S)
    return job_id


def follow(cluster: Cluster, job_id: str, show: Callable[[str], None]) -> Job:
    """Hands on what the job prints until it ends, across lost connections; returns how it ended.

    Raises `InputError` when there is no such job, or the cluster is gone for `LOST_S`.
    """
    shown = 0
    lost_since: float | None = None

    async def tail(client: Any) -> None:
        nonlocal shown, lost_since
        passed = 0
        # After a lost connection all of it comes again.
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
                say(f"the cluster does not answer ({error}); trying again")
            if now - lost_since > LOST_S:
                raise InputError(f"{cluster.address} has not answered for {LOST_S:.0f} s; the job may go on") from error
        time.sleep(POLL_S)


def stop(cluster: Cluster, job_id: str) -> Job:
    """Ends a job; returns how it stands when it has ended."""
    with _client(cluster) as client:
        if _find(client, job_id) is None:
            raise InputError(f"the cluster has no job {job_id}")
        client.stop_job(job_id)
        while (job := _job(_find(client, job_id), job_id)).status not in _ENDED:
            time.sleep(POLL_S)
    return job


class _Lost(InputError):
    """A cluster that cannot be reached now."""


@contextmanager
def _client(cluster: Cluster) -> Iterator[Any]:
    address = urlsplit(cluster.address if "://" in cluster.address else f"http://{cluster.address}")
    if address.scheme not in ("http", "https") or not address.hostname:
        raise InputError(f"--address is {cluster.address!r}; http://HOST:PORT of the cluster's dashboard is needed")
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise _Lost(
            f"no cluster answers at {cluster.address} ({error.strerror or error}); --address is that of its dashboard"
        ) from error
    _set_token(cluster.token_file)
    from aiohttp import ClientError
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    # Or it says that a connection was closed, which is how logs end.
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.ERROR)
    try:
        yield JobSubmissionClient(address.geturl())
    except AuthenticationError as error:
        raise InputError(
            f"{cluster.address} refuses this token, or the lack of one: give --token-file, or set RAY_AUTH_TOKEN"
        ) from error
    except (RuntimeError, OSError, ClientError) as error:
        raise _Lost(f"{cluster.address}: {' '.join(str(error).split())[:200]}") from error


def _set_token(token_file: Path | None) -> None:
    """Before ray is imported: left to itself it might write a token into the home."""
    if token_file is not None:
        if not token_file.is_file():
            raise InputError(f"--token-file is {token_file}: no such file")
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_file.absolute())
        os.environ.pop("RAY_AUTH_TOKEN", None)
    has_token = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    os.environ["RAY_AUTH_MODE"] = "token" if has_token else "disabled"


def _find(client: Any, job_id: str) -> Any:
    """The cluster's record of a job; None where there is none."""
    try:
        return client.get_job_info(job_id)
    except RuntimeError as error:
        if "does not exist" in str(error) or "404" in str(error):
            return None
        raise


def _job(info: Any, job_id: str) -> Job:
    return Job(job_id, str(info.status.value), info.message or "", info.driver_exit_code)
