"""FedBPT: a prompt found by evolution strategies at clients and server (arXiv:2310.01467)."""

import math
from types import SimpleNamespace

import cma
import numpy
import pytest
import tiny
import torch
import transformers
import worlds
from test_methods import TINY

from fedlm.base.errors import UserError
from fedlm.federation.settings import Training
from fedlm.models.readout import Template
from fedlm.study.plugins import discover_methods
from methods.fedbpt import _strategy, recombination, step_size

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = TINY["fedbpt"]


def build(place, **settings):
    return worlds.federation("fedbpt", place, **{"rounds": 1, **SMALL, **settings})


def test_weights_of_the_clients_are_positive_and_those_of_the_page():
    expected = [0.2796, 0.1972, 0.1490, 0.1148, 0.0882, 0.0665, 0.0482, 0.0323, 0.0183, 0.0058]
    numpy.testing.assert_allclose(recombination(10), expected, atol=5e-5)
    assert recombination(1).tolist() == [1.0]
    for count in (2, 5, 30):
        weights = recombination(count)
        assert weights.sum() == pytest.approx(1) and (numpy.diff(weights) < 0).all() and weights[-1] > 0


@pytest.mark.parametrize(("population", "parents"), [(5, 2), (20, 10)])
def test_the_servers_step_size_follows_the_authors_formula(population, parents):
    sigmas = [[1.0, 2.0], [3.0, 0.5], [1.0, 1.0]]
    expected = math.sqrt(sum(one**2 for client in sigmas for one in client) / (3 * parents))
    assert step_size(sigmas, population) == pytest.approx(expected)
    constant = [[0.7] * 8] * 4
    assert step_size(constant, population) == pytest.approx(0.7 * math.sqrt(8 / parents))


def merged(method, server_points, fitness, rounds=1):
    """Return the search distribution after generations of the same points."""
    state = method._state(SimpleNamespace(state={}))
    for round in range(1, rounds + 1):
        method._tell(state, server_points, fitness, 1.0, round)
    return state


@pytest.fixture
def method():
    kind = discover_methods()["fedbpt"]
    return kind(kind.Config(**SMALL), 5, 1)


def test_equal_points_leave_the_mean_there_and_a_monotone_map_of_fitness_changes_nothing(method):
    point = numpy.linspace(-0.2, 0.2, 6)
    state = merged(method, numpy.stack([point] * 5), [3.0, 1.0, 2.0, 5.0, 4.0])
    numpy.testing.assert_allclose(state["mean"].numpy(), point, atol=1e-12)
    points = numpy.random.default_rng(0).standard_normal((5, 6)) * 0.3
    fitness = [0.4, 0.1, 0.9, 0.3, 0.2]
    one = merged(method, points, fitness)
    other = merged(method, points, [math.exp(5 * value) for value in fitness])
    order = numpy.argsort(fitness)
    numpy.testing.assert_allclose(one["mean"].numpy(), recombination(5) @ points[order], atol=1e-12)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_clients_are_recombined_in_the_same_way(method):
    points = numpy.stack([numpy.zeros(6), numpy.ones(6)])
    state = merged(method, points, [2.0, 1.0])
    numpy.testing.assert_allclose(state["mean"].numpy(), recombination(2)[0], atol=1e-12)


def test_the_server_goes_on_as_one_strategy_of_pycma_would(method):
    """It is taken apart after each round, for checkpoints; nothing of it may be lost."""
    points = numpy.random.default_rng(3).standard_normal((4, 5, 6)) * 0.5
    stream = numpy.random.default_rng(0)
    whole = _strategy(numpy.zeros(6), 1.0, numpy.eye(6), stream, 5, 5)
    state = method._state(SimpleNamespace(state={}))
    for round, generation in enumerate(points, 1):
        fitness = [float((point**2).sum()) for point in generation]
        whole.sigma = 0.8
        whole.ask()
        whole.sm.update_now(-1)  # pycma decomposes only now and then
        whole.tell([point.copy() for point in generation], fitness)
        step = method._tell(state, generation, fitness, 0.8, round)
        assert step == pytest.approx(whole.sigma, rel=1e-9)
        numpy.testing.assert_allclose(state["mean"].numpy(), whole.mean, atol=1e-9)
        numpy.testing.assert_allclose(state["covariance"].numpy(), whole.sm.C, atol=1e-9)


def test_pycma_takes_the_weights_of_all_clients():
    strategy = cma.CMAEvolutionStrategy(numpy.zeros(6), 1, {"popsize": 10, "CMA_mu": 10, "verbose": -9})
    numpy.testing.assert_allclose(list(strategy.sp.weights)[:10], recombination(10), atol=1e-12)


@pytest.mark.parametrize(("leading", "trailing"), [(1, 1), (0, 0), (1, 0)])
def test_a_template_adds_its_tokens_where_it_should(leading, trailing):
    texts = [[*[91] * leading, 10, 11, 12, *[92] * trailing], [*[91] * leading, 20, *[92] * trailing]]
    length = max(map(len, texts)) + 2
    ids = torch.tensor([text + [0] * (length - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts])
    filled, wider = Template([7, 8], [5, 6, 4], leading, trailing).fill(ids, mask)
    for text, row, marks in zip(texts, filled.tolist(), wider.tolist(), strict=True):
        end = len(text) - trailing
        expected = [*text[:leading], 7, 8, *text[leading:end], 5, 6, 4, *text[end:]]
        assert row == expected + [0] * (length + 5 - len(expected))
        assert marks == [1] * len(expected) + [0] * (length + 5 - len(expected))


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_a_prompt_of_zero_is_the_model_on_the_longer_text(family, place):
    found = build(place, family=family)
    model = found.model.eval()
    batch = found.make_batch(found.split.validation[:4])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        plain = model(**inputs).logits
        ids, mask = model.template.fill(batch["input_ids"], batch["attention_mask"])
        hidden = transformers.AutoModel.from_pretrained(worlds.folder(family, str(place))).eval()
        states = hidden(input_ids=ids, attention_mask=mask)[0]
        assert torch.equal(plain, model.answer(states, mask))
        model.prompt.fill_(1.0)
        assert not torch.equal(model(**inputs).logits, plain)


def test_words_of_a_decoder_are_read_from_its_next_token(place):
    found = build(place, family="gpt2")
    model = found.model.eval()
    whole = transformers.AutoModelForCausalLM.from_pretrained(worlds.folder("gpt2", str(place))).eval()
    batch = found.make_batch(found.split.validation[:3])
    words = transformers.AutoTokenizer.from_pretrained(worlds.folder("gpt2", str(place)))
    ids = [words.encode(f" {name}")[0] for name in ("bad", "good")]
    filled, mask = model.template.fill(batch["input_ids"], batch["attention_mask"])
    with torch.no_grad():
        logits = whole(input_ids=filled, attention_mask=mask).logits
        found_here = model(batch["input_ids"], batch["attention_mask"]).logits
    for row, (all_logits, marks) in enumerate(zip(logits, mask, strict=True)):
        torch.testing.assert_close(found_here[row], all_logits[marks.sum() - 1][ids])
    last = filled[0][mask[0].sum() - 1]
    assert last == words.encode(" It was")[-1]


def test_words_of_an_encoder_are_read_at_its_mask(place, tmp_path):
    shape = tiny.config("roberta")
    torch.manual_seed(0)
    whole = transformers.AutoModelForMaskedLM.from_config(shape).eval()
    whole.lm_head.bias.data.zero_()  # as the authors do
    whole.save_pretrained(tmp_path)
    words = tiny.tokenizer([text for text, _ in worlds.ROWS], "roberta")
    words.save_pretrained(tmp_path)
    kind = discover_methods()["fedbpt"]
    method = kind(kind.Config(readout="words", **SMALL), 2, 1)
    method.label_names = ["bad", "good"]
    pretrained = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    model = method.prepare(pretrained, "classification").eval()
    text = words("the film was good", return_tensors="pt")
    filled, mask = model.template.fill(text["input_ids"], text["attention_mask"])
    place_of_mask = (filled[0] == words.mask_token_id).nonzero().item()
    ids = [words.encode(name, add_special_tokens=False)[0] for name in ("bad", "good")]
    with torch.no_grad():
        expected = whole(input_ids=filled, attention_mask=mask).logits[0, place_of_mask, ids]
        torch.testing.assert_close(model(**text).logits[0], expected)


def test_the_projection_has_the_deviation_of_the_embeddings(place):
    found = build(place, dimensions=64, tokens=20, spread=2.0)
    values = found.model.projection
    deviation = found.model.base.get_input_embeddings().weight.std(correction=0)
    assert float(values.std()) == pytest.approx(2 * float(deviation) / 8, rel=0.03)
    again = build(place, dimensions=64, tokens=20, spread=2.0)
    assert torch.equal(values, again.model.projection)


def test_no_gradient_is_computed_and_queries_are_counted(place, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("backward")

    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    found = build(place)
    batches = sum(math.ceil(len(part) / 8) for part in found.parts)
    found.run()
    passes = SMALL["population"] * SMALL["iterations"] * 2 + 2
    assert found.queries == passes * batches
    plain = build(place, corruption=0.0)
    plain.run()
    assert plain.queries == passes // 2 * batches
    assert all(parameter.grad is None for parameter in found.model.parameters())


def test_the_upload_does_not_depend_on_the_model(place):
    sizes = set()
    for family in ("bert", "gpt2"):
        found = build(place, family=family)
        found.run()
        sizes.add(found.ledger.upload)
    assert len(sizes) == 1


def test_corrupted_text_is_one_copy_and_leaves_padding(place):
    found = build(place)
    model = found.model.eval()
    batch = found.make_batch(found.split.train[:6])
    ids, mask = model.template.fill(batch["input_ids"], batch["attention_mask"])
    seen = []
    turn = SimpleNamespace(round=1, client=0)
    for _ in range(2):
        with found.method._corrupted(turn):
            seen.append(model._corrupted(ids, mask))
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], ids)
    assert torch.equal(seen[0][mask == 0], ids[mask == 0])
    changed = (seen[0] != ids)[mask == 1].float().mean()
    assert 0.3 < changed < 0.7
    with found.method._corrupted(SimpleNamespace(round=2, client=0)):
        assert not torch.equal(model._corrupted(ids, mask), seen[0])


def test_settings_that_cannot_work_are_refused(place):
    kind = discover_methods()["fedbpt"]
    with pytest.raises(UserError, match=r"training.local_epochs: 2; allowed: 1"):
        kind(kind.Config(), 2, 0).check_training(Training(local_epochs=2))
    with pytest.raises(UserError, match=r"words: 3; allowed: 2, one for each class"):
        build(place, words=["a", "b", "c"])
    with pytest.raises(UserError, match=r"'good' and 'good one' begin with the same token"):
        build(place, family="gpt2", words=["good", "good one"])
    with pytest.raises(UserError, match=r"readout: words; .* has no head that predicts tokens"):
        build(place, family="bert", readout="words")
