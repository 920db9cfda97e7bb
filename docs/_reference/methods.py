"""Pages of the methods: what each learns from, its paper, recipes and settings, as `orbithash methods` shows them."""

from typing import Any

from markdown_parts import code, escaped, index, table

__all__ = ["pages"]


def pages() -> dict[str, str]:
    """Return the pages of all methods and their index, by file name without ending."""
    from orbithash.cluster.cli.methods import describe

    described = describe()
    intro = (
        "`orbithash methods NAME` prints the same in the terminal. Settings are given as `--set KEY=VALUE`, in a YAML "
        "file (`--config FILE`) or by a recipe (`--config NAME`)."
    )
    rows = [(method.name, method.name, escaped(f"{method.learns_from}. {method.paper}")) for method in described]
    return {method.name: _page(method) for method in described} | {
        "index": index("Methods and their settings", intro, ("method", "learns from; publication"), rows)
    }


def _page(method: Any) -> str:
    parts = [f"# {method.name}", f"Learns from {escaped(method.learns_from)}.", escaped(method.paper)]
    if method.recipes:
        rows = [
            (
                code(recipe.name),
                escaped(recipe.about),
                " ".join(code(f"{key}={_text(value)}") for key, value in {**recipe.split, **recipe.settings}.items()),
            )
            for recipe in method.recipes
        ]
        parts += ["## Recipes", table(("recipe", "is for", "sets"), rows)]
    rows = [
        (
            code(setting.name),
            escaped(setting.description),
            code(_text(setting.default)),
            escaped(setting.allowed) + (f"; `tune` searches {escaped(setting.searched)}" if setting.searched else ""),
        )
        for setting in method.settings
    ]
    parts += ["## Settings", table(("setting", "meaning", "default", "allowed"), rows)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _text(value: Any) -> str:
    """Return a value as `--set` reads it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple | list) else str(value)
