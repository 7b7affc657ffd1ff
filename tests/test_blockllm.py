"""BlockLLM: selections within a budget, renewed when the loss gets worse (arXiv:2406.17296)."""

import math

import numpy
import pytest
import torch
import worlds
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from test_costs import padded, predicted  # noqa: F401

from fedlm.base.errors import UserError
from fedlm.exchange import payload
from fedlm.federation.settings import Training
from fedlm.study.plugins import discover_methods
from methods.blockllm import is_worse

pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = pytest.mark.parametrize("selection", ["tensors", "coordinates"])
OFTEN = {"reselect_every": 1, "patience": 2, "measure_every": 4, "sparsity": 0.7}
RISING = {"learning_rate": 1.0, "local_steps": 4}  # far too high: the loss of every client rises
ANEW = {"rounds": 3, "moments": "client", "training": RISING, **OFTEN}


class Watched:
    """A run, with what each turn received, what the model then had, and what arrived at the server."""

    def __init__(self, place, one_example=False, **options):
        self.run = worlds.federation("blockllm", place, **options)
        if one_example:
            self.run.parts = [part[:1] for part in self.run.parts]
        self.turns, self.befores = [], []
        self.method = self.run.method
        upload, merge = self.method.upload, self.method.merge

        def noted_upload(turn):
            values = {name: value.detach().clone() for name, value in turn.model.named_parameters()}
            sent = upload(turn)
            known = {name: turn.received[name] for name in payload.changed(sent)}
            arrived = payload.decode(payload.encode(sent), self.run.server.initial, own=True, known=known)
            self.turns.append((turn, values, arrived))
            return sent

        def noted_merge(server, uploads, round):
            self.befores.append(dict(server.tensors))
            merge(server, uploads, round)

        self.method.upload, self.method.merge = noted_upload, noted_merge
        self.run.run()

    def kept(self, client=0):
        return self.run.server.kept[client]

    def selections(self, client=0):
        rounds = range(1, self.run.settings.rounds + 2)
        return [tuple(self.method.selected(client, round)) for round in rounds]

    def gradients(self, client=0):
        """Return the gradients of the client's examples at the first values."""
        self.run.load(self.run.server.initial)
        self.run.model.requires_grad_(True).zero_grad()
        self.run.model(**self.run.make_batch(self.run.parts[client])).loss.backward()
        return {name: p.grad for name, p in self.run.model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module", params=["tensors", "coordinates"])
def anew(request, place):
    """A run in which all clients select anew after every turn."""
    return Watched(place, selection=request.param, **ANEW)


@pytest.mark.slow
def test_what_is_not_selected_stays_bit_identical_and_the_budget_is_kept(anew):
    found, method, measured = anew, anew.method, 0
    for turn, values, arrived in found.turns:
        selected = method.trainable(turn.client, turn.round)
        segments = method.segments(turn.client, turn.round, turn.steps)
        measured += len({name for segment in segments for name in segment.trainable} - set(selected))
        moved = 0
        for name, value in values.items():
            changed = value != turn.received.get(name, value)
            if name not in selected:
                assert value.view(torch.int32).equal(turn.received.get(name, value).view(torch.int32)), name
            elif name not in method.anatomy.head:
                moved += int(changed.sum())
        assert 0 < moved <= method.budget
        assert arrived.keys() == set(selected)
        assert all(torch.equal(arrived[name], values[name]) for name in selected)
    assert measured


@BOTH
def test_no_order_of_preference_exceeds_the_budget(selection, place):
    for sparsity in (0.0, 0.35, 0.9, 0.99):
        method = worlds.federation("blockllm", place, selection=selection, sparsity=sparsity).method
        elements = sum(method.sizes)
        assert method.budget <= (1 - sparsity) * elements
        for seed in range(20):
            order = numpy.random.default_rng(seed).permutation(len(method.sizes)).tolist()
            scored, method.seed = method._fill(order), seed
            method._selections = lambda client, round, scored=scored: [scored]
            for units in (scored, type(method)._selections(method, 0, 1)[0]):
                used = sum(method.sizes[unit] for unit in units)
                if selection == "coordinates":
                    assert used >= method.budget
                    used = sum(method._counts(0, 1).values())
                assert 0 < used <= method.budget


def test_a_tensor_that_does_not_fit_ends_a_selection_unless_it_is_the_first(place):
    method = worlds.federation("blockllm", place, sparsity=0.9).method
    method.sizes, method.budget = [5, 30, 4, 3, 8], 10
    assert method._fill([0, 2, 4, 3]) == [0, 2]
    assert method._fill([1, 4, 3, 2]) == [4]
    assert method._fill([1, 0, 4, 2, 3], count=2) == [0, 2]
    assert method._fill([3, 2, 0, 4], count=2) == [2, 3]


LOSS = st.floats(-1e6, 1e6, width=32)


@given(st.lists(LOSS, min_size=1, max_size=30), st.integers(1, 12))
def test_equal_or_falling_losses_are_never_worse(losses, patience):
    assert not is_worse([losses[0]] * len(losses), patience)
    assert not is_worse(sorted(losses, reverse=True), patience)
    rising = sorted(set(losses))
    assert is_worse(rising, patience) == (len(rising) > patience)


@pytest.mark.parametrize(
    ("training", "relation"),
    [({"learning_rate": 1e-30}, numpy.equal), ({"learning_rate": 1e-2, "optimizer": "sgd"}, numpy.less)],
    ids=["constant", "falling"],
)
def test_a_constant_or_falling_loss_selects_nothing_anew(training, relation, place):
    training |= {"local_steps": 3}
    options = {**OFTEN, "measure_every": None, "rounds": 4, "clients": 1, "one_example": True}
    found = Watched(place, training=training, **options)
    losses = found.kept()["selection@losses"].numpy()
    assert len(losses) == 12 and relation(losses[1:], losses[:-1]).all()
    assert len(set(found.selections())) == 1
    assert found.method.extra(found.run.server) == {"new_selections": 0}


@pytest.mark.slow
def test_where_the_loss_rises_each_client_selects_anew_and_for_itself(anew):
    selections = [tuple(anew.selections(client)) for client in range(3)]
    assert all(len(set(own)) > 1 for own in selections)
    assert len(set(selections)) > 1
    assert [anew.kept(client)["selection@rounds"].tolist() for client in range(3)] == [[2, 3, 4]] * 3
    assert anew.method.extra(anew.run.server) == {"new_selections": 3}


@pytest.mark.parametrize(("every", "patience"), [(6, 2), (1, 9)])
def test_decisions_wait_for_the_patience_and_the_step_at_which_they_are_due(every, patience, place):
    options = {"training": RISING, "sparsity": 0.7, "measure_every": None, "rounds": 5, "clients": 2}
    found = Watched(place, reselect_every=every, patience=patience, **options)
    selections = 0
    for client in range(2):
        losses, expected = [], []
        for turn in [turn for turn, *_ in found.turns if turn.client == client]:
            losses += [float(loss) for loss in turn.losses]
            due = any(step % every == 0 for step in range(4 * turn.round - 3, 4 * turn.round + 1))
            last = losses[-patience:]
            if due and len(losses) > patience and sum(last) / len(last) > sum(losses) / len(losses):
                expected.append(turn.round + 1)
                losses = []
        kept = found.kept(client)
        assert kept["selection@losses"].tolist() == losses and int(kept["selection@steps"]) == 20
        assert (kept["selection@rounds"].tolist() if expected else []) == expected
        selections += len(expected)
    assert 0 < selections < 8


def test_visits_lower_a_score(place):
    norms = numpy.ones(48)
    method = worlds.federation("blockllm", place).method
    # Shares 1/2, 1/2; then 3/2, 1/2, halved.
    scores = method.scores(norms, [[0, 1], [0]], steps=40)
    expected = [1 / math.exp(0.75 / 40), 1 / math.exp(0.25 / 40), 1]
    assert scores[:3] == pytest.approx(expected, rel=1e-12)
    divided = worlds.federation("blockllm", place, penalty="division").method
    norms[2:4] = [0.2, 0.1]
    scores = divided.scores(norms, [[0, 1], [0]], steps=40)
    assert scores[:2] == pytest.approx([1 / 0.75, 1 / 0.25])
    assert scores[2] > scores[3] > scores[1] > scores[0]  # never visited: before all others, by norm
    norms[1] = 0.3
    assert divided.scores(norms, [[0, 1], [0]], steps=40)[1] < scores[0]  # and the norm still counts


@pytest.mark.slow
def test_a_new_selection_starts_with_fresh_moments(anew, place):
    """Otherwise moments go on from turn to turn; of what was only measured there are none."""
    own = {"selection@losses", "selection@steps", "selection@norms", "selection@rounds", "selection@units"}
    assert all(set(turn.kept) == own for turn, *_ in anew.turns)
    found = Watched(place, **{**ANEW, "reselect_every": 1000, "clients": 1, "rounds": 2})
    for (turn, *_), steps in zip(found.turns, (3, 6), strict=True):  # one of four steps measures
        counts = {n.partition("@")[0]: int(turn.kept[n]) for n in turn.kept if n.endswith("@step")}
        assert counts == dict.fromkeys(found.method.trainable(0, turn.round), steps)


def test_a_tensor_becomes_the_mean_over_those_who_uploaded_it(place):
    found = Watched(place, rounds=1, sparsity=0.7)
    examples = [len(part) for part in found.run.parts]
    shared = 0
    for name, value in found.run.server.tensors.items():
        sent = [(examples[t.client], arrived[name]) for t, _, arrived in found.turns if name in arrived]
        shared += 1 < len(sent) < 3
        if not sent:
            assert value is found.befores[0][name]
            continue
        mean = sum(weight * one.double() for weight, one in sent) / sum(weight for weight, _ in sent)
        torch.testing.assert_close(value.double(), mean, rtol=0, atol=1e-6)
    assert shared


@BOTH
def test_the_kept_norms_are_those_of_the_gradients(selection, place):
    training = {"learning_rate": 1e-30, "local_steps": 4}
    options = {"clients": 1, "rounds": 3, "sparsity": 0.7, "measure_every": 2, "one_example": True}
    found = Watched(place, selection=selection, training=training, **options)
    gradients, kept = found.gradients(), found.kept()["selection@norms"]
    selected, known = found.method.selected(0, 1), (~kept.isnan()).nonzero().flatten().tolist()
    assert set(selected) < set(known)
    for unit, names in enumerate(found.method.units.values()):
        norm = torch.cat([gradients[name].flatten() for name in names]).norm()
        if unit in known:
            assert float(kept[unit]) == pytest.approx(float(norm), rel=1e-4, abs=1e-7)


def test_the_coordinates_of_the_largest_gradient_move_until_the_next_selection(place):
    training = {"learning_rate": 1e-2, "optimizer": "sgd", "local_steps": 2}
    options = {"clients": 1, "rounds": 3, "sparsity": 0.9, "one_example": True, "measure_every": None}
    found = Watched(place, selection="coordinates", training=training, **options)
    counts, gradients = found.method._counts(0, 1), found.gradients()
    assert 0.9 * found.method.budget < sum(counts.values()) <= found.method.budget
    for name, count in counts.items():
        size = gradients[name].abs()
        for turn, values, _ in found.turns:
            moved = values[name] != turn.received[name]
            assert int(moved.sum()) <= count < moved.numel()
            if moved.any() and "key.bias" not in name:
                assert size[~moved].max() <= size[moved].min() * (1 + 1e-4)
    # One turn's upload: the head, one value for each coordinate that moves, and the positions as bits.
    head = {name: found.run.server.tensors[name] for name in found.method.anatomy.head}
    parts = {
        "*#bits": torch.empty(-(-found.method.sizes[found.method.selected(0, 1)[0]] // 8), dtype=torch.uint8),
        "*#chosen": torch.empty(sum(counts.values())),
    }
    assert found.run.ledger.upload == 3 * len(payload.encode(head | parts))


@BOTH
def test_without_sparsity_it_is_training_of_all_blocks_bit_for_bit(selection, place):
    whole = worlds.federation("fedcybgd", place, blocks_per_turn=3, clients_per_block=3)
    whole.run()
    found = worlds.federation("blockllm", place, sparsity=0.0, measure_every=None, selection=selection)
    found.run()
    assert payload.encode(found.server.tensors).sha256() == payload.encode(whole.server.tensors).sha256()


@pytest.mark.slow
def test_a_run_that_selects_anew_resumes_exactly(anew, place, tmp_path):
    whole = anew.run
    settings = {**ANEW, "selection": anew.method.config.selection}
    again, lines = worlds.resumed("blockllm", place, tmp_path, **settings)
    assert "resumed" in lines[0]
    assert payload.encode(again.server.tensors).sha256() == payload.encode(whole.server.tensors).sha256()
    for client in range(3):
        one, other = whole.server.kept[client], again.server.kept[client]
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name].nan_to_num(-1), other[name].nan_to_num(-1)) for name in one)


@pytest.mark.slow
def test_what_clients_keep_is_predicted(place, padded):  # noqa: F811
    options = {"selection": "coordinates", "moments": "client", "measure_every": 3}
    run = worlds.federation("blockllm", place, **options)
    run.run()
    kept = sum(value.nbytes for client in run.server.kept.values() for value in client.values())
    found = predicted(run, place)
    assert found.kept_bytes == kept and found.memory.keys() == run.instruments.memory.keys()
    assert any(label.startswith("measure ") for label in found.memory)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"selection": "coordinates", "upload_compression": {"operator": "sparse"}},
            "upload_compression: sparse; allowed: null",
        ),
        (
            {"compression": {"operator": "layer_drop"}},
            "compression: layer_drop; allowed: the other operators",
        ),
        ({"moments": "handed_on"}, "Input should be 'reset' or 'client'"),
    ],
)
def test_settings_that_do_not_suit_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        discover_methods()["blockllm"].Config.model_validate(settings)


def test_decay_is_refused():
    kind = discover_methods()["blockllm"]
    with pytest.raises(UserError, match=r"weight_decay: 0.01; allowed: 0"):
        kind(kind.Config(), 2, 0).check_training(Training(weight_decay=0.01))
