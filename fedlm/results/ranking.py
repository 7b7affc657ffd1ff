"""The ranking over all tasks and partitions, and which methods can be told apart."""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy
import pandas

from fedlm.results.cells import CELL, points
from fedlm.results.scene import Scene
from fedlm.results.statistics import Comparison, compare_tasks, groups, holm, interquartile_mean
from fedlm.results.typeset import Table, significant

REPEATED = (
    "Centralised training has all examples whatever the partition: where it was not run, its score on "
    "another partition of the task counts."
)
LEVEL = 0.05  # of the adjusted p below which two methods differ


class Family(NamedTuple):
    """The runs whose scores can be averaged: all scores in points, or one metric that is better if lower."""

    name: str  # "score", or the metric
    greater: bool
    scores: pandas.DataFrame  # (cell and seed) x method; NaN where a run is missing
    metrics: set[str]

    def cells(self, method: str | None = None) -> int:
        """Return the number of cells, or of those that a method has."""
        own = self.scores if method is None else self.scores[method].dropna()
        return own.groupby(level=CELL).ngroups

    def of(self, method: str) -> list[numpy.ndarray]:
        """Return the scores of a method: for each task that it has, (seeds, partitions)."""
        return _by_task(self.scores[method])

    def differences(self, method: str, other: str) -> list[numpy.ndarray]:
        """Return the first method's scores minus the second's: for each task, (seeds, partitions)."""
        return _by_task(self.scores[method] - self.scores[other])


def _by_task(scores: pandas.Series) -> list[numpy.ndarray]:
    """Divide scores by task: (seeds, partitions), NaN where one is missing."""
    tasks = scores.dropna().groupby(level="task", sort=False)
    return [own.unstack("partition").to_numpy() for _, own in tasks]


def families(runs: pandas.DataFrame) -> list[Family]:
    """Return the families of scores among the runs, that of points first.

    Centralised training has all examples whatever the partition: one that it was run on serves for all others
    of its task.
    """
    runs = on_all_partitions(runs)
    names = runs["metric"].where(~runs["greater_is_better"].astype(bool), "score")
    found = []
    for name in sorted(names.unique(), key=lambda name: (name != "score", name)):
        own, greater = runs[names == name], name == "score"
        scores = own.pivot(index=[*CELL, "seed"], columns="method", values="test_score")
        found.append(Family(name, greater, points(scores, greater), set(own["metric"])))
    return found


def on_all_partitions(runs: pandas.DataFrame) -> pandas.DataFrame:
    """Return the runs with those of centralised training once for each partition of their tasks."""
    schemes = dict(zip(runs["partition"], runs["scheme"], strict=True))
    centralised = runs["method_name"] == "centralized"
    copies = []
    for method, own in runs[centralised].groupby("method", observed=True):
        for task, partition in runs[CELL].drop_duplicates().itertuples(index=False):
            here = own[own["task"] == task]
            if len(here) and partition not in set(here["partition"]):
                first = here[here["partition"] == here["partition"].iloc[0]]
                copies.append(first.assign(partition=partition, scheme=schemes[partition], method=method))
    return pandas.concat([runs.astype(dict.fromkeys(CELL, object)), *copies], ignore_index=True)


def compare_all(family: Family, methods: Sequence[str]) -> dict[tuple[str, str], tuple[Comparison, float]]:
    """Return each pair's comparison over cells and seeds, and its p adjusted for all pairs (Holm)."""
    pairs = list(combinations(methods, 2))
    found = [compare_tasks(family.differences(*pair)) for pair in pairs]
    adjusted = holm([one.p for one in found])
    return {pair: (one, value) for pair, one, value in zip(pairs, found, adjusted, strict=True)}


def ranking_table(scene: Scene) -> Table:
    """Interquartile mean of all scores of a method with its interval, mean rank, and groups of equals.

    The column `best` of the numbers is true for the best competitor and those that cannot be told from it.
    """
    numbers: list[dict[str, Any]] = []
    cells, marks = [], []
    for family in families(scene.runs):
        every = family.cells()
        own = [method for method in scene.methods if method in family.scores]
        complete = {method for method in own if family.cells(method) == every}
        ranked = [method for method in own if method in complete and method not in scene.controls]
        estimates = {method: interquartile_mean(family.of(method)) for method in own}

        def order(method: str, values: dict = estimates, sign: int = -1 if family.greater else 1) -> float:
            return sign * values[method].value

        own.sort(key=lambda method: (method not in complete, order(method)))
        ranked.sort(key=order)
        compared = compare_all(family, ranked)
        different = [pair for pair, (_, p) in compared.items() if p < LEVEL]
        tested = any(math.isfinite(p) for _, p in compared.values())
        letters = groups(ranked, different) if tested else {}
        ranks = family.scores[ranked].dropna().rank(axis=1, ascending=not family.greater).mean()
        write = (lambda value: f"{value:.1f}") if family.greater else significant
        for method in own:
            estimate, scores = estimates[method], family.scores[method].dropna()
            runs = (scene.runs["method"] == method) & scene.runs["metric"].isin(family.metrics)
            group = letters.get(method, "")
            alike = method in letters and (method == ranked[0] or (ranked[0], method) not in different)
            numbers.append(
                {
                    "family": family.name,
                    "method": method,
                    "title": scene.titles[method],
                    "control": method in scene.controls,
                    "interquartile_mean": estimate.value,
                    "low": estimate.low,
                    "high": estimate.high,
                    "mean": scores.mean(),
                    "mean_rank": ranks.get(method, math.nan),
                    "group": group,
                    "best": alike,
                    "cells": family.cells(method),
                    "cells_of_all": every,
                    "runs": int(runs.sum()),
                }
            )
            known = math.isfinite(estimate.low)
            rank = numbers[-1]["mean_rank"]
            cells.append(
                {
                    "Measure": "score, points" if family.greater else f"{family.name}, lower is better",
                    "Method": scene.title(method),
                    "Interquartile mean": write(estimate.value),
                    "95% interval": f"{write(estimate.low)} to {write(estimate.high)}" if known else "–",
                    "Mean": write(numbers[-1]["mean"]),
                    "Mean rank": f"{rank:.2f}" if math.isfinite(rank) else "–",
                    "Group": group or "–",
                    "Cells": f"{numbers[-1]['cells']} of {every}",
                    "Runs": str(int(runs.sum())),
                }
            )
            # Where nothing can be told apart, no method is marked.
            marked = alike and bool(different)
            marks.append([marked and column == "Interquartile mean" for column in cells[-1]])
    notes = [
        "Over all cells (task × partition) of a method, in points (score times 100) where greater is "
        "better; the best first. The interval is a bootstrap over the seeds of each task, 2,000 draws, given "
        "where each task has four seeds; with five it is narrower than its name says (about 89%).",
        "Competitors that share a letter cannot be told apart: differences of means, paired by seed; t-test "
        "over tasks and seeds (a seed counts once for each task, whose partitions share its split), p "
        "adjusted for all pairs (Holm), level 0.05. A method whose seeds differ a lot shares more letters, "
        "so letters need not be in the order of the scores. They hold for these cells; with one seed there "
        "is nothing to test, and no letter. Bold: the best and what cannot be told apart from it, unless "
        "that is all. Mean rank: among the competitors with all cells, over the cells and seeds that all of "
        "them have. Methods with different cells cannot be compared.",
        *([REPEATED] if "centralized" in set(scene.runs["method_name"]) else []),
        *scene.notes(),
    ]
    columns = [
        *("Measure", "Method", "Interquartile mean", "95% interval", "Mean", "Mean rank", "Group"),
        *("Cells", "Runs"),
    ]
    return Table(
        "ranking",
        "Scores over all tasks and partitions",
        pandas.DataFrame(numbers),
        pandas.DataFrame(cells, columns=columns),
        numpy.array(marks, dtype=bool).reshape(len(marks), len(columns)),
        1,
        notes,
    )
