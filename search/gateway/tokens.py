"""Token files: that of a gateway, with all callers it admits, and that of a client, with its own token."""

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
    """The holder of a token. The role `write` includes `read`."""

    name: str
    role: Role

    def may(self, role: Role) -> bool:
        """Return whether the holder may make calls that need `role`."""
        return role in (self.role, "read")


class Tokens:
    """The tokens of a file with lines ROLE TOKEN NAME, where ROLE is read or write; `#` begins a comment line.

    A changed file is read again. If it is invalid then, a warning is logged and the earlier tokens stay valid.
    """

    def __init__(self, path: Path) -> None:
        """Read the file. Raises `InputError` with all its problems."""
        self._path = path
        self._stamp = _stamp(path)
        self._holders = _read(path)

    def holder(self, token: str) -> Holder | None:
        """Return the holder of a token; None for an unknown token."""
        self._refresh()
        # All digests are compared, in constant time, so that response times reveal nothing about a guess.
        digest = _digest(token)
        match = None
        for known, holder in self._holders:
            if hmac.compare_digest(known, digest):
                match = holder
        return match

    def _refresh(self) -> None:
        try:
            stamp = _stamp(self._path)
        except InputError:
            stamp = ()
        if stamp == self._stamp:
            return
        # Remembered for invalid files, too, so that each is read and reported once.
        self._stamp = stamp
        try:
            self._holders = _read(self._path)
        except InputError as error:
            logger.warning("the earlier tokens stay valid: %s", error)
        else:
            logger.info("%s was read again: %d tokens", self._path, len(self._holders))


def read_token(path: Path) -> str:
    """Return a client's token, the only word of a file. Raises `InputError` for other files."""
    lines = _text(path).split()
    if len(lines) != 1:
        raise InputError(f"{path}: a client's token file holds one token and nothing else, got {len(lines)} words")
    return lines[0]


def _read(path: Path) -> list[tuple[bytes, Holder]]:
    holders: dict[bytes, Holder] = {}
    problems = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        # Messages do not quote the line: any word may be a token in the wrong place.
        if len(words) != 3:
            problems.append(f"line {number}: {len(words)} words; ROLE TOKEN NAME are required")
            continue
        role, token, name = words
        if role not in ("read", "write"):
            problems.append(f"line {number}: the first word is not a role; the roles are read and write")
        if len(token) < MIN_TOKEN_CHARS:
            problems.append(f"line {number}: a token has at least {MIN_TOKEN_CHARS} characters, got {len(token)}")
        if not (token.isascii() and token.isprintable()):
            problems.append(f"line {number}: a token consists of printable ASCII characters")
        if not name.isprintable():
            problems.append(f"line {number}: a name consists of printable characters")
        if _digest(token) in holders:
            problems.append(f"line {number}: an earlier line has the same token; each holder needs its own")
        holders[_digest(token)] = Holder(name, "write" if role == "write" else "read")
    if not problems and not holders:
        problems.append("no tokens, so no caller would be admitted; write a line ROLE TOKEN NAME")
    if problems:
        raise listed(problems, str(path))
    return list(holders.items())


def _text(path: Path) -> str:
    """Return the text of a file that only its owner can read. Raises `InputError` for other files."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise InputError(f"{path} is accessible to other users than its owner; run chmod 600 {path}")
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) > _MAX_FILE_BYTES:
        raise InputError(f"{path} has more than {_MAX_FILE_BYTES:,} bytes; it is not a token file")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text") from error


def _stamp(path: Path) -> tuple[int, ...]:
    """Return a value that changes when the file changes."""
    try:
        stat = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    # With the mode, so that a file whose permissions were mended is read again.
    return stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_mode


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
