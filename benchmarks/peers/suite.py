"""This suite's own FedAvg on the same workload, without a score; in the suite's own environment.

The seconds leave out the probe of a turn's memory, which a run makes once; the processor time does not. With
`--pytorch-products` matrices are multiplied by the library that PyTorch takes by itself, as in the other
programs.
"""

import sys
from pathlib import Path

import numpy
from workload import Clock, Workload, finish

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fedlm.base.processor import keep_freed_memory, make_full_use
from fedlm.data.division import divide
from fedlm.data.prepared import Prepared
from fedlm.data.schemes import parse
from fedlm.data.tokenising import prepare
from fedlm.federation.loop import Federation
from fedlm.federation.settings import Federation as FederationSettings
from fedlm.federation.settings import Training
from fedlm.models import loading
from fedlm.models.config import ModelConfig
from fedlm.study.plugins import discover_methods, discover_tasks

SEED = 1
BATCH = 16
LEARNING_RATE = 5e-5


def training(steps: int) -> Training:
    """Return the settings of a client's turn."""
    return Training(learning_rate=LEARNING_RATE, batch_size=BATCH, local_steps=steps, device="cpu")


def partition(data: Prepared, clients: int) -> list[numpy.ndarray]:
    """Return each client's examples."""
    train = data.split(SEED).train
    return divide(parse({"scheme": "iid"}), clients, data.labels, data.groups, SEED, train)


def write(folder: Path, model: str, length: int, clients: int, rounds: int, steps: int, threads: int) -> None:
    """Write a workload: BBC News, texts of up to `length` tokens, IID, 16 texts a step."""
    import json

    from safetensors.torch import save_file

    from fedlm.federation.turn import steps_of_turn

    source = ModelConfig(source=model, dropout=0.0)
    data = prepare(discover_tasks()["bbc_news"]({"max_length": length}), source, folder / "data")
    parts = partition(data, clients)
    loaded = loading.load(source, data.kind, data.num_labels, SEED)
    loaded.save_pretrained(folder / "model")
    loading.load_tokenizer(source).save_pretrained(folder / "model")
    batches = {
        f"{round}/{client}/{number}/{name}": value
        for round in range(1, rounds + 1)
        for client, part in enumerate(parts)
        for number, (indices,) in enumerate(steps_of_turn(part, training(steps), SEED, round, client))
        for name, value in data.batch(indices).items()
    }
    save_file(batches, folder / "batches.safetensors")
    described = {
        "clients": clients,
        "rounds": rounds,
        "steps": steps,
        "threads": threads,
        "examples": [len(part) for part in parts],
        "learning_rate": LEARNING_RATE,
    }
    (folder / "workload.json").write_text(json.dumps(described))


def main() -> None:
    """Run the workload."""
    work, folder = Workload(Path(sys.argv[1])), Path(sys.argv[2])
    if "--pytorch-products" in sys.argv:
        keep_freed_memory()
    else:
        make_full_use()
    data = Prepared.load(work.folder / "data")
    parts = partition(data, work.clients)
    model = loading.load(
        ModelConfig(source=str(work.folder / "model"), dropout=0.0), data.kind, data.num_labels, SEED
    )
    fedavg = discover_methods()["fedavg"]
    clock = Clock()
    federation = Federation(
        fedavg(fedavg.Config(), len(parts), SEED),
        model,
        data,
        data.split(SEED),
        parts,
        FederationSettings(clients=work.clients, rounds=work.rounds),
        training(work.steps),
        SEED,
    )
    federation.scorer.score = lambda indices: {data.metric: 0.0}
    federation.run()
    times = clock.read()
    times["seconds"] -= sum(row["seconds"]["probe"] for row in federation.rounds)
    times["training"] = sum(row["seconds"]["train"] for row in federation.rounds)
    finish(folder, times, federation.server.tensors)


if __name__ == "__main__":
    main()
