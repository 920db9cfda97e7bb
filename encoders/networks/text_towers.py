"""Text towers of dual encoders as text encoders, and text encoders of any kind from a folder.

The features of a sentence are in the space of the image tower's features.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from orbithash.encoders.errors import InputError
from orbithash.encoders.files import new_folder, recover_folder
from orbithash.encoders.networks.backbones.backbone import TextSide
from orbithash.encoders.networks.backbones.build import rebuild_text_side, text_side
from orbithash.encoders.networks.backbones.names import split_name
from orbithash.encoders.networks.devices import check_device
from orbithash.encoders.networks.hub import PROBE
from orbithash.encoders.networks.text import CARD, TextEncoder, files_sha256, read_encoder_card

__all__ = ["TextTower", "load_text_encoder", "stored_sha256", "text_tower"]

# The value of `kind` in encoder.json.
KIND = "text tower"

WEIGHTS = "model.safetensors"


class TextTower(TextEncoder):
    """The frozen text tower of a dual encoder: sentences to float32 features in the space of the images' features."""

    def __init__(
        self,
        side: TextSide,
        source: str,
        device: str | torch.device = "cpu",
        tokenizer: dict[str, bytes] | None = None,
    ) -> None:
        """Use a tower of a source of backbones; see `text_tower` and `load_text_encoder`.

        `tokenizer` has the files from which the tokenizer was read; None: those that it writes.
        """
        self.device = check_device(device)
        self._side, self._source = side, source
        # Kept from here on: tokenizers of transformers write other files once they were used or read again.
        self._tokenizer = _written_tokenizer(side) if tokenizer is None else tokenizer
        self._network = side.network.to(self.device).eval().requires_grad_(False)
        self.sha256 = self._content_hash()
        self.num_features = self.encode([PROBE]).shape[1]

    def is_one_token(self, words: Sequence[str]) -> list[bool]:
        """Return for each word whether it is a single token."""
        (empty,) = self._tokenise([""])
        return [_length(ids) == _length(empty) + 1 for ids in self._tokenise(words)]

    def to(self, device: str | torch.device) -> Self:
        """Move the encoder to `cpu`, `cuda` or `cuda:N` and return it."""
        self.device = check_device(device)
        self._network.to(self.device)
        return self

    def _clean(self, sentence: str) -> str:
        return sentence

    def _tokenise(self, sentences: Sequence[str]) -> list[list[int]]:
        return self._side.tokenise(sentences)

    def _pooled(self, ids: Tensor) -> Tensor:
        features: Tensor = self._network(ids)
        return features

    def _content_hash(self) -> str:
        """Return the hash of weights, configuration and tokenizer."""
        return _tower_hash(self._fields(), self._tokenizer, self._weights())

    def _weights(self) -> bytes:
        """Return the content of the weight file."""
        content: bytes = save({key: value.contiguous().cpu() for key, value in self._network.state_dict().items()})
        return content

    def _fields(self) -> dict[str, Any]:
        return {"kind": KIND, "source": self._source, "config": self._side.config}

    def save(self, folder: Path) -> None:
        """Write a folder that `load_text_encoder` reads without the source; a text encoder in `folder` is replaced."""
        recover_folder(folder)
        if folder.exists() and not (folder / CARD).is_file():
            raise InputError(f"{folder} exists and is not a saved text encoder; choose another path")
        with new_folder(folder) as part:
            for name, content in self._tokenizer.items():
                path = part / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            (part / WEIGHTS).write_bytes(self._weights())
            self._write_card(part, self._fields())


def text_tower(backbone: str, weights: str | None = None, device: str | torch.device = "cpu") -> TextTower:
    """Return the text tower of a backbone that is a dual encoder; `InputError` for one without text.

    Args:
        backbone: name of the backbone, such as `open_clip:NAME/TAG` or `hf:FOLDER`.
        weights: the weights of both towers, as for `build_backbone`.
        device: `cpu`, `cuda` or `cuda:N`.
    """
    return TextTower(text_side(backbone, weights), split_name(backbone)[0], device)


def load_text_encoder(folder: Path | str, device: str | torch.device = "cpu") -> TextEncoder:
    """Read what a text encoder's `save` wrote; `InputError` if it is missing, damaged or of an unknown version."""
    folder = Path(folder)
    recover_folder(folder)
    card = read_encoder_card(folder)
    if card.get("kind") != KIND:
        return TextEncoder.load(folder, device)
    damaged = f"{folder}: a damaged text encoder (its files do not give the hash in {CARD})"
    if not isinstance(card.get("config"), dict):
        raise InputError(damaged)
    side = rebuild_text_side(str(card.get("source")), card["config"], folder)
    try:
        side.network.load_state_dict(load((folder / WEIGHTS).read_bytes()))
        tokenizer = {name: content for name, content in _files(folder).items() if name not in (CARD, WEIGHTS)}
    except (OSError, SafetensorError, RuntimeError) as err:
        raise InputError(damaged) from err
    encoder = TextTower(side, str(card["source"]), device, tokenizer)
    if encoder.sha256 != card.get("sha256"):
        raise InputError(damaged)
    return encoder


def stored_sha256(folder: Path) -> str:
    """Return the hash of the files of a text encoder, without loading it; `InputError` if files are missing."""
    card = read_encoder_card(folder)
    if card.get("kind") != KIND:
        return files_sha256(folder, card)
    fields = {key: card.get(key) for key in ("kind", "source", "config")}
    files = _files(folder)
    if WEIGHTS not in files:
        raise InputError(f"{folder}: an incomplete text encoder (it has no {WEIGHTS})")
    tokenizer = {name: content for name, content in files.items() if name not in (CARD, WEIGHTS)}
    return _tower_hash(fields, tokenizer, files[WEIGHTS])


def _tower_hash(fields: dict[str, Any], tokenizer: dict[str, bytes], weights: bytes) -> str:
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in tokenizer.items()}
    content = {**fields, "tokenizer": hashes, "weights": hashlib.sha256(weights).hexdigest()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _written_tokenizer(side: TextSide) -> dict[str, bytes]:
    """Return the files that the tokenizer writes, by their path in a folder."""
    with TemporaryDirectory() as folder:
        side.save_tokenizer(Path(folder))
        return _files(Path(folder))


def _files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files of a folder, by their path in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _length(ids: Sequence[int]) -> int:
    """Return the number of tokens, the equal ones at the end counted once."""
    end = len(ids)
    while end > 1 and ids[end - 1] == ids[end - 2]:
        end -= 1
    return end
