"""From a study's compiled records to its tables, figures and findings."""

from pathlib import Path

from fedlm.base.files import write_atomically
from fedlm.data.partition import PartitionFile
from fedlm.jobs.folders import Folders
from fedlm.results import contents, cost_tables, figures, findings, tables, tuning
from fedlm.results.claims import read_predicted
from fedlm.results.devices import read_devices
from fedlm.results.records import load_rounds, load_runs
from fedlm.results.scene import Scene
from fedlm.study.study import Study


def with_linked_records(study: Study, folders: Folders, place: Path) -> Folders:
    """Return folders below `place` with the study's records, from which reports can be made a second time."""
    again = Folders(study.study, place)
    again.root.mkdir(parents=True, exist_ok=True)
    for part in ("runs", "trials", "tuning", "partitions", "costs"):
        link = again.root / part
        if (folders.root / part).is_dir() and not link.exists():
            link.symlink_to((folders.root / part).resolve())
    return again


def show(study: Study, folders: Folders) -> str:
    """Return the main table for a terminal."""
    runs = folders.root / "runs.parquet"
    return cost_tables.terminal(runs, _expected(study), study.titles(), study.found.controls())


def write_tables(study: Study, folders: Folders, devices: Path | None = None) -> list[Path]:
    """Write all tables of a study; return their paths. `devices` is a file of own devices and links."""
    has, root = contents.Contents.of(study), folders.root
    tried = tuning.read_trials(root / "trials.parquet") if has.tuned else None
    tuned = set() if tried is None else set(zip(tried["task"], tried["method"], strict=True))
    return tables.make(
        root / "runs.parquet",
        root / "rounds.parquet",
        _expected(study),
        study.titles(),
        root / "tables",
        controls=study.found.controls(),
        evidence=tables.Evidence(
            contents=has,
            devices=read_devices(devices),
            cohorts=contents.cohorts(study),
            trials=tried,
            choices=tuning.read_choices(root / "tuning", tuned) if tuned else (),
            predicted=read_predicted(root / "costs" / "claims.csv") if has.judges() else None,
        ),
    )


def draw_figures(study: Study, folders: Folders, destination: Path) -> list[Path]:
    """Draw all figures of a study into a folder; return their paths."""
    has, root = contents.Contents.of(study), folders.root
    return figures.make(
        root / "runs.parquet",
        root / "rounds.parquet",
        _partitions(study, folders),
        study.titles(),
        destination,
        _expected(study),
        controls=study.found.controls(),
        contents=has,
        trials=tuning.read_trials(root / "trials.parquet") if has.tuned else None,
    )


def write_explorer(
    study: Study, folders: Folders, destination: Path | None = None, devices: Path | None = None
) -> Path:
    """Write the page with all results of a study, by default as `explorer.html`; return its path."""
    from fedlm.results import explorer

    root = folders.root
    return explorer.make(
        Scene.make(
            load_runs(root / "runs.parquet"), _expected(study), study.titles(), study.found.controls()
        ),
        load_rounds(root / "rounds.parquet"),
        map(PartitionFile.read, _partitions(study, folders)),
        destination or root / "explorer.html",
        study=study.study,
        devices=read_devices(devices),
        cohorts=contents.cohorts(study),
        has_target="cost_to_target" in contents.Contents.of(study).tables(),
    )


def write_findings(study: Study, folders: Folders, destination: Path) -> None:
    """Write the findings of a tuned study, whose every number comes from its tables."""
    has = contents.names_of_tables(contents.Contents.of(study))
    write_atomically(destination, findings.write_up(folders.root / "tables", study.study, has).encode())


def _expected(study: Study) -> list[tuple[str, str, str, int]]:
    """Return the labels and seeds of the runs that tables and figures need."""
    return [run[:4] for run in study.runs()]


def _partitions(study: Study, folders: Folders) -> list[Path]:
    """Return the partition files of the study's runs that exist; the folder may hold others."""
    paths = dict.fromkeys(folders.partition(run.task, run.partition, run.seed) for run in study.runs())
    return [path for path in paths if path.exists()]
