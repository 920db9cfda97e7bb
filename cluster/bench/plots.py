"""The plots of `bench search`, `bench fanout` and `bench rescore`, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orbithash.trainers.reports.look import BLUE, GREEN, GRID, INK, MUTED, ORANGE, SERIES

__all__ = ["latency_bars", "latency_curves", "recall_over_oversampling", "recall_over_rate"]

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
}
_SIZE_IN, _DPI = (7.5, 4.5), 150


def recall_over_rate(engines: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Plot recall over queries per second, one point for lone queries and one for batches of each engine."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes()
        for how, colour, marker in (("lone", BLUE, "o"), ("batched", ORANGE, "s")):
            rates = [each[f"{how}_queries_per_s"] for each in engines.values()]
            recalls = [each["recall"] for each in engines.values()]
            axes.scatter(rates, recalls, color=colour, marker=marker, label=how, zorder=3)
        for number, (name, each) in enumerate(engines.items()):
            pair = [each["lone_queries_per_s"], each["batched_queries_per_s"]]
            axes.plot(pair, [each["recall"]] * 2, color=MUTED, linewidth=1, zorder=2)
            # Exact engines lie on one line, so their names are placed at four heights.
            below = 14 + (11 * (number % 4) if each["recall"] > 0.95 else 0)
            axes.annotate(
                name, (pair[0], each["recall"]), (0, -below), textcoords="offset points", ha="center", fontsize=8
            )
        axes.set(xscale="log", xlabel="queries per second, one core", ylabel="recall by distance", ylim=(-0.12, 1.06))
        axes.set_yticks(np.linspace(0, 1, 6))
        axes.margins(x=0.12)
        axes.legend(loc="lower right", ncols=2)
        figure.savefig(path, dpi=_DPI)


def latency_bars(engines: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Plot the 50th, 95th and 99th percentile of the latency of lone queries of each engine."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes()
        positions = np.arange(len(engines))
        for number, (share, colour) in enumerate(((50, BLUE), (95, ORANGE), (99, GREEN))):
            values = [each[f"p{share}_ms"] for each in engines.values()]
            axes.bar(positions + 0.27 * (number - 1), values, width=0.25, color=colour, label=f"p{share}")
        axes.set_xticks(positions, list(engines))
        axes.set(yscale="log", ylabel="ms of a lone query, one core")
        axes.grid(visible=False, axis="x")
        axes.legend(loc="best", ncols=3)
        figure.savefig(path, dpi=_DPI)


def latency_curves(curves: Mapping[str, Sequence[float]], num_queries: int, path: Path) -> None:
    """Plot the share of queries that ended within a time (ms): one curve per scenario."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes()
        for number, (name, values) in enumerate(curves.items()):
            style = ("-", "--", ":")[number // len(SERIES) % 3]
            shares = np.arange(1, len(values) + 1) / num_queries
            axes.step(sorted(values), shares, style, color=SERIES[number % len(SERIES)], label=name, where="post")
        axes.set(xscale="log", xlabel="ms, simulated delays only", ylabel="share of queries", ylim=(0, 1.02))
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)
        figure.savefig(path, dpi=_DPI)


def recall_over_oversampling(methods: Mapping[str, Mapping[str, Any]], limit: float, path: Path) -> None:
    """Plot recall over oversampling, one curve per method; the dashed line is the limit of the stored vectors."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes()
        for (name, each), colour in zip(methods.items(), SERIES, strict=False):
            oversamplings = [int(oversampling) for oversampling in each["recall"]]
            label = f"{name}, {each['bytes']} bytes"
            axes.plot(oversamplings, list(each["recall"].values()), color=colour, marker="o", label=label)
        axes.axhline(limit, color=MUTED, linestyle="--", linewidth=1, label="stored vectors rank all rows")
        axes.set(xlabel="oversampling", ylabel="recall@10 against float cosine", ylim=(0, 1.02))
        axes.set_xscale("log", base=2)
        axes.legend(loc="lower right", fontsize=8)
        figure.savefig(path, dpi=_DPI)


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(_SIZE_IN, layout="constrained")
    return figure, figure.add_subplot()
