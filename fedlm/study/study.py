"""A study file: what is compared, on what, with which settings.

A study names tasks, partitions and methods by label; the grid of their labels and the seeds is the list of
runs. Settings are looked up from the general to the particular: study, then task, then method, each
overriding single keys of the one before.
"""

import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from pydantic import Field, InstanceOf

from fedlm.base.errors import UserError
from fedlm.base.settings import Settings
from fedlm.data.schemes import PartitionConfig
from fedlm.data.task import Task
from fedlm.federation.method import Method
from fedlm.federation.settings import Budget, Federation, ServerOptimizer, Training
from fedlm.models.config import ModelConfig
from fedlm.study.plugins import Found, file_of, is_own

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")


class Pipeline(Settings):
    """What a job of the pipeline requests."""

    threads: int = Field(1, ge=1, le=1024, description="processor cores of one job")
    runs_per_job: int = Field(1, ge=1, le=10_000, description="runs of a task that share one process")
    memory_mb: int = Field(3000, ge=256, description="memory of a job for which there is no prediction")
    minutes: int = Field(60, ge=1, description="time limit of a job")
    checkpoint_seconds: float = Field(
        60.0,
        ge=0,
        le=86_400,
        description="a run is saved after the first round that ends at least this long after the last save",
    )
    gpus: int = Field(0, ge=0, le=64, description="GPUs of one training job")


class Tuning(Settings):
    """How the methods' searched settings are chosen: by the validation score of the same trials for each."""

    seed: int = Field(ge=0, lt=2**31, description="seed of the trials, not one of the study's seeds")
    trials: int = Field(8, ge=1, le=1000, description="trials of each method on each task")
    partitions: dict[str, str] = Field(description="for each task, the partition on which methods are tuned")


class TaskEntry(Settings):
    """One label under `tasks:`; the task's own settings are given next to these keys."""

    task: str
    settings: Any
    model: ModelConfig | None = None
    partitions: list[str] | None = None
    federation: dict[str, Any] = {}
    training: dict[str, Any] = {}


class MethodEntry(Settings):
    """One label under `methods:`; the method's own settings are given next to these keys."""

    method: str
    settings: Any
    title: str
    tasks: list[str] | None = None
    partitions: list[str] | None = None
    tuned_as: str | None = None
    training: dict[str, Any] = {}
    server_optimizer: ServerOptimizer | None = None
    budgets: list[Budget] | None = None


class Run(NamedTuple):
    """The labels of one run, or of one trial of the tuning."""

    task: str
    partition: str
    method: str
    seed: int
    trial: int | None = None

    @property
    def path(self) -> str:
        """Path of the run below the study's `runs`, or of the trial below `trials`, without its ending."""
        name = f"seed{self.seed}" if self.trial is None else f"trial{self.trial}"
        return f"{self.task}/{self.partition}/{self.method}/{name}"


class RunConfig(Settings):
    """Everything one run depends on, with no label or name left to look up."""

    study: str
    task_label: str
    partition_label: str
    method_label: str
    seed: int
    trial: int | None = None
    searched: dict[str, Any] = {}
    task: str
    task_class: type[Task]
    task_settings: Any
    model: ModelConfig
    partition: Any
    method: str
    method_class: type[Method]
    method_settings: Any
    federation: Federation
    training: Training

    def plugins(self) -> list[str]:
        """Return the folders outside the repository that hold the run's method and task.

        The paths are relative to the working directory, as those of a study's data are.
        """
        kinds = (self.method_class, self.task_class)
        return sorted({os.path.relpath(file_of(kind).parent) for kind in kinds if not is_own(kind)})

    def resolved(self) -> dict[str, Any]:
        """Return the configuration as plain values, as stored in a record."""
        return {
            "model": self.model.model_dump(mode="json"),
            "task": {"task": self.task, **self.task_settings.model_dump(mode="json")},
            "partition": self.partition.model_dump(mode="json"),
            "method": {"method": self.method, **self.method_settings.model_dump(mode="json")},
            "federation": self.federation.model_dump(mode="json"),
            "training": self.training.model_dump(mode="json"),
        }


class Study(Settings):
    """One configuration file: tasks x partitions x methods x seeds.

    `found` holds the classes that the names of tasks and methods stand for.
    """

    found: InstanceOf[Found] = Field(exclude=True, repr=False)
    study: str
    seeds: list[int] = Field(min_length=1, max_length=10_000)
    model: ModelConfig
    federation: Federation = Federation()
    training: Training = Training()
    pipeline: Pipeline = Pipeline()
    tasks: dict[str, TaskEntry]
    partitions: dict[str, PartitionConfig]
    methods: dict[str, MethodEntry]
    tuning: Tuning | None = None

    def runs(self) -> Iterator[Run]:
        """Yield the study's runs in the order of the file."""
        for task in self.tasks:
            for partition in self.partitions_of(task):
                for label, entry in self.methods.items():
                    if entry.tasks is not None and task not in entry.tasks:
                        continue
                    if entry.partitions is not None and partition not in entry.partitions:
                        continue
                    for seed in self.seeds:
                        yield Run(task, partition, label, seed)

    def trials(self) -> Iterator[Run]:
        """Yield the trials of the study's tuning, none if it has no tuning."""
        if self.tuning is None:
            return
        for task, partition in self.tuning.partitions.items():
            for label, entry in self.methods.items():
                if entry.tuned_as is None and (entry.tasks is None or task in entry.tasks):
                    for trial in range(self.tuning.trials):
                        yield Run(task, partition, label, self.tuning.seed, trial)

    def named(self, paths: Iterable[str]) -> list[Run]:
        """Return the runs and trials of these paths (see `Run.path`), in their order.

        Raises UserError for a path that is not in the study.
        """
        paths, known = list(paths), {run.path: run for run in (*self.runs(), *self.trials())}
        for path in paths:
            if path not in known:
                raise UserError(
                    f"run: {path!r} is not in the study; allowed: task/partition/method/seed<k>"
                    + (" or .../trial<k>" if self.tuning else "")
                )
        return [known[path] for path in paths]

    def tuned_row(self, method: str) -> str:
        """Return the label of the row whose trials choose the settings of a method label."""
        return self.methods[method].tuned_as or method

    def partitions_of(self, task: str) -> list[str]:
        """Return the labels of a task's partitions, in the order of the file."""
        only = self.tasks[task].partitions
        return [label for label in self.partitions if only is None or label in only]

    def titles(self) -> dict[str, str]:
        """Return the title of each method label, in the order of the file."""
        return {label: entry.title for label, entry in self.methods.items()}

    def task(self, label: str) -> Task:
        """Return the task under a label, with its settings. Raises UserError for an unknown label."""
        _known("task", label, self.tasks)
        entry = self.tasks[label]
        return self.found.tasks[entry.task](entry.settings)

    def run(
        self,
        task: str,
        partition: str,
        method: str,
        seed: int,
        trial: int | None = None,
        chosen: dict[str, Any] | None = None,
    ) -> RunConfig:
        """Return the configuration of one run, or of a trial with the settings drawn for it.

        `chosen` holds the values that the tuning chose; without them the searched settings of a run have
        their defaults. Raises UserError for a label that the study does not have.
        """
        _known("task", task, self.tasks)
        _known("partition", partition, self.partitions)
        _known("method", method, self.methods)
        of_task, of_method = self.tasks[task], self.methods[method]
        kind = self.found.methods[of_method.method]
        searched = chosen or {}
        if trial is not None and self.tuning is not None:
            from fedlm.study.tuning import settings_of  # only here, since it imports scipy

            searched = settings_of(kind, trial)
        of: dict[str, dict[str, Any]] = {"": {}, "training": {}, "server_optimizer": {}}
        for key, value in searched.items():
            section, _, name = key.rpartition(".")
            of[section][name] = value
        federation = _merged(self.federation, of_task.federation)
        of_row: dict[str, Any] = {}
        optimizer = of_method.server_optimizer
        if of["server_optimizer"]:
            optimizer = optimizer or federation.server_optimizer or kind.server_optimizer
            if not set(of["server_optimizer"]) <= set(type(optimizer).model_fields):
                raise UserError(
                    f"methods.{method}.server_optimizer: {optimizer.name}; allowed: one that has what "
                    f"`tuning` chooses for {of_method.method}: {', '.join(of['server_optimizer'])}"
                )
        if optimizer:
            of_row["server_optimizer"] = optimizer.model_dump() | of["server_optimizer"]
        if of_method.budgets is not None:
            of_row["budgets"] = [budget.model_dump() for budget in of_method.budgets]
        return RunConfig(
            study=self.study,
            task_label=task,
            partition_label=partition,
            method_label=method,
            seed=seed,
            trial=trial,
            searched=searched,
            task=of_task.task,
            task_class=self.found.tasks[of_task.task],
            task_settings=of_task.settings,
            model=of_task.model or self.model,
            partition=self.partitions[partition],
            method=of_method.method,
            method_class=kind,
            method_settings=_merged(of_method.settings, of[""]) if of[""] else of_method.settings,
            federation=_merged(federation, of_row) if of_row else federation,
            training=_merged(self.training, of_task.training, of_method.training, of["training"]),
        )


def _merged(base: Settings, *overrides: dict[str, Any]) -> Any:
    values = base.model_dump(exclude_unset=True)
    for override in overrides:
        values.update(override)
    return type(base).model_validate(values)


def _known(kind: str, label: str, allowed: dict) -> None:
    if label not in allowed:
        raise UserError(f"{kind}: {label!r} is not in the study; allowed: {', '.join(map(str, allowed))}")
