"""Evaluation of the model of a run folder, with a progress bar."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from orbithash.cluster.output import say, track
from orbithash.trainers import library

__all__ = ["evaluate_run"]


def evaluate_run(
    folder: Path,
    data: Path,
    protocol: str | None = None,
    baselines: bool = True,
    cutoffs: Sequence[int] = (20, 100),
    bits: int | None = None,
) -> tuple[dict[str, Any], Path]:
    """Return the metrics and the path of the report; see `library.evaluate_run`."""
    with ExitStack() as stack:
        advance_to: Callable[[int, str], None] | None = None

        def on_progress(completed: int, total: int) -> None:
            nonlocal advance_to
            if advance_to is None:
                advance_to = stack.enter_context(track("evaluating", total, "images"))
            advance_to(completed, "")

        metrics, page, reason = library.evaluate_run(
            folder, data, protocol, baselines, cutoffs, bits, on_progress=on_progress
        )
    if reason is not None:
        say(f"no baselines: {reason}")
    return metrics, page
