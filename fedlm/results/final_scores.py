"""Figures of final test scores: over measured skew, and against bytes, memory and compute."""

import matplotlib.ticker
import numpy
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedlm.results.drawing import Style, edge, logarithmic_axis, panels
from fedlm.results.lettering import measure, methods_legend, name_row, partition_title, shorten
from fedlm.results.scene import Scene


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
            beside = (0.1 if alone else 0.03 * float(numpy.ptp(positions))) / len(scene.methods)
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
                    marker=style.marker,
                    linestyle=style.line,
                    **edge(style),
                    elinewidth=0.8,
                    capsize=2,
                )
            axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6))
            if alone:
                axes.set_xticks(positions.unique(), [f"{x:.2f}" for x in positions.unique()])
            _name_positions(axes, positions)
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


def trade_off(scene: Scene, look: dict[str, Style], cells: list[tuple[str, str]]) -> Figure:
    """Test score against bytes, memory and compute; the grey line joins what no competitor beats in both."""
    figure, grid = panels(len(cells), 3, sharey="row", sharex="col")
    costs = [
        ("bytes", "sent up and down (MB)", 1e6),
        ("peak_memory_bytes", "peak memory (MiB)", 2**20),
        ("flops", "compute (TFLOP)", 1e12),
    ]
    runs = scene.runs.assign(bytes=scene.runs["upload_bytes"] + scene.runs["download_bytes"])
    # The majority class has no costs to trade, and its score would stretch the axes.
    runs = runs[runs["method_name"] != "majority"]
    # A logarithmic axis where costs differ by more than a factor of 20.
    wide = {}
    for cost, _, _ in costs:
        positive = runs[cost][runs[cost] > 0]
        wide[cost] = len(positive) > 0 and positive.max() > 20 * positive.min()
    methods = set()
    for row, (task, partition) in enumerate(cells):
        name, factor = measure(scene, task)
        some = runs[(runs["task"] == task) & (runs["partition"] == partition)]
        grid[row, 0].set_ylabel(f"test {name}")
        title = partition_title(scene, task, partition, columns=1)
        grid[row, 0].set_title(f"{shorten(task, 40)}: {title}", loc="left", pad=3)
        for column, (cost, x_label, unit) in enumerate(costs):
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
                    marker=style.marker,
                    linestyle="none",
                    markersize=5,
                    elinewidth=0.8,
                    capsize=2,
                )
                if method not in scene.controls:
                    points.append((x, y))
            greater = bool(some["greater_is_better"].iloc[0])
            _draw_front(axes, points, greater)
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
