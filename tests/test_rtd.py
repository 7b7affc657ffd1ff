"""RTD: a datastore of hidden states that answers by its neighbours (arXiv:2409.20181)."""

import numpy
import pytest
import torch
import worlds

from fedlm.base.errors import UserError
from fedlm.exchange import payload
from fedlm.federation.facts import Facts
from fedlm.federation.settings import Training
from fedlm.study.plugins import discover_methods
from methods.rtd import Datastore, answer

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = 3


def stored(entries=12, width=8, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return torch.randn(entries, width, generator=stream), torch.arange(entries) % CLASSES


def queries(count=5, width=8) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(9))


def by_hand(query, keys, classes, neighbours, temperature) -> numpy.ndarray:
    """Return the distribution for one query, in numpy."""
    distances = ((keys.numpy() - query.numpy()) ** 2).sum(1)
    nearest = numpy.argsort(distances)[:neighbours]
    weights = numpy.exp(-distances[nearest] / temperature)
    return numpy.bincount(classes.numpy()[nearest], weights / weights.sum(), CLASSES)


@pytest.mark.parametrize("neighbours", [1, 4, 12])
def test_the_answer_is_a_softmax_over_squared_distances(neighbours):
    keys, classes = stored()
    found = answer(queries(), Datastore(keys, classes, neighbours, 2.5), CLASSES)
    for query, row in zip(queries(), found, strict=True):
        numpy.testing.assert_allclose(row, by_hand(query, keys, classes, neighbours, 2.5), atol=1e-5)
    torch.testing.assert_close(found.sum(1), torch.ones(5))


def test_all_neighbours_at_infinite_temperature_are_the_share_of_each_class():
    keys, classes = stored(10)
    found = answer(queries(), Datastore(keys, classes, 10, 1e30), CLASSES)
    shares = torch.bincount(classes, minlength=CLASSES) / 10
    torch.testing.assert_close(found, shares.expand(5, -1))


def test_a_small_temperature_leaves_the_nearest_and_finds_what_is_stored():
    keys, classes = stored()
    cold = answer(queries(), Datastore(keys, classes, 12, 1e-6), CLASSES)
    torch.testing.assert_close(cold, answer(queries(), Datastore(keys, classes, 1, 1.0), CLASSES))
    itself = answer(keys, Datastore(keys, classes, 12, 1e-6), CLASSES)
    assert torch.equal(itself.argmax(1), classes) and itself.max(1).values.min() > 0.999


def test_each_head_has_neighbours_of_its_own():
    keys, classes = stored()
    found = answer(queries(), Datastore(keys, classes, 4, 3.0, heads=2), CLASSES)
    for query, row in zip(queries(), found, strict=True):
        halves = [by_hand(query[part], keys[:, part], classes, 4, 1.5) for part in (slice(4), slice(4, 8))]
        numpy.testing.assert_allclose(row, sum(halves) / 2, atol=1e-5)


def test_the_order_of_the_store_does_not_matter():
    keys, classes = stored()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    one = answer(queries(), Datastore(keys, classes, 4, 1.0), CLASSES)
    torch.testing.assert_close(
        answer(queries(), Datastore(keys[order], classes[order], 4, 1.0), CLASSES), one
    )


def run(place, method="rtd", **settings):
    found = worlds.federation(method, place, **settings)
    found.run()
    return found


def test_no_parameter_changes_and_the_answers_beat_the_untrained_head(place):
    found = run(place, rounds=1)
    fresh = worlds.federation("rtd", place, rounds=1)
    for (name, value), other in zip(found.model.named_parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(value, other) and not value.requires_grad, name
    majority = max(numpy.bincount(found.data.labels[found.split.validation])) / len(found.split.validation)
    score = found.rounds[-1]["validation_score"]
    assert score > majority and score > found.baseline["accuracy"]


def test_without_weight_it_is_the_models_own_answer(place):
    found = run(place, rounds=1, weight=0.0)
    assert found.rounds[-1]["validation"] == found.baseline


def test_the_clients_store_is_the_store_of_all_examples(place):
    apart, together = run(place, rounds=1), run(place, rounds=1, clients=1)
    sorting = [numpy.lexsort(one.server.state["keys"].numpy().T) for one in (apart, together)]
    for name in ("keys", "classes"):
        one, other = (
            run.server.state[name].numpy()[order]
            for run, order in zip((apart, together), sorting, strict=True)
        )
        numpy.testing.assert_allclose(one, other, atol=1e-6)  # padding differs from batch to batch
    assert len(apart.server.state["keys"]) == len(apart.split.train)


def test_class_sums_are_the_sums_of_the_entries(place):
    entries, sums = run(place, rounds=1), run(place, rounds=1, store="class_sums")
    keys, classes = entries.server.state["keys"], entries.server.state["classes"].long()
    expected = torch.zeros(2, keys.shape[1]).index_add_(0, classes, keys)
    torch.testing.assert_close(sums.server.state["sums"], expected, atol=1e-4, rtol=1e-5)
    assert sums.server.state["counts"].tolist() == torch.bincount(classes).tolist()


def test_a_client_sends_its_keys_once(place):
    found = run(place, rounds=3)
    examples = [len(part) for part in found.parts]
    width = found.method.width
    for client, _, sent in found.rounds[0]["payloads"]:
        keys = torch.empty(examples[client], width)
        classes = torch.empty(examples[client], dtype=torch.int32)
        assert sent == payload.size({"keys": keys, "classes": classes})
    empty = payload.size({"keys": torch.empty(0, width), "classes": torch.empty(0, dtype=torch.int32)})
    assert {sent for later in found.rounds[1:] for *_, sent in later["payloads"]} == {empty}
    assert found.queries == found.rounds[0]["queries"] > 0
    assert found.rounds[2]["validation"] == found.rounds[0]["validation"]
    late = run(place, rounds=3, federation={"participation": 0.34}, seed=3)
    met = {client for row in late.rounds for client in row["clients"]}
    assert len(late.server.state["keys"]) == sum(len(late.parts[client]) for client in met)


def test_settings_that_cannot_work_are_refused():
    kind = discover_methods()["rtd"]
    facts = Facts("bert", "classification", 6, 384, 512, False, 6)
    with pytest.raises(UserError, match=r"heads: 7; allowed: a divisor of 384"):
        kind(kind.Config(heads=7), 2, 0).check(facts)
    with pytest.raises(UserError, match=r"training.local_epochs: 2; allowed: one epoch"):
        kind(kind.Config(), 2, 0).check_training(Training(local_epochs=2))
