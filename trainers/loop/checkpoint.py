"""Checkpoints without pickle: tensors as safetensors, everything else as JSON."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from orbithash.encoders.errors import InputError

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(folder: Path, **parts: Any) -> None:
    """Write nested dicts and lists of tensors and JSON values into `folder`."""
    tensors: dict[str, torch.Tensor] = {}
    tree = _detach(parts, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "tensors.safetensors")
    (folder / "state.json").write_text(json.dumps(tree))


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote; `InputError` if it is damaged."""
    try:
        tensors = load_file(folder / "tensors.safetensors")
        parts: dict[str, Any] = _attach(json.loads((folder / "state.json").read_text()), tensors)
        if not isinstance(parts, dict):
            raise TypeError("state.json is not a dict")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as err:
        raise InputError(f"{folder}: the checkpoint is damaged ({err}); remove it to resume from an older one") from err
    return parts


def _detach(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Move the tensors of `value` to `tensors` and return JSON values; a dict becomes a list of items."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"items": [[key, _detach(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_detach(item, tensors) for item in value]
    return value


def _attach(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(tree, list):
        return [_attach(item, tensors) for item in tree]
    if isinstance(tree, dict):
        if "tensor" in tree:
            return tensors[tree["tensor"]]
        return {key: _attach(item, tensors) for key, item in tree["items"]}
    return tree
