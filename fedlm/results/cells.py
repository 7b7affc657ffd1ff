"""The cells of a study's tables: scores in points, means with deviations, names of metrics."""

import math

import numpy
import pandas

from fedlm.results.scene import Scene
from fedlm.results.typeset import spread

CELL = ["task", "partition"]


def points(values: pandas.Series, greater_is_better: bool) -> pandas.Series:
    """Return scores in points (times 100); perplexities and losses stay as they are."""
    return values * 100 if greater_is_better else values


def score_text(runs: pandas.DataFrame) -> str:
    """Return mean and deviation of the test scores of a cell's runs."""
    if runs.empty:
        return "missing"
    greater = bool(runs["greater_is_better"].iloc[0])
    return spread(points(runs["test_score"], greater), 1 if greater else None)


def metric_text(runs: pandas.DataFrame) -> str:
    """Return the name of the metric of a task's runs, with its unit."""
    metric = runs["metric"].iloc[0]
    name = metric.replace("_", " ")
    if not runs["greater_is_better"].iloc[0]:
        return f"{name}, lower is better"
    return f"{name}, %" if metric in ("accuracy", "f1", "macro_f1", "exact_match") else f"{name} × 100"


def task_texts(scene: Scene) -> dict[str, str]:
    """Return each task's name in tables: its label, and the metric of its runs."""
    return {
        task: f"{task} ({metric_text(runs)})" if len(runs) else task
        for task in scene.tasks
        for runs in [scene.runs[scene.runs["task"] == task]]
    }


def mean_and_deviation(name: str, values: numpy.ndarray) -> dict[str, float]:
    """Return `<name>_mean` and `<name>_sd` of the values that are not NaN."""
    values = values[~numpy.isnan(values)]
    return {
        f"{name}_mean": float(values.mean()) if len(values) else math.nan,
        f"{name}_sd": float(values.std(ddof=1)) if len(values) > 1 else math.nan,
    }


def shown_mean(text: str) -> float:
    """Return the mean as a cell shows it, so that scores that look equal rank equally."""
    try:
        return float(text.split(" ")[0].replace(",", ""))
    except ValueError:
        return math.nan
