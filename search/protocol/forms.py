"""The forms in which a caller may give an image or a code, and their conversion to bytes.

Neither numpy nor PIL is imported: arrays are read through the buffer protocol, pictures through their `save` method.
"""

import os
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, TypeAlias, overload

from orbithash.encoders.errors import InputError

__all__ = [
    "CODE",
    "IMAGE",
    "MAX_IMAGE_BYTES",
    "CodeField",
    "CodeLike",
    "ImageField",
    "ImageLike",
    "code_bytes",
    "image_bytes",
]

MAX_IMAGE_BYTES = 10 * 2**20


class Picture(Protocol):
    """A `PIL.Image.Image`."""

    def save(self, file: BytesIO, format: str) -> None:
        """Write the picture to `file`."""


# An encoded image file, its path, or a PIL image (which is sent as PNG).
ImageLike: TypeAlias = bytes | bytearray | memoryview | str | os.PathLike[str] | Picture
# A packed code: bytes, or a uint8 array of one dimension, such as a row of `HashModel.encode_images`.
CodeLike: TypeAlias = Any


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


IMAGE, CODE = ImageField("image"), CodeField("code")
