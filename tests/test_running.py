"""Runs from labels to records: what was made from something else is made again, what is finished is kept."""

import csv
import json

import pytest
import tiny_study

from fedlm.base.errors import UserError
from fedlm.jobs import running
from fedlm.study.reading import load
from fedlm.study.study import Run

RUN = Run("films", "iid", "head_only", 1)


def record(folder, study, name="record.json", lines=None):
    folders = running.Folders("study", folder / "results")
    say = (lambda line: None) if lines is None else lines.append
    running.execute(load(study), RUN, folder / name, folders, say)
    return json.loads((folder / name).read_text())


def test_a_changed_data_file_is_prepared_again_and_never_mixed(tmp_path):
    study = tiny_study.write(tmp_path)
    before = record(tmp_path, study)
    again = record(tmp_path, study)
    assert again == before  # put back, not made again
    rows = list(csv.reader((tmp_path / "data.csv").open()))
    with (tmp_path / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows[:-6])
    after = record(tmp_path, study)
    for hashed in ("data_sha256", "partition_sha256", "payload_sha256"):
        assert after["provenance"][hashed] != before["provenance"][hashed]


def test_another_number_of_clients_divides_again(tmp_path):
    first = record(tmp_path, tiny_study.write(tmp_path))
    more = tiny_study.write(tmp_path, federation={"clients": 3, "rounds": 1})
    second = record(tmp_path, more)
    assert (first["clients"], second["clients"]) == (2, 3)
    assert first["provenance"]["data_sha256"] == second["provenance"]["data_sha256"]


def test_a_finished_run_is_put_back_and_says_so(tmp_path):
    study, lines = tiny_study.write(tmp_path), []
    before = record(tmp_path, study)
    assert record(tmp_path, study, "other.json", lines) == before
    assert lines == ["films/iid/head_only/seed1: was finished before; its record is put back"]


def test_a_label_that_the_study_has_not_is_named(tmp_path):
    study = load(tiny_study.write(tmp_path))
    folders = running.Folders("study", tmp_path / "results")
    with pytest.raises(UserError, match="task: 'films2' is not in the study; allowed: films"):
        running.execute(study, RUN._replace(task="films2"), tmp_path / "r.json", folders)
