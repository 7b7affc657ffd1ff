"""Quality control: what to know before trusting the tables, each row with the rule that raised it."""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy
import pandas

from fedlm.results.cells import CELL
from fedlm.results.scene import Scene
from fedlm.results.typeset import Table, significant

LAST_PART = 0.75  # of the rounds: from there to the end a curve is to be flat
FLAT, OUTSIDE, FAR = 1.0, 1.0, 5.0  # points, or percent where lower is better
LARGEST_ERROR = 1.5  # points
LEARNT = 5.0  # points above the majority class, from which a tuning has found something
ABOVE_CHANCE = 3.0  # points above the majority class
LOWER_CONTROLS = ("majority", "head_only")
UPPER_CONTROL = "centralized"


class Finding(NamedTuple):
    """Something that a rule found: where, how much, and in words."""

    task: str
    partition: str
    method: str
    value: float
    text: str


class Rule(NamedTuple):
    """A rule, what it says, and what it found among how many."""

    name: str
    says: str
    checked: int
    found: list[Finding]


def distance(value: float, other: float, greater: bool) -> float:
    """Return how much better the first of two scores is: in points, or in percent where lower is better."""
    if greater:
        return (value - other) * 100
    return (other - value) / other * 100 if other else math.nan


def quality_table(
    scene: Scene,
    rounds: pandas.DataFrame,
    trials: pandas.DataFrame | None = None,
    choices: Sequence[dict[str, Any]] = (),
) -> Table:
    """All rules, each with what it found.

    `trials` and `choices` are those of a study with tuning; without them its rules are left out.
    """
    rules = [
        _missing(scene),
        _not_flat(scene, rounds),
        *_outside(scene),
        _far(scene),
        *_coarse(scene),
        _changed(scene),
        *([_at_edge(choices), *_learnt(scene, trials), _failed(trials)] if trials is not None else []),
    ]
    numbers, cells = [], []
    for rule in rules:
        for one in rule.found or [Finding("", "", "", math.nan, f"holds for all {rule.checked}")]:
            raised = bool(rule.found)
            about = {"rule": rule.name, "says": rule.says, "checked": rule.checked, "raised": raised}
            numbers.append({**about, **one._asdict()})
            method = scene.title(one.method) if one.method in scene.titles else one.method
            cells.append([rule.name, one.task or "–", one.partition or "–", method or "–", one.text])
    columns = ["Rule", "Task", "Partition", "Method", "Found"]
    shown = pandas.DataFrame(cells, columns=columns)
    notes = [
        *(f"{rule.name}: {rule.says}" for rule in rules),
        "Points are scores times 100; where lower is better, differences are in percent of the score. "
        "Scores are means over seeds.",
        *scene.notes(),
    ]
    return Table(
        "quality",
        "Quality control",
        pandas.DataFrame(numbers),
        shown,
        numpy.zeros(shown.shape, dtype=bool),
        1,
        notes,
    )


def _cells(scene: Scene) -> Iterator[tuple[str, str, str, pandas.DataFrame, bool]]:
    """Yield task, partition, method, runs and whether greater is better, of each that has runs."""
    for task, partition, method, runs, _ in scene.cells():
        if len(runs):
            yield task, partition, method, runs, bool(runs["greater_is_better"].iloc[0])


def _missing(scene: Scene) -> Rule:
    by_cell: dict[tuple[str, str, str], list[int]] = {}
    for run in scene.absent:
        by_cell.setdefault(run[:3], []).append(run.seed)
    found = [
        Finding(
            *labels, float(len(seeds)), f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))} missing"
        )
        for labels, seeds in by_cell.items()
    ]
    says = "every run that the study asks for has a record."
    return Rule("complete", says, len(scene.expected) or len(scene.runs), found)


def _not_flat(scene: Scene, rounds: pandas.DataFrame) -> Rule:
    keys = [*CELL, "method"]
    scored = rounds[rounds["validation_score"].notna()].astype(dict.fromkeys(keys, object))
    curves = {
        labels: own.groupby("round")["validation_score"].mean()
        for labels, own in scored.merge(scene.runs[[*keys, "seed"]], on=[*keys, "seed"]).groupby(keys)
    }
    found, checked = [], 0
    for task, partition, method, _, greater in _cells(scene):
        checked += 1
        curve = curves.get((task, partition, method), pandas.Series(dtype=float))
        last = curve.index[-1] if len(curve) else 0
        # Round 0 is the untrained model.
        before = curve[(curve.index <= LAST_PART * last) & (curve.index > 0)]
        if before.empty or last < 4:
            found.append(Finding(task, partition, method, math.nan, "too few scored rounds to tell"))
            continue
        change = distance(curve.iloc[-1], before.iloc[-1], greater)
        if abs(change) > FLAT:
            verb = "gains" if change > 0 else "loses"
            text = f"{verb} {significant(abs(change))} points from round {before.index[-1]} to {last}"
            found.append(Finding(task, partition, method, change, text))
    says = (
        f"a mean validation curve changes by at most {FLAT:g} point over the last quarter of its rounds; "
        f"needs four "
        "rounds and a score before the last quarter."
    )
    return Rule("curve is flat", says, checked, found)


def _outside(scene: Scene) -> list[Rule]:
    """Compare each competitor with the controls of its cell, or else with those of its task."""
    names = dict(zip(scene.runs["method"], scene.runs["method_name"], strict=True))
    means = {
        (task, partition, method): (runs["test_score"].mean(), greater)
        for task, partition, method, runs, greater in _cells(scene)
    }

    def score_of(control: str, task: str, partition: str) -> float:
        own = {
            labels: value
            for labels, (value, _) in means.items()
            if labels[0] == task and names.get(labels[2]) == control
        }
        here = [value for labels, value in own.items() if labels[1] == partition]
        return float(numpy.mean(here or list(own.values()))) if own else math.nan

    below, above = [], []
    competitors = [labels for labels in means if labels[2] not in scene.controls]
    for task, partition, method in competitors:
        value, greater = means[task, partition, method]
        for control in LOWER_CONTROLS:
            gap = distance(value, score_of(control, task, partition), greater)
            if gap < -OUTSIDE:
                text = f"{significant(-gap)} points below {control}"
                below.append(Finding(task, partition, method, gap, text))
        gap = distance(value, score_of(UPPER_CONTROL, task, partition), greater)
        if gap > OUTSIDE:
            text = f"{significant(gap)} points above {UPPER_CONTROL}"
            above.append(Finding(task, partition, method, gap, text))
    rules = []
    have = set(names.values())
    lower = [control for control in LOWER_CONTROLS if control in have]
    if lower:
        says = (
            f"no competitor's test score is more than {OUTSIDE:g} point below that of {' or '.join(lower)}."
        )
        rules.append(Rule("above its controls", says, len(competitors), below))
    if "majority" in have:
        chance = [
            Finding(*labels, gap, _from_majority(gap))
            for labels in competitors
            for gap in [distance(means[labels][0], score_of("majority", *labels[:2]), means[labels][1])]
            if gap <= ABOVE_CHANCE
        ]
        says = f"every competitor's test score is more than {ABOVE_CHANCE:g} points above the majority class."
        rules.append(Rule("above chance", says, len(competitors), chance))
    if UPPER_CONTROL in have:
        says = f"no competitor's test score is more than {OUTSIDE:g} point above that of {UPPER_CONTROL}."
        rules.append(Rule("below its control", says, len(competitors), above))
    return rules


def _far(scene: Scene) -> Rule:
    found, checked = [], 0
    for task, partition, method, runs, greater in _cells(scene):
        checked += 1
        gap = distance(runs["validation_score"].mean(), runs["test_score"].mean(), greater)
        if abs(gap) > FAR:
            text = f"validation {significant(abs(gap))} points {'above' if gap > 0 else 'below'} test"
            found.append(Finding(task, partition, method, gap, text))
    says = f"validation and test score differ by at most {FAR:g} points."
    return Rule("validation near test", says, checked, found)


def _coarse(scene: Scene) -> list[Rule]:
    """Check the standard error of an accuracy on the test split; of other metrics it is not known."""
    found, checked = [], 0
    by_cell = dict(list(scene.runs.groupby(CELL, observed=True)))
    for task, partition in itertools.product(scene.tasks, scene.partitions):
        runs = by_cell.get((task, partition))
        if runs is None or set(runs["metric"]) != {"accuracy"} or runs["test_examples"].isna().any():
            continue
        checked += 1
        examples = int(runs["test_examples"].min())
        error = 50 / math.sqrt(examples)
        if error > LARGEST_ERROR:
            text = f"{examples} test examples: a standard error of up to {significant(error)} points"
            found.append(Finding(task, partition, "", error, text))
    says = (
        "the standard error of an accuracy on the test split, 50 / sqrt(n) points, is at most "
        f"{LARGEST_ERROR:g}."
    )
    return [Rule("test split is large", says, checked, found)] if checked else []


def _changed(scene: Scene) -> Rule:
    found = [
        Finding(
            task, partition, method, float(runs["dirty"].sum()), f"{runs['dirty'].sum()} of {len(runs)} runs"
        )
        for task, partition, method, runs, _ in _cells(scene)
        if runs["dirty"].any()
    ]
    return Rule(
        "committed code", "every record was made by code as it was committed.", len(scene.runs), found
    )


def _at_edge(choices: Sequence[dict[str, Any]]) -> Rule:
    found = [
        Finding(
            choice["task"],
            choice["partition"],
            choice["method"],
            float(len(choice["at_edge"])),
            "; ".join(
                f"{key} {json.dumps(choice['chosen'][key])} is the outermost tried"
                for key in choice["at_edge"]
            ),
        )
        for choice in choices
        if choice["at_edge"]
    ]
    says = "no setting that the tuning chose is the lowest or highest of those tried."
    return Rule("winner inside its space", says, len(choices), found)


def _from_majority(gap: float) -> str:
    return f"{significant(abs(gap))} points {'above' if gap >= 0 else 'below'} majority"


def _learnt(scene: Scene, trials: pandas.DataFrame) -> list[Rule]:
    """Check that the best trial of each tuning is better than chance; if not, there was nothing to choose."""
    majority = scene.runs[scene.runs["method_name"] == "majority"]
    by_cell = majority.groupby(CELL, observed=True)["validation_score"].mean().to_dict()
    finished = trials[(trials["status"] == "finished") & trials["greater_is_better"].astype(bool)]
    finished = finished[~finished["method"].isin(set(majority["method"]))]
    found, checked = [], 0
    for (task, partition, method), own in finished.groupby([*CELL, "method"], sort=False):
        if (task, partition) not in by_cell:
            continue
        checked += 1
        gap = distance(own["validation_score"].astype(float).max(), by_cell[task, partition], greater=True)
        if gap <= LEARNT:
            found.append(Finding(task, partition, method, gap, f"the best trial is {_from_majority(gap)}"))
    says = (
        f"the best trial's validation score is more than {LEARNT:g} points above that of the majority class; "
        "else the tuning has chosen among trials that learnt little or nothing."
    )
    return [Rule("tuning found something", says, checked, found)] if checked else []


def _failed(trials: pandas.DataFrame) -> Rule:
    found = []
    for (task, partition, method), own in trials.groupby([*CELL, "method"], sort=False):
        failed = own[own["status"] != "finished"]
        if len(failed):
            numbers = ", ".join(map(str, failed["trial"]))
            text = f"{len(failed)} of {len(own)}: trials {numbers}"
            found.append(Finding(task, partition, method, float(len(failed)), text))
    return Rule("trials finished", "no trial of the tuning failed.", len(trials), found)
