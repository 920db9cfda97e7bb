"""Training and evaluation: methods, data sets, the training loop, metrics and reports.

`train` and `evaluate` are the functions for other programs. The rooms hold what they are made of.

>>> from orbithash.trainers import evaluate, train
>>> model = train("triplet", "images", "runs/first", bits=32, epochs=2, batch_size=8)
>>> codes = model.encode_files(["images/beach/beach0.png", "images/river/river3.png"])
>>> codes.shape, codes.dtype
((2, 4), dtype('uint8'))
>>> metrics = evaluate("runs/first")
>>> 0 <= metrics["metrics"]["ap_min@20"]["expected"] <= 1
True
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orbithash.trainers.library import evaluate, train

__all__ = ["evaluate", "train"]


def __getattr__(name: str) -> Any:
    """Import `train` and `evaluate` on first use, because torch takes seconds to import."""
    if name in __all__:
        from orbithash.trainers import library

        return getattr(library, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
