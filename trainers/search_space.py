"""The search space of tuning: ranges declared by the fields of a method's config, and ranges given by the user."""

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin

import yaml

from orbithash.encoders.errors import listed

__all__ = [
    "Choice",
    "Dimension",
    "Linear",
    "Log",
    "Space",
    "When",
    "conditions",
    "declared_space",
    "is_active",
    "is_whole",
    "parse_space",
    "plain_space",
]


@dataclass(frozen=True)
class Linear:
    """Uniform between `low` and `high`, inclusive; whole numbers for an integer field."""

    low: float
    high: float


@dataclass(frozen=True)
class Log:
    """Log-uniform between `low` and `high`, inclusive; whole numbers for an integer field."""

    low: float
    high: float


@dataclass(frozen=True)
class Choice:
    """One of `values`."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class When:
    """A setting has an effect only if the setting `name` has one of `values`."""

    name: str
    values: tuple[Any, ...]


Dimension = Linear | Log | Choice

# Dimensions by the name of the setting.
Space = Mapping[str, Dimension]


def declared_space(config: type[Any]) -> dict[str, Dimension]:
    """Return the ranges that fields of a config declare, as in `lr: Annotated[float, Log(1e-5, 1e-3)]`."""
    found = {}
    for name, field in config.model_fields.items():
        for mark in field.metadata:
            if isinstance(mark, Linear | Log | Choice):
                found[name] = mark
    return found


def is_active(config: Any, name: str, settings: Mapping[str, Any]) -> bool:
    """Return whether a setting has an effect, as in `rank: Annotated[int, Choice((4, 8)), When("tune", ("lora",))]`.

    Args:
        config: the given settings.
        name: the setting.
        settings: values in place of those of `config`.
    """
    return all(settings.get(when.name, getattr(config, when.name)) in when.values for when in conditions(config, name))


def conditions(config: Any, name: str) -> list[When]:
    """Return the conditions under which a setting of `config` has an effect."""
    return [mark for mark in type(config).model_fields[name].metadata if isinstance(mark, When)]


def is_whole(config: type[Any], name: str) -> bool:
    """Return whether a setting is an integer."""
    annotation = config.model_fields[name].annotation
    kinds = get_args(annotation) or (annotation,)
    return int in kinds and float not in kinds


def parse_space(config: type[Any], texts: Sequence[str]) -> dict[str, Dimension]:
    """Return the space of `KEY` (its declared range), `KEY=LOW:HIGH`, `KEY=LOW:HIGH:log` or `KEY=A,B,C`.

    Raises:
        InputError: with all problems of `texts`.
    """
    declared = declared_space(config)
    space: dict[str, Dimension] = {}
    problems: list[str] = []
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in config.model_fields:
            problems.append(f"{name!r} is not a setting; allowed are {', '.join(config.model_fields)}")
        elif not equals and name not in declared:
            problems.append(f"{name} declares no range; give one, such as {name}=LOW:HIGH; {', '.join(declared)} do")
        elif not equals:
            space[name] = declared[name]
        else:
            try:
                space[name] = _dimension(value, _is_number(config, name))
            except ValueError as error:
                problems.append(f"{name}: {value!r} is {error}; give LOW:HIGH, LOW:HIGH:log or A,B,C")
    if problems:
        raise listed(problems, "--search")
    return space


def _dimension(text: str, is_number: bool) -> Dimension:
    bounds = text.split(":")
    if is_number and len(bounds) in (2, 3):
        try:
            low, high = float(bounds[0]), float(bounds[1])
        except ValueError:
            raise ValueError("not a range of numbers") from None
        if not -math.inf < low < high < math.inf or (len(bounds) == 3 and (bounds[2] != "log" or low <= 0)):
            raise ValueError("not a range (LOW must be less than HIGH, and above 0 for a logarithmic range)")
        return Log(low, high) if len(bounds) == 3 else Linear(low, high)
    try:
        values = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        raise ValueError("not a list of values") from None
    if len(values) < 2:
        raise ValueError("a single value (set it with --set)")
    return Choice(tuple(tuple(value) if isinstance(value, list) else value for value in values))


def _is_number(config: type[Any], name: str) -> bool:
    annotation = config.model_fields[name].annotation
    kinds = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return any(kind in (int, float) for kind in kinds)


def plain_space(space: Space) -> dict[str, dict[str, Any]]:
    """Return the space as plain values for YAML or JSON."""

    def plain(dimension: Dimension) -> dict[str, Any]:
        if isinstance(dimension, Choice):
            return {"choice": [list(value) if isinstance(value, tuple) else value for value in dimension.values]}
        return {"log" if isinstance(dimension, Log) else "linear": [dimension.low, dimension.high]}

    return {name: plain(dimension) for name, dimension in space.items()}
