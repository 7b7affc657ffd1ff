"""The studies that others made the standard: each runs as it stands to its table, on tiny models and data."""

from pathlib import Path

import pandas
import pytest
import tiny
from test_paper import execute, surroundings, texts, write_data, write_split  # noqa: F401

from fedlm.costs import cases
from fedlm.jobs import running
from fedlm.results import records, tables
from fedlm.study import reading, yaml_files
from fedlm.study.check import check

FOLDER = Path(__file__).resolve().parent.parent / "config" / "standards"
STUDIES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
FAMILIES = {
    "llama2_7b": "llama",
    "mistral_7b": "mistral",
    "gemma3_270m": "gemma3_text",
    "roberta_base": "roberta",
}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("surroundings")]


def write_all_data(folder: Path) -> dict[str, Path]:
    found = write_data(folder)
    dolly = [
        {"instruction": text, "context": "", "response": text.split()[3], "category": f"kind {index % 3}"}
        for index, text in enumerate(texts())
    ]
    aya = [
        {"inputs": text, "targets": text.split()[3], "user_id": f"person {index % 7}"}
        for index, text in enumerate(texts())
    ]
    write_split(folder / "dolly", dolly)
    write_split(folder / "aya", aya)
    return {**found, "dolly": folder / "dolly", "aya": folder / "aya"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all_data(tmp_path_factory.mktemp("data"))


def shrunk(name: str, folder: Path, data: dict[str, Path]):
    """Return the study with a tiny model, few examples, three clients and one round: the same rows."""
    values = yaml_files.read_yaml(FOLDER / f"{name}.yaml")
    values["seeds"] = values["seeds"][:1]
    values["pipeline"] = {"gpus": 0}
    values["federation"].update(clients=3, rounds=1, participation=1.0)
    values["training"].update(batch_size=3, device="cpu", local_epochs=1)
    for key, value in (("accumulation", 2), ("local_steps", 2)):
        if key in values["training"]:
            values["training"][key] = value
    family = FAMILIES[values["model"]["source"]]
    values["model"]["source"] = str(tiny.save(folder / "model", family, texts(), layers=2, hidden=32))
    for label, entry in values["tasks"].items():
        entry.update(source=str(data[entry.get("task", label)]), max_length=48, validation_share=0.4)
        if label in ("alpaca_gpt4", "dolly", "aya"):
            entry.update(test_examples=6, validation_examples=3)
    # One partition shows what several would.
    values["partitions"] = dict(list(values["partitions"].items())[:1])
    return reading.parse(values)


def test_there_are_those_that_readers_expect():
    assert STUDIES == [
        "edgeflowertune-qnli",
        "fedex-glue",
        "fedit-dolly",
        "fedllmbench-aya",
        "fedpetuning-glue",
        "flowertune-general-nlp",
        "openfedllm-alpaca",
    ]


@pytest.mark.parametrize("name", STUDIES)
def test_it_is_valid_says_where_it_is_from_and_what_differs(name):
    path = FOLDER / f"{name}.yaml"
    study = reading.load(path)
    check(study)
    assert study.study == name and len(study.seeds) >= 5
    words = " ".join(path.read_text().replace("#", "").split())
    assert "github.com/" in words and "What differs:" in words
    # What it would cost is known without its model or data.
    assert {case.task for case in cases.of_study(study)} == set(study.tasks)


@pytest.mark.parametrize("name", STUDIES)
def test_every_row_runs_to_its_table(name, tmp_path, data):
    study = shrunk(name, tmp_path, data)
    check(study)
    folders = running.Folders(study.study, tmp_path / "results")
    runs = list(study.runs())
    for run in runs:
        record = execute(study, run, folders)
        assert record["status"] == "finished"
        assert (record["upload_bytes"] > 0) == (run.method != "local_only")
    compiled = [folders.root / file for file in ("runs.parquet", "rounds.parquet")]
    records.collect([folders.record(run) for run in runs], *reversed(compiled))
    titles = {label: entry.title for label, entry in study.methods.items()}
    tables.make(*compiled, [run[:4] for run in runs], titles, folders.root / "tables")
    main = pandas.read_csv(folders.root / "tables" / "main.csv")
    assert {(row.task, row.method) for row in main.itertuples()} == {(run.task, run.method) for run in runs}
    assert not len(pandas.read_csv(folders.root / "tables" / "missing.csv"))
