"""Tables of scores and costs, of traffic and of memory; the main one also for a terminal."""

import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pandas

from fedlm.results import records
from fedlm.results.cells import (
    CELL,
    mean_and_deviation,
    score_text,
    shown_mean,
    stands_out,
    task_texts,
    test_variance,
)
from fedlm.results.devices import Devices, seconds_so_far
from fedlm.results.ranking import LEVEL
from fedlm.results.scene import Scene
from fedlm.results.statistics import compare
from fedlm.results.typeset import WIDTH, Table, spread


class Quantity(NamedTuple):
    """A column of costs: its source, heading and unit, and whether the smallest value is marked."""

    column: str
    heading: str
    unit: float
    mark: bool = False


PEAK = Quantity("peak_memory_bytes", "Peak memory (MiB)", 2**20, mark=True)
UP = Quantity("upload_bytes", "Sent up (MB)", 1e6, mark=True)
DOWN = Quantity("download_bytes", "Sent down (MB)", 1e6, mark=True)
COMPUTE = Quantity("flops", "Compute (TFLOP)", 1e12, mark=True)
UNITS_NOTE = (
    "Mean ± standard deviation over seeds; the deviation is left out for one seed and where it is "
    "below the last digit. MB is 1e6 bytes, MiB is 1,048,576 bytes, TFLOP is 1e12 floating point operations."
)
BEST_NOTE = (
    "Bold: best of the competitors. Values that look equal are equally bold. A score is bold only among "
    "those of the most seeds, and only if the next one is further away than the standard error of the "
    "difference, for so many test examples (binomial, methods taken as tested independently; of losses it "
    "is not known), and, with two seeds or more, if a t-test paired by seed tells them apart (level 0.05)."
)
SUMS_NOTE = (
    "Bytes and compute are sums over all clients and rounds of a run, without the first broadcast of the "
    "pretrained model. Peak memory is that of live tensors in the turn with the highest peak, model included."
)


def _cost_table(
    scene: Scene, quantities: Sequence[Quantity], score: bool
) -> tuple[pandas.DataFrame, pandas.DataFrame, numpy.ndarray]:
    """Return numbers, cells and best marks of a table with one row for each task, partition and method."""
    number_rows, cell_rows, value_rows, variances, by_seed = [], [], [], [], []
    texts = task_texts(scene) if score else {task: task for task in scene.tasks}
    for task, partition, method, runs, asked in scene.cells():
        number: dict[str, Any] = {"task": task, "partition": partition, "method": method}
        number |= {"title": scene.titles[method], "control": method in scene.controls}
        number |= {"seeds": len(runs), "seeds_expected": asked}
        cell = {"Task": texts[task], "Partition": partition, "Method": scene.title(method)}
        value = [math.nan] * 3
        if score:
            filled = len(runs) > 0
            number |= {"metric": runs["metric"].iloc[0] if filled else ""}
            number |= {"greater_is_better": bool(runs["greater_is_better"].iloc[0]) if filled else ""}
            number |= mean_and_deviation("test_score", runs["test_score"].to_numpy())
            cell["Score"] = score_text(runs)
            value.append(shown_mean(cell["Score"]) * (-1 if filled and number["greater_is_better"] else 1))
        for quantity in quantities:
            column = runs[quantity.column].to_numpy(dtype=float, na_value=math.nan)
            number |= mean_and_deviation(quantity.column, column)
            cell[quantity.heading] = spread(column / quantity.unit)
            value.append(shown_mean(cell[quantity.heading]) if quantity.mark else math.nan)
        cell["Seeds"] = str(len(runs)) if len(runs) == asked else f"{len(runs)} of {asked}"
        number_rows.append(number)
        cell_rows.append(cell)
        value_rows.append([*value, math.nan])
        variances.append(test_variance(runs))
        by_seed.append(runs.set_index("seed")["test_score"])
    numbers, cells = pandas.DataFrame(number_rows), pandas.DataFrame(cell_rows)
    values: numpy.ndarray = numpy.array(value_rows, float)
    best: numpy.ndarray = numpy.zeros(values.shape, dtype=bool)
    if len(numbers):
        # Scores of fewer seeds are not compared with those of more; costs hardly depend on the seed.
        most = numbers.groupby(CELL)["seeds"].transform("max")
        if score:
            values[numbers["seeds"] < most, cells.columns.get_loc("Score")] = math.nan
        values[numbers["control"]] = math.nan
        values = numpy.where(numpy.isnan(values), numpy.inf, values)
        for _, rows in numbers.groupby(CELL, sort=False):
            some = values[rows.index]
            # With one method there is no best.
            several = numpy.isfinite(some).sum(axis=0) > 1
            if score:
                column = cells.columns.get_loc("Score")
                several[column] = several[column] and (
                    stands_out(some[:, column], numpy.array(variances)[rows.index])
                    and _seeds_agree(some[:, column], [by_seed[place] for place in rows.index])
                )
            best[rows.index] = several & numpy.isfinite(some) & (some == some.min(axis=0))
    return numbers, cells, best


def _seeds_agree(scores: numpy.ndarray, by_seed: Sequence[pandas.Series]) -> bool:
    """Return whether a paired test tells the least of several scores apart from the next.

    With fewer than two pairs there is nothing to test, and the least counts.
    """
    first, second = numpy.argsort(scores, kind="stable")[:2]
    pairs = pandas.concat([by_seed[first], by_seed[second]], axis=1, join="inner").to_numpy(dtype=float)
    return len(pairs) < 2 or not compare(pairs[:, 0], pairs[:, 1]).p >= LEVEL


def main_table(scene: Scene) -> Table:
    """Score, peak memory, bytes up and down and compute of each task x partition x method."""
    numbers, cells, best = _cost_table(scene, [PEAK, UP, DOWN, COMPUTE], score=True)
    notes = [
        "Score on the test split after the last round: of the server's model, and of a method that merges "
        "nothing "
        "(local only) the mean over its clients' models. " + UNITS_NOTE,
        BEST_NOTE,
        SUMS_NOTE,
        *scene.notes(),
    ]
    return Table("main", "What each method scores and what it costs", numbers, cells, best, 2, notes)


def traffic_table(
    scene: Scene,
    rounds: pandas.DataFrame,
    devices: Devices | None = None,
    cohorts: Mapping[tuple[str, str], float] | None = None,
) -> Table:
    """Bytes and compute of one client in one round, the first broadcast, and seconds.

    With `cohorts` (see `devices.seconds_so_far`) there are also the seconds of a round on the devices and
    links that are shown.
    """
    keys = ["task", "partition", "method", "seed"]
    turns = rounds.groupby(keys, observed=True)[["participants", "dropped"]].sum().reset_index()
    turns = turns.astype({"task": object, "partition": object, "method": object})
    runs = scene.runs.merge(turns, on=keys, how="left")
    answered = runs["participants"] - runs["dropped"]  # a client that drops out downloads, and no more
    for column, count in {
        "download_bytes": runs["participants"],
        "upload_bytes": answered,
        "flops": answered,
        "queries": answered,
    }.items():
        runs[f"turn_{column}"] = runs[column] / count.where(count > 0)
    columns = devices.columns() if devices and cohorts else {}
    for name, (device, link) in columns.items():
        seconds = rounds[[*keys, "round"]].astype({"task": object, "partition": object, "method": object})
        seconds[name] = seconds_so_far(rounds, scene.runs, cohorts or {}, device, link)
        last = seconds.sort_values("round").drop_duplicates(keys, keep="last")
        last[name] /= last["round"].where(last["round"] > 0)
        runs = runs.merge(last[[*keys, name]], on=keys, how="left")
    quantities = [
        Quantity("turn_upload_bytes", "Up a turn (MB)", 1e6, mark=True),
        Quantity("turn_download_bytes", "Down a turn (MB)", 1e6, mark=True),
        Quantity("broadcast_bytes", "Broadcast (MB)", 1e6),
        Quantity("turn_flops", "Compute a turn (TFLOP)", 1e12, mark=True),
        *([Quantity("turn_queries", "Queries a turn", 1)] if runs["queries"].any() else []),
        Quantity("train_seconds", "Training (s)", 1),
        Quantity("server_seconds", "Server (s)", 1),
        Quantity("wall_seconds", "Whole run (s)", 1),
        *(Quantity(name, name, 1, mark=True) for name in columns),
    ]
    numbers, cells, best = _cost_table(scene._replace(runs=runs), quantities, score=False)
    notes = [
        "Bold: smallest value among the competitors, equally where values look equal. A turn is one "
        "client in one round. " + UNITS_NOTE,
        "The broadcast is the pretrained model, sent once to every client before its first turn; it is "
        "not counted elsewhere. Seconds are wall-clock on the machine that each record names, with all else "
        "that ran there, so rows may differ by their machines; the server's are those of merging and of "
        "choosing what to prune.",
        *(
            [
                "seconds_on(device, link): of a round, if every client had this device and link of "
                "config/devices.yaml; a cohort takes as long as its slowest client, and clients that take "
                "turns add up."
            ]
            if columns
            else []
        ),
        *scene.notes(),
    ]
    return Table("traffic", "Traffic and compute of a turn, and time", numbers, cells, best, 2, notes)


def memory_table(scene: Scene) -> Table:
    """Peak memory of a client's turn by kind, and what the operating system and CUDA saw."""
    quantities = [
        PEAK,
        Quantity("parameter_bytes", "Parameters", 2**20),
        Quantity("gradient_bytes", "Gradients", 2**20),
        Quantity("optimizer_bytes", "Optimizer", 2**20),
        Quantity("method_bytes", "Method state", 2**20),
        Quantity("activation_bytes", "Activations", 2**20),
        Quantity("resident_set_bytes", "Resident set", 2**20),
    ]
    if scene.runs["cuda_peak_bytes"].notna().any():
        quantities.append(Quantity("cuda_peak_bytes", "CUDA peak", 2**20))
    numbers, cells, best = _cost_table(scene, quantities, score=False)
    notes = [
        "All in MiB (1,048,576 bytes). Bold: lowest peak among the competitors, equally where peaks look "
        "equal. Mean ± standard deviation over seeds.",
        "Parameters, gradients, optimizer state, what the method itself holds (an anchor, a control "
        "variate) and activations make up the peak of live tensors in the turn with the highest peak. The "
        "resident set is that of the whole process, Python included.",
        *scene.notes(),
    ]
    return Table("memory", "Memory of a client's turn", numbers, cells, best, 2, notes)


def terminal(
    runs: pandas.DataFrame | Path,
    expected: Sequence[tuple[str, str, str, int]] = (),
    titles: dict[str, str] | None = None,
    controls: Collection[str] | None = None,
) -> str:
    """Return the main table for a terminal of 120 columns: a block for each task and partition.

    `runs` is `runs.parquet` or the frame from `records.load_runs`; the rest is as in `tables.make`.
    """
    runs = runs if isinstance(runs, pandas.DataFrame) else records.load_runs(runs)
    scene = Scene.make(runs, expected, titles, controls)
    numbers, cells, best = _cost_table(scene, [PEAK, UP, DOWN, COMPUTE], score=True)
    blocks = []
    headings = ["Method", "Score", "Memory (MiB)", "Up (MB)", "Down (MB)", "Compute (TFLOP)", "Seeds"]
    rows = []
    for row, marks in zip(cells.to_numpy().tolist(), best, strict=True):
        # Only means for the costs: their deviations are in the files.
        short = [*row[2:4], *(cell.split(" ± ")[0] for cell in row[4:])]
        rows.append(
            [f"{cell} *" if mark else f"{cell}  " for cell, mark in zip(short, marks[2:], strict=True)]
        )
    widths = [
        max([len(heading), *(len(row[column]) for row in rows)]) for column, heading in enumerate(headings)
    ]
    widths[0] = max(12, min(widths[0], WIDTH - sum(widths[1:]) - 2 * len(widths[1:])))

    def line(values: Sequence[str]) -> str:
        first, *rest = values
        first = first if len(first.rstrip()) <= widths[0] else first[: widths[0] - 1] + "…"
        padded = [value.rjust(width) for value, width in zip(rest, widths[1:], strict=True)]
        return "  ".join([first.ljust(widths[0])[: widths[0]], *padded]).rstrip()

    for (task, partition), group in cells.groupby(["Task", "Partition"], sort=False):
        labels = numbers.loc[group.index[0], CELL]
        own = scene.runs[(scene.runs[CELL] == labels).all(axis=1)]
        divergence = own["label_divergence"].mean()
        skewed = f", label divergence {divergence:.2f}" if math.isfinite(divergence) else ""
        block = [f"{task}: {partition}{skewed}", line(headings)]
        blocks.append("\n".join([*block, *(line(rows[index]) for index in group.index)]))
    notes = [
        "* Best of the competitors; values that look equal are marked equally, and a score only if the "
        "next one is further away than the standard error of the difference for so many test examples.",
        "± is the standard deviation over seeds, left out for one seed and where it is below the last digit. "
        "MB is 1e6 bytes, MiB 1,048,576; bytes are of all clients and rounds.",
    ]
    notes = [textwrap.fill(note, WIDTH, subsequent_indent="  ") for note in notes + scene.notes()]
    return "\n\n".join([*blocks, "\n".join(notes)])
