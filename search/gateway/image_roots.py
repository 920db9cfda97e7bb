"""Where the images of rows may be read from again, after they were encoded."""

import re
from collections.abc import Sequence
from pathlib import Path

from orbithash.encoders.errors import InputError
from orbithash.encoders.sources.listings import Item
from orbithash.encoders.sources.remote import check_uri, is_remote

__all__ = ["ImageRoots"]

# What follows the path of a scene in the uri of a tile: column, row, width and height in pixels.
_WINDOW = re.compile(r"#(\d{1,9}),(\d{1,9}),(\d{1,9}),(\d{1,9})\Z")


class ImageRoots:
    """Folders and prefixes of object stores below which images may be read.

    A client that may write rows decides their uri, and must not be able to show other files of the machine.
    """

    def __init__(self, roots: Sequence[str] = ()) -> None:
        """Take folders, and URIs of folders in object stores.

        Raises `InputError` for a folder that does not exist and for an invalid URI.
        """
        self._prefixes = tuple(root.rstrip("/") + "/" for root in roots if is_remote(root))
        for prefix in self._prefixes:
            check_uri(prefix)
        self._folders = tuple(Path(root).resolve() for root in roots if not is_remote(root))
        for folder in self._folders:
            if not folder.is_dir():
                raise InputError(f"{folder} is not a folder; images of rows may be read from folders and URIs")

    def __bool__(self) -> bool:
        return bool(self._prefixes or self._folders)

    def find(self, uri: str) -> Item | None:
        """Return the image that `uri` names, which may be absent; None if it may not be read."""
        match = _WINDOW.search(uri)
        path, window = (uri, None) if match is None else (uri[: match.start()], match)
        if not self._is_below(path):
            return None
        if window is None:
            return Item(path, path)
        col, row, width, height = map(int, window.groups())
        return Item(path, path, window=(col, row, width, height))

    def _is_below(self, path: str) -> bool:
        if "\0" in path:
            return False
        if is_remote(path):
            return path.startswith(self._prefixes) and ".." not in path.split("/")
        try:
            # Follows links, so that none leads out of the folder.
            found = Path(path).resolve() if Path(path).is_absolute() else None
        except (OSError, RuntimeError):
            return False
        return found is not None and any(found.is_relative_to(folder) for folder in self._folders)
