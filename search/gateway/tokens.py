"""Who may call a gateway: a file of tokens, and how a client keeps its own."""

import hashlib
import hmac
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orbithash.encoders.errors import InputError, listed

__all__ = ["Holder", "Role", "Tokens", "read_token"]

logger = logging.getLogger(__name__)

Role = Literal["read", "write"]

MIN_TOKEN_CHARS = 16
_MAX_FILE_BYTES = 2**20


@dataclass(frozen=True)
class Holder:
    """Whoever has a token. The role `write` includes `read`."""

    name: str
    role: Role

    def may(self, role: Role) -> bool:
        """Whether it may do what `role` is needed for."""
        return role in (self.role, "read")


class Tokens:
    """The tokens of a file, one a line: ROLE TOKEN NAME with the roles read and write; `#` begins a comment line.

    The file is read again when it has changed. One that is damaged then changes nothing but the log.
    """

    def __init__(self, path: Path) -> None:
        """Raises `InputError` with all that is wrong with the file."""
        self._path = path
        self._stamp = _stamp(path)
        self._holders = _read(path)

    def holder(self, token: str) -> Holder | None:
        """Whose token this is; None: nobody's."""
        self._refresh()
        # Digests have one length, and all are compared: the time tells neither how long nor how right a guess was.
        digest = _digest(token)
        found = None
        for known, holder in self._holders:
            if hmac.compare_digest(known, digest):
                found = holder
        return found

    def _refresh(self) -> None:
        try:
            stamp = _stamp(self._path)
        except InputError:
            stamp = ()
        if stamp == self._stamp:
            return
        # Also of a damaged file: it is read, and complained of, once.
        self._stamp = stamp
        try:
            self._holders = _read(self._path)
        except InputError as error:
            logger.warning("the tokens stay as they were: %s", error)
        else:
            logger.info("%s was read again: %d tokens", self._path, len(self._holders))


def read_token(path: Path) -> str:
    """A client's token, the only line of a file; `InputError` for anything else."""
    lines = _text(path).split()
    if len(lines) != 1:
        raise InputError(f"{path}: a token file of a client holds one token and nothing else, got {len(lines)} words")
    return lines[0]


def _read(path: Path) -> list[tuple[bytes, Holder]]:
    holders: dict[bytes, Holder] = {}
    problems = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        # Nothing of a line is repeated: any word may be a token in the wrong place.
        if len(words) != 3:
            problems.append(f"line {number}: it has {len(words)} words; ROLE TOKEN NAME are needed")
            continue
        role, token, name = words
        if role not in ("read", "write"):
            problems.append(f"line {number}: the first word is no role; there are read and write")
        if len(token) < MIN_TOKEN_CHARS:
            problems.append(f"line {number}: a token of {len(token)} characters; at least {MIN_TOKEN_CHARS} are needed")
        if not (token.isascii() and token.isprintable()):
            problems.append(f"line {number}: a token is of printable ASCII characters")
        if not name.isprintable():
            problems.append(f"line {number}: a name is of printable characters")
        if _digest(token) in holders:
            problems.append(f"line {number}: this token is there already; each needs its own")
        holders[_digest(token)] = Holder(name, "write" if role == "write" else "read")
    if not problems and not holders:
        problems.append("no token in it, so nobody could call; write a line ROLE TOKEN NAME")
    if problems:
        raise listed(problems, str(path))
    return list(holders.items())


def _text(path: Path) -> str:
    """Of a file that only its owner reads."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise InputError(f"{path} may be read or written by others than its owner: chmod 600 {path}")
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) > _MAX_FILE_BYTES:
        raise InputError(f"{path} has more than {_MAX_FILE_BYTES:,} bytes; it is no file of tokens")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text") from error


def _stamp(path: Path) -> tuple[int, ...]:
    """Another one when the file is another."""
    try:
        stat = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    # With the mode, so that one that was readable by others is looked at again.
    return stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_mode


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
