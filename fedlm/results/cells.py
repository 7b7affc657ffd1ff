"""The cells of a study's tables: scores in points, means with deviations, names of metrics."""

import math

import numpy
import pandas

from fedlm.results.scene import Scene
from fedlm.results.typeset import spread

CELL = ["task", "partition"]
CORRELATIONS = ("pearson", "spearman", "matthews")


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


def test_variance(runs: pandas.DataFrame) -> float:
    """Return the variance, in points², that a cell's score has because only some examples were tested.

    The records do not say which examples a method had right, so methods are taken as tested independently,
    which makes the variance of a difference too large rather than too small. How much scores differ between
    seeds is another matter. With n test examples a share p varies by p (1 - p) / n, the variance of the
    binomial distribution, which also bounds that of a mean of values from 0 to 1; a correlation r by (1 -
    r²)² / n.

    Returns:
        NaN for losses and perplexities, and where n is not known: a mean loss alone does not say how it
        varies.
    """
    if runs.empty or not runs["greater_is_better"].iloc[0] or runs["test_examples"].isna().any():
        return math.nan
    n, score = runs["test_examples"].min(), float(runs["test_score"].mean())
    if runs["metric"].iloc[0] in CORRELATIONS:
        return 1e4 * (1 - score**2) ** 2 / n
    return 1e4 * score * (1 - score) / n


def stands_out(scores: numpy.ndarray, variances: numpy.ndarray) -> bool:
    """Return whether the least of several scores is below the next by more than the test split leaves open.

    That is the standard error of their difference, the root of the sum of the two `variances`
    (`test_variance`). Where a variance is not known (NaN), the least score counts.
    """
    first, second = numpy.argsort(scores, kind="stable")[:2]
    error = math.sqrt(variances[first] + variances[second])
    return math.isnan(error) or bool(scores[second] - scores[first] > error)


def shown_mean(text: str) -> float:
    """Return the mean as a cell shows it, so that scores that look equal rank equally."""
    try:
        return float(text.split(" ")[0].replace(",", ""))
    except ValueError:
        return math.nan
