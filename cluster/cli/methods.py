"""The training methods, their settings and recipes, as tables, as JSON, and in the help of verbs that take a method."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from typer.core import TyperCommand

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

__all__ = ["MethodCommand", "MethodHelp", "RecipeHelp", "SettingHelp", "as_fields", "describe", "show_methods"]

# The bounds that pydantic's fields carry, by the name of their attribute.
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclasses.dataclass(frozen=True)
class SettingHelp:
    """One setting.

    Attributes:
        name: the KEY of `--set KEY=VALUE`.
        default: its value if nothing is given.
        allowed: the range or the values, "" if the type is the only limit.
        searched: the range or the values that `tune` searches by default, "" if it does not.
        description: what it sets.
    """

    name: str
    default: Any
    allowed: str
    searched: str
    description: str


@dataclasses.dataclass(frozen=True)
class RecipeHelp:
    """One shipped recipe of a method.

    Attributes:
        name: the NAME of `--config NAME`.
        about: what it is for, in one line.
        split: the rules of the split that it sets, by name; see `Recipe`.
        settings: the settings that it sets, by name.
    """

    name: str
    about: str
    split: dict[str, Any]
    settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class MethodHelp:
    """One method: the data that it needs, its publication, its settings, and its shipped recipes."""

    name: str
    learns_from: str
    paper: str
    settings: tuple[SettingHelp, ...]
    recipes: tuple[RecipeHelp, ...]


def describe(name: str | None = None) -> list[MethodHelp]:
    """Return the method of this name, or all methods; `InputError` for an unknown name."""
    from orbithash.trainers.methods import get_method, method_names
    from orbithash.trainers.recipe import find_recipe, shipped_recipes

    methods = [get_method(each) for each in (method_names() if name is None else [name])]
    recipes = [find_recipe(name) for name in shipped_recipes()]
    return [
        MethodHelp(
            method.name,
            method.learns_from,
            method.paper,
            tuple(
                _setting(key, field)
                for key, field in method.Config.model_fields.items()
                if key not in method.Config.unused
            ),
            tuple(
                RecipeHelp(recipe.name, recipe.about, recipe.split(), recipe.settings())
                for recipe in recipes
                if recipe.method == method.name
            ),
        )
        for method in methods
    ]


def as_fields(method: MethodHelp) -> dict[str, Any]:
    """Return the fields of `--json`."""
    return dataclasses.asdict(method)


def show_methods(methods: Sequence[MethodHelp], with_settings: bool) -> None:
    """Print the methods and the names of their recipes, or also tables of the settings of both."""
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    for method in methods:
        console.print(f"{method.name}: learns from {method.learns_from}", style="bold", soft_wrap=True)
        console.print(f"  {method.paper}", soft_wrap=True)
        for recipe in method.recipes:
            console.print(f"  recipe {recipe.name}: {recipe.about}", soft_wrap=True)
            if with_settings:
                set_by_it = {**recipe.split, **recipe.settings}
                console.print("    " + " ".join(f"{key}={_text(value)}" for key, value in set_by_it.items()))
        if with_settings:
            console.print()
            console.print(_table(method.settings))
    if not with_settings:
        console.print("\n`orbithash methods NAME` shows the settings of a method and its recipes.")


def _setting(name: str, field: "FieldInfo") -> SettingHelp:
    from orbithash.trainers.search_space import Choice, Linear, Log

    limits = [
        f"{sign} {getattr(mark, bound):g}"
        for mark in field.metadata
        for bound, sign in _BOUNDS.items()
        if hasattr(mark, bound)
    ]
    kinds = (field.annotation, *get_args(field.annotation))
    values = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())
    allowed = ", ".join(map(_text, values)) or ("true, false" if field.annotation is bool else " and ".join(limits))
    searched = ""
    for mark in field.metadata:
        if isinstance(mark, Choice):
            searched = ", ".join(map(_text, mark.values))
        elif isinstance(mark, Linear | Log):
            searched = f"{mark.low:g}:{mark.high:g}{':log' if isinstance(mark, Log) else ''}"
    return SettingHelp(name, field.get_default(), allowed, searched, field.description or "")


def _text(value: Any) -> str:
    """Return a value as `--set` reads it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple | list) else str(value)


def _table(settings: Sequence[SettingHelp]) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for setting in settings:
        facts = [f"default {_text(setting.default)}"]
        if setting.allowed:
            facts.append(f"allowed {setting.allowed}")
        if setting.searched:
            facts.append(f"tune searches {setting.searched}")
        table.add_row(setting.name, f"{setting.description}\n{'; '.join(facts)}")
    return table


class MethodCommand(TyperCommand):
    """A verb whose `METHOD --help` also shows the settings of the method."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Remember the method: `--help` is handled before the arguments are, and ends the parsing."""
        options, _, _ = self.make_parser(ctx).parse_args(list(args))
        ctx.meta[__name__] = options.get("method")
        return list(super().parse_args(ctx, args))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the usual help, then the settings of the method if one is given."""
        super().format_help(ctx, formatter)
        # Without a method nothing is imported: the methods need torch.
        if name := ctx.meta.get(__name__):
            described = describe(name)
            print(f"Settings of {name}, for --set KEY=VALUE and --config:\n")
            show_methods(described, with_settings=True)
