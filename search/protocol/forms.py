"""The forms in which a caller may give an image, a code or a vector, and their conversion to bytes.

Neither numpy nor PIL is imported: arrays are read through the buffer protocol, pictures through their `save` method.
"""

import math
import os
import struct
import sys
from array import array
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, TypeAlias, overload

from orbithash.encoders.errors import InputError

__all__ = [
    "CODE",
    "IMAGE",
    "MAX_IMAGE_BYTES",
    "MAX_VECTOR_DIMS",
    "VECTOR",
    "CodeField",
    "CodeLike",
    "ImageField",
    "ImageLike",
    "VectorField",
    "VectorLike",
    "code_bytes",
    "image_bytes",
    "vector_bytes",
    "vector_problem",
]

MAX_IMAGE_BYTES = 10 * 2**20
MAX_VECTOR_DIMS = 16_384


class Picture(Protocol):
    """A `PIL.Image.Image`."""

    def save(self, file: BytesIO, format: str) -> None:
        """Write the picture to `file`."""


# An encoded image file, its path, or a PIL image (which is sent as PNG).
ImageLike: TypeAlias = bytes | bytearray | memoryview | str | os.PathLike[str] | Picture
# A packed code: bytes, or a uint8 array of one dimension, such as a row of `HashModel.encode_images`.
CodeLike: TypeAlias = Any
# A vector: a float array of one dimension, a sequence of numbers, or the bytes of little-endian float32.
VectorLike: TypeAlias = Any


def image_bytes(image: ImageLike) -> bytes:
    """Return an encoded image file.

    Args:
        image: the file's bytes, its path, or a PIL image.

    Raises:
        InputError: the file cannot be read or has more than `MAX_IMAGE_BYTES`, the picture cannot be written as PNG, or
            `image` is something else.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        return _read(Path(image))
    if not callable(getattr(image, "save", None)):
        raise InputError(
            f"an image is given as the bytes of a file, a path or a PIL image, got {type(image).__name__}; for an "
            "array of pixels use PIL.Image.fromarray"
        )
    buffer = BytesIO()
    try:
        image.save(buffer, "PNG")
    except (OSError, ValueError) as error:
        raise InputError(f"the PIL image cannot be sent as PNG ({error}); convert it to RGB first") from error
    return buffer.getvalue()


def code_bytes(code: CodeLike) -> bytes:
    """Return a packed code as bytes.

    Args:
        code: bytes, or a uint8 array of one dimension, packed as by `numpy.packbits`.

    Raises:
        InputError: anything else.
    """
    if isinstance(code, bytes):
        return code
    try:
        view = memoryview(code)
    except TypeError:
        raise InputError(f"a code is bytes or a uint8 array, got {type(code).__name__}") from None
    if view.format != "B" or view.ndim != 1:
        raise InputError(
            f"a code is a uint8 array of shape [bytes], got shape {list(view.shape or ())} of format {view.format!r}; "
            "pack bits with numpy.packbits and pass one row at a time"
        )
    return view.tobytes()


def vector_bytes(vector: VectorLike) -> bytes:
    """Return a vector as the bytes of little-endian float32, unchecked; see `vector_problem`.

    Args:
        vector: a float16, float32 or float64 array of one dimension, a list or tuple of numbers, or the bytes.

    Raises:
        InputError: anything else.
    """
    if isinstance(vector, bytes):
        return vector
    if isinstance(vector, list | tuple):
        return _float32(vector)
    try:
        view = memoryview(vector)
    except (TypeError, ValueError, BufferError):
        raise InputError(f"a vector is a float array or a list of numbers, got {type(vector).__name__}") from None
    kind = (view.format or "").lstrip("@=<")
    if view.ndim != 1 or kind not in ("e", "f", "d"):
        raise InputError(
            f"a vector is an array of shape [dimensions] of float16, float32 or float64, got shape "
            f"{list(view.shape or ())} of format {view.format!r}; convert it with astype('float32'), one row at a time"
        )
    data = view.tobytes()
    return _float32(struct.unpack(f"={len(data) // struct.calcsize(kind)}{kind}", data))


def vector_problem(vector: bytes) -> str | None:
    """Return what is wrong with a vector, as bytes, for every model; None if nothing is."""
    if not vector:
        return "a vector has at least one dimension, got none"
    if len(vector) % 4 or len(vector) > 4 * MAX_VECTOR_DIMS:
        return f"a vector has 4 bytes for each of at most {MAX_VECTOR_DIMS:,} dimensions, got {len(vector):,} bytes"
    numbers = struct.unpack(f"<{len(vector) // 4}f", vector)
    if not all(map(math.isfinite, numbers)):
        place = next(place for place, number in enumerate(numbers) if not math.isfinite(number))
        return f"a vector is finite in float32, got {numbers[place]} in dimension {place}"
    return None


def _float32(numbers: Sequence[float]) -> bytes:
    try:
        packed = array("f", numbers)
    except (TypeError, OverflowError) as error:
        raise InputError(f"a vector is a list of numbers ({error})") from None
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_IMAGE_BYTES + 1)
            size = os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if len(data) > MAX_IMAGE_BYTES:
        raise InputError(f"{path} has {size:,} bytes; an image has at most {MAX_IMAGE_BYTES:,}: send a smaller one")
    return data


class _BytesField:
    """A dataclass field that holds bytes or None; the default is None."""

    def __init__(self, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> None: ...
    @overload
    def __get__(self, instance: object, owner: type) -> bytes | None: ...
    def __get__(self, instance: object | None, owner: type) -> bytes | None:
        # dataclasses read the default from the class.
        value: bytes | None = None if instance is None else instance.__dict__.get(self._name)
        return value


class ImageField(_BytesField):
    """A dataclass field that takes any `ImageLike` and holds the bytes of the file."""

    def __set__(self, instance: object, value: ImageLike | None) -> None:
        instance.__dict__[self._name] = None if value is None else image_bytes(value)


class CodeField(_BytesField):
    """A dataclass field that takes any `CodeLike` and holds a packed code as bytes."""

    def __set__(self, instance: object, value: CodeLike | None) -> None:
        instance.__dict__[self._name] = None if value is None else code_bytes(value)


class VectorField(_BytesField):
    """A dataclass field that takes any `VectorLike` and holds the bytes of little-endian float32."""

    def __set__(self, instance: object, value: VectorLike | None) -> None:
        instance.__dict__[self._name] = None if value is None else vector_bytes(value)


IMAGE, CODE, VECTOR = ImageField("image"), CodeField("code"), VectorField("vector")
