"""What goes wrong by the user's hand.

The command line turns an `InputError` into one line and exit code 2; everything else is a fault of ours (exit code 1).
"""

from collections.abc import Sequence

__all__ = ["ArchiveBusy", "ImageError", "InputError", "listed"]


class InputError(ValueError):
    """The user's input is wrong. The message says what was got, what is allowed and what to do."""


class ImageError(InputError):
    """One image is refused. In a job the message goes to the archive's side table and the job goes on."""


class ArchiveBusy(InputError):
    """Another process has the right to write the archive; it may be free a moment later."""


def listed(problems: Sequence[str], where: str) -> InputError:
    """One error for all problems found in `where`, so that a user mends them in one go."""
    assert problems, "an error needs a problem"
    if len(problems) == 1:
        return InputError(f"{where}: {problems[0]}")
    return InputError(f"{where}: found {len(problems)} problems:\n" + "\n".join(f"  - {p}" for p in problems))
