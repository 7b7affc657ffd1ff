"""From a study's records to its compiled tables."""

from fedlm.jobs import running
from fedlm.jobs.folders import Folders
from fedlm.results import records, trials
from fedlm.study.study import Run, Study


def collect(study: Study, folders: Folders) -> tuple[int, list[Run]]:
    """Compile the records that exist; return the number of runs, and the runs and trials without a record.

    Records with other settings than the study has now do not count: tables never mix old and new.

    Raises UserError if there is no record, or one cannot be used.
    """
    missing = running.restore(study, folders)
    gone = set(missing)
    tried = [folders.record(one) for one in study.trials() if one not in gone]
    if study.tuning:
        trials.collect(tried, folders.root / "trials.parquet")
    paths = [folders.record(one) for one in study.runs() if one not in gone]
    count = records.collect(paths, folders.root / "rounds.parquet", folders.root / "runs.parquet")
    return count, missing
