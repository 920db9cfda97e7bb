"""Weight files of backbones: safetensors only, because a pickle can run code."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from orbithash.encoders.errors import InputError

__all__ = ["is_file_name", "load_state", "origin_of_file", "read_safetensors"]

# Pickled weights, by the endings of their files.
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")


def is_file_name(weights: str) -> bool:
    """Return whether `weights` names a file or folder rather than published weights."""
    return Path(weights).suffix in (".safetensors", *_PICKLES) or Path(weights).exists()


def origin_of_file(weights: str) -> str:
    """Return the origin of weights from a file for the model card."""
    return f"file {Path(weights).name}"


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name; `InputError` if there is no such file or it is not safetensors."""
    if not path.is_file():
        raise InputError(f"{path}: no such weights file; give a safetensors file or the name of published weights")
    hint = f"; run: orbithash convert {path} {path.stem}.safetensors" if path.suffix in _PICKLES else ""
    try:
        state: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as err:
        raise InputError(f"{path}: not a readable safetensors file ({err}){hint}") from err
    return state


def load_state(
    model: nn.Module, state: Mapping[str, Tensor], weights: str, backbone: str, ignored: tuple[str, ...] = ()
) -> None:
    """Load a state into a model; `InputError` if it is not that of the model.

    Tensors whose names begin with one of `ignored` may be in the state although the model has no use for them.
    """
    expected = {key: value.shape for key, value in model.state_dict().items()}
    # num_batches_tracked is missing in converted files, and nothing here reads it.
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in expected and not key.startswith(ignored)]
    misfit = [key for key in expected if key in state and state[key].shape != expected[key]]
    if missing or unknown or misfit:
        example = (missing + unknown + misfit)[0]
        raise InputError(
            f"{weights}: not the weights of backbone {backbone}: {len(missing)} tensors missing, {len(unknown)} "
            f"unknown, {len(misfit)} of another shape (first: {example}); give the weights of this backbone"
        )
    model.load_state_dict(dict(state), strict=False)
