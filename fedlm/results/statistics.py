"""The statistics of the tables: aggregate scores with their uncertainty, and paired comparisons."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy
import scipy.stats

from fedlm.base.randomness import numpy_stream

RESAMPLES = 2_000


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


def interquartile_mean(cells: Sequence[numpy.ndarray], resamples: int = RESAMPLES) -> Interval:
    """Return the interquartile mean of all scores, with a 95% stratified bootstrap interval.

    The mean is over the middle half of all scores of all cells. The bootstrap draws seeds with replacement
    within each cell (task x partition), so that it reflects the variation between seeds, not between tasks
    (Agarwal et al. 2021, arXiv:2108.13264). Its draws come from a named stream: the same scores give the same
    interval.

    Args:
        cells: for each cell, the (seeds,) scores.
        resamples: bootstrap draws.

    Returns:
        The mean, with NaN as interval where no cell has two seeds.
    """
    cells = [numpy.asarray(cell, dtype=float) for cell in cells if len(cell)]
    value = float(scipy.stats.trim_mean(numpy.concatenate(cells), 0.25))
    if max(map(len, cells)) < 2:
        return Interval(value, numpy.nan, numpy.nan)
    stream = numpy_stream(0, "bootstrap")
    draws = [cell[stream.integers(0, len(cell), (resamples, len(cell)))] for cell in cells]
    means = scipy.stats.trim_mean(numpy.concatenate(draws, axis=1), 0.25, axis=1)
    low, high = numpy.quantile(means, [0.025, 0.975])
    return Interval(value, float(low), float(high))


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


def adjust(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for multiple tests (Benjamini and Hochberg); NaN stays NaN."""
    values = numpy.asarray(p_values, dtype=float)
    adjusted = numpy.full(len(values), numpy.nan)
    known = ~numpy.isnan(values)
    if known.any():
        adjusted[known] = scipy.stats.false_discovery_control(values[known])
    return adjusted.tolist()
