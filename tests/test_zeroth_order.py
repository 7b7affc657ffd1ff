"""Methods without gradients: directions from seeds, slopes from forward passes, models from sums."""

import math

import pytest
import tiny_study
import torch
import worlds
from hypothesis import given, settings
from hypothesis import strategies as st
from test_costs import padded  # noqa: F401
from test_doors import predicted

from fedlm.base.errors import UserError
from fedlm.exchange import payload
from fedlm.federation.settings import Training
from fedlm.federation.zeroth_order import direction, move, require_plain_steps
from fedlm.study import reading
from fedlm.study.check import check
from methods.fedkseed import FedKSeed, probabilities

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = {"training": {"learning_rate": 1e-3, "local_steps": 3, "batch_size": 4}}


def ran(method, place, **options):
    run = worlds.federation(method, place, **{**STEPS, **options})
    run.run()
    return run


@pytest.fixture(scope="module")
def seeded(place):
    """A finished run of FedKSeed with a pool so small that directions are drawn again."""
    return ran("fedkseed", place, seeds=8)


def test_a_direction_depends_on_seed_and_name_alone():
    parameters = {name: torch.zeros(40, 5) for name in ("a", "b")}
    alone, together = {"b": torch.zeros(40, 5)}, parameters
    torch.manual_seed(3)
    move(alone, 7, 0.5)
    before = torch.get_rng_state()
    move(together, 7, 0.5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(alone["b"], together["b"]) and not torch.equal(together["a"], together["b"])
    assert torch.equal(direction(7, "b", alone["b"]), 2 * alone["b"])
    assert not torch.equal(direction(8, "b", alone["b"]), 2 * alone["b"])


def test_a_direction_is_standard_normal():
    values = direction(1, "w", torch.zeros(200_000))
    assert abs(float(values.mean())) < 0.01 and abs(float(values.std()) - 1) < 0.01


@given(st.integers(0, 2**62), st.floats(-2, 2))
@settings(max_examples=20)
def test_a_movement_there_and_back_leaves_the_parameters(seed, distance):
    start = torch.randn(30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    value = {"w": start.clone()}
    for times in (1, -2, 1):
        move(value, seed, times * distance)
    assert torch.allclose(value["w"], start, atol=1e-13)


def test_half_precision_is_moved_in_place():
    value = torch.ones(100, dtype=torch.bfloat16)
    move({"w": value}, 1, 0.1)
    expected = (1 + 0.1 * direction(1, "w", value)).to(torch.bfloat16)
    assert value.dtype == torch.bfloat16 and torch.equal(value, expected)


@given(
    st.lists(
        st.tuples(
            st.integers(1, 50),
            st.lists(st.tuples(st.integers(0, 5), st.floats(-20, 20, width=32)), min_size=1, max_size=6),
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=30)
def test_the_model_of_the_sums_is_the_weighted_mean_of_the_clients_models(clients):
    """In float64, for any steps of any clients: the sums are no more than another way to write FedAvg."""
    rate = 0.01
    start = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    method = FedKSeed(FedKSeed.Config(seeds=6), len(clients), seed=1)
    method.training, method.exchanged = Training(learning_rate=rate), ["w"]
    method._model = torch.nn.Linear(1, 1)
    total = sum(examples for examples, _ in clients)
    mean, sums = torch.zeros_like(start), torch.zeros(6, dtype=torch.float64)
    for examples, steps in clients:
        own = {"w": start.clone()}
        for number, slope in steps:
            move(own, method._seed(number), -rate * slope)
            sums[number] += examples / total * slope
        mean += examples / total * own["w"]
    assert torch.allclose(method.rebuild({"w": start, "sums": sums})["w"], mean, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_the_servers_model_is_the_mean_of_the_models_that_the_clients_end_with(place):
    """In a real run, where the mean of unequal clients is taken of what crossed the network."""
    run = worlds.federation(
        "fedkseed", place, seeds=8, rounds=1, scheme={"scheme": "dirichlet", "alpha": 1.0}, **STEPS
    )
    ends, upload = {}, run.method.upload

    def noted(turn):
        ends[turn.client] = turn.copies(run.method.exchanged)
        return upload(turn)

    run.method.upload = noted
    run.run()
    sizes = {client: len(part) for client, part in enumerate(run.parts)}
    assert len(set(sizes.values())) > 1
    for name in run.method.exchanged:
        mean = sum(ends[client][name].double() * sizes[client] for client in ends) / sum(sizes.values())
        assert torch.allclose(run.server.tensors[name].double(), mean, rtol=0, atol=2e-6), name


@pytest.mark.slow
def test_a_client_starts_from_the_servers_model_bit_by_bit(place):
    run = worlds.federation("fedkseed", place, seeds=8, payload="float16", **STEPS)
    starts, train = [], run.method.train

    def noted(turn):
        if turn.round == 2:
            starts.append(all(torch.equal(turn.received[n], v) for n, v in run.server.tensors.items()))
        train(turn)

    run.method.train = noted
    run.run()
    assert starts and all(starts)


@pytest.mark.slow
def test_only_drawn_directions_have_sums_and_both_ways_do_not_grow_with_the_model(seeded, place):
    other = ran("fedkseed", place, seeds=8, family="roberta", kind="regression")
    assert sum(map(math.prod, other.method.shapes.values())) != sum(
        map(math.prod, seeded.method.shapes.values())
    )
    assert (other.ledger.upload, other.ledger.download) == (seeded.ledger.upload, seeded.ledger.download)
    down = {"sums": torch.zeros(8)}
    up = {"numbers": torch.zeros(3, dtype=torch.int16), "slopes": torch.zeros(3)}
    assert seeded.ledger.download == 6 * payload.size(down)
    assert seeded.ledger.upload == 6 * payload.size(up)
    large = ran("fedkseed", place, seeds=4096, rounds=1)
    assert 1 <= int(large.server.state["sums"].count_nonzero()) <= 3 * 3


@pytest.mark.slow
@pytest.mark.parametrize(("method", "options"), [("fedkseed", {"seeds": 8}), ("fedmezo", {"rank": 2})])
def test_queries_are_two_a_step_and_prediction_and_record_agree(method, options, place, padded):  # noqa: F811
    run = ran(method, place, **options)
    assert run.queries == 2 * 3 * 3 * 2  # two a step, three steps, three clients, two rounds
    found = predicted(run, place)
    assert (found.upload_bytes, found.download_bytes) == (run.ledger.upload, run.ledger.download)
    assert found.flops == run.flops
    memory = run.instruments.memory["queries"]
    assert memory.gradient == memory.optimizer == 0
    assert found.memory["queries"].peak == pytest.approx(memory.peak, rel=0.01)


@pytest.mark.parametrize(("method", "options"), [("fedkseed", {"seeds": 8}), ("fedmezo", {"rank": 2})])
def test_nothing_is_saved_for_a_backward_pass(method, options, place):
    def refused(tensor):
        raise AssertionError("a tensor was saved for a backward pass")

    with torch.autograd.graph.saved_tensors_hooks(refused, refused):
        run = ran(method, place, rounds=1, **options)
    assert all(value.grad is None for value in run.model.parameters())


def test_the_slope_is_that_of_the_gradient(place):
    """Along a small enough distance, slope = z . gradient; and the step goes down it."""
    run = worlds.federation("fedkseed", place, seeds=8, epsilon=1e-3, rounds=1, clients=1, **STEPS)
    found, upload = {}, run.method.upload

    def noted(turn):
        found.update(turn.results)
        plan, batch = turn._plan, run.make_batch(turn._plan[0][0])
        assert len(plan) == 3
        run.load(run.server.initial)
        for value in run.parameters.values():
            value.requires_grad_(True)
        run.model.eval()
        run.model(**batch).loss.backward()
        seed = run.method._seed(int(found["numbers"][0]))
        slope = sum(float((direction(seed, n, p) * p.grad).sum()) for n, p in run.parameters.items())
        assert float(found["slopes"][0]) == pytest.approx(slope, rel=0.05, abs=0.02)
        run.model.zero_grad()
        return upload(turn)

    run.method.upload = noted
    run.run()
    assert found


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 1000)), min_size=1, max_size=50),
)
def test_no_direction_is_more_than_e_times_as_probable_as_another(history):
    steepness, draws = (torch.tensor(column, dtype=torch.float64) for column in zip(*history, strict=True))
    found = probabilities(steepness, draws)
    assert float(found.sum()) == pytest.approx(1)
    assert float(found.max() / found.min()) <= math.e * (1 + 1e-9)


@pytest.mark.slow
def test_pro_draws_steep_directions_more_often_and_starts_with_equal_chances(place):
    assert torch.equal(probabilities(torch.zeros(4), torch.zeros(4)), torch.full((4,), 0.25))
    found = probabilities(torch.tensor([4.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 1.0]))
    assert float(found[0] / found[1]) == pytest.approx(math.e) and found[0] > found[2] > found[1]
    run = ran("fedkseed", place, seeds=8, pro=True, largest_slope=1e-3)
    state = run.server.state
    assert int(state["draws"].sum()) == 18 and float(state["steepness"].max()) <= 1e-3 * 18
    assert torch.equal(state["steepness"] > 0, state["draws"] > 0)
    plain = ran("fedkseed", place, seeds=8)
    assert run.rounds[0]["train_loss"] != plain.rounds[0]["train_loss"] or run.test != plain.test
    assert run.ledger.download > plain.ledger.download and run.ledger.upload == plain.ledger.upload


def test_opposite_slopes_of_two_clients_cancel(place):
    run = worlds.federation("fedkseed", place, seeds=8, rounds=1, clients=2, weights="uniform", **STEPS)
    upload = run.method.upload

    def opposite(turn):
        upload(turn)
        sign = 1.0 if turn.client else -1.0
        return {"numbers": torch.zeros(3, dtype=torch.int16), "slopes": torch.full((3,), sign)}

    run.method.upload = opposite
    run.run()
    assert not run.server.state["sums"].any()
    assert all(torch.equal(run.server.tensors[n], v) for n, v in run.server.initial.items())


def test_mezo_moves_adapters_and_head_and_nothing_else(place):
    run = worlds.federation("fedmezo", place, rank=2, rounds=1, **STEPS)
    frozen = {n: v.clone() for n, v in run.model.named_parameters() if n not in run.method.exchanged}
    run.run()
    now = dict(run.model.named_parameters())
    assert frozen and all(torch.equal(now[name], value) for name, value in frozen.items())
    for name in run.method.exchanged:
        assert ("lora_" in name or "classifier" in name) and not torch.equal(
            run.server.tensors[name], run.server.initial[name]
        )


@pytest.mark.slow
def test_one_step_of_one_client_by_hand_and_its_seed_gives_the_step_again(place):
    options = {"clients": 1, "rounds": 1, "scheme": {"scheme": "pooled"}, "rank": 2}
    training = {"learning_rate": 1e-3, "local_steps": 1, "batch_size": 4}
    run, again = (ran("fedmezo", place, training=training, **options) for _ in range(2))
    moved = {n: run.server.tensors[n] - v for n, v in run.server.initial.items()}
    from fedlm.base.randomness import derive

    seed = derive(1, "direction", 1, 0, 0)
    factors = []
    for name, change in moved.items():
        assert torch.equal(run.server.tensors[name], again.server.tensors[name])
        z = direction(seed, name, change)
        factor = float((z * change).sum() / (z * z).sum())  # minus rate times slope, the same for all
        assert torch.allclose(change, factor * z, atol=3e-7), name
        factors.append(factor)
    assert max(factors) - min(factors) < 1e-6 < abs(factors[0])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("weight_decay", 0.01),
        ("momentum", 0.9),
        ("schedule", "linear"),
        ("warmup", 0.1),
        ("largest_gradient_norm", 1.0),
    ],
)
def test_settings_that_would_be_ignored_are_refused_before_any_job(setting, value):
    require_plain_steps(Training())
    with pytest.raises(UserError, match=rf"training\.{setting}: {value}; allowed: "):
        require_plain_steps(Training(**{setting: value}))


def test_a_study_with_such_settings_is_refused_by_the_name_of_its_method(tmp_path):
    methods = {
        "seeded": {"method": "fedkseed", "training": {"weight_decay": 0.1}},
        "adapted": {"method": "fedmezo", "training": {"schedule": "linear"}},
        "plain": {"method": "fedmezo"},
    }
    study = reading.load(tiny_study.write(tmp_path, methods=methods))
    with pytest.raises(UserError) as error:
        check(study)
    lines = str(error.value).splitlines()
    assert [line.partition("; ")[0] for line in lines] == [
        "methods.seeded: training.weight_decay: 0.1",
        "methods.adapted: training.schedule: linear",
    ]
