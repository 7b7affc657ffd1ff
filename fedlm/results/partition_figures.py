"""Figures of partitions: each client's examples, stacked by label."""

from collections.abc import Sequence

import matplotlib
import matplotlib.ticker
import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fedlm.data.partition import PartitionFile
from fedlm.results.drawing import panels
from fedlm.results.lettering import blank, letters_above, name_row, shorten

MANY_CLIENTS = 40  # with more, a partition is drawn as areas, largest client first
MANY_LABELS = 8  # with more, the legend of a partition names the first and the last only


def draw_partitions(files: Sequence[PartitionFile], rows: Sequence[tuple[str, Sequence[str]]]) -> Figure:
    """Each client's examples, stacked by label: a row for each task; of each partition the lowest seed."""
    widest = max(len(partitions) for _, partitions in rows)
    figure, grid = panels(len(rows), widest, height=1.6)
    for row, (task, partitions) in enumerate(rows):
        last, place = None, grid[row, 0]
        for axes in grid[row, len(partitions) :]:
            blank(axes)
        for column, partition in enumerate(partitions):
            axes = grid[row, column]
            found = [file for file in files if (file.task, file.partition) == (task, partition)]
            if not found:
                blank(axes)
                continue
            file = min(found, key=lambda file: file.seed)
            _draw_partition(axes, file)
            gini, divergence = file.skew["size_gini"], file.skew["label_divergence"]
            measured = f"seed {file.seed}: skew {divergence:.2f}, Gini {gini:.2f}"
            title = f"{shorten(partition, letters_above(widest) - 4)}\n{measured}"
            axes.set_title(title, pad=3, linespacing=1.0)
            last, place = file, axes
        name_row(grid[row, 0], task, "examples")
        if last is not None:
            names, _ = last.content()
            handles = [Patch(facecolor=colour, edgecolor="white") for colour in _label_colours(len(names))]
            labels = [shorten(name, 16) for name in names]
            if len(labels) > MANY_LABELS:
                handles, labels = (
                    [handles[0], handles[-1]],
                    [labels[0], f"… {labels[-1]} ({len(labels)})"],
                )
            place.legend(
                handles[::-1],
                labels[::-1],
                loc="center left",
                bbox_to_anchor=(1.0, 0.5),
                handlelength=1.0,
                labelspacing=0.25,
                fontsize=6.5,
            )
    return figure


def _label_colours(count: int) -> numpy.ndarray:
    # From dark to light, so that labels can be distinguished in grey, too.
    return matplotlib.colormaps["viridis"](numpy.linspace(0.0, 0.95, max(1, count)))


def _draw_partition(axes: Axes, file: PartitionFile) -> None:
    counts = numpy.array(file.content()[1], dtype=float)
    colours = _label_colours(counts.shape[1])
    many = len(counts) > MANY_CLIENTS
    if many:
        counts = counts[numpy.argsort(-counts.sum(axis=1), kind="stable")]
    tops = numpy.cumsum(counts, axis=1)
    bottoms = tops - counts
    places = numpy.arange(len(counts))
    axes.grid(axis="x", visible=False)
    for label, colour in enumerate(colours):
        if many:
            edges = numpy.append(places - 0.5, len(counts) - 0.5)
            low, high = (numpy.append(some[:, label], some[-1, label]) for some in (bottoms, tops))
            axes.fill_between(edges, low, high, step="post", color=colour, linewidth=0)
        else:
            axes.bar(
                places,
                counts[:, label],
                bottom=bottoms[:, label],
                width=0.86,
                color=colour,
                edgecolor="white",
                linewidth=0.2,
            )
    axes.set_xlim(-0.6, len(counts) - 0.4)
    axes.set_xlabel("client, by size" if many else "client")
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
