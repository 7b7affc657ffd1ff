"""The metrics as modules of Hugging Face's library `evaluate`, for external code that uses those.

They use the same functions as a run. None is loaded from a hub. Nothing here imports this
module, since importing `evaluate` takes seconds.
"""

from typing import Any

import datasets
import evaluate

from fedlm.data.metrics import METRICS

_FEATURES = {
    "class": datasets.Value("int64"),
    "count": datasets.Value("int64"),
    "number": datasets.Value("float64"),
    "text": datasets.Value("string"),
    "texts": [datasets.Value("string")],
}


class Metric(evaluate.Metric):
    """One of our metrics. It has no cache file, so that several processes can compute at once."""

    def __init__(self, kind: str, name: str) -> None:
        self._metric, self._key = METRICS[kind][name], name
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        inputs = {
            "predictions": _FEATURES[self._metric.predictions],
            "references": _FEATURES[self._metric.references],
        }
        return evaluate.MetricInfo(
            description=self._metric.description, citation="", features=datasets.Features(inputs)
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {self._key: float(self._metric.value(predictions, references))}


def load(kind: str, name: str) -> Metric:
    """Return a metric of a kind of task; raises KeyError for one that `fedlm.data.metrics` does not have."""
    return Metric(kind, name)
