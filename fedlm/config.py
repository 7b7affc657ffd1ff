"""A study file: what is compared, on what, with which settings.

A study names tasks, partitions and methods by label; the grid of their labels and the seeds is the list of
runs. Settings are looked up from the general to the particular: study, then task, then method, each
overriding single keys of the one before.
"""

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from fedlm import method as method_module
from fedlm import task as task_module
from fedlm.errors import UserError
from fedlm.model_config import ModelConfig
from fedlm.partition import PartitionConfig
from fedlm.settings import Settings

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
LARGEST_FILE = 1 << 18  # bytes; what fits is read in seconds
LARGEST_STUDY = 1_000_000  # runs
LONGEST_LIST = 50  # faults that are told at once


class Federation(Settings):
    """Who takes part, and how often."""

    clients: int = Field(8, ge=1, le=1_000_000, description="number of clients")
    rounds: int = Field(3, ge=1, le=100_000, description="number of rounds")
    participation: float = Field(1.0, gt=0, le=1, description="share of the clients sampled in each round")
    dropout_rate: float = Field(
        0.0, ge=0, lt=1, description="probability that a sampled client downloads but never answers"
    )


class Training(Settings):
    """How a client trains in its turn, and how the server's model is scored."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(5e-5, gt=0, le=100)
    weight_decay: float = Field(0.0, ge=0, le=10)
    momentum: float = Field(0.0, ge=0, lt=1, description="of SGD")
    betas: tuple[float, float] = Field((0.9, 0.999), strict=False, description="of AdamW")
    epsilon: float = Field(1e-8, gt=0, le=1, description="of AdamW")
    batch_size: int = Field(16, ge=1, le=65_536, description="examples in one forward pass")
    accumulation: int = Field(1, ge=1, le=65_536, description="forward passes summed into one optimizer step")
    local_epochs: int = Field(1, ge=1, le=10_000, description="passes over the client's examples in one turn")
    local_steps: int | None = Field(
        None, ge=1, le=10_000_000, description="optimizer steps in one turn, instead of local_epochs"
    )
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the schedule in which the rate rises")
    schedule_span: Literal["federation", "turn"] = Field(
        "federation", description="whether the schedule runs over all rounds or starts anew at each turn"
    )
    largest_gradient_norm: float | None = Field(None, gt=0, description="gradients are clipped to this norm")
    autocast: Literal["bfloat16", "float16"] | None = Field(None, description="precision of the arithmetic")
    loss_scale: float = Field(1.0, gt=0, le=2**24, description="factor on the loss, for float16 gradients")
    scoring_batch_size: int = Field(64, ge=1, le=65_536)
    score_every: int = Field(1, ge=1, description="rounds between two scores on the validation split")
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _betas_below_one(self) -> "Training":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: {self.betas}; allowed: two numbers from 0 to below 1")
        return self


class Pipeline(Settings):
    """What a job of the pipeline asks for."""

    threads: int = Field(1, ge=1, le=1024, description="processor cores of one job")
    runs_per_job: int = Field(1, ge=1, le=10_000, description="runs that share one process")
    memory_mb: int = Field(3000, ge=256, description="memory of a job for which there is no prediction")
    minutes: int = Field(60, ge=1, description="time limit of a job")
    gpus: int = Field(0, ge=0, le=64, description="GPUs of one training job")


class TaskEntry(Settings):
    """One label under `tasks:`; the task's own settings stand beside these keys."""

    task: str
    settings: Any
    model: ModelConfig | None = None
    federation: dict[str, Any] = {}
    training: dict[str, Any] = {}


class MethodEntry(Settings):
    """One label under `methods:`; the method's own settings stand beside these keys."""

    method: str
    settings: Any
    title: str
    tasks: list[str] | None = None
    partitions: list[str] | None = None
    training: dict[str, Any] = {}


class Run(NamedTuple):
    """The labels of one run."""

    task: str
    partition: str
    method: str
    seed: int

    @property
    def path(self) -> str:
        """Path of the run below `results/<study>/runs`, without its ending."""
        return f"{self.task}/{self.partition}/{self.method}/seed{self.seed}"


class RunConfig(Settings):
    """Everything one run depends on, with no label left to look up."""

    study: str
    task_label: str
    partition_label: str
    method_label: str
    seed: int
    task: str
    task_settings: Any
    model: ModelConfig
    partition: Any
    method: str
    method_settings: Any
    federation: Federation
    training: Training

    def resolved(self) -> dict[str, Any]:
        """Return the configuration as plain values, as a record states it."""
        return {
            "model": self.model.model_dump(mode="json"),
            "task": {"task": self.task, **self.task_settings.model_dump(mode="json")},
            "partition": self.partition.model_dump(mode="json"),
            "method": {"method": self.method, **self.method_settings.model_dump(mode="json")},
            "federation": self.federation.model_dump(mode="json"),
            "training": self.training.model_dump(mode="json"),
        }


class Study(Settings):
    """One configuration file: tasks x partitions x methods x seeds."""

    study: str
    seeds: list[int] = Field(min_length=1, max_length=10_000)
    model: ModelConfig
    federation: Federation = Federation()
    training: Training = Training()
    pipeline: Pipeline = Pipeline()
    tasks: dict[str, TaskEntry]
    partitions: dict[str, PartitionConfig]
    methods: dict[str, MethodEntry]

    def runs(self) -> Iterator[Run]:
        """Yield the study's runs in the order of the file."""
        for task in self.tasks:
            for partition in self.partitions:
                for label, entry in self.methods.items():
                    if entry.tasks is not None and task not in entry.tasks:
                        continue
                    if entry.partitions is not None and partition not in entry.partitions:
                        continue
                    for seed in self.seeds:
                        yield Run(task, partition, label, seed)

    def run(self, task: str, partition: str, method: str, seed: int) -> RunConfig:
        """Return the configuration of one run.

        Raises UserError for a label that the study does not have.
        """
        _known("task", task, self.tasks)
        _known("partition", partition, self.partitions)
        _known("method", method, self.methods)
        of_task, of_method = self.tasks[task], self.methods[method]
        return RunConfig(
            study=self.study,
            task_label=task,
            partition_label=partition,
            method_label=method,
            seed=seed,
            task=of_task.task,
            task_settings=of_task.settings,
            model=of_task.model or self.model,
            partition=self.partitions[partition],
            method=of_method.method,
            method_settings=of_method.settings,
            federation=_merged(self.federation, of_task.federation),
            training=_merged(self.training, of_task.training, of_method.training),
        )


def _merged(base: Settings, *overrides: dict[str, Any]) -> Any:
    values = base.model_dump(exclude_unset=True)
    for override in overrides:
        values.update(override)
    return type(base).model_validate(values)


def _known(kind: str, label: str, allowed: dict) -> None:
    if label not in allowed:
        raise UserError(f"{kind}: {label!r} is not in the study; allowed: {', '.join(map(str, allowed))}")


class _Reader:
    """Collects every fault of a study file, each with the path of its key."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def fault(self, path: str, message: str) -> None:
        self.faults.append(f"{path}: {message}")

    def told(self) -> list[str]:
        """Return the faults, or the first of very many."""
        rest = len(self.faults) - LONGEST_LIST
        return self.faults[:LONGEST_LIST] + ([f"and {rest} more"] if rest > 0 else [])

    def section(self, values: dict, key: str, default: Any = None) -> Any:
        """Return the non-empty table of labels under `key`."""
        table = values.get(key, default)
        if not isinstance(table, dict) or not table:
            self.fault(key, f"{_shown(table)}; allowed: a table with at least one label")
            return {}
        good = {}
        for label, entry in table.items():
            if not isinstance(label, str) or not LABEL.fullmatch(label) or label.endswith("."):
                self.fault(
                    key,
                    f"label {_shown(label)}; allowed: up to 64 letters, digits and _ . + -, "
                    "starting with a letter or digit (labels become parts of paths)",
                )
            elif entry is not None and not isinstance(entry, dict):
                self.fault(f"{key}.{label}", f"{_shown(entry)}; allowed: a table of settings")
            else:
                good[label] = dict(entry or {})
        folded: dict[str, str] = {}
        for label in good:
            if folded.setdefault(label.lower(), label) != label:
                self.fault(key, f"labels {folded[label.lower()]!r} and {label!r} differ in case only")
        return good

    def parse(self, path: str, kind: Any, values: Any) -> Any:
        """Validate `values` as `kind`; on a fault note it and return None."""
        try:
            return TypeAdapter(kind).validate_python(values)
        except ValidationError as error:
            self.note(path, error, list(getattr(kind, "model_fields", ())))
        except RecursionError:
            self.fault(path, "nested too deeply; allowed: a plain table of settings")
        return None

    def note(self, path: str, error: ValidationError, allowed: list[str] = ()) -> None:
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
                self.fault(where, f"{_shown(item.get('input'))}; {printable(item['msg'], 300)}")


def _shown(value: Any) -> str:
    try:
        return printable(repr(value), 80)
    except RecursionError:
        return "a value nested too deeply"
    except ValueError:  # Python does not write out whole numbers of thousands of digits
        return "a number with too many digits"


def _word(part: Any) -> str:
    return printable(part, 80) if isinstance(part, str) else _shown(part)


def printable(text: str, longest: int) -> str:
    """Return a text as a part of one line: short, and without control characters."""
    text = text if len(text) <= longest else f"{text[: longest - 3]}..."
    return text if text.isprintable() else repr(text)[1:-1]


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a repeated key is an error and aliases are refused (they can explode)."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(
                f"line {event.start_mark.line + 1}: alias *{event.anchor}; allowed: no anchors and aliases"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            try:
                if key in seen:
                    raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice")
                seen.add(key)
            except TypeError as error:
                raise yaml.YAMLError(
                    f"line {key_node.start_mark.line + 1}: a key must be a word or number"
                ) from error
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node):
        """Refuse numbers in base 60 (1:30 is 90 in YAML 1.1) and endless ones, which take minutes to read."""
        text = str(self.construct_scalar(node))
        if ":" in text or len(text) > 100:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(
                f"line {line}: {_shown(text)}; allowed: a number in decimal digits, or a text"
            )
        kind = node.tag.rpartition(":")[2]
        return super().construct_yaml_int(node) if kind == "int" else super().construct_yaml_float(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_decimal)
# YAML 1.1 reads 2e-5 as text; every study has such a learning rate.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*)(?:\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def read_yaml(path: Path) -> dict:
    """Read a YAML table. Raises UserError naming file and line."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a file; allowed: a YAML study file")
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(f"{path}: larger than 256 KiB; allowed: a study file")
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); allowed: a YAML study file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); allowed: a YAML study file") from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        # PyYAML raises anything where a value is not what its tag says (!!int "").
        reason = printable(" ".join(str(error).split()), 300)
        raise UserError(f"{path}: not valid YAML: {reason or type(error).__name__}") from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply; allowed: a YAML study file") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: {_shown(values)}; allowed: a table of settings")
    return values


def load(path: str | Path) -> Study:
    """Read and validate a study file.

    Raises UserError with one line for each fault: the key's path, the value, what is allowed.
    """
    return parse(read_yaml(Path(path)), str(path))


def parse(values: dict, where: str = "study") -> Study:
    """Validate the content of a study file; `where` begins each message."""
    reader = _Reader()
    known = {
        "study",
        "seeds",
        "model",
        "federation",
        "training",
        "pipeline",
        "tasks",
        "partitions",
        "methods",
    }
    for key in values:
        if key not in known:
            reader.fault(_word(key), f"unknown key; allowed: {', '.join(sorted(known))}")
    label = values.get("study")
    if not isinstance(label, str) or not LABEL.fullmatch(label):
        reader.fault("study", f"{_shown(label)}; allowed: up to 64 letters, digits and _ . + -")
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
    known_tasks = task_module.discover()
    tasks = {
        name: _task(reader, name, entry, plain, known_tasks)
        for name, entry in reader.section(values, "tasks").items()
    }
    methods = {
        name: _method(reader, name, entry, plain, tasks, partitions)
        for name, entry in reader.section(values, "methods").items()
    }
    size = len(tasks) * len(partitions) * len(methods) * len(seeds)
    if size > LARGEST_STUDY:
        reader.fault("study", f"{size} runs; allowed: at most {LARGEST_STUDY}")
    if reader.faults:
        raise UserError("\n".join(f"{where}: {fault}" for fault in reader.told()))
    return Study(
        study=label, seeds=seeds, model=model, tasks=tasks, partitions=partitions, methods=methods, **plain
    )


def of_record(record: dict[str, Any]) -> Study:
    """Return the study of the one run that a record describes. Raises UserError where it cannot be one."""
    try:
        found = record["config"]
        values = {key: found[key] for key in ("model", "federation", "training")}
        values |= {f"{key}s": {record[key]: found[key]} for key in ("task", "partition", "method")}
        values |= {"study": record["study"], "seeds": [record["seed"]]}
    except (KeyError, TypeError) as error:
        raise UserError(f"record: no configuration of a run ({error})") from error
    return parse(values, "record")


def _seeds(reader: _Reader, seeds: Any) -> list[int]:
    good = isinstance(seeds, list) and 0 < len(seeds) <= 10_000
    good = good and all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds)
    if not good or len(set(seeds)) < len(seeds):
        reader.fault(
            "seeds", f"{_shown(seeds)}; allowed: a list of different whole numbers from 0 to 2^31 - 1"
        )
        return []
    return seeds


def _model_values(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


def _overrides(reader: _Reader, path: str, entry: dict, key: str, base: Settings | None) -> dict[str, Any]:
    override = entry.pop(key, None)
    if override is None:
        return {}
    if not isinstance(override, dict):
        reader.fault(f"{path}.{key}", f"{_shown(override)}; allowed: a table of settings")
        return {}
    if base is not None:
        values = {**base.model_dump(exclude_unset=True), **override}
        if reader.parse(f"{path}.{key}", type(base), values) is None:
            return {}
    return override


def _choice(reader: _Reader, path: str, key: str, name: Any, allowed: dict) -> Any:
    if not isinstance(name, str) or name not in allowed:
        reader.fault(f"{path}.{key}", f"{_shown(name)}; allowed: {', '.join(sorted(allowed))}")
        return None
    return allowed[name]


def _task(reader: _Reader, label: str, entry: dict, plain: dict, known: dict) -> TaskEntry | None:
    path = f"tasks.{label}"
    name = entry.pop("task", label)
    found = _choice(reader, path, "task", name, known)
    model = None
    if "model" in entry:
        model = reader.parse(f"{path}.model", ModelConfig, _model_values(entry.pop("model")))
    overrides = {key: _overrides(reader, path, entry, key, plain[key]) for key in ("federation", "training")}
    settings = reader.parse(path, found.Config, entry) if found else None
    return settings and TaskEntry(task=name, settings=settings, model=model, **overrides)


def _method(
    reader: _Reader, label: str, entry: dict, plain: dict, tasks: dict, partitions: dict
) -> MethodEntry | None:
    path = f"methods.{label}"
    name = entry.pop("method", label)
    found = _choice(reader, path, "method", name, method_module.discover())
    only = {
        "tasks": _labels(reader, f"{path}.tasks", entry.pop("tasks", None), tasks),
        "partitions": _labels(reader, f"{path}.partitions", entry.pop("partitions", None), partitions),
    }
    training = _overrides(reader, path, entry, "training", plain["training"])
    title = entry.pop("title", None)
    if title is not None and not (isinstance(title, str) and 0 < len(title) <= 60 and title.isprintable()):
        reader.fault(f"{path}.title", f"{_shown(title)}; allowed: one line of up to 60 characters")
        title = None
    settings = reader.parse(path, found.Config, entry) if found else None
    if settings is None:
        return None
    if title is None:
        title = found.title if label == name else f"{found.title} ({label})"
    return MethodEntry(method=name, settings=settings, title=title, training=training, **only)


def _labels(reader: _Reader, path: str, value: Any, allowed: dict) -> list[str] | None:
    if value is None:
        return None
    good = isinstance(value, list) and value
    if not good or not all(isinstance(label, str) and label in allowed for label in value):
        reader.fault(path, f"{_shown(value)}; allowed: a list of {', '.join(allowed)}")
        return None
    return value


def schema() -> str:
    """Return the JSON schema of a study file, as `config/schema.json` holds it."""
    definitions: dict[str, Any] = {}

    def of(kind: Any) -> dict:
        found = TypeAdapter(kind).json_schema(ref_template="#/$defs/{model}")
        definitions.update(found.pop("$defs", {}))
        return found

    def reference(kind: Any) -> dict:
        definitions[kind.__name__] = of(kind)
        return {"$ref": f"#/$defs/{kind.__name__}"}

    def labelled(key: str, kinds: dict, extra: dict) -> dict:
        choices = []
        for name, kind in sorted(kinds.items()):
            entry = of(kind.Config)
            entry["title"] = f"{name}: {kind.title}"
            entry["properties"] = {key: {"const": name}, **extra, **entry.get("properties", {})}
            choices.append(entry)
        return {"anyOf": [{"type": "null"}, *choices]}

    def optional(kind: Any) -> dict:
        return {"anyOf": [{"type": "null"}, reference(kind)]}

    model = {"anyOf": [{"type": "string"}, reference(ModelConfig)]}
    training, federation = optional(Training), optional(Federation)
    label_list = {"type": "array", "items": {"type": "string"}, "minItems": 1}
    task_extra = {"model": model, "federation": federation, "training": training}
    method_extra = {
        "title": {"type": "string"},
        "tasks": label_list,
        "partitions": label_list,
        "training": training,
    }
    names = {"pattern": f"^{LABEL.pattern}$"}
    tree = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "fedlm-bench study",
        "type": "object",
        "additionalProperties": False,
        "required": ["study", "tasks", "partitions", "methods"],
        "properties": {
            "study": {"type": "string", **names},
            "seeds": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
            "model": model,
            "federation": federation,
            "training": training,
            "pipeline": optional(Pipeline),
            "tasks": {
                "type": "object",
                "propertyNames": names,
                "minProperties": 1,
                "additionalProperties": labelled("task", task_module.discover(), task_extra),
            },
            "partitions": {
                "type": "object",
                "propertyNames": names,
                "minProperties": 1,
                "additionalProperties": {
                    "anyOf": [
                        {"type": "null"},
                        of(PartitionConfig),
                        # The label itself may be the scheme.
                        {"type": "object", "not": {"required": ["scheme"]}},
                    ]
                },
            },
            "methods": {
                "type": "object",
                "propertyNames": names,
                "minProperties": 1,
                "additionalProperties": labelled("method", method_module.discover(), method_extra),
            },
        },
    }
    tree["$defs"] = definitions
    return json.dumps(tree, indent=1, sort_keys=True) + "\n"
