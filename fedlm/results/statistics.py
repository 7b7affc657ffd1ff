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
        The mean, with NaN as interval where a cell has fewer than four seeds: resampling two or three scores
        cannot show how much they vary.
    """
    cells = [numpy.asarray(cell, dtype=float) for cell in cells if len(cell)]
    value = float(scipy.stats.trim_mean(numpy.concatenate(cells), 0.25))
    if min(map(len, cells)) < LEAST_SEEDS:
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


def compare_cells(cells: Sequence[numpy.ndarray]) -> Comparison:
    """Compare two methods over several cells (task x partition), from paired differences within each.

    The difference is the mean over cells of a cell's mean difference. Its variance is that between the
    seeds of a cell, so it holds for these cells and says nothing about others. The t distribution has the
    degrees of freedom of Welch and Satterthwaite; with one cell this is `compare`.

    Args:
        cells: for each cell, the (pairs,) differences.

    Returns:
        The comparison; `n` counts all pairs. Interval and p are NaN if a cell has fewer than two pairs, or
        if no cell has any spread.
    """
    cells = [numpy.asarray(cell, dtype=float) for cell in cells]
    n = sum(map(len, cells))
    if not n:
        return Comparison(0, numpy.nan, numpy.nan, numpy.nan, numpy.nan)
    value = float(numpy.mean([cell.mean() for cell in cells if len(cell)]))
    unknown = Comparison(n, value, numpy.nan, numpy.nan, numpy.nan)
    if min(map(len, cells)) < 2:
        return unknown
    largest = max(1.0, *(numpy.abs(cell).max() for cell in cells))
    if max(map(numpy.ptp, cells)) <= 1e-12 * largest:
        return unknown
    variances = numpy.array([cell.var(ddof=1) / len(cell) for cell in cells])
    freedom = variances.sum() ** 2 / sum(
        variance**2 / (len(cell) - 1) for variance, cell in zip(variances, cells, strict=True)
    )
    error = math.sqrt(variances.sum()) / len(cells)
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
