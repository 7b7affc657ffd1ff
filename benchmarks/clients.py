"""Does the cost of a turn grow with the number of clients? Peak memory and time per turn on a tiny model.

One process for each number of clients, all turns of one round with one step each.

    python benchmarks/clients.py [--clients 10 100 1000 10000]

The last line is the ratio of the largest federation to the smallest: memory, time per turn.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def one(clients: int) -> dict[str, float]:
    """Run federations of `clients` clients; return peak memory (bytes) and seconds per turn."""
    import worlds

    with tempfile.TemporaryDirectory() as place:
        # At least 2,000 turns, so that a small federation is timed as long as a large one.
        rounds = max(1, 2000 // clients)
        run = worlds.federation("fedavg", place, clients=1, rounds=rounds, training={"score_every": rounds})
        # Every client holds the same eight examples: the data do not grow with the clients.
        run.parts = [run.split.train[:8]] * clients
        run.method.clients = clients
        run._turn(0, 1)  # the probe and the first counted step happen once
        started = time.perf_counter()
        run.run()
        return {
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "turn": (time.perf_counter() - started) / (rounds * clients),
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one)))
        return
    found = {}
    for clients in options.clients:
        repeats = []
        for _ in range(options.repeats):
            command = [sys.executable, "-W", "ignore", __file__, "--one", str(clients)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            repeats.append(json.loads(printed.splitlines()[-1]))
        found[clients] = {key: float(numpy.median([r[key] for r in repeats])) for key in repeats[0]}
        memory, turn = found[clients]["memory"] / 2**20, found[clients]["turn"] * 1000
        print(f"{clients:>6} clients: {memory:7.0f} MiB peak, {turn:6.2f} ms per turn", flush=True)
    first, last = found[min(found)], found[max(found)]
    print(f"ratio memory {last['memory'] / first['memory']:.3f}, time {last['turn'] / first['turn']:.3f}")


if __name__ == "__main__":
    main()
