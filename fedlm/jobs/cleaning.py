"""Removing from a study's results what the current study does not use."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fedlm.base.files import locked_if_free
from fedlm.jobs.running import Folders, asked_hashes, identity
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
    root, runs = folders.root, list(study.runs())
    wanted = {(run.seed, *asked_hashes(study, run).values()) for run in runs}
    for path in sorted((root / "finished").glob("*.json")):
        if identity(path) not in wanted:
            yield Unused(path, [path], None)

    busy = [run for run in _runs_below(root / "checkpoints", "lock") if _is_busy(folders, run)]
    if not busy:  # left by a process that was killed while it wrote a record
        yield from (Unused(path, [path], None) for path in sorted((root / "finished").glob(".*.part")))
    used = {*runs, *busy}
    for run in _runs_below(root / "runs", "seed*.json"):
        if run not in used:
            yield Unused(folders.record(run), [folders.record(run)], None)
    for run in _runs_below(root / "checkpoints", "lock"):
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


def _runs_below(folder: Path, pattern: str) -> Iterator[Run]:
    """Yield the labels of the runs that have a file below a folder."""
    depth = "*/*/*/*" if pattern == "lock" else "*/*/*"
    for path in sorted(folder.glob(f"{depth}/{pattern}")):
        task, partition, method, seed = path.relative_to(folder).parts[:4]
        number = seed.removeprefix("seed").removesuffix(".json")
        if number.isdigit():
            yield Run(task, partition, method, int(number))


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
