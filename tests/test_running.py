"""Runs from labels to records: what was made from something else is made again, what is finished is kept."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import tiny_study
import yaml
from typer.testing import CliRunner

from fedlm.__main__ import app
from fedlm.base.errors import UserError
from fedlm.base.files import locked
from fedlm.data.partition import PartitionFile
from fedlm.jobs import record as record_module
from fedlm.jobs import running
from fedlm.study.reading import load
from fedlm.study.study import Run

RUN = Run("films", "iid", "head_only", 1)


def record(folder, study, name="record.json", lines=None):
    folders = running.Folders("study", folder / "results")
    say = (lambda line: None) if lines is None else lines.append
    running.execute(load(study), RUN, folder / name, folders, say)
    return json.loads((folder / name).read_text())


@pytest.mark.slow
def test_a_changed_data_file_is_prepared_again_and_never_mixed(tmp_path):
    study = tiny_study.write(tmp_path)
    before = record(tmp_path, study)
    again = record(tmp_path, study)
    assert again == before  # restored, not run again
    rows = list(csv.reader((tmp_path / "data.csv").open()))
    with (tmp_path / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows[:-6])
    after = record(tmp_path, study)
    for hashed in ("data_sha256", "partition_sha256", "payload_sha256"):
        assert after["provenance"][hashed] != before["provenance"][hashed]


@pytest.mark.slow
def test_another_number_of_clients_divides_again(tmp_path):
    first = record(tmp_path, tiny_study.write(tmp_path))
    more = tiny_study.write(tmp_path, federation={"clients": 3, "rounds": 1})
    second = record(tmp_path, more)
    assert (first["clients"], second["clients"]) == (2, 3)
    assert first["provenance"]["data_sha256"] == second["provenance"]["data_sha256"]


def test_a_finished_run_is_restored_and_logged(tmp_path):
    study, lines = tiny_study.write(tmp_path), []
    before = record(tmp_path, study)
    assert record(tmp_path, study, "other.json", lines) == before
    assert lines == ["films/iid/head_only/seed1: already finished; its record is restored"]


ROUND = {"federation": {"clients": 2, "rounds": 1}}


def made(folder, run, lines, **changes):
    """Make a run of the tiny study with changes; return its record and the lines logged about its rounds."""
    folders = running.Folders("study", folder / "results")
    before = len(lines)
    study = load(tiny_study.write(folder, examples=60, **{**ROUND, **changes}))
    running.execute(study, run, folders.record(run), folders, lines.append)
    trained = any(": round " in line for line in lines[before:])
    return json.loads(folders.record(run).read_text()), trained


def test_a_label_that_is_renamed_trains_nothing(tmp_path):
    lines = []
    before, trained = made(tmp_path, RUN, lines)
    assert trained
    tasks = yaml.safe_load((tmp_path / "study.yaml").read_text())["tasks"]
    renamed = {
        "methods": {"only_the_head": {"method": "head_only", "title": "The head alone"}},
        "partitions": {"equal": {"scheme": "iid"}},
        "tasks": {"movies": tasks["films"]},
    }
    run = Run("movies", "equal", "only_the_head", 1)
    after, trained = made(tmp_path, run, lines, **renamed)
    assert not trained
    assert lines[-1] == "movies/equal/only_the_head/seed1: already finished; its record is restored"
    labels = dict(zip(("task", "partition", "method"), run, strict=False))
    assert after.pop("content_sha256") != before.pop("content_sha256")
    assert after == {**before, **labels}
    # The copy holds the old labels; collecting, too, puts it back under the present ones.
    folders = running.Folders("study", tmp_path / "results")
    folders.record(run).unlink()
    study = load(tiny_study.write(tmp_path, **ROUND, **renamed))
    assert running.restore(study, folders) == []
    again = json.loads(folders.record(run).read_text())
    assert again.pop("content_sha256") == record_module.content_hash(again) and again == after


@pytest.mark.slow
def test_an_edit_that_is_undone_trains_nothing(tmp_path):
    lines, other = [], {"training": {"learning_rate": 2e-3, "batch_size": 16, "device": "cpu"}}
    first, _ = made(tmp_path, RUN, lines)
    second, trained = made(tmp_path, RUN, lines, **other)
    assert trained and second["provenance"]["payload_sha256"] != first["provenance"]["payload_sha256"]
    # Both versions are kept.
    assert made(tmp_path, RUN, lines) == (first, False)
    assert made(tmp_path, RUN, lines, **other) == (second, False)


@pytest.mark.slow
def test_seeds_and_settings_are_no_labels(tmp_path):
    lines = []
    seeds, labels = {"seeds": [1, 2]}, {"methods": {"head_only": {"method": "fedavg"}}}
    first, _ = made(tmp_path, RUN, lines, **seeds)
    for run, changes in ((RUN._replace(seed=2), seeds), (RUN, labels)):
        other, trained = made(tmp_path, run, lines, **changes)
        assert trained and other["provenance"]["payload_sha256"] != first["provenance"]["payload_sha256"]


def test_a_partition_that_other_code_drew_is_drawn_again(tmp_path):
    path = running.Folders("study", tmp_path / "results").partition("films", "iid", 1)
    made(tmp_path, RUN, [])
    drawn = path.read_bytes()
    assert drawn.count(b'"code_sha256": "') == 1
    path.write_bytes(drawn.replace(b'"code_sha256": "', b'"code_sha256": "0'))
    made(tmp_path, RUN, [])
    assert path.read_bytes() == drawn


def test_a_partition_drawn_again_keeps_what_a_processor_rounds_differently(tmp_path):
    """Runs of several machines can only be compared if their partitions have the same hash."""
    study = load(tiny_study.write(tmp_path, examples=60, **ROUND))
    folders = running.Folders("study", tmp_path / "results")
    running.prepare(study, "films", folders, print)
    path = folders.partition("films", "iid", 1)

    def drawn_after(factor):
        skew = {name: value * factor for name, value in drawn.skew.items()}
        drawn.model_copy(update={"skew": skew, "code_sha256": "other"}).write(path)
        return running.partition(study, "films", "iid", 1, folders), skew

    drawn = running.partition(study, "films", "iid", 1, folders)
    assert all(value > 0 for name, value in drawn.skew.items() if name != "size_gini")
    again, skew = drawn_after(1 + 1e-15)
    assert again.skew == skew != drawn.skew and again.code_sha256 == drawn.code_sha256
    assert PartitionFile.read(path) == again
    again, _ = drawn_after(1.001)
    assert again == drawn


# ---------------------------------------------------------------------------------------------------------
# Cleaning up


def files(folder) -> dict[str, int]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def cleaned(folder, *options) -> dict[str, int]:
    """Run the command on the study as it is; return what it says that it removed."""
    arguments = ["clean", str(folder / "study.yaml"), "--results", str(folder / "results"), *options]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    *lines, total = done.output.splitlines()
    found = {}
    for line in lines:
        path, _, size = line.rpartition(": ")
        found[Path(path).relative_to(folder / "results/study").as_posix()] = int(
            size.removesuffix(" bytes").replace(",", "")
        )
    verb = "would be removed" if options else "removed"
    assert total == f"study: {len(found)} {verb}, {sum(found.values()):,} bytes"
    return found


@pytest.mark.slow
def test_clean_removes_what_the_study_does_not_use_and_nothing_else(tmp_path):
    root, lines = tmp_path / "results/study", []
    runs = {"seeds": [1], "methods": {"head_only": None}}
    made(tmp_path, RUN, lines, **runs)
    used = files(root)
    assert cleaned(tmp_path) == {} and files(root) == used
    tasks = yaml.safe_load((tmp_path / "study.yaml").read_text())["tasks"]

    # Another seed, another learning rate, another method of which only checkpoints are left; another task.
    faster = {"training": {"learning_rate": 2e-3, "batch_size": 16, "device": "cpu"}}
    made(tmp_path, RUN._replace(seed=2), lines, **{**runs, "seeds": [1, 2]})
    made(
        tmp_path,
        RUN._replace(task="movies"),
        lines,
        **runs,
        tasks={"movies": {**tasks["films"], "max_length": 16}},
    )
    made(tmp_path, RUN, lines, **runs, **faster)
    made(tmp_path, RUN, lines, **runs)
    left = root / "checkpoints/films/iid/gone/seed1"
    left.mkdir(parents=True)
    (left / "lock").touch()
    (left / "round-000001.checkpoint").write_bytes(b"1234")

    everything = files(root)
    announced = cleaned(tmp_path, "--dry-run")
    assert files(root) == everything
    assert cleaned(tmp_path) == announced
    # The present study's files are those that there were, to the byte.
    assert files(root) == used
    assert sum(announced.values()) == sum(everything.values()) - sum(used.values())
    assert announced["checkpoints/films/iid/gone/seed1"] == 4
    assert {
        "runs/films/iid/head_only/seed2.json",
        "runs/movies/iid/head_only/seed1.json",
        "partitions/films/iid/seed2.json",
        "tasks/movies",
    } < announced.keys()
    assert sum(path.startswith("finished/") for path in announced) == 3
    # And so nothing is trained.
    (root / "runs/films/iid/head_only/seed1.json").unlink()
    assert not made(tmp_path, RUN, lines, **runs)[1]


def test_clean_keeps_what_the_study_uses_although_its_data_are_gone(tmp_path):
    root = tmp_path / "results/study"
    made(tmp_path, RUN, [])
    shutil.rmtree(root / "tasks")
    shutil.rmtree(root / "partitions")
    used = files(root)
    assert cleaned(tmp_path) == {} and files(root) == used
    # Without the data file nobody can know what is used: nothing is removed.
    (tmp_path / "data.csv").unlink()
    done = CliRunner().invoke(
        app, ["clean", str(tmp_path / "study.yaml"), "--results", str(tmp_path / "results")]
    )
    assert isinstance(done.exception, UserError) and "data.csv" in str(done.exception)
    assert files(root) == used


def test_clean_keeps_what_a_run_in_progress_uses(tmp_path):
    root, run = tmp_path / "results/study", Run("films", "iid", "gone", 2)
    made(tmp_path, run, [], seeds=[2], methods={"gone": {"method": "fedavg"}})
    checkpoints = running.Folders("study", tmp_path / "results").checkpoints(run)
    (checkpoints / "round-000001.checkpoint").write_bytes(b"1234")
    (root / "runs/films/iid/gone/seed2.json").unlink()
    everything = files(root)
    tiny_study.write(tmp_path, **ROUND)
    with locked(checkpoints / "lock", lambda: None):
        removed = cleaned(tmp_path)
    assert [path.partition("/")[0] for path in removed] == ["finished"]
    assert set(everything) - set(files(root)) == set(removed)
    assert set(cleaned(tmp_path)) == {"checkpoints/films/iid/gone/seed2", "partitions/films/iid/seed2.json"}


def test_a_label_that_the_study_has_not_is_named(tmp_path):
    study = load(tiny_study.write(tmp_path))
    folders = running.Folders("study", tmp_path / "results")
    with pytest.raises(UserError, match="task: 'films2' is not in the study; allowed: films"):
        running.execute(study, RUN._replace(task="films2"), tmp_path / "r.json", folders)
