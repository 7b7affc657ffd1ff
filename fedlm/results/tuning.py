"""What the tuning found: the expected best validation score by number of trials, and the choices."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import matplotlib.ticker
import numpy
import pandas
from matplotlib.figure import Figure

from fedlm.base.errors import UserError
from fedlm.results.drawing import Style, marker, panels
from fedlm.results.lettering import measure, methods_legend, name_row
from fedlm.results.scene import Scene
from fedlm.results.statistics import expected_best
from fedlm.results.typeset import Table, significant

LABELS = ["task", "partition", "method"]


def read_trials(path: Path) -> pandas.DataFrame:
    """Return the compiled trials, one row each; raise UserError if the file is absent or outdated."""
    try:
        trials = pandas.read_parquet(path)
    except (OSError, ValueError):
        raise UserError(f"{path}: not a parquet file; make it again with `collect`") from None
    for name in (*LABELS, "trial", "status", "validation_score", "greater_is_better"):
        if name not in trials:
            raise UserError(f"{path}: lacks the column {name}; make it again with `collect`")
    return trials


def read_choices(folder: Path, rows: Collection[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return what was chosen for each of these tasks and methods, from the files <task>/<method>.json.

    A file that is not there is left out.
    """
    choices = []
    for task, method in sorted(rows):
        path = Path(folder) / task / f"{method}.json"
        if not path.exists():
            continue
        try:
            choice = json.loads(path.read_bytes())
            choices.append({key: choice[key] for key in (*LABELS, "trial", "chosen", "at_edge")})
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{path}: not the choice of a tuning ({reason}); make it again") from None
    return choices


def expectations(trials: pandas.DataFrame) -> pandas.DataFrame:
    """Return the expected best validation score of so many trials, for each task, partition and method.

    A failed trial counts as a score as bad as the worst that any method had on the task.
    """
    rows = []
    for task, some in trials.groupby("task", sort=False):
        finished = some[some["status"] == "finished"]
        if finished.empty:
            continue
        greater = bool(finished["greater_is_better"].iloc[0])
        sign = 1.0 if greater else -1.0
        scores = (sign * some["validation_score"].astype(float)).where(some["status"] == "finished")
        scores = scores.fillna(scores.min())
        for (partition, method), own in some.groupby(["partition", "method"], sort=False):
            for number, best in enumerate(expected_best(scores[own.index]), start=1):
                failed = int((own["status"] != "finished").sum())
                rows.append((task, partition, method, number, sign * best, greater, len(own), failed))
    columns = [*LABELS, "trials", "expected_best", "greater_is_better", "trials_of_all", "failed"]
    return pandas.DataFrame(rows, columns=columns)


def _shown_numbers(most: int) -> list[int]:
    """Return 1, 2, 4, ... and the largest number of trials."""
    return (
        sorted({*(2**power for power in range(most.bit_length()) if 2**power <= most), most}) if most else []
    )


def tuning_table(scene: Scene, trials: pandas.DataFrame, choices: Sequence[dict[str, Any]]) -> Table:
    """For each task and method the expected best score of some numbers of trials, and what was chosen."""
    found = expectations(trials)
    chosen = {(choice["task"], choice["method"]): choice for choice in choices}
    steps = _shown_numbers(int(found["trials"].max()) if len(found) else 0)
    headings = {step: f"{step} trial{'s' if step > 1 else ''}" for step in steps}
    rows = []
    groups = dict(list(found.groupby(["task", "method"], sort=False)))
    for task in scene.tasks:
        for method in scene.methods:
            if (task, method) not in groups:
                continue
            own = groups[task, method].set_index("trials")
            greater = bool(own["greater_is_better"].iloc[0])
            best = own["expected_best"]
            write = (lambda value: f"{100 * value:.1f}") if greater else significant
            choice = chosen.get((task, method), {"chosen": {}, "at_edge": []})
            settings = ", ".join(
                f"{key.removeprefix('training.')} {_plain(value)}" + ("*" if key in choice["at_edge"] else "")
                for key, value in choice["chosen"].items()
            )
            row = {
                "Task": task,
                "Partition": own["partition"].iloc[0],
                "Method": scene.title(method),
                **{headings[step]: write(best[step]) if step in best else "–" for step in steps},
                "Failed": str(own["failed"].iloc[0]),
                "Chosen": settings or "–",
            }
            rows.append(row)
    columns = ["Task", "Partition", "Method", *headings.values(), "Failed", "Chosen"]
    cells = pandas.DataFrame(rows, columns=columns)
    notes = [
        "Expected best validation score of so many trials (in points where greater is better), over all "
        "ways to draw them from the trials made; the last column of numbers is the score of the trial "
        "that was chosen. A failed trial counts as the worst score of any method on the task. * The "
        "outermost value tried: the range may have been too narrow. All trials are in trials.parquet, "
        "their records below trials/.",
        *scene.notes(),
    ]
    return Table(
        "tuning",
        "What the tuning found, and how soon",
        found,
        cells,
        numpy.zeros(cells.shape, dtype=bool),
        2,
        notes,
    )


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('"')


def tuning_curves(scene: Scene, look: dict[str, Style], trials: pandas.DataFrame, tasks: list[str]) -> Figure:
    """Expected best validation score over the number of trials, a panel for each task."""
    found = expectations(trials)
    figure, grid = panels(1, len(tasks), height=1.8)
    methods = set()
    for axes, task in zip(grid[0], tasks, strict=True):
        name, factor = measure(scene, task)
        some = found[found["task"] == task]
        axes.set_xlabel("trials")
        name_row(axes, task, f"best validation {name}")
        for method in scene.methods:
            own = some[some["method"] == method]
            if own.empty:
                continue
            methods.add(method)
            style = look[method]
            axes.plot(
                own["trials"],
                own["expected_best"] * factor,
                color=style.colour,
                linestyle=style.line,
                **marker(style),
            )
        if some.empty:
            axes.text(0.5, 0.5, "no trials", transform=axes.transAxes, ha="center", color="#777777")
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
    methods_legend(figure, scene, look, methods)
    return figure
