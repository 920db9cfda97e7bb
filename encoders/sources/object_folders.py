"""Folders of images in object stores, as training reads them: a listing, and whole objects by name."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.imagery.rendering import Limits
from orbithash.encoders.sources.folders import Folder, is_image_name, is_shown, log_left_out, natural
from orbithash.encoders.sources.remote import read_object, walk_objects

__all__ = ["RemoteFolder"]

# Objects that are read at once: each answer of a store takes tens of milliseconds, whatever the number of cores.
_AT_ONCE = 16
# Objects that wait for a thread, so that their number needs no memory.
_BLOCK = 1024

_LIMITS = Limits()

Result = TypeVar("Result")


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of images at a URI. Credentials are those of the environment."""

    location: str

    def __str__(self) -> str:
        return self.location

    def sources(self, names: Sequence[str]) -> list[bytes]:
        """Return the content of each image.

        Raises:
            ImageError: one is absent, or too long.
            InputError: the store gives no answer, or no permission.
        """
        return list(self.each(names, bytes))

    def each(self, names: Sequence[str], make: Callable[[bytes], Result]) -> Iterator[Result]:
        """Yield what `make` returns for the content of each image, in their order; several are read at once.

        Errors are those of `sources`.
        """

        def read(name: str) -> Result:
            try:
                return make(read_object(self._address(name), _LIMITS))
            except ImageError as err:
                raise ImageError(f"{self}: {name}: {err}") from err

        if len(names) == 1:
            yield read(names[0])
            return
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for start in range(0, len(names), _BLOCK):
                yield from pool.map(read, names[start : start + _BLOCK])

    def objects(self) -> dict[str, tuple[int, int]]:
        """Return size and time of the last change, nanoseconds of the epoch, of each object by its name."""
        listed = {}
        for name, _, version in walk_objects(self.location):
            size, _, changed = version.partition("-")
            listed[name] = (int(size), int(changed))
        return listed

    def image_names(self, objects: Iterable[str]) -> dict[Folder, list[str]]:
        """Return the names of the images in each folder, in natural order, as `walk_folder` yields them.

        Raises:
            InputError: no images.
        """
        left_out: Counter[str] = Counter()
        found: dict[Folder, list[str]] = {}
        for path in sorted(objects, key=natural):
            *folders, name = path.split("/")
            if all(map(is_shown, folders)) and is_image_name(name, left_out):
                found.setdefault(tuple(folders), []).append(name)
        log_left_out(self.location, left_out)
        if not found:
            raise InputError(f"{self} holds no image; give s3://BUCKET/FOLDER with one folder for each class in it")
        return found

    def _address(self, name: str) -> str:
        parts = urlsplit(self.location)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))
