"""The manifest: every image of a dataset, in exactly one part."""

import dataclasses
import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from orbithash.encoders.errors import InputError, listed
from orbithash.encoders.files import write_file
from orbithash.trainers.datasets.hashes import FileHashes
from orbithash.trainers.datasets.layouts import first_problems

__all__ = ["FORMAT_VERSION", "Image", "Manifest"]

FORMAT_VERSION = 3


@dataclasses.dataclass(frozen=True)
class Image:
    """An image of a manifest. Paths are relative to the data folder.

    `path` is a file, or a folder with one file per band. `labels` are the indices of the image's classes, empty if they
    are unknown. `split` is train, validation, test or database. `captions` are sentences about the image; `second` is
    the image of a second source of the same place, `second_sha256` its hash.
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
        """Index of its first class; -1 if it is unknown."""
        return self.labels[0] if self.labels else -1


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The images of a dataset, each in one part, and the settings of the split."""

    dataset: str
    protocol: str
    seed: int
    validation: float
    classes: tuple[str, ...]
    images: tuple[Image, ...]

    @cached_property
    def sha256(self) -> str:
        """Hash of the manifest's text, in hexadecimal: equal hashes mean equal splits of equal files."""
        return hashlib.sha256(self._text().encode()).hexdigest()

    def part(self, *splits: str) -> list[Image]:
        """Return the images of these parts, in the order of the manifest."""
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
        """Write the manifest as JSON lines: a head, one line per image, and the hash of these lines."""
        text = self._text()
        write_file(path, text + json.dumps({"sha256": self._remember_hash(text.encode())}) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read what `write` wrote; `InputError` when it is missing or damaged."""
        try:
            content = path.read_bytes()
            head, *rows, tail = (json.loads(line) for line in content.decode().splitlines())
            if head.pop("format_version") != FORMAT_VERSION:
                raise ValueError(f"not of format version {FORMAT_VERSION}; it is of another version of orbithash")
            classes = tuple(head.pop("classes"))
            manifest = cls(**head, classes=classes, images=tuple(_image(row) for row in rows))
            if manifest._remember_hash(content[: content.rstrip(b"\n").rfind(b"\n") + 1]) != tail["sha256"]:
                raise ValueError("its content does not match the hash in its last line")
        except OSError as err:
            raise InputError(
                f"{path}: the manifest cannot be read ({err.strerror}); is this the folder of a run?"
            ) from err
        except (AttributeError, KeyError, TypeError, ValueError) as err:
            raise InputError(f"{path}: the manifest is damaged ({err})") from err
        return manifest

    def _remember_hash(self, text: bytes) -> str:
        """Return `sha256`, given the text that it is the hash of."""
        sha256 = hashlib.sha256(text).hexdigest()
        # Where `cached_property` looks for it. The dataclass is frozen.
        self.__dict__["sha256"] = sha256
        return sha256

    def check_files(self, root: Path) -> None:
        """Compare all images with the manifest, those of the second source too.

        Unchanged files that were hashed before are not read again (`hashes.py`).

        Raises:
            InputError: lists the images that are missing or have other content now.
        """
        problems, hashes = [], FileHashes(root)

        def check(path: str, sha256: str | None, what: str = "") -> None:
            if not (root / path).exists():
                problems.append(f"{path}: absent{what}")
            elif hashes.sha256(path) != sha256:
                problems.append(f"{path}: another file than at the time of the split{what}")

        for image in self.images:
            check(image.path, image.sha256)
            if image.second is not None:
                check(image.second, image.second_sha256, f", the second source of {image.path}")
        hashes.save()
        if problems:
            raise listed(first_problems(problems), f"{root} is not the data of this run's manifest")


def _image(row: dict[str, Any]) -> Image:
    # JSON knows no tuples.
    return Image(**{**row, "labels": tuple(row["labels"]), "captions": tuple(row["captions"])})
