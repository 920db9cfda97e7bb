"""Lists in text files: one reader for lists of paths, keys and names."""

from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["read_lines", "split_lines"]


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 text file that are not blank, without their line ends.

    Lines end with LF or CR LF; no other character ends a line. A byte-order mark, which Windows programs write, is
    skipped. Spaces at the ends of a line are kept: they may belong to a name.

    Raises:
        ValueError: the file cannot be read or is not UTF-8, in one line without its path.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as lines:
            yield from split_lines(lines)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8 text") from error


def split_lines(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines of an open text that are not blank, as `read_lines`."""
    for number, line in enumerate(lines):
        text = (line.removeprefix("\ufeff") if number == 0 else line).removesuffix("\n").removesuffix("\r")
        if text.strip():
            yield text
