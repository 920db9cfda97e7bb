"""A row to be written into an archive, as the gateway and the client see it. Free of numpy and of protobuf."""

import datetime as dt
from dataclasses import dataclass

from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.protocol.queries import MAX_IMAGE_BYTES, MAX_KEY_CHARS

__all__ = ["MAX_ROWS", "Row", "check_keys"]

# Of one message.
MAX_ROWS = 1000
MAX_TEXT_CHARS = 10_000
MAX_FOOTPRINT_BYTES = 64 * 2**10
MAX_THUMBNAIL_BYTES = 256 * 2**10


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row: its key and its code, or the image that the server makes the code (and the thumbnail) of.

    Attributes:
        key: unique in the archive; a row that has it is replaced.
        image: an encoded image file, at most `MAX_IMAGE_BYTES`.
        code: a packed code, by the archive's model.
        uri: what to open to see it; "": the key.
        label, caption, datetime, lon, lat: what is known of it; degrees WGS 84, a datetime without zone is UTC.
        footprint: its outline as WKB, WGS 84.
        thumbnail: a JPEG of at most 128 pixels a side.
    """

    key: str
    image: bytes | None = None
    code: bytes | None = None
    uri: str = ""
    label: str | None = None
    caption: str | None = None
    datetime: dt.datetime | None = None
    lon: float | None = None
    lat: float | None = None
    footprint: bytes | None = None
    thumbnail: bytes | None = None

    def check(self) -> None:
        """Raises `InvalidQuery` with all that can be seen to be wrong without the archive."""
        problems = list(_key_problems(self.key))
        if (self.image is None) == (self.code is None):
            problems.append(("content", "give exactly one of image and code"))
        if self.image is not None and not 0 < len(self.image) <= MAX_IMAGE_BYTES:
            problems.append(("image", f"an image file has 1 to {MAX_IMAGE_BYTES:,} bytes, got {len(self.image):,}"))
        for name, most in (("uri", MAX_KEY_CHARS), ("label", MAX_TEXT_CHARS), ("caption", MAX_TEXT_CHARS)):
            if len(getattr(self, name) or "") > most:
                problems.append((name, f"at most {most:,} characters, got {len(getattr(self, name)):,}"))
        for name, most in (("footprint", MAX_FOOTPRINT_BYTES), ("thumbnail", MAX_THUMBNAIL_BYTES)):
            if len(getattr(self, name) or b"") > most:
                problems.append((name, f"at most {most:,} bytes, got {len(getattr(self, name)):,}"))
        for name, limit in (("lon", 180), ("lat", 90)):
            value = getattr(self, name)
            if value is not None and not -limit <= value <= limit:
                problems.append((name, f"from -{limit} to {limit} degrees, got {value!r}"))
        if problems:
            raise InvalidQuery(*((field, f"{problem} (row {self.key[:80]!r})") for field, problem in problems))


def check_keys(keys: list[str]) -> None:
    """Raises `InvalidQuery` for what cannot be keys of rows."""
    if problems := [problem for key in keys for problem in _key_problems(key)]:
        raise InvalidQuery(*dict.fromkeys(problems))


def _key_problems(key: str) -> list[tuple[str, str]]:
    if 0 < len(key) <= MAX_KEY_CHARS and key.isprintable():
        return []
    return [("key", f"a key has 1 to {MAX_KEY_CHARS:,} characters, all of them printable; got {key[:80]!r}")]
