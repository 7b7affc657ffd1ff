"""Everything that can be checked before the first job: data, models, and what methods require of them."""

from collections.abc import Callable, Iterable
from functools import partial

from pydantic import ValidationError

from fedlm.base.errors import UserError
from fedlm.data import schemes
from fedlm.data.task import Task
from fedlm.federation import budgets, reducible
from fedlm.federation.facts import Facts, facts
from fedlm.study.study import Run, Study
from fedlm.study.yaml_files import printable


def check(study: Study) -> list[str]:
    """Check a study beyond its file: data, models, lengths, blocks, labels. Nothing is downloaded.

    The reader's own data are read once, with a progress bar in a terminal. Returns notes, one line each: what
    is allowed, but perhaps not meant.

    Raises UserError with one line for each fault, naming the key's path.
    """
    faults: list[str] = []
    notes: list[str] = []
    without_budgets: dict[str, None] = {}
    trials: dict[tuple[str, str], list[Run]] = {}
    for run in study.trials():
        trials.setdefault((run.task, run.method), []).append(run)

    def attempt(path: str, action: Callable[[], object]) -> None:
        try:
            action()
        except UserError as error:
            faults.extend(f"{path}: {printable(line, 1000)}" for line in str(error).splitlines())

    devices: dict[str, str | None] = {"training.device": study.training.device}
    devices |= {
        f"tasks.{label}.training.device": e.training.get("device") for label, e in study.tasks.items()
    }
    for label, row in study.methods.items():
        devices[f"methods.{label}.training.device"] = row.training.get("device")
    for path, device in devices.items():
        if device == "cuda":
            attempt(path, _require_cuda)
    for label, entry in study.tasks.items():
        task = study.task(label)
        path, kind = f"tasks.{label}", task.kind
        attempt(path, task.check)
        if not any(fault.startswith(f"{path}:") for fault in faults):
            attempt(path, task.examine)
        if not any(fault.startswith(f"{path}:") for fault in faults):
            found_in_data = task.examine()  # remembered
            notes += [f"{path}: {printable(note, 1000)}" for note in found_in_data.notes]
            _check_partitions(study, label, task, found_in_data.training, attempt)
        model = entry.model or study.model
        try:
            found = facts(model, kind)
        except UserError as error:
            reason = printable(str(error), 1000)
            reason = reason.removeprefix("model: ")
            faults.append(f"{path}.model: {reason}" if entry.model else f"model: {reason}")
            continue
        length = getattr(entry.settings, "max_length", None)
        if found.positions is not None and length is not None and length > found.positions:
            faults.append(
                f"{path}.max_length: {length}; allowed: at most {found.positions}, the positions of the model"
            )
        served = {name: e for name, e in study.methods.items() if e.tasks is None or label in e.tasks}
        for name, chosen in served.items():
            kind_of_method = study.found.methods[chosen.method]
            if kind not in kind_of_method.kinds:
                faults.append(
                    f"methods.{name}: does not support {path}, which is {kind}; allowed: "
                    f"{', '.join(kind_of_method.kinds)} (or name its tasks with methods.{name}.tasks)"
                )
                continue
            built = kind_of_method(chosen.settings, study.federation.clients, study.seeds[0])
            attempt(f"methods.{name}", partial(built.check, found))
            run_config = study.run(label, next(iter(study.partitions)), name, study.seeds[0])
            training, given = run_config.training, run_config.federation.budgets
            if given and not budgets.known(kind_of_method):
                without_budgets.setdefault(name)
            elif given:
                fresh = kind_of_method(chosen.settings, study.federation.clients, study.seeds[0])
                attempt(
                    f"methods.{name} (on {path})",
                    partial(budgets.check, fresh, model, kind, length or 8, given, training),
                )
            attempt(f"methods.{name}", partial(built.check_training, training))
            rounds = run_config.federation.rounds
            if left_out := built.left_out(rounds):
                leave = "round leaves" if rounds == 1 else "rounds leave"
                notes.append(f"methods.{name} (on {path}): {rounds} {leave} out {left_out}")
            attempt(f"methods.{name}", partial(reducible.check, built, model, kind))
            if study.tuning and chosen.tuned_as is None:
                own = trials.get((label, name), [])
                attempt(f"methods.{name}", partial(_check_trials, study, own, found))
            attempt(f"methods.{name}", partial(_check_averaging, study, label, name, built.averages()))
            virtual, positions = built.virtual_tokens(), found.positions
            if kind == "question_answering" and positions and length and length > positions - virtual:
                faults.append(
                    f"{path}.max_length: {length}; allowed: at most {positions - virtual} with "
                    f"methods.{name}, whose {virtual} virtual tokens take positions of the model"
                )
            if positions is not None and positions - virtual < 8:
                faults.append(
                    f"methods.{name}: {virtual} virtual tokens; allowed: at most "
                    f"{positions - 8}, which leaves 8 positions for the text"
                )
    if not any(True for _ in study.runs()):
        faults.append("methods: no run remains; allowed: at least one method for a task and a partition")
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))
    if without_budgets:
        names = ", ".join(without_budgets)
        notes.append(
            f"federation.budgets: with these methods clients train as if they had no budget: {names}"
        )
    return notes


def _check_partitions(study: Study, label: str, task: Task, training: int | None, attempt: Callable) -> None:
    """Check that the task can be partitioned as in the study, as far as that is known without its data."""
    labels, groups = task.count_labels(), None if task.has_groups else 0
    # Of fixed data only the most is known: there may be fewer.
    most = training or getattr(task.config, "train_examples", None)
    for name in study.partitions_of(label):
        config = study.partitions[name]
        clients = study.run(label, name, next(iter(study.methods)), study.seeds[0]).federation.clients
        attempt(
            f"partitions.{name} (of tasks.{label})",
            partial(schemes.check, config, clients, most, labels, groups),
        )


def _check_trials(study: Study, trials: Iterable[Run], found: Facts) -> None:
    """Check the settings of each trial, which also have to fit the row's other settings and the model."""
    for run in trials:
        try:
            config = study.run(*run)
        except ValidationError as error:
            raise UserError(f"trial {run.trial}: {error.errors()[0]['msg']}") from error
        config.method_class(config.method_settings, config.federation.clients, run.seed).check(found)


def _check_averaging(study: Study, task: str, method: str, averages: bool) -> None:
    """Raise UserError if a server optimizer is asked for where the server averages nothing."""
    run = study.run(task, next(iter(study.partitions)), method, study.seeds[0])
    found = run.federation.server_optimizer
    if found is not None and found.name != "none" and not averages:
        raise UserError(
            f"server_optimizer: {found.name}; allowed: none, since the server of {run.method} with these "
            "settings follows no mean of uploads"
        )


def _require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UserError("cuda; allowed on this machine: auto, cpu (PyTorch finds no CUDA device)")
