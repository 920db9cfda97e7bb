"""Recipes: the files of settings that are installed with the package, by name."""

import importlib.util
from pathlib import Path

from orbithash.encoders.errors import InputError

__all__ = ["find_config", "recipes"]


def recipes() -> dict[str, Path]:
    """Return the path of each shipped recipe by its name, sorted by name."""
    # Not importlib.resources, which would import the package: `--help` must not load torch.
    spec = importlib.util.find_spec("orbithash.trainers")
    assert spec is not None, "orbithash.trainers is installed"
    folders = [Path(folder) / "recipes" for folder in spec.submodule_search_locations or ()]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def find_config(text: str) -> Path:
    """Return the file that `--config TEXT` names: the shipped recipe of this name, else the file at this path.

    Raises:
        InputError: there is neither; the message lists the recipes.
    """
    known = recipes()
    file = known.get(text, Path(text))
    if not file.exists():
        raise InputError(
            f"--config is {text!r}: neither a file nor a shipped recipe; the recipes are {', '.join(known)}"
        )
    return file
