"""What a turn costs beside its training, for methods and numbers of local steps.

    python benchmarks/turns.py [--clients 20] [--rounds 2] [--threads 2]

Prints, for each method and number of steps, milliseconds a turn by activity and the ratio of all of them to
training. The first round, in which FLOPs and memory are measured, is left out; so is scoring. MiniLM on BBC
News, 16 texts of up to 64 tokens a step.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from fedlm.base.processor import make_full_use
from fedlm.data.division import divide
from fedlm.data.schemes import parse
from fedlm.data.tokenising import prepare
from fedlm.federation.loop import Federation
from fedlm.federation.settings import Federation as FederationSettings
from fedlm.federation.settings import Training
from fedlm.models import loading
from fedlm.models.config import ModelConfig
from fedlm.study.plugins import discover_methods, discover_tasks

METHODS = {
    "FedAvg": ("fedavg", {}),
    "FedCyBGD, cached": ("fedcybgd", {"cache": "last_visit"}),
    "FedLoRA": ("fedlora", {}),
    "FedPrompt": ("fedprompt", {}),
}
STEPS = (1, 10, 40)
ACTIVITIES = ("download", "train", "upload", "merge")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2, help="measured rounds, after one that is not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    make_full_use()
    source = ModelConfig(source="minilm")
    task = discover_tasks()["bbc_news"]({"max_length": 64})
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(task, source, Path(folder))
    split = data.split(1)
    parts = divide(parse({"scheme": "iid"}), options.clients, data.labels, data.groups, 1, split.train)
    print(f"{options.clients} clients, {options.rounds} rounds, {options.threads} threads; ms a turn")
    print(f"{'method':18}{'steps':>6}" + "".join(f"{name:>10}" for name in ACTIVITIES) + f"{'ratio':>8}")
    for title, (name, settings) in METHODS.items():
        for steps in options.steps:
            kind = discover_methods()[name]
            federation = Federation(
                kind(kind.Config(**settings), len(parts), 1),
                loading.load(source, data.kind, data.num_labels, 1),
                data,
                split,
                parts,
                FederationSettings(clients=options.clients, rounds=options.rounds + 1),
                Training(batch_size=16, local_steps=steps, device="cpu"),
                1,
                loading.max_positions(source),
            )
            federation.scorer.score = lambda indices: {data.metric: 0.0}
            federation.run()
            turns = options.rounds * options.clients
            spent = {
                activity: sum(row["seconds"][activity] for row in federation.rounds[1:]) / turns
                for activity in ACTIVITIES
            }
            cells = "".join(f"{1000 * value:10.1f}" for value in spent.values())
            print(f"{title:18}{steps:6}{cells}{sum(spent.values()) / spent['train']:8.3f}", flush=True)


if __name__ == "__main__":
    main()
