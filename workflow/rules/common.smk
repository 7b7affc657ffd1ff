# The study, the paths, and helpers for the rules.

import hashlib
import json
import os
import shlex
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, workflow.basedir)

import fedlm.study.reading
from fedlm.jobs import tracked
from fedlm.jobs.folders import Folders
from fedlm.study.check import check
from fedlm.base.errors import FailedRun, UserError
from fedlm.jobs import obstacles, progress
from fedlm.jobs.provenance import code_hash, data_code_hash
from fedlm.jobs.requests import request_mb
from fedlm.jobs.sources import syntax_hash, with_imports
from fedlm.study.plugins import file_of

# The jobs run this Python and this repository, whatever PATH and working directory are.
os.environ.update(
    PATH=os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    ),
    PYTHONPATH=os.pathsep.join(
        filter(None, [workflow.basedir, os.environ.get("PYTHONPATH")])
    ),
)


def submitted():
    """Return whether jobs go to a cluster, or this is such a job. Only known once jobs are planned."""
    return workflow.non_local_exec or workflow.remote_exec


def study_file():
    """Return the path of the study file. Only one: Snakemake would merge several, and a default with them."""
    if workflow.config_settings.config:
        raise UserError(
            "--config: not allowed; settings belong in the study file given by --configfile"
        )
    files = workflow.overwrite_configfiles
    if len(files) > 1:
        raise UserError(
            f"--configfile: {len(files)} files; allowed: one file, which is one study"
        )
    return Path(files[0]) if files else Path(workflow.basedir, "config", "demo.yaml")


try:
    # A Path, not a string: where the study file is must not cause a job to run again.
    STUDY_FILE = study_file()
    study = fedlm.study.reading.load(STUDY_FILE)
    # Runs and trials whose records came with the repository: no job makes them, so they depend on nothing.
    SETTLED = tracked.settle(study, Folders(study.study), Path("figures", study.study))
    if workflow.is_main_process:
        for note in check(study):
            print(f"note: {note}", file=sys.stderr)
        obstacles.check_times(study)
        # Snakemake cannot even plan its jobs without this folder, or with a file where its outputs belong.
        obstacles.check_writable([Path(".snakemake")])
        obstacles.check_folders(
            Path(root, study.study) for root in ("results", "figures")
        )
        for line in obstacles.announce(study, Path("results", study.study)):
            print(f"note: {line}", file=sys.stderr)
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
except FailedRun as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)

RUNS = list(study.runs())
TRIALS = list(study.trials())
RESULTS = f"results/{study.study}"
FIGURES = f"figures/{study.study}"
EXAMPLES = f"{RESULTS}/tasks/{{task}}/examples.parquet"
DESCRIPTION = f"{RESULTS}/tasks/{{task}}/task.json"
PARTITION = f"{RESULTS}/partitions/{{task}}/{{partition}}/seed{{seed}}.json"
RECORD = f"{RESULTS}/runs/{{task}}/{{partition}}/{{method}}/seed{{seed}}.json"
TRIAL = f"{RESULTS}/trials/{{task}}/{{partition}}/{{method}}/trial{{trial}}.json"
CHOICE = f"{RESULTS}/tuning/{{task}}/{{method}}.json"
PREDICTIONS = f"{RESULTS}/costs/predictions.json"


wildcard_constraints:
    task="[^/]+",
    partition="[^/]+",
    method="[^/]+",
    seed="[0-9]+",
    trial="[0-9]+",


def digest(*parts):
    """Return a hash for `params`, so that a job runs again when what it depends on has changed.

    Snakemake notices neither a changed setting of the study nor a changed imported module by itself.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@cache
def sources(*names):
    """Return a hash of the meaning of source files and all that they import, given below the repository's root.

    A comment, a docstring and formatting do not count.
    """
    return syntax_hash(with_imports(Path(workflow.basedir, name) for name in names))


@cache
def methods_used():
    """Return a hash of the meaning of the study's method files, which define titles and controls."""
    names = {entry.method for entry in study.methods.values()}
    files = [file_of(study.found.methods[name]) for name in names]
    return syntax_hash(with_imports(files))


def claimed_methods():
    """Return a hash of the meaning of the method files whose costs the claims name."""
    from fedlm.results.claims import read_claims, to_predict
    from fedlm.study.plugins import discover_methods

    names = {needed.method for needed in to_predict(read_claims())}
    known = discover_methods()
    files = [file_of(known[name]) for name in sorted(names & set(known))]
    return syntax_hash(with_imports(files))


def own_files(wildcards):
    """Return the user's own files of a task and its model: when they change, everything after them is redone."""
    model = study.tasks[wildcards.task].model or study.model
    return [str(path) for path in (*study.task(wildcards.task).files(), *model.files())]


@cache
def prepare_depends_on(task):
    entry = study.tasks[task]
    settings = entry.settings.model_dump(mode="json")
    model = (entry.model or study.model).model_dump(mode="json")
    return digest(
        entry.task,
        settings,
        model,
        data_code_hash(study.found.tasks[entry.task]),
    )


@cache
def partition_depends_on(task, partition):
    settings = study.partitions[partition].model_dump(mode="json")
    clients = study.run(
        task, partition, next(iter(study.methods)), 0
    ).federation.clients
    return digest(
        settings,
        clients,
        data_code_hash(study.found.tasks[study.tasks[task].task]),
    )


@cache
def run_depends_on(task, partition, method):
    """Return a hash of the settings and sources that all seeds of a run depend on.

    What the tuning chooses is not among them: it is in a file, which is the run's input.
    """
    run = study.run(task, partition, method, study.seeds[0])
    return digest(run.resolved(), code_hash(run.method_class, run.task_class))


@cache
def trial_depends_on(task, partition, method, trial):
    """Return a hash of the settings and sources that a trial depends on."""
    run = study.run(task, partition, method, study.tuning.seed, trial)
    return digest(run.resolved(), code_hash(run.method_class, run.task_class))


def depends_on(run):
    """Return a hash of what a run or trial depends on."""
    if run.trial is None:
        return run_depends_on(run.task, run.partition, run.method)
    return trial_depends_on(run.task, run.partition, run.method, run.trial)


def record_of(run):
    """Return the file of the record of a run or trial."""
    return (RECORD if run.trial is None else TRIAL).format(**run._asdict())


def unless_settled(path, *patterns):
    """Return an input function: the files, or nothing for a run or trial that no job needs to make."""

    def files(wildcards):
        if path.format(**wildcards) in SETTLED:
            return []
        return [pattern.format(**wildcards) for pattern in patterns]

    return files


def trials_of(wildcards):
    """Return the records from which a method's settings are chosen; none if they and the choice are settled."""
    own = [
        run
        for run in TRIALS
        if (run.task, run.method) == (wildcards.task, wildcards.method)
    ]
    if (
        all(run.path in SETTLED for run in own)
        and Path(CHOICE.format(**wildcards)).exists()
    ):
        return []
    return [record_of(run) for run in own]


def choice_of(task, method):
    """Return the file of the settings chosen for a method, as a list that is empty without tuning."""
    if study.tuning is None:
        return []
    return [CHOICE.format(task=task, method=study.tuned_row(method))]


def bundles(runs, largest):
    """Group runs, or trials, into lists of at most `largest` that share a process: of one task.

    Where settings are chosen, also of one choice: a run waits for no other method's trials. A bundle also ends
    before its command line exceeds the system's limit (128 kB on Linux).
    """
    groups = {}
    for run in runs:
        key = run.task, run.trial is None, *choice_of(run.task, run.method)
        groups.setdefault(key, []).append(run)
    for group in groups.values():
        size = min(largest, 100_000 // (1 + max(len(run.path) for run in group)))
        for start in range(0, len(group), size):
            yield group[start : start + size]


def predictions(wildcards):
    """Return the cost prediction, from which cluster jobs request memory; on one machine there is none.

    Its age does not matter to a record, hence `ancient`.
    """
    return [ancient(PREDICTIONS)] if submitted() else []


def memory_mb(task, method, predictions, attempt):
    """Return the memory of a training job in MB: as predicted, or else as set in the study.

    Each further attempt gets half as much again.
    """
    needed = study.pipeline.memory_mb
    for path in predictions:
        predicted = json.loads(Path(path).read_text()).get(f"{task}/{method}")
        if predicted:
            needed = request_mb(predicted, bool(study.pipeline.gpus))
    return int(needed * (1 + 0.5 * (attempt - 1)))


# Jobs print their lines into their log and, where no bar shows how far the study is, on the terminal.
shell.prefix(
    'lines() {{ if [ -n "${{FEDLM_BAR:-}}" ]; then cat > "$1"; else tee "$1"; fi; }}; '
)
BAR = []


def show_progress():
    """Show how far the study is, if it is started in a terminal."""
    unsettled = [run for run in RUNS + TRIALS if run.path not in SETTLED]
    rounds = progress.Rounds(study, unsettled, Folders(study.study))
    BAR.append(progress.show(rounds, study.study, logger))


def end_progress():
    for bar in filter(None, BAR):
        bar.close()


def check_writable():
    """End before the first job if its outputs cannot be written, with one line that says why."""
    try:
        obstacles.check_writable([Path(RESULTS), Path(FIGURES)])
    except FailedRun as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def draw_finished_runs():
    """Make tables and figures of the finished runs after others have failed."""
    steps = [
        f"python3 -m fedlm {step} --config {shlex.quote(str(STUDY_FILE))}"
        for step in ("collect", "tables", "figures", "explorer")
    ]
    steps.append(
        f"echo 'Made from the finished runs: {RESULTS}/explorer.html, {RESULTS}/tables, {FIGURES}'"
    )
    shell(" && ".join(steps) + " || true")
