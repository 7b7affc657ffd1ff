"""A study through a real Slurm: jobs are submitted, fail, are cancelled, run out of time, lose their node.

Whatever happens to a job, a run ends with the same bytes as one that nothing has happened to.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny_study
from tests.slurm.cluster import Cluster, missing, run, wait_for

ROOT = Path(__file__).resolve().parent.parent.parent
PROFILE = ROOT / "workflow" / "profiles" / "slurm"
# Without accounting the state of a job is asked of squeue, and a small cluster can be asked often.
TEST_CLUSTER = (
    "--slurm-status-command=squeue",
    "--slurm-init-seconds-before-status-checks=2",
    "--seconds-between-status-checks=2",
    "--latency-wait=15",
)
ROUNDS = 300

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A running Slurm; it is stopped at the end."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    started = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        started.start()
        yield started
    finally:
        started.stop()


class Controller:
    """One Snakemake that works on a study in `folder`, locally or on Slurm."""

    def __init__(self, folder: Path, study: Path, *arguments: str) -> None:
        folder.mkdir(exist_ok=True)
        self.log = folder / f"snakemake{len(list(folder.glob('*.log')))}.log"
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]
        command += ["--directory", str(folder), "--configfile", str(study), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    @classmethod
    def on_slurm(cls, folder: Path, study: Path, *arguments: str) -> "Controller":
        return cls(folder, study, "--workflow-profile", str(PROFILE), *TEST_CLUSTER, *arguments)

    def finish(self, seconds: float = 600) -> tuple[int, str]:
        """Wait for the end; return exit status and output."""
        status = self.process.wait(seconds)
        return status, self.output()

    def output(self) -> str:
        return self.log.read_text()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)


def records(folder: Path) -> dict[str, dict]:
    """Return the records below a folder, by method."""
    return {
        path.parent.name: json.loads(path.read_text())
        for path in (folder / "results/tiny/runs").rglob("seed*.json")
    }


def outcome(record: dict) -> tuple:
    """Return what must not depend on what happened on the way: the final payload, bytes, FLOPs and scores."""
    rounds = [(row["validation"], row["upload_bytes"], row["flops"]) for row in record["rounds"]]
    return record["provenance"]["payload_sha256"], record["test"], record["download_bytes"], rounds


def round_reached(folder: Path, method: str) -> int:
    """Return the last round of which a run has a whole checkpoint."""
    checkpoints = (folder / f"results/tiny/checkpoints/films/iid/{method}/seed1").glob("round-*")
    return max((int(re.search(r"\d+", path.name)[0]) for path in checkpoints), default=0)


def job_of(cluster: Cluster, method: str) -> str | None:
    """Return the number of the job that trains a method at this moment."""
    for number, (state, comment) in cluster.jobs().items():
        if state == "RUNNING" and f"_{method}_" in comment:
            return number
    return None


def states(cluster: Cluster, method: str) -> list[str]:
    """Return the states of all jobs that trained a method."""
    return [state for state, comment in cluster.jobs().values() if f"_{method}_" in comment]


def test_study_on_slurm(cluster, tmp_path):
    """A job asks for what study and prediction say, as squeue shows; a failing job fails its run only."""
    diverging = {"optimizer": "sgd", "learning_rate": 100.0, "weight_decay": 10.0, "local_epochs": 10}
    study = tiny_study.write(
        tmp_path / "own",
        "tiny",
        methods={"fedavg": None, "diverging": {"method": "fedavg", "training": diverging}},
        pipeline={"minutes": 7, "threads": 2, "gpus": 1, "checkpoint_seconds": 0},
    )
    place = tmp_path / "slurm"
    controller = Controller.on_slurm(place, study, "--retries=0")
    try:
        wait_for("a job in squeue", lambda: cluster.jobs(), 120)
        columns = "timelimit:|,numcpus:|,minmemory:|,tres-per-job:|"
        asked = run("squeue", "--states=all", "--noheader", f"--Format={columns}").splitlines()
        status, output = controller.finish()
    finally:
        controller.stop()
    assert status == 1
    assert {comment.split("_iid_")[1] for _, comment in cluster.jobs().values()} == {
        "fedavg_1",
        "diverging_1",
    }
    assert sorted(state for state, _ in cluster.jobs().values()) == ["COMPLETED", "FAILED"]
    predicted = json.loads((place / "results/tiny/costs/predictions.json").read_text())["films/fedavg"]
    memory = 2000 + (predicted["parameter_bytes"] + 5 * predicted["exchanged_bytes"]) // 10**6
    assert set(asked) == {f"7:00|2|{memory}M|gres:gpu:1|"}
    assert list(records(place)) == ["fedavg"]
    missing_runs = (place / "results/tiny/tables/missing.csv").read_text().split()
    assert missing_runs == ["task,partition,method,seed", "films,iid,diverging,1"]


def test_whatever_happens_to_a_job_the_result_is_the_same(cluster, tmp_path):
    """One job is cancelled, one runs out of time; then the node daemon is killed, and one is queued again."""
    settings = {
        "federation": {"clients": 4, "rounds": ROUNDS},
        "methods": {"long": {"method": "fedavg", "training": {"local_epochs": 8}}, "fedcybgd": None},
    }
    study = tiny_study.write(
        tmp_path / "own", "tiny", pipeline={"minutes": 1, "checkpoint_seconds": 0}, **settings
    )
    place = tmp_path / "slurm"
    predictions = place / "results/tiny/costs/predictions.json"
    predictions.parent.mkdir(parents=True)
    long = {"peak_memory_bytes": 300_000_000, "parameter_bytes": 90_000_000}
    long |= {"exchanged_bytes": 50_000_000}
    predictions.write_text(json.dumps({"films/long": long}))

    # Meanwhile the same study on this machine alone, undisturbed.
    local = Controller(tmp_path / "local", study, "--cores=2")
    try:
        disturb(cluster, place, study, settings)
        status, output = local.finish()
    finally:
        local.stop()
    assert status == 0, output
    expected, made = records(tmp_path / "local"), records(place)
    assert sorted(expected) == sorted(made) == ["fedcybgd", "long"]
    for method, record in expected.items():
        assert outcome(made[method]) == outcome(record), method


def disturb(cluster: Cluster, place: Path, study: Path, settings: dict) -> None:
    """Bring the study to its end on Slurm, through all that can happen to a job."""
    methods = list(settings["methods"])

    def more_rounds(method: str) -> None:
        further = round_reached(place, method) + 2
        wait_for(f"rounds of {method}", lambda: round_reached(place, method) > further, 180)

    controller = Controller.on_slurm(place, study, "--retries=0")
    try:
        more_rounds("fedcybgd")
        asked = run("squeue", "--noheader", "--format=%m %k").splitlines()
        assert {line.split()[0]: "_long_" in line for line in asked} == {"2550M": True, "3000M": False}
        run("scancel", job_of(cluster, "fedcybgd"))
        wait_for("the time limit", lambda: states(cluster, "long") == ["TIMEOUT"], 180)
    finally:
        controller.stop()
    assert states(cluster, "fedcybgd") == ["CANCELLED"]
    reached = {method: round_reached(place, method) for method in methods}
    assert all(0 < round < ROUNDS for round in reached.values()), reached
    assert records(place) == {}

    # The second Snakemake: each continues where it was. With the node daemon its jobs are lost.
    tiny_study.write(study.parent, "tiny", pipeline={"minutes": 15, "checkpoint_seconds": 0}, **settings)
    controller = Controller.on_slurm(place, study)
    try:
        for method in ("fedcybgd", "long"):
            more_rounds(method)
        run("scontrol", "requeue", job_of(cluster, "long"))
        more_rounds("long")
        cluster.kill_node()
        cluster.start_node()
        status, output = controller.finish()
    finally:
        controller.stop()
    assert status == 0, output
    for method, round in reached.items():
        log = (place / f"results/tiny/logs/train/films/iid/{method}/seed1.log").read_text()
        resumed = re.search(r"resumed after round (\d+)/|(already finished)", log)
        assert resumed[2] or int(resumed[1]) >= round
    status, output = Controller.on_slurm(place, study).finish()
    assert (status, "Nothing to be done" in output) == (0, True)
