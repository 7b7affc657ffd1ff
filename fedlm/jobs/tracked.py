"""Results that git tracks: they were made elsewhere, and are not made again."""

import json
import os
import subprocess
from pathlib import Path

from fedlm.base.errors import UserError
from fedlm.jobs.folders import Folders
from fedlm.jobs.outdated import other_settings
from fedlm.jobs.provenance import git
from fedlm.study.study import Run, Study

HERE = Path()  # results lie below the working directory


def settle(study: Study, folders: Folders, figures: Path) -> set[str]:
    """Return the paths of the runs and trials whose records git tracks and nobody changed since.

    Git does not keep the times of files, by which a pipeline judges what is outdated. So all files of the
    study that are as committed get one time, that of their last commit.

    Raises UserError if such a record has other settings than the study gives its run, or cannot be read.
    """
    kept = _unchanged(folders.root, figures)
    if not kept:
        return set()
    stamp = int(git(HERE, "log", "-1", "--format=%ct", "--", str(folders.root), str(figures)))
    for path in kept:
        if path.stat().st_mtime != stamp:
            os.utime(path, (stamp, stamp))
    runs = [run for run in (*study.runs(), *study.trials()) if folders.record(run) in kept]
    objections = {run: reason for run in runs if (reason := _objection(study, run, folders))}
    if objections:
        run, reason = next(iter(objections.items()))
        raise UserError(
            f"{folders.record(run)}: in git, but cannot serve the study as it is now: {reason} "
            f"({len(objections)} such records); allowed: the study as it was, another name under `study`, or "
            "to git rm them"
        )
    return {run.path for run in runs}


def _unchanged(*places: Path) -> set[Path]:
    """Return the files below these folders that git tracks and that are as committed; none outside git."""
    folders = [str(place) for place in places if place.is_dir()]
    if not folders:
        return set()
    try:
        tracked = git(HERE, "ls-files", "-z", "--", *folders).split("\0")
        changed = git(HERE, "diff", "--name-only", "--relative", "-z", "HEAD", "--", *folders).split("\0")
    except (OSError, subprocess.SubprocessError):
        return set()
    return {Path(name) for name in {*tracked} - {*changed} if name}


def _objection(study: Study, run: Run, folders: Folders) -> str | None:
    """Return why a record cannot serve its run, None if it can."""
    try:
        record = json.loads(folders.record(run).read_text())
        return next(other_settings(record, study, run, folders), None)
    except UserError as error:
        return str(error)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"not a record ({type(error).__name__}: {error})"
