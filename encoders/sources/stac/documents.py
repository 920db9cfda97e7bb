"""JSON files of STAC: items, item collections, and static catalogs, which are followed from file to file.

Nothing is read from a network: links to other machines are counted and left out.
"""

import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from orbithash.encoders.errors import InputError
from orbithash.encoders.sources.listings import locate, read_json
from orbithash.encoders.sources.remote import is_remote

__all__ = ["STAC_SUFFIXES", "Documents", "Feature", "id_of", "is_item"]

STAC_SUFFIXES = (".json", ".geojson")


@dataclass(frozen=True)
class Feature:
    """An entry of an item collection, or an item of a catalog; `content` may be anything that JSON can hold."""

    content: Any
    file: Path


@dataclass
class Documents:
    """Files that are read one after another, with all that their catalogs link to.

    Attributes:
        paths: item collections, items, catalogs and collections.
        left_out: counts by kind the links that are not followed; each kind names the first one.
        groups: number of items by the catalog or collection that links to them, of the last pass.
    """

    paths: Sequence[Path]
    left_out: Counter[str] = field(default_factory=Counter)
    groups: Counter[str] = field(default_factory=Counter)

    def ids(self) -> Iterator[str]:
        """Yield the ids of all features, as `features` does; "" for one without an id."""
        return (id_of(feature.content) for feature in self.features())

    def features(self) -> Iterator[Feature]:
        """Yield the features of all files, in the order of the links; one file is in memory at a time.

        A file that several catalogs link to is read once, so that circles of links end.

        Raises:
            InputError: a file of `paths` that is not a JSON file of STAC.
        """
        self.left_out.clear()
        self.groups.clear()
        self._kinds: dict[str, str] = {}
        seen = set[int]()
        for path in self.paths:
            waiting = [(str(path), "")]
            while waiting:
                name, parent = waiting.pop()
                # 8 bytes of each path, so that millions of items fit.
                if (identity := hash(os.path.realpath(name))) in seen:
                    continue
                seen.add(identity)
                content = self._read(Path(name), is_root=not parent)
                kind = _kind(content)
                if kind == "catalog":
                    group = _shown(content["id"]) if _is_text(content.get("id")) else Path(name).name
                    waiting += reversed([(link, group) for link in self._links(content, Path(name))])
                elif kind == "features":
                    self._note_pages(content)
                    self.groups[parent or Path(name).name] += len(content["features"])
                    yield from (Feature(each, Path(name)) for each in content["features"])
                elif kind == "item":
                    self.groups[parent or Path(name).name] += 1
                    yield Feature(content, Path(name))
                elif parent and content is not None:
                    self._leave_out("files that catalogs link to and that are not STAC", name)
                elif not parent:
                    raise InputError(
                        f"{name} is not a STAC item collection (a FeatureCollection with features of type Feature), "
                        "an item, a catalog or a collection"
                    )

    def _read(self, path: Path, is_root: bool) -> Any:
        """Return the content of a JSON file; None, and a note, for a linked file that cannot be read."""
        try:
            return read_json(path)
        except InputError:
            if is_root:
                raise
            self._leave_out("files that catalogs link to and that are not readable as JSON", str(path))
            return None

    def _links(self, content: dict[str, Any], file: Path) -> Iterator[str]:
        """Yield the paths of the files that a catalog links to as its children and items."""
        assets = content.get("assets")
        for asset in assets.values() if isinstance(assets, dict) else ():
            roles = asset.get("roles") if isinstance(asset, dict) else None
            if isinstance(roles, list) and {"collection-mirror", "stac-items"} & {str(role) for role in roles}:
                self._leave_out("copies of all items in one file (encode that file instead)", str(asset.get("href")))
        links = content.get("links")
        links = [link for link in links if isinstance(link, dict)] if isinstance(links, list) else []
        own = next((link.get("href") for link in links if link.get("rel") == "self"), None)
        for link in links:
            href = link.get("href")
            if link.get("rel") not in ("child", "item") or not isinstance(href, str) or not href:
                if link.get("rel") == "items" and isinstance(href, str):
                    self._leave_out("links of catalogs to the items of an API (save its pages as files)", href)
                continue
            try:
                path = _local_copy(href, own, file)
                is_there = path is not None and Path(path).is_file()
            # A name that no file system allows.
            except (OSError, ValueError):
                path, is_there = href, False
            if path is not None and is_there:
                yield path
            elif path is not None:
                self._leave_out("links of catalogs to files that do not exist", path)
            else:
                self._leave_out("links of catalogs to other machines (copy the files here)", href)

    def _note_pages(self, content: dict[str, Any]) -> None:
        links = content.get("links")
        for link in links if isinstance(links, list) else []:
            if isinstance(link, dict) and link.get("rel") == "next":
                self._leave_out(
                    "links to the next page of an API, which are not followed (save the pages as files and list them "
                    "in a .txt)",
                    str(link.get("href")),
                )

    def _leave_out(self, kind: str, example: str) -> None:
        self.left_out[self._kinds.setdefault(kind, f"{kind}, such as {_shown(example)}")] += 1


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _shown(text: str) -> str:
    """Return a text as it is shown: in one line of characters that can be printed."""
    return (text if text.isprintable() else ascii(text))[:200]


def is_item(content: Any) -> bool:
    """Return whether a value of JSON is an object of type Feature."""
    return isinstance(content, dict) and content.get("type") == "Feature"


def id_of(content: Any) -> str:
    """Return the id of an item; "" without one."""
    name = content.get("id") if is_item(content) else None
    return name if isinstance(name, str) else ""


def _kind(content: Any) -> str:
    """Return what a JSON file holds: "catalog", "features", "item" or ""."""
    if not isinstance(content, dict):
        return ""
    kind = content.get("type")
    if kind == "FeatureCollection":
        features = content.get("features")
        return "features" if isinstance(features, list) and (not features or any(map(is_item, features))) else ""
    if kind == "Feature":
        return "item"
    # STAC before 1.0 has catalogs without a type.
    is_catalog = kind in ("Catalog", "Collection") or (kind is None and "stac_version" in content)
    return "catalog" if is_catalog and isinstance(content.get("links"), list) else ""


def _local_copy(href: str, own: Any, file: Path) -> str | None:
    """Return the path of a linked file; None if it is on another machine and has no copy beside `file`.

    A published catalog may have absolute links. `own` is the address that it gives itself: the way from there to the
    linked file is the way from `file` to its copy.
    """
    if not is_remote(href):
        return locate(href, file.parent)
    if not isinstance(own, str) or not is_remote(own):
        return None
    here, there = urlsplit(own), urlsplit(href)
    if (here.scheme, here.netloc) != (there.scheme, there.netloc):
        return None
    way = posixpath.relpath(unquote(there.path), posixpath.dirname(unquote(here.path)) or "/")
    copy = file.parent / way
    return str(copy) if copy.is_file() else None
