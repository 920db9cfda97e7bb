"""Encode images into codes: reading imagery, networks and model folders, the archive of codes.

`HashModel` and `Archive` are imported when they are first used: torch and Lance take seconds to load.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orbithash.encoders.archive.archive import Archive
    from orbithash.encoders.networks.model import HashModel

__all__ = ["Archive", "HashModel"]


def __getattr__(name: str) -> Any:
    """Import a name of `__all__`."""
    if name == "Archive":
        from orbithash.encoders.archive.archive import Archive

        return Archive
    if name == "HashModel":
        from orbithash.encoders.networks.model import HashModel

        return HashModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the names that can be imported."""
    return sorted({*globals(), *__all__})
