"""The trainer: equivalences between methods, exact costs, sampling, schedules, faults."""

import math

import numpy
import pytest
import torch
import worlds
from hypothesis import given
from hypothesis import strategies as st

from fedlm.base.errors import FailedRun
from fedlm.data.prepared import Prepared
from fedlm.exchange import payload
from fedlm.federation.loop import Federation
from fedlm.federation.method import Method, MethodConfig, Upload, weighted_mean
from fedlm.federation.optimizer import rate_factor
from fedlm.federation.passes import targets
from fedlm.federation.rounds import Rounds
from fedlm.federation.settings import Training
from fedlm.federation.turn import steps_of_turn
from fedlm.models import loading
from fedlm.models.config import ModelConfig


def plain_training(place, training: dict, seed=1, rounds=1) -> dict:
    """Train the tiny model on all examples with nothing but PyTorch."""
    data = worlds.prepared("bert", "classification", str(place))
    rows = data.split(seed).train
    source = ModelConfig(source=str(worlds.folder("bert", str(place))))
    model = loading.load(source, "classification", 2, seed)
    model.train()
    for round in range(1, rounds + 1):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
        for step in steps_of_turn(rows, Training(batch_size=8, **training), seed, round, 0):
            batch = data.batch(step[0])
            loss = torch.nn.functional.cross_entropy(
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
                batch["labels"],
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return {name: value.detach().numpy() for name, value in model.named_parameters()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(numpy.array_equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_fedavg_with_one_client_is_plain_training(place):
    run = worlds.federation("fedavg", place, scheme={"scheme": "pooled"}, rounds=1)
    run.run()
    assert same(worlds.values(run), plain_training(place, {}))


@pytest.mark.slow
def test_centralized_is_plain_training_whatever_the_partition(place):
    run = worlds.federation("centralized", place, scheme={"scheme": "dirichlet", "alpha": 0.3}, rounds=2)
    run.run()
    assert same(worlds.values(run), plain_training(place, {}, rounds=2))


@pytest.mark.slow
def test_fedcybgd_with_the_whole_model_as_block_and_one_client_is_fedavg(place):
    scheme = {"scheme": "pooled"}
    one = worlds.federation("fedavg", place, scheme=scheme)
    other = worlds.federation("fedcybgd", place, scheme=scheme, block="model")
    one.run(), other.run()
    assert same(worlds.values(one), worlds.values(other))
    assert one.ledger.upload == other.ledger.upload


@pytest.mark.slow
def test_fedbavg_with_one_client_a_block_is_fedcybgd(place):
    one = worlds.federation("fedcybgd", place)
    other = worlds.federation("fedcybgd", place, clients_per_block=1)
    several = worlds.federation("fedcybgd", place, clients_per_block=2)
    for run in (one, other, several):
        run.run()
    assert same(worlds.values(one), worlds.values(other))
    assert not same(worlds.values(one), worlds.values(several))


def test_a_cohort_of_several_clients_is_averaged_by_examples(place):
    scheme = {"scheme": "quantity", "alpha": 1}
    run = worlds.federation("fedavg", place, scheme=scheme, rounds=1)
    uploads = []
    merge = run.method.merge

    def noted(server, incoming, round):
        def copy():
            for upload in incoming:
                tensors = {name: value.clone() for name, value in upload.tensors.items()}
                uploads.append(Upload(upload.client, upload.examples, tensors))
                yield upload

        merge(server, copy(), round)

    run.method.merge = noted
    run.run()
    assert [upload.examples for upload in uploads] == [len(part) for part in run.parts]
    total = sum(upload.examples for upload in uploads)
    for name, value in run.server.tensors.items():
        mean = sum(u.tensors[name].double() * (u.examples / total) for u in uploads)
        assert torch.allclose(value.double(), mean, atol=1e-6)


@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 99)), min_size=1, max_size=8))
def test_weighted_mean_is_the_mean(clients):
    uploads = [
        Upload(i, n, {"w": torch.randn(5, generator=torch.Generator().manual_seed(seed))})
        for i, (n, seed) in enumerate(clients)
    ]
    expected = sum(u.tensors["w"].double() * u.examples for u in uploads) / sum(u.examples for u in uploads)
    first = uploads[0].tensors["w"].clone()
    found, weight = weighted_mean(iter(uploads))["w"]
    assert weight == sum(u.examples for u in uploads)
    assert torch.allclose(found.double(), expected, atol=1e-6)
    if len(uploads) == 1:
        assert torch.equal(found, first)


def test_a_tensor_is_averaged_over_those_who_sent_it():
    uploads = [
        Upload(0, 1, {"a": torch.ones(2)}),
        Upload(1, 3, {"a": torch.full((2,), 5.0), "b": torch.full((2,), 7.0)}),
    ]
    means = {name: value.tolist() for name, (value, _) in weighted_mean(uploads).items()}
    assert means == {"a": [4.0, 4.0], "b": [7.0, 7.0]}


def test_partition_sampling_and_batches_do_not_depend_on_the_method(place):
    settings = {"federation": {"participation": 0.5, "dropout_rate": 0.3}, "clients": 6, "rounds": 3}
    runs = [worlds.federation(name, place, **settings) for name in ("fedavg", "fedcybgd", "fedlora")]
    drawn = [[run.sample(round) for round in (1, 2, 3)] for run in runs]
    assert drawn[0] == drawn[1] == drawn[2]
    assert all(len(clients) == 3 == len(set(clients)) for clients in drawn[0])
    assert len({tuple(clients) for clients in drawn[0]}) > 1
    other = worlds.federation("fedavg", place, seed=2, **settings)
    assert [other.sample(round) for round in (1, 2, 3)] != drawn[0]
    answers = [[run.answers(c, r) for c in range(6) for r in range(9)] for run in runs]
    assert answers[0] == answers[1] and 0.5 < numpy.mean(answers[0]) < 0.9


def test_clients_that_never_answer_are_left_out_but_their_download_counts(place):
    run = worlds.federation("fedavg", place, clients=6, federation={"dropout_rate": 0.5})
    run.run()
    dropped = [(row["round"], client) for row in run.rounds for client in row["dropped"]]
    assert 0 < len(dropped) < 12
    for row in run.rounds:
        for client, down, up in row["payloads"]:
            assert down == run.rounds[0]["payloads"][0][1] > 0
            assert (up == 0) == (client in row["dropped"])


def test_a_round_in_which_nobody_answers_leaves_the_model_as_it_was(place):
    run = worlds.federation("fedavg", place, rounds=1)
    run.answers = lambda client, round: False
    run.run()
    assert all(torch.equal(run.server.tensors[n], run.server.initial[n]) for n in run.server.initial)
    assert run.rounds[0]["train_loss"] is None and run.ledger.upload == 0 < run.ledger.download


@pytest.mark.slow
def test_exact_bytes_of_the_methods(place):
    runs = {name: worlds.federation(name, place, rounds=1) for name in ("fedavg", "fedcybgd", "head_only")}
    for run in runs.values():
        run.run()
    shapes = dict(runs["fedavg"].model.named_parameters())
    whole = payload.size(shapes)
    assert runs["fedavg"].ledger.upload == runs["fedavg"].ledger.download == 3 * whole
    head = {name: shapes[name] for name in ("classifier.weight", "classifier.bias")}
    assert runs["head_only"].ledger.upload == 3 * payload.size(head)
    blocks = [{n: v for n, v in shapes.items() if f"layer.{block}." in n} | head for block in range(3)]
    assert runs["fedcybgd"].ledger.upload == sum(map(payload.size, blocks))
    exchanged = {n: v for n, v in shapes.items() if "layer." in n} | head
    assert runs["fedcybgd"].ledger.download == 3 * payload.size(exchanged)
    assert all(run.ledger.broadcast == 3 * whole for run in runs.values())


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("ascending", [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]),
        ("descending", [[2, 1, 0, 2, 1], [2, 1, 0, 2, 1], [2, 1, 0, 2, 1]]),
        ("shifted", [[0, 1, 2, 0, 1], [2, 0, 1, 2, 0], [1, 2, 0, 1, 2]]),
        ("rotating", [[0, 1, 2, 0, 1], [1, 2, 0, 1, 2], [2, 0, 1, 2, 0]]),
    ],
)
def test_assignment_orders(order, expected, place):
    run = worlds.federation("fedcybgd", place, clients=5, order=order)
    found = [[run.method.block(client, round)[0] for client in range(5)] for round in (1, 2, 3)]
    assert found == expected


def test_random_order_is_without_replacement_over_the_rounds(place):
    run = worlds.federation("fedcybgd", place, clients=5, order="random")
    for client in range(5):
        for first in (1, 4):
            blocks = [run.method.block(client, first + offset)[0] for offset in range(3)]
            assert sorted(blocks) == [0, 1, 2]
    several = worlds.federation("fedcybgd", place, clients=5, order="random", blocks_per_turn=2)
    assert all(len(set(several.method.block(c, r))) == 2 for c in range(5) for r in (1, 2, 3))


def test_switching_blocks_within_a_turn(place):
    run = worlds.federation("fedcybgd", place, pooled=True, switch_every=2, rounds=1)
    segments = run.method.segments(0, 1, 7)
    assert [(s.label, s.steps) for s in segments] == [
        ("block 0", 2),
        ("block 1", 2),
        ("block 2", 2),
        ("block 0", 1),
    ]


@pytest.mark.slow
def test_gradient_accumulation_is_the_larger_batch(place):
    scheme = {"scheme": "pooled"}
    large = worlds.federation("fedavg", place, scheme=scheme, rounds=1, training={"batch_size": 16})
    small = worlds.federation(
        "fedavg", place, scheme=scheme, rounds=1, training={"batch_size": 4, "accumulation": 4}
    )
    large.run(), small.run()
    one, other = worlds.values(large), worlds.values(small)
    assert all(numpy.allclose(one[n], other[n], atol=2e-3) for n in one if "key.bias" not in n)
    assert small.rounds[0]["train_loss"] == pytest.approx(large.rounds[0]["train_loss"], rel=1e-3)


@pytest.mark.slow
def test_accumulated_batches_of_a_language_model_weigh_by_their_targets(place, monkeypatch):
    """The gradient is that of the mean over all targets, though the batches have unequal numbers of them."""
    batch = Prepared.batch

    def with_fewer_targets(data, indices):
        made = batch(data, indices)
        for row in numpy.flatnonzero(numpy.asarray(indices) % 2):
            made["labels"][row, (made["labels"][row] >= 0).nonzero()[0]] = -100
        return made

    monkeypatch.setattr(Prepared, "batch", with_fewer_targets)
    sgd = {"optimizer": "sgd", "learning_rate": 0.1, "local_steps": 1}
    found = []
    for sizes in ({"batch_size": 4}, {"batch_size": 1, "accumulation": 4}):
        options = {"scheme": {"scheme": "pooled"}, "family": "gpt2", "kind": "causal", "rounds": 1}
        run = worlds.federation("fedavg", place, training={**sgd, **sizes}, **options)
        counts = {int(targets(run.make_batch(run.parts[0][row : row + 1]))) for row in range(8)}
        run.run()
        found.append((worlds.values(run), run.rounds[0]["train_loss"]))
    assert len(counts) > 1
    (large, loss), (small, other) = found
    assert other == pytest.approx(loss, rel=1e-5)
    assert all(numpy.allclose(large[name], small[name], atol=1e-6) for name in large)


def test_local_steps_replace_epochs():
    rows = numpy.arange(10)
    steps = steps_of_turn(rows, Training(batch_size=4, local_steps=7), 1, 1, 0)
    assert [len(step[0]) for step in steps] == [4, 4, 2, 4, 4, 2, 4]
    epochs = steps_of_turn(rows, Training(batch_size=4, local_epochs=2), 1, 1, 0)
    assert len(epochs) == 6
    for first in (0, 3):
        assert sorted(numpy.concatenate([s[0] for s in epochs[first : first + 3]])) == list(rows)
    accumulated = steps_of_turn(rows, Training(batch_size=2, accumulation=3), 1, 1, 0)
    assert [[len(p) for p in step] for step in accumulated] == [[2, 2, 2], [2, 2]]


def test_schedules():
    linear = Training(schedule="linear", warmup=0.1)
    factors = [rate_factor(step / 100, 0.01, linear) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == pytest.approx(1.0)
    assert max(factors) == pytest.approx(1.0) and factors[99] == pytest.approx(1 / 90)
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))
    cosine = Training(schedule="cosine")
    assert rate_factor(0, 0.01, cosine) == 1 and rate_factor(0.5, 0.01, cosine) == pytest.approx(0.5)
    assert rate_factor(0.7, 0.01, Training()) == 1


@pytest.mark.slow
def test_the_schedule_runs_over_the_federation_or_restarts_in_each_turn(place, monkeypatch):
    seen: dict[str, list] = {"federation": [], "turn": []}
    from fedlm.federation import turn

    for span, found in seen.items():

        def noted(progress, step, settings, found=found):
            found.append(progress)
            return rate_factor(progress, step, settings)

        monkeypatch.setattr(turn, "rate_factor", noted)
        run = worlds.federation(
            "fedavg",
            place,
            scheme={"scheme": "pooled"},
            rounds=2,
            training={"schedule": "linear", "schedule_span": span},
        )
        run.run()
    probe, steps = 1, -(-len(run.parts[0]) // 8)
    assert seen["federation"][probe:] == pytest.approx([i / (2 * steps) for i in range(2 * steps)])
    assert seen["turn"][probe:] == pytest.approx([i / steps for i in range(steps)] * 2)


@pytest.mark.slow
def test_sgd_momentum_clipping_and_autocast_change_the_result_and_learn(place):
    base = {"scheme": {"scheme": "pooled"}, "rounds": 1}
    variants = [
        {"optimizer": "sgd", "learning_rate": 0.05},
        {"optimizer": "sgd", "learning_rate": 0.05, "momentum": 0.9},
        {"optimizer": "sgd", "learning_rate": 0.05, "largest_gradient_norm": 0.01},
        {"autocast": "bfloat16"},
    ]
    found = []
    for training in variants:
        run = worlds.federation("fedavg", place, training=training, **base)
        run.run()
        assert math.isfinite(run.rounds[0]["train_loss"])
        found.append(payload.encode(run.server.tensors).sha256())
    assert len(set(found)) == len(found)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["bfloat16", "float16"])
def test_half_precision_weights_keep_a_float32_copy_of_what_is_trained(weights, place):
    run = worlds.federation(
        "fedavg",
        place,
        model={"weights": weights},
        rounds=1,
        training={"learning_rate": 1e-5, "loss_scale": 64.0},
    )
    run.run()
    assert {p.dtype for p in run.model.parameters()} == {getattr(torch, weights)}
    # Steps far below the precision of the weights survive in the float32 copies.
    name = "bert.encoder.layer.0.output.dense.weight"
    step = (run.server.tensors[name] - run.server.initial[name]).abs()
    assert run.server.tensors[name].dtype == torch.float32
    assert 0 < step.max() < 1e-3 and not torch.equal(
        run.server.tensors[name], run.server.tensors[name].to(getattr(torch, weights)).float()
    )


@pytest.mark.slow
def test_half_precision_payloads_halve_the_traffic(place):
    full = worlds.federation("fedavg", place, rounds=1)
    half = worlds.federation("fedavg", place, rounds=1, payload="bfloat16")
    full.run(), half.run()
    elements = sum(value.numel() for value in full.server.tensors.values())
    assert full.ledger.upload - half.ledger.upload == pytest.approx(3 * 2 * elements, abs=3 * 100)
    for value in half.server.tensors.values():
        assert value.dtype == torch.float32


@pytest.mark.slow
def test_the_model_scored_is_the_servers(place):
    run = worlds.federation("fedcybgd", place, rounds=1)
    run.run()
    with torch.no_grad():
        for name, value in run.server.tensors.items():
            run.parameters[name].copy_(value)
    from fedlm.federation.scoring import score

    assert score(run.model, run.data, run.split.test, 64) == run.test


@pytest.mark.slow
def test_the_test_split_is_scored_once(place):
    run = worlds.federation("fedavg", place, rounds=3)
    scored = []
    score = run.scorer.score
    run.scorer.score = lambda indices: (scored.append(indices is run.split.test), score(indices))[1]
    run.run()
    assert scored == [False] * 4 + [True]


@pytest.mark.slow
def test_dropout_of_the_layers_depends_on_the_seed_alone(place):
    results = []
    for number in (3, 4):
        torch.manual_seed(number)
        before = torch.get_rng_state()
        run = worlds.federation("fedavg", place, rounds=1, model={"dropout": 0.5})
        run.run()
        assert torch.equal(torch.get_rng_state(), before)
        results.append(payload.encode(run.server.tensors).sha256())
    plain = worlds.federation("fedavg", place, rounds=1)
    plain.run()
    assert results[0] == results[1] != payload.encode(plain.server.tensors).sha256()


def test_all_methods_start_from_one_head(place):
    heads = []
    for name in ("fedavg", "fedcybgd", "head_only"):
        run = worlds.federation(name, place)
        heads.append(run.server.initial["classifier.weight"])
    lora = worlds.federation("fedlora", place)
    heads.append(next(v for n, v in lora.server.initial.items() if n.endswith("classifier.weight")))
    assert all(torch.equal(heads[0], head) for head in heads)
    other = worlds.federation("fedavg", place, seed=2)
    assert not torch.equal(other.server.initial["classifier.weight"], heads[0])


class Faulty(Method):
    """FedAvg whose client 1 sends what `fault` makes of its upload."""

    title = "Faulty"

    class Config(MethodConfig):
        fault: str

    def upload(self, turn):
        values = {name: value.clone() for name, value in super().upload(turn).items()}
        if turn.client != 1:
            return values
        name = "classifier.weight"
        if self.config.fault == "nan":
            values[name][0, 0] = math.nan
        elif self.config.fault == "infinite":
            values[name][0, 0] = -math.inf
        elif self.config.fault == "shape":
            values[name] = values[name][:, :-1]
        elif self.config.fault == "unknown":
            values["back.door"] = values[name]
        elif self.config.fault == "huge":
            values[name] = torch.zeros(1000, 1000)
        return values


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nan", "the update of classifier.weight is not finite"),
        ("infinite", "the update of classifier.weight is not finite"),
        ("shape", "classifier.weight: shape"),
        ("unknown", "unknown tensor 'back.door'"),
        ("huge", "classifier.weight: shape (1000, 1000)"),
    ],
)
def test_a_bad_update_fails_the_run_and_names_round_and_client(fault, message, place):
    run = worlds.federation(Faulty, place, fault=fault)
    with pytest.raises(FailedRun) as error:
        run.run()
    assert "round 1, client 1" in str(error.value) and message in str(error.value)


def test_a_truncated_update_fails_the_run(place, monkeypatch):
    run = worlds.federation("fedavg", place)
    encode = payload.encode
    messages = []

    def cut(tensors, precision="float32"):
        messages.append(bytes(encode(tensors, precision)))
        return messages[-1][:-5] if len(messages) == 4 else messages[-1]

    monkeypatch.setattr(payload, "encode", cut)
    with pytest.raises(FailedRun, match="round 1, client 1: not a payload"):
        run.run()


def test_a_loss_that_is_not_finite_fails_the_run(place):
    run = worlds.federation(
        "fedavg",
        place,
        training={"optimizer": "sgd", "learning_rate": 100.0, "weight_decay": 10.0, "local_epochs": 9},
    )
    with pytest.raises(FailedRun, match="method fedavg, round 1, client 0: the loss is (nan|inf)"):
        run.run()


def test_the_loop_is_readable_in_one_sitting():
    import inspect

    for part in (Federation, Rounds):
        assert len(inspect.getsource(part).splitlines()) < 180
