"""Client caches: exactly what a client has not got travels, and nothing is lost by it."""

import gc
import json

import pytest
import torch
import worlds

from fedlm.exchange import payload
from fedlm.federation.link import NO_VERSION
from fedlm.federation.state import Segment
from fedlm.federation.turn import Turn
from methods.fedavg import FedAvg

CACHES = ("none", "pretrained", "last_visit")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Leave out the memory probe, which takes most of a tiny turn and changes nothing that is sent."""
    monkeypatch.setattr(Turn, "probe", lambda self, segments, train: None)


class Diary:
    """Works out by itself what each client has, from what it saw happen, and what must be sent next.

    A parameter's content is known by the event that made it: the server's n-th update of it, or 0 before.
    """

    def __init__(self, run, lossy=()):
        self.run, self.lossy = run, lossy
        self.event = dict.fromkeys(run.server.initial, 0)  # of the server's value
        self.has = {}  # client: name: (event, exactly)
        self.turns = 0
        self.resent = 0
        update, send = run.server.update, run.link.send

        def noted(name, value):
            update(name, value)
            self.event[name] = self.event.get(name, 0) + 1

        run.server.update = noted
        run.link.send = lambda client, round: self.check(client, round, send)
        merge = run._merge

        def merged(cohort, round):
            merge(cohort, round)
            if len(cohort) == 1 and cohort[0] not in run.dropped:
                names = run.method.trainable(cohort[0], round)
                self.has[cohort[0]].update({name: (self.event[name], True) for name in names})

        run._merge = merged

    def check(self, client, round, send):
        has = self.has.setdefault(client, dict.fromkeys(self.event, (0, True)))
        trained = self.run.method.trainable(client, round)
        wanted = set()
        for name, event in self.event.items():
            have, exactly = has[name]
            if have != event or (name in trained and not exactly):
                wanted.add(name)
                self.resent += have == event
                has[name] = (event, name in trained or name not in self.lossy)
        message = send(client, round)
        assert set(payload.decode(message, self.run.server.initial)) == wanted
        assert len(message) == self.run.ledger_size(wanted, trained)
        self.turns += 1
        return message


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"order": "shifted"},
        {"order": "random", "participation": 0.5},
        {"order": "rotating", "dropout_rate": 0.4},
        {"order": "rotating", "clients_per_block": 2, "dropout_rate": 0.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("operator", [None, "prune", "quantize"])
def test_last_visit_sends_exactly_what_changed_since(operator, options, place):
    options = dict(options)
    settings = {key: options.pop(key) for key in ("participation", "dropout_rate") if key in options}
    compression = {"operator": operator} if operator else None
    run = worlds.federation(
        "fedcybgd",
        place,
        clients=5,
        rounds=5,
        cache="last_visit",
        compression=compression,
        federation=settings,
        training={"local_steps": 1, "score_every": 9},
        **options,
    )
    linear = run.link.linear if operator else {}
    matrices = [name for name in run.server.initial if name in linear and "layer." in name]

    def size(names, trained):
        def form(name, value):
            if name not in matrices or name in trained:
                return value
            if operator == "quantize":
                return payload.Quantized(value)
            mask = torch.zeros_like(value, dtype=torch.bool)
            mask[:, ::2] = True  # half of each row
            return payload.Pruned(value, mask)

        return payload.size({name: form(name, run.server.initial[name]) for name in names})

    run.ledger_size = size
    diary = Diary(run, matrices)
    run.run()
    assert diary.turns == sum(len(row["clients"]) for row in run.rounds)
    if settings.get("dropout_rate"):
        assert any(row["dropped"] for row in run.rounds)
    if operator and options.get("order") == "rotating":
        assert diary.resent  # a lossy copy of what it must now train


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("fedcybgd", {"order": "shifted"}),
        ("fedcybgd", {"order": "shifted", "moments": "handed_on"}),
        ("fedcybgd", {"order": "rotating", "clients_per_block": 2}),
        ("fedavg", {}),
        ("fedlora", {}),
        ("fedlora", {"variant": "fedsa"}),
        ("fedlora", {"variant": "fedex"}),
        ("fedlora", {"variant": "rolora"}),
        ("local_only", {}),
    ],
    ids=str,
)
def test_caches_change_the_bytes_and_nothing_else(method, settings, place):
    runs = []
    for cache in CACHES:
        run = worlds.federation(
            method,
            place,
            cache=cache,
            rounds=3,
            federation={"dropout_rate": 0.2},
            training={"local_steps": 2},
            **settings,
        )
        run.run()
        runs.append(run)
    none, pretrained, last_visit = runs
    results = {payload.encode(run.server.tensors).sha256() for run in runs}
    assert len(results) == 1
    assert [run.test for run in runs] == [none.test] * 3
    assert [run.ledger.upload for run in runs] == [none.ledger.upload] * 3
    assert last_visit.ledger.download <= pretrained.ledger.download <= none.ledger.download
    if method == "fedcybgd":
        assert last_visit.ledger.download < pretrained.ledger.download < none.ledger.download


@pytest.mark.slow
def test_pretrained_costs_nothing_for_what_never_changed(place):
    run = worlds.federation("fedcybgd", place, cache="pretrained", rounds=1)
    run.run()
    down = [row[1] for row in run.rounds[0]["payloads"]]
    layers = [run.method.anatomy.blocks[i].parameters for i in range(3)]
    head = run.method.anatomy.head
    expected = [
        0,
        payload.size({name: run.server.initial[name] for name in (*layers[0], *head)}),
        payload.size({name: run.server.initial[name] for name in (*layers[0], *layers[1], *head)}),
    ]
    assert down == expected


@pytest.mark.slow
def test_an_update_that_the_server_changes_is_sent_back(place):
    class Damped(FedAvg):
        """Takes half of each change."""

        title = "Damped"

        def merge(self, server, uploads, round):
            before = dict(server.tensors)
            super().merge(server, uploads, round)
            for name in before:
                server.tensors[name] = (before[name] + server.tensors[name]) / 2

    pooled = {"scheme": {"scheme": "pooled"}, "rounds": 3, "training": {"local_steps": 1}}
    plain = worlds.federation("fedavg", place, cache="last_visit", **pooled)
    damped = worlds.federation(Damped, place, cache="last_visit", **pooled)
    plain.run(), damped.run()
    assert [row["download_bytes"] for row in plain.rounds] == [0, 0, 0]
    changed = [row["download_bytes"] for row in damped.rounds]
    whole = payload.size(damped.server.initial)
    assert changed[0] == 0 and all(0.9 * whole < size <= whole for size in changed[1:])


def test_what_a_method_makes_for_one_turn_is_always_sent(place):
    class Halved(FedAvg):
        """Sends a value that is no version of the server's."""

        title = "Halved"

        def download(self, server, client, round):
            made = {"classifier.weight": server.tensors["classifier.weight"] / 2} if round < 3 else {}
            return {**server.tensors, **made}

    for cache in ("pretrained", "last_visit"):
        run = worlds.federation(
            Halved, place, cache=cache, rounds=1, scheme={"scheme": "pooled"}, training={"local_steps": 1}
        )
        for round in (1, 2, 3):
            message = run.link.send(0, round)
            sent = payload.decode(message, run.server.initial)
            values = run.link.receive(0, message)
            expected = run.server.initial["classifier.weight"] / (2 if round < 3 else 1)
            assert torch.equal(values["classifier.weight"], expected)
            # The client of the last visit has to be given the server's own value again.
            assert len(sent) == (1 if round < 3 or cache == "last_visit" else 0)
            if cache == "last_visit" and round < 3:
                assert run.link.seen[0]["classifier.weight"] == (NO_VERSION, True)


def test_a_stale_block_stays_as_the_client_last_had_it(place):
    run = worlds.federation(
        "fedcybgd", place, cache="last_visit", compression={"operator": "stale", "share": 0.0}
    )
    first = run.server.initial
    for round, step in ((1, 1.0), (2, 2.0)):
        for name in run.server.initial:
            run.server.update(name, first[name] + step)
        message = run.link.send(0, round)
        values = run.link.receive(0, message)
        own = set(run.method.trainable(0, round))
        assert set(payload.decode(message, first)) == own
        for name, value in values.items():
            assert torch.equal(value, run.server.tensors[name] if name in own else first[name])
    run.link.config = run.method.config.model_copy(update={"compression": None})
    run.link.receive(0, run.link.send(0, 3))
    for name in run.server.initial:
        run.server.update(name, first[name] + 3)
    run.link.config = run.method.config
    values = run.link.receive(0, run.link.send(0, 4))
    for name, value in values.items():
        assert torch.equal(value, first[name] + (3 if name in own else 2)), name


@pytest.mark.slow
def test_many_clients_cost_nothing_where_nothing_is_kept(place):
    for cache in ("none", "pretrained"):
        run = worlds.federation("fedcybgd", place, cache=cache, compression={"operator": "quantize"})
        for client in range(1000):
            message = run.link.send(client, 1)
            run.link.receive(client, message)
        assert not run.link.seen and not run.link.copies
        assert run.link.state() == ({}, {"seen": {}, "copies": {}})
        assert not run.server.store.live


def test_clients_of_the_last_visit_share_what_is_the_same(place):
    run = worlds.federation("fedavg", place, cache="last_visit")
    for name, value in run.server.initial.items():
        run.server.update(name, value + 1)
    for client in range(50):
        run.link.receive(client, run.link.send(client, 1))
    kept = [copy for copies in run.link.copies.values() for copy in copies.values()]
    assert len(kept) == 50 * len(run.server.initial)
    assert {id(copy.load()) for copy in kept} == {id(value) for value in run.server.tensors.values()}
    assert not run.server.store.live


def test_a_version_is_stored_once_while_a_client_has_it(place):
    run = worlds.federation("fedavg", place, cache="last_visit")
    store, name = run.server.store, "classifier.weight"
    first = run.server.initial[name]

    def updated(step):
        run.server.update(name, first + step)
        run.link.merged([0, 1, 2])

    def visited(*clients):
        for client in clients:
            values = run.link.receive(client, run.link.send(client, 1))
            assert torch.equal(values[name], run.server.tensors[name])

    updated(1)
    updated(2)
    visited(0, 1)
    assert not store.live  # nobody had the first update, and the second is the server's
    updated(3)
    assert len(store.live) == 1
    visited(1, 2)
    assert run.link.copies[1][name] is run.link.copies[2][name]
    assert torch.equal(run.link.copies[0][name].load(), first + 2)
    updated(4)
    assert len(store.live) == 2 == len(list(store.folder.iterdir()))
    visited(0, 1, 2)
    assert not store.live and not list(store.folder.iterdir())


def test_reduced_copies_of_many_clients_are_stored_once(place):
    run = worlds.federation("fedcybgd", place, cache="last_visit", compression={"operator": "quantize"})
    for name, value in run.server.initial.items():
        run.server.update(name, value + 1)
    for client in range(30):
        run.link.receive(client, run.link.send(client, 1))
    reduced = {id(copy) for held in run.link.copies.values() for copy in held.values()}
    assert len(reduced) <= 2 * len(run.server.initial)
    # One by the first client, one with the block that the first had exactly.
    assert len(run.server.store.live) == 2


MANY = [
    ("local_only", {}),
    ("scaffold", {}),
    ("fedavg", {"cache": "last_visit", "payload": "bfloat16"}),
    ("fedcybgd", {"cache": "last_visit", "order": "shifted", "moments": "client"}),
]


def crowd(method, place, clients, **settings):
    """Return a federation of many clients, who share the few examples there are."""
    run = worlds.federation(method, place, training={"local_steps": 1, "batch_size": 2}, **settings)
    run.parts = [run.parts[client % 3][:2] for client in range(clients)]
    run.method.clients = clients
    return run


def live_bytes() -> int:
    """Return the bytes of all tensors of this process; what is mapped from a file counts like any other."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and not thing.is_meta:
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(found.values())


@pytest.mark.slow
@pytest.mark.parametrize(("method", "settings"), MANY, ids=str)
def test_memory_does_not_grow_with_the_clients(method, settings, place):
    found = {}
    few, many = (40, 400) if "cache" in settings else (20, 200)
    for clients in (few, many):
        before = live_bytes()
        run = crowd(method, place, clients, **settings)
        for round in (1, 2):
            run.play(round)
        found[clients] = live_bytes() - before
        assert run.server.store.live  # what they keep is somewhere
        del run
    assert 0 < found[many] <= 1.15 * found[few]


@pytest.mark.slow
def test_ten_thousand_clients_of_the_last_visit(place):
    run = crowd("fedcybgd", place, 10_000, cache="last_visit")
    run.settings = run.settings.model_copy(update={"participation": 0.1})
    run.play(1)
    assert len(run.link.copies) == 1_000 and run.ledger.upload > 0


@pytest.mark.slow
def test_the_state_survives_json(place):
    run = worlds.federation("fedcybgd", place, cache="last_visit", compression={"operator": "prune"})
    run.run()
    values, plain = run.link.state()
    fresh = worlds.federation("fedcybgd", place, cache="last_visit", compression={"operator": "prune"})
    fresh.server.tensors = run.server.tensors
    fresh.link.restore(values, json.loads(json.dumps(plain)))
    assert fresh.link.seen == run.link.seen and fresh.link.seen[0]
    assert fresh.link.copies.keys() == run.link.copies.keys()
    for client, held in run.link.copies.items():
        again = fresh.link.copies[client]
        assert all(torch.equal(again[name].load(), copy.load()) for name, copy in held.items())
        assert again.keys() == held.keys()
    exact = {exactly for seen in run.link.seen.values() for _, exactly in seen.values()}
    assert exact == {True, False}


@pytest.mark.parametrize("cache", ["none", "last_visit"])
def test_what_the_model_already_is_is_not_written_again(cache, place):
    """A turn writes what merging changed and what the turn before it trained, whatever is sent again."""
    run = worlds.federation("fedcybgd", place, clients=4, rounds=2, cache=cache, order="rotating")
    trained, written, versions = [], [], [dict(run.server.version)]
    load, train = run.load, run.method.train

    def loading(values):
        before = {name: run.parameters[name]._version for name in values}
        load(values)
        written.append({name for name in values if run.parameters[name]._version != before[name]})
        versions.append(dict(run.server.version))

    def training(turn):
        trained.append(set(run.method.trainable(turn.client, turn.round)))
        train(turn)

    run.load, run.method.train = loading, training
    run.play(1)
    run.play(2)
    assert len(written) == len(trained) == 8
    assert written[0] == set(run.server.initial)
    for turn in range(1, 8):
        old, new = versions[turn], versions[turn + 1]
        merged = {name for name in new if new[name] != old.get(name, 0)}
        assert written[turn] == merged | trained[turn - 1]
        assert len(written[turn]) < len(written[0]) / 2
    values = run.link.receive(0, run.link.send(0, 3))
    run.load(values)
    assert all(torch.equal(run.parameters[name], value) for name, value in values.items())


@pytest.mark.parametrize("options", [{}, {"optimizer": "sgd", "learning_rate": 0.1}])
def test_every_change_of_the_model_is_noticed(options, place):
    """An optimizer's step, fused or not, and a copy: the next turn starts from the server's values again."""
    run = worlds.federation("fedavg", place, rounds=1, training=options)
    run.load(run.server.tensors)
    run.method.segments = lambda client, round, steps: []  # nothing is said to be trained
    names = run.method.trainable(0, 1)
    run.method.train = lambda turn: turn.fit(Segment("all", names, turn.steps))
    run._turn(0, 1)
    assert not torch.equal(run.parameters["classifier.weight"], run.server.tensors["classifier.weight"])
    run.load(run.server.tensors)
    for name, value in run.server.tensors.items():
        assert torch.equal(run.parameters[name], value), name
