"""Weight files of backbones: safetensors only, because a pickle can run code."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from orbithash.encoders.errors import InputError

__all__ = ["is_file_name", "read_safetensors"]


def is_file_name(weights: str) -> bool:
    """Return whether `weights` names a file or folder rather than published weights."""
    return Path(weights).suffix == ".safetensors" or Path(weights).exists()


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name; `InputError` if there is no such file or it is not safetensors."""
    if not path.is_file():
        raise InputError(f"{path}: no such weights file; give a safetensors file or the name of published weights")
    try:
        state: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as err:
        raise InputError(f"{path}: not a readable safetensors file ({err})") from err
    return state
