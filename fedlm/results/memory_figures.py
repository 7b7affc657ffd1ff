"""Figures of peak memory: by kind, and by the block that a turn trains."""

import math

import matplotlib.ticker
import pandas
from matplotlib.figure import Figure

from fedlm.results.drawing import KINDS, Style, edge, kinds_legend, memory_unit, panels, stack
from fedlm.results.lettering import empty, methods_legend, shorten
from fedlm.results.scene import Scene


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
    """Peak memory of a turn by the block that it trains; horizontal lines are methods without blocks."""
    figure, grid = panels(1, len(tasks), height=1.75, sharey=True)
    unit, word = memory_unit(scene.runs["peak_memory_bytes"].max())
    methods = set()
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
        for method in scene.methods:
            own = runs[runs["method"] == method]
            style = look[method]
            entries = [entry for some in own["memory_by_block"] if len(some) > 1 for entry in some]
            if entries:
                peaks = pandas.DataFrame(entries).groupby("block")["peak_memory_bytes"].mean() / unit
                peaks = peaks.rename(index=place).sort_index()
                axes.plot(
                    peaks.index,
                    peaks,
                    color=style.colour,
                    linestyle=style.line,
                    marker=style.marker,
                    **edge(style),
                )
            elif len(own) and method not in scene.controls:
                level = own["peak_memory_bytes"].mean() / unit
                axes.axhline(level, color=style.colour, linestyle=style.line, linewidth=0.9)
            else:
                continue
            methods.add(method)
        if numbered:
            axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(12, integer=True))
        else:
            step = max(1, -(-len(place) // 12))
            axes.set_xticks(list(place.values())[::step], list(place)[::step])
        axes.set_xlabel("block that the turn trains")
        axes.set_ylim(bottom=0)
    grid[0, 0].set_ylabel(f"peak memory of a turn ({word})")
    methods_legend(figure, scene, look, methods)
    return figure


def _block_order(block: str) -> tuple:
    """Order blocks by number; a turn of several blocks ("0+1") is placed at its first."""
    first = block.partition("+")[0]
    return (0, int(first), block) if first.isdigit() else (1, 0, block)
