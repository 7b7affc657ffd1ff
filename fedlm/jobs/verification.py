"""Checking a study's records: that nobody changed them, that they follow from the study, that they repeat."""

import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedlm.base.errors import UserError
from fedlm.costs.claimed import write_claimed
from fedlm.jobs import collecting, reports, rerun, tuning
from fedlm.jobs.folders import Folders
from fedlm.jobs.outdated import other_settings
from fedlm.jobs.record import content_hash
from fedlm.study.study import Run, Study

# Scores that are a share of the test examples, whose standard error follows from their number.
SHARES = ("accuracy", "exact_match")


def faults(study: Study, folders: Folders) -> Iterator[str]:
    """Yield one line for each record that is missing, was changed, or does not follow from the study.

    A record must hold the hash of its content, the labels of its place, and the settings that the study gives
    its run; what the tuning chose must follow from the trials.
    """
    for run in (*study.trials(), *study.runs()):
        path = folders.record(run)
        try:
            found = json.loads(path.read_text())
            yield from (f"{path}: {fault}" for fault in _faults_of(found, study, run, folders))
        except OSError as error:
            yield f"{path}: {error.strerror}"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            yield f"{path}: not a record ({type(error).__name__}: {error})"
        except UserError as error:
            yield f"{path}: {error}"
    for task, method in dict.fromkeys((run.task, run.method) for run in study.trials()):
        path = folders.choice(task, method)
        try:
            kept, follows = json.loads(path.read_text()), tuning.best(study, task, method, folders)
        except (OSError, ValueError, KeyError, TypeError) as error:
            yield f"{path}: no choice ({type(error).__name__}: {error})"
            continue
        except UserError as error:
            yield f"{path}: {error}"
            continue
        for key in follows | kept:
            if kept.get(key) != follows.get(key):
                yield f"{path}: {key} is {kept.get(key)!r}; from the trials follows {follows.get(key)!r}"


def _faults_of(found: dict[str, Any], study: Study, run: Run, folders: Folders) -> Iterator[str]:
    if found.get("content_sha256") != content_hash(found):
        yield "its content was changed after it was written (content_sha256)"
    for label, value in {**run._asdict(), "study": study.study}.items():
        if found.get(label) != value:
            yield f"{label} is {found.get(label)!r}; its place says {value!r}"
    yield from other_settings(found, study, run, folders)
    if found["status"] != "finished":
        return
    # Sums that every record states twice.
    for name in ("upload_bytes", "download_bytes", "flops"):
        if found[name] != (total := sum(one[name] for one in found["rounds"])):
            yield f"{name} is {found[name]}; its rounds add up to {total}"
    if found["validation_score"] != found["rounds"][-1]["validation_score"]:
        yield "validation_score is not that of the last round"
    if run.trial is None and found["test_score"] != found["test"][found["metric"]]:
        yield f"test_score is not the {found['metric']} on the test split"
    if run.trial is not None and found["test"] is not None:
        yield "a trial has test scores"


def differences(
    study: Study, folders: Folders, figures: Path, findings: Path | None = None, predict: bool = True
) -> Iterator[str]:
    """Yield one line for each table, figure and compiled file that the records do not give again.

    All are made a second time, in a temporary folder, and compared with those in the study's folder and in
    `figures`, and the findings with this file. With `predict`, so are the costs that claims name, which takes
    minutes.
    """
    with tempfile.TemporaryDirectory(prefix="fedlm-verify-") as aside:
        again = reports.with_linked_records(study, folders, Path(aside))
        collecting.collect(study, again)
        pairs = [(path, folders.root / path.name) for path in sorted(again.root.glob("*.parquet"))]
        pairs += [(path, folders.root / "tables" / path.name) for path in reports.write_tables(study, again)]
        drawn = reports.draw_figures(study, again, Path(aside) / "figures")
        pairs += [(path, figures / path.name) for path in drawn]
        pairs.append((reports.write_explorer(study, again), folders.root / "explorer.html"))
        predicted = folders.root / "costs" / "claims.csv"
        if predict and predicted.exists():
            write_claimed(Path(aside) / "claims.csv")
            pairs.append((Path(aside) / "claims.csv", predicted))
        if findings is not None:
            reports.write_findings(study, again, again.root / "findings.md")
            pairs.append((again.root / "findings.md", findings))
        for made, kept in pairs:
            if not kept.exists():
                yield f"{kept}: missing; the records give it"
            elif made.read_bytes() != kept.read_bytes():
                yield f"{kept}: not what the {'records give' if kept != predicted else 'prediction gives'}"


def chosen_runs(study: Study, folders: Folders, cheapest: int, drawn: int, seed: int | None) -> list[Path]:
    """Return the records of the cheapest runs by seconds, of each method one, and of others drawn at random.

    Otherwise all of the cheapest would be of a control that trains nothing. Without a seed the draw cannot be
    foreseen.
    """
    seconds = {
        run: json.loads(folders.record(run).read_text())["wall_seconds"]
        for run in study.runs()
        if folders.record(run).exists()
    }
    best: dict[str, Run] = {}
    for run in sorted(seconds, key=lambda run: (seconds[run], run)):
        best.setdefault(run.method, run)
    first = [*best.values()][:cheapest]
    rest = [run for run in seconds if run not in first]
    chosen = first + random.Random(seed).sample(rest, min(drawn, len(rest)))
    return [folders.record(run) for run in chosen]


def repeats(path: Path, log: Callable[[str], None]) -> bool:
    """Repeat a run; return whether the result is the same, or as close as another processor allows.

    On a processor with other vector instructions the order of summation differs, so that no bits can be
    compared: there the test score may differ by one standard error of the test split.
    """
    before, after = rerun.repeat(path)
    different = rerun.report(before, after)
    if not different:
        log(f"{path}: the same, bit for bit")
        return True
    one, other = (_summation(record["provenance"]["machine"]) for record in (before, after))
    if one == other:
        log(f"{path}: different on a processor of the same capability ({one}): {', '.join(different)}")
        return False
    change = abs(before["test_score"] - after["test_score"])
    allowed = _standard_error(before)
    near = change <= allowed
    log(
        f"{path}: made on {one}, repeated on {other}: the test score differs by {change:.4f}, "
        f"{'within' if near else 'more than'} its standard error of {allowed:.4f}"
    )
    return near


def _summation(machine: dict[str, Any]) -> str:
    """Return what determines the order of summation: instructions and library."""
    return " with ".join(str(machine[key]) for key in ("cpu_capability", "matrix_products") if key in machine)


def _standard_error(record: dict[str, Any]) -> float:
    """Return the standard error of a test score; of one that is no share, a hundredth of its size."""
    score, examples = record["test_score"], record["examples"]["test"]
    if record["metric"] not in SHARES:
        return abs(score) / 100
    # At a score of 0 or 1 the formula gives 0; one example more or less is always possible.
    return max(math.sqrt(score * (1 - score) / examples), 1 / examples)
