"""What the federation costs on top of training: a FedAvg run against a bare PyTorch loop over the same steps.

Both train MiniLM on the same batches in the same process, turn by turn alternately, so that a noisy machine
affects both. Payload encoding, ledger and a checkpoint per round are part of the federated time; the probe
step, which a run makes once, and scoring, which the bare loop does not do, are not. What a turn and a
checkpoint cost besides the steps does not depend on the turn's length, here 40 steps; `--examples 320` makes
turns of 10. The process is set up as the pipeline sets up its jobs.

    python benchmarks/overhead.py [--rounds 2] [--clients 2] [--examples 1280]

The last line is the ratio of the times.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fedlm.base.processor import make_full_use
from fedlm.data.division import divide
from fedlm.data.schemes import parse
from fedlm.data.tokenising import prepare
from fedlm.federation.checkpoint import Checkpoints
from fedlm.federation.loop import Federation
from fedlm.federation.settings import Federation as FederationConfig
from fedlm.federation.settings import Training
from fedlm.federation.turn import steps_of_turn
from fedlm.models import loading
from fedlm.models.config import ModelConfig
from fedlm.study.plugins import discover_methods, discover_tasks


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--examples", type=int, default=1280)
    options = parser.parse_args()
    make_full_use()
    kind = discover_tasks()["movie_reviews"]
    task = kind(kind.Config(max_length=64, train_examples=options.examples))
    source = ModelConfig(source="minilm")
    training = Training(batch_size=16, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(task, source, Path(folder) / "data")
        split = data.split(1)
        parts = divide(parse({"scheme": "iid"}), options.clients, data.labels, data.groups, 1, split.train)
        fedavg = discover_methods()["fedavg"]
        federation = Federation(
            fedavg(fedavg.Config(), len(parts), 1),
            loading.load(source, data.kind, data.num_labels, 1),
            data,
            split,
            parts,
            FederationConfig(clients=options.clients, rounds=options.rounds),
            training,
            1,
        )
        federation.scorer.score = lambda indices: {data.metric: 0.0}
        bare = Bare(loading.load(source, data.kind, data.num_labels, 1), data, parts, training)
        turn, spent = federation._turn, {"bare": 0.0, "steps": 0}

        def alternately(client: int, round: int):
            started = time.perf_counter()
            spent["steps"] += bare.train(client, round)
            spent["bare"] += time.perf_counter() - started
            return turn(client, round)

        federation._turn = alternately
        started = time.perf_counter()
        federation.run(Checkpoints(Path(folder) / "checkpoints", "benchmark", print))
        probes = sum(row["seconds"]["probe"] for row in federation.rounds)
        federated = time.perf_counter() - started - spent["bare"] - probes
    seconds = {
        kind: sum(row["seconds"][kind] for row in federation.rounds)
        for kind in ("download", "train", "upload", "merge")
    }
    print(
        f"{options.rounds} rounds, {options.clients} clients, {spent['steps']} steps of 16 x up to 64 tokens"
    )
    print(
        f"bare loop {spent['bare']:.1f} s, federated {federated:.1f} s, of which "
        + ", ".join(f"{kind} {value:.2f} s" for kind, value in seconds.items())
    )
    print(f"ratio {federated / spent['bare']:.3f}")


class Bare:
    """The same steps without a federation."""

    def __init__(self, model, data, parts, training) -> None:
        self.model, self.data, self.parts, self.training = model, data, parts, training

    def train(self, client: int, round: int) -> int:
        """Train one client's epoch; return the number of steps."""
        self.model.train()
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.training.learning_rate, weight_decay=0.0, fused=True
        )
        steps = steps_of_turn(self.parts[client], self.training, 1, round, client)
        for (indices,) in steps:
            self.model(**self.data.batch(indices)).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return len(steps)


if __name__ == "__main__":
    main()
