"""Conformance: what every method found in the folder must do, on a tiny random model."""

import numpy
import pytest
import torch
import worlds

from fedlm.exchange import payload
from fedlm.federation.checkpoint import Checkpoints
from fedlm.study.plugins import discover_methods

METHODS = sorted(discover_methods())
SETTINGS = {
    "fedcybgd": [
        {"order": "random"},
        {"clients_per_block": 2},
        {"block": "model"},
        {"moments": "client"},
        {"moments": "handed_on"},
        {"pooled": True, "switch_every": 2},
        {"blocks_per_turn": 2, "order": "random"},
    ],
    "fedadapter": [{"placement": "feed_forward", "width": 3}],
    "fedlora": [{"variant": v} for v in ("ffa", "fedsa", "rolora", "flexlora", "fedex")],
    "fedprompt": [{"form": f, "tokens": 4} for f in ("prefix", "prefix_projected", "p_tuning")],
}
CASES = [(name, {}) for name in METHODS]
CASES += [(name, settings) for name in METHODS for settings in SETTINGS.get(name, [])]
IDS = [f"{name}-{'-'.join(map(str, settings.values()))}" for name, settings in CASES]
KINDS = [
    (name, family, kind)
    for name in METHODS
    for family, kind in [
        ("bert", "classification"),
        ("gpt2", "classification"),
        ("roberta", "regression"),
        ("llama", "causal"),
        ("bert", "question_answering"),
    ]
    if kind in discover_methods()[name].kinds
    # A decoder's classifier finds the last token by its number, which soft prompts do not have.
    and (name, family, kind) != ("fedprompt", "gpt2", "classification")
]


def defaults(name: str, settings: dict) -> dict:
    return {"tokens": 4, **settings} if name == "fedprompt" else settings


@pytest.fixture(scope="module", params=list(zip(CASES, IDS, strict=True)), ids=IDS)
def case(request, place):
    (name, settings), _ = request.param
    run = worlds.federation(name, place, **defaults(name, settings))
    run.run()
    return name, defaults(name, settings), run


@pytest.mark.parametrize(("name", "family", "kind"), KINDS)
def test_a_round_runs_on_every_kind_of_task_that_the_method_claims(name, family, kind, place):
    run = worlds.federation(name, place, family=family, kind=kind, rounds=1, **defaults(name, {}))
    run.run()
    assert numpy.isfinite(run.test[run.data.metric])
    assert run.rounds[0]["train_loss"] > 0


def test_what_is_trained_changes_and_nothing_else_does(case):
    name, settings, run = case
    if name == "local_only":
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
    assert claimed <= set(run.method.exchanged)
    changed = {
        name
        for name in run.method.exchanged
        if not torch.equal(run.server.tensors[name], run.server.initial[name])
    }
    if settings.get("variant") == "fedex":
        claimed |= {name for name in run.method.exchanged if "base_layer" in name}
    if settings.get("variant") == "fedsa":
        claimed = {name for name in claimed if "lora_B" not in name}
    assert changed <= claimed
    # A key's bias has no influence on attention, so its gradient is nothing but rounding.
    still = {
        n for n in claimed - changed if "key.bias" not in n and "token_type" not in n and "pooler" not in n
    }
    if settings.get("switch_every"):  # few steps do not reach all blocks
        still = {name for name in still if ".2." not in name}
    assert not still


def test_frozen_parameters_of_the_resident_model_never_change(case, place):
    name, settings, run = case
    fresh = worlds.federation(name, place, **settings)
    for parameter, value in run.model.named_parameters():
        if parameter not in run.method.exchanged:
            assert torch.equal(value, dict(fresh.model.named_parameters())[parameter]), parameter


def test_two_runs_with_one_seed_give_the_same_bytes(case, place):
    name, settings, run = case
    torch.rand(7)  # what happened before on the global generator must not matter
    again = worlds.federation(name, place, **settings)
    again.run()
    assert payload.encode(again.server.tensors).sha256() == payload.encode(run.server.tensors).sha256()
    assert books(again) == books(run)


def test_a_resumed_run_gives_the_same_bytes(case, place, tmp_path):
    name, settings, run = case
    interrupted = worlds.federation(name, place, rounds=2, **settings)
    interrupted.settings = interrupted.settings.model_copy(update={"rounds": 1})
    checkpoints = Checkpoints(tmp_path, "fingerprint", print)
    full = worlds.federation(name, place, **settings)

    class Killed(Exception):
        pass

    def stop(line):
        if line.startswith("round 2"):
            raise Killed

    first = worlds.federation(name, place, log=stop, **settings)
    with pytest.raises(Killed):
        first.run(checkpoints)
    full.run(checkpoints)
    assert payload.encode(full.server.tensors).sha256() == payload.encode(run.server.tensors).sha256()
    assert books(full) == books(run)


def books(run) -> tuple:
    """Return everything but times."""
    rounds = [{key: value for key, value in row.items() if key != "seconds"} for row in run.rounds]
    return rounds, run.test, run.baseline, run.flops, run.ledger.broadcast, run.instruments.memory


def test_the_ledger_is_the_length_of_what_was_sent(case, place, monkeypatch):
    name, settings, run = case
    sent = []
    encode = payload.encode

    def recorded(tensors, precision="float32"):
        message = encode(tensors, precision)
        sent.append(len(message))
        return message

    monkeypatch.setattr(payload, "encode", recorded)
    again = worlds.federation(name, place, **settings)
    again.run()
    assert sum(sent) == again.ledger.upload + again.ledger.download
    rows = [row for turn in again.rounds for row in turn["payloads"]]
    assert sum(row[1] for row in rows) == again.ledger.download
    assert sum(row[2] for row in rows) == again.ledger.upload
    assert again.ledger.broadcast == len({row[0] for row in rows}) * again.ledger.broadcast_size


def test_nothing_but_payloads_changes_hands(case, place):
    """A client's copy is rebuilt from what it received: rubbish left in the resident model has no effect."""
    name, settings, run = case
    dirty = worlds.federation(name, place, **settings)
    turn = dirty._turn

    def spoiled(client, round):
        with torch.no_grad():
            for parameter in dirty.method.exchanged:
                dirty.parameters[parameter].fill_(7.0)
        return turn(client, round)

    dirty._turn = spoiled
    dirty.run()
    assert payload.encode(dirty.server.tensors).sha256() == payload.encode(run.server.tensors).sha256()


def test_the_cohort_starts_from_one_server_state(case, place):
    """No turn of a cohort sees what another of the same cohort uploaded."""
    name, settings, _ = case
    run = worlds.federation(name, place, **settings)
    seen: dict = {}
    send = run.link.send

    def noted(client, round):
        state = {name: value.clone() for name, value in run.server.tensors.items()}
        cohort = next(tuple(c) for c in run.method.cohorts(run.sample(round), round) if client in c)
        before = seen.setdefault((round, cohort), state)
        assert before.keys() == state.keys()
        assert all(torch.equal(before[name], state[name]) for name in state)
        return send(client, round)

    run.link.send = noted
    run.run()
    assert seen
