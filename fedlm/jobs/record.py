"""Run records: settings, results, costs and provenance."""

import json
import resource
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlm.base.files import sha256, write_atomically
from fedlm.jobs import provenance
from fedlm.study.study import RunConfig

if TYPE_CHECKING:  # importing them takes seconds and 200 MB, and writing a record does not need them
    from fedlm.federation.loop import Federation
    from fedlm.measure.memory import Memory

VERSION = 1


def build(
    config: RunConfig,
    federation: "Federation",
    source: dict[str, object],
    hashes: dict[str, str],
    skew: dict[str, float],
    wall: float,
) -> dict[str, Any]:
    """Return the record of a finished run; bytes, seconds and FLOPs in base units.

    `source` is what `provenance.source` found before the run.
    """
    from fedlm.exchange import payload

    data, ledger, rounds = federation.data, federation.ledger, federation.rounds
    peak = federation.instruments.peak()
    final = payload.encode({name: federation.server.tensors[name] for name in federation.method.exchanged})
    return {
        "record": VERSION,
        "status": "finished",
        **_asked(config),
        "metric": data.metric,
        "greater_is_better": data.greater_is_better,
        "test": federation.test,
        "test_score": federation.test and federation.test[data.metric],
        "validation_score": rounds[-1]["validation_score"],
        "baseline_validation": federation.baseline,
        "rounds": rounds,
        "clients": len(federation.parts),
        "examples": {name: len(rows) for name, rows in federation.split._asdict().items()},
        "classes": data.class_counts(federation.split),
        "upload_bytes": ledger.upload,
        "download_bytes": ledger.download,
        "broadcast_bytes": ledger.broadcast,
        "flops": federation.flops,
        "queries": federation.queries,
        "memory": _memory(peak) if peak else None,
        "memory_by_block": {
            label.removeprefix("block "): _memory(found)
            for label, found in sorted(federation.instruments.memory.items(), key=_block_number)
            if label.startswith("block ")
        },
        "resident_set_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "cuda_peak_bytes": federation.cuda_peak or None,
        "train_seconds": sum(row["seconds"]["train"] for row in rounds),
        "wall_seconds": wall,
        "partition_skew": skew,
        "provenance": {
            **_origin(source, hashes),
            "payload_sha256": final.sha256(),
        },
        "extra": {**federation.method.extra(federation.server), **federation.further},
    }


def failed(
    config: RunConfig, error: Exception, source: dict[str, object], hashes: dict[str, str]
) -> dict[str, Any]:
    """Return the record of a trial that diverged: what was asked, the reason, and where it comes from."""
    return {
        "record": VERSION,
        "status": "failed",
        "error": str(error),
        **_asked(config),
        "provenance": _origin(source, hashes),
    }


def _asked(config: RunConfig) -> dict[str, Any]:
    """Return the labels and settings; for a trial also its number, and for a tuned run what was searched."""
    return {
        "study": config.study,
        "task": config.task_label,
        "partition": config.partition_label,
        "method": config.method_label,
        "seed": config.seed,
        **({} if config.trial is None else {"trial": config.trial}),
        **({"searched": config.searched} if config.searched else {}),
        "config": config.resolved(),
        "plugins": config.plugins(),
    }


def _origin(source: dict[str, object], hashes: dict[str, str]) -> dict[str, Any]:
    return {**source, "versions": provenance.versions(), "machine": provenance.machine(), **hashes}


def _memory(memory: "Memory") -> dict[str, int]:
    values = asdict(memory)
    return {"peak_memory_bytes": values.pop("peak")} | {f"{kind}_bytes": n for kind, n in values.items()}


def _block_number(item: tuple[str, Any]) -> tuple[int, str]:
    first = item[0].removeprefix("block ").partition("+")[0]
    return (int(first), item[0]) if first.isdigit() else (-1, item[0])


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record atomically, with the hash of its content."""
    record = {**record, "content_sha256": content_hash(record)}
    write_atomically(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def content_hash(record: dict[str, Any]) -> str:
    """Return the SHA-256 of a record's content, by which a later change of a value is noticed."""
    content = {key: value for key, value in record.items() if key != "content_sha256"}
    return sha256(json.dumps(content, sort_keys=True).encode())
