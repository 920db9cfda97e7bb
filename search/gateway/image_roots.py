"""Where the images of rows may be read from again, after they were encoded."""

from collections.abc import Sequence
from pathlib import Path

from orbithash.encoders.errors import InputError
from orbithash.encoders.sources.listings import Item
from orbithash.encoders.sources.remote import check_uri, is_remote
from orbithash.encoders.sources.tiles import split_tile_key

__all__ = ["ImageRoots"]


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
        path, window = split_tile_key(uri)
        return Item(path, path, window=window) if self._is_below(path) else None

    def _is_below(self, path: str) -> bool:
        if "\0" in path:
            return False
        if is_remote(path):
            return path.startswith(self._prefixes) and ".." not in path.split("/")
        if not Path(path).is_absolute():
            return False
        try:
            # Follows links, so that none leads out of the folder.
            found = Path(path).resolve()
            # Python 3.13 resolves only a part of links that lead to each other.
            if found.is_symlink():
                return False
        except (OSError, RuntimeError):
            return False
        return any(found.is_relative_to(folder) for folder in self._folders)
