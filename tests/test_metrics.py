"""Metrics equal scikit-learn, scipy and SQuAD's definition, and load nothing from a hub."""

import math

import evaluate
import numpy
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlm.data import evaluate_metrics, metrics

classes = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=40)
binary = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=40)
numbers = st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=3, max_size=40)


@given(classes)
@settings(max_examples=25)
def test_class_metrics_equal_scikit_learn(pairs):
    predictions, references = zip(*pairs, strict=True)
    expected = {
        "accuracy": numpy.mean(numpy.equal(predictions, references)),
        "macro_f1": sklearn.metrics.f1_score(references, predictions, average="macro", zero_division=0),
        "matthews": sklearn.metrics.matthews_corrcoef(references, predictions),
    }
    for name, value in expected.items():
        assert metrics.compute("classification", name, predictions, references) == pytest.approx(value)


@given(binary)
@settings(max_examples=25)
def test_f1_counts_class_one(pairs):
    predictions, references = map(numpy.array, zip(*pairs, strict=True))
    hits = int((predictions & references).sum())
    total = int(predictions.sum() + references.sum())
    value = metrics.compute("classification", "f1", predictions, references)
    assert value == pytest.approx(2 * hits / total if total else 0)


@given(numbers)
@settings(max_examples=25)
def test_correlations_equal_scipy_and_are_zero_where_undefined(pairs):
    predictions, references = map(list, zip(*pairs, strict=True))
    constant = len(set(predictions)) == 1 or len(set(references)) == 1
    for name, function in {"pearson": scipy.stats.pearsonr, "spearman": scipy.stats.spearmanr}.items():
        value = metrics.compute("regression", name, predictions, references)
        expected = 0 if constant else function(predictions, references).statistic
        assert value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "answers", "exact_match", "f1"),
    [
        ("the Eiffel Tower", ["Eiffel Tower!"], 1, 1),  # articles, punctuation and case do not count
        ("Denver Broncos won", ["Denver Broncos"], 0, 4 / 5),  # precision 2/3, recall 1
        ("in 1066", ["1066", "October 1066 AD"], 0, 2 / 3),  # the best of the answers counts
        ("blue blue", ["blue"], 0, 2 / 3),  # a word counts as often as it occurs
        ("red", ["blue"], 0, 0),
        ("", ["blue"], 0, 0),
        ("", [], 1, 1),  # no answer was right
        ("blue", [], 0, 0),
        ("the", ["a"], 1, 1),  # nothing left of both
        ("U.S.A.", ["usa"], 1, 1),
        ("another", ["other"], 0, 0),  # "an" inside a word is no article
    ],
)
def test_answers_as_squad_counts_them(prediction, answers, exact_match, f1):
    assert metrics.compute("question_answering", "exact_match", [prediction], [answers]) == exact_match
    assert metrics.compute("question_answering", "f1", [prediction], [answers]) == pytest.approx(f1)


def test_answers_are_averaged_over_examples():
    predictions, references = ["a cat", "dog", "x y"], [["cat"], ["cat"], ["x"]]
    assert metrics.compute("question_answering", "exact_match", predictions, references) == pytest.approx(
        1 / 3
    )
    assert metrics.compute("question_answering", "f1", predictions, references) == pytest.approx(5 / 9)


def test_perplexity_is_of_tokens_not_of_examples():
    # 2 nats over 1 token and 4 nats over 5 tokens: 6 nats over 6 tokens.
    assert metrics.compute("causal", "perplexity", [2.0, 4.0], [1, 5]) == pytest.approx(math.e)
    assert math.isfinite(metrics.compute("causal", "perplexity", [1e9], [1]))


def test_exact_match_of_targets_wants_every_token():
    assert metrics.compute("causal", "exact_match", [3, 2, 0], [3, 3, 1]) == pytest.approx(1 / 3)


EXAMPLES = {
    "class": [0, 1, 1, 2, 0],
    "count": [3, 1, 2, 2, 4],
    "number": [0.25, -1.5, 3.0, 2.0, 7.125],
    "text": ["the film", "good", "", "in 1066", "no"],
    "texts": [["film"], ["bad", "good one"], [], ["1066"], ["yes"]],
}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in metrics.METRICS for name in metrics.names(kind)]
)
def test_metrics_are_evaluate_metrics_of_the_same_value(kind, name):
    metric = evaluate_metrics.load(kind, name)
    assert isinstance(metric, evaluate.Metric)
    assert metric.description
    ours = metrics.METRICS[kind][name]
    predictions, references = EXAMPLES[ours.predictions][::-1], EXAMPLES[ours.references]
    if name == "f1" and kind == "classification":  # of two classes
        predictions, references = [0, 1, 1, 0, 1], [0, 1, 0, 0, 1]
    value = metrics.compute(kind, name, predictions, references)
    assert metric.compute(predictions=predictions, references=references) == {name: value}


def test_which_metrics_are_better_when_greater():
    assert metrics.greater_is_better("classification", "accuracy")
    assert not metrics.greater_is_better("causal", "perplexity")
    assert not metrics.greater_is_better("causal", "loss")


def test_computing_leaves_numpy_s_global_generator_alone():
    numpy.random.seed(3)
    expected = numpy.random.RandomState(3).random_sample(2)
    first = numpy.random.random_sample()
    metrics.compute("classification", "accuracy", [0, 1], [0, 1])
    assert (first, numpy.random.random_sample()) == tuple(expected)
