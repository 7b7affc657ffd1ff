"""Performance profiles: in which share of the cells a method is within x points of the best."""

import math

import numpy
import pandas
from matplotlib.figure import Figure

from fedlm.results.cells import CELL
from fedlm.results.drawing import WIDTH, Style, panels
from fedlm.results.lettering import methods_legend
from fedlm.results.scene import Scene
from fedlm.results.typeset import Table

WITHIN = (0, 0.5, 1, 2, 5, 10)  # points, the columns of the table


def gaps(scene: Scene) -> pandas.DataFrame:
    """Return how far below the best competitor each competitor is, in points: (cells, methods).

    A cell's score is the mean over its seeds. Infinity where a competitor has no run; cells whose metric is
    better when lower are left out, since they have no points.
    """
    runs = scene.runs[scene.runs["greater_is_better"].astype(bool)]
    competitors = [method for method in scene.methods if method not in scene.controls]
    runs = runs[runs["method"].isin(competitors)]
    scores = runs.pivot_table(index=CELL, columns="method", values="test_score", aggfunc="mean") * 100
    below = scores.rsub(scores.max(axis=1), axis=0).fillna(math.inf)
    # Rounding errors of means must not separate equal scores.
    return below.round(9)[[method for method in competitors if method in below]]


def shares(gaps: pandas.DataFrame, within: float) -> pandas.Series:
    """Return for each method the share of all cells in which it is within so many points of the best."""
    return (gaps <= within).mean()


def profiles_table(scene: Scene) -> Table:
    """The share of cells within some points of the best, for each competitor."""
    below = gaps(scene)
    steps = sorted({0.0, *(value for value in below.to_numpy().flat if math.isfinite(value))})
    numbers = [
        {"method": method, "title": scene.titles[method], "points": step, "share": value}
        for step in steps
        for method, value in shares(below, step).items()
    ]
    rows = [
        {"Method": scene.title(method)}
        | {f"Within {within:g}": f"{shares(below, within)[method]:.0%}" for within in WITHIN}
        for method in below
    ]
    columns = ["Method", *(f"Within {within:g}" for within in WITHIN)]
    cells = pandas.DataFrame(rows, columns=columns)
    notes = [
        f"Share of the {len(below)} cells (task × partition) in which a method's mean test score is "
        f"within so many "
        "points of the best competitor's; within 0: it is the best. A cell "
        "without a run of the method counts as not within. Cells whose metric is better when lower are "
        "left out.",
        *scene.notes(),
    ]
    return Table(
        "profiles",
        "How often a method is within some points of the best",
        pandas.DataFrame(numbers, columns=["method", "title", "points", "share"]),
        cells,
        numpy.zeros(cells.shape, dtype=bool),
        0,
        notes,
    )


def profiles(scene: Scene, look: dict[str, Style]) -> Figure:
    """Draw the share of cells over the distance from the best, a step function for each competitor."""
    below = gaps(scene)
    figure, grid = panels(1, 1, height=2.1)
    if below.shape[1] > 4:
        figure.set_figwidth(WIDTH)  # for the legend
    axes = grid[0, 0]
    finite = below.to_numpy()[numpy.isfinite(below.to_numpy())]
    longest = max(1.0, float(finite.max()) * 1.05) if len(finite) else 1.0
    for place, method in enumerate(below):
        style = look[method]
        steps = sorted({0.0, *(value for value in below[method] if math.isfinite(value))})
        values = [shares(below, step)[method] for step in steps]
        # Equal shares of several methods would lie on each other: up to a percent apart they do not.
        beside = 0.02 * ((place + 0.5) / below.shape[1] - 0.5)
        axes.step(
            [*steps, longest],
            [100 * (value + beside) for value in (*values, values[-1])],
            where="post",
            color=style.colour,
            linestyle=style.line,
            marker=style.marker,
            markevery=list(range(len(steps))),
            markersize=3.5,
            markeredgewidth=0,
        )
    axes.set_xlim(-0.02 * longest, longest)
    axes.set_ylim(-3, 103)
    axes.set_xlabel("points below the best competitor")
    axes.set_ylabel(f"share of the {len(below)} cells (%)")
    methods_legend(figure, scene, look, set(below))
    return figure
