"""Tiny runs per hour when runs share a process, against one process per run; goal: at least 3 x more.

    python benchmarks/sharing.py [--seeds 6] [--runs-per-job 12] [--cores 2]

In both cases the whole pipeline runs through Snakemake, from the data to the tables.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import tiny_study  # noqa: E402

METHODS = {"fedavg": None, "head_only": None, "fedcybgd": None, "fedlora": None}
PARTITIONS = {"iid": None, "sizes": {"scheme": "quantity", "alpha": 1.0}}


def measure(folder: Path, seeds: int, runs_per_job: int, cores: int) -> float:
    """Run the study and return its finished runs per hour."""
    study = tiny_study.write(
        folder,
        seeds=list(range(seeds)),
        methods=METHODS,
        partitions=PARTITIONS,
        federation={"clients": 2, "rounds": 1},
        pipeline={"runs_per_job": runs_per_job},
    )
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]
    command += ["--directory", str(folder), "--configfile", str(study), "--cores", str(cores)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    runs = len(list((folder / "results").rglob("runs/*/*/*/seed*.json")))
    print(
        f"{runs} runs, {runs_per_job} per process: {seconds:.0f} s, {3600 * runs / seconds:.0f} runs per hour"
    )
    return 3600 * runs / seconds


def main() -> None:
    """Measure both and print how many times more runs per hour sharing gives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--runs-per-job", type=int, default=12)
    parser.add_argument("--cores", type=int, default=2)
    arguments = parser.parse_args()
    rates = []
    for runs_per_job in (1, arguments.runs_per_job):
        with tempfile.TemporaryDirectory() as folder:
            rates.append(measure(Path(folder), arguments.seeds, runs_per_job, arguments.cores))
    print(f"sharing a process: {rates[1] / rates[0]:.1f} x more runs per hour (goal: at least 3)")


if __name__ == "__main__":
    main()
