"""The server's optimizers: the papers' formulas, plain averaging as their zero, exact resume, equal bytes."""

import json
import math

import pytest
import torch
import worlds
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from test_config import changed, faults
from test_doors import final, predicted, ran

from fedlm.federation.server_optimizer import follow
from fedlm.federation.settings import Federation, ServerOptimizer
from fedlm.federation.state import Server
from fedlm.study import reading
from fedlm.study.reading import parse

pytestmark = pytest.mark.usefixtures("one_thread")

RATE, TAU = 0.5, 0.1
ADAM = {"name": "adam", "learning_rate": RATE, "betas": (0.9, 0.99), "tau": TAU}
EACH = [
    {"name": "sgd", "learning_rate": 0.7, "momentum": 0.9},
    ADAM,
    {**ADAM, "name": "yogi"},
    {"name": "adagrad", "learning_rate": RATE, "tau": TAU, "beta": 0.5},
    {"name": "adamw"},
]


def settings(**values):
    return TypeAdapter(ServerOptimizer).validate_python(values)


def walk(values: dict, *changes: list[float]) -> list[list[float]]:
    """Return where the server is after each of the clients' mean changes, from zero, in float64."""
    place, moments, places = torch.zeros(len(changes[0]), dtype=torch.float64), {}, []
    for change in changes:
        mean = place + torch.tensor(change, dtype=torch.float64)
        place = follow(settings(**values), place, mean, place, moments)
        places.append(place.tolist())
    return places


def near(values: list[float]):
    return pytest.approx(values, rel=1e-12)


def test_momentum_adds_up_as_a_geometric_series():
    """FedAvgM: m = beta m + change, without damping."""
    places = walk({"name": "sgd", "learning_rate": 2.0, "momentum": 0.9}, [1.0, -3.0], [1.0, -3.0])
    assert places[0] == near([2.0, -6.0])
    assert places[1] == near([2.0 + 2 * 1.9, -6.0 - 2 * 3 * 1.9])


def test_two_steps_of_each_adaptive_optimizer_by_hand():
    """Algorithm 2 of Reddi et al.: no correction of the moments' start, second moment from tau squared."""
    one, two = 0.3, -0.2
    adam = 0.99 * TAU**2 + 0.01 * one**2, 0.0
    adam = adam[0], 0.99 * adam[0] + 0.01 * two**2
    # Yogi: both squares are above the second moment, so 0.01 times the square is added.
    yogi = TAU**2 + 0.01 * one**2, 0.0
    yogi = yogi[0], yogi[0] + 0.01 * two**2
    adagrad = TAU**2 + one**2, TAU**2 + one**2 + two**2
    for values, seconds, beta in ((EACH[1], adam, 0.9), (EACH[2], yogi, 0.9), (EACH[3], adagrad, 0.5)):
        firsts = (1 - beta) * one, beta * (1 - beta) * one + (1 - beta) * two
        steps = [RATE * m / (math.sqrt(v) + TAU) for m, v in zip(firsts, seconds, strict=True)]
        places = walk(values, [one], [two])
        assert [place[0] for place in places] == near([steps[0], steps[0] + steps[1]]), values["name"]


def test_yogi_leaves_a_second_moment_that_equals_the_square_and_lowers_one_above_it():
    moments: dict = {}
    zero = torch.zeros(2, dtype=torch.float64)
    mean = torch.tensor([0.1, 0.05], dtype=torch.float64)
    follow(settings(**{**EACH[2], "tau": 0.1}), zero, mean, zero, moments)
    assert moments["second"].tolist() == near([0.01, 0.01 - 0.01 * 0.05**2])


@pytest.mark.slow
@given(st.lists(st.sampled_from([0.0, 1e-3, -0.5, 2.0]), min_size=1, max_size=6))
def test_adamw_is_the_one_of_pytorch(changes):
    """Also where nobody sent anything: the change is 0, the old moments go on, and the decay applies."""
    parameter = torch.nn.Parameter(torch.tensor([0.8], dtype=torch.float64))
    theirs = torch.optim.AdamW([parameter], lr=1e-3)
    place, moments = torch.tensor([0.8], dtype=torch.float64), {}
    for change in changes:
        parameter.grad = torch.tensor([-change], dtype=torch.float64)
        theirs.step()
        place = follow(settings(name="adamw"), place, place + change, place, moments)
        # place + change - place is not quite the change, and Adam sees its sign even where it is rounding.
        assert place.item() == pytest.approx(parameter.item(), abs=1e-10)


def test_a_change_relative_to_another_start_is_added_to_the_servers_value():
    current, start, mean = torch.tensor([5.0, 1.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.5, 2.0])
    for name in ("none", "sgd"):
        assert follow(settings(name=name), current, mean, start, {}).tolist() == [5.5, 2.0]


def test_a_parameter_that_nobody_sent_does_not_move_and_its_moments_wait():
    one = {"a": torch.ones(2), "b": torch.ones(2)}
    server = Server(dict(one), one, optimizer=settings(name="sgd", momentum=0.9))
    for name in ("a", "b", "b"):
        server.follow(name, server.tensors[name] + 1)
    assert server.tensors["a"].tolist() == [2.0, 2.0] and server.version == {"a": 1, "b": 2}
    server.follow("a", server.tensors["a"] + 1)
    assert server.tensors["a"].tolist() == pytest.approx([2 + 1.9] * 2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedavg", "fedcybgd", "scaffold", "fedlora"])
def test_zero_settings_are_plain_averaging_bit_for_bit(method, place):
    plain = final(ran(method, place))
    for values in ({"name": "none"}, {"name": "sgd", "learning_rate": 1.0, "momentum": 0.0}):
        assert final(ran(method, place, federation={"server_optimizer": values})) == plain
    moved = ran(method, place, federation={"server_optimizer": EACH[0]})
    assert final(moved) != plain


@pytest.mark.slow
@pytest.mark.parametrize("values", EACH, ids=lambda values: values["name"])
def test_a_run_that_was_cut_off_ends_with_the_same_bytes(values, place, tmp_path):
    options = {"rounds": 3, "federation": {"server_optimizer": values}}
    whole = ran("scaffold", place, **options)
    again, lines = worlds.resumed("scaffold", place, tmp_path, **options)
    assert lines[0].startswith("resumed after round ")
    assert final(again) == final(whole)
    for name, moments in whole.server.moments.items():
        assert moments.keys() == again.server.moments[name].keys()
        assert all(torch.equal(moments[kind], again.server.moments[name][kind]) for kind in moments)


@pytest.mark.slow
def test_a_server_optimizer_costs_the_server_its_moments_and_the_clients_nothing(place):
    plain = ran("fedavg", place)
    for values, moments in ((EACH[0], 1), (EACH[1], 2)):
        run = ran("fedavg", place, federation={"server_optimizer": values})
        found = predicted(run, place)
        held = sum(value.nbytes for value in run.server.tensors.values())
        assert found.server_bytes == moments * held
        assert (found.upload_bytes, found.download_bytes) == (run.ledger.upload, run.ledger.download)
        assert (run.ledger.upload, run.ledger.download) == (plain.ledger.upload, plain.ledger.download)
        assert run.flops == plain.flops == found.flops
        assert run.instruments.memory["all"].peak == plain.instruments.memory["all"].peak


def test_the_optimizer_is_the_methods_else_the_tasks_else_the_studys():
    values = changed(federation={"clients": 4, "rounds": 5, "server_optimizer": {"name": "adam"}})
    values["tasks"]["films"] |= {"federation": {"server_optimizer": {"name": "yogi", "tau": 0.01}}}
    values["methods"] |= {"m": {"method": "fedavg", "server_optimizer": {"name": "sgd", "momentum": 0.9}}}
    study = parse(values)
    found = {
        (task, method): study.run(task, "iid", method, 1).federation.server_optimizer
        for task in ("bbc_news", "films")
        for method in ("fedavg", "m")
    }
    names = {key: value.name for key, value in found.items()}
    assert names == {
        ("bbc_news", "fedavg"): "adam",
        ("films", "fedavg"): "yogi",
        ("bbc_news", "m"): "sgd",
        ("films", "m"): "sgd",
    }
    assert found["films", "fedavg"].tau == 0.01 and found["films", "m"].momentum == 0.9
    run = study.run("films", "iid", "m", 2)
    record = {"study": "plain", "task": "films", "partition": "iid", "method": "m", "seed": 2}
    again = reading.of_record({**record, "config": json.loads(json.dumps(run.resolved()))})
    assert again.run("films", "iid", "m", 2).resolved() == run.resolved()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fedavg": {"server_optimizer": {"name": "adm"}}}, "fedavg.server_optimizer: "),
        ({"fedavg": {"server_optimizer": {"name": "adam", "momentum": 0.9}}}, "momentum: unknown key"),
        ({"fedavg": {"server_optimizer": {"name": "adam", "betas": [0.9, 1]}}}, "(0.9, 1.0); allowed: two"),
        (
            {"fedlora": {"variant": "flexlora", "server_optimizer": {"name": "adam"}}},
            "methods.fedlora: server_optimizer: adam; allowed: none",
        ),
        ({"local_only": {"server_optimizer": {"name": "sgd"}}}, "local_only: server_optimizer: sgd; allowed"),
    ],
)
def test_bad_settings_are_refused_before_any_job(values, message):
    found = faults(changed(methods=values))
    assert any(message in fault for fault in found), found


def test_a_method_that_averages_nothing_may_be_told_so():
    values = changed(federation={"clients": 4, "rounds": 5, "server_optimizer": {"name": "adam"}})
    values["methods"]["local_only"] = {"server_optimizer": {"name": "none"}}
    assert parse(values).run("films", "iid", "local_only", 1).federation.server_optimizer.name == "none"
    assert Federation().server_optimizer is None
