"""Errors of the user's input.

The command line reports an `InputError` in one line with exit code 2. Any other exception is an internal error (exit
code 1).
"""

from collections.abc import Sequence

__all__ = ["ArchiveBusy", "ImageError", "InputError", "listed"]


class InputError(ValueError):
    """The user's input is wrong. The message says what was given, what is allowed and what to do.

    Attributes:
        where: of an error that `listed` returned, where the problems are.
        problems: of such an error, the problems, one line each.
    """

    where: str = ""
    problems: tuple[str, ...] = ()


class ImageError(InputError):
    """One image is refused, or several are, which it lists. A job records the message and continues."""


class ArchiveBusy(InputError):
    """Another process is writing the archive; a later attempt may succeed."""


def listed(problems: Sequence[str], where: str, kind: type[InputError] = InputError) -> InputError:
    """Return one error of this kind for all problems in `where`, so that the user can correct them together."""
    assert problems, "an error needs a problem"
    if len(problems) == 1:
        error = kind(f"{where}: {problems[0]}")
    else:
        error = kind(f"{where}: found {len(problems)} problems:\n" + "\n".join(f"  - {p}" for p in problems))
    error.where, error.problems = where, tuple(problems)
    return error
