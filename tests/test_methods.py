"""Conformance: what every method must do, on a tiny random model.

The methods are those of the folder, or the one in the file that `--method-file` names:
`python -m fedlm test-method PATH` runs these tests on it and prints their names, so each name is a sentence.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy
import pytest
import torch
import worlds

from fedlm.exchange import payload
from fedlm.federation.checkpoint import Checkpoints
from fedlm.federation.method import Method
from fedlm.federation.turn import Turn
from fedlm.study.plugins import discover_methods, method_in

pytestmark = pytest.mark.slow

SETTINGS = {
    "blockllm": [{"selection": "coordinates"}, {"sparsity": 0.5, "moments": "client"}],
    "fedcybgd": [
        {"order": "random"},
        {"clients_per_block": 2},
        {"block": "model"},
        {"moments": "client"},
        {"moments": "handed_on"},
        {"pooled": True, "switch_every": 2},
        {"blocks_per_turn": 2, "order": "random"},
        {"order": "gradient"},
    ],
    "fedbpt": [{"corruption": 0.0, "population": 4}],
    "fedkseed": [{"pro": True, "seeds": 16}],
    "fedmezo": [{"variant": "ffa"}],
    "fedprox": [{"mu": 1.0}],
    "scaffold": [{"weights": "examples"}],
    "rtd": [{"store": "class_sums"}, {"heads": 4, "weight": 0.5, "neighbours": 3}],
    "sherl": [{"form": "plain", "gate": "open", "reduction": 2}, {"late": 2}, {"layers": [0]}],
    "slora": [{"sparse_rounds": 1}, {"sparse_rounds": 1, "mask": "own", "split": "even"}],
    "rsfllm": [
        {"variant": "v2", "blocks": 1, "noise_at": "both", "noisy_gradients": True},
        {"snr": None, "payload": "bfloat16", "weights": "examples"},
    ],
    "flasc": [{"download_density": 1.0, "upload_density": 0.4}, {"scored": "dense", "moments": "client"}],
    "embracingfl": [
        {"federation": {"budgets": [{"share": 0.4, "memory": "200 KB"}]}},
        {"federation": {"budgets": [{"share": 0.4, "memory": "240 KB"}]}, "activations": "recomputed"},
    ],
    "heterofl": [
        {"federation": {"budgets": [{"share": 0.4, "memory": "200 KB"}]}},
        {
            "federation": {"budgets": [{"share": 0.7, "memory": "160 KB"}]},
            "scaler": False,
            "weights": "examples",
        },
    ],
    "fedadapter": [{"placement": "feed_forward", "width": 3}],
    "fedpeptao": [{"share": 1.0}, {"layers": [2, 0], "moments": "reset"}],
    "fedlora": [{"variant": v} for v in ("ffa", "fedsa", "rolora", "flexlora", "fedex")],
    "fedprompt": [{"form": f, "tokens": 4} for f in ("prefix", "prefix_projected", "p_tuning")],
}
FAMILIES = [
    ("bert", "classification"),
    ("gpt2", "classification"),
    ("roberta", "regression"),
    ("llama", "causal"),
    ("bert", "question_answering"),
]


def id_of(name: str, settings: dict) -> str:
    """Return what a case is called: the method and the values of its settings."""
    return f"{name}-{'-'.join(map(str, settings.values()))}"


def kinds_of(method: type[Method]) -> list[tuple[str, str, str]]:
    """Return the method's name with each family of models and kind of task that it serves."""
    return [
        (method.name, family, kind)
        for family, kind in FAMILIES
        if kind in method.kinds
        # A decoder's classifier finds the last token by its number, which soft prompts do not have.
        and (method.name, family, kind) != ("fedprompt", "gpt2", "classification")
    ]


METHODS = discover_methods()
CASES = [(name, {}) for name in sorted(METHODS)]
CASES += [(name, settings) for name in sorted(METHODS) for settings in SETTINGS.get(name, [])]
IDS = [id_of(*case) for case in CASES]
KINDS = [case for name in sorted(METHODS) for case in kinds_of(METHODS[name])]


# What suits tiny models.
TINY = {
    "fedbpt": {"dimensions": 6, "tokens": 4, "population": 3, "iterations": 2},
    "fedpeptao": {"tokens": 4},
    "fedprompt": {"tokens": 4},
    "slora": {"density": 0.3},
}


def defaults(name: str, settings: dict) -> dict:
    return {**TINY.get(name, {}), **settings}


def pytest_generate_tests(metafunc):
    """Parametrise over the methods of the folder, or over the one from elsewhere with its settings."""
    file = metafunc.config.getoption("--method-file")
    if file:
        method, given = method_in(Path(file)), json.loads(metafunc.config.getoption("--method-settings"))
        cases = [(method, given)]
        kinds = [(method, given, family, kind) for _, family, kind in kinds_of(method)]
    else:
        cases = [(METHODS[name], defaults(name, settings)) for name, settings in CASES]
        kinds = [(METHODS[name], defaults(name, {}), family, kind) for name, family, kind in KINDS]
    if "case" in metafunc.fixturenames:
        ids = [id_of(method.name, settings) for method, settings in cases] if file else IDS
        metafunc.parametrize("case", cases, ids=ids, indirect=True, scope="module")
    if "family" in metafunc.fixturenames:
        ids = [f"{method.name}-{family}-{kind}" for method, _, family, kind in kinds]
        metafunc.parametrize(("method", "settings", "family", "kind"), kinds, ids=ids)


@pytest.fixture(scope="module")
def case(request, place) -> tuple[type[Method], dict, worlds.Federation]:
    """A method, its settings, and a finished run of it."""
    method, settings = request.param
    run = worlds.federation(method, place, **settings)
    run.run()
    return method, settings, run


class Watched(NamedTuple):
    """A second run of a case, with the lengths of what was encoded, and hashes of what the server had.

    The hashes are by round and cohort, in a list with one for each of the cohort's downloads.
    """

    run: worlds.Federation
    sent: list[int]
    states: dict[tuple, list[str]]


@pytest.fixture(scope="module")
def watched(case, place) -> Watched:
    method, settings, _ = case
    torch.rand(7)  # what happened before on the global generator must not matter
    run = worlds.federation(method, place, **settings)
    found = Watched(run, [], {})
    encode, send, probe = payload.encode, run.link.send, Turn.probe

    def recorded(tensors, precision="float32"):
        message = encode(tensors, precision)
        found.sent.append(len(message))
        return message

    def noted(client, round):
        cohort = next(tuple(c) for c in run.method.cohorts(run.sample(round), round) if client in c)
        found.states.setdefault((round, cohort), []).append(encode(run.server.tensors).sha256())
        return send(client, round)

    def unseen(*arguments):
        before = len(found.sent)
        probe(*arguments)
        del found.sent[before:]  # a probe's messages go nowhere

    run.link.send = noted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(payload, "encode", recorded)
        patch.setattr(Turn, "probe", unseen)
        run.run()
    return found


def test_a_round_runs_on_every_kind_of_task_that_the_method_claims(method, settings, family, kind, place):
    run = worlds.federation(method, place, family=family, kind=kind, rounds=1, **settings)
    run.run()
    assert numpy.isfinite(run.test[run.data.metric]), "the score is not a finite number"
    assert run.rounds[0]["train_loss"] > 0, "the training loss is 0, as where a turn trains nothing"


def test_what_is_trained_changes_and_nothing_else_does(case):
    method, settings, run = case
    if not run.method.exchanged:  # nothing is trained: the server has what its clients stored
        assert run.server.state and not run.server.tensors
        return
    if run.server.kept and not run.server.version:  # nothing is merged: each client has its own model
        changed = {n for kept in run.server.kept.values() for n in kept}
        assert changed == set(run.method.exchanged)
        for kept in run.server.kept.values():
            assert all(not torch.equal(kept[n], run.server.initial[n]) for n in kept if n.endswith("weight"))
        return
    segments = [
        segment
        for turn in (1, 2)
        for client in range(len(run.parts))
        for segment in run.method.segments(client, turn, 100)
    ]
    claimed = {name for segment in segments for name in segment.trainable}
    assert claimed, "no client trains any parameter"
    # What a segment only measures is not among what the client updates.
    claimed &= {name for c in range(len(run.parts)) for r in (1, 2) for name in run.method.trainable(c, r)}
    foreign = claimed - set(run.method.exchanged)
    assert not foreign, f"trained, but frozen by `adapt`: {some(foreign)}"
    changed = {
        name
        for name in run.method.exchanged
        if not torch.equal(run.server.tensors[name], run.server.initial[name])
    }
    if settings.get("variant") == "fedex":
        claimed |= {name for name in run.method.exchanged if "base_layer" in name}
    if settings.get("variant") == "fedsa":
        claimed = {name for name in claimed if "lora_B" not in name}
    assert changed <= claimed, f"changed on the server, but trained by no client: {some(changed - claimed)}"
    if settings.get("sparse_rounds") == 1:  # after which the matrices get their first values back
        claimed = {name for name in claimed if "base_layer" not in name}
    # A key's bias has no influence on attention, so its gradient is nothing but rounding.
    still = {
        n for n in claimed - changed if "key.bias" not in n and "token_type" not in n and "pooler" not in n
    }
    if settings.get("order") == "gradient":  # nobody need choose a block
        still = set()
    if settings.get("switch_every"):  # few steps do not reach all blocks
        still = {name for name in still if ".2." not in name}
    assert not still, f"trained by a client, but unchanged on the server: {some(still)}"


def some(names) -> str:
    """Return the first names, and how many there are."""
    return f"{', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''} ({len(names)})"


def uploads(method, place, settings, **changes) -> list[tuple[set[str], dict, dict]]:
    """Return of each turn the names trained, their values afterwards, and what is uploaded."""
    run = worlds.federation(method, place, rounds=1, **settings, **changes)
    upload, found = run.method.upload, []

    def noted(turn):
        segments = run.method.segments(turn.client, turn.round, turn.steps)
        trained = {name for segment in segments for name in segment.trainable}
        values = {name: value.clone() for name, value in turn.values(sorted(trained)).items()}
        sent = upload(turn)
        known = {name: turn.received[name] for name in payload.changed(sent)}
        expected = run.link.expected("up", turn.client)
        arrived = payload.decode(payload.encode(sent), expected, own=True, known=known)
        found.append((trained, values, arrived))
        return sent

    run.method.upload = noted
    run.run()
    return found


def test_an_upload_is_what_the_client_trained(case, place):
    """Or, where the method has a merge of its own for it, depends on what the client trained."""
    method, settings, _ = case
    turns = uploads(method, place, settings)
    faults = []
    for trained, values, sent in turns:
        names = {name for name in sent if "@" not in name}  # the optimizer's state of a parameter has an @
        if names - trained:
            faults.append(f"uploaded, but not trained in this turn: {some(names - trained)}")
        wrong = {name for name in names & trained if not torch.equal(sent[name], values[name])}
        if wrong:
            faults.append(f"the uploaded values are not those that the client trained: {some(wrong)}")
    assert turns
    trains = any(trained for trained, *_ in turns)
    if method.merge is Method.merge:
        assert not faults, faults[0]
    elif faults and trains:
        # Other batches, for methods that have no rate.
        others = uploads(method, place, settings, training={"learning_rate": 3e-3, "batch_size": 5})
        for (*_, one), (*_, other) in zip(turns, others, strict=True):
            depends = any(not torch.equal(one[name], other[name]) for name in one.keys() & other.keys())
            assert depends, "the upload is the same whatever the client trains"


def test_frozen_parameters_of_the_resident_model_never_change(case, place):
    method, settings, run = case
    fresh = worlds.federation(method, place, **settings)
    for parameter, value in run.model.named_parameters():
        if parameter not in run.method.exchanged:
            assert torch.equal(value, dict(fresh.model.named_parameters())[parameter]), parameter


def test_two_runs_with_one_seed_give_the_same_bytes(case, watched):
    _, _, run = case
    assert payload.encode(watched.run.server.tensors).sha256() == payload.encode(run.server.tensors).sha256()
    assert outcome(watched.run) == outcome(run)


def test_a_resumed_run_gives_the_same_bytes(case, place, tmp_path):
    method, settings, run = case
    interrupted = worlds.federation(method, place, rounds=2, **settings)
    interrupted.settings = interrupted.settings.model_copy(update={"rounds": 1})
    checkpoints = Checkpoints(tmp_path, "fingerprint", print)
    full = worlds.federation(method, place, **settings)

    class Killed(Exception):
        pass

    def stop(line):
        if line.startswith("round 2"):
            raise Killed

    first = worlds.federation(method, place, log=stop, **settings)
    with pytest.raises(Killed):
        first.run(checkpoints)
    full.run(checkpoints)
    assert payload.encode(full.server.tensors).sha256() == payload.encode(run.server.tensors).sha256()
    assert outcome(full) == outcome(run)


def outcome(run) -> tuple:
    """Return everything but times."""
    rounds = [{key: value for key, value in row.items() if key != "seconds"} for row in run.rounds]
    return rounds, run.test, run.baseline, run.flops, run.ledger.broadcast, run.instruments.memory


def test_the_ledger_is_the_length_of_what_was_sent(watched):
    ledger = watched.run.ledger
    assert sum(watched.sent) == ledger.upload + ledger.download
    rows = [row for turn in watched.run.rounds for row in turn["payloads"]]
    assert sum(row[1] for row in rows) == ledger.download
    assert sum(row[2] for row in rows) == ledger.upload
    assert ledger.broadcast == len({row[0] for row in rows}) * ledger.broadcast_size


def test_nothing_but_payloads_changes_hands(case, place):
    """A client's copy is rebuilt from what it received: rubbish left in the resident model has no effect."""
    method, settings, run = case
    dirty = worlds.federation(method, place, **settings)
    turn = dirty._turn

    def spoiled(client, round):
        with torch.no_grad():
            for parameter in dirty.method.exchanged:
                dirty.parameters[parameter].fill_(7.0)
        return turn(client, round)

    dirty._turn = spoiled
    dirty.run()
    assert payload.encode(dirty.server.tensors).sha256() == payload.encode(run.server.tensors).sha256()


def test_the_cohort_starts_from_one_server_state(watched):
    """No turn of a cohort sees what another of the same cohort uploaded."""
    assert watched.states
    for (_, cohort), states in watched.states.items():
        assert len(states) == len(cohort) and len(set(states)) == 1
