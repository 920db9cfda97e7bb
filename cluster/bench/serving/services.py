"""The services that the benchmarks send requests to, each in a process of its own.

They end with the process that started them, however it ends: they wait for the end of a pipe that it holds.
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orbithash.cluster.bench.inputs import write_archive, write_random_model
from orbithash.cluster.output import say
from orbithash.encoders.codes import Codes
from orbithash.search.index.answers import Ids

__all__ = ["ServedArchive", "Service", "main", "start_empty_service", "start_gateway"]

_START_TIMEOUT_S, _STOP_TIMEOUT_S = 180.0, 30.0


@dataclass(frozen=True)
class Service:
    """A running service: HOST:PORT, process id, and the file of its stderr."""

    address: str
    pid: int
    log: Path


@dataclass(frozen=True)
class ServedArchive:
    """An archive and the folder of a model for it; ids uint64 [N], ascending, and codes uint8 [N, B] of its rows."""

    path: Path
    model: Path
    ids: Ids
    codes: Codes

    @classmethod
    def write(cls, root: Path, codes: Codes, bits: int, has_footprints: bool = False) -> "ServedArchive":
        """Write an archive of codes uint8 [N, B], and a model, into the folder `root`."""
        from orbithash.encoders.networks.card import read_model_folder

        say(f"writing an archive of {len(codes)} rows")
        model = write_random_model(root / "model", bits)
        path = root / "archive"
        return cls(path, model, *write_archive(path, codes, bits, read_model_folder(model)[1], has_footprints))


def start_gateway(
    archive: ServedArchive, shards: int, local: bool, replicas: int = 1
) -> AbstractContextManager[Service]:
    """Run `orbithash serve` over an archive for as long as the block lasts."""
    where = "local" if local else "ray"
    return _started("gateway", archive.path, archive.model, str(shards), where, str(replicas))


def start_empty_service(response: Path) -> AbstractContextManager[Service]:
    """Run a gRPC service that answers every search with the serialised SearchResponse in a file."""
    return _started("empty", response)


@contextmanager
def _started(*arguments: str | Path) -> Iterator[Service]:
    program = "from orbithash.cluster.bench.serving.services import main; main()"
    with TemporaryDirectory() as folder:
        log = Path(folder) / "stderr"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-c", program, *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                # Ctrl-C goes to the parent only, which then ends its services in order.
                start_new_session=True,
            )
        try:
            yield Service(_address_of(process, log), process.pid, log)
        finally:
            assert process.stdin is not None, "stdin is a pipe"
            process.stdin.close()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except BaseException:
                process.kill()
                process.wait()
                raise


def _address_of(process: subprocess.Popen[bytes], log: Path) -> str:
    """Wait until the service is ready and return its HOST:PORT."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not (found := re.search(r"ready at (\S+);", log.read_text())):
        if process.poll() is not None or time.monotonic() > deadline:
            lines = log.read_text().splitlines() or ["no output"]
            raise RuntimeError(f"a service did not start: {lines[-1]}")
        time.sleep(0.05)
    return found[1]


def main() -> None:
    """Run a service; the arguments are those of `_started`."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    kind, *arguments = sys.argv[1:]
    if kind == "empty":
        asyncio.run(_serve_response(Path(arguments[0])))
        return
    from orbithash.cluster.serving.serve import serve
    from orbithash.cluster.serving.settings import ServeSettings

    archive, model, shards, where, replicas = arguments
    # serve requires a model; queries by code do not use it.
    settings = ServeSettings(
        archive,
        Path(model),
        "127.0.0.1:0",
        num_shards=int(shards),
        num_replicas=int(replicas),
        index="exact",
        segments=Path(archive).with_name("segments"),
        is_local=where == "local",
    )
    serve(settings)


def _end_with_parent() -> None:
    # The parent never writes, so this returns when its end of the pipe is closed.
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_STOP_TIMEOUT_S)
    os._exit(1)


async def _serve_response(file: Path) -> None:
    """Answer every search with the same response: the same messages and server as a gateway, without any work."""
    import grpc

    from orbithash.v1 import search_pb2

    response = search_pb2.SearchResponse.FromString(file.read_bytes())

    async def search(request: search_pb2.SearchRequest, context: Any) -> search_pb2.SearchResponse:
        return response

    method = grpc.unary_unary_rpc_method_handler(
        search, search_pb2.SearchRequest.FromString, search_pb2.SearchResponse.SerializeToString
    )
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    service = grpc.method_handlers_generic_handler("orbithash.v1.SearchService", {"Search": method})
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    say(f"ready at 127.0.0.1:{port}; an empty service")
    await server.wait_for_termination()
