"""The storage of a run's checkpoints: the run folder, or any file system that pyarrow supports.

RUN/ray, or STORAGE/ray    the last checkpoint, the best ones, and Ray Train's own list of them
"""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs as filesystems

from orbithash.encoders.errors import InputError
from orbithash.encoders.sources.remote import is_remote

__all__ = ["NAME", "Storage"]

# Ray Train's folder inside the storage.
NAME = "ray"

# Maximum time to wait for a store; the clients of S3 and Google retry for minutes.
ANSWER_TIMEOUT_S = 30.0

# Words by which errors of the clients of S3 and Google name a refusal.
REFUSALS = ("ACCESS_DENIED", "AccessDenied", "Forbidden", "PERMISSION_DENIED", "UNAUTHENTICATED", "INVALID_ACCESS_KEY")


@dataclass(frozen=True)
class Storage:
    """A folder of checkpoints: `uri` as Ray Train takes it, an absolute path or a URI that pyarrow knows."""

    uri: str

    @staticmethod
    def of(text: str) -> "Storage":
        """Return the storage at a path or URI; a path becomes absolute."""
        return Storage(text if "://" in text else str(Path(text).absolute()))

    @property
    def is_remote(self) -> bool:
        """Whether the storage is reached over a network."""
        return is_remote(self.uri)

    def check(self, is_new: bool) -> None:
        """Raise `InputError` if no checkpoint can be written, or if a new run would find those of another run."""
        problem: list[BaseException | None] = [InputError(f"--storage {self.uri}: no answer in {ANSWER_TIMEOUT_S:g} s")]

        def attempt() -> None:
            try:
                self._try(is_new)
                problem[0] = None
            except BaseException as err:
                problem[0] = err

        # A daemon thread: a client that still retries does not keep the process alive.
        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(ANSWER_TIMEOUT_S)
        if isinstance(problem[0], InputError):
            raise problem[0]
        if problem[0] is not None:
            raise InputError(f"--storage {self.uri}: {_explain(problem[0])}") from problem[0]

    def _try(self, is_new: bool) -> None:
        try:
            system, path = filesystems.FileSystem.from_uri(self.uri)
        except pa.ArrowInvalid as err:
            raise InputError(
                f"--storage {self.uri}: unknown kind of storage; give a path, s3://BUCKET/PATH or gs://BUCKET/PATH"
            ) from err
        if self.is_remote and system.get_file_info(path.split("/")[0]).type == filesystems.FileType.NotFound:
            raise InputError(f"--storage {self.uri}: the bucket {path.split('/')[0]!r} does not exist; create it first")
        if is_new and system.get_file_info(f"{path}/{NAME}").type != filesystems.FileType.NotFound:
            raise InputError(f"--storage {self.uri} holds the checkpoints of another run; give each run its own folder")
        system.create_dir(path)
        probe = f"{path}/.orbithash"
        with system.open_output_stream(probe) as stream:
            stream.write(b"write test")
        system.delete_file(probe)


def _explain(err: Any) -> str:
    """Return in one line why a storage cannot be written to."""
    message = " ".join(str(err).split())
    if isinstance(err, PermissionError) or any(word in message for word in REFUSALS):
        return "no permission to write there; check the credentials"
    if any(word in message for word in ("NETWORK_CONNECTION", "curlCode", "UNAVAILABLE")):
        return "cannot be reached; check the address and the network"
    return message
