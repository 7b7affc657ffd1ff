"""The table of differences between methods, paired by seed."""

import math

import numpy
import pandas

from fedlm.results.cells import points, task_texts
from fedlm.results.scene import Scene
from fedlm.results.statistics import adjust, compare
from fedlm.results.typeset import Table


def paired_table(scene: Scene) -> Table:
    """Every method compared with FedAvg on the same seeds: paired t-test for each task x partition.

    A study without FedAvg compares with its first competitor.
    """
    runs = scene.runs
    names = dict(zip(runs["method"], runs["method_name"], strict=True))
    candidates = [method for method in scene.methods if names.get(method) == "fedavg"]
    candidates += [method for method in scene.methods if method not in scene.controls]
    against = (candidates or [*scene.methods, ""])[0]
    found, too_few = [], 0
    texts = task_texts(scene)
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
    # Controls differ for sure; counted among the tests they would make the others' p smaller.
    competes = [method not in scene.controls for _, _, method, _, _ in found]
    adjusted = adjust(
        [result.p if own else math.nan for own, (*_, result) in zip(competes, found, strict=True)]
    )
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
    gap = any(not math.isfinite(result.p) for *_, result in found)
    name = scene.titles.get(against, against)
    notes = [
        f"Test score of the method minus that of {name} on the same seed (same split, same clients, same new "
        "head); n pairs, two-sided paired t-test. p adjusted is for the number of competitors' rows "
        "(Benjamini and Hochberg); controls have none. With few seeds only large differences can be "
        "distinguished from chance.",
        *(["–: not defined, since the difference is the same in all pairs."] if gap else []),
        *([f"Comparisons left out, with fewer than two pairs: {too_few}."] if too_few else []),
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
