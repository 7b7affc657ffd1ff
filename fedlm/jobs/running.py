"""From labels to a record: prepares what a run needs, runs it, keeps what is finished."""

import json
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

from fedlm.base.errors import FailedRun, UserError
from fedlm.base.files import locked, sha256, write_atomically
from fedlm.data.partition import PartitionFile
from fedlm.jobs import provenance
from fedlm.study.study import Run, RunConfig, Study

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
    from fedlm.data.tokenising import prepare

    source = study.task(task)
    origin = folders.task(task) / "origin.json"
    origin.unlink(missing_ok=True)
    made = prepare(source, study.tasks[task].model or study.model, folders.task(task))
    write_atomically(origin, _origin(study, task).encode())
    return made


def _origin(study: Study, task: str) -> str:
    """Return what a prepared task depends on: its settings, the model, the reader's own files of both."""
    entry = study.tasks[task]
    model = entry.model or study.model
    files = [*study.task(task).files(), *model.files()]
    return json.dumps(
        {
            "task": entry.task,
            "settings": entry.settings.model_dump(mode="json"),
            "model": model.model_dump(mode="json"),
            "files": {str(path): _file_hash(path, *_stamp(path)) for path in files if path.is_file()},
            "code": provenance.data_code_hash(study.found.tasks[entry.task]),
        },
        sort_keys=True,
    )


def _stamp(path: Path) -> tuple[int, int]:
    return path.stat().st_mtime_ns, path.stat().st_size


@cache
def _file_hash(path: Path, changed: int, size: int) -> str:
    """Return a file's SHA-256, read again when its time or size has changed: weights may be gigabytes."""
    return sha256(path)


def _is_prepared(study: Study, task: str, folders: Folders) -> bool:
    """Return whether the prepared task is there and was made from what the study asks for now."""
    folder = folders.task(task)
    if not all((folder / name).exists() for name in ("origin.json", "task.json", "examples.parquet")):
        return False
    return (folder / "origin.json").read_text(errors="replace") == _origin(study, task)


def _is_divided(config: RunConfig, run: Run, folders: Folders) -> bool:
    """Return whether the partition is there and was drawn from these data as the study asks for now."""
    path = folders.partition(run.task, run.partition, run.seed)
    try:
        found = PartitionFile.read(path)
    except UserError:  # absent, damaged, of another version: drawn again
        return False
    data = json.loads((folders.task(run.task) / "task.json").read_text())["sha256"]
    clients = 1 if config.partition.scheme == "pooled" else config.federation.clients
    return (found.data_sha256, found.config, found.clients) == (data, config.partition, clients)


def partition(study: Study, task: str, label: str, seed: int, folders: Folders):
    """Divide a prepared task's training examples among the clients and write the partition file."""
    from fedlm.data.prepared import Prepared

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
    put back. Prepared data and the partition are made anew where they are missing or of other origin. Where
    another process makes this run, its end is waited for.

    Raises UserError for bad input and FailedRun for a run that did not end well.
    """
    from fedlm.federation.checkpoint import remove_checkpoints

    config = study.run(*run)
    kept, print_line = folders.checkpoints(run) / "record.json", _prefixed(progress, run)
    with locked(kept.with_name("lock"), lambda: print_line("another process makes it; waiting for its end")):
        with locked(folders.task(run.task) / "lock", lambda: print_line("waiting for its data")):
            if not _is_prepared(study, run.task, folders):
                prepare(study, run.task, folders)
            if not _is_divided(config, run, folders):
                partition(study, run.task, run.partition, run.seed, folders)
        hashes = _hashes(study, run, folders)
        if _is_finished(kept, hashes):
            print_line("was finished before; its record is put back")
        else:
            _train(config, run, hashes, folders, kept, print_line)
        # Not before the record is safe: killed in between, the run would begin anew.
        remove_checkpoints(kept.parent)
        _copy(kept, output)


def restore(study: Study, folders: Folders) -> list[Run]:
    """Put back the records of finished runs whose file is gone; return the runs that have no record."""
    missing = []
    for run in study.runs():
        record, kept = folders.record(run), folders.checkpoints(run) / "record.json"
        if record.exists():
            continue
        if kept.exists() and _is_current(kept, study, run, folders):
            _copy(kept, record)
        else:
            missing.append(run)
    return missing


def _prefixed(progress: Callable[[str], None], run: Run) -> Callable[[str], None]:
    return lambda line: progress(f"{run.path}: {line}")


def _hashes(study: Study, run: Run, folders: Folders) -> dict[str, str]:
    """Return the hashes of settings, code, data, partition and the reader's files that a run depends on."""
    config = study.run(*run)
    prepared = json.loads((folders.task(run.task) / "task.json").read_text())
    return {
        "config_sha256": sha256(json.dumps(config.resolved(), sort_keys=True).encode()),
        "code_sha256": provenance.code_hash(config.method_class, config.task_class),
        "origin_sha256": sha256(_origin(study, run.task).encode()),
        "data_sha256": prepared["sha256"],
        "partition_sha256": sha256(folders.partition(run.task, run.partition, run.seed)),
    }


def _is_finished(kept: Path, hashes: dict[str, str]) -> bool:
    """Return whether a whole record is kept of a run that depended on exactly this."""
    try:
        found = json.loads(kept.read_text())
        return found["status"] == "finished" and hashes.items() <= found["provenance"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _is_current(kept: Path, study: Study, run: Run, folders: Folders) -> bool:
    try:
        return _is_finished(kept, _hashes(study, run, folders))
    except (OSError, ValueError, KeyError):
        return False


def _copy(source: Path, destination: Path) -> None:
    write_atomically(destination, source.read_bytes())


def _train(
    config: RunConfig,
    run: Run,
    hashes: dict[str, str],
    folders: Folders,
    output: Path,
    progress: Callable[[str], None],
) -> None:
    """Load data, partition and model, run the federation, write the record."""
    from fedlm.data.prepared import Prepared
    from fedlm.federation.checkpoint import Checkpoints
    from fedlm.federation.loop import Federation
    from fedlm.jobs import record
    from fedlm.models import loading

    # Transformers speaks to its own developers through peft's calls.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    started = time.perf_counter()
    data = Prepared.load(folders.task(run.task))
    divided = PartitionFile.read(folders.partition(run.task, run.partition, run.seed))
    if not data.sha256 == divided.data_sha256 == hashes["data_sha256"]:
        raise FailedRun(f"{run.path}: the data of {run.task} were made again meanwhile; run again")
    model = loading.load(config.model, data.kind, data.num_labels, run.seed)
    method = config.method_class(config.method_settings, len(divided.parts), run.seed)
    hashes = {**hashes, "model_sha256": loading.fingerprint(model)}
    federation = Federation(
        method,
        model,
        data,
        data.split(run.seed),
        divided.parts,
        config.federation,
        config.training,
        run.seed,
        loading.max_positions(config.model),
        progress,
    )
    fingerprint = sha256(json.dumps([config.resolved(), list(run), hashes], sort_keys=True).encode())
    federation.run(Checkpoints(folders.checkpoints(run), fingerprint, progress))
    wall = federation.spent + time.perf_counter() - started
    record.write(output, record.build(config, federation, hashes, divided.skew, wall))
