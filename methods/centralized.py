"""Centralised training: one client holds all examples; the upper bound for a federation."""

import numpy

from fedlm.federation.method import Method


class Centralized(Method):
    """FedAvg with a single client that holds every training example of the partition."""

    title = "Centralised"
    reference = "control"
    control = True

    def population(self, parts: list[numpy.ndarray]) -> list[numpy.ndarray]:
        return [numpy.sort(numpy.concatenate(parts))]
