"""A study that runs in seconds: a tiny random BERT and two classes of made-up sentences, in one folder."""

import csv
import random
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import tiny

GOOD = ("good", "great", "moving", "bright", "clever")
BAD = ("bad", "dull", "worse", "flat", "weak")
THINGS = ("film", "plot", "actor", "end", "music", "scene")


def sentences(number: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return different sentences with their class, half of each."""
    draw = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < number:
        label, words = ("good", GOOD) if len(rows) % 2 else ("bad", BAD)
        parts = [f"the {draw.choice(THINGS)} was {draw.choice(words)}" for _ in range(3)]
        rows[" and ".join(parts)] = label
    return list(rows.items())


def write(folder: Path, name: str = "study", examples: int = 120, **changes: Any) -> Path:
    """Write data, model and study file into `folder` and return the study file.

    `changes` replace whole sections of the study.
    """
    folder = Path(folder)
    data, model = folder / "data.csv", folder / "model"
    if not data.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = sentences(examples)
        with data.open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
        tiny.save(model, "bert", [text for text, _ in rows])
    study = {
        "study": name,
        "seeds": [1],
        "model": str(model),
        "federation": {"clients": 2, "rounds": 2},
        "training": {"learning_rate": 1e-3, "batch_size": 16, "device": "cpu"},
        "tasks": {
            "films": {
                "task": "files",
                "train": str(data),
                "text": ["text"],
                "label": "label",
                "max_length": 32,
            }
        },
        "pipeline": {"checkpoint_seconds": 0},
        "partitions": {"iid": None},
        "methods": {"fedavg": None, "head_only": None},
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path
