"""Recipes: files of settings that may also say how the data are split; some come with orbithash, by name.

A recipe is a YAML file of settings, as `--config` takes it. It may have a section `recipe`, see `Recipe`. The file of a
shipped recipe is `trainers/recipes/NAME.yaml`.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orbithash.encoders.errors import InputError, listed
from orbithash.trainers.config import RECIPE_SECTION, explain, read_config_file, remove_unknown_keys

__all__ = ["Recipe", "find_recipe", "shipped_recipes"]


class Recipe(BaseModel):
    """A file of settings, and the fields of its section `recipe`. The recipe does not set a field of None.

    Attributes:
        file: the YAML file.
        method: the method that the settings are for.
        about: one line for lists of recipes.
        protocol: rule that splits the images into parts.
        validation: fraction of the training images held out for validation.
        split_seed: seed of the split.
        seeds: number of seeds, each for a split and a training, of `reproduce`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    file: Path
    method: str | None = None
    about: str = ""
    protocol: str | None = None
    validation: Annotated[float, Field(ge=0, le=0.5)] | None = None
    split_seed: Annotated[int, Field(ge=0)] | None = None
    seeds: Annotated[int, Field(ge=1)] | None = None

    @property
    def name(self) -> str:
        """Name of a shipped recipe: that of its file without the ending."""
        return self.file.stem

    def split(self) -> dict[str, Any]:
        """Return the fields that say how the data are split, without those of None."""
        fields = self.model_dump(include={"protocol", "validation", "split_seed", "seeds"})
        return {key: value for key, value in fields.items() if value is not None}

    def settings(self) -> dict[str, Any]:
        """Return the settings of the file, unchecked."""
        return {key: value for key, value in read_config_file(self.file).items() if key != RECIPE_SECTION}

    def check_method(self, method: str) -> None:
        """Raise `InputError` if the recipe is for another method."""
        if self.method not in (None, method):
            raise InputError(f"the recipe {self.name} is for {self.method}, not for {method}; use {self.method}")


def shipped_recipes() -> dict[str, Path]:
    """Return the file of each shipped recipe by its name, sorted by name."""
    return {file.stem: file for file in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}


def find_recipe(text: str | Path) -> Recipe:
    """Return the shipped recipe of this name, else the recipe in the file at this path.

    Raises:
        InputError: there is neither (the message lists the shipped recipes), or the section `recipe` is wrong.
    """
    shipped = shipped_recipes()
    file = shipped.get(str(text), Path(text))
    if not file.exists():
        raise InputError(
            f"--config is {str(text)!r}: neither a file nor a shipped recipe; the recipes are {', '.join(shipped)}"
        )
    section = read_config_file(file).get(RECIPE_SECTION) or {}
    if not isinstance(section, dict):
        raise InputError(f"{file}: the section {RECIPE_SECTION} contains keys and values, got {section!r}")
    problems = remove_unknown_keys(section, [key for key in Recipe.model_fields if key != "file"])
    try:
        recipe = Recipe.model_validate({**section, "file": file})
    except ValidationError as err:
        problems += [explain(error) for error in err.errors()]
    if problems:
        raise listed(problems, f"{file}, section {RECIPE_SECTION}")
    return recipe
