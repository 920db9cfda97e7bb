"""The command line. Each verb checks its arguments, calls one function and prints the result."""

import os
import sys
import traceback
import warnings
from importlib.metadata import version
from itertools import pairwise
from typing import Annotated, Any

import typer
import typer.core

from orbithash.cluster.cli import archive, cluster, detectors, learn, measure, prepare, publishing
from orbithash.cluster.cli.extras import missing_extra
from orbithash.cluster.cli.gateway import exploring, search, web
from orbithash.cluster.output import set_debug
from orbithash.encoders.errors import InputError

__all__ = ["app", "main"]

# The verbs of a gateway and its clients in `orbithash --help`: those that start something, that search, that change.
_SEARCH_VERBS = (
    *("serve", "web", "query", "rank", "count", "detector"),
    *("upsert", "delete", "refresh", "status"),
)

# Options whose empty value is their default. Any other empty value is refused, because it usually is a variable of the
# shell that is not set, and as a path it would be the current folder.
_MAY_BE_EMPTY = frozenset(
    ("--data-licence", "--dates", "--filter", "--licence", "--name", "--prefix", "--provider", "--rescore", "--source")
)


class _Verbs(typer.core.TyperGroup):
    def list_commands(self, context: Any) -> list[str]:
        """Return the names of all verbs, as the help lists them."""
        names = super().list_commands(context)
        ordered = iter(name for name in _SEARCH_VERBS if name in names)
        return [next(ordered) if name in _SEARCH_VERBS else name for name in names]


app = typer.Typer(
    cls=_Verbs,
    help="Train, encode, search and evaluate Earth-observation imagery by learned binary codes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for room in (learn, prepare, publishing, archive, detectors, search, exploring, web, cluster, measure):
    app.add_typer(room.verbs)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"orbithash {version('orbithash')}")
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, and the log of Ray and its workers.")
    ] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Read the options that all verbs share."""
    set_debug(debug)


def main() -> None:
    """Run the command line. Exit codes: 0 success, 1 internal error, 2 wrong input or a missing dependency."""
    _ignore_missing_georeference()
    # Read when a verb imports torch. OpenMP's threads otherwise spin at barriers: beside another busy process, each
    # layer waits for a thread that has lost its core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # typer knows --debug before the verb only.
    if is_debug := "--debug" in sys.argv[1:]:
        sys.argv.remove("--debug")
        sys.argv.insert(1, "--debug")
    try:
        _check_empty(sys.argv[1:])
        # Standalone, typer would format errors and exit by itself.
        code = app(prog_name="orbithash", standalone_mode=False)
    except Exception as err:
        usage = _usage_error(err)
        is_input = isinstance(err, InputError)
        missing = None if is_input else missing_extra(err, _verb(sys.argv[1:]))
        is_users = is_input or usage is not None or missing is not None
        if is_debug:
            traceback.print_exc()
        if usage is not None:
            print(usage, end="\n" if usage else "", file=sys.stderr)
        elif missing is not None:
            print(f"error: {missing}", file=sys.stderr)
        elif not is_debug:
            hint = "" if is_users else " (orbithash --debug VERB … shows where)"
            name = "" if is_users else f"{type(err).__name__}: "
            print(f"error: {name}{_shown(err)}{hint}", file=sys.stderr)
        raise SystemExit(2 if is_users else 1) from None
    raise SystemExit(code)


def _check_empty(words: list[str]) -> None:
    """Raise `InputError` for an empty argument, or an empty value of an option that needs one."""
    for before, word in pairwise(["", *words]):
        option, equals, value = word.partition("=")
        if not word:
            option = before if before.startswith("-") else ""
        elif not option.startswith("--") or not equals or value:
            continue
        if option not in _MAY_BE_EMPTY:
            what = f"the value of {option}" if option else "an argument"
            raise InputError(f"{what} is empty; give a value")


def _verb(words: list[str]) -> str:
    """Return the verb among the words of the command line; of the group bench, its two words."""
    words = [word for word in words if not word.startswith("-")]
    return " ".join(words[:2] if words[:1] == ["bench"] else words[:1])


def _ignore_missing_georeference() -> None:
    """Hide the warning of rasterio for images without georeference, in this process and in those that it starts."""
    message = "Dataset has no geotransform"
    warnings.filterwarnings("ignore", message)
    filters = [*filter(None, os.environ.get("PYTHONWARNINGS", "").split(",")), f"ignore:{message}"]
    os.environ["PYTHONWARNINGS"] = ",".join(dict.fromkeys(filters))


def _usage_error(err: Exception) -> str | None:
    """Return the line for an error of typer, which has a method of its own for messages; None for other errors."""
    if not hasattr(err, "format_message"):
        return None
    problem = err.format_message().rstrip(".")
    if not problem:
        # A command without words: typer has printed the help.
        return ""
    if values := getattr(err.__cause__, "errors", None):
        problem += f", got {values()[0]['input']!r}"
    context = getattr(err, "ctx", None)
    return f"error: {problem}; see {context.command_path if context else 'orbithash'} --help"


def _shown(err: Exception) -> str:
    """Return the whole message of an `InputError`, the first line of other messages."""
    text = str(err)
    return text if isinstance(err, InputError) else text.splitlines()[0] if text else "no message"


if __name__ == "__main__":
    # Jobs run `python -m`: the script may not be on the nodes' path.
    main()
