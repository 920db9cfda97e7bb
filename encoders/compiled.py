"""Functions that numba compiles for the processor they run on, when they are called first.

The compiled code is kept in a folder, so that the next process loads it. If nothing can be written there, each process
compiles anew.
"""

import functools
import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba.core import types
from numba.extending import intrinsic

from orbithash.encoders.files import cache_folder

__all__ = ["Kernel", "count_ones", "flat", "kernel_folder", "read_only"]

_LOG = logging.getLogger(__name__)
_LOCK = threading.Lock()

# The folder of the top-level packages.
_FLOORS = Path(__file__).parents[1]


def kernel_folder(source: str) -> Path:
    """Return the folder of the compiled code of the kernels in a source file.

    It is below `NUMBA_CACHE_DIR` or the folder `numba` of `cache_folder()`.
    """
    path, folder = Path(source), Path(os.environ.get("NUMBA_CACHE_DIR") or cache_folder() / "numba")
    # Kernels call kernels of other rooms of their floor.
    floor = _FLOORS / path.relative_to(_FLOORS).parts[0] if path.is_relative_to(_FLOORS) else path.parent
    return folder / _source_digest(floor)


@functools.cache
def _source_digest(floor: Path) -> str:
    """Return a digest of the source of a floor. numba notices only changes of the file of the outermost function."""
    sources = [Path(__file__), *sorted(floor.rglob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a view that cannot be written. Kernels are compiled for such views, as mapped files are read-only."""
    view = array.view()
    view.flags.writeable = False
    return view


class Kernel:
    """A function that numba compiles, without the global interpreter lock, when it is called first."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._compiled: Callable[..., Any] | None = None
        self.__doc__ = function.__doc__

    def __call__(self, *arguments: Any) -> Any:
        """Call the compiled function. Arrays must always have the same types, or it is compiled for each."""
        if self._compiled is None:
            return self._first_call(arguments)
        return self._compiled(*arguments)

    def _first_call(self, arguments: tuple[Any, ...]) -> Any:
        # The lock also covers the setting of numba, which belongs to the whole process.
        with _LOCK:
            if self._compiled is None:
                self._compiled = _numba_function(self._function)
            compiled = self._compiled
        try:
            return compiled(*arguments)
        except Exception as err:
            # A damaged file, or a full disk. Nothing has run yet: kernels do not raise.
            _LOG.warning("%s is compiled anew: %s: %s", self._function.__name__, type(err).__name__, err)
            self._compiled = numba.njit(nogil=True)(self._function)
            return self._compiled(*arguments)


def _numba_function(function: Callable[..., Any]) -> Callable[..., Any]:
    folder, is_kept = kernel_folder(function.__code__.co_filename), True
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as err:
        _LOG.warning("%s is compiled anew: %s cannot be written (%s)", function.__name__, folder, err.strerror)
        is_kept = False
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder)
    try:
        compiled: Callable[..., Any] = numba.njit(nogil=True, cache=is_kept)(function)
    finally:
        numba.config.CACHE_DIR = before
    return compiled


def flat(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a read-only view [size] of a contiguous array."""
    return read_only(np.ascontiguousarray(array).reshape(-1))


@intrinsic  # type: ignore[untyped-decorator] # of numba
def count_ones(typing_context: Any, word: Any) -> Any:
    """Return the number of ones of a word uint64; for kernels."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate
