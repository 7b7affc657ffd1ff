"""Figures of a study, sized for a two-column paper (6.75 or 3.25 inches wide), as pdf and png.

A method has the same colour, marker and line style in every figure; they differ in grey print, too. Files
carry no dates and no versions, so that the same records give the same bytes. A figure with more than
`PER_PAGE` tasks or partitions goes on in further files: `<name>.pdf`, `<name>_2.pdf`, ...
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import matplotlib
import matplotlib.ticker
import numpy
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fedlm.results import records
from fedlm.results.drawing import (KINDS, Style, edge, kinds_legend, logarithmic_axis, memory_unit, method_legend, panels, save_figure, settings, stack, styles)
from fedlm.data.partition import PartitionFile
from fedlm.results.records import Scene

NAMES = (
    "score_over_rounds",
    "score_over_bytes",
    "score_over_heterogeneity",
    "trade_off",
    "memory",
    "memory_by_block",
    "partitions",
)
PER_PAGE = 4  # tasks (rows), and partitions (columns), of one figure
MANY_CLIENTS = 40  # with more, a partition is drawn as areas, largest client first
MANY_LABELS = 8  # with more, the legend of a partition names the first and the last only


def names(tasks: int, partitions: int) -> list[str]:
    """Return the names, without ending, of all figures of a study with so many tasks and partitions."""
    by_task, by_partition = _pages(tasks), _pages(partitions)
    pages = {
        "score_over_rounds": by_task * by_partition,
        "score_over_bytes": by_task * by_partition,
        "score_over_heterogeneity": by_task,
        "trade_off": _pages(tasks * partitions),
        "memory": by_task,
        "memory_by_block": by_task,
        "partitions": by_task * by_partition,
    }
    return [_file_name(name, page) for name in NAMES for page in range(pages[name])]


def _pages(count: int) -> int:
    return max(1, -(-count // PER_PAGE))


def _file_name(name: str, page: int) -> str:
    return name if page == 0 else f"{name}_{page + 1}"


def make(
    runs_path: Path,
    rounds_path: Path,
    partition_paths: Iterable[Path],
    titles: dict[str, str],
    destination: Path,
    expected: Sequence[tuple[str, str, str, int]] = (),
    *,
    controls: Collection[str] | None = None,
) -> list[Path]:
    """Draw all figures of a study as pdf and png; return their paths.

    Args:
        runs_path, rounds_path: what `results.collect` wrote.
        partition_paths: partition files; of each task and partition the lowest seed is drawn.
        titles: display title of each method label, in the order of the legend.
        destination: folder for the files; their names are those of `names`.
        expected: the study's runs (task, partition, method, seed), in its order; empty takes what there is.
        controls: names of methods that are no competitors (the front of a trade-off leaves them out); None
            asks the method files.

    Raises:
        UserError: a file cannot be read.
    """
    scene = Scene.make(records.load_runs(runs_path), expected, titles, controls)
    rounds = records.load_rounds(rounds_path)
    for key in ("task", "partition", "method"):
        rounds[key] = rounds[key].astype(str)
    partitions = [PartitionFile.read(path) for path in sorted(map(Path, partition_paths))]
    look = styles(scene.methods)
    rows, columns = _chunks(scene.tasks), _chunks(scene.partitions)
    cells = [(task, partition) for task in scene.tasks for partition in scene.partitions]
    written = []

    def save(name: str, figures: Iterable[Figure]) -> None:
        for page, figure in enumerate(figures):
            if scene.absent:
                _note_missing(figure, f"{len(scene.absent)} of {len(scene.expected)} runs are missing")
            written.extend(save_figure(figure, Path(destination) / _file_name(name, page)))

    with settings():
        grid = [(some_tasks, some_partitions) for some_tasks in rows for some_partitions in columns]
        save("score_over_rounds", (_over_rounds(scene, rounds, look, *page) for page in grid))
        save("score_over_bytes", (_over_bytes(scene, rounds, look, *page) for page in grid))
        save("score_over_heterogeneity", (_over_heterogeneity(scene, look, page) for page in rows))
        save("trade_off", (_trade_off(scene, look, page) for page in _chunks(cells)))
        save("memory", (_memory(scene, page) for page in rows))
        save("memory_by_block", (_memory_by_block(scene, look, page) for page in rows))
        save("partitions", (_partitions(partitions, *page) for page in grid))
    return written


def _chunks(values: list) -> list[list]:
    return [values[start : start + PER_PAGE] for start in range(0, max(1, len(values)), PER_PAGE)]


# What the figures share


def _note_missing(figure: Figure, text: str) -> None:
    """Write a line below everything else."""
    line = 0.13
    height = figure.get_figheight() + line
    figure.set_figheight(height)
    figure.get_layout_engine().set(rect=(0, line / height, 1, 1 - line / height))
    figure.text(0.995, 0.02 / height, text, ha="right", va="bottom", fontsize=6.5, color="#b00000")


def _method_legend(figure: Figure, scene: Scene, look: dict[str, Style], methods: Collection[str]) -> None:
    method_legend(figure, look, {m: scene.titles[m] for m in scene.methods if m in methods})


def _measure(scene: Scene, task: str) -> tuple[str, float]:
    """Return the name of a task's score, with unit, and what scores are multiplied with for display."""
    runs = scene.runs[scene.runs["task"] == task]
    if runs.empty:
        return "score", 1.0
    metric = runs["metric"].iloc[0]
    name = metric.replace("_", " ")
    if not runs["greater_is_better"].iloc[0]:
        return name, 1.0
    percent = metric in ("accuracy", "f1", "macro_f1", "exact_match")
    return f"{name} (%)" if percent else f"{name} × 100", 100.0


def _empty(axes: Axes, text: str = "no runs") -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#777777")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)


def _label(text: str, longest: int = 26) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _name_row(axes: Axes, task: str, measure: str) -> None:
    axes.set_ylabel(f"{_label(task, 24)}\n{measure}", linespacing=1.0)


def _partition_title(scene: Scene, task: str, partition: str, columns: int) -> str:
    """Return a panel's title: the partition and its measured skew (label divergence, in bits)."""
    runs = scene.runs[(scene.runs["task"] == task) & (scene.runs["partition"] == partition)]
    divergence = runs["label_divergence"].mean() if len(runs) else math.nan
    skew = f", skew {divergence:.2f}" if math.isfinite(divergence) else ""
    return _label(partition, _letters(columns) - len(skew)) + skew


def _letters(columns: int) -> int:
    """Return how many letters fit above a panel, where there are so many beside each other."""
    return {1: 40, 2: 50, 3: 34}.get(columns, 25)


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


def _draw_curve(axes: Axes, x: pandas.Series, curve: pandas.DataFrame, style: Style) -> None:
    axes.plot(
        x,
        curve["score"],
        color=style.colour,
        linestyle=style.line,
        marker=style.marker,
        markevery=max(1, len(curve) // 8),
        **edge(style),
    )
    if curve["deviation"].any():
        low, high = curve["score"] - curve["deviation"], curve["score"] + curve["deviation"]
        axes.fill_between(x, low, high, color=style.colour, alpha=0.15, linewidth=0)


def _curves(
    scene: Scene,
    rounds: pandas.DataFrame,
    look: dict[str, Style],
    tasks: list[str],
    partitions: list[str],
    draw: Callable[[Axes, pandas.DataFrame, Style], None],
    x_label: str,
) -> Figure:
    """Draw one panel for each task (row) and partition (column), with a curve for each method."""
    known = scene.runs[["task", "partition", "method", "seed"]]
    rounds = rounds.merge(known, on=list(known.columns))
    figure, grid = panels(len(tasks), len(partitions), sharex="all", sharey="row")
    methods = set()
    for row, task in enumerate(tasks):
        name, factor = _measure(scene, task)
        for column, partition in enumerate(partitions):
            axes = grid[row, column]
            some = rounds[(rounds["task"] == task) & (rounds["partition"] == partition)]
            axes.set_title(_partition_title(scene, task, partition, len(partitions)), pad=3)
            if some["validation_score"].notna().sum() == 0:
                axes.text(0.5, 0.5, "no runs", transform=axes.transAxes, ha="center", color="#777777")
                continue
            for method in scene.methods:
                own = some[some["method"] == method]
                if len(own):
                    draw(axes, _mean_curves(own, factor), look[method])
                    methods.add(method)
            if row == len(tasks) - 1:
                axes.set_xlabel(x_label)
        _name_row(grid[row, 0], task, f"validation {name}")
    _method_legend(figure, scene, look, methods)
    return figure


# The figures


def _over_rounds(scene, rounds, look, tasks, partitions) -> Figure:
    """Score of the server's model on the validation split, after each round; bands are ± one deviation."""

    def draw(axes: Axes, curve: pandas.DataFrame, style: Style) -> None:
        _draw_curve(axes, curve.index, curve, style)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))

    return _curves(scene, rounds, look, tasks, partitions, draw, "round")


def _over_bytes(scene, rounds, look, tasks, partitions) -> Figure:
    """The same over the bytes that all clients sent and received; who sends nothing is a level line."""

    sent = scene.runs["upload_bytes"] + scene.runs["download_bytes"]
    logarithmic = (sent > 0).any()

    def draw(axes: Axes, curve: pandas.DataFrame, style: Style) -> None:
        if logarithmic:
            logarithmic_axis(axes)
        sent = curve[curve["megabytes"] > 0]
        if sent.empty:
            axes.axhline(curve["score"].iloc[-1], color=style.colour, linestyle=style.line, linewidth=0.8)
        else:
            _draw_curve(axes, sent["megabytes"], sent, style)

    return _curves(scene, rounds, look, tasks, partitions, draw, "sent up and down so far (MB)")


def _over_heterogeneity(scene, look, tasks) -> Figure:
    """Final test score over measured skew: of labels, and (where a study has such partitions) of sizes."""
    runs = scene.runs[(scene.runs["scheme"] != "pooled") & scene.runs["task"].isin(tasks)]
    of_sizes = (runs["scheme"] == "quantity").any()
    columns = [("label_divergence", "label divergence (bit)", runs["scheme"] != "quantity")]
    if of_sizes:
        columns.append(("size_gini", "size inequality (Gini)", runs["scheme"].isin(["quantity", "iid"])))
    figure, grid = panels(len(tasks), len(columns), height=1.75, sharey="row")
    methods = set()
    for row, task in enumerate(tasks):
        name, factor = _measure(scene, task)
        for column, (skew, x_label, chosen) in enumerate(columns):
            axes = grid[row, column]
            some = runs[chosen & (runs["task"] == task) & runs[skew].notna()]
            if row == len(tasks) - 1:
                axes.set_xlabel(x_label)
            if column == 0:
                _name_row(axes, task, f"test {name}")
            if some.empty:
                axes.text(0.5, 0.5, "no runs", transform=axes.transAxes, ha="center", color="#777777")
                continue
            # Equal scores of several methods stand beside each other.
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
    _method_legend(figure, scene, look, methods)
    return figure


def _name_positions(axes: Axes, positions: pandas.Series) -> None:
    """Name the partitions above the panel, at their measured skew; neighbours share one name tag."""
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
        # Neighbours are shortened each, so that none of them disappears.
        text = ", ".join(_label(label, 28 if len(labels) == 1 else 14) for label in labels)
        axes.annotate(
            _label(text, 44),
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


def _trade_off(scene, look, cells) -> Figure:
    """Test score against bytes, memory and compute; the grey line is what no competitor beats in both."""
    figure, grid = panels(len(cells), 3, sharey="row", sharex="col")
    costs = [
        ("bytes", "sent up and down (MB)", 1e6),
        ("peak_memory_bytes", "peak memory (MiB)", 2**20),
        ("flops", "compute (TFLOP)", 1e12),
    ]
    runs = scene.runs.assign(bytes=scene.runs["upload_bytes"] + scene.runs["download_bytes"])
    # A logarithmic axis where costs differ by more than a factor of 20.
    wide = {}
    for cost, _, _ in costs:
        positive = runs[cost][runs[cost] > 0]
        wide[cost] = len(positive) > 0 and positive.max() > 20 * positive.min()
    methods = set()
    for row, (task, partition) in enumerate(cells):
        name, factor = _measure(scene, task)
        some = runs[(runs["task"] == task) & (runs["partition"] == partition)]
        grid[row, 0].set_ylabel(f"test {name}")
        title = _partition_title(scene, task, partition, columns=1)
        grid[row, 0].set_title(f"{_label(task, 40)}: {title}", loc="left", pad=3)
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
    _method_legend(figure, scene, look, methods)
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


def _memory(scene, tasks) -> Figure:
    """Peak memory of a client's turn, stacked by kind, mean over partitions and seeds."""
    count = max(1, len(scene.methods))
    figure, grid = panels(1, len(tasks), height=0.18 * count + 0.55, sharey=True)
    unit, word = memory_unit(scene.runs["peak_memory_bytes"].max())
    for column, task in enumerate(tasks):
        axes = grid[0, column]
        axes.set_title(_label(task), pad=3)
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
    kinds_legend(figure)
    return figure


def _memory_by_block(scene, look, tasks) -> Figure:
    """Peak memory of a turn by the block that it trains; level lines are methods without blocks."""
    figure, grid = panels(1, len(tasks), height=1.75, sharey=True)
    unit, word = memory_unit(scene.runs["peak_memory_bytes"].max())
    methods = set()
    for column, task in enumerate(tasks):
        axes = grid[0, column]
        axes.set_title(_label(task), pad=3)
        runs = scene.runs[scene.runs["task"] == task]
        has_blocks = runs["memory_by_block"].map(len) > 1
        if not has_blocks.any():
            _empty(axes, "no method with blocks")
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
    _method_legend(figure, scene, look, methods)
    return figure


def _block_order(block: str) -> tuple:
    """Order blocks by number; a turn of several blocks ("0+1") stands with its first."""
    first = block.partition("+")[0]
    return (0, int(first), block) if first.isdigit() else (1, 0, block)


def _partitions(files: Sequence[PartitionFile], tasks, partitions) -> Figure:
    """Each client's examples, stacked by label; of each task and partition the lowest seed."""
    figure, grid = panels(len(tasks), len(partitions), height=1.6)
    for row, task in enumerate(tasks):
        last = None
        for column, partition in enumerate(partitions):
            axes = grid[row, column]
            found = [file for file in files if (file.task, file.partition) == (task, partition)]
            if not found:
                _empty(axes, "no partition")
                axes.set_title(_label(partition), pad=3)
                continue
            file = min(found, key=lambda file: file.seed)
            _draw_partition(axes, file)
            gini, divergence = file.skew["size_gini"], file.skew["label_divergence"]
            axes.set_title(
                f"{_label(partition, _letters(len(partitions)) - 4)}\nskew {divergence:.2f}, Gini {gini:.2f}",
                pad=3,
                linespacing=1.0,
            )
            last = file
        _name_row(grid[row, 0], task, "examples")
        if last is not None:
            names, _ = last.content()
            handles = [Patch(facecolor=colour, edgecolor="white") for colour in _label_colours(len(names))]
            labels = [_label(name, 16) for name in names]
            if len(labels) > MANY_LABELS:
                handles, labels = (
                    [handles[0], handles[-1]],
                    [labels[0], f"… {labels[-1]} ({len(labels)})"],
                )
            grid[row, -1].legend(
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
    # From dark to light, so that labels can be told apart in grey, too.
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
