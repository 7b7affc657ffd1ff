"""Compiling records: every number arrives, the same bytes each time, no wrong file gets through."""

import json
import random
import subprocess
import sys

import pandas
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import synthetic_record, write_study

from fedlm.base.errors import UserError
from fedlm.results import records, scene


def write(path, record):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return path


def collect(folder, paths):
    records.collect(paths, folder / "rounds.parquet", folder / "runs.parquet")
    return records.load_runs(folder / "runs.parquet"), records.load_rounds(folder / "rounds.parquet")


def test_a_record_becomes_one_row_and_one_row_a_round(tmp_path):
    record = synthetic_record(rounds=3, skew={"label_divergence": 0.25, "size_gini": 0.5})
    record["extra"] = {"queries": 12, "words": "left out"}
    runs, rounds = collect(tmp_path, [write(tmp_path / "a.json", record)])
    row = runs.iloc[0]
    same = [
        "study",
        "task",
        "partition",
        "method",
        "seed",
        "metric",
        "test_score",
        "validation_score",
        "clients",
    ]
    same += ["upload_bytes", "download_bytes", "broadcast_bytes", "flops", "train_seconds", "wall_seconds"]
    for column in [*same, "resident_set_bytes"]:
        assert row[column] == record[column], column
    for column, value in record["memory"].items():
        assert row[column] == value
    assert row["rounds"] == 3
    assert row["test_macro_f1"] == record["test"]["macro_f1"]
    assert row["extra_queries"] == 12
    assert "extra_words" not in runs
    assert (row["label_divergence"], row["size_gini"]) == (0.25, 0.5)
    assert row["commit"] == record["provenance"]["commit"] and not row["dirty"]
    assert pandas.isna(row["cuda_peak_bytes"])

    assert rounds["round"].tolist() == [0, 1, 2, 3]
    assert rounds["validation_score"].tolist() == [
        record["baseline_validation"]["accuracy"],
        *(entry["validation_score"] for entry in record["rounds"]),
    ]
    assert rounds["upload_bytes"].tolist() == [0] + [record["upload_bytes"] // 3 * n for n in (1, 2, 3)]
    assert rounds["flops"].iloc[-1] == record["flops"]
    assert rounds["train_seconds"].iloc[-1] == pytest.approx(record["train_seconds"])
    assert rounds["participants"].tolist() == [0, 8, 8, 8]


def test_memory_by_block_keeps_the_order_of_the_blocks(tmp_path):
    record = synthetic_record(method="fedcybgd")
    memory = record["memory_by_block"]["0"]
    record["memory_by_block"] = {str(block): memory for block in (10, 2, 0, 1)}
    runs, _ = collect(tmp_path, [write(tmp_path / "a.json", record)])
    assert [entry["block"] for entry in runs["memory_by_block"].iloc[0]] == ["0", "1", "2", "10"]


def test_a_run_without_any_turn_has_no_memory(tmp_path):
    runs, _ = collect(tmp_path, [write(tmp_path / "a.json", synthetic_record() | {"memory": None})])
    assert runs[records.MEMORY_COLUMNS].isna().all(axis=None)


def test_rounds_without_a_score_stay_without_one(tmp_path):
    record = synthetic_record(rounds=4)
    for entry in record["rounds"][::2]:
        entry["validation"] = entry["validation_score"] = entry["train_loss"] = None
    _, rounds = collect(tmp_path, [write(tmp_path / "a.json", record)])
    assert rounds["validation_score"].isna().tolist() == [False, True, False, True, False]


def test_the_same_records_give_the_same_bytes_in_any_order(tmp_path, monkeypatch):
    paths, _, _ = write_study(tmp_path, seeds=(2, 10, 1), methods=("fedavg", "fedcybgd"))
    contents = []
    monkeypatch.setattr(records, "ROWS_IN_MEMORY", 40)  # several batches
    for seed in range(3):
        random.Random(seed).shuffle(paths)
        records.collect(iter(paths), tmp_path / "rounds.parquet", tmp_path / "runs.parquet")
        contents.append([(tmp_path / f"{name}.parquet").read_bytes() for name in ("rounds", "runs")])
    assert contents[0] == contents[1] == contents[2]
    runs = records.load_runs(tmp_path / "runs.parquet")
    assert runs["seed"].tolist()[:3] == [1, 2, 10]
    assert len(records.load_rounds(tmp_path / "rounds.parquet")) == len(runs) * 5


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(end=st.integers(0, 3000))
def test_a_cut_off_record_is_named(tmp_path, end):
    whole = json.dumps(synthetic_record(rounds=2))
    path = tmp_path / "cut.json"
    path.write_text(whole[: min(end, len(whole) - 1)])
    with pytest.raises(UserError, match="cut.json"):
        records.collect([path], tmp_path / "rounds.parquet", tmp_path / "runs.parquet")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"record": 2}, "record: version 2, but this program reads version 1"),
        ({"status": "running"}, "status"),
        ({"test_score": float("nan")}, "test_score"),
        ({"rounds": []}, "rounds"),
        ({"seed": "one"}, "seed"),
        ({"memory": {}}, "memory"),
    ],
)
def test_a_foreign_or_incomplete_record_is_named(tmp_path, change, words):
    good = write(tmp_path / "good.json", synthetic_record(seed=2))
    bad = write(tmp_path / "bad.json", synthetic_record() | change)
    with pytest.raises(UserError, match=f"bad.json.*{words}"):
        collect(tmp_path, [good, bad])
    assert not (tmp_path / "runs.parquet").exists()


def test_absent_and_no_records(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json"):
        collect(tmp_path, [tmp_path / "absent.json"])
    with pytest.raises(UserError, match="no run records"):
        collect(tmp_path, [])


def test_runs_that_may_not_be_compared_are_refused(tmp_path):
    one = write(tmp_path / "one.json", synthetic_record(method="fedavg"))
    for name, change in {"data": "data_sha256", "partition": "partition_sha256"}.items():
        record = synthetic_record(method="fedcybgd")
        record["provenance"][change] = "something else"
        other = write(tmp_path / "other.json", record)
        with pytest.raises(UserError, match=f"made with another {name}.*delete the outdated"):
            collect(tmp_path, [one, other])
    other = write(tmp_path / "other.json", synthetic_record(method="fedcybgd", model="another"))
    with pytest.raises(UserError, match="made with another model"):
        collect(tmp_path, [one, other])
    with pytest.raises(UserError, match="the same run as"):
        collect(tmp_path, [one, write(tmp_path / "copy.json", synthetic_record(method="fedavg"))])
    other = write(tmp_path / "other.json", synthetic_record(seed=9, study="other"))
    with pytest.raises(UserError, match="of study other"):
        collect(tmp_path, [one, other])


def test_what_is_missing_is_found_and_described(tmp_path):
    paths, _, expected = write_study(tmp_path, seeds=(1, 2), methods=("fedavg", "fedlora"))
    gone = {
        ("bbc_news", "iid", "fedlora", 2),
        ("bbc_news", "iid", "fedavg", 1),
        ("bbc_news", "iid", "fedavg", 2),
    }
    kept = [path for path, run in zip(paths, expected, strict=True) if run not in gone]
    runs, _ = collect(tmp_path, kept)
    absent = scene.missing(runs, expected)
    assert set(absent) == gone
    assert scene.describe_missing(absent) == [
        "bbc_news / iid / fedavg: seeds 1, 2",
        "bbc_news / iid / fedlora: seed 2",
    ]
    assert scene.missing(runs, expected[:0]) == []


def test_compiled_files_that_are_not_ours_are_named(tmp_path):
    (tmp_path / "runs.parquet").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"runs\.parquet"):
        records.load_runs(tmp_path / "runs.parquet")
    pandas.DataFrame({"a": [1]}).to_parquet(tmp_path / "runs.parquet")
    with pytest.raises(UserError, match="lacks the column"):
        records.load_runs(tmp_path / "runs.parquet")
    with pytest.raises(UserError, match=r"absent\.parquet"):
        records.load_rounds(tmp_path / "absent.parquet")


@pytest.mark.slow
def test_results_tables_and_figures_need_no_torch():
    modules = "fedlm.data.partition, fedlm.results.tables, fedlm.results.figures"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
