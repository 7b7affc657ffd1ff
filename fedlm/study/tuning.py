"""The settings that a method's trials try, drawn from the ranges that the method declares."""

from typing import Any

from scipy.stats import qmc

from fedlm.base.randomness import numpy_stream
from fedlm.federation.method import Method


def settings_of(kind: type[Method], trial: int) -> dict[str, Any]:
    """Return the searched settings of a trial, counted from 0.

    The points are a scrambled Halton sequence, which fills the space evenly however many are drawn. They
    depend on the method's name and nothing else, so that more trials only add points.
    """
    sampler = qmc.Halton(len(kind.search), scramble=True, rng=numpy_stream(0, "search", kind.name))
    point = sampler.random(trial + 1)[trial]
    return {
        key: place.at(float(position))
        for (key, place), position in zip(kind.search.items(), point, strict=True)
    }
