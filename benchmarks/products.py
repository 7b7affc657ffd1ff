"""Matrix products by the two libraries in PyTorch: MKL, its own choice, and oneDNN, used on AMD with AVX-512.

    python benchmarks/products.py [--threads 1] [--batch-size 8] [--length 32]

It prints billions of floating point operations a second for the products of a step of MiniLM, forward and
backward, and the milliseconds of whole steps, before and after `fedlm.base.processor.make_full_use`; the last
line is the ratio of the steps. On other processors both are MKL's.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fedlm.base import processor
from fedlm.models import loading
from fedlm.models.config import ModelConfig

REPETITIONS = 15


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    processor.keep_freed_memory()
    model = loading.load(ModelConfig(source="minilm"), "classification", 5, seed=1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batch = {
        "input_ids": torch.randint(1000, 30_000, (options.batch_size, options.length)),
        "labels": torch.randint(0, 5, (options.batch_size,)),
    }

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    tokens, width, wide = options.batch_size * options.length, 384, 1536
    shapes = {
        "attention, forward": ((tokens, width), (width, width)),
        "feed-forward, forward": ((tokens, width), (width, wide)),
        "feed-forward, backward to the weight": ((wide, tokens), (tokens, width)),
    }
    found = []
    for use in (lambda: None, processor.make_full_use):
        use()
        rates = {}
        for name, (first, second) in shapes.items():
            one, other = torch.randn(first), torch.randn(second)
            operations = 2 * first[0] * first[1] * second[1]
            rates[name] = operations / _seconds(lambda one=one, other=other: torch.mm(one, other)) / 1e9
        found.append((processor.multiplies_by(), rates, _seconds(step) * 1000))
    for library, rates, milliseconds in found:
        for name, rate in rates.items():
            print(f"{library:8} {name:38} {rate:8.0f} GFLOP/s")
        print(f"{library:8} {'a step':38} {milliseconds:8.1f} ms")
    print(f"ratio of the steps: {found[1][2] / found[0][2]:.2f}")


def _seconds(action: Callable[[], object]) -> float:
    """Return the shortest of some repetitions, the least disturbed by others."""
    action()
    times = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    main()
