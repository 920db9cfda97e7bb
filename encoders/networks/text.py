"""Sentences to feature vectors, by a frozen Hugging Face encoder that is read from safetensors only.

A model is given as a folder, as `organisation/name` on the Hugging Face hub (fetched once, then read from its cache),
or as `organisation/name@revision`. No code of the model's authors is run and no pickle is read.
"""

import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from orbithash.encoders.errors import InputError, listed
from orbithash.encoders.files import new_folder, recover_folder

__all__ = ["POOLINGS", "TextEncoder", "file_hashes", "model_folder", "normalised", "pretrained"]

# "mean": the last layer, averaged over all tokens. "cls": the last layer at the first token. "last4": the sum of the
# last four layers, averaged over all tokens. "last4-padded": that average over `max_tokens` places, of which no token
# looks at those after the text (as DUCH's authors have it).
POOLINGS = ("mean", "cls", "last4", "last4-padded")

FORMAT_VERSION = 1
CARD = "encoder.json"

# What a model of the hub is made of: configuration, tokenizer, weights. All else in its folder is not looked at.
FILES = ("*.json", "*.txt", "*.model", "*.spm", "*.codes", "*.safetensors")

# A caption has some hundred; a longer text would only cost time, since all after `max_tokens` is cut off.
MAX_CHARACTERS = 4096

# What every model is tried on.
PROBE = "a river and some trees"

# Sentences per pass of the network.
BATCH_SIZE = {"cpu": 32, "cuda": 256}

_PUNCTUATION = str.maketrans("", "", ".,!?")


class TextEncoder:
    """Sentences in, float32 features out.

    A sentence has the same row whatever the others of the call are, but for the last digits: sentences of different
    lengths never share a batch, so that none is padded to another's length, but a batch of another size may round
    differently.
    """

    def __init__(
        self,
        source: str,
        pooling: str = "mean",
        device: str = "cpu",
        *,
        max_tokens: int = 64,
        normalise: bool = False,
    ) -> None:
        """Reads the model; `InputError` when there is none at `source` or it is not a text encoder.

        Tokens after the first `max_tokens` are cut off. With `normalise`, sentences go through `normalised` first.
        """
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        if pooling not in POOLINGS:
            raise InputError(f"unknown text pooling {pooling!r}; there are {', '.join(POOLINGS)}")
        self.pooling = pooling
        self.max_tokens = max_tokens
        self.normalise = normalise
        self.device = torch.device(device)
        self._folder = model_folder(source)
        # Before the weights are read: what is hashed is what is loaded.
        self.sha256 = _content_hash(self._settings(), file_hashes(self._folder))
        config = pretrained(AutoConfig, self._folder)
        if getattr(config, "is_encoder_decoder", False):
            raise InputError(f"{source}: translates or generates text; a text encoder such as BERT or MiniLM is needed")
        self.tokenizer = pretrained(AutoTokenizer, self._folder)
        self._model = pretrained(AutoModel, self._folder).to(self.device).eval().requires_grad_(False)
        most = min(self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", 10**9))
        if not 3 <= max_tokens <= most:
            raise InputError(f"max_tokens is {max_tokens}; the text model {source} takes 3 to {most}")
        try:
            self.num_features = self.encode([PROBE]).shape[1]
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as err:
            raise InputError(f"{source}: not a text encoder ({_one_line(err)}); BERT and MiniLM are such") from err

    def encode(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        """Features float32 [N, num_features] of N sentences; `InputError` that lists all sentences it refuses.

        Refused are sentences without a word in them and those of more than `MAX_CHARACTERS` characters.
        """
        cleaned = self._cleaned(sentences)
        # Captions repeat a lot; each distinct one is computed once.
        distinct = list(dict.fromkeys(cleaned))
        if not distinct:
            return np.empty((0, self.num_features), np.float32)
        rows = {sentence: row for row, sentence in enumerate(distinct)}
        return self._encode_distinct(distinct)[[rows[sentence] for sentence in cleaned]]

    def _cleaned(self, sentences: Sequence[str]) -> list[str]:
        cleaned, problems = [], []
        for row, sentence in enumerate(sentences):
            if not isinstance(sentence, str):
                problems.append(f"sentence {row} is of type {type(sentence).__name__}, not text")
            elif len(sentence) > MAX_CHARACTERS:
                problems.append(f"sentence {row} has {len(sentence)} characters; {MAX_CHARACTERS} are allowed")
            elif any("\ud800" <= character <= "\udfff" for character in sentence):
                problems.append(f"sentence {row} holds half of a surrogate pair; give valid Unicode")
            else:
                text = normalised(sentence) if self.normalise else sentence
                if not text.strip():
                    problems.append(f"sentence {row} has no word in it: {sentence!r}")
                cleaned.append(text)
        if problems:
            raise listed(problems, "text")
        return cleaned

    @torch.inference_mode()
    def _encode_distinct(self, sentences: list[str]) -> npt.NDArray[np.float32]:
        tokens: list[list[int]] = self.tokenizer(sentences, truncation=True, max_length=self.max_tokens)["input_ids"]
        by_length = defaultdict(list)
        for row, ids in enumerate(tokens):
            by_length[len(ids)].append(row)
        features: npt.NDArray[np.float32] | None = None
        for rows in by_length.values():
            for start in range(0, len(rows), BATCH_SIZE[self.device.type]):
                batch = rows[start : start + BATCH_SIZE[self.device.type]]
                pooled = self._pooled(torch.tensor([tokens[row] for row in batch], device=self.device))
                if features is None:
                    features = np.empty((len(sentences), pooled.shape[1]), np.float32)
                features[batch] = pooled.cpu().numpy()
        assert features is not None, "the caller has sentences"
        return features

    def _pooled(self, ids: Tensor) -> Tensor:
        """Features [B, D] of token ids int64 [B, T] without padding."""
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
        """Writes a folder that `load` reads without the source, in place of an older one; it appears whole or not.

        It holds byte for byte copies of the model's files and `encoder.json` with the settings and `sha256`.
        """
        if folder.exists() and not (folder / CARD).is_file():
            raise InputError(f"{folder} is there and no saved text encoder; give another place")
        with new_folder(folder) as part:
            for path in _files(self._folder):
                shutil.copyfile(path, part / path.name)
            if _content_hash(self._settings(), file_hashes(part)) != self.sha256:
                raise InputError(f"{self._folder}: the text model was changed since it was loaded; load it again")
            card = {"format_version": FORMAT_VERSION, **self._settings(), "sha256": self.sha256}
            (part / CARD).write_text(json.dumps(card, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path | str, device: str = "cpu") -> "TextEncoder":
        """Reads what `save` wrote; `InputError` when it is absent, damaged or of an unknown version."""
        folder = Path(folder)
        recover_folder(folder)
        path = folder / CARD
        if not path.is_file():
            raise InputError(f"{folder}: not a saved text encoder (it has no {CARD})")
        try:
            card = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as err:
            raise InputError(f"{path}: damaged ({_one_line(err)})") from err
        found = card.get("format_version") if isinstance(card, dict) else None
        if found != FORMAT_VERSION:
            raise InputError(f"{path}: format version {found!r}; this orbithash reads version {FORMAT_VERSION}")
        stated = card.pop("sha256", None)
        settings = {key: value for key, value in card.items() if key != "format_version"}
        if _content_hash(settings, file_hashes(folder)) != stated:
            raise InputError(f"{folder}: a text encoder that is damaged (its files do not give the hash in {CARD})")
        return cls(str(folder), device=device, **settings)

    def _settings(self) -> dict[str, Any]:
        return {"pooling": self.pooling, "max_tokens": self.max_tokens, "normalise": self.normalise}


def normalised(sentence: str) -> str:
    """In lower case, without full stops, commas, exclamation and question marks."""
    return sentence.lower().translate(_PUNCTUATION).strip()


def model_folder(source: str) -> Path:
    """The folder of a Hugging Face model: `source` itself, or where the hub's copy of that name lies on this machine.

    `InputError` when there is no such folder and the name cannot be fetched.
    """
    if Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            raise InputError(f"{source}: not a Hugging Face model folder (it has no config.json)")
        return Path(source)
    from huggingface_hub import snapshot_download

    name, _, revision = source.partition("@")
    try:
        # Only the top folder: those below hold the same model in other formats.
        return Path(
            snapshot_download(
                name, revision=revision or None, allow_patterns=list(FILES), ignore_patterns="*/*", dry_run=False
            )
        )
    except (OSError, ValueError, RuntimeError) as err:
        raise InputError(
            f"text model {source!r}: no such folder, and no model of that name could be fetched ({_one_line(err)}); "
            "give the folder of a Hugging Face model"
        ) from err


def pretrained(kind: Any, folder: Path) -> Any:
    """Loads a configuration, a tokenizer or a float32 model by `kind`, an Auto class of transformers, from `folder`.

    `InputError` when it cannot be read, needs code of its authors, or has weights only as a pickle or only in part.
    """
    from safetensors import SafetensorError
    from transformers.utils import logging

    # One line on a terminal for each file that is read, and a table for weights that nobody needs.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    arguments: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    is_model = hasattr(kind, "from_config")
    if is_model:
        arguments |= {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        loaded = kind.from_pretrained(str(folder), **arguments)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        ImportError,
        SafetensorError,
    ) as err:
        raise InputError(f"{folder}: cannot be loaded as a text model in safetensors ({_one_line(err)})") from err
    # Without its files, a tokenizer of special tokens alone is made up, to which all sentences are the same.
    if hasattr(loaded, "all_special_ids") and set(loaded(PROBE)["input_ids"]) <= set(loaded.all_special_ids):
        raise InputError(f"{folder}: its tokenizer knows no English word; tokenizer files are missing or unfit")
    if not is_model:
        return loaded
    model, info = loaded
    # A pooler is one more layer for classifiers; no pooling here reads it.
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise InputError(f"{folder}: {len(missing)} weights are missing (first: {missing[0]}); the model is incomplete")
    return model


def file_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each of a model's files, by name."""
    hashes = {}
    for path in _files(folder):
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _files(folder: Path) -> list[Path]:
    found = {path for pattern in FILES for path in folder.glob(pattern) if path.is_file() and path.name != CARD}
    return sorted(found, key=lambda path: path.name)


def _content_hash(settings: dict[str, Any], hashes: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps({**settings, "files": hashes}, sort_keys=True).encode()).hexdigest()


def _one_line(err: Exception) -> str:
    lines = str(err).strip().splitlines()
    return lines[0].strip() if lines else type(err).__name__
