"""Where the images of a data set are: a local folder, a folder in an object store, or a packed data set.

A local folder is its `Path`. The others are values that can be sent to other processes and open nothing before they are
read. Their `sources` returns the bytes of images by name, and `str` a location that `image_root` turns into an equal
value.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from orbithash.encoders.errors import InputError
from orbithash.encoders.sources.object_folders import RemoteFolder
from orbithash.encoders.sources.packed import PackedImages, is_packed
from orbithash.encoders.sources.remote import check_uri, is_remote, path_of

__all__ = ["ImageRoot", "image_root", "local_folder", "read_together", "sources_of"]

# Images of other roots than local folders that a thread reads at once, before it decodes one after another.
_TOGETHER = 16


ImageRoot: TypeAlias = Path | RemoteFolder | PackedImages


def image_root(data: str | ImageRoot) -> ImageRoot:
    """Return the root at a path or a URI, of folders the absolute path; nothing is opened.

    Raises:
        InputError: an empty text, or a URI of another kind than s3:// and gs://, or with a secret in it.
    """
    if not isinstance(data, str | Path):
        return data
    if not (text := str(data)):
        raise InputError("the path of the data is empty; give a folder, a URI or a packed data set")
    if is_remote(text):
        check_uri(text)
        return (PackedImages if is_packed(text) else RemoteFolder)(text.rstrip("/"))
    folder = Path(path_of(text)).absolute()
    return PackedImages(str(folder)) if is_packed(text) else folder


def local_folder(root: ImageRoot, what: str) -> Path:
    """Return the path of a local root; `InputError` for another one, where `what` (a plural) must not be."""
    if not isinstance(root, Path):
        kind = "a packed data set" if isinstance(root, PackedImages) else "remote"
        raise InputError(f"{root} is {kind}; {what} must be local files: give the path of a folder of this machine")
    return root


def sources_of(root: ImageRoot, names: Sequence[Path | str]) -> Sequence[Path | bytes]:
    """Return what `read_image` takes for each of these paths below a root.

    Raises:
        ImageError: an image in a bucket is absent or too long.
        InputError: the bucket cannot be read, or the packed data set cannot be read, is damaged or lacks an image.
            Local files are not opened here.
    """
    return [root / name for name in names] if isinstance(root, Path) else root.sources([str(name) for name in names])


def read_together(root: ImageRoot) -> int:
    """Return the number of images that a thread asks for at once."""
    return 1 if isinstance(root, Path) else _TOGETHER
