"""Scores of a run's models: the server's, those that clients keep, and others that a method names."""

import math
from collections.abc import Mapping

import numpy
import torch
from torch import Tensor

from fedlm.base.errors import DivergedRun
from fedlm.data.prepared import Prepared
from fedlm.federation.rounds import Rounds
from fedlm.federation.scoring import score
from fedlm.federation.stored import Kept


class Scorer:
    """Scores the models of a run's method on examples of `data`.

    Raises DivergedRun when a score is not finite.
    """

    def __init__(self, run: Rounds, data: Prepared) -> None:
        self.run, self.data, self.method = run, data, run.method
        # By split (its examples), the scores of the models that clients keep, by version.
        self._known: dict[bytes, dict[str, dict[str, float]]] = {}

    def score(self, indices: numpy.ndarray) -> dict[str, float]:
        """Return the metrics of the server's model (the mean over models, where a method has several).

        A model that a client keeps has been scored before where it did not change since.
        """
        before = self._known.pop(split := indices.tobytes(), {})
        found, kept = [], {}
        for values in self.method.models(self.run.server):
            version = values.version() if isinstance(values, Kept) else None
            scores = before.get(version or "") or self.of_model(values, indices)
            found.append(scores)
            if version:
                kept[version] = scores
        self._known[split] = kept
        means = {name: sum(one[name] for one in found) / len(found) for name in found[0]}
        for name, value in means.items():
            self._require_finite(f"the {name} of the server's model", value)
        return means

    def further(self, indices: numpy.ndarray) -> dict[str, float]:
        """Return the mean metric of the models that the method has scored besides, by name."""
        found = {}
        for name, models in self.method.further(self.run.server).items():
            scores = [self.of_model(values, indices)[self.data.metric] for values in models]
            found[name] = sum(scores) / len(scores)
            self._require_finite(name, found[name])
        return found

    def of_model(self, values: Mapping[str, Tensor], indices: numpy.ndarray) -> dict[str, float]:
        """Return the metrics of one model, given its exchanged parameters."""
        run, training = self.run, self.run.training
        run.load({name: values[name] for name in self.method.exchanged})
        autocast = training.autocast and getattr(torch, training.autocast)
        with self.method.answering(run.model, run.server):
            return score(run.model, self.data, indices, training.scoring_batch_size, run.device, autocast)

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise DivergedRun(f"method {self.method.name}: {what} is {value}")
