"""Items of a source that an archive does not have yet."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.archive.stamps import file_version, same_content
from orbithash.encoders.errors import InputError
from orbithash.encoders.sources.sources import Item, count_source, iter_source
from orbithash.encoders.sources.tiles import tile_key
from orbithash.trainers.datasets import find_items

__all__ = ["Portion", "Source", "new_items"]

# Items of one run of the stages: the start of Ray Data's actors takes seconds, an item in the driver a few hundred
# bytes.
PORTION = 2**20

# Keys that are looked up in the archive together.
LOOK_UP = 10_000

# Threads that ask the file system for sizes and times. A network drive answers many questions at once.
NUM_THREADS = 16


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of items, and how their keys and captions are made (see `iter_source`)."""

    location: str
    tile_px: int | None = None
    asset: str | None = None
    prefix: str = ""
    captions: Path | None = None

    def items(self, left_out: Counter[str] | None = None) -> Iterator[Item]:
        """Yield the items, with the labels and captions that training finds in the same folder."""
        return iter_source(self.location, self.tile_px, left_out=left_out, **self._options())

    def whole_items(self) -> Iterator[Item]:
        """Yield the items without cutting scenes into tiles."""
        return iter_source(self.location, left_out=Counter(), **self._options())

    def count(self, left_out: Counter[str] | None = None, groups: Counter[str] | None = None) -> int:
        """Return the number of items; raise the errors of the whole source. The counters are those of `iter_source`."""
        return count_source(self.location, self.tile_px, left_out=left_out, groups=groups, **self._options())

    def _options(self) -> dict[str, Any]:
        return {"asset": self.asset, "prefix": self.prefix, "captions": self.captions, "find_items": find_items}


@dataclasses.dataclass
class Portion:
    """A number of items of a source, looked up in an archive.

    Attributes:
        items: those to encode, each with its version.
        replacing: keys of items whose rows were made from other content: these rows are replaced.
        retried: keys of items to encode that were refused before.
        resolved: keys of refused items that have a row of the same content: no longer refused.
        num_done: number of items that have a row of their content.
        num_refused: number of items that were refused before and have not changed.
    """

    items: list[Item] = dataclasses.field(default_factory=list)
    replacing: set[str] = dataclasses.field(default_factory=set)
    retried: set[str] = dataclasses.field(default_factory=set)
    resolved: set[str] = dataclasses.field(default_factory=set)
    num_done: int = 0
    num_refused: int = 0

    @property
    def num_items(self) -> int:
        """Number of items that were looked up."""
        return len(self.items) + self.num_done + self.num_refused


def new_items(items: Iterable[Item], target: Archive, retry_refused: bool = False) -> Iterator[Portion]:
    """Yield the items in portions, of which those are to be encoded that are new or have changed.

    An item is the same as a row with its key when its size and times are the same, or else its content. Other content
    at the same place replaces the row.

    Args:
        items: items of one source.
        target: the archive.
        retry_refused: encode refused items although they have not changed.

    Raises:
        InputError: the row with the key of an item was made from another image at another place.
    """
    items, portion = iter(items), Portion()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        while chunk := list(itertools.islice(items, LOOK_UP)):
            # The tiles of a scene share its file.
            paths = list(dict.fromkeys(item.path for item in chunk if item.version is None))
            versions = dict(zip(paths, pool.map(file_version, paths), strict=True))
            chunk = [dataclasses.replace(item, version=item.version or versions[item.path]) for item in chunk]
            keys = [item.key for item in chunk]
            origins, refused = target.origins(keys), target.refused_stamps(keys)
            for item in chunk:
                _sort(item, origins, refused, portion, retry_refused)
            if len(portion.items) >= PORTION:
                yield portion
                portion = Portion()
    if portion.num_items:
        yield portion


def _sort(
    item: Item,
    origins: Mapping[str, tuple[str, str | None]],
    refused: Mapping[str, str | None],
    portion: Portion,
    retry_refused: bool,
) -> None:
    """Count an item as done, as refused before, or put it among the items to encode."""
    # An item with a problem has no image; it is refused, and a row with its key stays.
    origin = None if item.problem else origins.get(item.key)
    if origin is not None and _is_unchanged(item, *origin):
        portion.num_done += 1
        if item.key in refused:
            portion.resolved.add(item.key)
        return
    if item.key in refused:
        if not retry_refused and _was_refused(item, refused[item.key]):
            portion.num_refused += 1
            return
        portion.retried.add(item.key)
    if origin is not None:
        portion.replacing.add(item.key)
    portion.items.append(item)


def _is_unchanged(item: Item, uri: str, stamp: str | None) -> bool:
    """Return whether a row of this URI and stamp was made from the item as it is now."""
    here = item.path if item.window is None else tile_key(item.path, item.window)
    # Rows that came through a gateway have no stamp; their URI may be the key.
    is_same = uri in (here, item.key) if stamp is None else same_content(stamp, item.path, item.version)
    if is_same or uri == here:
        return is_same
    raise InputError(
        f"the archive has a row {item.key!r} of another image, {uri}; this one is {here}. Give --prefix NAME to store "
        "the images of this source under keys NAME/..., or delete the row first"
    )


def _was_refused(item: Item, stamp: str | None) -> bool:
    """Return whether it is the item as it is now that was refused; a stamp of None means a file that did not exist."""
    return item.version is None if stamp is None else same_content(stamp, item.path, item.version)
