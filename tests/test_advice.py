"""Advice: seconds are checked against closed forms, the rest against the predicted costs."""

import sys

import numpy
import pandas
import pytest

from fedlm import __main__ as program
from fedlm.base.errors import UserError
from fedlm.costs import advice, cases
from fedlm.costs.tables import typed
from fedlm.federation.settings import Federation
from fedlm.results.devices import Turn, read_devices

KNOWN = read_devices()
LINK = KNOWN.link("5g")
TURN = Turn(flops=1e12, upload_bytes=4e6, download_bytes=8e6)
SENDING = 8e6 * 8 / 207e6 + 4e6 * 8 / 20e6
PHONE, LAPTOP = 1e12 / 3.2e9, 1e12 / 200e9  # seconds of training


def test_shares_are_dealt_by_largest_remainder():
    fleet = advice.make_fleet({"phone_midrange": 0.6, "laptop": 0.4}, 7)
    assert (fleet.devices.count("phone_midrange"), fleet.devices.count("laptop")) == (4, 3)
    assert fleet == advice.make_fleet({"phone_midrange": 0.6, "laptop": 0.4}, 7)
    assert set(fleet.slowdown) == {1.0}
    slow = advice.make_fleet({"laptop": 1.0}, 10, stragglers=0.3, slowdown=5)
    assert sorted(slow.slowdown) == [1.0] * 7 + [5.0] * 3


def test_a_cohort_waits_for_its_slowest_and_turns_add_up():
    fleet = advice.make_fleet({"phone_midrange": 0.6, "laptop": 0.4}, 10)
    together = advice.round_of(TURN, [10], fleet, KNOWN, LINK)
    assert together.seconds == pytest.approx(PHONE + SENDING)
    assert together.waiting == pytest.approx(0.4 * (PHONE - LAPTOP))
    alone = advice.round_of(TURN, [1] * 10, fleet, KNOWN, LINK)
    assert alone.seconds == pytest.approx(6 * PHONE + 4 * LAPTOP + 10 * SENDING)
    assert alone.waiting == pytest.approx(alone.seconds * 0.9)
    slow = advice.make_fleet({"laptop": 1.0}, 10, stragglers=0.1, slowdown=4)
    assert advice.round_of(TURN, [10], slow, KNOWN, LINK).seconds == pytest.approx(4 * LAPTOP + SENDING)
    assert advice.round_of(TURN, [1] * 10, slow, KNOWN, LINK).seconds == pytest.approx(
        13 * LAPTOP + 10 * SENDING
    )


@pytest.mark.parametrize(
    ("shares", "options", "message"),
    [
        ({"laptop": 0.5}, {}, "--fleet: shares laptop=0.5; allowed: above 0, adding up to 1"),
        ({"laptop": 1.5, "h100": -0.5}, {}, "above 0, adding up to 1"),
        ({"laptop": 1.0}, {"stragglers": 2}, "--stragglers: 2; allowed: 0 to 1"),
        ({"laptop": 1.0}, {"slowdown": 0.5}, "--slowdown: 0.5; allowed: from 1 on"),
    ],
)
def test_fleets_that_are_none(shares, options, message):
    with pytest.raises(UserError) as caught:
        advice.make_fleet(shares, 4, **options)
    assert message in str(caught.value)


@pytest.mark.slow
def test_the_advice_is_made_of_predicted_costs(tmp_path):
    asked = [
        cases.case_of("llama2_7b", name, federation=Federation(clients=32, rounds=1))
        for name in ("fedavg", "fedcybgd")
    ]
    asked += [cases.case_of("minilm", "fedlora", federation=Federation(clients=32, rounds=1))]
    costs = [cases.cost(case, 3) for case in asked]
    assert [found.cohorts for found in costs] == [(32,), (1,) * 32, (32,)]
    target = tmp_path / "cost_to_target.csv"
    pandas.DataFrame(
        {
            "method": ["fedavg", "fedavg", "fedcybgd", "fedcybgd", "fedavg"],
            "target": [0.97, 0.97, 0.97, 0.97, 0.9],
            "reached": [5, 5, 5, 0, 5],
            "round": [3, 5, 4, numpy.nan, 1],
        }
    ).to_csv(target)
    rounds = advice.rounds_to_target(target)
    assert rounds == {"fedavg": (3, 5), "fedcybgd": (4, numpy.inf)}
    assert advice.rounds_to_target(tmp_path / "absent.csv") == {}
    fleet = advice.make_fleet({"rtx_4090": 1.0}, 32)
    table = advice.advise(asked, costs, KNOWN, fleet, LINK, rounds)
    whole, block, small = table.numbers.to_dict("records")
    # 101.4, 30.4 and 27.9 GiB in shared facts; the device has 24e9 bytes.
    assert whole["fits(rtx_4090)"] is False and small["fits(rtx_4090)"] is True
    assert table.cells["Fits"].tolist()[2] == "yes"
    assert table.cells["Fits"].tolist()[1].startswith(f"{(costs[1].peak.peak - 24e9) / 1e9:.3g}"[:3])
    assert "too much" in table.cells["Fits"].tolist()[1]
    seconds = costs[1].download_bytes * 8 / 207e6 + costs[1].flops / 6e13 + costs[1].upload_bytes * 8 / 20e6
    assert block["round_seconds"] == pytest.approx(seconds)
    assert whole["round_seconds"] == pytest.approx(whole["turn_seconds(rtx_4090)"])
    to = f"To {advice.TARGET:.0%}"
    assert table.cells[to].tolist()[2] == "not known" and table.cells[to].tolist()[1].endswith("to never")
    assert "32 of 32 clients" in typed(table.cells, table.notes)


def test_a_method_whose_first_round_is_unlike_the_others_gets_more_of_them():
    asked = cases.of_models(["minilm"], ["fedpeptao", "slora", "fedavg"], clients=4, rounds=1)
    found = [cases.long_enough(case) for case in asked]
    assert [case.federation.rounds for case in found] == [10, 10, 1]
    assert found[2] == asked[2] and found[0] == asked[0]._replace(federation=found[0].federation)


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch, capsys):
    command = ["fedlm", "advise", "--model", "minilm", "--link", "5g", "--method", "fedavg", "--clients", "4"]
    monkeypatch.setattr(
        sys, "argv", [*command, "--fleet", "phone_midrange=0.5,laptop=0.5", "--output", str(tmp_path)]
    )
    assert program.main() == 0
    shown = capsys.readouterr().out
    assert "Turn on" in shown and "2 of 4 clients" in shown
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".md", ".tex"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--link", "5g"], "--device, --fleet: give one of them"),
        (["--link", "5g", "--device", "laptop", "--fleet", "laptop=1"], "--device, --fleet: give one"),
        (["--link", "6g", "--device", "laptop"], "link: '6g'; allowed: 4g, 5g"),
        (["--link", "5g", "--device", "toaster"], "device: 'toaster'; allowed: h100"),
        (["--link", "5g", "--fleet", "laptop"], "--fleet: 'laptop'; allowed: DEVICE=SHARE"),
        (["--link", "5g", "--device", "laptop", "--method", "fedsgd"], "--method: 'fedsgd'; allowed:"),
    ],
    ids=str,
)
def test_bad_input_ends_in_one_line(options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fedlm", "advise", "--model", "minilm", *options])
    assert program.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
