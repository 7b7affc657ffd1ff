"""What a study will take before it is started: hours, memory, disk, traffic; measured on this machine.

One turn of each method is really done, on the study's own data and model; all else follows from predicted
FLOPs and counts. Several of these turns are done at the same time, as the pipeline would, since runs that
share a machine slow each other down.
"""

import math
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from tabulate import tabulate

from fedlm.base.errors import UserError
from fedlm.costs.cases import cost, needs_of, of_study
from fedlm.costs.prediction import LEAST_POSITIONS, Costs, predict
from fedlm.costs.tables import duration
from fedlm.jobs.folders import Folders
from fedlm.jobs.outdated import is_outdated
from fedlm.jobs.requests import request_mb
from fedlm.results.typeset import significant
from fedlm.study.study import Run, RunConfig, Study

STEPS = 6  # of the turn that is done
SCORED = 128  # examples that are scored in it
ROUNDS = 3  # that are predicted; longer runs are so many times as long
RECORD_BYTES = 60_000  # of one record, about
REPORT_SECONDS = 40.0  # for preparing, compiling, tables, figures and pages of a small study, about


class Piece(NamedTuple):
    """What runs of one task, partition and method take, each."""

    task: str
    partition: str
    method: str
    title: str
    trials: bool  # whether its runs are trials of the tuning
    runs: int
    finished: int
    seconds: float  # NaN where nothing could be measured
    flops: float
    upload_bytes: float
    download_bytes: float
    memory_bytes: int  # the largest turn's
    request_mb: int  # what a job on a cluster requests
    kept_bytes: float  # of clients, on disk during the run
    checkpoint_bytes: float

    @property
    def left(self) -> int:
        return self.runs - self.finished


class Plan(NamedTuple):
    """A study's pieces, and what could not be measured, with the reason."""

    pieces: list[Piece]
    startup_seconds: float  # of one job, before it trains
    at_a_time: int
    runs_per_job: int
    unknown: list[str]

    @property
    def bundles(self) -> dict[tuple[str, str], dict[bool, list[float]]]:
        """The seconds that each job still has to train, for runs (False) and trials (True) of a task.

        In a study with trials also by method: its runs wait for its own trials only.
        """
        tuned = any(piece.trials for piece in self.pieces)
        left: dict[tuple[str, str], dict[bool, list[float]]] = {}
        for piece in self.pieces:
            kinds = left.setdefault((piece.task, piece.method if tuned else ""), {})
            kinds.setdefault(piece.trials, []).extend([piece.seconds] * piece.left)
        size = self.runs_per_job
        for kinds in left.values():
            for trials, runs in kinds.items():
                kinds[trials] = [sum(runs[first : first + size]) for first in range(0, len(runs), size)]
        return left

    @property
    def jobs(self) -> int:
        """How many jobs train what is left."""
        return sum(len(jobs) for kinds in self.bundles.values() for jobs in kinds.values())

    @property
    def processor_seconds(self) -> float:
        """Of all that is left, without the pipeline itself."""
        return self.jobs * self.startup_seconds + sum(
            piece.left * piece.seconds for piece in self.pieces if piece.left
        )

    @property
    def seconds(self) -> float:
        """From start to end, with the pipeline itself."""
        # Runs that share a process follow each other, and a method's runs follow its trials.
        chains = [sum(max(jobs, default=0.0) for jobs in kinds.values()) for kinds in self.bundles.values()]
        longest = max([self.processor_seconds / self.at_a_time, *chains])
        return longest + REPORT_SECONDS if self.jobs else 0.0

    @property
    def disk_bytes(self) -> float:
        """Records, and the checkpoints and clients' states of the runs that are made at a time."""
        records = sum(piece.runs for piece in self.pieces) * 2 * RECORD_BYTES
        unfinished = [piece for piece in self.pieces if piece.left]
        states = sorted((piece.checkpoint_bytes + piece.kept_bytes for piece in unfinished), reverse=True)
        return records + sum(states[: self.at_a_time])


class _Asked(NamedTuple):
    """One piece to measure, as it goes to another process."""

    study_file: Path
    run: Run


class _Measured(NamedTuple):
    costs: Costs
    rounds: int  # of the prediction
    seconds: float
    startup: float
    reason: str = ""  # why seconds are not known


def plan(
    study: Study,
    study_file: Path,
    folders: Folders,
    cores: int,
    log: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Measure one turn of each task, partition and method of a study, and add up what is left of it.

    Where data or weights are not on this machine, seconds are NaN and the reason is among `unknown`; costs
    are then predicted for turns of ten steps, if the study does not set them, and texts of full length.
    """
    every = [*study.runs(), *study.trials()]
    groups: dict[tuple[str, str, str, bool], list[Run]] = {}
    for run in every:
        groups.setdefault((run.task, run.partition, run.method, run.trial is not None), []).append(run)
    at_a_time = max(1, cores // study.pipeline.threads)
    asked = [_Asked(study_file, runs[0]) for runs in groups.values()]
    with ProcessPoolExecutor(at_a_time) as pool:
        futures = [pool.submit(_measure, one) for one in asked]
        found: list[_Measured | str] = []
        for number, (one, future) in enumerate(zip(asked, futures, strict=True), 1):
            found.append(future.result())
            log(f"{number} of {len(asked)}: {one.run.task}, {one.run.partition}, {one.run.method}")
    pieces: list[Piece] = []
    unknown: list[str] = []
    for (task, partition, method, trials), runs, measured in zip(groups, groups.values(), found, strict=True):
        made = [run for run in runs if folders.record(run).exists()]
        finished = sum(not is_outdated(study, run, folders) for run in made)
        if isinstance(measured, str) or measured.reason:
            reason = measured if isinstance(measured, str) else measured.reason
            unknown.append(f"{task}/{partition}/{method}: {reason}")
        if isinstance(measured, str):
            continue
        config = study.run(*runs[0])
        costs, times = measured.costs, config.federation.rounds / measured.rounds
        pieces.append(
            Piece(
                task=task,
                partition=partition,
                method=method,
                title=study.methods[method].title,
                trials=trials,
                runs=len(runs),
                finished=finished,
                seconds=measured.seconds,
                flops=costs.flops * times,
                upload_bytes=costs.upload_bytes * times,
                download_bytes=costs.download_bytes * times,
                memory_bytes=costs.peak.peak,
                request_mb=request_mb(needs_of(costs), bool(study.pipeline.gpus)),
                kept_bytes=costs.kept_bytes,
                checkpoint_bytes=2 * (costs.exchanged_bytes + costs.server_bytes),
            )
        )
    startups = [one.startup for one in found if isinstance(one, _Measured) and not one.reason]
    startup = float(numpy.median(startups)) if startups else math.nan
    return Plan(pieces, startup, at_a_time, study.pipeline.runs_per_job, unknown)


# What this process has prepared, by study file and task, or why it could not; and what it has measured.
_loaded: dict[tuple[str, str], Any] = {}
_times: dict[str, float] = {}


def _measure(asked: _Asked) -> _Measured | str:
    """Predict a run's costs on its own data, and do one turn of it; return a text where that cannot be."""
    import warnings

    import torch

    from fedlm.base.processor import make_full_use
    from fedlm.study import reading

    warnings.filterwarnings("ignore")
    make_full_use()
    torch.set_num_threads(1)
    study = reading.load(asked.study_file)
    run = asked.run
    config = study.run(*run)
    try:
        return _measure_run(study, config, run, str(asked.study_file))
    except UserError as error:
        reason = str(error).splitlines()[0]
    try:
        case = next(one for one in of_study(study) if (one.task, one.method) == (run.task, run.method))
        rounds = min(config.federation.rounds, ROUNDS)
        few = case.federation.model_copy(update={"rounds": rounds})
        return _Measured(
            cost(case._replace(federation=few), LEAST_POSITIONS), rounds, math.nan, math.nan, reason
        )
    except UserError:
        return reason


def _measure_run(study: Study, config: RunConfig, run: Run, origin: str) -> _Measured:
    import torch

    from fedlm.data.division import divide
    from fedlm.data.prepared import Prepared
    from fedlm.data.tokenising import prepare
    from fedlm.federation.loop import Batches, Federation
    from fedlm.models import loading

    torch.set_num_threads(study.pipeline.threads)
    key = origin, run.task
    if key not in _loaded:
        try:
            with tempfile.TemporaryDirectory() as folder:
                prepare(study.task(run.task), study.tasks[run.task].model or study.model, Path(folder))
                _loaded[key] = Prepared.load(Path(folder))
        except UserError as error:
            _loaded[key] = error
    data = _loaded[key]
    if isinstance(data, UserError):
        raise data
    split = data.split(run.seed)
    clients = config.federation.clients
    parts = divide(config.partition, clients, data.labels, data.groups, run.seed, split.train)
    rounds = min(config.federation.rounds, ROUNDS)
    few = config.federation.model_copy(update={"rounds": rounds})

    def method() -> Any:
        return config.method_class(config.method_settings, len(parts), run.seed)

    positions = loading.max_positions(config.model)
    costs = predict(
        method(),
        config.model,
        data.kind,
        data.num_labels,
        parts,
        Batches(data, torch.device("cpu")),
        few,
        config.training,
        LEAST_POSITIONS,
    )
    started = time.perf_counter()
    model = loading.load(config.model, data.kind, data.num_labels, run.seed)
    startup = time.perf_counter() - started + _seconds_to_import()
    short = config.training.model_copy(update={"local_steps": STEPS, "local_epochs": 1})
    federation = Federation(method(), model, data, split, parts, few, short, run.seed, positions)
    client = federation.sample(1)[0]
    federation._merge([client], 1)  # the first time also pays for what happens once
    clock, flops = dict(federation.clock), federation.flops
    federation._merge([client], 1)
    spent = {name: federation.clock[name] - clock[name] for name in clock}
    times = config.federation.rounds / rounds
    seconds = costs.turns * times * sum(spent[name] for name in ("prune", "download", "upload", "merge"))
    if federation.flops > flops:
        seconds += costs.flops * times * spent["train"] / (federation.flops - flops)
    seconds += len(costs.memory) * spent["probe"]
    seconds += _seconds_to_score(federation, split.validation) * _scored_examples(config, split, costs.models)
    return _Measured(costs, rounds, seconds, startup)


def _seconds_to_score(federation: Any, examples: numpy.ndarray) -> float:
    """Return the seconds for one example."""
    some = examples[:SCORED]
    started = time.perf_counter()
    federation.scorer.of_model(federation.server.tensors, some)
    return (time.perf_counter() - started) / len(some)


def _scored_examples(config: RunConfig, split: Any, models: int) -> int:
    """Return how many examples a run scores: first with one model, then with so many, at last the test."""
    times = math.ceil(config.federation.rounds / config.training.score_every)
    return len(split.validation) * (1 + times * models) + len(split.test) * models


def _seconds_to_import() -> float:
    """Return how long a new process takes until it can train."""
    import subprocess
    import sys

    if "import" not in _times:
        started = time.perf_counter()
        code = "import fedlm.jobs.running, fedlm.federation.loop, fedlm.models.loading, peft"
        subprocess.run([sys.executable, "-c", code], check=True)
        _times["import"] = time.perf_counter() - started
    return _times["import"]


def _known(seconds: float) -> str:
    return "not known" if math.isnan(seconds) else duration(seconds)


def describe(found: Plan, study: Study) -> list[str]:
    """Return the plan in lines for a terminal."""
    rows: dict[tuple[str, str], list[Piece]] = {}
    for piece in found.pieces:
        title = f"{piece.title}, trials" if piece.trials else piece.title
        rows.setdefault((piece.task, title), []).append(piece)
    table = [
        [
            task,
            title,
            sum(piece.runs for piece in own),
            sum(piece.left for piece in own),
            _known(float(numpy.mean([piece.seconds for piece in own]))),
            _known(sum(piece.left * piece.seconds for piece in own if piece.left)),
            significant(max(piece.memory_bytes for piece in own) / 2**20),
            significant(sum(piece.left * (piece.upload_bytes + piece.download_bytes) for piece in own) / 1e6),
        ]
        for (task, title), own in rows.items()
    ]
    headings = ["Task", "Method", "Runs", "Left", "A run", "What is left", "Memory (MiB)", "Traffic (MB)"]
    lines = [tabulate(table, headings, "simple", disable_numparse=True)] if table else []
    runs, left = (sum(getattr(piece, name) for piece in found.pieces) for name in ("runs", "left"))
    lines.append("")
    lines.append(f"{study.study}: {runs} runs, {runs - left} finished, {left} left")
    if left:
        at_a_time = f"{found.at_a_time} {'run' if found.at_a_time == 1 else 'runs'} at a time"
        if math.isnan(found.seconds):
            lines.append(f"time: not known here (see below); {at_a_time}")
        else:
            lines.append(
                f"time: about {duration(found.seconds)} with {at_a_time}; "
                f"{duration(found.processor_seconds)} of processor time"
            )
        lines.append(
            f"memory: up to {significant(max(p.request_mb for p in found.pieces if p.left) / 1e3)} GB a job"
        )
        lines.append(f"disk: about {significant(found.disk_bytes / 1e6)} MB, most of it only temporarily")
        requests = sorted({piece.request_mb for piece in found.pieces if piece.left})
        sizes = " to ".join(str(size) for size in dict.fromkeys((requests[0], requests[-1])))
        cores = "core" if study.pipeline.threads == 1 else "cores"
        lines.append(
            f"on a cluster: {found.jobs} submissions of training jobs, each of {sizes} MB and "
            f"{study.pipeline.threads} {cores}"
        )
    # Mostly the same reason for all methods of a task.
    reasons: dict[str, list[str]] = {}
    for line in found.unknown:
        path, _, reason = line.partition(": ")
        reasons.setdefault(reason, []).append(path)
    for reason, paths in reasons.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        lines.append(f"not measured: {paths[0]}{more}: {reason}")
    return lines
