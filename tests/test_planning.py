"""What a study will take: counts, bytes and FLOPs are exact, seconds follow from what was measured."""

import json
import math
import sys

import pytest
import tiny_study

from fedlm import __main__ as program
from fedlm.jobs import planning, running
from fedlm.jobs.planning import Piece, Plan
from fedlm.jobs.requests import PROCESS_MB, request_mb
from fedlm.study import reading

PIECE = Piece(
    task="films",
    partition="iid",
    method="fedavg",
    title="FedAvg",
    trials=False,
    runs=5,
    finished=1,
    seconds=10.0,
    flops=1e9,
    upload_bytes=1e6,
    download_bytes=2e6,
    memory_bytes=10**8,
    request_mb=2500,
    kept_bytes=3e6,
    checkpoint_bytes=5e6,
)
piece = PIECE._replace


def test_sums():
    pieces = [piece(), piece(partition="skewed"), piece(method="fedlora", finished=5, seconds=100.0)]
    plan = Plan(pieces, startup_seconds=3.0, at_a_time=2, runs_per_job=3, unknown=[])
    assert plan.jobs == 3  # eight runs of FedAvg, three in a process; FedLoRA is finished
    assert plan.processor_seconds == 3 * 3.0 + 8 * 10.0
    assert plan.seconds == plan.processor_seconds / 2 + planning.REPORT_SECONDS
    assert plan.disk_bytes == 15 * 2 * planning.RECORD_BYTES + 2 * 8e6
    # With many cores the longest chain decides: runs that share a process, and a row's runs after its trials.
    assert plan._replace(at_a_time=64).seconds == 30.0 + planning.REPORT_SECONDS
    tried = [*pieces, piece(trials=True, runs=8, finished=6, seconds=7.0)]
    assert plan._replace(pieces=tried, at_a_time=64).seconds == 30.0 + 14.0 + planning.REPORT_SECONDS
    assert plan._replace(pieces=pieces[2:]).seconds == 0


def test_trials_have_jobs_of_their_own():
    plan = Plan([piece(finished=0), piece(trials=True, finished=0)], 3.0, 1, 5, [])
    assert plan.jobs == 2


def test_methods_share_jobs_where_nothing_is_tuned():
    pieces = [piece(), piece(method="fedlora", seconds=100.0), piece(task="news")]
    plan = Plan(pieces, 3.0, 64, runs_per_job=5, unknown=[])
    assert plan.bundles == {
        ("films", ""): {False: [4 * 10.0 + 100.0, 3 * 100.0]},
        ("news", ""): {False: [40.0]},
    }
    assert plan.seconds == 300.0 + planning.REPORT_SECONDS
    tried = plan._replace(pieces=[*pieces, piece(trials=True, runs=2)])
    assert tried.jobs == 4  # a method's runs wait for its own trials only


def test_a_request_holds_the_turn_and_what_the_server_holds():
    needs = {"peak_memory_bytes": 10**9, "parameter_bytes": 10**8, "exchanged_bytes": 2 * 10**8}
    assert request_mb(needs, False) == PROCESS_MB + 1000 + 1000
    assert request_mb({**needs, "server_bytes": 10**8}, True) == PROCESS_MB + 100 + 1000 + 200


@pytest.mark.slow
def test_bytes_and_flops_are_those_of_the_runs(tmp_path):
    path = tiny_study.write(
        tmp_path,
        federation={"clients": 3, "rounds": 2},
        methods={"fedavg": None, "fedcybgd": None, "local_only": None},
        tuning={"seed": 7, "trials": 2, "partitions": {"films": "iid"}},
    )
    study = reading.load(path)
    folders = running.Folders(study.study, tmp_path / "results")
    for trial in study.trials():
        running.execute(study, trial, folders.record(trial), folders, lambda line: None)
    found = planning.plan(study, path, folders, cores=1)
    assert not found.unknown
    assert sum(one.runs for one in found.pieces) == 3 + 6
    assert sum(one.finished for one in found.pieces) == 6
    for one in found.pieces:
        assert 0 < one.seconds < 60
        if one.trials:
            assert one.left == 0
            record = json.loads(
                folders.record(next(t for t in study.trials() if t.method == one.method)).read_text()
            )
            assert (one.upload_bytes, one.download_bytes, one.flops) == (
                record["upload_bytes"],
                record["download_bytes"],
                record["flops"],
            )
            # Of texts without padding the model needs no mask, which the prediction keeps.
            assert one.memory_bytes == pytest.approx(record["memory"]["peak_memory_bytes"], rel=0.1)
    kept = {one.method: one.kept_bytes for one in found.pieces}
    assert kept["local_only"] > 0 == kept["fedavg"]
    lines = "\n".join(planning.describe(found, study))
    assert "study: 9 runs, 6 finished, 3 left" in lines and "time: about" in lines


@pytest.mark.slow
def test_what_is_not_here_is_named(tmp_path, monkeypatch, capsys):
    path = tiny_study.write(tmp_path, methods={"fedavg": None})
    (tmp_path / "model" / "model.safetensors").unlink()
    monkeypatch.setattr(sys, "argv", ["fedlm", "plan", str(path), "--cores", "1", "--results", str(tmp_path)])
    assert program.main() == 0
    shown = capsys.readouterr().out
    assert "not measured: films/iid/fedavg: model: " in shown and "safetensors" in shown
    # What follows from the model's shape is there all the same.
    assert "study: 1 runs, 0 finished, 1 left" in shown and "time: not known here" in shown
    assert "memory: up to 2" in shown


def test_nothing_measured_is_no_time():
    assert math.isnan(Plan([], math.nan, 1, 1, ["films/iid/fedavg: no"]).startup_seconds)
    assert Plan([], math.nan, 1, 1, ["films/iid/fedavg: no"]).seconds == 0
