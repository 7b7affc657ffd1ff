"""Published numbers, read from config/reference.yaml, next to ours."""

from pathlib import Path
from typing import Literal

import numpy
import pandas

from fedlm.base.settings import Settings
from fedlm.results.cells import metric_text, points
from fedlm.results.scene import Scene
from fedlm.results.typeset import Table, spread
from fedlm.study.yaml_files import read_settings

REFERENCE = Path(__file__).parents[2] / "config" / "reference.yaml"


class Source(Settings):
    """One publication; each row has `task`, `division` and a number for each method."""

    name: str
    reference: str
    model: str
    note: str
    quantity: Literal["score", "memory"]
    tasks: list[str] = []  # the tasks that rows of task "all" average over
    rows: list[dict[str, str | float]]


class Sources(Settings):
    """The content of config/reference.yaml."""

    sources: list[Source]


def read_reference(path: Path = REFERENCE) -> list[Source]:
    """Read published numbers; raise UserError naming the place of an error."""
    return read_settings(path, Sources).sources


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
            quantity = f"{metric_text(runs)}" if kind == "score" else "memory, GB"
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
        for name in dict.fromkeys(one.name for one in used)
        for source in [next(one for one in used if one.name == name)]
    ]
    if cells:
        notes.insert(
            0,
            "Published under other conditions (below), with other code; never mixed with our runs. "
            "GB is 1e9 bytes.",
        )
    else:
        notes.insert(0, "There are no published numbers for a task and model of this study.")
    fields = ["task", "quantity", "method", "division", "origin", "value"]
    return Table(
        "reference",
        "Published numbers next to ours",
        pandas.DataFrame(numbers, columns=fields),
        pandas.DataFrame(cells, columns=columns),
        numpy.zeros((len(cells), len(columns)), dtype=bool),
        3,
        [*notes, *scene.notes()],
    )
