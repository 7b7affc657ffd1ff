"""Figures of final test scores: over measured skew, and against bytes, memory and compute."""

import matplotlib.ticker
import numpy
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedlm.results.cells import CELL
from fedlm.results.drawing import Style, logarithmic_axis, marker, panels
from fedlm.results.lettering import cut_at_whole, measure, methods_legend, name_row, partition_title, shorten
from fedlm.results.ranking import on_all_partitions
from fedlm.results.scene import Scene

COSTS = [
    ("bytes", "sent up and down (MB)", 1e6),
    ("peak_memory_bytes", "peak memory (MiB)", 2**20),
    ("flops", "compute (TFLOP)", 1e12),
]


def over_heterogeneity(scene: Scene, look: dict[str, Style], tasks: list[str]) -> Figure:
    """Final test score over measured skew: of labels, and (where a study has such partitions) of sizes."""
    runs = scene.runs[(scene.runs["scheme"] != "pooled") & scene.runs["task"].isin(tasks)]
    of_sizes = (runs["scheme"] == "quantity").any()
    columns = [("label_divergence", "label divergence (bit)", runs["scheme"] != "quantity")]
    if of_sizes:
        columns.append(("size_gini", "size inequality (Gini)", runs["scheme"].isin(["quantity", "iid"])))
    figure, grid = panels(len(tasks), len(columns), height=1.75, sharey="row")
    methods = set()
    for row, task in enumerate(tasks):
        name, factor = measure(scene, task)
        for column, (skew, x_label, chosen) in enumerate(columns):
            axes = grid[row, column]
            some = runs[chosen & (runs["task"] == task) & runs[skew].notna()]
            if row == len(tasks) - 1:
                axes.set_xlabel(x_label)
            if column == 0:
                name_row(axes, task, f"test {name}")
            if some.empty:
                axes.text(0.5, 0.5, "no runs", transform=axes.transAxes, ha="center", color="#777777")
                continue
            # Equal scores of several methods are drawn next to each other.
            positions = some.groupby("partition")[skew].mean()
            alone = numpy.ptp(positions) == 0
            width = float(numpy.ptp(positions)) * min(0.01 * len(scene.methods), 0.3 / len(positions))
            beside = (0.1 if alone else width) / len(scene.methods)
            for place, method in enumerate(scene.methods):
                own = some[some["method"] == method]
                if own.empty:
                    continue
                methods.add(method)
                points = own.groupby("partition").agg(
                    x=(skew, "mean"), score=("test_score", "mean"), deviation=("test_score", "std")
                )
                points = points.sort_values("x", kind="stable").fillna({"deviation": 0.0})
                style = look[method]
                axes.errorbar(
                    points["x"] + (place - (len(scene.methods) - 1) / 2) * beside,
                    points["score"] * factor,
                    points["deviation"] * factor,
                    color=style.colour,
                    linestyle=style.line,
                    **marker(style),
                    elinewidth=0.8,
                    capsize=2,
                )
            axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6))
            if alone:  # nothing but the one skew is on this axis
                axes.set_xticks(positions.unique(), [f"{x:.2f}" for x in positions.unique()])
                axes.grid(axis="x", visible=False)
            _name_positions(axes, positions)
            cut_at_whole(axes, factor)
    methods_legend(figure, scene, look, methods)
    return figure


def _name_positions(axes: Axes, positions: pandas.Series) -> None:
    """Name the partitions above the panel, at their measured skew; close neighbours share a label."""
    positions = positions.sort_values(kind="stable")
    low, high = axes.get_xlim()
    groups: list[tuple[list[float], list[str]]] = []
    for label, x in positions.items():
        if groups and x - groups[-1][0][-1] < 0.07 * (high - low):
            groups[-1][0].append(x)
            groups[-1][1].append(str(label))
        else:
            groups.append(([x], [str(label)]))
    for x in positions:
        axes.axvline(x, color="#cccccc", linewidth=0.5, zorder=0)
    for xs, labels in groups:
        # Each neighbour's name is shortened, so that none disappears.
        text = ", ".join(shorten(label, 28 if len(labels) == 1 else 14) for label in labels)
        axes.annotate(
            shorten(text, 44),
            (float(numpy.mean(xs)), 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2),
            textcoords="offset points",
            rotation=20,
            ha="left",
            va="bottom",
            fontsize=6.5,
            color="#555555",
        )


def overview(scene: Scene, look: dict[str, Style]) -> Figure:
    """Mean test score over all cells against mean bytes, memory and compute, of the methods with all cells.

    The grey line joins what no competitor beats in both.
    """
    figure, grid = panels(1, 3, height=2.3, sharey="row")
    runs = _with_costs(on_all_partitions(scene.runs[scene.runs["greater_is_better"].astype(bool)]))
    columns = ["test_score", *(cost for cost, _, _ in COSTS)]
    means = runs.groupby([*CELL, "method"])[columns].mean().groupby("method").agg(["mean", "size"])
    means = means[means["test_score", "size"] == means["test_score", "size"].max()]
    means = means.xs("mean", axis=1, level=1) if len(means) else means
    shown = [method for method in scene.methods if method in means.index]
    for axes, (cost, x_label, unit) in zip(grid[0], COSTS, strict=True):
        axes.set_xlabel(x_label)
        if _is_wide(means[cost] if len(means) else pandas.Series(dtype=float)):
            logarithmic_axis(axes)
        points = []
        for method in shown:
            x, y = means.loc[method, cost] / unit, means.loc[method, "test_score"] * 100
            style = look[method]
            if x == 0:
                axes.axhline(y, color=style.colour, linestyle=style.line, linewidth=0.8)
                continue
            axes.plot(x, y, color=style.colour, linestyle="none", **marker(style, 6))
            if method not in scene.controls:
                points.append((x, y))
        _draw_front(axes, points, greater_is_better=True)
    grid[0, 0].set_ylabel("mean test score (points)")
    methods_legend(figure, scene, look, shown)
    return figure


def _with_costs(runs: pandas.DataFrame) -> pandas.DataFrame:
    """Return the runs with their bytes both ways, without the majority class, which stretches the axes."""
    runs = runs[runs["method_name"] != "majority"]
    return runs.assign(bytes=runs["upload_bytes"] + runs["download_bytes"])


def _is_wide(costs: pandas.Series) -> bool:
    """Return whether costs differ by more than a factor of 20, and need a logarithmic axis."""
    positive = costs[costs > 0]
    return len(positive) > 0 and positive.max() > 20 * positive.min()


def trade_off(scene: Scene, look: dict[str, Style], cells: list[tuple[str, str]]) -> Figure:
    """Test score against bytes, memory and compute; the grey line joins what no competitor beats in both."""
    figure, grid = panels(len(cells), 3, sharey="row", sharex="col")
    runs = _with_costs(scene.runs)
    wide = {cost: _is_wide(runs[cost]) for cost, _, _ in COSTS}
    methods = set()
    for row, (task, partition) in enumerate(cells):
        name, factor = measure(scene, task)
        some = runs[(runs["task"] == task) & (runs["partition"] == partition)]
        grid[row, 0].set_ylabel(f"test {name}")
        title = partition_title(scene, task, partition, columns=1)
        grid[row, 0].set_title(f"{shorten(task, 40)}: {title}", loc="left", pad=3)
        for column, (cost, x_label, unit) in enumerate(COSTS):
            axes = grid[row, column]
            if row == len(cells) - 1:
                axes.set_xlabel(x_label)
            if wide[cost]:
                logarithmic_axis(axes)
            if some.empty:
                axes.text(0.5, 0.5, "no runs", transform=axes.transAxes, ha="center", color="#777777")
                continue
            points = []
            for method in scene.methods:
                own = some[some["method"] == method]
                if own.empty:
                    continue
                methods.add(method)
                x, y = own[cost].mean() / unit, own["test_score"].mean() * factor
                deviation = own["test_score"].std(ddof=1) * factor if len(own) > 1 else 0.0
                style = look[method]
                if x == 0:
                    axes.axhline(y, color=style.colour, linestyle=style.line, linewidth=0.8)
                    continue
                axes.errorbar(
                    x,
                    y,
                    deviation,
                    color=style.colour,
                    linestyle="none",
                    **marker(style, 5),
                    elinewidth=0.8,
                    capsize=2,
                )
                if method not in scene.controls:
                    points.append((x, y))
            greater = bool(some["greater_is_better"].iloc[0])
            _draw_front(axes, points, greater)
            cut_at_whole(axes, factor)
    methods_legend(figure, scene, look, methods)
    return figure


def _draw_front(axes: Axes, points: list[tuple[float, float]], greater_is_better: bool) -> None:
    """Draw the stairs through the points that no other beats in both cost and score."""
    front: list[tuple[float, float]] = []
    sign = 1 if greater_is_better else -1
    for x, y in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not front or sign * y > sign * front[-1][1]:
            front.append((x, y))
    if len(front) > 1:
        axes.step(*zip(*front, strict=True), where="post", color="#bbbbbb", linewidth=1.0, zorder=0)
