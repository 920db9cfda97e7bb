"""Output of commands: messages and progress on stderr (a bar on a terminal, else plain lines), JSON on stdout."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["console", "is_debug", "print_json", "say", "set_debug", "track", "track_when_known"]

console = Console(stderr=True, highlight=False)

# Minimum time between two plain lines.
LINE_INTERVAL_S = 10.0


class _State:
    debug = False


def set_debug(on: bool) -> None:
    """Switch diagnostic output on or off for this process, as the option --debug does."""
    _State.debug = on


def is_debug() -> bool:
    """Return whether diagnostic output is on."""
    return _State.debug


def say(text: str) -> None:
    """Print one line for the user on stderr."""
    console.print(text, markup=False, soft_wrap=True)


@contextmanager
def track(what: str, total: int, unit: str, begun: float | None = None) -> Iterator[Callable[[int, str], None]]:
    """Show the progress of `what`. Yield `advance_to(completed, note)`; `completed` counts up to `total` units.

    Rates count from `begun`, a time of `time.monotonic`, by default from now.
    """
    begun = time.monotonic() if begun is None else begun
    if console.is_terminal:
        with _bar(what, total, unit, begun) as advance_to:
            yield advance_to
    else:
        yield _lines(what, total, unit, begun)


@contextmanager
def track_when_known(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Do what `track` does, shown from the first call on. Yield `advance_to(completed, total)`."""
    begun = time.monotonic()
    with ExitStack() as stack:
        shown: Callable[[int, str], None] | None = None

        def advance_to(completed: int, total: int) -> None:
            nonlocal shown
            if shown is None:
                shown = stack.enter_context(track(what, total, unit, begun))
            shown(completed, "")

        yield advance_to


@contextmanager
def _bar(what: str, total: int, unit: str, begun: float) -> Iterator[Callable[[int, str], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} " + unit + " {task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total, note="", rate="")

        def advance_to(completed: int, note: str = "") -> None:
            progress.update(task, completed=completed, note=note, rate=_rate(completed, begun))

        yield advance_to


def _lines(what: str, total: int, unit: str, begun: float) -> Callable[[int, str], None]:
    shown = time.monotonic()
    finished = False

    def advance_to(completed: int, note: str = "") -> None:
        nonlocal shown, finished
        now = time.monotonic()
        if finished or (completed < total and now - shown < LINE_INTERVAL_S):
            return
        shown, finished = now, completed >= total
        tail = f" in {now - begun:.0f} s"
        if completed < total:
            # Before the first unit is complete there is no rate to estimate from.
            tail = f", {(now - begun) / completed * (total - completed):.0f} s left" if completed else ""
        print(f"{what}: {completed}/{total} {unit}{_rate(completed, begun)}{tail} {note}".rstrip(), file=sys.stderr)

    return advance_to


def _rate(completed: int, begun: float) -> str:
    seconds = time.monotonic() - begun
    if not completed or seconds <= 0:
        return ""
    rate = completed / seconds
    return f" ({rate:.0f}/s)" if rate >= 10 else f" ({rate:.1f}/s)"


def print_json(value: Any) -> None:
    """Print a result as one line of JSON on stdout; values of types that JSON lacks are printed as text."""
    print(json.dumps(value, default=str))
