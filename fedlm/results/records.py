"""From run records to two tables: one row per run, and one row per run and round.

The records (one JSON file per run) are the source of truth. The compiled files are only a convenience:
the same records give the same bytes, and deleting the compiled files loses nothing.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Literal

import pandas
import pyarrow
import pyarrow.parquet
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedlm.base.errors import UserError
from fedlm.base.files import write_atomically

RECORD_VERSION: Final = 1
# Rows of rounds that are held before they are compressed: bounds the memory for any number of records.
ROWS_IN_MEMORY = 50_000

KEYS = ["study", "task", "partition", "method", "seed"]
MEMORY_COLUMNS = [
    "peak_memory_bytes",
    "parameter_bytes",
    "gradient_bytes",
    "optimizer_bytes",
    "method_bytes",
    "activation_bytes",
]
SECONDS = ["prune", "download", "train", "probe", "upload", "merge", "score"]


class _Part(BaseModel):
    """The part of a record that is compiled; a record may hold more."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())


class _Model(_Part):
    source: str


class _Task(_Part):
    task: str


class _Scheme(_Part):
    scheme: str


class _Method(_Part):
    method: str


class _Training(_Part):
    batch_size: int | None = None
    local_steps: int | None = None
    learning_rate: float | None = None


class _Config(_Part):
    model: _Model
    task: _Task
    partition: _Scheme
    method: _Method
    training: _Training = _Training()


class _Memory(_Part):
    peak_memory_bytes: int | None
    parameter_bytes: int | None
    gradient_bytes: int | None
    optimizer_bytes: int | None
    method_bytes: int | None = 0  # what a method holds itself; older records do not have it
    activation_bytes: int | None


class _Provenance(_Part):
    commit: str
    dirty: bool
    data_sha256: str
    partition_sha256: str
    model_sha256: str
    payload_sha256: str | None = None
    code_sha256: str | None = None
    config_sha256: str | None = None


class _Round(_Part):
    round: int
    validation: dict[str, float] | None = None
    validation_score: float | None = None
    train_loss: float | None = None
    upload_bytes: int
    download_bytes: int
    flops: int
    seconds: dict[str, float] = {}
    clients: list[int] = []
    dropped: list[int] = []
    payloads: list[tuple[int, int, int]] = []  # client, bytes down, bytes up


class _Record(_Part):
    record: Literal[1]  # RECORD_VERSION
    study: str
    task: str
    partition: str
    method: str
    seed: int
    status: Literal["finished"]
    config: _Config
    metric: str
    greater_is_better: bool
    test: dict[str, float]
    test_score: float
    validation_score: float
    baseline_validation: dict[str, float] = {}
    rounds: list[_Round] = Field(min_length=1)
    clients: int
    examples: dict[str, int] = {}
    upload_bytes: int
    download_bytes: int
    broadcast_bytes: int
    flops: int
    queries: int = 0
    memory: _Memory | None
    memory_by_block: dict[str, _Memory] = {}
    resident_set_bytes: int | None = None
    cuda_peak_bytes: int | None = None
    train_seconds: float
    wall_seconds: float
    partition_skew: dict[str, float] = {}
    provenance: _Provenance
    extra: dict[str, Any] = {}


_HASHED = ("data", "partition", "model", "payload", "code", "config")
_TEXT, _INTEGER, _NUMBER, _YES_NO = pyarrow.string(), pyarrow.int64(), pyarrow.float64(), pyarrow.bool_()
# FLOPs are floating point numbers: a long run of a large model has more of them than an int64 can count.
_RUN_SCHEMA = {
    **dict.fromkeys(["study", "task", "partition", "method"], _TEXT),
    "seed": _INTEGER,
    **dict.fromkeys(["model", "task_name", "scheme", "method_name", "metric"], _TEXT),
    "greater_is_better": _YES_NO,
    **dict.fromkeys(["test_score", "validation_score", "baseline_score"], _NUMBER),
    **dict.fromkeys(["rounds", "clients", "batch_size", "local_steps"], _INTEGER),
    "learning_rate": _NUMBER,
    "test_examples": _INTEGER,
    **dict.fromkeys(["upload_bytes", "download_bytes", "broadcast_bytes", *MEMORY_COLUMNS], _INTEGER),
    **dict.fromkeys(["resident_set_bytes", "cuda_peak_bytes", "queries"], _INTEGER),
    **dict.fromkeys(
        [
            "flops",
            "train_seconds",
            "server_seconds",
            "wall_seconds",
            "label_divergence",
            "size_gini",
            "largest_client_share",
        ],
        _NUMBER,
    ),
    "memory_by_block": pyarrow.list_(
        pyarrow.struct({"block": _TEXT, **dict.fromkeys(MEMORY_COLUMNS, _INTEGER)})
    ),
    "commit": _TEXT,
    "dirty": _YES_NO,
    **dict.fromkeys([f"{part}_sha256" for part in _HASHED], _TEXT),
}
_ROUND_SCHEMA = pyarrow.schema(
    {
        **dict.fromkeys(["study", "task", "partition", "method"], pyarrow.dictionary(pyarrow.int32(), _TEXT)),
        **dict.fromkeys(["seed", "round"], _INTEGER),
        **dict.fromkeys(["validation_score", "validation_loss", "train_loss"], _NUMBER),
        **dict.fromkeys(["upload_bytes", "download_bytes"], _INTEGER),
        **dict.fromkeys(["largest_upload_bytes", "largest_download_bytes"], _INTEGER),
        "flops": _NUMBER,
        **{f"{name}_seconds": _NUMBER for name in SECONDS},
        **dict.fromkeys(["participants", "dropped"], _INTEGER),
    }
)


def collect(records: Iterable[Path], rounds_path: Path, runs_path: Path) -> int:
    """Compile run records into `runs.parquet` and `rounds.parquet`; return the number of runs.

    Args:
        records: paths of run records, in any order.
        rounds_path: file with one row per run and round; round 0 is the untrained server model. Bytes, FLOPs
            and seconds are cumulated from the first round on, but not the largest payloads of a round.
        runs_path: file with one row per run. Besides the fixed columns there is `test_<metric>` for every
            metric on the test split, and `extra_<name>` for every number that a method reports of its own.

    Raises:
        UserError: a file is not a finished record of this version, two records are of the same run, or two
            cannot be compared since their data, partition or model differ; names the file.
    """
    paths = sorted({Path(path) for path in records}, key=_natural_order)
    if not paths:
        raise UserError("there are no run records to compile")
    runs = []
    origins: dict[tuple, tuple[str, Path]] = {}
    sink = pyarrow.BufferOutputStream()
    with pyarrow.parquet.ParquetWriter(sink, _ROUND_SCHEMA, compression="zstd") as writer:
        rows: dict[str, list] = {name: [] for name in _ROUND_SCHEMA.names}
        for path in paths:
            record = read(path)
            _same_origin(record, path, origins)
            runs.append(_run_row(record))
            _add_rounds(rows, record)
            if len(rows["round"]) >= ROWS_IN_MEMORY:
                writer.write_table(pyarrow.table(rows, schema=_ROUND_SCHEMA))
                rows = {name: [] for name in _ROUND_SCHEMA.names}
        if rows["round"]:
            writer.write_table(pyarrow.table(rows, schema=_ROUND_SCHEMA))
    write_atomically(Path(rounds_path), sink.getvalue())

    more = sorted({name for row in runs for name in row} - set(_RUN_SCHEMA))
    schema = pyarrow.schema(_RUN_SCHEMA | dict.fromkeys(more, _NUMBER))
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(runs, schema=schema), sink, compression="zstd")
    write_atomically(Path(runs_path), sink.getvalue())
    return len(runs)


def read(path: Path) -> _Record:
    """Read what tables and figures need of one run record.

    Raises:
        UserError: the file is absent, cut off, of another version, or lacks a value.
    """
    try:
        return _Record.model_validate_json(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        if place == "record":
            found = "no version" if first["type"] == "missing" else f"version {first['input']!r}"
            reason = f"record: {found}, but this program reads version {RECORD_VERSION}"
        elif first["type"] == "json_invalid":
            reason = f"not a whole JSON file ({first['msg']})"
        else:
            reason = f"{place or 'the file'}: {first['msg']}"
        raise UserError(f"{path}: not a run record: {reason}; delete it and run it again") from None


def _natural_order(path: Path) -> list:
    """Order paths by task, partition, method and seed, with seed10 after seed9."""
    words = re.split(r"(\d+)", "/".join(path.parts[-4:]))
    return [(int(word), "") if word.isdigit() else (-1, word) for word in words] + [(-2, str(path))]


def _same_origin(record: _Record, path: Path, origins: dict) -> None:
    """Refuse two records of one run, and runs that would be compared although their data or models differ."""
    source = record.provenance
    run = (record.study, record.task, record.partition, record.method, record.seed)
    if (run, "run") in origins:
        raise UserError(f"{path}: the same run as {origins[run, 'run'][1]}; delete one of the two")
    origins[run, "run"] = ("", path)
    if record.study != origins.setdefault((), (record.study, path))[0]:
        raise UserError(f"{path}: of study {record.study}, but {origins[()][1]} is of {origins[()][0]}")
    for name, place, value in [
        ("data", (record.task,), source.data_sha256),
        ("model", (record.task,), record.config.model.source),
        # The new head's values come from the seed.
        ("set of weights", (record.task, record.seed), source.model_sha256),
        ("partition", (record.task, record.partition, record.seed), source.partition_sha256),
    ]:
        known, other = origins.setdefault((name, *place), (value, path))
        if known != value:
            raise UserError(
                f"{path}: made with another {name} than {other} ({value[:60]} and {known[:60]}), so the two "
                "cannot be compared; delete the outdated one and run it again"
            )


def _run_row(record: _Record) -> dict[str, Any]:
    blocks = sorted(record.memory_by_block.items(), key=lambda item: _natural_order(Path(item[0])))
    return {
        **{name: getattr(record, name) for name in _RUN_SCHEMA if name in _Record.model_fields},
        "model": record.config.model.source,
        "task_name": record.config.task.task,
        "scheme": record.config.partition.scheme,
        "method_name": record.config.method.method,
        "baseline_score": record.baseline_validation.get(record.metric),
        "rounds": record.rounds[-1].round,
        "batch_size": record.config.training.batch_size,
        "local_steps": record.config.training.local_steps,
        "learning_rate": record.config.training.learning_rate,
        "test_examples": record.examples.get("test"),
        "flops": float(record.flops),
        "server_seconds": sum(
            entry.seconds.get(name, 0.0) for entry in record.rounds for name in ("prune", "merge")
        ),
        **(record.memory.model_dump() if record.memory else dict.fromkeys(MEMORY_COLUMNS)),
        "memory_by_block": [{"block": name, **memory.model_dump()} for name, memory in blocks],
        "label_divergence": record.partition_skew.get("label_divergence"),
        "size_gini": record.partition_skew.get("size_gini"),
        "largest_client_share": _largest_share(record),
        **record.provenance.model_dump(),
        **{f"test_{name}": value for name, value in record.test.items()},
        **{
            f"extra_{name}": float(value)
            for name, value in record.extra.items()
            if isinstance(value, int | float)
        },
    }


def _largest_share(record: _Record) -> float | None:
    """Return the share of the training examples that the partition's largest client holds."""
    largest, examples = record.partition_skew.get("largest_client"), record.examples.get("train")
    return largest / examples if largest and examples else None


def _add_rounds(rows: dict[str, list], record: _Record) -> None:
    """Append the record's rounds to the columns, beginning with round 0, the untrained model."""
    count = len(record.rounds) + 1
    for name in KEYS:
        rows[name].extend([getattr(record, name)] * count)
    rows["round"].append(0)
    rows["validation_score"].append(record.baseline_validation.get(record.metric))
    rows["validation_loss"].append(record.baseline_validation.get("loss"))
    rows["train_loss"].append(None)
    costs = ["upload_bytes", "download_bytes", "flops", *(f"{name}_seconds" for name in SECONDS)]
    largest = ["largest_download_bytes", "largest_upload_bytes"]
    for name in (*costs, *largest, "participants", "dropped"):
        rows[name].append(0)
    sums: dict[str, float] = dict.fromkeys(costs, 0)
    for entry in record.rounds:
        rows["round"].append(entry.round)
        rows["validation_score"].append(entry.validation_score)
        rows["validation_loss"].append((entry.validation or {}).get("loss"))
        rows["train_loss"].append(entry.train_loss)
        sums["upload_bytes"] += entry.upload_bytes
        sums["download_bytes"] += entry.download_bytes
        sums["flops"] += entry.flops
        for name in SECONDS:
            sums[f"{name}_seconds"] += entry.seconds.get(name, 0.0)
        for name, value in sums.items():
            rows[name].append(value)
        for place, name in enumerate(largest, start=1):
            rows[name].append(max((row[place] for row in entry.payloads), default=None))
        rows["participants"].append(len(entry.clients))
        rows["dropped"].append(len(entry.dropped))


def load_runs(path: Path) -> pandas.DataFrame:
    """Return `runs.parquet` as a frame; raise UserError if it is absent or of another layout."""
    return _load(path, _RUN_SCHEMA)


def load_rounds(path: Path) -> pandas.DataFrame:
    """Return `rounds.parquet` as a frame; raise UserError if it is absent or of another layout."""
    return _load(path, _ROUND_SCHEMA.names)


def _load(path: Path, columns: Iterable[str]) -> pandas.DataFrame:
    try:
        frame = pyarrow.parquet.read_table(path).to_pandas()
    except (OSError, pyarrow.ArrowInvalid):
        raise UserError(f"{path}: not a parquet file; make it again with `collect`") from None
    absent = [name for name in columns if name not in frame]
    if absent:
        raise UserError(f"{path}: lacks the column {absent[0]}; make it again with `collect`")
    return frame
