"""Run records that no run has made: plausible curves and costs, for testing tables and figures only."""

import json
from pathlib import Path

import numpy
import pandas

from fedlm.data.partition import PartitionFile
from fedlm.data.schemes import parse

MIB = 1 << 20
# method name: final score when IID, loss of score per bit of label divergence, speed of learning, MB sent up
# and down by a client in a round, GFLOP of a client's round, MiB of (parameters, gradients, optimizer,
# activations).
METHODS = {
    "fedavg": (0.95, 0.15, 1.2, 90.9, 90.9, 900, (87, 87, 174, 140)),
    "fedcybgd": (0.94, 0.45, 0.8, 7.1, 7.1, 450, (87, 7, 14, 92)),
    "fedlora": (0.93, 0.20, 0.6, 0.31, 0.31, 640, (88, 1, 2, 110)),
    "fedprompt": (0.86, 0.30, 0.35, 0.03, 0.03, 660, (87, 1, 1, 124)),
    "centralized": (0.96, 0.0, 1.3, 0.0, 0.0, 900, (87, 87, 174, 140)),
    "head_only": (0.80, 0.25, 0.5, 0.01, 0.01, 300, (87, 1, 1, 20)),
    "local_only": (0.70, 0.9, 1.5, 0.0, 0.0, 900, (87, 87, 174, 140)),
}
TITLES = {
    "fedavg": "FedAvg",
    "fedcybgd": "FedCyBGD",
    "fedlora": "FedLoRA",
    "fedprompt": "Federated prompt tuning",
    "centralized": "Centralized",
    "head_only": "Head only",
    "local_only": "Local only",
}
SCHEMES = {
    "iid": {"scheme": "iid"},
    "dirichlet_1": {"scheme": "dirichlet", "alpha": 1.0},
    "dirichlet_0.1": {"scheme": "dirichlet", "alpha": 0.1},
    "sizes_0.3": {"scheme": "quantity", "alpha": 0.3},
}
LABELS = {
    "bbc_news": ["business", "entertainment", "politics", "sport", "tech"],
    "movie_reviews": ["negative", "positive"],
}


def synthetic_partition(task: str, partition: str, seed: int, clients: int = 8, examples: int = 800):
    """Return a partition file over random labels."""
    names = LABELS.get(task, ["no", "yes"])
    labels = numpy.random.default_rng(1).integers(0, len(names), examples)
    return PartitionFile.make(
        parse(SCHEMES.get(partition, {"scheme": "iid"})),
        clients,
        labels,
        None,
        seed,
        numpy.arange(examples),
        task=task,
        partition=partition,
        data_sha256=f"{task}-data",
        label_names=names,
    )


def synthetic_record(
    task: str = "bbc_news",
    partition: str = "iid",
    method: str = "fedavg",
    seed: int = 1,
    *,
    rounds: int = 4,
    clients: int = 8,
    skew: dict | None = None,
    method_name: str | None = None,
    model: str = "minilm",
    metric: str = "accuracy",
    study: str = "synthetic",
) -> dict:
    """Return the record of a run that never was."""
    method_name = method_name or (method if method in METHODS else "fedcybgd")
    top, loss, speed, up, down, gigaflop, kinds = METHODS[method_name]
    skew = skew or {"label_divergence": 0.0, "size_gini": 0.0}
    # Two methods with one name (variants) differ a little, in a way that depends on the label only.
    top -= sum(map(ord, method)) % 7 / 200 if method not in METHODS else 0
    stream = numpy.random.default_rng([seed, sum(map(ord, task + partition + method))])
    chance = 1 / len(LABELS.get(task, ["no", "yes"]))
    top = max(chance, top - (0.08 if task == "movie_reviews" else 0) - loss * skew["label_divergence"])
    greater = metric not in ("loss", "perplexity")

    def scores(share: float) -> tuple[dict, float]:
        value = chance + (top - chance) * share + stream.normal(0, 0.008)
        value = float(numpy.clip(value, 0, 1)) if greater else float(40 - 30 * value)
        return {metric: value, "macro_f1": value * 0.99, "loss": float(1.6 - 1.3 * share)}, value

    entries = []
    for number in range(1, rounds + 1):
        metrics, value = scores(1 - numpy.exp(-speed * number))
        entries.append(
            {
                "round": number,
                "validation": metrics,
                "validation_score": value,
                "train_loss": float(1.5 * numpy.exp(-speed * number / 2)),
                "upload_bytes": int(up * 1e6 * clients),
                "download_bytes": int(down * 1e6 * clients),
                "flops": int(gigaflop * 1e9 * clients),
                "seconds": {
                    "download": 0.1,
                    "train": float(2 + stream.random()),
                    "probe": 0.5,
                    "upload": 0.1,
                    "merge": 0.05,
                    "score": 0.8,
                },
                "clients": list(range(clients)),
                "dropped": [],
                "payloads": [[client, int(down * 1e6), int(up * 1e6)] for client in range(clients)],
            }
        )
    test, test_score = scores(1 - numpy.exp(-speed * rounds))
    peak = dict(
        zip(
            ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes"),
            (kind * MIB for kind in kinds),
            strict=True,
        )
    )
    blocks = {}
    if method_name == "fedcybgd":
        for block in range(6):
            activations = int(peak["activation_bytes"] * (1 - 0.13 * block))
            blocks[str(block)] = peak | {"activation_bytes": activations}
            blocks[str(block)]["peak_memory_bytes"] = sum(blocks[str(block)].values())
    return {
        "record": 1,
        "study": study,
        "task": task,
        "partition": partition,
        "method": method,
        "seed": seed,
        "status": "finished",
        "config": {
            "model": {"source": model},
            "task": {"task": task, "max_length": 64},
            "partition": SCHEMES.get(partition, {"scheme": "iid"}),
            "method": {"method": method_name},
            "federation": {"clients": clients, "rounds": rounds},
            "training": {"batch_size": 16, "learning_rate": 5e-5},
        },
        "metric": metric,
        "greater_is_better": greater,
        "test": test,
        "test_score": test_score,
        "validation_score": entries[-1]["validation_score"],
        "baseline_validation": {metric: chance if greater else 40.0, "loss": 1.6},
        "rounds": entries,
        "clients": clients,
        "examples": {"train": 800, "validation": 100, "test": 200},
        "upload_bytes": sum(entry["upload_bytes"] for entry in entries),
        "download_bytes": sum(entry["download_bytes"] for entry in entries),
        "broadcast_bytes": int(90.9e6) * clients,
        "flops": sum(entry["flops"] for entry in entries),
        "memory": {"peak_memory_bytes": sum(peak.values()), **peak},
        "memory_by_block": blocks,
        "resident_set_bytes": 900 * MIB,
        "cuda_peak_bytes": None,
        "train_seconds": sum(entry["seconds"]["train"] for entry in entries),
        "wall_seconds": 4.0 * rounds,
        "partition_skew": skew,
        "provenance": {
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "dirty": False,
            "versions": {"python": "3.11"},
            "machine": {"system": "none"},
            "data_sha256": f"{task}-data",
            "partition_sha256": f"{task}-{partition}-{seed}",
            "model_sha256": "model",
            "payload_sha256": "payload",
            "code_sha256": "code",
            "config_sha256": "config",
        },
        "extra": {},
    }


def synthetic_trials(tasks, methods, trials: int = 8, failed=(("fedprompt", 2),)):
    """Return trials as compiled, and the choice of each task and method."""
    rows, choices = [], []
    for task in tasks:
        for method in methods:
            stream = numpy.random.default_rng(sum(map(ord, task + method)))
            rates = 10 ** stream.uniform(-5, -2, trials)
            top = METHODS[method][0]
            scores = top - 0.08 * (numpy.log10(rates) + 3.5) ** 2 + stream.normal(0, 0.004, trials)
            finished = [(method, trial) not in failed for trial in range(trials)]
            for trial in range(trials):
                rows.append(
                    {
                        "task": task,
                        "partition": "dirichlet_0.1",
                        "method": method,
                        "seed": 100,
                        "trial": trial,
                        "status": "finished" if finished[trial] else "failed",
                        "searched": json.dumps({"training.learning_rate": float(f"{rates[trial]:.3g}")}),
                        "metric": "accuracy" if finished[trial] else None,
                        "greater_is_better": True if finished[trial] else None,
                        "validation_score": float(scores[trial]) if finished[trial] else None,
                    }
                )
            best = int(numpy.argmax(numpy.where(finished, scores, -1)))
            chosen = {"training.learning_rate": float(f"{rates[best]:.3g}")}
            choices.append(
                {
                    "task": task,
                    "partition": "dirichlet_0.1",
                    "method": method,
                    "trial": best,
                    "chosen": chosen,
                    "at_edge": list(chosen) if rates[best] in (rates.min(), rates.max()) else [],
                }
            )
    return pandas.DataFrame(rows), choices


def write_study(
    folder: Path,
    tasks=("bbc_news", "movie_reviews"),
    partitions=("iid", "dirichlet_1", "dirichlet_0.1"),
    methods=tuple(METHODS),
    seeds=(1, 2, 3),
    rounds: int = 4,
    clients: int = 8,
    **changes,
) -> tuple[list[Path], list[Path], list[tuple[str, str, str, int]]]:
    """Write a study's records and partitions; return record paths, partition paths and the list of runs."""
    records, drawn, expected = [], [], []
    for task in tasks:
        for partition in partitions:
            skews = {}
            for seed in seeds:
                made = synthetic_partition(task, partition, seed, clients)
                path = folder / "partitions" / task / partition / f"seed{seed}.json"
                made.write(path)
                drawn.append(path)
                skews[seed] = made.skew
            for method in methods:
                for seed in seeds:
                    record = synthetic_record(
                        task,
                        partition,
                        method,
                        seed,
                        rounds=rounds,
                        clients=clients,
                        skew=skews[seed],
                        **changes,
                    )
                    path = folder / "runs" / task / partition / method / f"seed{seed}.json"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(json.dumps(record))
                    records.append(path)
                    expected.append((task, partition, method, seed))
    return records, drawn, expected
