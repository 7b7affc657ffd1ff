"""Compile 10,000 generated run records to runs.parquet and rounds.parquet, and make tables from them.

Prints seconds and peak memory; the limits are 60 s and 1 GiB. The records are synthetic (tests/synthetic.py).

    python benchmarks/compile_records.py [--runs 10000] [--rounds 20]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEEDS = 25
METHODS = 10
PARTITIONS = 4
CHILD = """
import json, resource, sys, time
from pathlib import Path
from fedlm.results import records
from fedlm.results import tables
folder = Path(sys.argv[1])
expected = [tuple(run) for run in json.loads((folder / "expected.json").read_text())]
titles = {method: method for _, _, method, _ in expected}
start = time.perf_counter()
paths = (folder / "runs").glob("*/*/*/*.json")
records.collect(paths, folder / "rounds.parquet", folder / "runs.parquet")
collected = time.perf_counter()
tables.make(folder / "runs.parquet", folder / "rounds.parquet", expected, titles, folder / "tables")
done = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps([collected - start, done - collected, peak]))
"""


def main() -> None:
    """Write the records, compile them in a separate process and print time and memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10_000, help="number of records")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of each run")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests.synthetic import METHODS as KNOWN
    from tests.synthetic import synthetic_record

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = []
        size = 0
        for number in range(arguments.runs):
            cell, seed = divmod(number, SEEDS)
            cell, method = divmod(cell, METHODS)
            task, partition = divmod(cell, PARTITIONS)
            labels = (f"task{task}", f"partition{partition}", f"method{method}", seed)
            known = list(KNOWN)[method % len(KNOWN)]
            record = synthetic_record(*labels, rounds=arguments.rounds, method_name=known)
            path = folder / "runs" / labels[0] / labels[1] / labels[2] / f"seed{seed}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            size += path.write_text(json.dumps(record))
            expected.append(labels)
        (folder / "expected.json").write_text(json.dumps(expected))
        print(f"{arguments.runs} records of {arguments.rounds} rounds, {size / 1e6:.0f} MB of JSON")
        start = time.perf_counter()
        output = subprocess.run(
            [sys.executable, "-c", CHILD, name], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        whole = time.perf_counter() - start
    collecting, tabling, peak = json.loads(output)
    print(f"collect {collecting:.1f} s, tables {tabling:.1f} s, with start of Python {whole:.1f} s")
    verdict = "within" if whole <= 60 and peak <= 1024 else "BEYOND"
    print(f"{whole:.1f} s and {peak:.0f} MiB, {verdict} the limit of 60 s and 1024 MiB")


if __name__ == "__main__":
    main()
