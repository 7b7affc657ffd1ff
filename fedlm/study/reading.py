"""From the content of a study file to a study; every error is reported with the path of its key."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fedlm.base.errors import UserError
from fedlm.base.settings import Settings
from fedlm.data.partition import PartitionConfig
from fedlm.federation.settings import Federation, ServerOptimizer, Training
from fedlm.models.config import ModelConfig
from fedlm.study import plugins
from fedlm.study.study import LABEL, MethodEntry, Pipeline, Study, TaskEntry, Tuning
from fedlm.study.yaml_files import printable, read_yaml, shown

LARGEST_STUDY = 1_000_000  # runs
MOST_PLUGIN_FOLDERS = 100

LONGEST_LIST = 50  # errors that are reported at once


class _Reader:
    """Collects every error in a study file, each with the path of its key."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def fault(self, path: str, message: str) -> None:
        self.faults.append(f"{path}: {message}")

    def message(self, where: str) -> str:
        """Return the errors, or the first of very many, one per line."""
        rest = len(self.faults) - LONGEST_LIST
        lines = self.faults[:LONGEST_LIST] + ([f"and {rest} more"] if rest > 0 else [])
        return "\n".join(f"{where}: {line}" for line in lines)

    def section(self, values: dict, key: str) -> Any:
        """Return the non-empty table of labels under `key`."""
        table = values.get(key)
        if not isinstance(table, dict) or not table:
            self.fault(key, f"{shown(table)}; allowed: a table with at least one label")
            return {}
        good = {}
        for label, entry in table.items():
            if not isinstance(label, str) or not LABEL.fullmatch(label) or label.endswith("."):
                self.fault(
                    key,
                    f"label {shown(label)}; allowed: up to 64 letters, digits and _ . + -, "
                    "starting with a letter or digit (labels become parts of paths)",
                )
            elif entry is not None and not isinstance(entry, dict):
                self.fault(f"{key}.{label}", f"{shown(entry)}; allowed: a table of settings")
            else:
                good[label] = dict(entry or {})
        folded: dict[str, str] = {}
        for label in good:
            if folded.setdefault(label.lower(), label) != label:
                self.fault(key, f"labels {folded[label.lower()]!r} and {label!r} differ only in case")
        return good

    def parse(self, path: str, kind: Any, values: Any) -> Any:
        """Validate `values` as `kind`; record an error and return None if they are not valid."""
        try:
            return TypeAdapter(kind).validate_python(values)
        except ValidationError as error:
            self.note(path, error, list(getattr(kind, "model_fields", ())))
        except RecursionError:
            self.fault(path, "nested too deeply; allowed: a plain table of settings")
        return None

    def note(self, path: str, error: ValidationError, allowed: Sequence[str] = ()) -> None:
        for item in error.errors(include_url=False):
            where = ".".join([path, *(_word(part) for part in item["loc"])]).strip(".")
            if item["type"] == "extra_forbidden":
                known = allowed if len(item["loc"]) == 1 else []
                near = difflib.get_close_matches(str(item["loc"][-1])[:80], known, n=1)
                rest = f"; allowed: {', '.join(known)}" if known else ""
                self.fault(where, "unknown key" + (f"; did you mean {near[0]}?" if near else rest))
            elif item["type"] == "missing":
                self.fault(where, "missing; the key is required")
            else:
                self.fault(where, f"{shown(item.get('input'))}; {printable(item['msg'], 300)}")


def _word(part: Any) -> str:
    return printable(part, 80) if isinstance(part, str) else shown(part)


def load(path: str | Path) -> Study:
    """Read and validate a study file.

    Raises UserError with one line for each fault: the key's path, the value, what is allowed.
    """
    return parse(read_yaml(Path(path)), str(path), Path(path).parent)


def parse(values: dict, where: str = "study", folder: Path = Path()) -> Study:
    """Validate the content of a study file; `where` begins each message.

    `folder` is the file's folder: paths under `plugins` are relative to it. The plug-ins are imported.
    """
    reader = _Reader()
    known = {
        "study",
        "seeds",
        "model",
        "federation",
        "training",
        "pipeline",
        "tuning",
        "plugins",
        "tasks",
        "partitions",
        "methods",
    }
    for key in values:
        if key not in known:
            reader.fault(_word(key), f"unknown key; allowed: {', '.join(sorted(known))}")
    label = values.get("study")
    if not isinstance(label, str) or not LABEL.fullmatch(label):
        reader.fault("study", f"{shown(label)}; allowed: up to 64 letters, digits and _ . + -")
    seeds = _seeds(reader, values.get("seeds", [1]))
    model = reader.parse("model", ModelConfig, _model_values(values.get("model", "minilm")))
    plain = {
        key: reader.parse(key, kind, {} if values.get(key) is None else values[key])
        for key, kind in (("federation", Federation), ("training", Training), ("pipeline", Pipeline))
    }
    partitions = {
        name: reader.parse(f"partitions.{name}", PartitionConfig, {"scheme": name, **entry})
        for name, entry in reader.section(values, "partitions").items()
    }
    found = _plugins(reader, values.get("plugins"), folder)
    if found is None:  # methods and tasks cannot be looked up without the plug-ins
        raise UserError(reader.message(where))
    tasks = {
        name: _task(reader, name, entry, plain, partitions, found.tasks)
        for name, entry in reader.section(values, "tasks").items()
    }
    methods = {
        name: _method(reader, name, entry, plain, tasks, partitions, found.methods)
        for name, entry in reader.section(values, "methods").items()
    }
    tuning = _tuning(reader, values.get("tuning"), seeds, tasks, partitions)
    for name, entry in methods.items():
        if entry is not None:
            _tuned(reader, name, entry, tuning, plain["federation"], tasks, methods, found.methods)
    size = len(tasks) * len(partitions) * len(methods) * len(seeds)
    if size > LARGEST_STUDY:
        reader.fault("study", f"{size} runs; allowed: at most {LARGEST_STUDY}")
    if reader.faults:
        raise UserError(reader.message(where))
    values = {
        "found": found,
        "study": label,
        "seeds": seeds,
        "model": model,
        "tasks": tasks,
        "tuning": tuning,
    }
    return Study.model_validate({**values, "partitions": partitions, "methods": methods, **plain})


def of_record(record: dict[str, Any], plugins: list[str] | None = None) -> Study:
    """Return the study of the one run that a record describes.

    `plugins` are the folders of its plug-ins; by default those that the record names. Raises UserError if
    the record cannot be that of a run.
    """
    try:
        found = record["config"]
        values = {key: found[key] for key in ("model", "federation", "training")}
        values |= {f"{key}s": {record[key]: found[key]} for key in ("task", "partition", "method")}
        values |= {"study": record["study"], "seeds": [record["seed"]]}
        values["plugins"] = record.get("plugins", []) if plugins is None else plugins
    except (KeyError, TypeError) as error:
        raise UserError(f"record: not the configuration of a run ({error})") from error
    return parse(values, "record")


def _seeds(reader: _Reader, seeds: Any) -> list[int]:
    good = isinstance(seeds, list) and 0 < len(seeds) <= 10_000
    good = good and all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds)
    if not good or len(set(seeds)) < len(seeds):
        reader.fault(
            "seeds", f"{shown(seeds)}; allowed: a list of different whole numbers from 0 to 2^31 - 1"
        )
        return []
    return seeds


def _plugins(reader: _Reader, value: Any, folder: Path) -> plugins.Found | None:
    """Return the methods and tasks that the study may use; record an error and return None if one is bad."""
    good = value is None or isinstance(value, list) and len(value) <= MOST_PLUGIN_FOLDERS
    if not good or not all(isinstance(path, str) and path and path.isprintable() for path in value or ()):
        reader.fault("plugins", f"{shown(value)}; allowed: a list of folders")
        return None
    try:
        return plugins.find([folder / path for path in value or ()])
    except UserError as error:
        for line in str(error).splitlines():
            reader.fault("plugins", printable(line, 1000))
        return None


def _tuning(reader: _Reader, values: Any, seeds: list[int], tasks: dict, partitions: dict) -> Tuning | None:
    if values is None:
        return None
    tuning = reader.parse("tuning", Tuning, values)
    if tuning is None:
        return None
    if tuning.seed in seeds:
        reader.fault("tuning.seed", f"{tuning.seed}; allowed: a seed that is not under `seeds`")
    for task, partition in tuning.partitions.items():
        only = tasks[task].partitions if tasks.get(task) else None
        if partition not in (allowed := only or partitions):
            reader.fault(
                f"tuning.partitions.{printable(task, 80)}",
                f"{shown(partition)}; allowed: {', '.join(allowed)}",
            )
    if set(tuning.partitions) != set(tasks):
        reader.fault(
            "tuning.partitions",
            f"{shown(sorted(tuning.partitions))}; allowed: one partition for each of {', '.join(tasks)}",
        )
    return tuning


def _tuned(
    reader: _Reader,
    label: str,
    entry: MethodEntry,
    tuning: Tuning | None,
    federation: Federation | None,
    tasks: dict,
    methods: dict,
    known: dict,
) -> None:
    """Check what a row of the study says about its tuning."""
    path = f"methods.{label}"
    if tuning is None:
        if entry.tuned_as is not None:
            reader.fault(f"{path}.tuned_as", f"{shown(entry.tuned_as)}; allowed only with `tuning`")
        return
    optimizer = entry.server_optimizer or (federation and federation.server_optimizer)
    given = {
        "": entry.settings.model_fields_set,
        "training": entry.training,
        "server_optimizer": optimizer.model_fields_set if optimizer else set(),
    }
    for key in known[entry.method].search:
        section, _, name = key.rpartition(".")
        if name in given[section]:
            row_has_it = section != "server_optimizer" or entry.server_optimizer
            where = path if row_has_it else "federation"
            reader.fault(f"{where}.{key}", f"allowed: nothing, since `tuning` chooses it for {label}")
    if entry.tuned_as is None:
        return
    other = methods.get(entry.tuned_as, entry)
    same = [
        name for name, one in methods.items() if one and one.tuned_as is None and one.method == entry.method
    ]
    if entry.tuned_as not in same:
        reader.fault(
            f"{path}.tuned_as",
            f"{shown(entry.tuned_as)}; allowed: a tuned row of the same method: {', '.join(same) or 'none'}",
        )
    elif other.tasks is not None and not set(entry.tasks or tasks) <= set(other.tasks):
        reader.fault(f"{path}.tuned_as", f"{entry.tuned_as!r} is tuned only on {', '.join(other.tasks)}")


def _model_values(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


def _overrides(reader: _Reader, path: str, entry: dict, key: str, base: Settings | None) -> dict[str, Any]:
    override = entry.pop(key, None)
    if override is None:
        return {}
    if not isinstance(override, dict):
        reader.fault(f"{path}.{key}", f"{shown(override)}; allowed: a table of settings")
        return {}
    if base is not None:
        values = {**base.model_dump(exclude_unset=True), **override}
        if reader.parse(f"{path}.{key}", type(base), values) is None:
            return {}
    return override


def _choice(reader: _Reader, path: str, key: str, name: Any, allowed: dict) -> Any:
    if not isinstance(name, str) or name not in allowed:
        reader.fault(f"{path}.{key}", f"{shown(name)}; allowed: {', '.join(sorted(allowed))}")
        return None
    return allowed[name]


def _task(
    reader: _Reader, label: str, entry: dict, plain: dict, partitions: dict, known: dict
) -> TaskEntry | None:
    path = f"tasks.{label}"
    name = entry.pop("task", label)
    found = _choice(reader, path, "task", name, known)
    model = None
    if "model" in entry:
        model = reader.parse(f"{path}.model", ModelConfig, _model_values(entry.pop("model")))
    overrides = {key: _overrides(reader, path, entry, key, plain[key]) for key in ("federation", "training")}
    only = _labels(reader, f"{path}.partitions", entry.pop("partitions", None), partitions)
    settings = reader.parse(path, found.Config, entry) if found else None
    return settings and TaskEntry(task=name, settings=settings, model=model, partitions=only, **overrides)


def _method(
    reader: _Reader, label: str, entry: dict, plain: dict, tasks: dict, partitions: dict, known: dict
) -> MethodEntry | None:
    path = f"methods.{label}"
    name = entry.pop("method", label)
    found = _choice(reader, path, "method", name, known)
    only = {
        "tasks": _labels(reader, f"{path}.tasks", entry.pop("tasks", None), tasks),
        "partitions": _labels(reader, f"{path}.partitions", entry.pop("partitions", None), partitions),
    }
    training = _overrides(reader, path, entry, "training", plain["training"])
    tuned_as = entry.pop("tuned_as", None)
    if tuned_as is not None and not isinstance(tuned_as, str):
        reader.fault(f"{path}.tuned_as", f"{shown(tuned_as)}; allowed: the label of another row")
        tuned_as = None
    optimizer = entry.pop("server_optimizer", None)
    if optimizer is not None:
        optimizer = reader.parse(f"{path}.server_optimizer", ServerOptimizer, optimizer)
    budgets = entry.pop("budgets", None)
    if budgets is not None:
        of_row = reader.parse(path, Federation, {"budgets": budgets})
        budgets = of_row and of_row.budgets
    title = entry.pop("title", None)
    if title is not None and not (isinstance(title, str) and 0 < len(title) <= 60 and title.isprintable()):
        reader.fault(f"{path}.title", f"{shown(title)}; allowed: one line of up to 60 characters")
        title = None
    settings = reader.parse(path, found.Config, entry) if found else None
    if settings is None:
        return None
    if title is None:
        title = found.title if label == name else f"{found.title} ({label})"
    return MethodEntry(
        method=name,
        settings=settings,
        title=title,
        training=training,
        tuned_as=tuned_as,
        server_optimizer=optimizer,
        budgets=budgets,
        **only,
    )


def _labels(reader: _Reader, path: str, value: Any, allowed: dict) -> list[str] | None:
    if value is None:
        return None
    good = isinstance(value, list) and value
    if not good or not all(isinstance(label, str) and label in allowed for label in value):
        reader.fault(path, f"{shown(value)}; allowed: a list of {', '.join(allowed)}")
        return None
    return value
