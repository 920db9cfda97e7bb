"""Functions that numba compiles for the processor they run on, when they are called first.

The compiled code is kept in `NUMBA_CACHE_DIR` or in the folder `numba` of `cache_folder()`, so that the next process
loads it. If nothing can be written there, each process compiles anew.
"""

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

from orbithash.encoders.files import cache_folder

__all__ = ["Kernel", "flat", "kernel_folder", "read_only"]

_LOG = logging.getLogger(__name__)
_LOCK = threading.Lock()


def kernel_folder() -> Path:
    """Return the folder of compiled code."""
    return Path(os.environ.get("NUMBA_CACHE_DIR") or cache_folder() / "numba")


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
        return (self._compiled or self._load())(*arguments)

    def _load(self) -> Callable[..., Any]:
        # The lock also covers the setting of numba, which belongs to the whole process.
        with _LOCK:
            if self._compiled is None:
                folder, before = kernel_folder(), numba.config.CACHE_DIR
                is_kept = _can_write(folder)
                numba.config.CACHE_DIR = str(folder)
                try:
                    self._compiled = numba.njit(nogil=True, cache=is_kept)(self._function)
                finally:
                    numba.config.CACHE_DIR = before
            return self._compiled


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as err:
        _LOG.warning("kernels are compiled in each process: %s cannot be written (%s)", folder, err)
        return False


def flat(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a read-only view [size] of a contiguous array."""
    return read_only(np.ascontiguousarray(array).reshape(-1))
