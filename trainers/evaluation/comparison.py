"""Results of the baselines that a model is compared with."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from orbithash.trainers.metrics.code_statistics import CodeStatistics

__all__ = ["HEADLINE", "HEADLINE_K", "BaselineResult", "main_baseline"]

HEADLINE_K = 20
HEADLINE = f"ap_min@{HEADLINE_K}"


@dataclass(frozen=True)
class BaselineResult:
    """Result of one baseline for the queries and the database of an evaluation.

    Attributes:
        bytes: bytes per item.
        metrics: means over the queries by name of the metric.
        scores: float64 [Q], the expected `ap_min@20` of each query.
        nearest: float64 [C, C], number of queries of each row's class whose nearest item is of each column's class, as
            `metrics.add_nearest` counts them.
        codes: statistics of the database's codes; None if the baseline has no bits, or not as many as the model.
    """

    bytes: int
    metrics: Mapping[str, float]
    scores: npt.NDArray[np.float64] = field(repr=False, compare=False)
    nearest: npt.NDArray[np.float64] = field(repr=False, compare=False)
    codes: CodeStatistics | None = field(default=None, repr=False, compare=False)


def main_baseline(results: Mapping[str, BaselineResult], max_bytes: int) -> tuple[str, BaselineResult] | None:
    """Return name and result of the baseline with the highest headline among those of at most `max_bytes` an item."""
    no_larger = [(name, result) for name, result in results.items() if result.bytes <= max_bytes]
    return max(no_larger, key=lambda pair: pair[1].metrics[HEADLINE], default=None)
