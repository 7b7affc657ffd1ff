"""SLoRA: sparse tuning under one mask, then LoRA from its truncated SVD (arXiv:2308.06522)."""

import json

import numpy
import pytest
import tiny_study
import torch
import worlds

from fedlm.base.errors import UserError
from fedlm.exchange import payload
from fedlm.federation.settings import Training
from fedlm.jobs import running
from fedlm.study.plugins import discover_methods
from fedlm.study.reading import load

pytestmark = pytest.mark.usefixtures("one_thread")
RANK, ALPHA = 2, 8
SETTINGS = {"rank": RANK, "alpha": ALPHA, "density": 0.2, "sparse_rounds": 2}


def run(place, rounds, **changes):
    found = worlds.federation("slora", place, rounds=rounds, **{**SETTINGS, **changes})
    found.run()
    return found


def products(found) -> dict[str, torch.Tensor]:
    """Return what LoRA adds to each matrix, in the shape in which the module holds it."""
    method, tensors = found.method, found.server.tensors
    made = {}
    for module, name in zip(method.adapted, method.tuned, strict=True):
        a, b = (tensors[one] for one in method._names(module))
        product = ALPHA / RANK * b @ a
        made[name] = product.T if method.adapted[module] else product
    return made


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("server", [None, {"name": "adamw", "learning_rate": 0.1, "weight_decay": 0.5}])
def test_entries_outside_the_mask_never_change(family, server, place):
    found = run(place, 1, family=family, federation={"server_optimizer": server} if server else None)
    method, server = found.method, found.server
    for name in method.tuned:
        mask = torch.zeros(method.shapes[name], dtype=torch.bool)
        mask.view(-1)[method._positions(name)] = True
        changed = server.tensors[name] != server.initial[name]
        assert not (changed & ~mask).any() and changed[mask].all()
        assert 0.1 < mask.float().mean() < 0.3


def test_all_clients_have_the_same_mask_and_only_its_entries_travel(place):
    found = run(place, 1)
    method = found.method
    entries = sum(len(method._positions(name)) for name in method.tuned)
    head = {name: found.server.tensors[name] for name in method.head}
    size = payload.size({**head, "entries": torch.empty(entries)})
    assert found.ledger.upload == found.ledger.download == 3 * size
    own = run(place, 1, mask="own")
    dense = {name: own.server.tensors[name] for name in (*method.tuned, *method.head)}
    assert own.ledger.upload == own.ledger.download == 3 * payload.size(dense)
    for name in method.tuned:
        # Three masks of 0.2: together they reach more than one.
        share = (own.server.tensors[name] != own.server.initial[name]).float().mean()
        assert share > 0.3


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("split", ["left", "even"])
def test_the_switch_is_the_best_approximation_of_that_rank(family, split, place):
    before = worlds.federation("slora", place, rounds=2, family=family, split=split, **SETTINGS)
    switch, changes = before.method._switch, {}

    def noted(server):
        changes.update({n: server.tensors[n] - server.initial[n] for n in before.method.tuned})
        switch(server)

    before.method._switch = noted
    before.run()
    kept = whole = 0.0
    for name, product in products(before).items():
        assert torch.equal(before.server.tensors[name], before.server.initial[name])
        u, s, v = numpy.linalg.svd(changes[name].numpy())
        best = u[:, :RANK] * s[:RANK] @ v[:RANK]
        numpy.testing.assert_allclose(product.numpy(), best, atol=1e-6)
        residual = float(((changes[name] - product) ** 2).sum())
        assert residual == pytest.approx(float((s[RANK:] ** 2).sum()), rel=1e-3)
        kept, whole = kept + float((s[:RANK] ** 2).sum()), whole + float((s**2).sum())
    assert before.method.extra(before.server) == {"kept_of_update": pytest.approx(kept / whole, rel=1e-4)}


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_change_of_low_rank_passes_the_switch_unchanged(family, place):
    found = worlds.federation("slora", place, rounds=2, family=family, **SETTINGS)
    server, method = found.server, found.method
    stream = torch.Generator().manual_seed(3)
    for name in method.tuned:
        rows, columns = method.shapes[name]
        change = torch.randn(rows, RANK, generator=stream) @ torch.randn(RANK, columns, generator=stream)
        server.update(name, server.initial[name] + 0.05 * change)
    batch = found.make_batch(found.split.validation[:8])

    def outputs():
        found.load({name: server.tensors[name] for name in method.exchanged})
        with torch.no_grad():
            return found.model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits

    before = outputs()
    method._switch(server)
    torch.testing.assert_close(outputs(), before, atol=2e-5, rtol=0)
    assert method.extra(server)["kept_of_update"] == pytest.approx(1, abs=1e-5)


def test_without_stage_one_it_is_fedlora_bit_for_bit(place):
    settings = {"rank": RANK, "alpha": ALPHA, "rounds": 2}
    plain = worlds.federation("fedlora", place, **settings)
    plain.run()
    found = worlds.federation("slora", place, sparse_rounds=0, **settings)
    found.run()
    assert payload.encode(found.server.tensors).sha256() == payload.encode(plain.server.tensors).sha256()
    assert found.ledger.upload == plain.ledger.upload


def test_the_rank_may_be_above_that_of_a_matrix(place):
    """A tiny model's matrices are 16 x 16: the switch finds 16 products, and the others still train."""
    found = run(place, 2, sparse_rounds=1, rank=24)
    a, b = (found.server.tensors[name] for name in found.method._names(next(iter(found.method.adapted))))
    assert a.shape == (24, 16) and b.shape == (16, 24)
    assert (b != 0).any(0).all() and a.any(1).all()


def test_nothing_learned_in_stage_one_leaves_a_start_that_trains(place):
    found = run(place, 3, sparse_rounds=1, split="even", training={"learning_rate": 0.0 + 1e-12})
    assert found.method.extra(found.server).keys() <= {"kept_of_update"}
    fresh = worlds.federation("slora", place, rounds=2, split="even", **SETTINGS)
    fresh.method._switch(fresh.server)
    a = fresh.method._names(next(iter(fresh.method.adapted)))[0]
    assert torch.equal(fresh.server.tensors[a], fresh.server.initial[a]) and fresh.server.tensors[a].any()


def test_decay_is_refused():
    kind = discover_methods()["slora"]
    with pytest.raises(UserError, match=r"weight_decay: 0.01; allowed: 0"):
        kind(kind.Config(), 2, 0).check_training(Training(weight_decay=0.01))
    kind(kind.Config(sparse_rounds=0), 2, 0).check_training(Training(weight_decay=0.01))


@pytest.mark.slow
def test_what_the_approximation_keeps_is_in_the_record(tmp_path):
    study = load(
        tiny_study.write(
            tmp_path,
            methods={"slora": {"sparse_rounds": 1, "rank": 2, "density": 0.3}},
            federation={"clients": 2, "rounds": 2},
        )
    )
    (one,) = study.runs()
    folders = running.Folders(study.study, tmp_path / "results")
    running.execute(study, one, folders.record(one), folders, lambda line: None)
    record = json.loads(folders.record(one).read_text())
    assert 0 < record["extra"]["kept_of_update"] < 1
