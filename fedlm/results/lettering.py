"""The words on the figures: names of scores, titles of panels and rows, legends, notes."""

import math
from collections.abc import Collection

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from fedlm.results.drawing import Style, method_legend
from fedlm.results.scene import Scene


def note_missing(figure: Figure, text: str) -> None:
    """Write a line below everything else."""
    line = 0.13
    height = figure.get_figheight() + line
    figure.set_figheight(height)
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine), "figures are made by `drawing.panels`"
    engine.set(rect=(0, line / height, 1, 1 - line / height))
    figure.text(0.995, 0.02 / height, text, ha="right", va="bottom", fontsize=6.5, color="#b00000")


def methods_legend(figure: Figure, scene: Scene, look: dict[str, Style], methods: Collection[str]) -> None:
    """Add a legend of these methods, with their titles, in the order of the scene."""
    method_legend(figure, look, {m: scene.titles[m] for m in scene.methods if m in methods})


def measure(scene: Scene, task: str) -> tuple[str, float]:
    """Return the name of a task's score, with unit, and the factor by which scores are shown."""
    runs = scene.runs[scene.runs["task"] == task]
    if runs.empty:
        return "score", 1.0
    metric = runs["metric"].iloc[0]
    name = metric.replace("_", " ")
    if not runs["greater_is_better"].iloc[0]:
        return name, 1.0
    percent = metric in ("accuracy", "f1", "macro_f1", "exact_match")
    return f"{name} (%)" if percent else f"{name} × 100", 100.0


def cut_at_whole(axes: Axes, factor: float) -> None:
    """End a score's axis at 100, where bars of a deviation may go further than a score can."""
    if factor == 100 and axes.get_ylim()[1] > 102:
        axes.set_ylim(top=102)  # a marker at 100 is whole


def empty(axes: Axes, text: str = "no runs") -> None:
    """Write the reason into an empty panel, and remove its ticks and grid."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#777777")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)


def blank(axes: Axes) -> None:
    """Leave the place of a panel empty that the study does not have; its name on the left stays."""
    # Not without ticks: panels that share an axis share them.
    axes.tick_params(which="both", left=False, bottom=False, labelleft=False, labelbottom=False)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def shorten(text: str, longest: int = 26) -> str:
    """Cut a text to so many letters, the last one an ellipsis."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def name_row(axes: Axes, task: str, measure: str) -> None:
    """Name a row of panels: its task, and what is measured."""
    axes.set_ylabel(f"{shorten(task, 24)}\n{measure}", linespacing=1.0)


def partition_title(scene: Scene, task: str, partition: str, columns: int) -> str:
    """Return a panel's title: the partition and its measured skew (label divergence, in bits)."""
    runs = scene.runs[(scene.runs["task"] == task) & (scene.runs["partition"] == partition)]
    divergence = runs["label_divergence"].mean() if len(runs) else math.nan
    skew = f", skew {divergence:.2f}" if math.isfinite(divergence) else ""
    return shorten(partition, letters_above(columns) - len(skew)) + skew


def letters_above(columns: int) -> int:
    """Return how many letters fit above one of so many panels in a row."""
    return {1: 40, 2: 50, 3: 34}.get(columns, 25)
