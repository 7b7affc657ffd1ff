"""config/paper.yaml runs as it stands: every row of it, on tiny models and a few made-up examples."""

import gc
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pandas
import pytest
import tiny
import tiny_study

from fedlm.jobs import running
from fedlm.results import records, tables
from fedlm.study import reading, study, yaml_files
from fedlm.study.check import check
from tasks.glue import PARTS

ROOT = Path(__file__).resolve().parent.parent
STUDY = ROOT / "config" / "paper.yaml"
PAPER = reading.load(STUDY)
FAMILIES = {"roberta_base": "roberta", "gpt2": "gpt2", "llama2_7b": "llama"}
EXAMPLES = 20  # of which the last ten are the official validation split, where there is one
ROUNDS = 1

pytestmark = pytest.mark.slow


def texts() -> list[str]:
    """Return as many different texts as there are examples."""
    return [text for text, _ in tiny_study.sentences(EXAMPLES)]


def write_split(folder: Path, rows: list[dict], test: str | None = None) -> None:
    """Write rows as the hub has them, the last ten as the split `test`."""
    folder.mkdir(parents=True)
    parts = {"train": rows[:-10], test: rows[-10:]} if test else {"train": rows}
    for split, part in parts.items():
        pandas.DataFrame(part).to_parquet(folder / f"{split}-00000-of-00001.parquet")


def write_data(folder: Path) -> dict[str, Path]:
    """Write made-up data in the hub's layout and return their folder by task."""
    for name, part in PARTS.items():
        rows = []
        for index, text in enumerate(texts()):
            label = index % len(part.label_names) if part.label_names else index % 11 / 2
            columns = zip(part.columns, (text, f"{text} again"), strict=False)
            rows.append({**dict(columns), "label": label})
        write_split(folder / "glue" / name, rows, "validation_matched" if name == "mnli" else "validation")
    questions = [
        {
            "question": "what was it",
            "context": text,
            "title": f"title {index % 3}",
            "answers": {"text": [text.split()[3]], "answer_start": [text.index(text.split()[3])]},
        }
        for index, text in enumerate(texts())
    ]
    write_split(folder / "squad" / "plain_text", questions, "validation")
    instructions = [
        {"instruction": text, "input": "the film" * (index % 2), "output": text.split()[3]}
        for index, text in enumerate(texts())
    ]
    write_split(folder / "alpaca_gpt4" / "data", instructions)
    return {name: folder / name for name in ("glue", "squad", "alpaca_gpt4")}


def shrunk(folder: Path, families: dict[str, str] = FAMILIES) -> study.Study:
    """Return the paper's study with tiny models, few examples and clients: the same rows, smaller numbers."""
    data = write_data(folder / "data")
    models = {
        source: str(tiny.save(folder / "models" / family, family, texts(), layers=4, hidden=32))
        for source, family in families.items()
    }
    values = yaml_files.read_yaml(STUDY)
    values["seeds"] = values["seeds"][:1]
    values["pipeline"]["gpus"] = 0
    values["training"]["device"] = "cpu"
    values["methods"]["centralised_cyclic"]["switch_every"] = 2
    values["methods"]["fedcybgd_powersgd"]["upload_compression"].update(rank=1, least_rate=1)
    for part in (values, *values["tasks"].values()):
        if "model" in part:
            part["model"]["source"] = models[part["model"]["source"]]
        if "federation" in part:
            part["federation"].update(clients=3, rounds=ROUNDS)
        if "training" in part:
            part["training"].update(batch_size=3)
            part["training"].update({"accumulation": 2} if "accumulation" in part["training"] else {})
    for label, entry in values["tasks"].items():
        entry.update(source=str(data[entry.get("task", label)]), max_length=64, validation_share=0.4)
        entry.update({"doc_stride": 8} if "doc_stride" in entry else {})
        if label == "alpaca_gpt4":
            entry.update(test_examples=6, validation_examples=3)
    return reading.parse(values)


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory):
    """Keep what `datasets` makes of local files out of the home folder, and do not search all of PyTorch and
    Transformers for garbage at each memory probe: half of the time of runs this small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        datasets.disable_progress_bars()
        patch.setattr(gc, "unfreeze", lambda: None)
        yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """The small study, and where its results go."""
    folder = tmp_path_factory.mktemp("paper")
    study = shrunk(folder)
    return study, running.Folders(study.study, folder / "results")


def execute(study, run, folders) -> dict:
    """Make a run, or find it finished, and return its record."""
    running.execute(study, run, folders.record(run), folders, lambda line: None)
    return json.loads(folders.record(run).read_text())


def test_it_is_the_same_study(paper):
    study, _ = paper
    check(study)
    assert list(study.runs()) == [run for run in PAPER.runs() if run.seed == PAPER.seeds[0]]
    assert len(PAPER.seeds) >= 5
    for run in study.runs():
        small, large = study.run(*run), PAPER.run(*run)
        assert (small.method, small.task) == (large.method, large.task)
        assert small.model.weights == large.model.weights


def test_the_settings_of_the_paper():
    def of(task, method="fedcybgd"):
        run = PAPER.run(task, "iid", method, 1)
        training, federation = run.training, run.federation
        return (
            run.model.source,
            (federation.clients, federation.rounds),
            (training.batch_size, training.accumulation, training.local_epochs),
            (training.learning_rate, training.schedule),
        )

    for task in ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"):
        assert of(task) == ("roberta_base", (24, 3), (64, 1, 1), (2e-5, "linear"))
        assert of(task) == of(task, "fedavg") == of(task, "fed_full") == of(task, "fedbavg")
    assert of("squad") == ("gpt2", (24, 3), (24, 1, 1), (3e-5, "linear"))
    assert of("alpaca_gpt4") == ("llama2_7b", (64, 6), (2, 8, 1), (1e-6, "cosine"))
    squad, alpaca = PAPER.tasks["squad"].settings, PAPER.tasks["alpaca_gpt4"].settings
    assert (squad.max_length, squad.doc_stride) == (384, 128)
    assert (alpaca.max_length, alpaca.test_examples) == (512, 500)
    assert math.isclose(PAPER.run("squad", "iid", "fedavg", 1).training.warmup * 3, 0.1, rel_tol=0.01)
    lora = [PAPER.methods[label].settings for label in ("fedlora", "fedlora_gpt2")]
    assert [(one.rank, one.alpha) for one in lora] == [(16, 32), (24, 16)]


@pytest.mark.parametrize("task", PAPER.tasks)
def test_every_method_runs(paper, task):
    study, folders = paper
    records = {run.method: execute(study, run, folders) for run in study.runs() if run.task == task}
    for label, record in records.items():
        assert record["status"] == "finished", label
        assert math.isfinite(record["test_score"]), label
        assert len(record["rounds"]) == ROUNDS, label
        assert (record["upload_bytes"] > 0) == (label != "local_only"), label
    # A turn uploads one of four blocks, or all of the model, or much less than a block.
    upload = {label: record["upload_bytes"] for label, record in records.items()}
    assert upload["fed_full"] == upload["fedavg"] > 3 * upload["fedcybgd"]
    assert upload["fedbavg"] == upload["fedcybgd"] > 3 * upload["fedcybgd_powersgd"]
    if "fedcybgd_script" in upload:
        assert upload["fedcybgd"] < upload["fedcybgd_script"] < upload["fedavg"]
    if "head_only" in upload:
        assert upload["head_only"] < min(upload["fedadapter"], upload["fedcybgd"])


def test_the_tables_hold_every_row(paper):
    study, folders = paper
    runs = list(study.runs())
    for run in runs:
        execute(study, run, folders)
    compiled = [folders.root / name for name in ("runs.parquet", "rounds.parquet")]
    assert records.collect([folders.record(run) for run in runs], *reversed(compiled)) == len(runs)
    titles = {label: entry.title for label, entry in study.methods.items()}
    tables.make(*compiled, [run[:4] for run in runs], titles, folders.root / "tables")
    main = pandas.read_csv(folders.root / "tables" / "main.csv")
    assert {(row.task, row.method) for row in main.itertuples()} == {(run.task, run.method) for run in runs}
    assert not len(pandas.read_csv(folders.root / "tables" / "missing.csv"))


def test_another_model_of_the_third_set_up(tmp_path):
    """Bloom in LLaMA's place: the paper's further decoder, with every method of its row."""
    study = shrunk(tmp_path, {**FAMILIES, "llama2_7b": "bloom"})
    check(study)
    folders = running.Folders(study.study, tmp_path / "results")
    for run in study.runs():
        if run.task == "alpaca_gpt4":
            record = execute(study, run, folders)
            assert math.isfinite(record["test_score"]), run.method
            assert record["config"]["model"]["source"].endswith("bloom")


def test_the_pipeline_plans_it(tmp_path):
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--cores", "1", "--configfile", str(STUDY)]
    command += ["--snakefile", str(ROOT / "Snakefile"), "--directory", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(re.findall(r"^(\w+) +(\d+)$", done.stdout + done.stderr, re.MULTILINE))
    runs = sum(1 for _ in PAPER.runs())
    assert (int(counts["train"]), int(counts["prepare"])) == (runs, len(PAPER.tasks))
