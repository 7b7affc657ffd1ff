"""Removing from a study's results what the current study does not use."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fedlm.base.errors import UserError
from fedlm.base.files import locked_if_free
from fedlm.jobs import tuning
from fedlm.jobs.folders import Folders
from fedlm.jobs.running import asked_hashes, identity
from fedlm.study.check import check
from fedlm.study.study import Run, Study


class Unused(NamedTuple):
    """Files that belong together: one record or partition, a run's checkpoints, a prepared task."""

    path: Path  # the file, or the folder of the files
    files: list[Path]
    lock: Path | None  # held while they are removed

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(path.stat().st_size for path in self.files)


def clean(study: Study, folders: Folders, dry_run: bool = False) -> list[tuple[Path, int]]:
    """Remove what the study does not use; return each path with its size in bytes.

    These are records, kept records of finished runs, checkpoints, partitions and prepared tasks. What a run
    in progress uses is kept, even if the study no longer has that run. Lock files are kept too, since
    another process may be waiting for one. With `dry_run` nothing is removed.

    Raises UserError if the study does not pass its check: without its data and models it is not known
    which records it uses.
    """
    check(study)
    removed = []
    for unused in _unused(study, folders):
        size = unused.bytes
        if not dry_run and not _remove(unused, folders.root):
            continue
        removed.append((unused.path, size))
    return removed


def _unused(study: Study, folders: Folders) -> Iterator[Unused]:
    root, runs = folders.root, [*study.runs(), *study.trials()]
    wanted = {_identity(study, run, folders) for run in runs}
    for path in sorted((root / "finished").glob("*.json")):
        # As long as settings are to be chosen, it is not known which records they will need.
        if None not in wanted and identity(path) not in wanted:
            yield Unused(path, [path], None)

    seed = study.tuning.seed if study.tuning else -1  # a trial's path does not name its seed
    busy = [run for run in _runs_below(root / "checkpoints", seed) if _is_busy(folders, run)]
    if not busy:  # left by a process that was killed while it wrote a record
        yield from (Unused(path, [path], None) for path in sorted((root / "finished").glob(".*.part")))
    used = {*runs, *busy}
    for run in (*_runs_below(root / "runs", seed), *_runs_below(root / "trials", seed)):
        if run not in used:
            yield Unused(folders.record(run), [folders.record(run)], None)
    choices = {folders.choice(run.task, run.method) for run in study.trials()}
    for path in sorted((root / "tuning").glob("*/*.json")):
        if path not in choices:
            yield Unused(path, [path], None)
    for run in _runs_below(root / "checkpoints", seed):
        folder = folders.checkpoints(run)
        files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != "lock"]
        if run not in used and files:
            yield Unused(folder, files, folder / "lock")
    partitions = {folders.partition(run.task, run.partition, run.seed) for run in used}
    for path in sorted((root / "partitions").glob("*/*/seed*.json")):
        if path not in partitions:
            yield Unused(path, [path], None)
    tasks = {folders.task(run.task) for run in used}
    for folder in sorted((root / "tasks").glob("*")):
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock"]
        if folder not in tasks and files:
            yield Unused(folder, files, folder / "lock")


def _identity(study: Study, run: Run, folders: Folders) -> tuple[Any, ...] | None:
    """Return what identifies a run's kept record; None while its settings are not yet chosen."""
    try:
        return run.seed, *asked_hashes(study, tuning.configuration(study, run, folders)).values()
    except UserError:
        return None


def _runs_below(folder: Path, tuning_seed: int) -> Iterator[Run]:
    """Yield the labels of the runs and trials that have a record or a checkpoint folder below a folder."""
    for path in sorted(folder.glob("*/*/*/*")):
        task, partition, method = path.relative_to(folder).parts[:3]
        found = re.fullmatch(r"(seed|trial)(\d+)(\.json)?", path.name)
        if found and bool(found[3]) != path.is_dir():
            number = int(found[2])
            is_trial = found[1] == "trial"
            yield Run(
                task, partition, method, tuning_seed if is_trial else number, number if is_trial else None
            )


def _is_busy(folders: Folders, run: Run) -> bool:
    with locked_if_free(folders.checkpoints(run) / "lock") as free:
        return not free


def _remove(unused: Unused, root: Path) -> bool:
    """Remove the files and then the empty folders; return False if another process is using them."""
    if unused.lock:
        with locked_if_free(unused.lock) as free:
            if not free:
                return False
            _unlink(unused.files)
    else:
        _unlink(unused.files)
    for folder in unused.files[0].parents:
        if folder == root or any(folder.iterdir()):
            break
        folder.rmdir()
    return True


def _unlink(files: list[Path]) -> None:
    for path in files:
        path.unlink(missing_ok=True)
