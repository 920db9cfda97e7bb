"""The manifest: every image of a dataset, in exactly one part."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from orbithash.encoders.errors import InputError, listed
from orbithash.encoders.files import write_file
from orbithash.trainers.datasets.layouts import cut

__all__ = ["FORMAT_VERSION", "Image", "Manifest", "hash_file"]

FORMAT_VERSION = 3


@dataclasses.dataclass(frozen=True)
class Image:
    """One row of a manifest. Paths are relative to the data folder.

    `path` is a file, or a folder of one file a band. `labels` are the indices of the image's classes, empty where they
    are not known. `split` is train, validation, test or database. `captions` are sentences about the image; `second`
    is the image of a second source of the same place, `second_sha256` its hash.
    """

    id: str
    path: str
    labels: tuple[int, ...]
    split: str
    sha256: str
    captions: tuple[str, ...] = ()
    second: str | None = None
    second_sha256: str | None = None

    @property
    def label(self) -> int:
        """The first of its classes; -1 where none is known."""
        return self.labels[0] if self.labels else -1


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The images of a dataset, each in one part, and how they were split."""

    dataset: str
    protocol: str
    seed: int
    validation: float
    classes: tuple[str, ...]
    images: tuple[Image, ...]

    @property
    def sha256(self) -> str:
        """Hash of the manifest's text: equal hashes, equal splits of equal files."""
        return hashlib.sha256(self._text().encode()).hexdigest()

    def part(self, *splits: str) -> list[Image]:
        """The images of these parts, in the manifest's order."""
        return [image for image in self.images if image.split in splits]

    def _text(self) -> str:
        head: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "dataset": self.dataset,
            "protocol": self.protocol,
            "seed": self.seed,
            "validation": self.validation,
            "classes": self.classes,
        }
        return "".join(json.dumps(row) + "\n" for row in [head, *(dataclasses.asdict(i) for i in self.images)])

    def write(self, path: Path) -> None:
        """Writes the manifest as JSON lines: a head, one line an image, the hash of all that."""
        write_file(path, self._text() + json.dumps({"sha256": self.sha256}) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Reads what `write` wrote; `InputError` when it is absent or damaged."""
        try:
            head, *rows, tail = (json.loads(line) for line in path.read_text().splitlines())
            if head.pop("format_version") != FORMAT_VERSION:
                raise ValueError(f"not of format version {FORMAT_VERSION}; it is of another version of orbithash")
            classes = tuple(head.pop("classes"))
            manifest = cls(**head, classes=classes, images=tuple(_image(row) for row in rows))
            if manifest.sha256 != tail["sha256"]:
                raise ValueError("its content does not give the hash in its last line")
        except OSError as err:
            raise InputError(
                f"{path}: the manifest cannot be read ({err.strerror}); is this the folder of a run?"
            ) from err
        except (AttributeError, KeyError, TypeError, ValueError) as err:
            raise InputError(f"{path}: the manifest is damaged ({err})") from err
        return manifest

    def check_files(self, root: Path) -> None:
        """`InputError` that lists every image, of the second source too, that is absent or is another one by now."""
        problems = []

        def check(path: str, sha256: str | None, what: str = "") -> None:
            if not (root / path).exists():
                problems.append(f"{path}: absent{what}")
            elif hash_file(root / path) != sha256:
                problems.append(f"{path}: another file than at the time of the split{what}")

        for image in self.images:
            check(image.path, image.sha256)
            if image.second is not None:
                check(image.second, image.second_sha256, f", the second source of {image.path}")
        if problems:
            raise listed(cut(problems), f"{root} is not the data of this run's manifest")


def hash_file(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of the files in a folder, sorted by name; in hexadecimal."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    whole = hashlib.sha256()
    for inner in sorted(path.iterdir(), key=lambda inner: inner.name):
        if inner.is_file() and not inner.name.startswith("."):
            whole.update(f"{inner.name}\0{hash_file(inner)}\0".encode())
    return whole.hexdigest()


def _image(row: dict[str, Any]) -> Image:
    # JSON knows no tuples.
    return Image(**{**row, "labels": tuple(row["labels"]), "captions": tuple(row["captions"])})
