"""FedPepTAO: layers are scored, the chosen ones exchanged, the others personal (arXiv:2310.15080)."""

import json
import math

import numpy
import pytest
import tiny_study
import torch
import worlds
from test_config import changed, faults
from test_costs import agree, padded, predicted  # noqa: F401

from fedlm.base.errors import UserError
from fedlm.exchange import payload
from fedlm.federation.facts import Facts
from fedlm.federation.method import Method
from fedlm.federation.state import Upload
from fedlm.federation.turn import steps_of_turn
from fedlm.jobs import running
from fedlm.study.plugins import discover_methods
from fedlm.study.reading import load
from methods.fedpeptao import layer_score
from methods.fedprompt import FedPrompt

pytestmark = pytest.mark.usefixtures("one_thread")

DEPTH, TOKENS, HIDDEN, RATE = 3, 4, 16, 1e-2
CHOSEN, OTHER = [2, 0], [1]


class Watched:
    """A run, with all turns' messages, what the client started from, and what it had after training."""

    def __init__(self, place, method="fedpeptao", **options):
        self.run = worlds.federation(method, place, **{"tokens": TOKENS, **options})
        self.down, self.up, self.start, self.end, self.server = {}, {}, {}, {}, []
        method, link = self.run.method, self.run.link
        send, accept, upload, merge = link.send, link.accept, method.upload, method.merge

        def noted_send(client, round):
            self.now = round, client
            self.down[self.now] = send(client, round)
            return self.down[self.now]

        def noted_upload(turn):
            self.start[self.now] = turn.received[method.prefix].clone()
            self.end[self.now] = turn.values([method.prefix])[method.prefix].clone()
            return upload(turn)

        def noted_accept(client, message, known=None):
            self.up[self.now] = message
            return accept(client, message, known)

        def noted_merge(server, uploads, round):
            merge(server, uploads, round)
            self.server.append({name: value.clone() for name, value in server.tensors.items()})

        link.send, link.accept, method.upload, method.merge = (
            noted_send, noted_accept, noted_upload, noted_merge,
        )  # fmt: skip
        self.run.run()


def layers(matrix, numbers):
    """Return the columns of some layers of a prefix matrix."""
    return matrix.view(TOKENS, DEPTH, -1)[:, numbers]


def partial(shared: list[int]) -> type[Method]:
    """Return FedAvg over whole prefixes, whose clients put back their own layers: FedPepTAO's slow double."""

    class Partial(FedPrompt):
        name = "partial"

        def prepare(self, model, kind):
            prepared = super().prepare(model, kind)
            (self.prefix,) = (name for name in self.exchanged if "prompt_encoder" in name)
            return prepared

        def rebuild(self, received):
            if "own" not in received:
                return received
            mine, theirs = received["own"].clone(), received[self.prefix]
            mine.view(TOKENS, DEPTH, -1)[:, shared] = layers(theirs, shared)
            return received | {self.prefix: mine}

        def upload(self, turn):
            turn.keep({"own": turn.values([self.prefix])[self.prefix]})
            return super().upload(turn)

    return Partial


def same(one, other, numbers) -> bool:
    """Return whether two servers have the same head and the same prefixes of these layers, bit for bit."""
    return all(
        torch.equal(layers(one[name], numbers), layers(other[name], numbers))
        if "prompt_encoder" in name
        else torch.equal(one[name], other[name])
        for name in one
    )


SKEWED = {"scheme": {"scheme": "quantity", "alpha": 1.0}, "clients": 3}


def test_layers_that_were_not_chosen_are_never_in_a_payload(place):
    watched = Watched(place, rounds=3, layers=CHOSEN)
    for way, values in ((watched.down, watched.start), (watched.up, watched.end)):
        for turn, message in way.items():
            sent = [part.sent().flatten() for part in message.parts.values()]
            numbers = torch.cat([part for part in sent if part.is_floating_point()])
            assert not torch.isin(layers(values[turn], OTHER), numbers).any()
            assert torch.isin(layers(values[turn], CHOSEN), numbers).all()


def test_messages_hold_the_chosen_share_of_the_prefix_the_head_and_what_is_declared(place):
    watched = Watched(place, rounds=3, share=1 / 3)
    run = watched.run
    head = {name: run.server.tensors[name] for name in run.method.head}
    one_layer = torch.empty(TOKENS, run.method.shapes[run.method.prefix][1] // DEPTH)
    for (round, _), message in watched.up.items():
        if round == 1:
            assert [(part.kind, part.tensor.shape) for part in message.parts.values()] == [
                (torch.float32, (DEPTH - 1,))
            ]
        else:
            expected = {
                **head,
                run.method.sent: one_layer,
                run.method.steps: torch.zeros((), dtype=torch.int32),
            }
            assert len(message) == payload.size(expected)
    order = torch.zeros(DEPTH, dtype=torch.int16)
    for (round, _), message in watched.down.items():
        expected = {**head, run.method.sent: one_layer, run.method.order: order}
        assert len(message) == payload.size({} if round == 1 else expected)


@pytest.mark.slow
def test_without_a_server_step_it_is_partial_fedavg_in_every_round(place):
    for options in ({}, SKEWED, {"training": {"weight_decay": 0.1, "local_epochs": 2}}):
        watched = Watched(place, rounds=3, layers=CHOSEN, server_rate=0.0, **options)
        double = Watched(place, partial(CHOSEN), rounds=3, form="prefix", moments="client", **options)
        assert all(map(lambda *two: same(*two, CHOSEN), watched.server, double.server))
        assert len(watched.server) == 3
        for turn, end in watched.end.items():
            assert torch.equal(end, double.end[turn])


def test_the_first_training_round_is_partial_fedavg_and_the_second_is_not(place):
    watched = Watched(place, rounds=2, layers=CHOSEN)
    double = Watched(place, partial(CHOSEN), rounds=2, form="prefix", moments="client")
    assert same(watched.server[0], double.server[0], CHOSEN)
    assert not same(watched.server[1], double.server[1], CHOSEN)


def test_with_all_layers_and_no_server_step_it_is_prefix_tuning_bit_for_bit(place):
    settings = {"tokens": TOKENS, "rounds": 2, "moments": "reset"}
    found = worlds.federation("fedpeptao", place, layers=[0, 1, 2], server_rate=0.0, **settings)
    found.run()
    plain = worlds.federation("fedprompt", place, form="prefix", **settings)
    plain.run()
    assert payload.encode(found.server.tensors).sha256() == payload.encode(plain.server.tensors).sha256()
    assert found.test == plain.test


def test_the_personal_layers_stay_with_their_client_and_the_chosen_ones_are_equal(place):
    watched = Watched(place, rounds=3, layers=CHOSEN)
    clients = range(len(watched.run.parts))
    first = watched.run.server.initial[watched.run.method.prefix]
    for client in clients:
        assert torch.equal(watched.start[1, client], first)
        for round in (2, 3):
            start, before = watched.start[round, client], watched.end[round - 1, client]
            assert torch.equal(layers(start, OTHER), layers(before, OTHER))
            assert torch.equal(layers(start, CHOSEN), layers(watched.start[round, 0], CHOSEN))
            assert client == 0 or not torch.equal(
                layers(start, OTHER), layers(watched.start[round, 0], OTHER)
            )
    own = watched.run.method.further(watched.run.server)["personal_score"]
    (shared,) = watched.run.method.models(watched.run.server)
    shared = shared[watched.run.method.prefix]
    for client, model in enumerate(own):
        prefix = model[watched.run.method.prefix]
        assert torch.equal(layers(prefix, OTHER), layers(watched.end[3, client], OTHER))
        assert torch.equal(layers(prefix, CHOSEN), layers(shared, CHOSEN))
    assert client == len(clients) - 1
    # The shared model has the first values where the server never learned others.
    assert torch.equal(layers(shared, OTHER), layers(first, OTHER))


def test_fixed_layers_are_those_of_the_start_and_all_have_the_servers_model(place):
    """Then the server's matrix is the mean of the clients', weighted by examples, in all layers."""
    options = {"rounds": 3, "layers": CHOSEN, "others": "fixed", "moments": "reset", "server_rate": 0.0}
    watched = Watched(place, **options)
    run = watched.run
    first = layers(run.server.initial[run.method.prefix], OTHER)
    for turn, end in watched.end.items():
        assert torch.equal(layers(end, OTHER), first)
        assert torch.equal(layers(watched.start[turn], OTHER), first)
        assert not torch.equal(layers(end, CHOSEN), layers(watched.start[turn], CHOSEN))
    assert not any("personal" in kept for _, kept in run.server.kept.items())
    assert run.method.further(run.server) == {} and run.further == {}
    weights = [len(part) / sum(map(len, run.parts)) for part in run.parts]
    mean = sum(weight * watched.end[3, client] for client, weight in enumerate(weights))
    torch.testing.assert_close(watched.server[2][run.method.prefix], mean, atol=1e-6, rtol=0)
    # The others' training would have changed the chosen ones, too.
    personal = Watched(place, **{**options, "others": "personal"})
    assert not torch.equal(layers(personal.end[3, 0], CHOSEN), layers(watched.end[3, 0], CHOSEN))


def by_formula(watched, rounds, rate, momentum):
    """Return, in float64, the chosen layers after each round."""
    run, method = watched.run, watched.run.method
    weights = {client: len(part) for client, part in enumerate(run.parts)}
    old = layers(run.server.initial[method.prefix], CHOSEN).double()
    server, own, velocity, fall, eta = torch.zeros_like(old), {}, torch.zeros_like(old), None, rate
    after = []
    for round in range(1, rounds + 1):
        ends = {client: end for (when, client), end in watched.end.items() if when == round}
        ends = {client: layers(end, CHOSEN).double() for client, end in ends.items()}
        steps = {client: math.ceil(weights[client] / 8) for client in ends}
        total = sum(weights[client] for client in ends)
        mean = sum(weights[client] / total * end for client, end in ends.items())
        new = {
            client: own.get(client, 0) - server + (old - end) / (steps[client] * RATE)
            for client, end in ends.items()
        }
        moved = sum(steps[client] * (new[client] - own.get(client, 0)) for client in ends)
        server = server + len(ends) / len(run.parts) * moved / sum(steps.values())
        own |= new
        before, fall = fall, old - mean
        if round == 1:
            old = mean
        else:
            eta = max(0.99 * eta, 1e-4)
            each = {
                client: momentum * velocity + (1 - momentum) * (before - fall) + (server - new[client])
                for client in ends
            }
            old = sum(weights[client] / total * (mean - eta * each[client]) for client in ends)
            velocity = sum(weights[client] / total * each[client] for client in ends)
        after.append(old)
    return after


@pytest.mark.parametrize(
    "options",
    [
        SKEWED,
        {"clients": 4, "federation": {"participation": 0.5, "dropout_rate": 0.2}},
        {"server_rate": 1.5, "server_momentum": 0.5},
    ],
    ids=["skewed", "sampled", "fast"],
)
def test_the_server_steps_as_the_formulas_say(options, place):
    watched = Watched(place, rounds=4, layers=CHOSEN, **options)
    method = watched.run.method
    after = by_formula(watched, 4, method.config.server_rate, method.config.server_momentum)
    for expected, server in zip(after, watched.server, strict=True):
        found = layers(server[method.prefix], CHOSEN)
        numpy.testing.assert_allclose(found.numpy(), expected.numpy(), atol=2e-5)


def test_the_servers_control_is_the_mean_of_the_clients_where_all_take_equal_steps(place):
    watched = Watched(place, rounds=3, layers=CHOSEN)
    state, clients = watched.run.server.state, range(len(watched.run.parts))
    assert len({math.ceil(len(part) / 8) for part in watched.run.parts}) == 1
    own = torch.stack([state[f"control {client}"] for client in clients])
    torch.testing.assert_close(state["control"], own.mean(0), atol=1e-5, rtol=0)
    steps = math.ceil(len(watched.run.parts[0]) / 8)
    moved = [
        (layers(watched.start[3, client], CHOSEN) - layers(watched.end[3, client], CHOSEN)) / (steps * RATE)
        for client in clients
    ]
    mean = torch.stack(moved).mean(0).flatten(1)
    torch.testing.assert_close(own.mean(0), mean, atol=1e-4, rtol=0)


def test_the_score_of_unlike_and_of_equal_texts():
    unlike, equal = torch.eye(5).reshape(5, 5, 1) * 3, torch.ones(5, 2, 4) * 0.1
    assert float(layer_score(unlike)) == pytest.approx(5 * (math.log(1 + 1e-5) + 1 / (1 + 1e-5)))
    huge = math.log(5 + 1e-5) + 1 / (5 + 1e-5) + 4 * (math.log(1e-5) + 1e5)
    assert float(layer_score(equal)) == pytest.approx(huge, rel=1e-6)


def test_the_layers_of_the_highest_scores_are_chosen_weighted_by_examples(place):
    """The scores are those of the hidden states that Transformers returns for the first batch."""
    watched = Watched(place, rounds=1, share=2 / 3, **SKEWED)
    run = watched.run
    total = torch.zeros(DEPTH - 1, dtype=torch.double)
    run.load(run.server.initial)
    for client, part in enumerate(run.parts):
        batch = run.make_batch(steps_of_turn(part, run.training, run.seed, 1, client)[0][0])
        with torch.no_grad():
            states = run.model.eval()(**batch, output_hidden_states=True).hidden_states[1:DEPTH]
        scores = torch.stack([layer_score(state) for state in states])
        sent = watched.up[1, client].parts[run.method.scores].sent()
        torch.testing.assert_close(sent.double() / 1e-5, scores, rtol=1e-4, atol=0)
        total += len(part) * scores
    expected = [*total.argsort(descending=True).tolist(), DEPTH - 1]
    assert run.server.state["order"].tolist() == expected
    assert run.method.extra(run.server) == {f"layer_{n}": float(n != DEPTH - 1) for n in range(DEPTH)}
    assert not run.server.version  # the first round changes nothing
    assert run.queries == 3 and run.flops > 0


def test_a_ranking_follows_the_scores_and_not_the_position(place):
    run = worlds.federation("fedpeptao", place, tokens=TOKENS)

    def ranked(*scores):
        uploads = [Upload(0, n, {run.method.scores: torch.tensor(found)}) for n, found in scores]
        return run.method._ranked(iter(uploads)).tolist()

    assert ranked((1, [1.0, 2.0])) == [1, 0, 2]
    assert ranked((3, [2.0, 1.0]), (1, [1.0, 3.0])) == [0, 1, 2]
    assert ranked((1, [2.0, 1.0]), (3, [1.0, 3.0])) == [1, 0, 2]
    assert ranked() == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"clients": 5, "federation": {"participation": 0.5, "dropout_rate": 0.3}},
        {"payload": "float16", "training": {"accumulation": 2}},
        {"others": "fixed"},
    ],
    ids=["sampled", "half", "fixed"],
)
def test_prediction_and_record_agree(options, place, padded):  # noqa: F811
    run = worlds.federation("fedpeptao", place, tokens=TOKENS, rounds=4, **options)
    run.run()
    found = predicted(run, place)
    agree(run, found)
    agree(run, predicted(run, place, positions=3))
    server = run.server
    assert found.server_bytes == sum(value.nbytes for value in server.state.values())
    assert found.kept_bytes == sum(
        v.nbytes for kept in dict(server.kept.items()).values() for v in kept.values()
    )
    assert found.models == sum(1 for _ in run.method.models(server))


@pytest.mark.slow
def test_both_scores_and_the_chosen_layers_are_in_the_record(tmp_path):
    study = load(
        tiny_study.write(
            tmp_path,
            methods={"fedpeptao": {"tokens": TOKENS, "share": 0.4}},
            federation={"clients": 2, "rounds": 3},
        )
    )
    (one,) = study.runs()
    folders = running.Folders(study.study, tmp_path / "results")
    running.execute(study, one, folders.record(one), folders, lambda line: None)
    record = json.loads(folders.record(one).read_text())
    chosen = [record["extra"][f"layer_{number}"] for number in range(DEPTH)]
    assert sorted(chosen) == [0, 0, 1]
    assert 0 <= record["extra"]["personal_score"] <= 1 and 0 <= record["test_score"] <= 1


@pytest.mark.parametrize("scored", ["shared", "personal"])
def test_one_score_is_that_of_the_servers_model_and_the_other_the_mean_over_the_clients(scored, place):
    run = worlds.federation("fedpeptao", place, tokens=TOKENS, rounds=2, layers=[0], scored=scored)
    run.run(test=False)
    assert run.further == {}  # a trial does not know the test split
    run.run()

    def score(model):
        return run.scorer.of_model(model, run.split.test)[run.data.metric]

    own = [score(model) for model in run.method._personal(run.server)]
    assert len(own) == 3
    expected = {"shared": score(run.server.tensors), "personal": pytest.approx(sum(own) / 3)}
    (other,) = run.further
    assert run.test[run.data.metric] == expected.pop(scored)
    assert run.further == {f"{name}_score": value for name, value in expected.items()}
    assert other == f"{'personal' if scored == 'shared' else 'shared'}_score"


@pytest.mark.parametrize("given", [[3], [-1], [1, 1]])
def test_layers_that_the_model_does_not_have_are_refused(given):
    kind = discover_methods()["fedpeptao"]
    facts = Facts("bert", "classification", DEPTH, HIDDEN, 128, False, DEPTH)
    with pytest.raises(UserError, match=r"layers: \[.*\]; allowed: numbers from 0 to 2"):
        kind(kind.Config(layers=given), 2, 0).check(facts)
    kind(kind.Config(layers=[2, 0]), 2, 0).check(facts)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"form": "prompt"}, "fedpeptao.form: 'prompt'; Input should be 'prefix'"),
        ({"share": 0.0}, "fedpeptao.share: 0.0; Input should be greater than 0"),
        (
            {"others": "fixed", "scored": "personal"},
            "fedpeptao: scored: personal with others: fixed; allowed: shared",
        ),
        (
            {"others": "fixed", "training": {"weight_decay": 0.1}},
            "fedpeptao: training.weight_decay: 0.1 with others: fixed; allowed: 0",
        ),
        ({"moments": "handed_on"}, "fedpeptao.moments: 'handed_on'; Input should be 'reset' or 'client'"),
    ],
)
def test_bad_settings_are_refused_before_any_job(values, message):
    found = faults(changed(methods={"fedpeptao": values}))
    assert any(message in fault for fault in found), found
