"""From labels to a record: prepares what a run needs, runs it, and keeps finished records."""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlm.base.errors import DivergedRun, FailedRun, UserError
from fedlm.base.files import locked, sha256, write_atomically
from fedlm.base.processor import make_full_use
from fedlm.data.partition import PartitionFile
from fedlm.jobs import provenance, record, tuning
from fedlm.jobs.folders import Folders
from fedlm.jobs.outdated import is_outdated, settings_hash
from fedlm.study.study import Run, RunConfig, Study
from fedlm.study.yaml_files import printable

if TYPE_CHECKING:
    from fedlm.data.prepared import Prepared


MOST_CLASSES = 20  # that a line names


def log(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


def prepare(study: Study, task: str, folders: Folders, progress: Callable[[str], None] = log) -> "Prepared":
    """Tokenise a task once, and print what it consists of; return the prepared data."""
    from fedlm.data.tokenising import prepare

    source = study.task(task)
    origin = folders.task(task) / "origin.json"
    origin.unlink(missing_ok=True)
    made = prepare(source, study.tasks[task].model or study.model, folders.task(task))
    write_atomically(origin, _origin(study, task).encode())
    progress(f"{task}: {describe(made)}")
    return made


def describe(data: "Prepared") -> str:
    """Return in one line how many examples prepared data have, of which classes, and what is not there."""
    parts = [f"{len(data)} examples"]
    left_out = [f"{count} {reason}" for reason, count in data.dropped.items() if count]
    if left_out:
        parts.append(f"left out: {', '.join(left_out)}")
    classes = [f"{found['name']} {found['examples']}" for found in data.class_counts()]
    if classes:
        more = f" and {len(classes) - MOST_CLASSES} more" if len(classes) > MOST_CLASSES else ""
        shown = ", ".join(classes[:MOST_CLASSES])
        parts.append(f"{len(classes)} classes: {shown}{more}")
    for name, part in data.split(seed=0)._asdict().items():
        asked = data.caps[name]
        if asked is not None and len(part) < asked:
            parts.append(f"only {len(part)} of {asked} examples for {name}")
    return printable("; ".join(parts), 2000)


def _origin(study: Study, task: str) -> str:
    """Return what a prepared task depends on: its settings, the model, the user's own files of both."""
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
    """Return a file's SHA-256, computed again only if its time or size changed: weights may be gigabytes."""
    return sha256(path)


def _is_prepared(study: Study, task: str, folders: Folders) -> bool:
    """Return whether the prepared task exists and was made from the study's current settings."""
    folder = folders.task(task)
    if not all((folder / name).exists() for name in ("origin.json", "task.json", "examples.parquet")):
        return False
    return (folder / "origin.json").read_text(errors="replace") == _origin(study, task)


def _is_divided(config: RunConfig, run: Run, folders: Folders) -> bool:
    """Return whether the partition exists and was drawn from these data with the study's current settings."""
    path = folders.partition(run.task, run.partition, run.seed)
    try:
        found = PartitionFile.read(path)
    except UserError:  # absent, damaged, of another version: drawn again
        return False
    data = json.loads((folders.task(run.task) / "task.json").read_text())["sha256"]
    clients = 1 if config.partition.scheme == "pooled" else config.federation.clients
    code = provenance.data_code_hash(config.task_class)
    asked = (data, code, config.partition, clients)
    return (found.data_sha256, found.code_sha256, found.config, found.clients) == asked


def partition(study: Study, task: str, label: str, seed: int, folders: Folders) -> PartitionFile:
    """Divide a prepared task's training examples among the clients and write the partition file.

    A file that divides them alike keeps its measured skew, whose last digits depend on the processor, so that
    runs made on several machines can be compared.
    """
    from fedlm.data.prepared import Prepared

    if task not in study.tasks:
        raise UserError(f"task: {task!r} is not in the study; allowed: {', '.join(study.tasks)}")
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
        code_sha256=provenance.data_code_hash(study.found.tasks[study.tasks[task].task]),
        label_names=data.label_names,
        group_names=data.group_names,
    )
    path = folders.partition(task, label, seed)
    with suppress(UserError):  # absent, damaged, of another version
        made = made.with_skew_of(PartitionFile.read(path))
    made.write(path)
    return made


def execute(
    study: Study, run: Run, output: Path, folders: Folders, progress: Callable[[str], None] = log
) -> None:
    """Execute one run and write its record to `output`.

    A finished run with the same fingerprint is not repeated, whatever its labels were: its kept record is
    restored. Prepared data and the partition are made again if they are missing or outdated. If another
    process is executing this run, wait for it. A trial that diverges gets a record too, which says so.

    Raises UserError for bad input and FailedRun for a run that failed.
    """
    from fedlm.federation.checkpoint import remove_checkpoints

    config = tuning.configuration(study, run, folders)
    checkpoints, print_line = folders.checkpoints(run), _prefixed(progress, run)
    wait = "another process is running it; waiting for it to finish"
    with locked(checkpoints / "lock", lambda: print_line(wait)):
        # For the reader of `obstacles.announce`; the lock holds without it.
        with suppress(OSError):
            (checkpoints / "lock").write_text(str(os.getpid()))
        with locked(folders.task(run.task) / "lock", lambda: print_line("waiting for its data")):
            if not _is_prepared(study, run.task, folders):
                prepare(study, run.task, folders, progress)
            if not _is_divided(config, run, folders):
                partition(study, run.task, run.partition, run.seed, folders)
        hashes = _hashes(study, run, config, folders)
        made = _finished(run, hashes, folders)
        if made:
            print_line("already finished; its record is restored")
        else:
            made = _train(config, run, hashes, folders, study.pipeline.checkpoint_seconds, print_line)
            record.write(folders.finished(fingerprint(run.seed, hashes)), made)
        # Only now that the record is safe: otherwise a kill in between would lose the run.
        remove_checkpoints(checkpoints)
        record.write(output, made)


def restore(study: Study, folders: Folders) -> list[Run]:
    """Restore missing records of finished runs and trials; return those that have no record.

    A record that was made with other settings than the study gives its run now is as good as missing.
    """
    missing = []
    for run in (*study.runs(), *study.trials()):
        if folders.record(run).exists() and not is_outdated(study, run, folders):
            continue
        made = _made_before(study, run, folders)
        if made:
            record.write(folders.record(run), made)
        else:
            missing.append(run)
    return missing


def _prefixed(progress: Callable[[str], None], run: Run) -> Callable[[str], None]:
    return lambda line: progress(f"{run.path}: {line}")


def _hashes(study: Study, run: Run, config: RunConfig, folders: Folders) -> dict[str, str]:
    """Return the hashes of settings, code, data, partition and the user's files that a run depends on."""
    prepared = json.loads((folders.task(run.task) / "task.json").read_text())
    divided = PartitionFile.read(folders.partition(run.task, run.partition, run.seed))
    return {
        **asked_hashes(study, config),
        "data_sha256": prepared["sha256"],
        "partition_sha256": divided.content_hash(),
    }


def asked_hashes(study: Study, config: RunConfig) -> dict[str, str]:
    """Return the hashes that are known before any data are prepared. They do not depend on labels."""
    return {
        "config_sha256": settings_hash(config),
        "code_sha256": provenance.code_hash(config.method_class, config.task_class),
        "origin_sha256": sha256(_origin(study, config.task_label).encode()),
    }


def fingerprint(seed: int, hashes: dict[str, str]) -> str:
    """Return the SHA-256 of everything that a run depends on, which does not include its labels."""
    return sha256(json.dumps({"seed": seed, **hashes}, sort_keys=True).encode())


def identity(path: Path) -> tuple[Any, ...] | None:
    """Return the seed and `asked_hashes` of a kept record; None if it is damaged."""
    try:
        found = json.loads(path.read_text())
        names = ("config_sha256", "code_sha256", "origin_sha256")
        return found["seed"], *(found["provenance"][name] for name in names)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _finished(run: Run, hashes: dict[str, str], folders: Folders) -> dict[str, Any] | None:
    """Return the kept record with these hashes, under the run's current labels."""
    try:
        found = json.loads(folders.finished(fingerprint(run.seed, hashes)).read_text())
        whole = found["status"] == "finished" or (found["status"] == "failed" and run.trial is not None)
        whole = whole and found["seed"] == run.seed and ("trial" in found) == (run.trial is not None)
        whole = whole and hashes.items() <= found["provenance"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    labels = {name: value for name, value in run._asdict().items() if value is not None}
    return {**found, **labels} if whole else None


def _made_before(study: Study, run: Run, folders: Folders) -> dict[str, Any] | None:
    """Return a run's kept record, None if its data or partition are missing or have changed."""
    try:
        config = tuning.configuration(study, run, folders)
        return _finished(run, _hashes(study, run, config, folders), folders)
    except (OSError, UserError, ValueError, KeyError):
        return None


def _train(
    config: RunConfig,
    run: Run,
    hashes: dict[str, str],
    folders: Folders,
    checkpoint_seconds: float,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Load data, partition and model, run the federation, return the record."""
    from fedlm.data.prepared import Prepared
    from fedlm.federation.checkpoint import Checkpoints
    from fedlm.federation.loop import Federation
    from fedlm.models import loading

    # These warnings, raised through peft's calls, are meant for the developers of Transformers.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    make_full_use()
    started = time.perf_counter()
    # Before the run, which may take hours in which files change.
    source = provenance.source(config.method_class, config.task_class)
    data = Prepared.load(folders.task(run.task))
    divided = PartitionFile.read(folders.partition(run.task, run.partition, run.seed))
    if not data.sha256 == divided.data_sha256 == hashes["data_sha256"]:
        raise FailedRun(f"{run.path}: the data of {run.task} were prepared again in the meantime; run again")
    if divided.content_hash() != hashes["partition_sha256"]:
        raise FailedRun(f"{run.path}: {run.partition} was drawn again in the meantime; run again")
    model = loading.load(config.model, data.kind, data.num_labels, run.seed)
    method = config.method_class(config.method_settings, len(divided.parts), run.seed)
    model_hash = loading.fingerprint(model)
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
    hashes = {**hashes, "model_sha256": model_hash}
    checkpoints = Checkpoints(
        folders.checkpoints(run), fingerprint(run.seed, hashes), progress, checkpoint_seconds
    )
    try:
        federation.run(checkpoints, test=run.trial is None)
    except DivergedRun as error:
        if run.trial is None:
            raise
        progress(f"this trial failed: {error}")
        return record.failed(config, error, source, hashes)
    wall = federation.spent + time.perf_counter() - started
    return record.build(config, federation, source, hashes, divided.skew, wall)
