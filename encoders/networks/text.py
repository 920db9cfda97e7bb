"""Turn sentences into feature vectors with a frozen Hugging Face encoder.

A model is a folder, or `organisation/name` or `organisation/name@revision` on the Hugging Face hub, which is downloaded
once. Weights are read from safetensors only; no pickle is read and no code of the model's authors is run.
"""

import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from orbithash.encoders.errors import InputError, listed
from orbithash.encoders.files import new_folder, recover_folder
from orbithash.encoders.networks.devices import check_device, exact_float32
from orbithash.encoders.networks.hub import (
    FILES,
    PROBE,
    complete_model,
    model_folder,
    one_line,
    pretrained,
    pretrained_tokenizer,
)

__all__ = ["CARD", "POOLINGS", "TextEncoder", "file_hashes", "files_sha256", "normalised", "read_encoder_card"]

# "mean": the last layer, averaged over all tokens. "cls": the last layer at the first token. "last4": the sum of the
# last four layers, averaged over all tokens. "last4-padded": as "last4", averaged over `max_tokens` positions: the
# padding is masked in attention but part of the average (as in DUCH's code).
POOLINGS = ("mean", "cls", "last4", "last4-padded")

FORMAT_VERSION = 1
CARD = "encoder.json"

# A caption has about 100. Longer texts cost time only, because tokens after `max_tokens` are cut off.
MAX_CHARACTERS = 4096

# Sentences per pass of the network.
BATCH_SIZE = {"cpu": 32, "cuda": 256}

_PUNCTUATION = str.maketrans("", "", ".,!?")


class TextEncoder:
    """A frozen text encoder: sentences to float32 features.

    The features of a sentence do not depend on the other sentences of the call, up to rounding: only sentences of the
    same number of tokens share a batch, so none is padded.
    """

    def __init__(
        self,
        source: str,
        pooling: str = "mean",
        device: str | torch.device = "cpu",
        *,
        max_tokens: int = 64,
        normalise: bool = False,
    ) -> None:
        """Read the model; `InputError` if there is none at `source` or it is not a text encoder.

        Args:
            source: folder of a Hugging Face model, or its name on the hub.
            pooling: how token features become a sentence's; one of `POOLINGS`.
            device: `cpu`, `cuda` or `cuda:N`.
            max_tokens: later tokens of a sentence are cut off.
            normalise: whether sentences go through `normalised` first.
        """
        from transformers import AutoConfig, AutoModel

        if pooling not in POOLINGS:
            raise InputError(f"text pooling is {pooling!r}; allowed are {', '.join(POOLINGS)}")
        self.pooling = pooling
        self.max_tokens = max_tokens
        self.normalise = normalise
        self.device = check_device(device)
        self._folder = model_folder(source)
        # Hashed before the weights are read, so that a change in between is found.
        self.sha256 = _content_hash(self._settings(), file_hashes(self._folder))
        config = pretrained(AutoConfig, self._folder)
        if getattr(config, "is_encoder_decoder", False):
            raise InputError(
                f"{source}: a model that translates or generates text; give a text encoder such as BERT or MiniLM"
            )
        self.tokenizer = pretrained_tokenizer(self._folder)
        self._model = complete_model(AutoModel, self._folder).to(self.device).eval().requires_grad_(False)
        limit = min(self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", 10**9))
        if not 3 <= max_tokens <= limit:
            raise InputError(f"max_tokens is {max_tokens}; the text model {source} allows 3 to {limit}")
        try:
            self.num_features = self.encode([PROBE]).shape[1]
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as err:
            raise InputError(
                f"{source}: not a text encoder ({one_line(err)}); give one such as BERT or MiniLM"
            ) from err

    def encode(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return features float32 [N, num_features] of N sentences.

        Raises:
            InputError: some sentences are empty, longer than `MAX_CHARACTERS`, or not valid text; all are named.
        """
        cleaned = self._cleaned(sentences)
        # Captions repeat often; each distinct one is encoded once.
        distinct = list(dict.fromkeys(cleaned))
        if not distinct:
            return np.empty((0, self.num_features), np.float32)
        rows = {sentence: row for row, sentence in enumerate(distinct)}
        return self._encode_distinct(distinct)[[rows[sentence] for sentence in cleaned]]

    def to(self, device: str | torch.device) -> Self:
        """Move the encoder to `cpu`, `cuda` or `cuda:N` and return it."""
        self.device = check_device(device)
        self._model.to(self.device)
        return self

    def is_one_token(self, words: Sequence[str]) -> list[bool]:
        """Return for each word whether it is a single token."""
        ids = self.tokenizer(list(words), add_special_tokens=False)["input_ids"]
        return [len(tokens) == 1 for tokens in ids]

    def _clean(self, sentence: str) -> str:
        return normalised(sentence) if self.normalise else sentence

    def _tokenise(self, sentences: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(sentences, truncation=True, max_length=self.max_tokens)["input_ids"]
        return ids

    def _cleaned(self, sentences: Sequence[str]) -> list[str]:
        cleaned, problems = [], []
        for row, sentence in enumerate(sentences):
            if not isinstance(sentence, str):
                problems.append(f"sentence {row} is of type {type(sentence).__name__}; give a string")
            elif len(sentence) > MAX_CHARACTERS:
                problems.append(f"sentence {row} has {len(sentence)} characters; {MAX_CHARACTERS} are allowed")
            elif any("\ud800" <= character <= "\udfff" for character in sentence):
                problems.append(f"sentence {row} contains half of a surrogate pair; give valid Unicode")
            else:
                text = self._clean(sentence)
                if not text.strip():
                    problems.append(f"sentence {row} contains no word: {sentence!r}")
                cleaned.append(text)
        if problems:
            raise listed(problems, "text")
        return cleaned

    @torch.inference_mode()
    def _encode_distinct(self, sentences: list[str]) -> npt.NDArray[np.float32]:
        tokens = self._tokenise(sentences)
        by_length = defaultdict(list)
        for row, ids in enumerate(tokens):
            by_length[len(ids)].append(row)
        features: npt.NDArray[np.float32] | None = None
        size = BATCH_SIZE[self.device.type]
        with exact_float32(self.device):
            for rows in by_length.values():
                for batch in (rows[start : start + size] for start in range(0, len(rows), size)):
                    pooled = self._pooled(torch.tensor([tokens[row] for row in batch], device=self.device))
                    if features is None:
                        features = np.empty((len(sentences), pooled.shape[1]), np.float32)
                    features[batch] = pooled.cpu().numpy()
        assert features is not None, "there is at least one sentence"
        return features

    def _pooled(self, ids: Tensor) -> Tensor:
        """Return features [B, D] of token ids int64 [B, T] without padding."""
        mask = torch.ones_like(ids)
        if self.pooling == "last4-padded":
            rest = (0, self.max_tokens - ids.shape[1])
            ids, mask = F.pad(ids, rest, value=self.tokenizer.pad_token_id), F.pad(mask, rest)
        layers = self.pooling.startswith("last4")
        output = self._model(input_ids=ids, attention_mask=mask, output_hidden_states=layers)
        if layers:
            return torch.stack(output.hidden_states[-4:]).sum(dim=0).mean(dim=1)
        last: Tensor = output.last_hidden_state
        return last[:, 0] if self.pooling == "cls" else last.mean(dim=1)

    def save(self, folder: Path) -> None:
        """Write a folder that `load` reads without the source; a text encoder that is in `folder` is replaced.

        The folder holds unchanged copies of the model's files, and `encoder.json` with the settings and `sha256`.
        """
        recover_folder(folder)
        if folder.exists() and not (folder / CARD).is_file():
            raise InputError(f"{folder} exists and is not a saved text encoder; choose another path")
        with new_folder(folder) as part:
            for path in _files(self._folder):
                shutil.copyfile(path, part / path.name)
            if _content_hash(self._settings(), file_hashes(part)) != self.sha256:
                raise InputError(f"{self._folder}: the text model was changed since it was loaded; load it again")
            self._write_card(part, self._settings())

    def _write_card(self, folder: Path, fields: dict[str, Any]) -> None:
        card = {"format_version": FORMAT_VERSION, **fields, "sha256": self.sha256}
        (folder / CARD).write_text(json.dumps(card, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path | str, device: str | torch.device = "cpu") -> Self:
        """Read what `save` wrote; `InputError` if it is missing, damaged or of an unknown version."""
        folder = Path(folder)
        recover_folder(folder)
        card = read_encoder_card(folder)
        if files_sha256(folder, card) != card.get("sha256"):
            raise InputError(f"{folder}: a damaged text encoder (its files do not give the hash in {CARD})")
        return cls(str(folder), device=device, **_settings_of(card))

    def _settings(self) -> dict[str, Any]:
        return {"pooling": self.pooling, "max_tokens": self.max_tokens, "normalise": self.normalise}


def read_encoder_card(folder: Path) -> dict[str, Any]:
    """Return the content of encoder.json; `InputError` if it is missing, damaged or of an unknown version."""
    path = folder / CARD
    if not path.is_file():
        raise InputError(f"{folder}: not a saved text encoder (it has no {CARD})")
    try:
        card = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as err:
        raise InputError(f"{path}: damaged ({one_line(err)})") from err
    found = card.get("format_version") if isinstance(card, dict) else None
    if found != FORMAT_VERSION:
        raise InputError(f"{path}: format version {found!r}; this orbithash reads version {FORMAT_VERSION}")
    fields: dict[str, Any] = card
    return fields


def normalised(sentence: str) -> str:
    """Return a sentence in lower case without full stops, commas, exclamation marks and question marks."""
    return sentence.lower().translate(_PUNCTUATION).strip()


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a model by file name."""
    hashes = {}
    for path in _files(folder):
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def files_sha256(folder: Path, card: dict[str, Any]) -> str:
    """Return the hash of the settings in `card`, the content of encoder.json, and of the files of a text encoder."""
    return _content_hash(_settings_of(card), file_hashes(folder))


def _settings_of(card: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in card.items() if key not in ("format_version", "sha256")}


def _files(folder: Path) -> list[Path]:
    found = {path for pattern in FILES for path in folder.glob(pattern) if path.is_file() and path.name != CARD}
    return sorted(found, key=lambda path: path.name)


def _content_hash(settings: dict[str, Any], hashes: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps({**settings, "files": hashes}, sort_keys=True).encode()).hexdigest()
