"""The command line. Each verb checks what it was given, calls one function, prints what came of it."""

import sys
import traceback
from typing import Annotated

import typer

from orbithash.cluster.cli import bench as cli_bench
from orbithash.cluster.cli import search as cli_search
from orbithash.cluster.cli import training as cli_training
from orbithash.encoders.errors import InputError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Train, encode, search and evaluate Earth-observation imagery by learned binary codes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_training.verbs)
app.add_typer(cli_search.verbs)
app.add_typer(cli_bench.verbs, name="bench")


@app.callback()
def common(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Options before the verb."""
    _State.debug = debug


class _State:
    debug = False


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 failed inside, 2 the input is wrong."""
    # Also where typer does not see it: in the arguments after the verb.
    if "--debug" in sys.argv[2:]:
        sys.argv.remove("--debug")
        sys.argv.insert(1, "--debug")
    try:
        # Or typer would frame its errors and exit by itself.
        code = app(prog_name="orbithash", standalone_mode=False)
    except Exception as err:
        usage = _usage_error(err)
        is_users = usage is not None or isinstance(err, InputError)
        if _State.debug:
            traceback.print_exc()
        elif usage is not None:
            print(usage, end="\n" if usage else "", file=sys.stderr)
        else:
            hint = "" if is_users else " (orbithash --debug VERB … shows where)"
            name = "" if is_users else f"{type(err).__name__}: "
            print(f"error: {name}{_first_lines(err)}{hint}", file=sys.stderr)
        raise SystemExit(2 if is_users else 1) from None
    raise SystemExit(code)


def _usage_error(err: Exception) -> str | None:
    """One line for words that are no command: typer's own errors, known by their method. None for any other error."""
    if not hasattr(err, "format_message"):
        return None
    problem = err.format_message().rstrip(".")
    if not problem:
        # Nothing was asked, and typer has shown the help.
        return ""
    if values := getattr(err.__cause__, "errors", None):
        problem += f", got {values()[0]['input']!r}"
    context = getattr(err, "ctx", None)
    return f"error: {problem}; see {context.command_path if context else 'orbithash'} --help"


def _first_lines(err: Exception) -> str:
    """All of what we say to a user; of what libraries say, the first line."""
    text = str(err)
    return text if isinstance(err, InputError) else text.splitlines()[0] if text else "no message"


if __name__ == "__main__":
    # As a job, where the script may not be on the path.
    main()
