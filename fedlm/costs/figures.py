"""Figures of predicted costs: memory by method and by block, bytes a round."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from fedlm.costs.tables import display_name
from fedlm.results import drawing
from fedlm.results.typeset import significant

_DIRECTIONS = (
    (-0.19, "download_bytes", "#4477AA", ""),
    (0.19, "upload_bytes", "#CCBB44", "////"),
)


def make(rows: pandas.DataFrame, blocks: pandas.DataFrame, destination: Path) -> list[Path]:
    """Draw memory by method, memory by block and bytes a round; return the paths."""
    look = drawing.styles(rows["method"].unique())
    written = []
    with drawing.settings():
        written += drawing.save_figure(_memory(rows), destination / "memory")
        if "llama2_7b" in set(rows["model"]):
            figure = _one_model(rows, blocks, "llama2_7b")
            written += drawing.save_figure(figure, destination / "memory_llama2_7b")
        written += drawing.save_figure(_by_block(rows, blocks, look), destination / "memory_by_block")
        written += drawing.save_figure(_bytes(rows), destination / "bytes_a_round")
    return written


def _grid(
    rows: pandas.DataFrame, height: float, **sharing: Any
) -> tuple[Figure, list[tuple[Axes, pandas.DataFrame]], int]:
    """Return a figure, for each model (of a task) its axes and rows, and the number of columns."""
    groups = [some for _, some in rows.groupby(["task", "model"], sort=False)]
    columns = min(3, len(groups))
    figure, grid = drawing.panels(-(-len(groups) // columns), columns, height, **sharing)
    for axes in grid.flat[len(groups) :]:
        axes.set_visible(False)
    for axes, some in zip(grid.flat, groups, strict=False):
        axes.set_title(display_name(some.iloc[0]), pad=3)
    return figure, list(zip(grid.flat, groups, strict=False)), columns


def _methods_axis(axes: Axes, titles: Sequence[str], first: bool) -> None:
    axes.set_yticks(range(len(titles)), titles if first else [""] * len(titles))
    axes.set_ylim(len(titles) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def _memory(rows: pandas.DataFrame) -> Figure:
    """Peak memory of a turn, stacked by kind; of methods with blocks that of the most expensive one."""
    methods = rows["method"].nunique()
    figure, cells, columns = _grid(rows, 0.17 * methods + 0.62)
    for place, (axes, some) in enumerate(cells):
        for bar, (_, row) in enumerate(some.iterrows()):
            drawing.stack(axes, bar, [row[kind] / 2**30 for kind, *_ in drawing.KINDS])
        axes.set_xlim(0, some["peak_memory_bytes"].max() / 2**30 * 1.2)
        axes.set_xlabel("peak memory of a turn (GiB)")
        _methods_axis(axes, list(some["title"]), place % columns == 0)
    drawing.kinds_legend(figure, rows)
    return figure


def _one_model(rows: pandas.DataFrame, blocks: pandas.DataFrame, model: str) -> Figure:
    """Peak memory on one model, with a bar for the first and the last block of methods that have blocks."""
    bars = []
    for _, row in rows[rows["model"] == model].iterrows():
        own = blocks[(blocks["model"] == model) & (blocks["method"] == row["method"])]
        if len(own) == 1:
            bars.append((row["title"], row))
        else:
            ordered = own.sort_values("peak_memory_bytes", ascending=False)
            bars.append((f"{row['title']}, block {ordered.iloc[0]['block']}", ordered.iloc[0]))
            bars.append((f"{row['title']}, block {ordered.iloc[-1]['block']}", ordered.iloc[-1]))
    figure, grid = drawing.panels(1, 1, 0.2 * len(bars) + 0.55)
    axes = grid[0, 0]
    axes.set_title(display_name(rows[rows["model"] == model].iloc[0]), pad=3)
    for place, (_, values) in enumerate(bars):
        drawing.stack(axes, place, [values[kind] / 2**30 for kind, *_ in drawing.KINDS])
    axes.set_xlim(0, max(values["peak_memory_bytes"] for _, values in bars) / 2**30 * 1.16)
    axes.set_xlabel("peak memory of a turn (GiB)")
    _methods_axis(axes, [title for title, _ in bars], True)
    drawing.kinds_legend(figure, pandas.DataFrame([values for _, values in bars]))
    return figure


def _by_block(rows: pandas.DataFrame, blocks: pandas.DataFrame, look: dict[str, drawing.Style]) -> Figure:
    """Peak memory by the position of the trained block; horizontal lines are methods without blocks.

    A block that several layers share stands alone after the last layer. Values far above are only labelled.
    """
    figure, cells, columns = _grid(rows, 1.45)
    for place, (axes, some) in enumerate(cells):
        task, model = some.iloc[0][["task", "model"]]
        own = blocks[(blocks["task"] == task) & (blocks["model"] == model)]
        own = own[own["block"].str.fullmatch(r"\d+|all") & ~own["interpolated"].astype(bool)]
        by_position = own[own["block"] != "all"]["peak_memory_bytes"]
        limit = 1.6 * by_position.max() if len(by_position) else math.inf
        for (method, _), points in own.groupby(["method", "alike"], sort=False):
            style = look[method]
            peaks = points["peak_memory_bytes"] / 2**30
            if points["block"].iloc[0] != "all":
                axes.plot(
                    points["block"].astype(int),
                    peaks,
                    color=style.colour,
                    linestyle=style.line,
                    **drawing.marker(style),
                )
            elif points["peak_memory_bytes"].iloc[0] <= limit:
                axes.axhline(peaks.iloc[0], color=style.colour, linestyle=style.line, linewidth=0.9)
            else:
                label = f"{points['title'].iloc[0]}: {significant(peaks.iloc[0])} GiB"
                axes.text(
                    0.98,
                    0.97,
                    label,
                    ha="right",
                    va="top",
                    color=style.colour,
                    transform=axes.transAxes,
                    size=6.5,
                )
        low, high = axes.get_ylim()
        axes.set_ylim(0 if low < 0.5 * high else low - 0.3 * (high - low), high + 0.35 * (high - low))
        if place >= len(cells) - columns:
            axes.set_xlabel("block that the turn trains")
        locator = axes.xaxis.get_major_locator()
        assert isinstance(locator, MaxNLocator)  # that of every linear axis
        locator.set_params(integer=True)
        axes.set_ylabel("peak memory (GiB)")
    drawing.method_legend(figure, look, dict(zip(rows["method"], rows["title"], strict=True)))
    return figure


def _bytes(rows: pandas.DataFrame) -> Figure:
    """Bytes that all clients of a round receive and send, on a logarithmic axis."""
    methods = rows["method"].nunique()
    figure, cells, columns = _grid(rows, 0.24 * methods + 0.62, sharex=True)
    for place, (axes, some) in enumerate(cells):
        for bar, (_, row) in enumerate(some.iterrows()):
            for offset, column, colour, hatch in _DIRECTIONS:
                value = row[column] / row["rounds"] / 1e6
                if not value:
                    continue
                axes.barh(bar + offset, value, height=0.36, color=colour, hatch=hatch, edgecolor="white")
                axes.text(value, bar + offset, f" {significant(value)}", va="center", fontsize=6)
        axes.set_xscale("log")
        if place >= len(cells) - columns:
            axes.set_xlabel("bytes a round, all clients (MB)")
            axes.tick_params(labelbottom=True)
        _methods_axis(axes, list(some["title"]), place % columns == 0)
    low, high = cells[0][0].get_xlim()
    cells[0][0].set_xlim(low, high * 6)
    handles = [Patch(facecolor=colour, hatch=hatch, edgecolor="white") for *_, colour, hatch in _DIRECTIONS]
    drawing.legend(figure, handles, ["down: server to clients", "up: clients to server"])
    return figure
