"""Figures of peak memory: by kind, and by the block that a turn trains."""

import math
from typing import Any

import matplotlib.ticker
import pandas
from matplotlib.figure import Figure

from fedlm.results.drawing import KINDS, Style, kinds_legend, marker, memory_unit, panels, stack
from fedlm.results.lettering import empty, methods_legend, shorten
from fedlm.results.scene import Scene
from fedlm.results.typeset import significant

FAR = 1.6  # times the highest turn of a block: methods that need more are named and not drawn


def memory(scene: Scene, tasks: list[str]) -> Figure:
    """Peak memory of a client's turn, stacked by kind, mean over partitions and seeds."""
    count = max(1, len(scene.methods))
    figure, grid = panels(1, len(tasks), height=0.18 * count + 0.55, sharey=True)
    unit, word = memory_unit(scene.runs["peak_memory_bytes"].max())
    for column, task in enumerate(tasks):
        axes = grid[0, column]
        axes.set_title(shorten(task), pad=3)
        axes.set_xlabel(f"peak memory of a turn ({word})")
        axes.grid(axis="y", visible=False)
        runs = scene.runs[scene.runs["task"] == task]
        widest = runs.groupby("method")["peak_memory_bytes"].mean().max() / unit
        for place, method in enumerate(scene.methods):
            own = runs[runs["method"] == method]
            if own["peak_memory_bytes"].notna().sum() == 0:
                axes.text(0, place, " no runs", va="center", fontsize=6.5, color="#777777")
                continue
            stack(axes, place, [own[kind].mean() / unit for kind, *_ in KINDS])
        axes.set_xlim(0, widest * 1.16 if math.isfinite(widest) else 1.0)
        axes.set_yticks(range(len(scene.methods)), [scene.titles[method] for method in scene.methods])
        axes.set_ylim(len(scene.methods) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
    kinds_legend(figure, scene.runs[scene.runs["task"].isin(tasks)])
    return figure


def memory_by_block(scene: Scene, look: dict[str, Style], tasks: list[str]) -> Figure:
    """Peak memory of a turn by the block that it trains; horizontal lines are methods without blocks.

    Curves that coincide are drawn beside each other; methods far above all curves are only named.
    """
    figure, grid = panels(1, len(tasks), height=1.75, sharey=True)
    unit, word = memory_unit(scene.runs["peak_memory_bytes"].max())
    methods: set[str] = set()
    most = 0  # lines of text in a panel
    for column, task in enumerate(tasks):
        axes = grid[0, column]
        axes.set_title(shorten(task), pad=3)
        runs = scene.runs[scene.runs["task"] == task]
        has_blocks = runs["memory_by_block"].map(len) > 1
        if not has_blocks.any():
            empty(axes, "no method with blocks")
            continue
        blocks = list(
            dict.fromkeys(entry["block"] for some in runs[has_blocks]["memory_by_block"] for entry in some)
        )
        ordered = sorted(blocks, key=_block_order)
        numbered = all(block.isdigit() for block in blocks)
        place = {block: int(block) if numbered else number for number, block in enumerate(ordered)}
        own = {method: runs[runs["method"] == method] for method in scene.methods}
        curves = {method: _peaks(some, place) / unit for method, some in own.items()}
        curves = {method: peaks for method, peaks in curves.items() if len(peaks)}
        limit = FAR * max(peaks.max() for peaks in curves.values())
        for number, (method, peaks) in enumerate(curves.items()):
            beside = min(0.12, 0.7 / len(curves)) * (number - (len(curves) - 1) / 2)
            style = look[method]
            axes.plot(peaks.index + beside, peaks, color=style.colour, linestyle=style.line, **marker(style))
        above: dict[str, list[str]] = {}
        for method in scene.methods:
            if method in curves or own[method].empty or method in scene.controls:
                continue
            level, style = own[method]["peak_memory_bytes"].mean() / unit, look[method]
            if level <= limit:
                axes.axhline(level, color=style.colour, linestyle=style.line, linewidth=0.9)
                methods.add(method)
            else:
                above.setdefault(significant(level), []).append(scene.titles[method])
        methods |= set(curves)
        lines = [f"{shorten(', '.join(titles), 36)}: {level} {word}" for level, titles in above.items()]
        text: dict[str, Any] = {"ha": "right", "va": "top", "size": 6.5, "color": "#555555"}
        axes.text(0.99, 0.99, "\n".join(lines), transform=axes.transAxes, **text)
        most = max(most, len(lines))
        if numbered:
            axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(12, integer=True))
        else:
            step = max(1, -(-len(place) // 12))
            axes.set_xticks(list(place.values())[::step], list(place)[::step])
        axes.set_xlabel("block that the turn trains")
    low, high = grid[0, 0].get_ylim()
    grid[0, 0].set_ylim(top=high + 0.11 * most * (high - low))
    grid[0, 0].set_ylabel(f"peak memory of a turn ({word})")
    methods_legend(figure, scene, look, methods)
    return figure


def _peaks(runs: pandas.DataFrame, place: dict[str, int]) -> pandas.Series:
    """Return the mean peak of the turns of each block, by its place; empty for a method without blocks."""
    entries = [entry for some in runs["memory_by_block"] if len(some) > 1 for entry in some]
    if not entries:
        return pandas.Series(dtype=float)
    peaks = pandas.DataFrame(entries).groupby("block")["peak_memory_bytes"].mean()
    return peaks.rename(index=place).sort_index()


def _block_order(block: str) -> tuple:
    """Order blocks by number; a turn of several blocks ("0+1") is placed at its first."""
    first = block.partition("+")[0]
    return (0, int(first), block) if first.isdigit() else (1, 0, block)
