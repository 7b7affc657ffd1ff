"""The statistics of the tables: aggregate scores with their uncertainty, and paired comparisons."""

import math
from collections.abc import Collection, Sequence
from itertools import combinations
from typing import NamedTuple

import networkx
import numpy
import scipy.special
import scipy.stats

from fedlm.base.randomness import numpy_stream

RESAMPLES = 2_000
LEAST_SEEDS = 4  # with fewer, a bootstrap over seeds gives intervals that are far too narrow


class Interval(NamedTuple):
    """An estimate with its confidence interval."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """A paired comparison: n pairs, mean difference, its 95% confidence interval, and p of a paired t-test.

    Interval and p are NaN if all differences are the same, since there is no spread then.
    """

    n: int
    difference: float
    low: float
    high: float
    p: float


def interquartile_mean(tasks: Sequence[numpy.ndarray], resamples: int = RESAMPLES) -> Interval:
    """Return the interquartile mean of all scores, with a nominal 95% stratified bootstrap interval.

    The mean is over the middle half of all scores of all tasks. The bootstrap draws seeds with replacement
    within each task, whose partitions share the seed's split of the data; so it reflects the variation
    between seeds, not between tasks (Agarwal et al. 2021, arXiv:2108.13264). With five seeds it covers the
    true value less often than its name says, about 89 times in 100. Its draws come from a named stream: the
    same scores give the same interval.

    Args:
        tasks: for each task, the (seeds, partitions) scores, NaN where one is missing.
        resamples: bootstrap draws.

    Returns:
        The mean, with NaN as interval where fewer than four seeds have all scores of a task: resampling two
        or three scores cannot show how much they vary.
    """
    tasks = [numpy.asarray(task, dtype=float) for task in tasks if task.size]
    every = numpy.concatenate([task.ravel() for task in tasks])
    value = float(scipy.stats.trim_mean(every[~numpy.isnan(every)], 0.25))
    tasks = [_complete(task) for task in tasks]
    if min(map(len, tasks)) < LEAST_SEEDS:
        return Interval(value, numpy.nan, numpy.nan)
    stream = numpy_stream(0, "bootstrap")
    draws = [
        task[stream.integers(0, len(task), (resamples, len(task)))].reshape(resamples, -1) for task in tasks
    ]
    means = scipy.stats.trim_mean(numpy.concatenate(draws, axis=1), 0.25, axis=1)
    low, high = numpy.quantile(means, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def _complete(task: numpy.ndarray) -> numpy.ndarray:
    """Return the seeds (rows) that have all scores."""
    return task[~numpy.isnan(task).any(axis=1)]


def compare(ours: numpy.ndarray, theirs: numpy.ndarray) -> Comparison:
    """Compare two methods on the same seeds by a paired t-test; needs at least two pairs.

    Wilcoxon's test is not used: with five pairs it cannot fall below p = 0.0625.
    """
    differences = numpy.asarray(ours, dtype=float) - numpy.asarray(theirs, dtype=float)
    n, mean = len(differences), float(differences.mean())
    # Equal differences have a spread of rounding errors only.
    if numpy.ptp(differences) <= 1e-12 * max(1.0, numpy.abs(differences).max()):
        return Comparison(n, mean, numpy.nan, numpy.nan, numpy.nan)
    test = scipy.stats.ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(0.95)
    return Comparison(n, mean, float(interval.low), float(interval.high), float(test.pvalue))


def compare_tasks(tasks: Sequence[numpy.ndarray]) -> Comparison:
    """Compare two methods over several cells (task x partition), from paired differences.

    The difference is the mean over cells of a cell's mean difference. Its variance is that between the
    seeds of a task, so it holds for these cells and says nothing about others. A seed counts once for each
    task, with its mean over the task's partitions, since it decides how the data of all of them are split.
    The t distribution has the degrees of freedom of Welch and Satterthwaite; with one cell this is `compare`.

    Args:
        tasks: for each task, the (seeds, partitions) differences, NaN where one is missing. Only seeds count
            that have all.

    Returns:
        The comparison; `n` counts all pairs. Interval and p are NaN if a task has fewer than two seeds, or
        if no task has any spread.
    """
    tasks = [_complete(numpy.asarray(task, dtype=float)) for task in tasks]
    n = sum(task.size for task in tasks)
    if not n:
        return Comparison(0, numpy.nan, numpy.nan, numpy.nan, numpy.nan)
    least = min(map(len, tasks))
    tasks = [task for task in tasks if task.size]
    shares = numpy.array([task.shape[1] for task in tasks]) / sum(task.shape[1] for task in tasks)
    seeds = [task.mean(axis=1) for task in tasks]
    value = float(sum(share * one.mean() for share, one in zip(shares, seeds, strict=True)))
    unknown = Comparison(n, value, numpy.nan, numpy.nan, numpy.nan)
    if least < 2:
        return unknown
    largest = max(1.0, *(numpy.abs(one).max() for one in seeds))
    if max(map(numpy.ptp, seeds)) <= 1e-12 * largest:
        return unknown
    variances = shares**2 * numpy.array([one.var(ddof=1) / len(one) for one in seeds])
    freedom = variances.sum() ** 2 / sum(
        variance**2 / (len(one) - 1) for variance, one in zip(variances, seeds, strict=True)
    )
    error = math.sqrt(variances.sum())
    low, high = scipy.stats.t.interval(0.95, freedom, loc=value, scale=error)
    p = 2 * scipy.stats.t.sf(abs(value) / error, freedom)
    return Comparison(n, value, float(low), float(high), float(p))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted so that the chance of any false difference stays below the level (Holm 1979).

    NaN stays NaN and does not count as a test.
    """
    values = numpy.asarray(p_values, dtype=float)
    adjusted = numpy.full(len(values), numpy.nan)
    known = numpy.flatnonzero(~numpy.isnan(values))
    order = known[numpy.argsort(values[known], kind="stable")]
    factors = numpy.arange(len(order), 0, -1)
    adjusted[order] = numpy.minimum(1.0, numpy.maximum.accumulate(values[order] * factors))
    return adjusted.tolist()


def groups(names: Sequence[str], different: Collection[tuple[str, str]]) -> dict[str, str]:
    """Return letters for each name, so that two names share a letter unless they are different.

    Args:
        names: in their order, which is that of the letters.
        different: pairs of names that can be told apart, in either order.

    The groups are the largest sets of names none of which differ (a compact letter display; Piepho 2004,
    doi:10.1198/1061860043515).
    """
    apart = {frozenset(pair) for pair in different}
    graph = networkx.Graph()
    graph.add_nodes_from(names)
    graph.add_edges_from(pair for pair in combinations(names, 2) if frozenset(pair) not in apart)
    places = {name: place for place, name in enumerate(names)}
    found = sorted(sorted(places[name] for name in group) for group in networkx.find_cliques(graph))
    letters = [_letter(number) for number in range(len(found))]
    return {
        name: "".join(letter for letter, group in zip(letters, found, strict=True) if places[name] in group)
        for name in names
    }


def _letter(number: int) -> str:
    """Return a to z, then a2 to z2, and so on."""
    turn, place = divmod(number, 26)
    return chr(ord("a") + place) + (str(turn + 1) if turn else "")


def expected_best(scores: Sequence[float]) -> list[float]:
    """Return the expected best of n scores drawn without replacement, for n from 1 to their number.

    It is exact: the i-th smallest of N scores is the best of n with probability C(i-1, n-1) / C(N, n) (the
    unbiased form of Dodge et al. 2019, arXiv:1909.03004, given by Tang et al. 2020, arXiv:2004.13705).
    """
    values, count = sorted(map(float, scores)), len(scores)
    # Exact sums: BLAS's differ by processor in their last digits, and tables are compared by their bytes.
    return [
        math.fsum(math.comb(rank, n - 1) * value for rank, value in enumerate(values)) / math.comb(count, n)
        for n in range(1, count + 1)
    ]


def adjust(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for multiple tests (Benjamini and Hochberg); NaN stays NaN."""
    values = numpy.asarray(p_values, dtype=float)
    adjusted = numpy.full(len(values), numpy.nan)
    known = ~numpy.isnan(values)
    if known.any():
        adjusted[known] = scipy.stats.false_discovery_control(values[known])
    return adjusted.tolist()
