"""Pages of the verbs: their help, arguments and options, read from the command line's own description."""

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import typer
from markdown_parts import code, escaped, index, table

__all__ = ["pages"]


def pages() -> dict[str, str]:
    """Return the pages of all verbs and their index, by file name without ending."""
    from orbithash.cluster.cli.main import app

    verbs = list(_verbs(typer.main.get_command(app), ()))
    made = {"-".join(words): _page(words, command) for words, command in verbs}
    rows = [
        ("-".join(words), " ".join(words), escaped(_first_paragraph(command.help or ""))) for words, command in verbs
    ]
    intro = (
        "`orbithash VERB --help` prints the same in the terminal. `--debug`, before the verb, shows the traceback of "
        "an error. Exit codes: 0 success, 1 internal error, 2 wrong input."
    )
    return made | {"index": index("Commands", intro, ("verb", "does"), rows)}


def _verbs(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the words and the command of each verb, in the order of the help."""
    for name in command.list_commands(None):
        child = command.commands[name]
        if child.hidden:
            continue
        if hasattr(child, "commands"):
            yield from _verbs(child, (*words, name))
        else:
            yield (*words, name), child


def _page(words: tuple[str, ...], command: Any) -> str:
    name = " ".join(words)
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option" and not each.hidden]
    usage = " ".join(["orbithash", *words, *(_metavar(each) for each in arguments), "[OPTIONS]"])
    parts = [f"# {name}", *(escaped(part) for part in (command.help or "").split("\n\n")), f"```text\n{usage}\n```"]
    example = (command.epilog or "").removeprefix("Example:").strip()
    if example:
        parts += ["Example:", f"```text\n{example}\n```"]
    if arguments:
        rows = [(code(_metavar(each)), escaped(each.help or "")) for each in arguments]
        parts += ["## Arguments", table(("argument", "meaning"), rows)]
    if options:
        rows = [(_names(each), escaped(each.help or ""), _default(each)) for each in options]
        parts += ["## Options", table(("option", "sets", "default"), rows)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _first_paragraph(text: str) -> str:
    return text.partition("\n\n")[0]


def _metavar(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required else f"[{name}]"


def _names(option: Any) -> str:
    """Return the names of an option, the kind of its value, and its environment variable."""
    names = ", ".join(code(name) for name in (*option.opts, *option.secondary_opts))
    kind = option.metavar or _kind(option.type_descriptor.annotation)
    variables = [option.envvar] if isinstance(option.envvar, str) else option.envvar or []
    return " ".join(
        [names, *([code(kind)] if kind else []), *(f"(or the variable {code(name)})" for name in variables)]
    )


def _kind(annotation: Any) -> str:
    """Return the kind of an option's value, "" for a flag."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "|".join(str(each.value) for each in annotation)
    return {bool: "", str: "TEXT", int: "NUMBER", float: "NUMBER", Path: "PATH"}.get(annotation, "VALUE")


def _default(option: Any) -> str:
    value = option.default
    if option.required:
        return "required"
    if value is None or value in ((), []) or isinstance(value, bool) or callable(value):
        return ""
    return code(str(getattr(value, "value", value)))
