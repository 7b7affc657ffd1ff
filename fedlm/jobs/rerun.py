"""Repeating a recorded run from its record alone, and comparing the results."""

import json
import tempfile
from pathlib import Path
from typing import Any

from fedlm.base.errors import UserError
from fedlm.jobs import running
from fedlm.study.reading import of_record
from fedlm.study.study import Run

# What must be the same. Times and the process's memory never are.
OUTCOMES = {
    "final payload": ("provenance", "payload_sha256"),
    "test scores": ("test",),
    "validation scores before training": ("baseline_validation",),
    "bytes uploaded": ("upload_bytes",),
    "bytes downloaded": ("download_bytes",),
    "bytes broadcast": ("broadcast_bytes",),
    "FLOPs": ("flops",),
    "memory": ("memory",),
}
OF_A_ROUND = ("validation", "train_loss", "payloads", "dropped")
# What can explain a difference.
CAUSES = {
    "code": ("provenance", "code_sha256"),
    "data": ("provenance", "data_sha256"),
    "partition": ("provenance", "partition_sha256"),
    "pretrained model": ("provenance", "model_sha256"),
    "versions": ("provenance", "versions"),
    "machine": ("provenance", "machine"),
}


def rerun(path: Path, results: Path | None = None, plugins: list[str] | None = None) -> list[str]:
    """Repeat the run of a record; return the names of the results that differ, none if all are the same.

    `results` is the folder for the run's files; a temporary one by default. It must not hold the run
    already, or its finished record would be restored. `plugins` are the folders of the run's plug-ins; by
    default those in the record, relative to the working directory.

    Raises UserError if the file is not a record, or something that it names is not available here.
    """
    return report(*repeat(path, results, plugins))


def repeat(
    path: Path, results: Path | None = None, plugins: list[str] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Repeat the run of a record, as `rerun` does; return its record and the new one."""
    before = read(path)
    study = of_record(before, plugins)
    run = Run(before["task"], before["partition"], before["method"], before["seed"], before.get("trial"))
    from fedlm.study.check import check

    check(study)
    _use_threads(before)
    with tempfile.TemporaryDirectory(prefix="fedlm-rerun-") as aside:
        folders = running.Folders(study.study, results or Path(aside))
        asked = (run.seed, *running.asked_hashes(study, study.run(*run)).values())
        kept = {running.identity(path) for path in folders.finished("any").parent.glob("*.json")}
        if folders.checkpoints(run).exists() or asked in kept:
            raise UserError(f"results: {folders.root} already holds this run; allowed: a new folder")
        running.execute(study, run, folders.record(run), folders)
        after = read(folders.record(run))
    return before, after


def read(path: Path) -> dict[str, Any]:
    """Read a record. Raises UserError if the file cannot be one."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        whole = isinstance(record, dict) and record["status"] == "finished"
        whole = whole and {"config", "provenance", "rounds", "test", "seed"} <= record.keys()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); allowed: a run's record") from error
    except (ValueError, KeyError, RecursionError) as error:
        raise UserError(f"{path}: not a run's record ({type(error).__name__})") from error
    if not whole:
        raise UserError(f"{path}: not the record of a finished run")
    return record


def report(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Print what is the same and what differs; return the names of the results that differ."""
    different = []
    for name, keys in OUTCOMES.items():
        one, other = _at(before, keys), _at(after, keys)
        if one != other:
            different.append(name)
            print(f"different: {name}: {_short(one)} -> {_short(other)}")
    for one, other in zip(before["rounds"], after["rounds"], strict=False):
        if any(one.get(key) != other.get(key) for key in OF_A_ROUND):
            different.append(f"round {one.get('round')}")
            print(f"different: first in round {one.get('round')}")
            break
    causes = [name for name, keys in CAUSES.items() if _at(before, keys) != _at(after, keys)]
    for name in causes:
        one, other = _at(before, CAUSES[name]), _at(after, CAUSES[name])
        print(f"{'changed' if different else 'changed, without effect'}: {name}: {_change(one, other)}")
    print("different" if different else "same: final payload, scores, bytes, FLOPs and memory")
    return different


def _use_threads(record: dict[str, Any]) -> None:
    """Use the recorded number of threads, since another one changes the order of summation."""
    import torch

    threads = _at(record, ("provenance", "machine", "threads"))
    if isinstance(threads, int) and 0 < threads <= 1024:
        torch.set_num_threads(threads)


def _at(record: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def _change(one: Any, other: Any) -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [key for key in one | other if one.get(key) != other.get(key)]
        return ", ".join(f"{key} {_short(one.get(key))} -> {_short(other.get(key))}" for key in keys)
    return f"{_short(one)} -> {_short(other)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
