"""A run killed at any moment goes on and ends with the same bytes as one that was never stopped."""

import gc
import json
import os
import random
import signal
import time

import forked
import pytest
import tiny_study
from test_methods import TINY
from tqdm import tqdm

from fedlm.jobs import running
from fedlm.study.plugins import discover_methods
from fedlm.study.reading import load

KILLS = 12  # of each label at least; there are nine
# What a client or the server keeps from one turn to the next.
RELATIVES = {
    "keeping": {"method": "fedcybgd", "moments": "client", "cache": "last_visit", "order": "random"},
    "personal": {"method": "fedlora", "variant": "fedsa"},
}
METHODS = {name: TINY.get(name) for name in discover_methods()} | RELATIVES
FEDERATION = {"clients": 2, "rounds": 4, "participation": 0.7, "dropout_rate": 0.2}
# What no two runs have in common: times, and the hash of a content that holds them.
TIMES = {"seconds", "train_seconds", "wall_seconds", "resident_set_bytes", "content_sha256"}


def comparable(record: dict) -> dict:
    """Return a record less its times."""
    rounds = [{k: v for k, v in row.items() if k not in TIMES} for row in record["rounds"]]
    return {k: v for k, v in record.items() if k not in TIMES} | {"rounds": rounds}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of all methods, each of them run once: a child then has everything imported."""
    folder = tmp_path_factory.mktemp("kills")
    path = tiny_study.write(
        folder,
        examples=40,
        federation=FEDERATION,
        methods=METHODS,
        training={"learning_rate": 1e-3, "batch_size": 8, "device": "cpu"},
    )
    found = load(path)
    for run in found.runs():
        execute(found, folder, run, "undisturbed")()
    forked.get_ready()
    yield found, folder
    gc.unfreeze()


def execute(study, folder, run, place):
    folders = running.Folders("study", folder / place)
    return lambda: running.execute(study, run, folders.record(run), folders)


def undisturbed(folder, run) -> dict:
    return json.loads(running.Folders("study", folder / "undisturbed").record(run).read_text())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_random_moments_and_none_lost_and_none_different(method, study):
    study, folder = study
    run = next(run for run in study.runs() if run.method == method)
    expected = undisturbed(folder, run)
    started = time.monotonic()
    assert forked.run(execute(study, folder, run, f"{method}-whole"), folder / "log").status == 0
    duration = time.monotonic() - started
    draw = random.Random(f"kill {method}")
    kills = resumed = finished = 0
    while kills < KILLS:
        place = f"{method}{finished}"
        folders = running.Folders("study", folder / place)
        while kills < 20 * KILLS:
            ended = forked.Child(execute(study, folder, run, place), folder / "log").end(
                kill_after=draw.uniform(0, 1.2 * duration)
            )
            resumed += "resumed after round" in ended.output
            if ended.status == 0:
                break
            # Killed, and nothing worse: the run itself never fails.
            assert ended.status == -signal.SIGKILL, ended.output
            assert "is not used" not in ended.output
            kills += 1
        record = json.loads(folders.record(run).read_text())
        assert comparable(record) == comparable(expected)
        assert not list(folders.checkpoints(run).glob("*.checkpoint"))
        assert not list(folders.checkpoints(run).glob(".*.part"))
        finished += 1
    print(f"{method}: {kills} kills, {finished} runs finished, {resumed} times resumed")


@pytest.mark.slow
def test_a_child_killed_while_it_draws_a_bar_keeps_no_other_waiting(study):
    study, folder = study
    run = next(run for run in study.runs() if run.method == "head_only")

    def die():
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    assert forked.run(die, folder / "log").status == -signal.SIGKILL
    assert forked.run(execute(study, folder, run, "after"), folder / "log").status == 0


def killed_at(operation: int, action):
    """Return `action` that dies at its n-th operation on files: half of them before it, half after."""

    def act():
        count = 0

        def deadly(do):
            def one(*arguments, **options):
                nonlocal count
                count += 1
                if count == operation and operation % 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = do(*arguments, **options)
                if count == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return one

        for name in ("fsync", "replace", "unlink"):
            setattr(os, name, deadly(getattr(os, name)))
        action()

    return act


@pytest.mark.slow
def test_killed_at_each_operation_on_files(study):
    """At each write, rename and removal: half-written states last too short for chance to hit them."""
    study, folder = study
    run = next(run for run in study.runs() if run.method == "head_only")
    expected = undisturbed(folder, run)
    operation = 1
    while True:
        place = f"operation{operation}"
        folders = running.Folders("study", folder / place)
        ended = forked.run(killed_at(operation, execute(study, folder, run, place)), folder / "log")
        if ended.status == 0:
            break
        assert ended.status == -signal.SIGKILL, ended.output
        rounds_before = ended.output.count(": round ")
        again = forked.run(execute(study, folder, run, place), folder / "log")
        assert again.status == 0, again.output
        assert comparable(json.loads(folders.record(run).read_text())) == comparable(expected)
        # At most the round that was not yet saved is made again.
        assert again.output.count(": round ") <= FEDERATION["rounds"] - max(rounds_before - 1, 0)
        assert "is not used" not in again.output
        operation += 1
    assert operation > 2 * FEDERATION["rounds"]
