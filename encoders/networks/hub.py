"""Models of the Hugging Face hub, and the folders of their files. No pickle is read, no code of the authors is run."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR
from pathlib import Path
from typing import Any

from orbithash.encoders.errors import InputError

__all__ = [
    "FILES",
    "PROBE",
    "complete_model",
    "hub_file",
    "licence",
    "model_folder",
    "one_line",
    "pretrained",
    "pretrained_tokenizer",
    "quiet_hub",
    "quiet_transformers",
    "read_json",
]

# The files of a model: configuration, tokenizer, weights. Others in its folder are ignored.
FILES = ("*.json", "*.txt", "*.model", "*.spm", "*.codes", "*.safetensors")

# A sentence that every model must encode and every tokenizer must know.
PROBE = "a river and some trees"


def model_folder(source: str, what: str = "text model") -> Path:
    """Return the folder of a Hugging Face model: `source` itself, or the local copy of the hub's model of that name.

    `InputError` if there is no such folder and the name cannot be downloaded. `what` names it in the message.
    """
    if Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            raise InputError(f"{source}: not a Hugging Face model folder (it has no config.json)")
        return Path(source)
    from huggingface_hub import snapshot_download

    name, _, revision = source.partition("@")
    try:
        with quiet_hub():
            # The top folder only: subfolders hold the same model in other formats. The readme states the licence.
            return Path(
                snapshot_download(
                    name,
                    revision=revision or None,
                    allow_patterns=[*FILES, "README.md"],
                    ignore_patterns="*/*",
                    dry_run=False,
                )
            )
    except (OSError, ValueError, RuntimeError) as err:
        raise _refusal(err, source, what, "no such folder, and no model of that name could be downloaded") from err


def hub_file(repository: str, file: str) -> Path:
    """Return the local copy of a file of the hub; `InputError` if it cannot be downloaded."""
    from huggingface_hub import hf_hub_download

    name, _, revision = repository.partition("@")
    try:
        with quiet_hub():
            return Path(hf_hub_download(name, file, revision=revision or None))
    except (OSError, ValueError, RuntimeError) as err:
        raise _refusal(err, repository, "model", f"its file {file} could not be downloaded") from err


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Suppress the hub's lines about attempts; what fails is reported as one error."""
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _refusal(err: Exception, source: str, what: str, why: str) -> InputError:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    status = err.response.status_code if isinstance(err, HfHubHTTPError) and err.response is not None else 0
    if isinstance(err, GatedRepoError) or status in (401, 403):
        name = source.partition("@")[0]
        return InputError(
            f"{what} {source!r}: the hub denies access; if it is a gated or private model, accept its licence at "
            f"https://huggingface.co/{name} and give a token: run `hf auth login`, or set HF_TOKEN"
        )
    return InputError(f"{what} {source!r}: {why} ({one_line(err)}); give the folder of a Hugging Face model")


def pretrained(kind: Any, folder: Path, what: str = "text model", **arguments: Any) -> Any:
    """Load a configuration, a tokenizer or a float32 model from a folder; `kind` is an Auto class of transformers.

    `InputError` if it cannot be read, needs code of its authors or has no safetensors weights. A model is returned with
    the names of the tensors that its file lacks: (model, missing).
    """
    import torch
    from safetensors import SafetensorError

    arguments |= {"trust_remote_code": False, "local_files_only": True}
    is_model = hasattr(kind, "from_config")
    if is_model:
        arguments |= {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        with quiet_transformers():
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
        if _needs_code(folder, err):
            raise InputError(
                f"{folder}: this {what} needs Python code of its authors (trust_remote_code), which is not run; give a "
                "model of an architecture that transformers has"
            ) from err
        raise InputError(f"{folder}: cannot be loaded as a {what} in safetensors ({one_line(err)})") from err
    return (loaded[0], sorted(loaded[1]["missing_keys"])) if is_model else loaded


def complete_model(kind: Any, folder: Path, what: str = "text model") -> Any:
    """Load a float32 model as `pretrained`; `InputError` if its file lacks weights.

    A pooler may be missing: it is an extra layer for classifiers.
    """
    model, missing = pretrained(kind, folder, what)
    if missing := [key for key in missing if "pooler" not in key]:
        raise InputError(f"{folder}: {len(missing)} weights are missing (first: {missing[0]}); the model is incomplete")
    return model


def pretrained_tokenizer(folder: Path, what: str = "text model") -> Any:
    """Load the tokenizer of a folder; `InputError` if it cannot be read or knows no English word."""
    from transformers import AutoTokenizer

    tokenizer = pretrained(AutoTokenizer, folder, what)
    # If its files are missing, transformers builds a tokenizer of special tokens only, which maps all sentences to one.
    if set(tokenizer(PROBE)["input_ids"]) <= set(tokenizer.all_special_ids):
        raise InputError(f"{folder}: its tokenizer knows no English word; its files are missing or of another model")
    return tokenizer


def _needs_code(folder: Path, err: Exception) -> bool:
    return isinstance(err, ValueError) and "trust_remote_code" in str(err) and (folder / "config.json").is_file()


def licence(folder: Path) -> str:
    """Return the licence that the readme of a model states in its header, empty if it states none."""
    import yaml

    try:
        text = (folder / "README.md").read_text()
        header = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, UnicodeDecodeError, IndexError, yaml.YAMLError):
        return ""
    if not isinstance(header, dict):
        return ""
    named = header.get("license_name") if header.get("license") == "other" else header.get("license")
    return named if isinstance(named, str) else ""


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; empty if there is no such file. `InputError` if it is damaged."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as err:
        raise InputError(f"{path}: damaged ({one_line(err)})") from err
    if not isinstance(content, dict):
        raise InputError(f"{path}: damaged (not an object)")
    return content


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress progress bars and tables of unused weights while a model is read; restore the caller's settings."""
    from transformers.utils import logging

    verbosity, has_progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_progress_bar:
            logging.enable_progress_bar()


def one_line(err: Exception) -> str:
    """Return the first line of an error's message, or its type."""
    lines = str(err).strip().splitlines()
    return lines[0].strip() if lines else type(err).__name__
