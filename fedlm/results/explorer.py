"""The explorer: one web page with all results of a study, without network or server.

The page holds its data once, as tables, and one chart for each pane (`panes`). What its filters leave is put
into the charts by `page/explorer.js`.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy
import pandas
import vl_convert

from fedlm.base.files import write_atomically
from fedlm.data.partition import PartitionFile
from fedlm.results.cells import CELL, metric_text, points
from fedlm.results.cost_to_target import cost_to_target_table
from fedlm.results.devices import Devices, columns_of_seconds, in_words, seconds_so_far
from fedlm.results.drawing import KINDS, styles
from fedlm.results.panes import ALONG, AXES, Panes, looks
from fedlm.results.ranking import on_all_partitions, ranking_table
from fedlm.results.scene import Scene

PAGE = Path(__file__).parent / "page"
MANY_CLIENTS = 60  # of a partition with more, this many are drawn, the largest first
COSTS = ["upload_bytes", "download_bytes", "peak_memory_bytes", "flops"]
KEYS = [*CELL, "method", "seed"]


def make(
    scene: Scene,
    rounds: pandas.DataFrame,
    partitions: Iterable[PartitionFile],
    destination: Path,
    *,
    study: str,
    devices: Devices | None = None,
    cohorts: Mapping[tuple[str, str], float] | None = None,
    has_target: bool = False,
) -> Path:
    """Write the page of a study to `destination` and return its path.

    Args:
        scene, rounds: the runs, and one row for each of their rounds (`records.load_rounds`).
        partitions: partition files; of each task and partition the lowest seed is drawn.
        study: its name, below which the records lie.
        devices, cohorts: for the seconds on devices, as in `devices.seconds_so_far`; None: there are none.
        has_target: whether the study has a centralised score to come near.
    """
    methods = looks(styles(scene.methods), scene.titles)
    for method in methods:
        method["control"] = method["method"] in scene.controls
    on = devices.columns() if devices and cohorts else {}
    names = {f"seconds_{number}": title for number, title in enumerate(on)}
    seconds = [(name, in_words(title), True) for name, title in names.items()]
    rounds = rounds.astype(dict.fromkeys(KEYS[:3], object)).merge(scene.runs[KEYS], on=KEYS)
    for name, title in names.items():
        rounds[name] = seconds_so_far(rounds, scene.runs, cohorts or {}, *on[title])
    content = {
        "study": study,
        "tasks": scene.tasks,
        "partitions": scene.partitions,
        "methods": methods,
        "axes": [*AXES, *seconds],
        "along": [*ALONG, *seconds],
        "cells": pack(_cells(scene, rounds, list(names))),
        "curves": pack(_curves(scene, rounds, list(names))),
        "ranking": pack(_ranking(scene)),
        "memory": pack(_memory(scene)),
        "clients": pack(_partitions(scene, partitions)),
        "target": pack(_target(scene, rounds, devices, cohorts) if has_target else pandas.DataFrame()),
        "runs": pack(_runs(scene, study)),
        "notes": scene.notes(),
        "charts": Panes(methods).charts(),
    }
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = template.from_string((PAGE / "explorer.html").read_text(encoding="utf-8")).render(
        study=study,
        style=(PAGE / "explorer.css").read_text(encoding="utf-8"),
        library=_inside_script(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")),
        script=_inside_script((PAGE / "explorer.js").read_text(encoding="utf-8")),
        # Whatever a label contains, it ends no script element.
        content=json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    )
    write_atomically(destination, page.encode())
    return destination


def _inside_script(code: str) -> str:
    """Return JavaScript with the end tags of script elements that its strings contain written otherwise."""
    return re.sub("</(?=script)", r"<\\/", code, flags=re.IGNORECASE)


def pack(frame: pandas.DataFrame) -> dict[str, Any]:
    """Return a table by columns, numbers with five significant digits; what is not known is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, float | numpy.floating):
            return float(f"{value:.5g}") if math.isfinite(value) else None
        return value.item() if isinstance(value, numpy.generic) else value

    return {str(name): [plain(value) for value in frame[name]] for name in frame}


def _cell_title(scene: Scene, task: str, partition: str) -> str:
    runs = scene.runs[scene.runs["task"] == task]
    return f"{task}, {partition}: {metric_text(runs)}" if len(runs) else f"{task}, {partition}"


def _cells(scene: Scene, rounds: pandas.DataFrame, seconds: Sequence[str]) -> pandas.DataFrame:
    """Mean score, deviation and costs of each task, partition and method."""
    last = rounds.sort_values("round").drop_duplicates(KEYS, keep="last").groupby(KEYS[:3])
    rows = []
    for task, partition, method, runs, _ in scene.cells():
        if runs.empty:
            continue
        scores = points(runs["test_score"], bool(runs["greater_is_better"].iloc[0]))
        deviation = scores.std(ddof=1) if len(scores) > 1 else 0.0
        row: dict[str, Any] = {"task": task, "partition": partition, "method": method}
        row |= {"title": scene.titles[method], "cell": _cell_title(scene, task, partition)}
        row |= {"score": scores.mean(), "sd": deviation, "seeds": len(scores)}
        row |= {"low": scores.mean() - deviation, "high": scores.mean() + deviation}
        row |= {name: float(runs[name].astype(float).mean()) for name in COSTS}
        if seconds:
            own = last.get_group((task, partition, method))
            row |= {name: float(own[name].mean()) for name in seconds}
        rows.append(row)
    return pandas.DataFrame(rows)


def _curves(scene: Scene, rounds: pandas.DataFrame, seconds: Sequence[str]) -> pandas.DataFrame:
    """Mean validation score and costs so far of each round that was scored."""
    greater = scene.runs.groupby("task")["greater_is_better"].first().astype(bool).to_dict()
    scored = rounds[rounds["validation_score"].notna()]
    columns = ["validation_score", "upload_bytes", "download_bytes", "flops", *seconds]
    means = scored.groupby([*KEYS[:3], "round"], sort=False)[columns].mean().reset_index()
    factor = means["task"].map(lambda task: 100 if greater.get(task, True) else 1)
    means["score"] = means.pop("validation_score") * factor
    means["title"] = means["method"].map(scene.titles)
    cells = {
        (task, partition): _cell_title(scene, task, partition)
        for task in scene.tasks
        for partition in scene.partitions
    }
    means["cell"] = [cells[key] for key in zip(means["task"], means["partition"], strict=True)]
    order = {title: place for place, title in enumerate(cells.values())}
    return means.sort_values("cell", key=lambda titles: titles.map(order), kind="stable")


def _ranking(scene: Scene) -> pandas.DataFrame:
    """The ranking over everything, over each task, over each partition and in each cell ("" means all)."""
    found = []
    everywhere = on_all_partitions(scene.runs)
    for task in ["", *scene.tasks]:
        for partition in ["", *scene.partitions]:
            runs = everywhere
            runs = runs[runs["task"] == task] if task else runs
            runs = runs[runs["partition"] == partition] if partition else runs
            if runs.empty:
                continue
            numbers = ranking_table(scene._replace(runs=runs)).numbers
            family = numbers["family"].iloc[0]
            own = numbers[numbers["family"] == family]
            found.append(
                pandas.DataFrame(
                    {
                        "task": task,
                        "partition": partition,
                        "method": own["method"],
                        "title": own["title"],
                        "measure": "score (points)" if family == "score" else f"{family}, lower is better",
                        "value": own["interquartile_mean"],
                        "low": own["low"],
                        "high": own["high"],
                        "group": own["group"],
                        "cells": own["cells"],
                        "cells_of_all": own["cells_of_all"],
                        "place": range(len(own)),
                    }
                )
            )
    return pandas.concat(found, ignore_index=True) if found else pandas.DataFrame()


def _memory(scene: Scene) -> pandas.DataFrame:
    """Peak memory by kind of each task, partition and method."""
    rows = []
    for task, partition, method, runs, _ in scene.cells():
        for order, (column, name, *_) in enumerate(KINDS):
            value = runs[column].astype(float).mean()
            if math.isfinite(value):
                row = {"task": task, "partition": partition, "method": method, "title": scene.titles[method]}
                rows.append({**row, "kind": name, "order": order, "bytes": value})
    return pandas.DataFrame(rows)


def _partitions(scene: Scene, files: Iterable[PartitionFile]) -> pandas.DataFrame:
    """Examples of each label, or else population, that each client has."""
    first: dict[tuple[str, str], PartitionFile] = {}
    for file in files:
        cell = file.task, file.partition
        if cell not in first or file.seed < first[cell].seed:
            first[cell] = file
    rows = []
    for task in scene.tasks:
        for partition in scene.partitions:
            if (task, partition) not in first:
                continue
            names, counts = first[task, partition].content()
            title = f"{task}, {partition}"
            clients = list(range(len(counts)))
            if len(clients) > MANY_CLIENTS:
                clients = sorted(clients, key=lambda client: -sum(counts[client]))[:MANY_CLIENTS]
                title += f": the {MANY_CLIENTS} largest of {len(counts)} clients"
            for client in clients:
                for order, (name, count) in enumerate(zip(names, counts[client], strict=True)):
                    if count:
                        row = {"task": task, "partition": partition, "cell": title, "client": client}
                        rows.append({**row, "label": name, "order": order, "examples": count})
    return pandas.DataFrame(rows)


def _target(
    scene: Scene,
    rounds: pandas.DataFrame,
    devices: Devices | None,
    cohorts: Mapping[tuple[str, str], float] | None,
) -> pandas.DataFrame:
    """What it costs each method to come near the centralised score."""
    numbers = cost_to_target_table(scene, rounds, devices, cohorts).numbers
    if numbers.empty:
        return numbers
    numbers = numbers[~numbers["control"]]
    cells = [
        _cell_title(scene, task, partition)
        for task, partition in zip(numbers["task"], numbers["partition"], strict=True)
    ]
    seeds = numbers["reached"].astype(str) + " of " + numbers["seeds"].astype(str)
    seconds = {name: f"seconds_{number}" for number, name in enumerate(columns_of_seconds(numbers))}
    kept = ["task", "partition", "method", "title", "target", "round", *COSTS, *seconds]
    return numbers[kept].rename(columns=seconds).assign(cell=cells, text=seeds)


def _runs(scene: Scene, study: str) -> pandas.DataFrame:
    """Where each run's numbers come from."""
    runs = scene.runs
    keys = {name: list(runs[name]) for name in KEYS}
    return pandas.DataFrame(
        {
            **keys,
            "test_score": runs["test_score"].to_numpy(),
            "metric": runs["metric"].to_numpy(),
            "commit": [commit[:12] for commit in runs["commit"]],
            "dirty": runs["dirty"].astype(bool).to_numpy(),
            "payload": [(value or "")[:12] for value in runs["payload_sha256"]],
            "record": [
                f"results/{study}/runs/{task}/{partition}/{method}/seed{seed}.json"
                for task, partition, method, seed in zip(*keys.values(), strict=True)
            ],
        }
    )
