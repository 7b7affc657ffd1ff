"""Devices and links: the file says where each value comes from, and times follow from closed forms."""

import math

import numpy
import pandas
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedlm.base.errors import UserError
from fedlm.results.devices import (
    DEVICES,
    Device,
    Known,
    Link,
    Turn,
    read_devices,
    round_seconds,
    seconds_so_far,
    turn_seconds,
    waiting_seconds,
)


def known(value):
    return Known(value=value, assumption="for a test")


DEVICE = Device(title="d", memory_gb=known(4), training_gflops=known(2))  # 2e9 FLOPs a second
LINK = Link(title="l", down_mbit=known(80), up_mbit=known(8))  # 1e7 bytes a second down, 1e6 up


def test_every_value_has_a_source_or_is_marked_as_an_assumption():
    found = read_devices()
    phone, link = found.device("phone_midrange"), found.link("5g")
    assert (link.down_mbit.value, link.up_mbit.value) == (207, 20)
    assert phone.memory_bytes == 8e9 and phone.flops_a_second == 3.2e9
    assert list(found.columns()) == [f"seconds_on({device}, {link})" for device, link in found.shown]
    assert len(found.columns()) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"links": {"x": {"title": "x", "down_mbit": {"value": 1}, "up_mbit": {"value": 1, "source": "s"}}}},
         "links.x.down_mbit: {'value': 1}; give either its source or its assumption"),
        ({"links": {"x": {"title": "x", "down_mbit": {"value": 0, "source": "s"}}}},
         "links.x.down_mbit.value: 0"),
        ({"devices": {"x": {"title": "x", "memory_gb": {"value": 1, "source": "s"}}}},
         "devices.x.training_gflops"),
        ({"speeds": {}}, "speeds: {}"),
        ({"shown": [["phone_midrange", "pigeon"]]}, "shown: link: 'pigeon'; allowed: 4g, 5g"),
    ],
)  # fmt: skip
def test_faults_of_an_own_file_are_named(change, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(change))
    with pytest.raises(UserError) as error:
        read_devices(path)
    assert str(error.value).startswith(f"{path}: {message}"), error.value
    assert "\n" not in str(error.value)


def test_an_own_file_adds_to_what_is_known(tmp_path):
    value = {"value": 3, "assumption": "a guess"}
    mine = {
        "devices": {"watch": {"title": "watch", "memory_gb": value, "training_gflops": dict(value)}},
        "shown": [["watch", "lan"]],
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(mine))
    found = read_devices(path)
    assert set(found.devices) == {*read_devices().devices, "watch"}
    assert list(found.columns()) == ["seconds_on(watch, lan)"]
    with pytest.raises(UserError, match="device: 'clock'; allowed: .*phone_midrange"):
        found.device("clock")
    assert DEVICES.name == "devices.yaml"


def test_a_turn_downloads_trains_and_uploads_one_after_the_other():
    turn = Turn(flops=6e9, upload_bytes=4e6, download_bytes=5e7)
    assert turn_seconds(turn, DEVICE, LINK) == pytest.approx(5 + 3 + 4)
    # Upload and download have rates of their own.
    assert turn_seconds(Turn(0, 1e6, 0), DEVICE, LINK) == pytest.approx(
        10 * turn_seconds(Turn(0, 0, 1e6), DEVICE, LINK)
    )


times = st.lists(st.floats(0, 1e6), min_size=1, max_size=8)


@given(times)
def test_one_after_another_costs_the_sum_and_a_cohort_its_slowest(seconds):
    assert round_seconds([[one] for one in seconds]) == pytest.approx(sum(seconds), abs=1e-3)
    assert round_seconds([seconds]) == max(seconds)
    assert waiting_seconds([seconds]) == pytest.approx(len(seconds) * max(seconds) - sum(seconds), abs=1e-3)
    # All but one wait at any moment, where clients take turns.
    assert waiting_seconds([[one] for one in seconds]) == pytest.approx(
        (len(seconds) - 1) * sum(seconds), abs=1e-3
    )


@given(st.lists(times, min_size=1, max_size=4))
def test_no_schedule_is_faster_than_one_cohort_or_slower_than_taking_turns(cohorts):
    everyone = [one for cohort in cohorts for one in cohort]
    took = round_seconds(cohorts)
    assert max(everyone) <= took * (1 + 1e-9) and took <= sum(everyone) * (1 + 1e-9)


def frames(method, clients, rounds, flops, up, down, largest=None, participants=None, dropped=0, steps=None):
    """Return a run of equal clients as compiled: per-client costs of each round."""
    count = participants or clients
    labels = {"task": "t", "partition": "p", "method": method, "seed": 1}
    rows = [
        {
            **labels,
            "round": number,
            "flops": flops * (count - dropped) * number,
            "upload_bytes": up * (count - dropped) * number,
            "download_bytes": down * count * number,
            "largest_upload_bytes": up if number and count > dropped else 0,
            "largest_download_bytes": down if number else 0,
            "participants": count if number else 0,
            "dropped": dropped if number else 0,
        }
        for number in range(rounds + 1)
    ]
    return pandas.DataFrame(rows), pandas.DataFrame(
        [{**labels, "clients": clients, "largest_client_share": largest, "local_steps": steps}]
    )


def so_far(frames, cohorts):
    rounds, runs = frames
    share = {("t", runs["method"][0]): cohorts}
    return seconds_so_far(rounds, runs, share, DEVICE, LINK).tolist()


@pytest.mark.parametrize("clients", [1, 5])
def test_seconds_of_a_run_follow_from_its_schedule(clients):
    turn = turn_seconds(Turn(2e9, 1e6, 1e7), DEVICE, LINK)
    run = frames("m", clients, 3, 2e9, 1e6, 1e7)
    assert so_far(run, 1.0) == pytest.approx([0, clients * turn, 2 * clients * turn, 3 * clients * turn])
    assert so_far(run, 1 / clients) == pytest.approx([0, turn, 2 * turn, 3 * turn])


def test_a_cohort_waits_for_the_client_with_most_examples():
    # Of 4 clients one holds half of the examples: twice the compute of a mean client.
    run = frames("m", 4, 1, 2e9, 1e6, 1e7, largest=0.5)
    assert so_far(run, 1 / 4)[1] == pytest.approx(2 * 1.0 + 1.0 + 1.0)
    # Turns add up to the same whoever holds more.
    assert so_far(run, 1.0)[1] == pytest.approx(4 * 3.0)
    # Cohorts of two: each is charged for the slowest, and never more than the sum of all turns.
    assert so_far(run, 2 / 4)[1] == pytest.approx(2 * 4.0)
    assert so_far(frames("m", 4, 1, 2e9, 1e6, 1e7, largest=0.97), 3 / 4)[1] == pytest.approx(4 * 3.0)


def test_sampled_clients_form_fewer_cohorts():
    run = frames("m", 10, 2, 2e9, 1e6, 1e7, participants=3)
    assert so_far(run, 1.0)[2] == pytest.approx(2 * 3 * 3.0)
    assert so_far(run, 0.1)[2] == pytest.approx(2 * 3.0)


def test_with_as_many_steps_for_all_the_largest_client_is_not_slower():
    run = frames("m", 4, 1, 2e9, 1e6, 1e7, largest=0.5, steps=10)
    assert so_far(run, 1 / 4)[1] == pytest.approx(3.0)


def test_clients_that_drop_out_only_download():
    run = frames("m", 4, 1, 2e9, 1e6, 1e7, dropped=2)
    assert so_far(run, 1 / 4)[1] == pytest.approx(3.0)
    assert so_far(run, 1.0)[1] == pytest.approx(2 * 3.0 + 2 * 1.0)
    assert so_far(frames("m", 4, 1, 2e9, 1e6, 1e7, dropped=4), 1 / 4)[1] == pytest.approx(1.0)


def test_rounds_of_several_runs_in_any_order_are_kept_apart():
    one, first = frames("m", 2, 2, 2e9, 1e6, 1e7)
    other, second = frames("n", 3, 2, 4e9, 1e6, 1e7)
    rounds = pandas.concat([one, other], ignore_index=True)
    runs = pandas.concat([first, second], ignore_index=True)
    shuffled = rounds.sample(frac=1, random_state=1)
    shares = {("t", "m"): 1.0, ("t", "n"): 1 / 3}
    found = seconds_so_far(shuffled, runs, shares, DEVICE, LINK)
    assert found.index.equals(shuffled.index)
    assert found.sort_index().tolist() == pytest.approx([0, 6, 12, 0, 4, 8])


def test_without_a_known_schedule_there_are_no_seconds():
    rounds, runs = frames("m", 2, 1, 2e9, 1e6, 1e7)
    found = seconds_so_far(rounds, runs, {}, DEVICE, LINK)
    assert all(math.isnan(value) for value in found[1:])
    assert numpy.isnan(found.to_numpy()).sum() == 2
