"""A method of one's own beside the records of a study: tuned by the same rule, run on the same cells."""

from collections.abc import Callable
from pathlib import Path

from fedlm.base.errors import UserError
from fedlm.jobs import collecting, reports, running, tracked, tuning
from fedlm.jobs.folders import Folders
from fedlm.study.check import check
from fedlm.study.reading import parse
from fedlm.study.study import Run, Study
from fedlm.study.yaml_files import read_yaml

CONFIGS = Path(__file__).resolve().parents[2] / "config"


def study_with(study: str, method: str) -> tuple[Study, str]:
    """Return a study with a row for a method, and the row's label.

    Args:
        study: a study file, or the name of one in `config/`.
        method: the name of a method, the label of a row that the study has, or a Python file with a method.

    Raises UserError if one of them cannot be used, or the study has no tuning.
    """
    path = Path(study) if study.endswith((".yaml", ".yml")) else CONFIGS / f"{study}.yaml"
    values, label = read_yaml(path), method
    if method.endswith(".py"):
        own = Path(method).resolve()
        label = own.stem
        values["plugins"] = [*(values.get("plugins") or []), str(own.parent)]
    if isinstance(values.get("methods"), dict):
        values["methods"].setdefault(label, None)
    found = parse(values, str(path), path.parent)
    if found.tuning is None:
        raise UserError(f"{path}: has no tuning; allowed: a study whose methods are tuned")
    return found, label


def compare(study: Study, label: str, folders: Folders, log: Callable[[str], None]) -> Folders:
    """Tune and run one row of a study, where its records are missing or outdated; return its tables' folders.

    A record is outdated if the row's settings or the method's code are others now, unless git tracks it. The
    records lie beside the study's. The tables and figures, which show the row in the ranking, lie apart,
    in `compare/<label>`: the study's own are not touched.
    """
    check(study)
    trials = [run for run in study.trials() if run.method == study.tuned_row(label)]
    runs = [run for run in study.runs() if run.method == label]
    tracked_runs = tracked.settle(study, folders, Path("figures", study.study))

    def make(some: list[Run], what: str) -> None:
        left = [run for run in some if run.path not in tracked_runs and not _is_current(study, run, folders)]
        log(f"{label}: {len(some)} {what}, {len(left)} to do")
        for run in left:
            running.execute(study, run, folders.record(run), folders, log)

    make(trials, "trials")
    for task in dict.fromkeys(run.task for run in trials):
        tuning.choose(study, task, study.tuned_row(label), folders)
    make(runs, "runs")
    apart = reports.with_linked_records(study, folders, folders.root / "compare" / label)
    collecting.collect(study, apart)
    reports.write_tables(study, apart)
    reports.draw_figures(study, apart, apart.root / "figures")
    return apart


def _is_current(study: Study, run: Run, folders: Folders) -> bool:
    """Return whether a run has a record with its present settings, code and files."""
    asked = running.asked_hashes(study, tuning.configuration(study, run, folders))
    return running.identity(folders.record(run)) == (run.seed, *asked.values())
