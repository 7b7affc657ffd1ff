"""Figures of scores over rounds and over bytes: a curve for each method."""

from collections.abc import Callable, Sequence

import matplotlib.ticker
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedlm.results.drawing import Style, logarithmic_axis, marker, panels
from fedlm.results.lettering import blank, cut_at_whole, measure, methods_legend, name_row, partition_title
from fedlm.results.scene import Scene

MOST_BANDS = 8  # methods


def _mean_curves(rounds: pandas.DataFrame, factor: float) -> pandas.DataFrame:
    """Return, for each scored round, mean and deviation of the score over seeds, and mean MB so far."""
    scored = rounds[rounds["validation_score"].notna()]
    scored = scored.assign(
        score=scored["validation_score"] * factor,
        megabytes=(scored["upload_bytes"] + scored["download_bytes"]) / 1e6,
    )
    grouped = scored.groupby("round")
    return pandas.DataFrame(
        {
            "score": grouped["score"].mean(),
            "deviation": grouped["score"].std(ddof=1).fillna(0.0),
            "megabytes": grouped["megabytes"].mean(),
        }
    )


def _draw_curve(axes: Axes, x: pandas.Series, curve: pandas.DataFrame, style: Style, band: bool) -> None:
    axes.plot(
        x,
        curve["score"],
        color=style.colour,
        # A line between two scores would look like a curve.
        linestyle=style.line if len(curve) > 2 else "none",
        markevery=max(1, len(curve) // 8),
        **marker(style),
    )
    if band and curve["deviation"].any():
        low, high = curve["score"] - curve["deviation"], curve["score"] + curve["deviation"]
        axes.fill_between(x, low, high, color=style.colour, alpha=0.15, linewidth=0)


def _curves(
    scene: Scene,
    rounds: pandas.DataFrame,
    look: dict[str, Style],
    rows: Sequence[tuple[str, Sequence[str]]],
    draw: Callable[[Axes, pandas.DataFrame, Style, bool], None],
    x_label: str,
) -> Figure:
    """Draw a row of panels for each task, one for each of its partitions, with a curve for each method."""
    known = scene.runs[["task", "partition", "method", "seed"]]
    rounds = rounds.merge(known, on=list(known.columns))
    widest = max(len(partitions) for _, partitions in rows)
    figure, grid = panels(len(rows), widest, sharex="all", sharey="row")
    methods = set()
    for row, (task, partitions) in enumerate(rows):
        name, factor = measure(scene, task)
        for axes in grid[row, len(partitions) :]:
            blank(axes)
        for column, partition in enumerate(partitions):
            axes = grid[row, column]
            some = rounds[(rounds["task"] == task) & (rounds["partition"] == partition)]
            axes.set_title(partition_title(scene, task, partition, widest), pad=3)
            if some["validation_score"].notna().sum() == 0:
                axes.text(0.5, 0.5, "no runs", transform=axes.transAxes, ha="center", color="#777777")
                continue
            for method in scene.methods:
                own = some[some["method"] == method]
                if len(own):
                    draw(axes, _mean_curves(own, factor), look[method], len(scene.methods) <= MOST_BANDS)
                    methods.add(method)
            # Panels that share an axis have its numbers where no panel comes below.
            if not any(column < len(below) for _, below in rows[row + 1 :]):
                axes.set_xlabel(x_label)
                axes.tick_params(labelbottom=True)
        name_row(grid[row, 0], task, f"validation {name}")
        cut_at_whole(grid[row, 0], factor)
    methods_legend(figure, scene, look, methods)
    return figure


def over_rounds(
    scene: Scene,
    rounds: pandas.DataFrame,
    look: dict[str, Style],
    rows: Sequence[tuple[str, Sequence[str]]],
) -> Figure:
    """Score of the server's model on the validation split, after each round.

    Bands are ± one deviation; more than `MOST_BANDS` would hide the curves, and are left out.
    """

    def draw(axes: Axes, curve: pandas.DataFrame, style: Style, band: bool) -> None:
        _draw_curve(axes, curve.index, curve, style, band)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))

    return _curves(scene, rounds, look, rows, draw, "round")


def over_bytes(
    scene: Scene,
    rounds: pandas.DataFrame,
    look: dict[str, Style],
    rows: Sequence[tuple[str, Sequence[str]]],
) -> Figure:
    """The same over the bytes that all clients sent and received; who sends nothing is a horizontal line."""

    sent = scene.runs["upload_bytes"] + scene.runs["download_bytes"]
    logarithmic = (sent > 0).any()

    def draw(axes: Axes, curve: pandas.DataFrame, style: Style, band: bool) -> None:
        if logarithmic:
            logarithmic_axis(axes)
        sent = curve[curve["megabytes"] > 0]
        if sent.empty:
            axes.axhline(curve["score"].iloc[-1], color=style.colour, linestyle=style.line, linewidth=0.8)
        else:
            _draw_curve(axes, sent["megabytes"], sent, style, band)

    return _curves(scene, rounds, look, rows, draw, "sent up and down so far (MB)")
