"""Choosing a method's searched settings by the validation scores of its trials."""

import json
from typing import Any

from fedlm.base.errors import FailedRun, UserError
from fedlm.base.files import write_atomically
from fedlm.jobs.folders import Folders
from fedlm.study.study import Run, RunConfig, Study


def configuration(study: Study, run: Run, folders: Folders) -> RunConfig:
    """Return the configuration of a run or trial, with what the tuning chose.

    Raises UserError if the study has a tuning that has not yet chosen.
    """
    if study.tuning is None or run.trial is not None:
        return study.run(*run)
    path = folders.choice(run.task, study.tuned_row(run.method))
    try:
        chosen = json.loads(path.read_text())["chosen"]
        kind = study.found.methods[study.methods[run.method].method]
        if set(chosen) != set(kind.search):
            raise ValueError(f"it chooses {', '.join(chosen)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: no settings chosen for {run.method} ({getattr(error, 'strerror', None) or error}); "
            "allowed: the file that `choose` writes from the method's trials"
        ) from error
    return study.run(*run, chosen=chosen)


def choose(study: Study, task: str, method: str, folders: Folders) -> dict[str, Any]:
    """Write and return the settings of the best trial of a method label on a task; see `best`."""
    choice = best(study, task, method, folders)
    write_atomically(folders.choice(task, method), (json.dumps(choice, indent=1) + "\n").encode())
    return choice


def best(study: Study, task: str, method: str, folders: Folders) -> dict[str, Any]:
    """Return the settings of the best trial of a method label on a task.

    The best has the highest validation score after the last round (the lowest, where lower is better), and
    among equal ones the lowest validation loss. `at_edge` names the settings of which no trial tried a lower
    value, or none a higher one: there the range may have been too narrow.

    Raises UserError if the study does not tune that row or a record is missing, FailedRun if all failed.
    """
    trials = [run for run in study.trials() if (run.task, run.method) == (task, method)]
    if not trials:
        raise UserError(f"choose: {method!r} is not tuned on {task!r} in this study")
    records = [_read(folders, run) for run in trials]
    finished = [one for one in records if one["status"] == "finished"]
    if not finished:
        raise FailedRun(
            f"{task}/{method}: all {len(records)} trials failed; the first: {records[0]['error']}"
        )
    found = min(finished, key=_rank)
    return {
        "task": task,
        "partition": found["partition"],
        "method": method,
        "trial": found["trial"],
        "trials": len(records),
        "failed": len(records) - len(finished),
        "validation_score": found["validation_score"],
        "chosen": found["searched"],
        "at_edge": [key for key in found["searched"] if _is_at_edge(key, found, records)],
    }


def _read(folders: Folders, run: Run) -> dict[str, Any]:
    path = folders.record(run)
    try:
        found = json.loads(path.read_text())
        if found["status"] in ("finished", "failed") and found["trial"] == run.trial and "searched" in found:
            return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not the record of a trial ({type(error).__name__}); run it again"
        ) from error
    raise UserError(f"{path}: not the record of trial {run.trial}; delete it and run it again")


def _rank(record: dict[str, Any]) -> tuple[float, float, int]:
    score = record["validation_score"]
    loss = record["rounds"][-1]["validation"]["loss"]
    return (-score if record["greater_is_better"] else score, loss, record["trial"])


def _is_at_edge(key: str, best: dict[str, Any], records: list[dict[str, Any]]) -> bool:
    tried, value = [one["searched"][key] for one in records], best["searched"][key]
    # Values in words have no edge.
    return not isinstance(value, str) and len(set(tried)) > 1 and value in (min(tried), max(tried))
