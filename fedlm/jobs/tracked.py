"""Results that git tracks: they were made elsewhere, and are not made again."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedlm.base.errors import UserError
from fedlm.jobs import tuning
from fedlm.jobs.folders import Folders
from fedlm.jobs.provenance import git
from fedlm.study.reading import of_record
from fedlm.study.study import Run, Study

HERE = Path()  # results lie below the working directory


def settle(study: Study, folders: Folders, figures: Path) -> set[str]:
    """Return the paths of the runs and trials whose records git tracks and nobody changed since.

    Git does not keep the times of files, by which a pipeline judges what is outdated. So all files of the
    study that are as committed get one time, that of their last commit.

    Raises UserError if such a record has other settings than the study gives its run.
    """
    kept = _unchanged(folders.root, figures)
    if not kept:
        return set()
    stamp = int(git(HERE, "log", "-1", "--format=%ct", "--", str(folders.root), str(figures)))
    for path in kept:
        if path.stat().st_mtime != stamp:
            os.utime(path, (stamp, stamp))
    runs = [run for run in (*study.runs(), *study.trials()) if folders.record(run) in kept]
    other = [folders.record(run) for run in runs if not _fits(study, run, folders)]
    if other:
        raise UserError(
            f"{other[0]}: in git, but made with other settings than the study gives it now ({len(other)} "
            "such records); allowed: the study as it was, another name under `study`, or to git rm them"
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


def _fits(study: Study, run: Run, folders: Folders) -> bool:
    try:
        record = json.loads(folders.record(run).read_text())
        return not any(True for _ in other_settings(record, study, run, folders))
    except (OSError, UserError, ValueError, KeyError, TypeError):
        return False


def other_settings(record: dict[str, Any], study: Study, run: Run, folders: Folders) -> Iterator[str]:
    """Yield a line for each setting of a record that is not what the study gives its run.

    Raises UserError if the record's settings cannot be read, or the study's are not yet chosen.
    """
    # Read again as a study, since a setting that is younger than the record has its default there.
    own = of_record(record).run(run.task, run.partition, run.method, run.seed).resolved()
    for section, values in tuning.configuration(study, run, folders).resolved().items():
        given = own[section]
        for key in values | given:
            if given.get(key) != values.get(key):
                yield f"{section}.{key} is {given.get(key)!r}; the study says {values.get(key)!r}"
