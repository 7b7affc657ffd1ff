"""What on this machine stands in the way of a study's jobs, reported before the first one starts.

Snakemake meets the same obstacles later, and ends in messages of its own that do not name the remedy.
"""

import fcntl
import os
import shlex
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path

from fedlm.base.errors import FailedRun, UserError
from fedlm.study.study import Run, Study

AHEAD = 10  # seconds by which another machine's clock may be ahead of this one's


def check_times(study: Study) -> None:
    """Raise UserError, a line each, for the reader's files whose time stamp is in the future.

    Snakemake takes all that is made from such a file for older than it, and fails the job that made it.
    """
    faults = []
    latest = time.time() + AHEAD
    for label, entry in study.tasks.items():
        for path in (*study.task(label).files(), *(entry.model or study.model).files()):
            changed = path.stat().st_mtime if path.exists() else 0
            if changed > latest:
                shown = datetime.fromtimestamp(changed).isoformat(" ", "seconds")
                faults.append(
                    f"tasks.{label}: {path}: its time stamp is in the future ({shown}), so that Snakemake "
                    f"would take what is made from it for outdated; put it right: "
                    f"touch {shlex.quote(str(path))}"
                )
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))


def check_folders(folders: Iterable[Path]) -> None:
    """Raise FailedRun for the first folder in whose place, or above it, there is a file."""
    for folder in folders:
        place = _nearest(folder)
        if not place.is_dir():
            raise FailedRun(f"{folder}: a file is where a folder should be: {place}")


def _nearest(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    return place


def check_writable(folders: Iterable[Path]) -> None:
    """Raise FailedRun for the first folder that cannot be written, or not be made where it is absent."""
    for folder in folders:
        check_folders([folder])
        place = _nearest(folder)
        if not os.access(place, os.W_OK | os.X_OK):
            reason = "the file system is read-only" if _is_read_only(place) else "permission denied"
            raise FailedRun(f"{folder}: {reason}; make it writable, or start in a folder that is")


def _is_read_only(folder: Path) -> bool:
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


def in_progress(study: Study, root: Path) -> Iterator[tuple[Run, int | None]]:
    """Yield the runs and trials that a process is making now, with its number where it has written it down.

    `root` is the folder of the study's results. A training process outlives a Snakemake that is killed.
    """
    for run in (*study.runs(), *study.trials()):
        lock = root / "checkpoints" / run.path / "lock"
        try:
            with lock.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = lock.read_text().strip()
            yield run, int(text) if text.isdigit() else None
        except OSError:  # absent, unreadable, or on a file system without locks: nothing is known
            continue


def announce(study: Study, root: Path) -> list[str]:
    """Return a line for each run that an earlier run of the pipeline is still making."""
    lines = []
    for run, process in in_progress(study, root):
        who = f"process {process}" if process else "a process"
        end = f"; to end it instead: kill {process}" if process else ""
        waits = "its job waits and takes that record"
        lines.append(f"{run.path}: {who} of an earlier run of the pipeline is still making it; {waits}{end}")
    return lines
