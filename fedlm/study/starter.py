"""A first study of the reader's own data: a short, commented study file that runs as it is."""

import re
from pathlib import Path
from typing import Any

import pandas
import yaml

from fedlm.base.files import local_path
from fedlm.data import tables
from fedlm.study import reading
from fedlm.study.check import check

# A first look takes minutes: so many examples are drawn where the data have many more.
MOST = {"train_examples": 1000, "validation_examples": 200, "test_examples": 500}
CLIENTS = 8
EXAMPLES_OF_A_CLIENT = 20  # at least, or there are fewer clients
NUMBERS = 20  # different numbers from which on they are measurements rather than classes
CLASSES = 1000

# The learning rates of config/demo.yaml and config/demo-llm.yaml: see docs/learning-rates.md.
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedcybgd": {"order": "rotating"},
    "fedlora": {"rank": 8, "alpha": 16, "training": {"learning_rate": 5e-3}},
    "head_only": {"training": {"learning_rate": 3e-2}},
}
METHODS_CAUSAL: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedcybgd": {"order": "rotating", "training": {"learning_rate": 5e-4}},
    "fedlora": {"rank": 8, "alpha": 16, "training": {"learning_rate": 2e-3}},
}


def starter(data: str, text: list[str], label: str, group: str | None = None) -> tuple[str, list[str]]:
    """Return a study file for a file or folder of one's own, and the notes of its check.

    The kind of task follows from the label: many different numbers make a regression, mostly different texts
    are to be produced, anything else is a class. Separator and encoding are named where they are unusual.

    Args:
        data: the path, as it will stand in the study.
        text, label, group: names of columns.

    Raises:
        UserError: the data or columns cannot be used; says what is allowed.
    """
    task: dict[str, Any] = {"task": "files", "train": data, **_dialect(data, [*text, label])}
    task |= {"text": text, "label": label} | ({"group": group} if group else {})
    kind = _kind(data, task)
    if kind != "classification":
        task["kind"] = kind
    task["max_length"] = 64
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "_", local_path(data).stem).strip("_.+-")[:64].rstrip(".") or "mine"
    causal = kind == "causal"
    study: dict[str, Any] = {
        "study": name,
        "seeds": [1, 2],
        "model": "smollm2" if causal else "minilm",
        "federation": {"clients": CLIENTS, "rounds": 3},
        "training": {"batch_size": 8 if causal else 16, "learning_rate": 5e-5 if causal else 2e-4},
        "tasks": {name: task},
        "partitions": {"pooled": {}},
        "methods": METHODS_CAUSAL if causal else METHODS,
    }
    # The data say how many clients they are enough for.
    parsed = reading.parse(study, data)
    found = parsed.task(name).examine()
    training = found.training or 1
    if training > MOST["train_examples"]:
        task |= MOST
    per_client = min(training, MOST["train_examples"]) // EXAMPLES_OF_A_CLIENT
    study["federation"]["clients"] = max(min(2, training), min(CLIENTS, per_client))
    study["partitions"] = {"iid": {}}
    if not causal:
        study["partitions"]["dirichlet_0.3"] = {"scheme": "dirichlet", "alpha": 0.3}
    if group:
        study["partitions"]["natural"] = {}
    notes = check(reading.parse(study, data))
    return _written(study, training), notes


def _dialect(data: str, columns: list[str]) -> dict[str, str]:
    """Return the encoding and separator of a csv file where they are not UTF-8 and a comma."""
    found: dict[str, str] = {}
    source = next(iter(tables.find(local_path(data), data).values()))
    encoding = (
        next(filter(None, map(tables.guess_encoding, source.files)), None) if source.is_text() else None
    )
    if encoding:
        found["encoding"] = encoding.replace("_", "-")
        source = source._replace(encoding=encoding)
    separator = tables.other_separator(source, columns)
    if separator:
        found["separator"] = separator
    return found


def _kind(data: str, task: dict[str, Any]) -> str:
    """Return the kind of task that the values of the label make likely."""
    parts = tables.find(local_path(data), data)
    source = next(iter(parts.values()))
    source = source._replace(encoding=task.get("encoding"), separator=task.get("separator"))
    if task["label"] not in tables.header(source, data):
        return "classification"  # The check says which columns there are.
    values = tables.read(source, data, [task["label"]])[task["label"]].astype("str").str.strip()
    different = values.nunique()
    if different > NUMBERS and pandas.to_numeric(values, errors="coerce").notna().all():
        return "regression"
    return "causal" if different > min(CLASSES, max(len(values) / 2, NUMBERS)) else "classification"


def _written(study: dict[str, Any], training: int) -> str:
    """Return the study as YAML, a line for each key, with comments."""
    capped = "train_examples" in next(iter(study["tasks"].values()))
    comments = {
        "seeds": "each draws its own splits and clients: more seeds tell smaller differences apart",
        "model": "a label (python -m fedlm models), a local folder, or a hub id",
        "federation": f"{training:,} training examples; more rounds until the curves are flat",
        "training": "choose the rates on the validation split: docs/learning-rates.md",
        "tasks": "for a first look; without *_examples all rows are used" if capped else "all rows are used",
        "partitions": "the same data among like clients, and among skewed ones",
        "methods": "python -m fedlm methods lists all; head_only is a control",
    }
    if len(study["partitions"]) == 1:
        comments["partitions"] = "how the examples are divided: docs/reading-the-record.md"
    if "head_only" not in study["methods"]:
        comments["methods"] = "python -m fedlm methods lists all"
    lines = ["# Federated fine-tuning on your own data. Every key is described in config/schema.json."]
    for key, value in study.items():
        lines.append(f"{key}: {_flow(value)}" + (f"  # {comments[key]}" if key in comments else ""))
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").strip()


def commands(study_file: Path) -> list[str]:
    """Return the two commands that follow once a study is saved."""
    return [
        f"python -m fedlm check {study_file}",
        f"snakemake --configfile {study_file} --cores all",
    ]
