"""The plots of the reports, each returned as SVG text.

They use matplotlib's objects, never pyplot, so they can be drawn in any thread and leave no state. Text remains text in
the SVG, and class names (names of users' folders) are never interpreted as markup.
"""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from orbithash.trainers.metrics.code_statistics import RARE_SHARE
from orbithash.trainers.metrics.metrics import RadiusCurve
from orbithash.trainers.metrics.retrieval import VALIDATION_SIZES
from orbithash.trainers.reports.look import BLUE, GRID, INK, MUTED, ORANGE, SERIES, printable

__all__ = [
    "Coordinate",
    "bars",
    "bit_balance",
    "class_confusion",
    "code_map",
    "cutoff_curve",
    "distance_histogram",
    "learning_curves",
    "parallel_coordinates",
    "precision_recall",
]

Floats = npt.NDArray[np.float64]

WIDTH_IN, HEIGHT_IN = 6.6, 4.1
MAX_BARS = 40
MAX_NAMED_CLASSES = 50
MAX_NAME = 34

_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "orbithash",
    "font.size": 11,
    "text.color": INK,
    # A `$` in a class name must not start a formula.
    "text.parse_math": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "lines.linewidth": 2,
    "lines.markersize": 5,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
_DASHES = ("-", "--", "-.", ":")
# With the four colours, they distinguish 32 classes.
_MARKERS = "os^DvPX<"


def learning_curves(history: Sequence[Mapping[str, Any]], part: Literal["train", "validation"]) -> str:
    """Plot the losses of "train" or the metrics of "validation" by epoch.

    `history` has one record per epoch: "epoch", "train/<loss>", and "validation/<metric>" if it was validated.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _axes()
        keys = dict.fromkeys(key for record in history for key in record if key.startswith(f"{part}/"))
        names = [key for key in keys if key not in VALIDATION_SIZES]
        for i, name in enumerate(names):
            points = [(float(record["epoch"]), float(record[name])) for record in history if name in record]
            _line(axes, [x for x, _ in points], [y for _, y in points], name.removeprefix(f"{part}/"), i)
        axes.set(xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if part == "train":
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        _legend(axes)
        return _svg(figure)


def precision_recall(curves: Mapping[str, RadiusCurve]) -> str:
    """Plot precision over recall of lookup within increasing Hamming radii; one line per name."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes()
        for i, (name, curve) in enumerate(curves.items()):
            _line(axes, curve.recall, curve.precision, name, i, marker="o", markersize=3.5)
        axes.set(xlabel="recall", ylabel="precision", xlim=(-0.01, 1.01), ylim=(0, 1.03))
        if len(curves) > 1:
            _legend(axes)
        return _svg(figure)


def cutoff_curve(
    cutoffs: Sequence[int],
    values: Mapping[str, Floats],
    *,
    band: tuple[Floats, Floats] | None = None,
    chance: float | None = None,
    xlabel: str = "k",
    ylabel: str = "precision",
) -> str:
    """Plot a metric over the cut-off k; `band` shades the range over all orders of ties."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes()
        if band is not None:
            axes.fill_between(cutoffs, *band, color=BLUE, alpha=0.18, linewidth=0, label="any order of ties")
        for i, (name, line) in enumerate(values.items()):
            _line(axes, cutoffs, line, name, i)
        if chance is not None:
            axes.axhline(chance, color=MUTED, linewidth=1.2, linestyle=":", label="chance")
        axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel, ylim=(0, 1.03), xlim=(1, max(cutoffs[-1], 2)))
        ticks = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000) if k <= cutoffs[-1]]
        axes.set_xticks(ticks, [f"{k:,}" for k in ticks])
        axes.minorticks_off()
        _legend(axes)
        return _svg(figure)


def bit_balance(balance: Sequence[float]) -> str:
    """Plot the share of ones of each bit; bits with a rare value are orange."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes()
        values = np.asarray(balance)
        colours = [ORANGE if min(value, 1 - value) < RARE_SHARE else BLUE for value in values]
        axes.bar(np.arange(len(values)), values - 0.5, bottom=0.5, width=0.8, color=colours)
        axes.axhline(0.5, color=INK, linewidth=1.2)
        axes.set(xlabel="bit", ylabel="share of ones", ylim=(0, 1), xlim=(-0.8, len(values) - 0.2))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=False, axis="x")
        return _svg(figure)


def bars(
    values: Mapping[str, float],
    xlabel: str,
    *,
    mean: float | None = None,
    limit: float | None = None,
    highlighted: str | None = None,
    baseline: tuple[str, Mapping[str, float]] | None = None,
) -> str:
    """Plot horizontal bars, lowest value at the bottom; at most the `MAX_BARS` lowest.

    Args:
        values: value by name.
        xlabel: label of the axis.
        mean: value of a dashed line; None: no line.
        limit: end of the axis; None: after the longest bar.
        highlighted: name of the bar to compare with all others, which are grey; None: all bars are equal.
        baseline: name of a baseline and its values by the names of `values`, drawn as marks on the bars.
    """
    ordered = sorted(values.items(), key=lambda pair: (pair[1], pair[0]))
    shown = ordered[:MAX_BARS]
    digits = 3 if limit == 1 else 1
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(height=0.9 + (0.26 if len(shown) > 12 else 0.34) * len(shown))
        places = np.arange(len(shown))
        colours = [BLUE if highlighted in (None, name) else MUTED for name, _ in shown]
        axes.barh(places, [v for _, v in shown], height=0.68, color=colours)
        marks = [baseline[1].get(name, np.nan) if baseline else np.nan for name, _ in shown]
        for place, (_, value), mark in zip(places, shown, marks, strict=True):
            text = f"{value:,.{digits}f}" if value >= 1 or limit == 1 else f"{value:.2g}"
            # Beside the bar and its mark.
            end = np.nanmax([value, mark])
            axes.annotate(text, (end, place), (5, 0), textcoords="offset points", va="center", fontsize=9.5)
        if baseline is not None:
            axes.plot(marks, places, "|", color=ORANGE, markersize=11, markeredgewidth=2.4, label=baseline[0])
        if mean is not None:
            axes.axvline(mean, color=INK, linewidth=1.2, linestyle="--", label=f"mean {mean:,.{digits}f}")
        if mean is not None or baseline is not None:
            figure.legend(loc="outside upper right", ncols=2, fontsize=9.5)
        axes.set_yticks(places, [_name(name) for name, _ in shown], color=INK)
        axes.set(xlabel=xlabel, ylim=(-0.6, len(shown) - 0.4), xlim=(0, limit and limit * 1.06))
        if limit == 1:
            axes.set_xticks(np.linspace(0, 1, 6))
        elif any(value > 0 for _, value in shown):
            axes.xaxis.set_major_locator(MaxNLocator(6))
            # Room for the numbers beside the bars.
            axes.margins(x=0.12)
            axes.set_xlim(left=0)
        axes.grid(visible=False, axis="y")
        if len(ordered) > len(shown):
            axes.set_title(f"the {len(shown)} lowest of {len(ordered)}")
        return _svg(figure)


def class_confusion(shares: Floats, classes: Sequence[str]) -> str:
    """Plot shares float64 [C, C] as a heat map: rows are classes of queries, columns classes of their nearest items."""
    count = len(classes)
    # At least as large as the other plots, so that the text has the same size.
    side = min(9.0, max(HEIGHT_IN + 0.4, 2.4 + 0.22 * count))
    with mpl.rc_context({**_STYLE, "axes.grid": False, "axes.spines.bottom": False}):
        figure, axes = _axes(width=max(WIDTH_IN, side + 0.9), height=side)
        # From transparent to opaque, so that an empty cell has the page's own colour, light or dark.
        colours = LinearSegmentedColormap.from_list("share", [to_rgba(BLUE, 0.04), to_rgba(BLUE, 1)])
        mesh = axes.pcolormesh(shares, cmap=colours, vmin=0, vmax=1, edgecolors="none", rasterized=count > 60)
        axes.set(xlabel="class of the nearest item", ylabel="class of the query", aspect="equal")
        axes.invert_yaxis()
        if count <= MAX_NAMED_CLASSES:
            size = 9.5 if count <= 24 else 6.5
            names, places = [_name(name) for name in classes], np.arange(count) + 0.5
            axes.set_xticks(places, names, rotation=90, fontsize=size)
            axes.set_yticks(places, names, fontsize=size)
            axes.tick_params(length=0)
        else:
            axes.set(xticks=[], yticks=[])
        for row, column in zip(*np.nonzero(shares >= 0.005), strict=True):
            if count <= 24:
                share = shares[row, column]
                colour = "white" if share > 0.55 else INK
                text = f"{100 * share:.0f}"
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    text,
                    ha="center",
                    va="center",
                    fontsize=10 if count <= 12 else 7,
                    color=colour,
                )
        bar = figure.colorbar(mesh, ax=axes, shrink=0.5, aspect=18, pad=0.02, ticks=[0, 0.5, 1], format="{x:.0%}")
        bar.outline.set_visible(False)  # type: ignore[operator]
        return _svg(figure)


def code_map(points: npt.NDArray[np.floating], labels: Sequence[str]) -> str:
    """Plot points [N, 2] in the plane, with a colour and a marker for each name in `labels`."""
    with mpl.rc_context({**_STYLE, "axes.spines.bottom": False}):
        names = sorted(set(labels))
        columns = 2 if len(names) <= MAX_NAMED_CLASSES // 2 else 3
        figure, axes = _axes(height=HEIGHT_IN + 1.1 + 0.2 * min(len(names), MAX_NAMED_CLASSES) / columns)
        of_name = {name: np.flatnonzero([label == name for label in labels]) for name in names}
        for i, name in enumerate(names):
            x, y = points[of_name[name]].T
            marker = _MARKERS[i // len(SERIES) % len(_MARKERS)]
            colour = SERIES[i % len(SERIES)]
            axes.scatter(x, y, s=11, color=colour, marker=marker, linewidths=0, alpha=0.75, label=_name(name))
        axes.set(xticks=[], yticks=[], aspect="equal")
        axes.set_adjustable("datalim")
        if len(names) <= MAX_NAMED_CLASSES:
            figure.legend(
                *axes.get_legend_handles_labels(),
                loc="outside lower center",
                ncols=columns,
                fontsize=8,
                markerscale=1.6,
            )
        return _svg(figure)


@dataclass(frozen=True)
class Coordinate:
    """An axis of `parallel_coordinates`: one value per line, a number or a name; the scale may be logarithmic."""

    name: str
    values: Sequence[Any]
    is_logarithmic: bool

    def heights(self) -> tuple[list[float], list[tuple[float, str]]]:
        """Return the height of each value, from 0 to 1, and the labels of the axis with their heights."""
        is_numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)
        if is_numeric and len(set(self.values)) > 1:
            numbers = np.array(self.values, np.float64)
            by = np.log(numbers) if self.is_logarithmic and (numbers > 0).all() else numbers
            heights = (by - by.min()) / np.ptp(by)
            return heights.tolist(), [(0.0, f"{numbers.min():.3g}"), (1.0, f"{numbers.max():.3g}")]
        names = [_name(str(value)) for value in self.values]
        places = {name: place for place, name in enumerate(sorted(set(names)))}
        step = 1 / max(1, len(places) - 1)
        return [places[name] * step for name in names], [(place * step, name) for name, place in places.items()]


def parallel_coordinates(axes: Sequence[Coordinate], score: Coordinate, marked: int | None) -> str:
    """Plot one line per trial through its settings to its score; higher scores are darker, `marked` is dashed."""
    with mpl.rc_context(_STYLE):
        figure, plot = _axes(max(WIDTH_IN, 1.1 * (len(axes) + 1)), HEIGHT_IN)
        every = [*axes, score]
        placed = [axis.heights() for axis in every]
        good, _ = placed[-1]
        colours = LinearSegmentedColormap.from_list("scores", [GRID, BLUE])
        for line in np.argsort(good, kind="stable").tolist():
            plot.plot(
                range(len(every)),
                [heights[line] for heights, _ in placed],
                color=ORANGE if line == marked else colours(good[line]),
                linestyle="--" if line == marked else "-",
                linewidth=2.2 if line == marked or good[line] == 1 else 1.3,
                solid_joinstyle="round",
                zorder=3 if line == marked else 2,
            )
        for place, (_, labels) in enumerate(placed):
            plot.axvline(place, color=MUTED, linewidth=0.8, zorder=1)
            for height, text in labels:
                # Offset from the point where the lines meet the axis.
                above = -8 if height == 0 else 8
                plot.annotate(text, (place, height), (4, above), textcoords="offset points", fontsize=9, va="center")
        plot.set(yticks=[], xlim=(-0.1, len(every) - 0.4), ylim=(-0.06, 1.06))
        plot.set_xticks(range(len(every)), [_name(axis.name) for axis in every], rotation=25, ha="right", fontsize=9)
        plot.grid(visible=False)
        return _svg(figure)


def distance_histogram(items: npt.NDArray[np.int64], relevant: npt.NDArray[np.int64]) -> str:
    """Plot the distances of relevant and other items, as shares of all pairs of their kind; counts are int64 [K+1]."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes()
        edges = np.arange(len(items) + 1) - 0.5
        for i, (name, counts) in enumerate((("same class", relevant), ("other class", items - relevant))):
            shares = counts / max(1, counts.sum())
            axes.stairs(shares, edges, fill=True, color=SERIES[i], alpha=0.25)
            axes.stairs(shares, edges, color=SERIES[i], linewidth=1.8, linestyle=_DASHES[i], label=name)
        filled = np.flatnonzero(items)
        last = int(filled[-1]) if len(filled) else 1
        axes.set(xlabel="Hamming distance", ylabel="share of the pairs", xlim=(-0.5, last + 0.5), ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axes)
        return _svg(figure)


def _axes(width: float = WIDTH_IN, height: float = HEIGHT_IN) -> tuple[Figure, Axes]:
    figure = Figure((width, height), layout="constrained")
    return figure, figure.add_subplot()


def _line(axes: Axes, x: Sequence[float] | Floats, y: Sequence[float] | Floats, label: str, i: int, **how: Any) -> None:
    # Markers, because a line of one or two points is hard to see.
    how.setdefault("marker", "o" if len(x) <= 40 else "")
    how.setdefault("markersize", 4)
    dashes = _DASHES[i // len(SERIES) % len(_DASHES)]
    axes.plot(x, y, color=SERIES[i % len(SERIES)], linestyle=dashes, label=_name(label), **how)


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, loc="best")


def _name(name: str) -> str:
    name = printable(name)
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    with warnings.catch_warnings():
        # The reader's fonts draw the text, so glyphs missing from matplotlib's font do not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = re.sub(r"font-family: 'DejaVu Sans',[^;\"]*", f"font-family: {_FONTS}", svg)
    return svg[svg.index("<svg") :]
