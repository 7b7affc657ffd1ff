"""How figures look: one style per method, paper sizes, files without dates."""

import hashlib
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.ticker
import numpy
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.transforms import Bbox
from tueplots import axes as tueplots_axes
from tueplots import figsizes, fontsizes

from fedlm.base.files import write_atomically
from fedlm.results.typeset import significant

WIDTH = figsizes.icml2024_full()["figure.figsize"][0]  # inches
NARROW = figsizes.icml2024_half()["figure.figsize"][0]  # inches
MOST_ROWS = 8  # of a legend in a figure of one column; with more it gets the width of two

SETTINGS = {
    **fontsizes.icml2024(),
    **tueplots_axes.lines(),
    # These fonts come with matplotlib: the same figure on every machine.
    "font.family": "serif",
    "font.serif": ["STIXGeneral"],
    "mathtext.fontset": "stix",
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "lines.markersize": 4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "hatch.linewidth": 0.4,
    "pdf.fonttype": 42,
    # The layout measures letters at the figure's own resolution: at another they are wider or narrower.
    "figure.dpi": 220,
    "savefig.dpi": 220,
    "text.usetex": False,
}


class Style(NamedTuple):
    """How a method is drawn, everywhere."""

    colour: str
    marker: Any  # of matplotlib: a name, or a polygon's corners, 1 if it is a star, and its angle
    line: Any  # a line style of matplotlib


_SOLID, _DASHED, _DOTTED, _MIXED = "-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2))
# Okabe and Ito's colours and Paul Tol's "muted" ones, which the colour-blind can tell apart.
KNOWN = {
    "fedavg": Style("#0072B2", "o", _SOLID),
    "fedcybgd": Style("#D55E00", "s", _SOLID),
    "fedlora": Style("#009E73", "^", _SOLID),
    "fedprompt": Style("#CC79A7", "D", _SOLID),
    "centralized": Style("#000000", "v", _DASHED),
    "local_only": Style("#6f6f6f", "X", _DASHED),
    "head_only": Style("#a6a6a6", "P", _DASHED),
    "majority": Style("#c4c4c4", "_", _DASHED),
    "slora": Style("#E69F00", "<", _MIXED),
    "fedbpt": Style("#56B4E9", ">", _MIXED),
    "fedpeptao": Style("#332288", "p", _MIXED),
    "flasc": Style("#882255", "h", _MIXED),
    "embracingfl": Style("#44AA99", "*", _DOTTED),
    "blockllm": Style("#999933", "d", _DOTTED),
    "sherl": Style("#AA4499", "H", _DOTTED),
    "rsfllm": Style("#117733", "8", _DOTTED),
    "rtd": Style("#661100", "$+$", _DOTTED),
    "fedprox": Style("#88CCEE", (4, 1, 0), _MIXED),
    "scaffold": Style("#5D3A9B", (6, 1, 0), _MIXED),
    "fedadapter": Style("#8C6D31", (4, 1, 45), _MIXED),
    "heterofl": Style("#DDCC77", (5, 0, 180), _DOTTED),
    "fedkseed": Style("#1A85FF", (8, 1, 0), _DOTTED),
    "fedmezo": Style("#CC6677", (5, 1, 180), _DOTTED),
    # Further rows of the benchmark, in lighter and darker shades of what they are a form of.
    "fedcybgd_rotating": Style("#7A2E0E", (7, 1, 0), _MIXED),
    "fedcybgd_gradient": Style("#F4A261", (3, 1, 0), _DOTTED),
    "fedcybgd_wanda": Style("#4A1C06", (12, 1, 0), _DASHED),
    "fedcybgd_dsnot": Style("#A8480A", (3, 1, 180), _DOTTED),
    "fedbavg": Style("#6BAED6", (3, 1, 90), _DASHED),
    "fed_full": Style("#08306B", (3, 1, 270), _MIXED),
    "ffa_lora": Style("#66C2A5", r"$\clubsuit$", _DASHED),
    "fedex_lora": Style("#00583F", r"$\spadesuit$", _MIXED),
    "cellm": Style("#C2577F", r"$\oplus$", _MIXED),
    "cellm_dense": Style("#5C1A33", r"$\otimes$", _DASHED),
    "rsfllm_quiet": Style("#7FBF7B", r"$\ominus$", _DASHED),
    "rsfllm_undefended": Style("#0B3D1E", r"$\odot$", _MIXED),
}
# Greys are for controls.
_COLOURS = [style.colour for style in KNOWN.values() if style.colour[1:3] != style.colour[3:5]]
_LINES = [_SOLID, _MIXED, _DOTTED, _DASHED]
_MARKERS = [style.marker for style in KNOWN.values() if style.marker != "_"] + [
    r"$\heartsuit$",
    r"$\Omega$",
    r"$\infty$",
    r"$\bowtie$",
    r"$\#$",
    r"$\Psi$",
    r"$\S$",
]

KINDS = [
    ("parameter_bytes", "parameters", "#4477AA", ""),
    ("gradient_bytes", "gradients", "#EE6677", "////"),
    ("optimizer_bytes", "optimizer state", "#CCBB44", "...."),
    ("method_bytes", "held by the method", "#AA3377", "\\\\"),
    ("activation_bytes", "activations", "#BBBBBB", "xxxx"),
]


def styles(labels: Iterable[str]) -> dict[str, Style]:
    """Return a style for each method label.

    Methods of the suite have fixed ones. Any other label gets the one that its hash selects or, if that is
    taken, the next: the same in all figures of a study. No two markers are equal while there are markers, and
    no two styles after that.
    """
    labels = list(dict.fromkeys(labels))
    found = {label: KNOWN[label] for label in labels if label in KNOWN}
    for label in sorted(set(labels) - set(found)):
        start = int.from_bytes(hashlib.sha256(label.encode()).digest()[:4], "big")

        def least_used(choices: Sequence, used: Sequence, start: int = start) -> Any:
            turned = [choices[(start + step) % len(choices)] for step in range(len(choices))]
            return min(turned, key=used.count)

        used = list(found.values())
        colour = least_used(_COLOURS, [style.colour for style in used])
        marker = least_used(_MARKERS, [style.marker for style in used])
        like = [style for style in used if style[:2] == (colour, marker)]
        found[label] = Style(colour, marker, least_used(_LINES, [style.line for style in like or used]))
    return {label: found[label] for label in labels}


@contextmanager
def settings() -> Iterator[None]:
    """Apply matplotlib's settings for all figures; the user's matplotlibrc must not change them."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as `<path>.pdf` and `<path>.png`, without dates; return their paths."""
    # The layout is computed once, and is the same in both files. The last digits of what its solver finds
    # depend on where its variables are in memory.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        box = axes.get_position(original=True)
        axes.set_position(Bbox(box.get_points().round(6)))
    written = []
    for ending, metadata in (
        ("pdf", {"CreationDate": None, "Creator": None, "Producer": None}),
        ("png", {"Software": None}),
    ):
        content = io.BytesIO()
        figure.savefig(content, format=ending, metadata=metadata)
        written.append(Path(f"{path}.{ending}"))
        write_atomically(written[-1], content.getvalue())
    return written


def panels(rows: int, columns: int, height: float = 1.45, **sharing: Any) -> tuple[Figure, numpy.ndarray]:
    """Return a figure and its (rows, columns) axes; `height` is that of a row, in inches.

    A figure of one column of panels has the width of one column of the paper.
    """
    rows, columns = max(1, rows), max(1, columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else NARROW, height * rows + 0.2), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **sharing)


def legend(figure: Figure, handles: Sequence, labels: Sequence[str]) -> None:
    """Place one legend below all panels, in as many columns as fit, and make room for it."""
    if not handles:
        return
    # About 0.05 inches per letter, and 0.42 for the marker before it and the space after it.
    widest = 0.05 * max(map(len, labels)) + 0.42
    columns = max(1, min(len(labels), int((figure.get_figwidth() - 0.2) / widest)))
    if columns < len(labels) / MOST_ROWS and figure.get_figwidth() < WIDTH:
        figure.set_figwidth(WIDTH)
        columns = max(1, min(len(labels), int((WIDTH - 0.2) / widest)))
    rows = -(-len(labels) // columns)
    # The same number of rows with fewer columns looks better than a last row of one.
    columns = -(-len(labels) // rows)
    figure.set_figheight(figure.get_figheight() + 0.15 * rows + 0.05)
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        columnspacing=1.2,
        handlelength=2.4,
        borderpad=0.1,
    )


def logarithmic_axis(axes: Axes) -> None:
    """Make the x axis logarithmic: numbers at powers of ten; if there is at most one, also at 2 and 5."""
    axes.set_xscale("log")
    powers = matplotlib.ticker.LogFormatterSciNotation()

    def short() -> bool:
        low, high = axes.get_xlim()
        return low > 0 and math.floor(math.log10(high)) - math.ceil(math.log10(low)) < 1

    def major(value: float, place: float) -> str:
        return f"{value:g}" if short() else powers(value, int(place))

    def minor(value: float, _: float) -> str:
        digit = round(value / 10 ** math.floor(math.log10(value)))
        return f"{value:g}" if short() and digit in (2, 5) else ""

    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0,), numticks=6))
    axes.xaxis.set_major_formatter(major)
    axes.xaxis.set_minor_formatter(minor)


def marker(style: Style, points: float = 4) -> dict[str, Any]:
    """Return a marker, its size and its edge: white around filled ones, which stand out where lines cross."""
    filled = style.marker in Line2D.filled_markers
    return {
        "marker": style.marker,
        "markersize": 1.5 * points if style.marker == "*" else points,  # a star's points are thin
        "markeredgecolor": "white" if filled else style.colour,
        "markeredgewidth": 0.4 if filled else 0.9,
    }


def memory_unit(largest: float) -> tuple[float, str]:
    return (2**30, "GiB") if largest >= 10 * 2**30 else (2**20, "MiB")


def stack(axes: Axes, place: float, parts: Sequence[float]) -> None:
    """Draw a bar of peak memory split by kind, in the order of `KINDS`, with its sum next to it."""
    left = 0.0
    for (_, _, colour, hatch), width in zip(KINDS, parts, strict=True):
        axes.barh(
            place,
            width,
            left=left,
            height=0.72,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0.3,
        )
        left += width
    axes.text(left, place, f" {significant(left)}", va="center", fontsize=6.5)


def kinds_legend(figure: Figure, bars: pandas.DataFrame) -> None:
    """Add a legend of the kinds of memory that the bars have, which are rows with a column for each kind."""
    shown = [kind for kind in KINDS if bars[kind[0]].max() > 0]
    handles = [Patch(facecolor=colour, hatch=hatch, edgecolor="white") for _, _, colour, hatch in shown]
    legend(figure, handles, [label for _, label, _, _ in shown])


def method_legend(figure: Figure, look: dict[str, Style], titles: dict[str, str]) -> None:
    """Add a legend of the methods."""
    handles = [
        Line2D(
            [],
            [],
            color=look[method].colour,
            linestyle=look[method].line,
            **marker(look[method], 5),
        )
        for method in titles
    ]
    legend(figure, handles, list(titles.values()))
