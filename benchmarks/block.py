"""Is a one-block step as much cheaper as its FLOPs suggest? MiniLM, AdamW, 16 x 64 tokens.

Full steps and one-block steps alternate in one process; medians are compared.

    python benchmarks/block.py [--repeats 15]

The last line is, for the first and the last block, the time ratio divided by the FLOP ratio.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fedlm.federation.method import Segment
from fedlm.federation.settings import Training
from fedlm.federation.turn import Doors, Turn
from fedlm.measure.instruments import Instruments
from fedlm.models import loading
from fedlm.models.blocks import find_blocks
from fedlm.models.config import ModelConfig


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    model = loading.load(ModelConfig(source="minilm"), "classification", 5, 1)
    anatomy = find_blocks(model)
    generator = torch.Generator().manual_seed(1)
    batch = {
        "input_ids": torch.randint(1000, 20_000, (16, 64), generator=generator),
        "attention_mask": torch.ones(16, 64, dtype=torch.long),
        "labels": torch.randint(0, 5, (16,), generator=generator),
    }
    rows = {
        "full": [name for name, _ in model.named_parameters()],
        "first block": anatomy.blocks[0].parameters + anatomy.head,
        "last block": anatomy.blocks[-1].parameters + anatomy.head,
    }
    instruments, training = Instruments(), Training(device="cpu")
    # Two warm-up steps in each turn, which create the optimizer's state; one is timed.
    times: dict[str, list[float]] = {label: [] for label in rows}
    flops: dict[str, int] = {}
    for _ in range(options.repeats):
        for label, names in rows.items():
            turn = Turn(model, training, [[None]] * 3, lambda _: batch, instruments)
            turn.fit(Segment(label, names, 2))
            optimizer = turn._optimizer(Segment(label, names, 1))
            turn._step([None], optimizer, Segment(label, names, 1), Doors())
            started = time.perf_counter()
            turn._step([None], optimizer, Segment(label, names, 1), Doors())
            times[label].append(time.perf_counter() - started)
            flops[label] = turn.flops // 4
    found = {label: statistics.median(values) for label, values in times.items()}
    excess = {}
    for label in rows:
        time_ratio, flop_ratio = found[label] / found["full"], flops[label] / flops["full"]
        excess[label] = time_ratio / flop_ratio
        print(
            f"{label:12} {found[label] * 1000:6.0f} ms, {flops[label] / 1e9:7.2f} GFLOP, "
            f"of the full step: time {time_ratio:.3f}, FLOPs {flop_ratio:.3f}"
        )
    print(f"time / FLOPs: first block {excess['first block']:.3f}, last block {excess['last block']:.3f}")


if __name__ == "__main__":
    main()
