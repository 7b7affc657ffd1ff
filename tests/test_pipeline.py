"""The pipeline as a reader runs it: real Snakemake processes on a copy of the repository and a tiny study."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas
import pytest
import yaml

from fedlm.results.contents import TABLES, names_of_figures
from tests import tiny_study

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("Snakefile", "environment.yml", "workflow", "profiles", "fedlm", "methods", "tasks", "config")
# Each step multiplies the weights by 1 - 100 x 10, until they are infinite.
DIVERGES = {"optimizer": "sgd", "learning_rate": 100.0, "weight_decay": 10.0, "local_epochs": 10}
METHODS = {
    "fedavg": None,
    "head_only": None,
    "diverging": {"method": "fedavg", "training": DIVERGES},
}

pytestmark = pytest.mark.slow


class Place:
    """A copy of the repository with a tiny study in it, where Snakemake is run."""

    def __init__(self, folder: Path, **changes):
        self.folder, self.changes = folder, changes
        for name in PARTS:
            source = ROOT / name
            if source.is_dir() and not source.is_symlink():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, folder / name, follow_symlinks=False)
        self.study = self.write()

    def write(self, **changes) -> Path:
        return tiny_study.write(self.folder / "own", "tiny", **{**self.changes, **changes})

    def snakemake(self, *arguments: str) -> tuple[int, str]:
        """Run Snakemake on the study; return its exit status and output."""
        command = [
            sys.executable,
            "-m",
            "snakemake",
            *arguments,  # first, since --configfile takes all that follows it
            "--cores",
            "2",
            "--configfile",
            str(self.study),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        return done.returncode, done.stdout

    def plan(self) -> list[str]:
        """Return the messages of the jobs that Snakemake would run now."""
        status, output = self.snakemake("--dry-run")
        assert status == 0, output
        return re.findall(r"^Job \d+: (.*)$", output, re.MULTILINE)

    def records(self) -> dict[str, tuple[bytes, int]]:
        """Return content and time of each record, by its path."""
        runs = self.folder / "results" / "tiny" / "runs"
        return {
            path.relative_to(runs).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in runs.rglob("seed*.json")
        }

    def missing(self) -> list[str]:
        table = pandas.read_csv(self.folder / "results/tiny/tables/missing.csv")
        return [f"{row.task}/{row.partition}/{row.method}/seed{row.seed}" for row in table.itertuples()]


def test_from_a_failing_run_to_a_complete_study(tmp_path):
    """One study through its life: failure, correction, nothing to do, changed sources and data, report."""
    place = Place(tmp_path, methods=METHODS)

    # A failing run: the others finish, tables and figures are made of them and name what is missing.
    status, output = place.snakemake()
    assert status == 1
    failed = re.search(r"^.*films/iid/diverging/seed1.*round 1.*$|^error: .*round.*$", output, re.MULTILINE)
    assert failed, output
    finished = place.records()
    assert sorted(finished) == ["films/iid/fedavg/seed1.json", "films/iid/head_only/seed1.json"]
    assert place.missing() == ["films/iid/diverging/seed1"]
    results = tmp_path / "results" / "tiny"
    assert "Missing: 1 of 3 runs" in (results / "tables" / "main.md").read_text()
    assert (tmp_path / "figures/tiny/score_over_rounds.pdf").stat().st_size > 1000
    # Rounds are reported during training, on the terminal and in the log.
    assert "films/iid/fedavg/seed1: round 2/2" in output
    assert "round 2/2" in (results / "logs/train/films/iid/fedavg/seed1.log").read_text()

    # A second attempt would make the failing run only, although tables and figures are there.
    assert [job for job in place.plan() if job.startswith("Training")] == [
        "Training diverging on films, iid, seed 1"
    ]

    # Corrected, the study is completed without touching what was finished.
    place.write(methods={**METHODS, "diverging": {"method": "fedavg", "training": {"learning_rate": 2e-3}}})
    status, output = place.snakemake()
    assert status == 0, output
    assert output.count("Training ") == 1
    assert {path: place.records()[path] for path in finished} == finished
    assert place.missing() == []
    for table in TABLES:
        for ending in ("csv", "md", "tex"):
            assert (results / "tables" / f"{table}.{ending}").stat().st_size
    for figure in names_of_figures([("task", "partition")]):
        for ending in ("pdf", "png"):
            assert (tmp_path / "figures" / "tiny" / f"{figure}.{ending}").stat().st_size

    status, output = place.snakemake()
    assert (status, "Nothing to be done" in output) == (0, True)

    # Nor is there after edits that no run and no drawing executes.
    harmless = {
        "fedlm/federation/loop.py": lambda text: text.replace('"""', '"""Edited: ', 1) + "\n# Why.\n",
        "fedlm/data/partition.py": lambda text: f"# Why.\n{text}",
        "fedlm/results/figures.py": lambda text: text.replace('"""', '"""Edited: ', 1),
        "methods/head_only.py": lambda text: text.replace('"""', '"""Edited: ', 1),
        "methods/fedcybgd.py": lambda text: f"{text}\nADDED = 1\n",
        "tasks/squad.py": lambda text: f"{text}\nADDED = 1\n",
        "fedlm/costs/prediction.py": lambda text: f"{text}\nADDED = 1\n",
    }
    for name, edit in harmless.items():
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text(edit(before))
        assert (tmp_path / name).read_text() != before
    status, output = place.snakemake("--dry-run")
    assert (status, "Nothing to be done" in output) == (0, True), output
    # A figure that is drawn otherwise is drawn, and that is all.
    figure = tmp_path / "fedlm/results/figures.py"
    before = figure.read_text()
    figure.write_text(before + "\nADDED = 1\n")
    assert {job for job in place.plan() if not job.startswith("Study")} == {"Drawing the figures"}
    figure.write_text(before)
    # In the loop a statement is another matter.
    loop = tmp_path / "fedlm/federation/loop.py"
    before = loop.read_text()
    loop.write_text(before + "\nADDED = 1\n")
    assert len([job for job in place.plan() if job.startswith("Training")]) == len(METHODS)
    loop.write_text(before)

    # One page holds all tables and figures, and loads nothing from elsewhere.
    status, output = place.snakemake("--report", "report.html")
    assert status == 0, output
    page = (tmp_path / "report.html").read_text()
    for name in [
        *(f"pages/{table}.html" for table in TABLES),
        *(f"{n}.png" for n in names_of_figures([("task", "partition")])),
    ]:
        assert name in page
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?https?://", page)

    # A changed source or setting: what depends on it is made again, although no file of a rule has changed.
    method = tmp_path / "methods" / "head_only.py"
    method.write_text(method.read_text() + "\nADDED = 1\n")
    place.write(methods={**METHODS, "diverging": {"method": "fedavg", "training": {"learning_rate": 3e-3}}})
    assert sorted(job for job in place.plan() if job.startswith("Training")) == [
        "Training diverging on films, iid, seed 1",
        "Training head_only on films, iid, seed 1",
    ]
    # Changed data: everything.
    data = place.study.with_name("data.csv")
    data.write_text(data.read_text() + "the film was long,bad\n")
    assert {"Preparing task films", "Training fedavg on films, iid, seed 1"} <= set(place.plan())


def test_a_renamed_label_trains_nothing(tmp_path):
    place = Place(tmp_path, methods={"head_only": None}, federation={"clients": 2, "rounds": 1})
    status, output = place.snakemake("collect")
    assert status == 0 and "head_only/seed1: round 1/1" in output, output
    place.write(methods={"only_the_head": {"method": "head_only"}})
    status, output = place.snakemake("collect")
    assert status == 0, output
    assert "only_the_head/seed1: already finished; its record is restored" in output
    assert ": round " not in output
    table = pandas.read_parquet(tmp_path / "results/tiny/runs.parquet")
    assert list(table["method"]) == ["only_the_head"]


def test_runs_that_share_a_process(tmp_path):
    """A run that fails takes neither its neighbours in the process nor their records with it."""
    place = Place(
        tmp_path,
        # A client of eight makes one step a round: too few to diverge.
        federation={"clients": 8, "rounds": 3},
        partitions={"iid": None, "pooled": None},
        methods={
            "fedavg": {"training": {**DIVERGES, "learning_rate": 2.0, "local_epochs": 1}},
            "majority": {"partitions": ["iid"]},
        },
        pipeline={"runs_per_job": 3},
    )
    status, output = place.snakemake()
    assert status == 1
    assert "Training fedavg, majority on films: 3 runs in one process" in output
    # Snakemake removes what a failed job has made; the finished record is restored from its copy.
    finished = place.records()
    assert set(finished) == {"films/iid/fedavg/seed1.json", "films/iid/majority/seed1.json"}
    assert place.missing() == ["films/pooled/fedavg/seed1"]

    status, output = place.snakemake()
    assert status == 1
    assert "films/iid/fedavg/seed1: already finished" in output
    assert "films/iid/fedavg/seed1: round" not in output
    assert place.records()["films/iid/fedavg/seed1.json"][0] == finished["films/iid/fedavg/seed1.json"][0]


def test_a_bad_study_is_refused_before_any_job(tmp_path):
    place = Place(tmp_path)
    values = yaml.safe_load(place.study.read_text())
    values["federation"]["clients"] = 0
    values["partitions"]["odd"] = {"scheme": "labels", "labels_per_client": 9, "colour": "red"}
    place.study.write_text(yaml.safe_dump(values))
    status, output = place.snakemake()
    assert status == 2
    lines = [line for line in output.splitlines() if "profile" not in line]
    assert len(lines) >= 2
    assert any("federation.clients: 0" in line for line in lines)
    assert any("colour" in line for line in lines)
    assert "Traceback" not in output
    assert not (tmp_path / "results").exists()

    status, output = place.snakemake("--config", "rounds=3")
    assert status == 2
    assert "settings belong in the study file" in output


def test_what_stands_in_the_way_is_said_in_a_line_before_the_first_job(tmp_path):
    place = Place(tmp_path, methods={"head_only": None})
    data = tmp_path / "own" / "data.csv"
    os.utime(data, (time.time() + 86_400,) * 2)
    status, output = place.snakemake()
    assert status == 2 and f"put it right: touch {data}" in output
    assert "Traceback" not in output and "WorkflowError" not in output and "Job " not in output
    os.utime(data)
    (tmp_path / "results").write_text("mine")
    status, output = place.snakemake()
    assert status == 1 and "error: results/tiny: a file is where a folder should be" in output
    assert "Traceback" not in output and "WorkflowError" not in output and "Preparing" not in output
    assert (tmp_path / "results").read_text() == "mine"


def test_a_run_that_outlives_a_killed_snakemake_is_announced_and_its_record_taken(tmp_path):
    place = Place(tmp_path, methods={"fedavg": None}, federation={"clients": 2, "rounds": 3000})
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--configfile", str(place.study)]
    log = tmp_path / "log"
    with log.open("w") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        first = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=output)
    until = time.monotonic() + 300
    while "round 2/3000" not in log.read_text() and time.monotonic() < until:
        time.sleep(0.2)
    first.kill()
    first.wait()
    status, output = place.snakemake("--unlock")
    assert status == 0, output
    announced = re.search(
        r"films/iid/fedavg/seed1: process (\d+) of an earlier run of the pipeline is still making it", output
    )
    assert announced, output
    # As the line says; otherwise it would go on for long after this test.
    os.kill(int(announced[1]), signal.SIGTERM)
    while "stops after this round" not in log.read_text() and time.monotonic() < until:
        time.sleep(0.2)
    assert "stops after this round" in log.read_text()
