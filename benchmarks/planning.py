"""How long `snakemake -n` takes to plan a study of 10,000 runs; goal: at most 60 s.

    python benchmarks/planning.py [--runs-per-job 50]

With one job per run the plan also has a job for each run.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import tiny_study  # noqa: E402

METHODS = {
    "fedavg": None,
    "fedavg_half": {"method": "fedavg", "payload": "float16"},
    "head_only": None,
    "fedcybgd": None,
    "shifted": {"method": "fedcybgd", "order": "shifted"},
}
PARTITIONS = {
    "iid": None,
    "skewed": {"scheme": "dirichlet", "alpha": 0.3},
    "one_class": {"scheme": "labels", "labels_per_client": 1},
    "sizes": {"scheme": "quantity", "alpha": 0.3},
}
SEEDS = list(range(500))


def main() -> None:
    """Plan the study and print how long it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs-per-job", type=int, default=50)
    arguments = parser.parse_args()
    runs = len(METHODS) * len(PARTITIONS) * len(SEEDS)
    with tempfile.TemporaryDirectory() as folder:
        study = tiny_study.write(
            folder,
            seeds=SEEDS,
            methods=METHODS,
            partitions=PARTITIONS,
            pipeline={"runs_per_job": arguments.runs_per_job},
        )
        command = [sys.executable, "-m", "snakemake", "--dry-run", "--snakefile", str(ROOT / "Snakefile")]
        command += ["--directory", folder, "--configfile", str(study)]
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    (jobs,) = set(re.findall(r"^total\s+(\d+)$", done.stdout + done.stderr, re.MULTILINE))
    print(f"{runs} runs, {arguments.runs_per_job} per job: {jobs} jobs planned")
    print(f"planning: {seconds:.1f} s (goal: at most 60 s)")


if __name__ == "__main__":
    main()
