"""Tables of a study: csv for programs, Markdown for reading, LaTeX (booktabs) for papers.

The csv files hold plain numbers in base units (bytes, FLOPs, seconds, scores as the metric gives them). The
others hold the same numbers rounded and with units: traffic in MB (1e6 bytes), memory in MiB (2**20 bytes),
compute in TFLOP (1e12), scores in points (times 100) unless smaller is better. Every table names the runs
that are missing. The same records give the same bytes.
"""

import math
import textwrap
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy
import pandas
import yaml
from pydantic import ValidationError

from fedlm.results import records
from fedlm.base.errors import UserError
from fedlm.base.files import write_atomically
from fedlm.results.records import Scene
from fedlm.base.settings import Settings
from fedlm.results.statistics import adjust, compare, interquartile_mean
from fedlm.results.typeset import Table, latex, markdown, significant, spread

NAMES = ("main", "aggregate", "paired", "traffic", "memory", "skew", "reference")
WIDTH = 118  # columns of a terminal that the main table may fill
REFERENCE = Path(__file__).parents[2] / "config" / "reference.yaml"
CELL = ["task", "partition"]


def make(
    runs_path: Path,
    rounds_path: Path,
    expected: Sequence[tuple[str, str, str, int]],
    titles: dict[str, str],
    destination: Path,
    *,
    controls: Collection[str] | None = None,
    against: str | None = None,
    reference_path: Path = REFERENCE,
) -> list[Path]:
    """Write all tables of a study as csv, md and tex, and `missing.csv`; return their paths.

    Args:
        runs_path, rounds_path: what `results.collect` wrote.
        expected: the study's runs (task, partition, method, seed), in its order; empty takes what there is.
        titles: display title of each method label, in the order of the rows.
        destination: folder for the files `<name>.csv`, `.md` and `.tex`, for each of `NAMES`.
        controls: names of methods that are no competitors; None asks the method files.
        against: label of the method that the others are compared with in pairs; by default that of FedAvg.
        reference_path: published numbers.

    Raises:
        UserError: a file cannot be read.
    """
    scene = Scene.make(records.load_runs(runs_path), expected, titles, controls)
    rounds = records.load_rounds(rounds_path)
    tables = [
        main_table(scene),
        aggregate_table(scene),
        paired_table(scene, against),
        traffic_table(scene, rounds),
        memory_table(scene),
        skew_table(scene),
        reference_table(scene, reference_path),
    ]
    destination = Path(destination)
    written = write(tables, destination)
    path = destination / "missing.csv"
    absent = pandas.DataFrame(scene.absent, columns=list(records.Expected._fields))
    write_atomically(path, absent.to_csv(index=False, lineterminator="\n").encode())
    return [*written, path]


def write(tables: Iterable[Table], destination: Path) -> list[Path]:
    """Write each table as `<name>.csv`, `.md` and `.tex`; return their paths."""
    written = []
    for table in tables:
        for ending, content in (
            ("csv", table.numbers.to_csv(index=False, lineterminator="\n")),
            ("md", markdown(table)),
            ("tex", latex(table)),
        ):
            written.append(destination / f"{table.name}.{ending}")
            write_atomically(written[-1], content.encode())
    return written


def points(values: pandas.Series, greater_is_better: bool) -> pandas.Series:
    """Return scores in points (times 100); perplexities and losses stay as they are."""
    return values * 100 if greater_is_better else values


def _score_text(runs: pandas.DataFrame) -> str:
    if runs.empty:
        return "missing"
    greater = bool(runs["greater_is_better"].iloc[0])
    return spread(points(runs["test_score"], greater), 1 if greater else None)


def _metric_text(runs: pandas.DataFrame) -> str:
    metric = runs["metric"].iloc[0]
    name = metric.replace("_", " ")
    if not runs["greater_is_better"].iloc[0]:
        return f"{name}, lower is better"
    return f"{name}, %" if metric in ("accuracy", "f1", "macro_f1", "exact_match") else f"{name} × 100"


def _task_texts(scene: Scene) -> dict[str, str]:
    return {
        task: f"{task} ({_metric_text(runs)})" if len(runs) else task
        for task in scene.tasks
        for runs in [scene.runs[scene.runs["task"] == task]]
    }


class Quantity(NamedTuple):
    """A column of costs: where it comes from, how it is headed, its unit, and whether the least is marked."""

    column: str
    heading: str
    unit: float
    mark: bool = False


PEAK = Quantity("peak_memory_bytes", "Peak memory (MiB)", 2**20, mark=True)
UP = Quantity("upload_bytes", "Sent up (MB)", 1e6, mark=True)
DOWN = Quantity("download_bytes", "Sent down (MB)", 1e6, mark=True)
COMPUTE = Quantity("flops", "Compute (TFLOP)", 1e12, mark=True)
UNITS_NOTE = (
    "Mean ± standard deviation over seeds; no deviation is written where there is one seed or where it is "
    "below the last digit. MB is 1e6 bytes, MiB is 1,048,576 bytes, TFLOP is 1e12 floating point operations."
)
SUMS_NOTE = (
    "Bytes and compute are sums over all clients and rounds of a run, the first broadcast of the pretrained "
    "model apart. Peak memory is that of live tensors in the turn with the highest peak, model included."
)


def _cost_table(
    scene: Scene, quantities: Sequence[Quantity], score: bool
) -> tuple[pandas.DataFrame, pandas.DataFrame, numpy.ndarray]:
    """Return numbers, cells and best marks of a table with one row for each task, partition and method."""
    numbers, cells, values = [], [], []
    texts = _task_texts(scene) if score else {task: task for task in scene.tasks}
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
            number |= _mean_and_deviation("test_score", runs["test_score"].to_numpy())
            cell["Score"] = _score_text(runs)
            value.append(_rounded(cell["Score"]) * (-1 if filled and number["greater_is_better"] else 1))
        for quantity in quantities:
            column = runs[quantity.column].to_numpy(dtype=float, na_value=math.nan)
            number |= _mean_and_deviation(quantity.column, column)
            cell[quantity.heading] = spread(column / quantity.unit)
            value.append(_rounded(cell[quantity.heading]) if quantity.mark else math.nan)
        cell["Seeds"] = str(len(runs)) if len(runs) == asked else f"{len(runs)} of {asked}"
        numbers.append(number)
        cells.append(cell)
        values.append([*value, math.nan])
    numbers, cells, values = pandas.DataFrame(numbers), pandas.DataFrame(cells), numpy.array(values, float)
    best = numpy.zeros(values.shape, dtype=bool)
    if len(numbers):
        # Scores of fewer seeds are not compared with those of more; costs hardly depend on the seed.
        most = numbers.groupby(CELL)["seeds"].transform("max")
        if score:
            values[numbers["seeds"] < most, cells.columns.get_loc("Score")] = math.nan
        values[numbers["control"]] = math.nan
        values = numpy.where(numpy.isnan(values), numpy.inf, values)
        for _, rows in numbers.groupby(CELL, sort=False):
            some = values[rows.index]
            # The best of one is no news.
            several = numpy.isfinite(some).sum(axis=0) > 1
            best[rows.index] = several & numpy.isfinite(some) & (some == some.min(axis=0))
    return numbers, cells, best


def _mean_and_deviation(name: str, values: numpy.ndarray) -> dict[str, float]:
    values = values[~numpy.isnan(values)]
    return {
        f"{name}_mean": float(values.mean()) if len(values) else math.nan,
        f"{name}_sd": float(values.std(ddof=1)) if len(values) > 1 else math.nan,
    }


def _rounded(text: str) -> float:
    """Return the mean that a cell shows: what looks equal is equally good."""
    try:
        return float(text.split(" ")[0].replace(",", ""))
    except ValueError:
        return math.nan


# The tables


def main_table(scene: Scene) -> Table:
    """Score, peak memory, bytes up and down and compute of each task x partition x method."""
    numbers, cells, best = _cost_table(scene, [PEAK, UP, DOWN, COMPUTE], score=True)
    notes = [
        "Score on the test split, of the server's model after the last round. "
        "Bold: best of the competitors; for the score, of those with the most seeds. " + UNITS_NOTE,
        SUMS_NOTE,
        *scene.notes(),
    ]
    return Table("main", "What each method scores and what it costs", numbers, cells, best, 2, notes)


def traffic_table(scene: Scene, rounds: pandas.DataFrame) -> Table:
    """Bytes and compute of one client in one round, the first broadcast, and seconds."""
    keys = ["task", "partition", "method", "seed"]
    turns = rounds.groupby(keys, observed=True)["participants"].sum().rename("turns").reset_index()
    turns = turns.astype({"task": object, "partition": object, "method": object})
    runs = scene.runs.merge(turns, on=keys, how="left")
    for column in ("upload_bytes", "download_bytes", "flops"):
        runs[f"turn_{column}"] = runs[column] / runs["turns"].where(runs["turns"] > 0)
    quantities = [
        Quantity("turn_upload_bytes", "Up a turn (MB)", 1e6, mark=True),
        Quantity("turn_download_bytes", "Down a turn (MB)", 1e6, mark=True),
        Quantity("broadcast_bytes", "Broadcast (MB)", 1e6),
        Quantity("turn_flops", "Compute a turn (TFLOP)", 1e12, mark=True),
        Quantity("train_seconds", "Training (s)", 1),
        Quantity("wall_seconds", "Whole run (s)", 1),
    ]
    numbers, cells, best = _cost_table(scene._replace(runs=runs), quantities, score=False)
    notes = [
        "Bold: least of the competitors. A turn is one client in one round. " + UNITS_NOTE,
        "The broadcast is the pretrained model, sent once to every client before its first turn; it is not "
        "counted elsewhere. Seconds are wall-clock on the machine that the records name.",
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
        Quantity("activation_bytes", "Activations", 2**20),
        Quantity("resident_set_bytes", "Resident set", 2**20),
    ]
    if scene.runs["cuda_peak_bytes"].notna().any():
        quantities.append(Quantity("cuda_peak_bytes", "CUDA peak", 2**20))
    numbers, cells, best = _cost_table(scene, quantities, score=False)
    notes = [
        "All in MiB (1,048,576 bytes). Bold: least peak of the competitors. Mean ± standard deviation over "
        "seeds.",
        "Parameters, gradients, optimizer state and activations make up the peak of live tensors in the turn "
        "with the highest peak. The resident set is that of the whole process, Python included.",
        *scene.notes(),
    ]
    return Table("memory", "Memory of a client's turn", numbers, cells, best, 2, notes)


def aggregate_table(scene: Scene) -> Table:
    """Interquartile mean of all scores of a method, with a stratified bootstrap interval over seeds."""
    numbers, cells, marks = [], [], []
    families = scene.runs.assign(family=scene.runs["metric"].where(~scene.runs["greater_is_better"], "score"))
    for family in sorted(families["family"].unique(), key=lambda name: (name != "score", name)):
        runs = families[families["family"] == family]
        greater = family == "score"
        every_cell = runs.groupby(CELL, observed=True).ngroups
        values = []
        for method in scene.methods:
            own = runs[runs["method"] == method]
            if own.empty:
                continue
            strata = [
                points(cell["test_score"], greater).to_numpy() for _, cell in own.groupby(CELL, observed=True)
            ]
            estimate = interquartile_mean(strata)
            complete = len(strata) == every_cell
            numbers.append(
                {
                    "family": family,
                    "method": method,
                    "title": scene.titles[method],
                    "control": method in scene.controls,
                    "interquartile_mean": estimate.value,
                    "low": estimate.low,
                    "high": estimate.high,
                    "mean": points(own["test_score"], greater).mean(),
                    "cells": len(strata),
                    "cells_of_all": every_cell,
                    "runs": len(own),
                }
            )
            write = (lambda value: f"{value:.1f}") if greater else significant
            known = math.isfinite(estimate.low)
            cells.append(
                {
                    "Measure": "score, points" if greater else f"{family}, lower is better",
                    "Method": scene.title(method),
                    "Interquartile mean": write(estimate.value),
                    "95% interval": f"{write(estimate.low)} to {write(estimate.high)}" if known else "–",
                    "Mean": write(numbers[-1]["mean"]),
                    "Cells": f"{len(strata)} of {every_cell}",
                    "Runs": str(len(own)),
                }
            )
            fit = complete and method not in scene.controls
            values.append(
                _rounded(cells[-1]["Interquartile mean"]) * (-1 if greater else 1) if fit else math.inf
            )
        least = min(values, default=math.inf)
        several = sum(value < math.inf for value in values) > 1
        marks += [[False, False, several and value == least, *[False] * 4] for value in values]
    notes = [
        "Over all cells (task × partition) of a method, in points (score times 100) where greater is better. "
        "The interval is a stratified bootstrap over seeds, 2,000 draws; there is none where no cell has two "
        "seeds. Methods with different cells cannot be compared; bold: best of the competitors that have all "
        "cells.",
        *scene.notes(),
    ]
    columns = ["Measure", "Method", "Interquartile mean", "95% interval", "Mean", "Cells", "Runs"]
    best = numpy.array(marks, dtype=bool).reshape(len(marks), len(columns))
    return Table(
        "aggregate",
        "Scores over all tasks and partitions",
        pandas.DataFrame(numbers),
        pandas.DataFrame(cells, columns=columns),
        best,
        1,
        notes,
    )


def paired_table(scene: Scene, against: str | None = None) -> Table:
    """Every method against one of them, on the same seeds: paired t-test for each task x partition."""
    runs = scene.runs
    names = dict(zip(runs["method"], runs["method_name"], strict=True))
    if against is None:
        candidates = [method for method in scene.methods if names.get(method) == "fedavg"]
        candidates += [method for method in scene.methods if method not in scene.controls]
        against = (candidates or [*scene.methods, ""])[0]
    elif against not in scene.titles:
        raise UserError(
            f"against: {against!r} is not a method of the study; allowed: {', '.join(scene.titles)}"
        )
    found, too_few = [], 0
    texts = _task_texts(scene)
    every = scene.cells()
    scores = {
        (task, partition, method): own.set_index("seed")["test_score"]
        for task, partition, method, own, _ in every
    }
    for task, partition, method, own, _ in every:
        if method == against:
            continue
        ours, theirs = (
            scores[task, partition, method],
            scores.get((task, partition, against), own["seed"][:0]),
        )
        seeds = sorted(set(ours.index) & set(theirs.index))
        if len(seeds) < 2:
            too_few += 1
            continue
        greater = bool(own["greater_is_better"].iloc[0])
        result = compare(points(ours[seeds], greater), points(theirs[seeds], greater))
        found.append((task, partition, method, greater, result))
    adjusted = adjust([result.p for *_, result in found])
    numbers, cells = [], []
    for (task, partition, method, greater, result), value in zip(found, adjusted, strict=True):
        labels = {"task": task, "partition": partition, "method": method, "against": against}
        numbers.append({**labels, **result._asdict(), "p_adjusted": value})
        write = (lambda number: f"{number:+.1f}") if greater else (lambda number: f"{number:+.3g}")
        known = math.isfinite(result.low)
        cells.append(
            {
                "Task": texts[task],
                "Partition": partition,
                "Method": scene.title(method),
                "Difference": write(result.difference),
                "95% interval": f"{write(result.low)} to {write(result.high)}" if known else "–",
                "p": _probability(result.p),
                "p adjusted": _probability(value),
                "n": str(result.n),
            }
        )
    name = scene.titles.get(against, against)
    notes = [
        f"Test score of the method minus that of {name} on the same seed (same split, same clients, same new "
        "head); n pairs, two-sided paired t-test. p adjusted is for the number of rows (Benjamini and "
        "Hochberg). With few seeds only large differences can be told from chance.",
        *([f"Comparisons left out, having fewer than two pairs: {too_few}."] if too_few else []),
        *scene.notes(),
    ]
    columns = ["Task", "Partition", "Method", "Difference", "95% interval", "p", "p adjusted", "n"]
    fields = ["task", "partition", "method", "against", "n", "difference", "low", "high", "p", "p_adjusted"]
    return Table(
        "paired",
        f"Differences from {name}, paired by seed",
        pandas.DataFrame(numbers, columns=fields),
        pandas.DataFrame(cells, columns=columns),
        numpy.zeros((len(cells), len(columns)), dtype=bool),
        2,
        notes,
    )


def _probability(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def skew_table(scene: Scene) -> Table:
    """The measured skew of each partition."""
    numbers, cells = [], []
    # Every method of a cell has the same partitions, so one run a seed says it all.
    runs = scene.runs.drop_duplicates(["task", "partition", "seed"])
    for task in scene.tasks:
        for partition in scene.partitions:
            own = runs[(runs["task"] == task) & (runs["partition"] == partition)]
            if own.empty:
                continue
            number: dict[str, Any] = {"task": task, "partition": partition, "scheme": own["scheme"].iloc[0]}
            cell = {"Task": task, "Partition": partition, "Scheme": own["scheme"].iloc[0]}
            for column, heading in (
                ("label_divergence", "Label divergence (bit)"),
                ("size_gini", "Size inequality (Gini)"),
            ):
                number |= _mean_and_deviation(column, own[column].to_numpy(dtype=float))
                cell[heading] = spread(own[column], 3)
            numbers.append({**number, "seeds": len(own)})
            cells.append({**cell, "Seeds": str(len(own))})
    columns = ["Task", "Partition", "Scheme", "Label divergence (bit)", "Size inequality (Gini)", "Seeds"]
    notes = [
        "Label divergence: Jensen-Shannon divergence of a client's labels from all clients' labels, mean "
        "over examples; 0 is IID. Gini coefficient of the clients' numbers of examples; 0 is equal. Mean ± "
        "standard deviation over seeds.",
        *scene.notes(),
    ]
    return Table(
        "skew",
        "How much the clients' data differ",
        pandas.DataFrame(numbers),
        pandas.DataFrame(cells, columns=columns),
        numpy.zeros((len(cells), len(columns)), dtype=bool),
        1,
        notes,
    )


# Published numbers


class Source(Settings):
    """One publication; each row has `task`, `division` and a number for each method."""

    name: str
    reference: str
    model: str
    note: str
    quantity: Literal["score", "memory"]
    tasks: list[str] = []  # what rows of task "all" are the mean of
    rows: list[dict[str, str | float]]


class Sources(Settings):
    """The content of config/reference.yaml."""

    sources: list[Source]


def read_reference(path: Path = REFERENCE) -> list[Source]:
    """Read published numbers; raise UserError naming the place where the file is wrong."""
    try:
        found = Sources.model_validate(yaml.safe_load(Path(path).read_text()))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return found.sources


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def reference_table(scene: Scene, path: Path = REFERENCE) -> Table:
    """Published numbers above ours, for each task and model that both have."""
    numbers, cells, used = [], [], []

    def add(
        task: str, quantity: str, method: str, division: str, origin: str, value: float, text: str
    ) -> None:
        labels = {
            "task": task,
            "quantity": quantity,
            "method": method,
            "division": division,
            "origin": origin,
        }
        numbers.append({**labels, "value": value})
        cells.append(dict(zip(columns, (task, quantity, origin, method, division, text), strict=True)))

    columns = ["Task", "Quantity", "Origin", "Method", "Division of the data", "Value"]
    sources = read_reference(path)
    for task in scene.tasks:
        runs = scene.runs[scene.runs["task"] == task]
        if runs.empty:
            continue
        names = {_plain(task), _plain(runs["task_name"].iloc[0])}
        model = _plain(runs["model"].iloc[0].rstrip("/").rsplit("/", 1)[-1])
        for kind in ("score", "memory"):
            quantity = f"{_metric_text(runs)}" if kind == "score" else "memory, GB"
            published = 0
            for source in sources:
                if source.quantity != kind or not model.startswith(_plain(source.model)):
                    continue
                for row in source.rows:
                    of_all = row["task"] == "all" and names & {_plain(name) for name in source.tasks}
                    if not of_all and _plain(str(row["task"])) not in names:
                        continue
                    used.append(source)
                    division = str(row["division"]) + (
                        f", mean of {len(source.tasks)} tasks" if of_all else ""
                    )
                    if of_all and len(source.tasks) == 1:
                        division = str(row["division"])
                    for method, value in row.items():
                        if method not in ("task", "division"):
                            add(task, quantity, method, division, source.name, float(value), f"{value:.1f}")
                            published += 1
            if not published:
                continue
            for _, partition, method, own, _ in scene._replace(tasks=[task]).cells():
                if own.empty:
                    continue
                greater = bool(own["greater_is_better"].iloc[0])
                values = (
                    points(own["test_score"], greater) if kind == "score" else own["peak_memory_bytes"] / 1e9
                )
                text = spread(values, 1 if kind == "score" and greater else None)
                add(task, quantity, scene.title(method), partition, "this study", float(values.mean()), text)
    notes = [
        f"{source.name}: {source.reference}; {source.note}."
        for source in dict.fromkeys(source.name for source in used)
        for source in [next(one for one in used if one.name == source)]
    ]
    if cells:
        notes.insert(
            0,
            "Published under other conditions (below), with other code; never mixed with our runs. "
            "GB is 1e9 bytes.",
        )
    else:
        notes.insert(0, "No published number is at hand for a task and model of this study.")
    fields = ["task", "quantity", "method", "division", "origin", "value"]
    return Table(
        "reference",
        "Published numbers beside ours",
        pandas.DataFrame(numbers, columns=fields),
        pandas.DataFrame(cells, columns=columns),
        numpy.zeros((len(cells), len(columns)), dtype=bool),
        3,
        [*notes, *scene.notes()],
    )


def terminal(
    runs: pandas.DataFrame | Path,
    expected: Sequence[tuple[str, str, str, int]] = (),
    titles: dict[str, str] | None = None,
    controls: Collection[str] | None = None,
) -> str:
    """Return the main table for a terminal of 120 columns: a block for each task and partition.

    `runs` is `runs.parquet` or what `results.load_runs` made of it; the rest is as in `make`.
    """
    runs = runs if isinstance(runs, pandas.DataFrame) else records.load_runs(runs)
    scene = Scene.make(runs, expected, titles, controls)
    numbers, cells, best = _cost_table(scene, [PEAK, UP, DOWN, COMPUTE], score=True)
    blocks = []
    headings = ["Method", "Score", "Memory (MiB)", "Up (MB)", "Down (MB)", "Compute (TFLOP)", "Seeds"]
    rows = []
    for row, marks in zip(cells.to_numpy().tolist(), best, strict=True):
        # Means alone for the costs: their deviations are in the files.
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
        "* Best of the competitors. MB is 1e6 bytes, MiB 1,048,576; bytes are of all clients and rounds."
    ]
    notes = [textwrap.fill(note, WIDTH, subsequent_indent="  ") for note in notes + scene.notes()]
    return "\n\n".join([*blocks, "\n".join(notes)])
