"""Where Ray Train keeps a run's checkpoints: in the run folder, or on any file system that pyarrow knows.

RUN/ray, or STORAGE/ray    the last checkpoint, the best ones, and Ray Train's own list of them
"""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs as filesystems

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.remote import is_remote

__all__ = ["NAME", "Storage"]

# Ray Train's folder inside the storage.
NAME = "ray"

# A store that does not answer for so long will not: S3 and Google's client try again for minutes.
ANSWER_TIMEOUT_S = 30.0

# What the clients of S3 and Google say of a refusal, in their own words.
REFUSALS = ("ACCESS_DENIED", "AccessDenied", "Forbidden", "PERMISSION_DENIED", "UNAUTHENTICATED", "INVALID_ACCESS_KEY")


@dataclass(frozen=True)
class Storage:
    """A folder of checkpoints: `uri` as Ray Train takes it, an absolute path or a URI that pyarrow knows."""

    uri: str

    @staticmethod
    def of(text: str) -> "Storage":
        """What the user typed; a path becomes absolute."""
        return Storage(text if "://" in text else str(Path(text).absolute()))

    @property
    def is_remote(self) -> bool:
        """Whether writing there takes a network."""
        return is_remote(self.uri)

    def check(self, is_new: bool) -> None:
        """`InputError` where no checkpoint could be written, or where a new run would find those of another."""
        problem: list[BaseException | None] = [InputError(f"--storage {self.uri}: no answer in {ANSWER_TIMEOUT_S:g} s")]

        def attempt() -> None:
            try:
                self._try(is_new)
                problem[0] = None
            except BaseException as err:
                problem[0] = err

        # A daemon: a client that goes on trying does not keep the command from ending.
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
                f"--storage {self.uri}: no such kind of place; a path, s3://BUCKET/PATH or gs://BUCKET/PATH is allowed"
            ) from err
        if self.is_remote and system.get_file_info(path.split("/")[0]).type == filesystems.FileType.NotFound:
            raise InputError(f"--storage {self.uri}: there is no bucket {path.split('/')[0]!r}; make it first")
        if is_new and system.get_file_info(f"{path}/{NAME}").type != filesystems.FileType.NotFound:
            raise InputError(f"--storage {self.uri} holds the checkpoints of another run; give each run a folder")
        system.create_dir(path)
        probe = f"{path}/.orbithash"
        with system.open_output_stream(probe) as stream:
            stream.write(b"a checkpoint can be written here")
        system.delete_file(probe)


def _explain(err: Any) -> str:
    """Why a place cannot be written to, in one line."""
    said = " ".join(str(err).split())
    if isinstance(err, PermissionError) or any(word in said for word in REFUSALS):
        return "no permission to write there; check the credentials"
    if "NETWORK_CONNECTION" in said or "curlCode" in said or "UNAVAILABLE" in said:
        return "it cannot be reached; check the address and the network"
    return said
