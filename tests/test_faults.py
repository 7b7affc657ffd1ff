"""Full disks, short memory, read-only folders, others at work: what is lost, and what is reported."""

import contextlib
import csv
import errno
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import forked
import pytest
import tiny_study
import torch

from fedlm.__main__ import main
from fedlm.base.errors import UserError
from fedlm.base.files import locked, write_atomically
from fedlm.jobs import running
from fedlm.jobs.failures import describe
from fedlm.results import records, tables
from fedlm.study.reading import load
from fedlm.study.study import Run

ROOT = Path(__file__).resolve().parent.parent
RUN = Run("films", "iid", "fedavg", 1)
ROUNDS = 4


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A study whose run was made once, in this process, so that children find everything imported."""
    folder = tmp_path_factory.mktemp("faults")
    study = load(tiny_study.write(folder, examples=60, federation={"clients": 2, "rounds": ROUNDS}))
    make(study, folder)()
    forked.get_ready()
    yield study, hashed(record(folder))
    gc.unfreeze()


def make(study, folder, run=RUN):
    """Return what makes the run, with its results in `folder`."""
    folders = running.Folders("study", folder)
    return lambda: running.execute(study, run, folders.record(run), folders)


def record(folder, run=RUN) -> dict:
    return json.loads(running.Folders("study", folder).record(run).read_text())


def hashed(record) -> tuple:
    return record["provenance"]["payload_sha256"], record["test"], record["upload_bytes"]


def goes_on(study, folder, expected, rounds_before=0) -> None:
    """The run is made again without the fault, from where it was, and ends as if nothing had been."""
    assert not list(folder.rglob("*.part"))
    ended = forked.run(make(study, folder), folder.parent / "log")
    assert ended.status == 0, ended.output
    assert hashed(record(folder)) == expected
    assert ended.output.count(": round ") == ROUNDS - rounds_before


# ---------------------------------------------------------------------------------------------------------
# The disk


def fails_at(operation: int, name: str, number: int, action):
    """Return `action` in which one call of an operation on files fails as the system would fail it."""

    def act():
        count = 0
        do = getattr(os, name)

        def failing(*arguments, **options):
            nonlocal count
            count += 1
            if count == operation:
                raise OSError(number, os.strerror(number))
            return do(*arguments, **options)

        setattr(os, name, failing)
        action()

    return act


@pytest.mark.slow
@pytest.mark.parametrize("operation", range(1, 5 + ROUNDS + 2))
def test_a_disk_that_is_full_at_any_write_costs_nothing_that_was_finished(operation, undisturbed, tmp_path):
    """Writes are: prepared data (3), partition, a checkpoint a round, the record and its copy."""
    study, expected = undisturbed
    results = tmp_path / "results"
    ended = forked.run(fails_at(operation, "fsync", errno.ENOSPC, make(study, results)), tmp_path / "log")
    assert ended.status == 1
    last = ended.output.splitlines()[-1]
    assert last.startswith(f"error: {results}/") and "the disk is full; finished runs are kept" in last
    assert "Traceback" not in ended.output
    written = len(list(results.rglob("*.checkpoint")))
    finished = ended.output.count(": round ")
    assert written == min(max(operation - 5, 0), 2) or operation > 4 + ROUNDS
    goes_on(study, results, expected, rounds_before=min(max(operation - 5, 0), ROUNDS) if finished else 0)


@pytest.mark.slow
def test_there_are_no_more_writes_than_those(undisturbed, tmp_path):
    study, expected = undisturbed
    results = tmp_path / "results"
    ended = forked.run(
        fails_at(5 + ROUNDS + 2, "fsync", errno.ENOSPC, make(study, results)), tmp_path / "log"
    )
    assert ended.status == 0 and hashed(record(results)) == expected


@pytest.mark.slow
def test_a_limit_on_the_size_of_files(undisturbed, tmp_path):
    """A real failure of the system in the middle of a write: a checkpoint is the largest file of a run."""
    study, expected = undisturbed
    results = tmp_path / "results"
    largest = 20_000
    limited = forked.limited(resource.RLIMIT_FSIZE, largest, make(study, results))
    ended = forked.run(limited, results.parent / "log")
    assert ended.status == 1
    assert "round-000001.checkpoint: the file would be larger" in ended.output.splitlines()[-1]
    goes_on(study, results, expected)


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    """A small disk of its own, in memory. Needs the right to mount."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("this machine does not let the test mount a disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_is_really_full(undisturbed, tmp_path):
    study, expected = undisturbed
    results = tmp_path / "disk"
    with mounted(results, "size=64k"):
        ended = forked.run(make(study, results), tmp_path / "log")
        assert ended.status == 1
        assert "the disk is full; finished runs are kept" in ended.output.splitlines()[-1]
        subprocess.run(["mount", "-o", "remount,size=8m", str(results)], check=True)
        goes_on(study, results, expected)


def test_results_that_are_read_only(undisturbed, tmp_path):
    study, expected = undisturbed
    results = tmp_path / "disk"
    with mounted(results, "size=8m"):
        assert forked.run(make(study, results), tmp_path / "log").status == 0
        before = sorted(results.rglob("*"))
        subprocess.run(["mount", "-o", "remount,ro", str(results)], check=True)
        ended = forked.run(make(study, results), tmp_path / "log")
        assert ended.status == 1
        assert "the file system is read-only; finished runs are kept" in ended.output.splitlines()[-1]
        assert sorted(results.rglob("*")) == before and hashed(record(results)) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EROFS, "is read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "disk"),
    ],
)
def test_a_file_that_cannot_be_opened(number, message, undisturbed, tmp_path):
    study, expected = undisturbed
    results = tmp_path / "results"
    ended = forked.run(fails_at(6, "replace", number, make(study, results)), tmp_path / "log")
    assert ended.status == 1 and message in ended.output.splitlines()[-1]
    goes_on(study, results, expected, rounds_before=1)


def test_a_file_where_the_results_should_be(undisturbed, tmp_path):
    study, _ = undisturbed
    (tmp_path / "results").write_text("mine")
    ended = forked.run(make(study, tmp_path / "results"), tmp_path / "log")
    assert ended.status == 1 and "a file is where a folder should be" in ended.output
    assert (tmp_path / "results").read_text() == "mine"


def test_a_disk_that_is_full_leaves_the_tables_as_they_were(undisturbed, tmp_path, monkeypatch):
    study, _ = undisturbed
    make(study, tmp_path)()
    paths = [running.Folders("study", tmp_path).record(RUN)]
    compiled = [tmp_path / "rounds.parquet", tmp_path / "runs.parquet"]
    records.collect(paths, *compiled)
    expected, titles = [RUN[:4]], {"fedavg": "FedAvg"}
    tables.make(compiled[1], compiled[0], expected, titles, tmp_path / "tables")
    before = {path: path.read_bytes() for path in [*compiled, *(tmp_path / "tables").iterdir()]}

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for action in (
        lambda: records.collect(paths, *compiled),
        lambda: tables.make(compiled[1], compiled[0], expected, titles, tmp_path / "tables"),
    ):
        with pytest.raises(OSError) as error:
            action()
        assert "the disk is full" in describe(error.value)
    assert {path: path.read_bytes() for path in [*compiled, *(tmp_path / "tables").iterdir()]} == before


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def parts():
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, *parts())
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


# ---------------------------------------------------------------------------------------------------------
# Memory, and the end of the process


def waits_after_round(number: int, action):
    """Return `action` that stops after a round, so that something can be done to it at a known moment."""

    def act():
        from fedlm.federation.checkpoint import Checkpoints

        save = Checkpoints.save

        def saves(self, round, tensors, plain):
            save(self, round, tensors, plain)
            if round == number:
                print("waiting", flush=True)
                until = time.monotonic() + forked.LONGEST
                while self._signal is None and time.monotonic() < until:
                    time.sleep(0.01)

        Checkpoints.save = saves
        action()

    return act


def when_it_waits(child: forked.Child) -> forked.Child:
    while "waiting" not in child.output():
        assert time.monotonic() - child.started < forked.LONGEST
        time.sleep(0.01)
    return child


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGXCPU])
def test_a_run_that_the_system_ends_goes_on(number, undisturbed, tmp_path):
    """So end a cluster's limit of memory (SIGKILL) and of time (SIGTERM), and a shell's of time (SIGXCPU)."""
    study, expected = undisturbed
    results = tmp_path / "results"
    child = when_it_waits(forked.Child(waits_after_round(2, make(study, results)), tmp_path / "log"))
    child.kill(number)
    assert child.end().status == -number
    goes_on(study, results, expected, rounds_before=2)


@pytest.mark.slow
def test_ctrl_c_is_no_traceback(undisturbed, tmp_path):
    study, expected = undisturbed
    results = tmp_path / "results"
    path = running.Folders("study", results).record(RUN)
    source = next(iter(study.tasks.values())).settings.train
    arguments = {"config": Path(source).with_name("study.yaml"), "results": results, "output": path}
    arguments |= {name: value for name, value in RUN._asdict().items() if value is not None}

    def act():
        sys.argv = ["fedlm", "run", *(f"--{name}={value}" for name, value in arguments.items())]
        sys.exit(main())

    child = when_it_waits(forked.Child(waits_after_round(3, act), tmp_path / "log"))
    child.kill(signal.SIGINT)
    ended = child.end()
    assert ended.status == 130
    assert "Traceback" not in ended.output
    last = ended.output.splitlines()[-1]
    assert last.startswith("interrupted; a run continues from its last saved round")
    goes_on(study, results, expected, rounds_before=3)


@pytest.mark.slow
def test_too_little_memory(undisturbed, tmp_path):
    """The address space is limited after round 1; the next round's first large tensor is refused."""
    study, expected = undisturbed
    results = tmp_path / "results"

    def act():
        from fedlm.federation.checkpoint import Checkpoints

        save = Checkpoints.save

        def saves(self, round, tensors, plain):
            save(self, round, tensors, plain)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), -1))
            torch.empty(1 << 33)  # 32 GB: more than other tests may have left to this process

        Checkpoints.save = saves
        make(study, results)()

    ended = forked.run(act, tmp_path / "log")
    assert ended.status == 1, ended.output
    assert "out of memory; the run continues from its last saved round" in ended.output.splitlines()[-1]
    goes_on(study, results, expected, rounds_before=1)


def test_an_error_in_the_code_keeps_its_traceback(tmp_path):
    def act():
        raise RuntimeError("a mistake")

    ended = forked.run(act, tmp_path / "log")
    assert "Traceback" in ended.output and "a mistake" in ended.output
    assert describe(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))


# ---------------------------------------------------------------------------------------------------------
# Two processes


@pytest.mark.slow
def test_two_processes_on_one_run_make_it_once(undisturbed, tmp_path):
    study, expected = undisturbed
    results = tmp_path / "results"
    first = when_it_waits(forked.Child(waits_after_round(1, make(study, results)), tmp_path / "first"))
    second = forked.Child(make(study, results), tmp_path / "second")
    while "another process" not in second.output():
        assert time.monotonic() - second.started < forked.LONGEST
        time.sleep(0.01)
    first.kill()
    first.end()
    # The dead one's lock is gone with it: the second goes on from where the first was.
    ended = second.end()
    assert ended.status == 0, ended.output
    assert "films/iid/fedavg/seed1: another process is running it; waiting for it to finish" in ended.output
    assert "resumed after round 1/4" in ended.output
    assert hashed(record(results)) == expected


@pytest.mark.slow
def test_the_second_of_two_processes_takes_the_record_of_the_first(undisturbed, tmp_path):
    study, expected = undisturbed
    results = tmp_path / "results"
    children = [forked.Child(make(study, results), tmp_path / f"log{number}") for number in range(3)]
    ended = [child.end() for child in children]
    assert [one.status for one in ended] == [0, 0, 0]
    assert sum(one.output.count(": round ") for one in ended) == ROUNDS
    assert sum("already finished; its record is restored" in one.output for one in ended) == 2
    assert hashed(record(results)) == expected


@pytest.mark.slow
def test_different_runs_do_not_wait_for_each_other(undisturbed, tmp_path):
    study, _ = undisturbed
    results = tmp_path / "results"
    first = when_it_waits(forked.Child(waits_after_round(1, make(study, results)), tmp_path / "first"))
    other = forked.run(make(study, results, RUN._replace(method="head_only")), tmp_path / "other")
    first.kill()
    first.end()
    assert other.status == 0 and "another process" not in other.output


@pytest.mark.slow
def test_two_snakemakes_on_one_study(tmp_path):
    """The second is refused, says why, and does no harm; after the first there is nothing left to do."""
    from test_pipeline import Place

    place = Place(tmp_path, methods={"head_only": None})
    first: list[tuple[int, str]] = []
    thread = threading.Thread(target=lambda: first.append(place.snakemake("collect")))
    thread.start()
    while not list(tmp_path.glob("results/tiny/tasks/*")):
        assert thread.is_alive(), first
        time.sleep(0.1)
    status, output = place.snakemake("collect")
    thread.join()
    assert status == 1 and "Directory cannot be locked" in output
    assert first[0][0] == 0, first[0][1]
    status, output = place.snakemake("collect")
    assert (status, "Nothing to be done" in output) == (0, True)
    assert len(place.records()) == 1


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    import fcntl

    def unsupported(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(tmp_path / "lock", lambda: pytest.fail("nobody else is here")):
        pass


# ---------------------------------------------------------------------------------------------------------
# What a finished or a prepared thing was made from has changed


def changed_study(folder, change) -> tuple:
    """Make a run, change what it depends on, make it again; return both records and the log."""
    path = tiny_study.write(folder, examples=60, federation={"clients": 2, "rounds": 1})
    make(load(path), folder / "results")()
    before = record(folder / "results")
    change(folder)
    lines: list[str] = []
    study = load(folder / "study.yaml")
    folders = running.Folders("study", folder / "results")
    folders.record(RUN).unlink()
    missing = running.restore(study, folders)
    running.execute(study, RUN, folders.record(RUN), folders, lines.append)
    return before, record(folder / "results"), lines, RUN in missing


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def another_model(folder):
    from tests import tiny

    shutil.rmtree(folder / "model")
    tiny.save(folder / "model", "bert", [text for text, _ in tiny_study.sentences(60)], seed=5)


def fewer_rows(folder):
    rows = list(csv.reader((folder / "data.csv").open()))
    with (folder / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows[:-6])


CHANGES = {
    "the same data written again": (lambda folder: (folder / "data.csv").touch(), set()),
    "a row of data": (fewer_rows, {"origin", "data", "partition"}),
    "a word of data": (lambda f: replace_in(f / "data.csv", "film", "play"), {"origin", "data", "partition"}),
    "the model's weights": (another_model, {"origin", "model"}),
    "a setting of the task": (
        lambda f: replace_in(f / "study.yaml", "max_length: 32", "max_length: 8"),
        {"config", "origin", "data", "partition"},
    ),
    "a setting of training": (lambda f: replace_in(f / "study.yaml", "0.001", "0.002"), {"config"}),
    "the number of clients": (
        lambda f: replace_in(f / "study.yaml", "clients: 2", "clients: 3"),
        {"config", "partition"},
    ),
    "the kept record": (
        lambda f: next(f.rglob("finished/*.json")).write_text('{"status": "finished", "provenance": {'),
        set(),
    ),
    "the partition": (lambda f: next(f.rglob("partitions/**/seed1.json")).write_text("{}"), set()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_is_made_again_and_never_mixed(name, tmp_path):
    change, differs = CHANGES[name]
    before, after, lines, missing = changed_study(tmp_path, change)
    keys = ("config", "origin", "data", "partition", "model")
    one, other = before["provenance"], after["provenance"]
    assert {key for key in keys if one[f"{key}_sha256"] != other[f"{key}_sha256"]} == differs
    again = bool(differs) or name == "the kept record"
    assert any(": round 1/1" in line for line in lines) == again
    # Nor does collecting take the old record for the new study's.
    assert missing == (again or name == "the partition")
    assert (one["payload_sha256"] != other["payload_sha256"]) == bool(differs)


@pytest.mark.slow
def test_damaged_prepared_data_are_named(tmp_path):
    path = tiny_study.write(tmp_path, examples=60, federation={"clients": 2, "rounds": 1})
    make(load(path), tmp_path / "results")()
    folders = running.Folders("study", tmp_path / "results")
    shutil.rmtree(folders.root / "finished")
    content = bytearray((folders.task("films") / "examples.parquet").read_bytes())
    content[len(content) // 2] ^= 16
    (folders.task("films") / "examples.parquet").write_bytes(content)
    with pytest.raises(UserError, match="prepare again"):
        make(load(path), tmp_path / "results")()
    (folders.task("films") / "examples.parquet").unlink()
    make(load(path), tmp_path / "results")()


# ---------------------------------------------------------------------------------------------------------
# Making a recorded run again


def fedlm(*arguments, cwd) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "fedlm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=cwd, env=environment)


@pytest.mark.slow
def test_a_record_is_enough_to_make_the_run_again(tmp_path):
    study = load(tiny_study.write(tmp_path, examples=60, federation={"clients": 2, "rounds": 2}))
    make(study, tmp_path / "results")()
    path = tmp_path / "record.json"
    shutil.copy(running.Folders("study", tmp_path / "results").record(RUN), path)
    shutil.rmtree(tmp_path / "results")
    done = fedlm("rerun", path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "same: final payload, scores, bytes, FLOPs and memory"
    assert not (tmp_path / "results").exists()

    replace_in(tmp_path / "data.csv", "film", "play")
    done = fedlm("rerun", path, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "different: final payload: " in done.stdout and "changed: data: " in done.stdout
    assert "changed: code" not in done.stdout

    (tmp_path / "data.csv").unlink()
    done = fedlm("rerun", path, cwd=tmp_path)
    assert done.returncode == 2 and "data.csv: no such file" in done.stderr
    path.write_text("{}")
    done = fedlm("rerun", path, cwd=tmp_path)
    assert done.returncode == 2 and "record.json: not a run's record" in done.stderr
