"""From the records of a tuning's trials to one table, one row per trial."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from fedlm.base.errors import UserError
from fedlm.base.files import write_atomically

_TEXT, _INTEGER, _NUMBER = pyarrow.string(), pyarrow.int64(), pyarrow.float64()
_SCHEMA = pyarrow.schema(
    {
        **dict.fromkeys(["study", "task", "partition", "method"], _TEXT),
        **dict.fromkeys(["seed", "trial"], _INTEGER),
        **dict.fromkeys(["status", "error", "searched", "metric"], _TEXT),
        "greater_is_better": pyarrow.bool_(),
        **dict.fromkeys(["validation_score", "validation_loss", "train_seconds", "flops"], _NUMBER),
        **dict.fromkeys(["commit", "code_sha256"], _TEXT),
    }
)


def collect(records: Iterable[Path], destination: Path) -> int:
    """Compile the records of trials into `trials.parquet`; return their number.

    `status` is "finished" or "failed"; a failed trial has an `error` and no scores. `searched` is JSON: the
    value of each searched setting. Raises UserError if a file is not the record of a trial, naming it.
    """
    place = ("task", "partition", "method", "trial")
    rows = sorted(map(_row, records), key=lambda row: [row[name] for name in place])
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=_SCHEMA), sink, compression="zstd")
    write_atomically(destination, sink.getvalue())
    return len(rows)


def _row(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
        finished = record["status"] == "finished"
        row = {
            name: record[name] for name in ("study", "task", "partition", "method", "seed", "trial", "status")
        }
        row |= {"error": record.get("error"), "searched": json.dumps(record["searched"])}
        row |= {name: record["provenance"][name] for name in ("commit", "code_sha256")}
        for name in ("metric", "greater_is_better", "validation_score", "train_seconds", "flops"):
            row[name] = record[name] if finished else None
        row["validation_loss"] = record["rounds"][-1]["validation"]["loss"] if finished else None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not the record of a trial ({reason}); delete it and run it again") from None
    return row
