"""From labels to a record: prepares what a run needs, runs it, keeps what is finished."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedlm import provenance
from fedlm.config import Run, RunConfig, Study
from fedlm.errors import UserError
from fedlm.files import sha256, write_atomically
from fedlm.partition import PartitionFile
from fedlm.task import discover as discover_tasks

RESULTS = Path("results")


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


class Folders:
    """Where a study's files lie, below `results/<study>`."""

    def __init__(self, study: str, results: Path = RESULTS) -> None:
        self.root = Path(results) / study

    def task(self, task: str) -> Path:
        """Folder of a prepared task."""
        return self.root / "tasks" / task

    def partition(self, task: str, partition: str, seed: int) -> Path:
        """File of a partition."""
        return self.root / "partitions" / task / partition / f"seed{seed}.json"

    def record(self, run: Run) -> Path:
        """File of a run's record."""
        return self.root / "runs" / f"{run.path}.json"

    def checkpoints(self, run: Run) -> Path:
        """Folder of a run's checkpoints, outside what the pipeline declares as outputs."""
        return self.root / "checkpoints" / run.path


def prepare(study: Study, task: str, folders: Folders):
    """Tokenise a task once; return the prepared data."""
    from fedlm.data import prepare

    if task not in study.tasks:
        raise UserError(f"task: {task!r} is not in the study; allowed: {', '.join(study.tasks)}")
    entry = study.tasks[task]
    origin = folders.task(task) / "origin.json"
    origin.unlink(missing_ok=True)
    made = prepare(
        discover_tasks()[entry.task](entry.settings), entry.model or study.model, folders.task(task)
    )
    write_atomically(origin, _origin(study, task).encode())
    return made


def _origin(study: Study, task: str) -> str:
    """Return what a prepared task depends on: its settings, the model's tokenizer, the reader's own files."""
    entry = study.tasks[task]
    files = discover_tasks()[entry.task](entry.settings).files()
    return json.dumps(
        {
            "task": entry.task,
            "settings": entry.settings.model_dump(mode="json"),
            "model": (entry.model or study.model).model_dump(mode="json"),
            "files": {str(path): sha256(Path(path)) for path in files if Path(path).is_file()},
        },
        sort_keys=True,
    )


def _is_prepared(study: Study, task: str, folders: Folders) -> bool:
    """Return whether the prepared task is there and was made from what the study asks for now."""
    origin = folders.task(task) / "origin.json"
    return origin.exists() and origin.read_text() == _origin(study, task)


def _is_divided(config: RunConfig, run: Run, folders: Folders) -> bool:
    """Return whether the partition is there and was drawn from these data as the study asks for now."""
    path = folders.partition(run.task, run.partition, run.seed)
    if not path.exists():
        return False
    found = PartitionFile.read(path)
    data = json.loads((folders.task(run.task) / "task.json").read_text())["sha256"]
    clients = 1 if config.partition.scheme == "pooled" else config.federation.clients
    return (found.data_sha256, found.config, found.clients) == (data, config.partition, clients)


def partition(study: Study, task: str, label: str, seed: int, folders: Folders):
    """Divide a prepared task's training examples among the clients and write the partition file."""
    from fedlm.data import Prepared

    if label not in study.partitions:
        raise UserError(f"partition: {label!r} is not in the study; allowed: {', '.join(study.partitions)}")
    data = Prepared.load(folders.task(task))
    method = next(iter(study.methods))
    clients = study.run(task, label, method, seed).federation.clients
    made = PartitionFile.make(
        study.partitions[label],
        clients,
        data.labels,
        data.groups,
        seed,
        data.split(seed).train,
        task=task,
        partition=label,
        data_sha256=data.sha256,
        label_names=data.label_names,
        group_names=data.group_names,
    )
    made.write(folders.partition(task, label, seed))
    return made


def execute(
    study: Study, run: Run, output: Path, folders: Folders, progress: Callable[[str], None] = say
) -> None:
    """Make one run and write its record to `output`.

    A finished run with the same fingerprint is not made again: its record is kept beside the checkpoints and
    put back. Prepared data and the partition are made anew where they are missing or of other origin.

    Raises UserError for bad input and FailedRun for a run that did not end well.
    """
    config = study.run(*run)
    kept = folders.checkpoints(run) / "record.json"
    if not _is_prepared(study, run.task, folders):
        prepare(study, run.task, folders)
    if not _is_divided(config, run, folders):
        partition(study, run.task, run.partition, run.seed, folders)
    hashes = _hashes(config, run, folders)
    print_line = _prefixed(progress, run)
    if _is_finished(kept, hashes):
        print_line("was finished before; its record is put back")
        _copy(kept, output)
        return
    record = _train(config, run, hashes, folders, print_line)
    from fedlm.record import write

    write(kept, record)
    write(output, record)


def restore(study: Study, folders: Folders) -> list[Run]:
    """Put back the records of finished runs whose file is gone; return the runs that have no record."""
    missing = []
    for run in study.runs():
        record, kept = folders.record(run), folders.checkpoints(run) / "record.json"
        if record.exists():
            continue
        if kept.exists() and _matches(kept, study.run(*run)):
            _copy(kept, record)
        else:
            missing.append(run)
    return missing


def _prefixed(progress: Callable[[str], None], run: Run) -> Callable[[str], None]:
    return lambda line: progress(f"{run.path}: {line}")


def _hashes(config: RunConfig, run: Run, folders: Folders) -> dict[str, str]:
    """Return the hashes of code, data and partition that the run depends on."""
    prepared = json.loads((folders.task(run.task) / "task.json").read_text())
    return {
        "config_sha256": sha256(json.dumps(config.resolved(), sort_keys=True).encode()),
        "code_sha256": provenance.code_hash(config.method, config.task),
        "data_sha256": prepared["sha256"],
        "partition_sha256": sha256(folders.partition(run.task, run.partition, run.seed)),
    }


def _is_finished(kept: Path, hashes: dict[str, str]) -> bool:
    try:
        found = json.loads(kept.read_text())["provenance"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return all(found.get(name) == value for name, value in hashes.items())


def _matches(kept: Path, config: RunConfig) -> bool:
    try:
        found = json.loads(kept.read_text())
        code = provenance.code_hash(config.method, config.task)
        return found["config"] == config.resolved() and found["provenance"]["code_sha256"] == code
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _copy(source: Path, destination: Path) -> None:
    write_atomically(destination, source.read_bytes())


def _train(
    config: RunConfig, run: Run, hashes: dict[str, str], folders: Folders, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Load data, partition and model, run the federation, return the record."""
    from fedlm import models, record
    from fedlm.checkpoint import Checkpoints
    from fedlm.data import Prepared
    from fedlm.federation import Federation
    from fedlm.method import discover

    started = time.perf_counter()
    data = Prepared.load(folders.task(run.task))
    divided = PartitionFile.read(folders.partition(run.task, run.partition, run.seed))
    model = models.load(config.model, data.kind, data.num_labels, run.seed)
    hashes = {**hashes, "model_sha256": models.fingerprint(model)}
    method = discover()[config.method](config.method_settings, len(divided.parts), run.seed)
    federation = Federation(
        method,
        model,
        data,
        data.split(run.seed),
        divided.parts,
        config.federation,
        config.training,
        run.seed,
        models.max_positions(config.model),
        progress,
    )
    fingerprint = sha256(json.dumps([config.resolved(), list(run), hashes], sort_keys=True).encode())
    checkpoints = Checkpoints(folders.checkpoints(run), fingerprint, progress)
    federation.run(checkpoints)
    wall = time.perf_counter() - started
    finished = record.build(config, federation, hashes, divided.skew, wall)
    checkpoints.clear()
    return finished
