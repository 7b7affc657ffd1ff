"""Scores: equal to the models' own losses, independent of batches, right at both ends."""

import itertools
from types import SimpleNamespace

import numpy
import pytest
import tiny
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from test_data import DOCUMENT, WORDS, Rows, answering, sentences

from fedlm.data.tokenising import tokenise
from fedlm.federation.scoring import _batches, score
from fedlm.models import loading

KINDS = ["classification", "regression", "causal", "question_answering"]


def prepared(kind, family="gpt2"):
    texts = sentences(24)
    if kind == "question_answering":
        rows = [(text, " ".join(DOCUMENT.split()[: 10 + 2 * i]), "bad0") for i, text in enumerate(texts)]
        return answering(rows, family)[0]
    rows = {
        "classification": [{"text": text, "label": i % 3} for i, text in enumerate(texts)],
        "regression": [{"text": text, "label": i / 5} for i, text in enumerate(texts)],
        "causal": [{"prompt": a, "target": b} for a, b in itertools.pairwise(texts)],
    }[kind]
    task = Rows(rows, kind=kind, label_names=["a", "b", "c"])
    return tokenise(task, task.load(), tiny.tokenizer([" ".join(WORDS)], family))


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    def of(data, family="gpt2"):
        folder = tmp_path_factory.mktemp("model")
        tiny.save(folder, family, vocabulary=512)
        return loading.load(loading.ModelConfig(source=str(folder)), data.kind, data.num_labels, seed=0)

    return of


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_result_does_not_depend_on_batches_or_order(kind, load):
    data = prepared(kind)
    model = load(data)
    everything = numpy.arange(len(data))
    expected = score(model, data, everything, batch_size=len(data))
    assert set(expected) == {"loss", *data.metrics}
    for batch_size in (1, 5):
        assert score(model, data, everything[::-1], batch_size) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_have_as_many_tokens_as_the_first_at_most(kind):
    data = prepared(kind)
    ordered = numpy.argsort(-data.lengths, kind="stable")
    for batch_size in (1, 3, 8, len(data)):
        batches = list(_batches(data, ordered, batch_size))
        assert numpy.array_equal(numpy.concatenate(batches), ordered)
        for batch in batches:
            tokens = data.batch(batch)["input_ids"].numel()
            assert len(batch) == 1 or tokens <= batch_size * data.batch_length(ordered[:1])
    if kind in ("classification", "regression"):  # whose lengths differ enough
        assert len(list(_batches(data, ordered, 3))) < len(data) / 3
    assert len(list(_batches(data, ordered, 10**6))) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_one_batch_is_the_model_s_own(kind, load):
    data = prepared(kind)
    model = load(data)
    everything = numpy.arange(len(data))
    if kind == "question_answering":  # Theirs counts padding, so only what has none can be compared.
        everything = everything[(data.lengths % 8 == 0) & (data.windows == 1)][:1]
        assert len(everything)
    with torch.no_grad():
        expected = model(**data.batch(everything)).loss.item()
    assert score(model, data, everything, len(data))["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_causal_loss_is_the_mean_over_tokens_not_over_examples(load):
    data = prepared("causal")
    model = load(data)
    losses, counts = [], []
    for example in range(len(data)):
        with torch.no_grad():
            batch = data.batch([example])
            losses.append(model(**batch).loss.item())
        counts.append((batch["labels"] != -100).sum().item())
    result = score(model, data, numpy.arange(len(data)), 7)
    assert result["loss"] == pytest.approx(numpy.average(losses, weights=counts), rel=1e-5)
    assert result["perplexity"] == pytest.approx(numpy.exp(result["loss"]), rel=1e-6)


def test_the_model_is_left_in_its_mode(load):
    data = prepared("classification")
    model = load(data)
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    score(model, data, numpy.arange(4), 2)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


class Oracle(torch.nn.Module):
    """A model that knows the answers, or, with `sign` -1, knows what they are not."""

    def __init__(self, data, sign=1):
        super().__init__()
        self.data, self.sign = data, sign
        self.known = {}
        for example in range(len(data)):
            batch = data.batch([example])
            for row in range(len(batch["input_ids"])):
                key = tuple(batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist())
                self.known[key] = {name: values[row] for name, values in batch.items()}

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        rows = [
            self.known[tuple(ids[mask == 1].tolist())]
            for ids, mask in zip(input_ids, attention_mask, strict=True)
        ]
        if self.data.kind == "question_answering":
            start, end = torch.zeros(input_ids.shape), torch.zeros(input_ids.shape)
            for row, known in enumerate(rows):
                start[row, known["start_positions"]] = end[row, known["end_positions"]] = 9.0 * self.sign
            return SimpleNamespace(start_logits=start, end_logits=end)
        if self.data.kind == "causal":
            logits = torch.zeros(*input_ids.shape, 512)
            logits[:, :-1].scatter_(2, input_ids[:, 1:, None], 9.0 * self.sign)
            return SimpleNamespace(logits=logits)
        labels = torch.stack([known["labels"] for known in rows])
        if self.data.kind == "regression":
            return SimpleNamespace(logits=self.sign * labels[:, None])
        return SimpleNamespace(logits=9.0 * self.sign * torch.eye(3)[labels])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_knows_everything_has_full_marks(kind):
    data = prepared(kind)
    result = score(Oracle(data), data, numpy.arange(len(data)), 5)
    for name in data.metrics:
        if name not in ("loss", "perplexity"):
            assert result[name] == pytest.approx(1), name
    worst = score(Oracle(data, -1), data, numpy.arange(len(data)), 5)
    assert worst["loss"] > result["loss"]
    assert worst[data.metrics[-1]] <= 0


def test_an_answer_is_found_in_whichever_window_it_is():
    answers = [f"{word}{number}" for number in range(4) for word in ("film", "end")]
    for family in ("bert", "gpt2"):
        data, _ = answering([(answer, DOCUMENT, answer) for answer in answers], family)
        assert data.windows.min() > 2
        result = score(Oracle(data), data, numpy.arange(len(data)), 3)
        assert result["exact_match"] == result["f1"] == 1


def test_no_answer_is_given_where_there_may_be_none():
    rows = [("film", "the film was good", "good"), ("bank1", DOCUMENT, None), ("end1", DOCUMENT, "bad2 and2")]
    data, _ = answering(rows)
    assert score(Oracle(data), data, numpy.arange(3), 2)["exact_match"] == 1


def test_the_best_span_is_the_one_that_trying_all_gives(load):
    data = prepared("question_answering")
    model = load(data)
    everything = numpy.arange(len(data))
    batch = {name: value for name, value in data.batch(everything).items() if "positions" not in name}
    with torch.no_grad():
        outputs = model(**batch)
    starts, ends = data.characters(everything)
    texts = []
    window = 0
    for example in everything:
        candidates = []
        for _ in range(data.windows[example]):
            inside = numpy.flatnonzero(starts[window] >= 0)
            for first, last in itertools.product(inside, inside):
                if first <= last < first + data.max_answer_tokens:
                    value = float(outputs.start_logits[window, first] + outputs.end_logits[window, last])
                    candidates.append((value, starts[window, first], ends[window, last]))
            window += 1
        _, start, end = max(candidates, key=lambda candidate: candidate[0])
        texts.append(data.columns["context"][int(example)].as_py()[start:end])
    right = [text == "bad0" for text in texts]
    from fedlm.federation.scoring import _predict_answer

    assert _predict_answer(outputs, batch, data, everything, None)[0] == texts
    assert score(model, data, everything, 4)["exact_match"] == pytest.approx(numpy.mean(right))


@pytest.mark.parametrize("prompt", [PromptTuningConfig, PrefixTuningConfig])
@pytest.mark.parametrize("kind", ["causal", "question_answering"])
def test_positions_that_a_method_puts_before_the_text_do_not_count(kind, prompt, load):
    data = prepared(kind)
    task_type = "CAUSAL_LM" if kind == "causal" else "QUESTION_ANS"
    model = get_peft_model(load(data), prompt(task_type=task_type, num_virtual_tokens=5))
    result = score(model, data, numpy.arange(len(data)), 4)
    assert result == pytest.approx(score(model, data, numpy.arange(len(data)), 3), rel=1e-5)
    if kind == "causal":
        with torch.no_grad():
            expected = model(**data.batch(numpy.arange(len(data)))).loss.item()
        assert result["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_decoder_reads_the_class_off_the_last_token_that_is_not_padding(load):
    data = prepared("classification")
    model = load(data)
    short, long = int(data.lengths.argmin()), int(data.lengths.argmax())
    assert data.lengths[short] < data.batch_length([long])
    with torch.no_grad():
        alone = model(**data.batch([short])).logits[0]
        together = model(**data.batch([long, short])).logits[1]
    assert torch.allclose(alone, together, atol=1e-6)


def test_a_model_that_is_not_finite_is_not_hidden(load):
    for kind in ("classification", "regression", "causal"):
        data = prepared(kind)
        model = load(data)
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
        assert numpy.isnan(score(model, data, numpy.arange(len(data)), 8)["loss"])
