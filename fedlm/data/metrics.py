"""The metrics, by the kind of task and the metric's name.

All scores are shares or correlations, from 0 to 1 or -1 to 1, except perplexity. SQuAD's official script
and most papers print them times 100. `fedlm.data.evaluate_metrics` has each as a class of Hugging Face's
library `evaluate`; a run computes them here, since importing that library takes seconds.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        description: one sentence on what the number is.
        value: computes it from predictions and references, one of each per example.
        predictions: what one prediction is.
        references: what one reference is; `texts` are the correct answers, none where there is no answer.
        greater_is_better: whether a greater value is a better one.
    """

    description: str
    value: Callable[[Sequence[Any], Sequence[Any]], float]
    predictions: Literal["class", "count", "number", "text"]
    references: Literal["class", "count", "number", "texts"]
    greater_is_better: bool = True


# scikit-learn and scipy are imported where they are used: most callers need only the names.


def _accuracy(predictions: Sequence, references: Sequence) -> float:
    from sklearn.metrics import accuracy_score

    return accuracy_score(references, predictions)


def _macro_f1(predictions: Sequence, references: Sequence) -> float:
    from sklearn.metrics import f1_score

    return f1_score(references, predictions, average="macro", zero_division=0)


def _f1(predictions: Sequence, references: Sequence) -> float:
    from sklearn.metrics import f1_score

    return f1_score(references, predictions, zero_division=0)


def _matthews(predictions: Sequence, references: Sequence) -> float:
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(references, predictions)


def _pearson(predictions: Sequence, references: Sequence) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, references)


def _spearman(predictions: Sequence, references: Sequence) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, references)


def _correlation(function: Callable[..., Any], predictions: Sequence, references: Sequence) -> float:
    import numpy

    # A model that predicts the same number for all examples has no correlation: 0, not "not a number".
    if len(predictions) < 2 or numpy.ptp(predictions) == 0 or numpy.ptp(references) == 0:
        return 0.0
    return numpy.nan_to_num(function(predictions, references).statistic)


def _perplexity(predictions: Sequence, references: Sequence) -> float:
    # A diverged model has a loss beyond the range of exp; a large finite number shows that as well.
    return math.exp(min(math.fsum(predictions) / sum(references), 700.0))


def _all_right(predictions: Sequence, references: Sequence) -> float:
    equal = [prediction == reference for prediction, reference in zip(predictions, references, strict=True)]
    return sum(equal) / len(equal)


def _best_of_answers(match: Callable[[str, str], float]) -> Callable[[Sequence, Sequence], float]:
    def value(predictions: Sequence, references: Sequence) -> float:
        best = [
            max(match(prediction, answer) for answer in answers or [""])
            for prediction, answers in zip(predictions, references, strict=True)
        ]
        return math.fsum(best) / len(best)

    return value


def _same_answer(prediction: str, answer: str) -> float:
    return float(normalise(prediction) == normalise(answer))


def _shared_words(prediction: str, answer: str) -> float:
    predicted, right = normalise(prediction).split(), normalise(answer).split()
    if not predicted or not right:
        return float(predicted == right)
    shared = (Counter(predicted) & Counter(right)).total()
    return 2 * shared / (len(predicted) + len(right))


def normalise(answer: str) -> str:
    """Return an answer as SQuAD compares it: lower case, no punctuation, no articles, single spaces."""
    text = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


METRICS: dict[str, dict[str, Metric]] = {
    "classification": {
        "accuracy": Metric(
            "Share of examples whose predicted class is correct.", _accuracy, "class", "class"
        ),
        "macro_f1": Metric(
            "Unweighted mean of the F1 of each class that occurs in predictions or references.",
            _macro_f1,
            "class",
            "class",
        ),
        "f1": Metric("F1 of class 1 of two (GLUE: MRPC, QQP).", _f1, "class", "class"),
        "matthews": Metric(
            "Matthews correlation coefficient (GLUE: CoLA); 0 where it is undefined.",
            _matthews,
            "class",
            "class",
        ),
    },
    "regression": {
        "pearson": Metric(
            "Pearson correlation (GLUE: STS-B); 0 where it is undefined.", _pearson, "number", "number"
        ),
        "spearman": Metric(
            "Spearman rank correlation (GLUE: STS-B); 0 where it is undefined.", _spearman, "number", "number"
        ),
    },
    "causal": {
        # Predictions: summed negative log-likelihood of an example's target tokens; references: their number.
        "perplexity": Metric(
            "exp of the mean negative log-likelihood of all target tokens.",
            _perplexity,
            "number",
            "count",
            greater_is_better=False,
        ),
        # Predictions: target tokens of an example that are the arg max; references: its target tokens.
        "exact_match": Metric(
            "Share of examples whose every target token is the arg max, given the tokens before it.",
            _all_right,
            "count",
            "count",
        ),
    },
    "question_answering": {
        "f1": Metric(
            "SQuAD's F1 of the words shared with the closest correct answer, averaged over examples.",
            _best_of_answers(_shared_words),
            "text",
            "texts",
        ),
        "exact_match": Metric(
            "SQuAD's EM: share of answers equal to a correct one after `normalise`.",
            _best_of_answers(_same_answer),
            "text",
            "texts",
        ),
    },
}


def names(kind: str) -> list[str]:
    """Return the metrics that tasks of a kind may name, besides "loss"."""
    return list(METRICS[kind])


def greater_is_better(kind: str, name: str) -> bool:
    """Return whether a greater value of the metric is a better one."""
    return name != "loss" and METRICS[kind][name].greater_is_better


def compute(kind: str, name: str, predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Return a metric's value; its `Metric` describes `predictions` and `references`."""
    return float(METRICS[kind][name].value(predictions, references))
