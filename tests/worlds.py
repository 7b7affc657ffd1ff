"""Small federations in memory: a tiny random model, made-up sentences, any method."""

from functools import cache
from pathlib import Path

import numpy
import pandas
import pytest
import tiny
from tiny_study import sentences
from transformers import AutoTokenizer

from fedlm.data.division import divide
from fedlm.data.prepared import Prepared
from fedlm.data.schemes import parse
from fedlm.data.task import Corpus, Task
from fedlm.data.tokenising import tokenise
from fedlm.exchange import payload
from fedlm.federation.checkpoint import Checkpoints
from fedlm.federation.loop import Federation
from fedlm.federation.settings import Federation as FederationConfig
from fedlm.federation.settings import Training
from fedlm.models import loading
from fedlm.models.config import ModelConfig
from fedlm.study.plugins import discover_methods


class MadeUp(Task):
    """A task of given rows."""

    name = title = reference = "made up"

    def __init__(self, rows: list[dict], kind: str, label_names=()):
        self.kind = kind
        super().__init__({"max_length": 24})
        self.given = Corpus(pandas.DataFrame(rows), list(label_names))

    def rows(self) -> Corpus:
        return Corpus(self.given.rows.copy(), self.given.label_names)


ROWS = sentences(96)


@cache
def folder(family: str, place: str):
    """Return the folder of a tiny model of a family; `place` is a temporary folder."""
    return tiny.save(f"{place}/{family}", family, [text for text, _ in ROWS])


@cache
def prepared(family: str, kind: str, place: str) -> Prepared:
    """Return the made-up task of a kind, tokenised for the tiny model of a family."""
    if kind == "classification":
        rows = [{"text": text, "label": int(label == "good")} for text, label in ROWS]
    elif kind == "regression":
        rows = [{"text": text, "label": len(text) / 40} for text, _ in ROWS]
    elif kind == "causal":
        rows = [{"prompt": text, "target": label} for text, label in ROWS]
    else:
        rows = [
            {
                "question": "what was it",
                "context": text,
                "answers": [text.split()[3]],
                "answer_start": [text.index(text.split()[3])],
            }
            for text, _ in ROWS
        ]
        from tasks.squad import Squad  # windows need their settings

        task = MadeUp(rows, kind)
        task.config = Squad.Config(max_length=32, doc_stride=4)
        return tokenise(task, task.load(), AutoTokenizer.from_pretrained(folder(family, place)))
    task = MadeUp(rows, kind, ("bad", "good") if kind == "classification" else ())
    return tokenise(task, task.load(), AutoTokenizer.from_pretrained(folder(family, place)))


def federation(
    method: str | type,
    place,
    *,
    family: str = "bert",
    kind: str = "classification",
    clients: int = 3,
    rounds: int = 2,
    seed: int = 1,
    scheme: dict | None = None,
    model: dict | None = None,
    federation: dict | None = None,
    training: dict | None = None,
    log=lambda line: None,
    **config,
) -> Federation:
    """Return a federation, ready to run. `config` are the method's settings."""
    data = prepared(family, kind, str(place))
    split = data.split(seed)
    parts = divide(parse(scheme or {"scheme": "iid"}), clients, data.labels, data.groups, seed, split.train)
    kind_of_method = discover_methods()[method] if isinstance(method, str) else method
    source = ModelConfig(source=str(folder(family, str(place))), **(model or {}))
    return Federation(
        kind_of_method(kind_of_method.Config(**config), len(parts), seed),
        loading.load(source, kind, data.num_labels, seed),
        data,
        split,
        parts,
        FederationConfig(clients=clients, rounds=rounds, **(federation or {})),
        Training(**{"learning_rate": 1e-2, "batch_size": 8, "device": "cpu", **(training or {})}),
        seed,
        loading.max_positions(source),
        log,
    )


def with_levels(method: str, place, levels: dict[int, int], **options) -> Federation:
    """Return a finished run in which clients have these levels, whatever fits them."""
    run = federation(method, place, **{"rounds": 1, **options})
    run.method.level = levels
    run.run()
    return run


def sha(run: Federation) -> str:
    """Return the hash of the server's model."""
    return payload.encode(run.server.tensors).sha256()


def values(run: Federation) -> dict[str, numpy.ndarray]:
    """Return the server's exchanged parameters."""
    return {name: run.server.tensors[name].numpy() for name in run.method.exchanged}


def resumed(method: str, place, folder: Path, **options) -> tuple[Federation, list[str]]:
    """Return a run that was cut off after round 2 and continued to its end, and what it logged then."""

    class Cut(Exception):
        pass

    def cut(line):
        if line.startswith("round 2"):
            raise Cut

    checkpoints = Checkpoints(folder, "fingerprint", print)
    with pytest.raises(Cut):
        federation(method, place, log=cut, **options).run(checkpoints)
    lines: list[str] = []
    again = federation(method, place, log=lines.append, **options)
    again.run(checkpoints)
    return again, lines
