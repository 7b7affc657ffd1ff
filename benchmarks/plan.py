"""Does `fedlm plan` say how long a study takes? Compares it with the records of a finished study.

    python benchmarks/plan.py config/demo.yaml

The study must have been run on this machine with nothing beside it, as this must. Prints for each task,
partition and method the predicted seconds of its runs, those in the records, and their ratio; last, of all.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fedlm.jobs import planning
from fedlm.jobs.folders import Folders
from fedlm.study import reading


def main() -> None:
    path = Path(sys.argv[1])
    study = reading.load(path)
    folders = Folders(study.study)
    with tempfile.TemporaryDirectory() as nowhere:
        found = planning.plan(study, path, Folders(study.study, Path(nowhere)), cores=2)
    totals = [0.0, 0.0]
    for piece in found.pieces:
        if piece.trials:
            continue
        runs = [run for run in study.runs() if run[:3] == (piece.task, piece.partition, piece.method)]
        real = sum(json.loads(folders.record(run).read_text())["wall_seconds"] for run in runs)
        predicted = piece.seconds * piece.runs
        totals = [totals[0] + predicted, totals[1] + real]
        labels = f"{piece.task:16} {piece.partition:16} {piece.method:14}"
        print(f"{labels} {predicted:7.0f} s {real:7.0f} s {predicted / real:.2f}")
    predicted, real = totals
    print(f"all runs: predicted {predicted:.0f} s, in the records {real:.0f} s, ratio {predicted / real:.2f}")


if __name__ == "__main__":
    main()
