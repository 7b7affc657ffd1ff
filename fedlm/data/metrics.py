"""The metrics, as `evaluate.Metric` classes of our own: none is loaded from a hub.

All scores are shares or correlations, from 0 to 1 or -1 to 1, except perplexity. SQuAD's official script
and most papers print them times 100.
"""

import math
import re
import string
from collections import Counter

import datasets
import evaluate
import numpy
import scipy.stats
import sklearn.metrics


class _Metric(evaluate.Metric):
    """A metric without a cache file, so that many processes can compute at once."""

    inputs: dict
    description: str
    greater_is_better = True

    def __init__(self):
        super().__init__(keep_in_memory=True)

    def _info(self):
        return evaluate.MetricInfo(
            description=self.description, citation="", features=datasets.Features(self.inputs)
        )

    def _compute(self, predictions, references):
        return {self.name: float(self.value(predictions, references))}


class _OfClasses(_Metric):
    inputs = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}


class Accuracy(_OfClasses):
    description = "Share of examples whose predicted class is right."

    def value(self, predictions, references):
        return sklearn.metrics.accuracy_score(references, predictions)


class MacroF1(_OfClasses):
    description = "F1 of each class that occurs in predictions or references, unweighted mean."

    def value(self, predictions, references):
        return sklearn.metrics.f1_score(references, predictions, average="macro", zero_division=0)


class F1(_OfClasses):
    description = "F1 of class 1 of two (GLUE: MRPC, QQP)."

    def value(self, predictions, references):
        return sklearn.metrics.f1_score(references, predictions, zero_division=0)


class Matthews(_OfClasses):
    description = "Matthews correlation coefficient (GLUE: CoLA); 0 where it is undefined."

    def value(self, predictions, references):
        return sklearn.metrics.matthews_corrcoef(references, predictions)


class _OfNumbers(_Metric):
    inputs = {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}

    def value(self, predictions, references):
        # A model that says the same number for all has no correlation: 0, not "not a number".
        if len(predictions) < 2 or numpy.ptp(predictions) == 0 or numpy.ptp(references) == 0:
            return 0.0
        return numpy.nan_to_num(self.correlation(predictions, references))


class Pearson(_OfNumbers):
    description = "Pearson correlation (GLUE: STS-B); 0 where it is undefined."

    def correlation(self, predictions, references):
        return scipy.stats.pearsonr(predictions, references).statistic


class Spearman(_OfNumbers):
    description = "Spearman rank correlation (GLUE: STS-B); 0 where it is undefined."

    def correlation(self, predictions, references):
        return scipy.stats.spearmanr(predictions, references).statistic


class Perplexity(_Metric):
    """Predictions: summed negative log-likelihood of an example's target tokens; references: their number."""

    description = "exp of the mean negative log-likelihood of all target tokens."
    inputs = {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
    greater_is_better = False

    def value(self, predictions, references):
        # A diverged model has a loss beyond the range of exp; a large finite number says so as well.
        return math.exp(min(math.fsum(predictions) / sum(references), 700.0))


class TargetExactMatch(_OfClasses):
    """Predictions: target tokens of an example that are the arg max; references: its target tokens."""

    description = "Share of examples whose every target token is the arg max, given the tokens before it."

    def value(self, predictions, references):
        return numpy.mean(numpy.equal(predictions, references))


class _OfAnswers(_Metric):
    """Predictions: one text each; references: the list of right answers (empty list: there is none)."""

    inputs = {"predictions": datasets.Value("string"), "references": [datasets.Value("string")]}

    def value(self, predictions, references):
        best = [
            max(self.match(prediction, answer) for answer in answers or [""])
            for prediction, answers in zip(predictions, references, strict=True)
        ]
        return math.fsum(best) / len(best)


class AnswerExactMatch(_OfAnswers):
    description = "SQuAD's EM: share of answers equal to a right one after `normalise`."

    def match(self, prediction, answer):
        return float(normalise(prediction) == normalise(answer))


class AnswerF1(_OfAnswers):
    description = "SQuAD's F1: of the words shared with the best of the right answers, mean over examples."

    def match(self, prediction, answer):
        predicted, right = normalise(prediction).split(), normalise(answer).split()
        if not predicted or not right:
            return float(predicted == right)
        shared = (Counter(predicted) & Counter(right)).total()
        return 2 * shared / (len(predicted) + len(right))


def normalise(answer: str) -> str:
    """Return an answer as SQuAD compares it: lower case, no punctuation, no articles, single spaces."""
    text = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


_BY_KIND = {
    "classification": {"accuracy": Accuracy, "macro_f1": MacroF1, "f1": F1, "matthews": Matthews},
    "regression": {"pearson": Pearson, "spearman": Spearman},
    "causal": {"perplexity": Perplexity, "exact_match": TargetExactMatch},
    "question_answering": {"f1": AnswerF1, "exact_match": AnswerExactMatch},
}


def names(kind: str) -> list[str]:
    """Return the metrics that tasks of a kind may name, besides "loss"."""
    return list(_BY_KIND[kind])


def greater_is_better(kind: str, name: str) -> bool:
    """Return whether a greater value of the metric is a better one."""
    return name != "loss" and _BY_KIND[kind][name].greater_is_better


def compute(kind: str, name: str, predictions, references) -> float:
    """Return a metric's value; what `predictions` and `references` hold is said by its class."""
    metric = _BY_KIND[kind][name]()
    return metric.compute(predictions=predictions, references=references)[metric.name]
