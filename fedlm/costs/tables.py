"""Tables of predicted costs: bytes, memory and FLOPs of a turn and of a run, by method and model."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy
import pandas
from tabulate import tabulate

from fedlm.base.errors import UserError
from fedlm.costs.cases import Case
from fedlm.costs.prediction import Costs
from fedlm.measure.memory import KINDS
from fedlm.models.catalogue import CATALOGUE
from fedlm.results.tables import write
from fedlm.results.typeset import WIDTH, Table, significant

DEVICES = (4, 8, 16, 24, 80)  # GB, 1e9 bytes
LINES = (5, 50, 1000)  # Mbit/s


def frames(
    cases: Sequence[Case], costs: Sequence[Costs | UserError]
) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Return `frame` and `block_frame` of the cases that have costs; both are empty where none has."""
    good = [(case, found) for case, found in zip(cases, costs, strict=True) if isinstance(found, Costs)]
    asked, found = [case for case, _ in good], [one for _, one in good]
    return frame(asked, found), block_frame(asked, found)


def frame(cases: Sequence[Case], costs: Sequence[Costs]) -> pandas.DataFrame:
    """Return one row per case: its settings, and its costs in bytes and FLOPs."""
    rows = []
    for case, found in zip(cases, costs, strict=True):
        training, turns = case.training, max(1, found.turns)
        rows.append(
            {
                "task": case.task,
                "model": case.model,
                "method": case.method,
                "title": case.title,
                "kind": case.kind,
                "batch_size": training.batch_size,
                "length": case.length,
                "accumulation": training.accumulation,
                "steps": case.steps,
                "optimizer": training.optimizer,
                "weights": case.config.weights,
                "gradient_checkpointing": case.config.gradient_checkpointing,
                "autocast": training.autocast or "",
                "payload": case.settings.payload,
                "clients": case.federation.clients,
                "rounds": case.federation.rounds,
                "turns": found.turns,
                "parameters": found.parameters,
                "exchanged_parameters": found.exchanged,
                "broadcast_bytes": found.broadcast_bytes,
                "turn_download_bytes": found.download_bytes / turns,
                "turn_upload_bytes": found.upload_bytes / max(1, found.answered),
                "download_bytes": found.download_bytes,
                "upload_bytes": found.upload_bytes,
                "turn_flops": found.flops / max(1, found.answered),
                "flops": found.flops,
                "turn_queries": found.queries / max(1, found.answered),
                "peak_memory_bytes": found.peak.peak,
                **{f"{kind}_bytes": asdict(found.peak)[kind] for kind in KINDS},
                "least_peak_bytes": min(memory.peak for memory in found.memory.values()),
            }
        )
    return pandas.DataFrame(rows)


def block_frame(cases: Sequence[Case], costs: Sequence[Costs]) -> pandas.DataFrame:
    """Return one row per case and trained block; methods without blocks have the block "all"."""
    return pandas.DataFrame(
        {
            "task": case.task,
            "model": case.model,
            "method": case.method,
            "title": case.title,
            "block": label.removeprefix("block "),
            "interpolated": label in found.interpolated,
            "alike": found.alike[label],
            "peak_memory_bytes": memory.peak,
            **{f"{kind}_bytes": asdict(memory)[kind] for kind in KINDS},
        }
        for case, found in zip(cases, costs, strict=True)
        for label, memory in found.memory.items()
    )


def display_name(row: pandas.Series) -> str:
    """Return the model's name in tables, with the task where a study has several."""
    entry = CATALOGUE.get(row["model"])
    model = entry.title.split(",")[0] if entry else Path(row["model"]).name
    return f"{row['task']}, {model}" if row["task"] else model


def _cells(rows: pandas.DataFrame, columns: dict[str, Callable[[pandas.Series], str]]) -> pandas.DataFrame:
    lead = {"Model": [display_name(row) for _, row in rows.iterrows()], "Method": list(rows["title"])}
    return pandas.DataFrame(
        lead | {name: [text(row) for _, row in rows.iterrows()] for name, text in columns.items()}
    )


def _least(rows: pandas.DataFrame, columns: dict[str, str], cells: pandas.DataFrame) -> numpy.ndarray:
    """Mark the smallest value of each model, where values differ."""
    best = numpy.zeros(cells.shape, dtype=bool)
    for heading, column in columns.items():
        groups = rows.groupby(["task", "model"], sort=False)[column]
        several = groups.transform("nunique") > 1
        best[:, cells.columns.get_loc(heading)] = several & (rows[column] == groups.transform("min"))
    return best


def _shape_note(rows: pandas.DataFrame) -> str:
    def listed(column: str) -> str:
        return ", ".join(map(str, rows[column].unique()))

    def models(some: pandas.DataFrame) -> str:
        return ", ".join(dict.fromkeys(display_name(row) for _, row in some.iterrows()))

    shapes = "; ".join(
        f"{batch} x {length} tokens ({models(some)})"
        for (batch, length), some in rows.groupby(["batch_size", "length"], sort=False)
    )
    extras = []
    if rows["gradient_checkpointing"].any():
        extras.append("gradient checkpointing")
    if (rows["accumulation"] > 1).any():
        extras.append(f"gradients accumulated over {listed('accumulation')} passes")
    extra = f" With {' and '.join(extras)}." if extras else ""
    return (
        f"Batch: {shapes}. {listed('steps')} optimizer steps per turn, {listed('optimizer')}, weights in "
        f"{listed('weights')}, payloads in {listed('payload')}; {listed('clients')} clients, "
        f"{listed('rounds')} rounds.{extra}"
    )


NOTE = (
    "Predicted by running the method's own turns on tensors without values. GiB is 2**30 bytes, MB is "
    "1e6 bytes, TFLOP is 1e12 operations."
)


def make(rows: pandas.DataFrame, blocks: pandas.DataFrame, destination: Path) -> list[Path]:
    """Write all tables of the costs as csv, Markdown and LaTeX; return their paths."""
    tables = [costs_table(rows), fits_table(rows), traffic_table(rows), block_table(rows, blocks)]
    return write(tables, destination)


def _per(column: str, unit: float) -> Callable[[pandas.Series], str]:
    return lambda row: significant(row[column] / unit)


_KINDS = {
    "Parameters": _per("parameter_bytes", 2**30),
    "Gradients": _per("gradient_bytes", 2**30),
    "Optimizer": _per("optimizer_bytes", 2**30),
    "Method state": _per("method_bytes", 2**30),
    "Activations": _per("activation_bytes", 2**30),
}


def costs_table(rows: pandas.DataFrame) -> Table:
    """Peak memory by kind, traffic and compute of a turn, traffic of a run."""
    cells = _cells(
        rows,
        {
            "Peak memory (GiB)": _per("peak_memory_bytes", 2**30),
            "Least block (GiB)": _per("least_peak_bytes", 2**30),
            **_KINDS,
            "Down a turn (MB)": _per("turn_download_bytes", 1e6),
            "Up a turn (MB)": _per("turn_upload_bytes", 1e6),
            "Down a run (GB)": _per("download_bytes", 1e9),
            "Up a run (GB)": _per("upload_bytes", 1e9),
            "Compute a turn (TFLOP)": _per("turn_flops", 1e12),
        },
    )
    marked = {
        "Peak memory (GiB)": "peak_memory_bytes",
        "Down a turn (MB)": "turn_download_bytes",
        "Up a turn (MB)": "turn_upload_bytes",
        "Compute a turn (TFLOP)": "turn_flops",
    }
    notes = [
        "Peak memory is that of the most expensive block, split by kind; the least block is the cheapest. "
        f"Bold: smallest value of each model. {NOTE}",
        _shape_note(rows),
    ]
    return Table("costs", "What a client's turn costs", rows, cells, _least(rows, marked, cells), 1, notes)


def fits_table(rows: pandas.DataFrame) -> Table:
    """Which methods fit in the memory of which device."""
    fits = rows[["task", "model", "method", "title", "peak_memory_bytes", "least_peak_bytes"]].copy()
    for size in DEVICES:
        fits[f"fits_{size}_gb"] = fits["peak_memory_bytes"] <= size * 1e9
        fits[f"some_block_fits_{size}_gb"] = fits["least_peak_bytes"] <= size * 1e9

    def text(row: pandas.Series, size: int) -> str:
        if row[f"fits_{size}_gb"]:
            return "yes"
        return "some blocks" if row[f"some_block_fits_{size}_gb"] else "–"

    cells = _cells(fits, {f"{size} GB": partial(text, size=size) for size in DEVICES})
    notes = [
        "Peak of live tensors in a client's turn, with 1 GB = 1e9 bytes; a GPU's context, its allocator's "
        "rounding and workspaces come on top. Some blocks: a turn fits if it trains one of the later blocks.",
        _shape_note(rows),
    ]
    return Table("fits", "What fits in which memory", fits, cells, _nothing(cells), 1, notes)


def traffic_table(rows: pandas.DataFrame) -> Table:
    """How long the traffic of a turn takes at several line rates."""
    columns = ["task", "model", "method", "title", "turn_download_bytes", "turn_upload_bytes"]
    traffic = rows[[*columns, "broadcast_bytes"]].copy()
    both = traffic["turn_download_bytes"] + traffic["turn_upload_bytes"]
    for rate in LINES:
        traffic[f"seconds_at_{rate}_mbit"] = both * 8 / (rate * 1e6)

    def took(row: pandas.Series, rate: int) -> str:
        return duration(row[f"seconds_at_{rate}_mbit"])

    cells = _cells(
        traffic,
        {
            "Down a turn (MB)": _per("turn_download_bytes", 1e6),
            "Up a turn (MB)": _per("turn_upload_bytes", 1e6),
            **{f"{rate} Mbit/s": partial(took, rate=rate) for rate in LINES},
        },
    )
    notes = [
        "Download and upload of one turn, one after the other, at the line's full rate; without the first "
        "broadcast of the pretrained model.",
        _shape_note(rows),
    ]
    caption = "How long the traffic of a client's turn takes"
    return Table("traffic_time", caption, traffic, cells, _nothing(cells), 1, notes)


def block_table(rows: pandas.DataFrame, blocks: pandas.DataFrame) -> Table:
    """Peak memory of a turn by the block that it trains."""
    blocks = blocks[blocks.groupby(["task", "model", "method"])["block"].transform("size") > 1]
    cells = _cells(
        blocks,
        {
            "Block": lambda row: str(row["block"]),
            "Peak memory (GiB)": _per("peak_memory_bytes", 2**30),
            **_KINDS,
            "Measured": lambda row: "interpolated" if row["interpolated"] else "yes",
        },
    )
    notes = [
        "All in GiB (2**30 bytes). Interpolated: between the blocks that were measured.",
        _shape_note(rows),
    ]
    caption = "Memory of a client's turn by the block that it trains"
    return Table("memory_by_block", caption, blocks, cells, _nothing(cells), 2, notes)


def _nothing(cells: pandas.DataFrame) -> numpy.ndarray:
    return numpy.zeros(cells.shape, dtype=bool)


def duration(seconds: float) -> str:
    """Write a duration in a suitable unit: 12 s, 3.4 min, 2.1 h, 1.3 days."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{significant(seconds / unit, 2)} {name}"
    return f"{significant(seconds / 86_400, 2)} days"


def terminal(rows: pandas.DataFrame) -> str:
    """Return the costs for a terminal."""
    shown = costs_table(rows)
    columns = [name for name in shown.cells.columns if "a run" not in name]
    cells = shown.cells[columns].copy()
    cells.columns = [column.replace(" (", "\n(").replace(" a turn", "\na turn") for column in columns]
    return typed(cells, [note.replace(" Bold: smallest value of each model.", "") for note in shown.notes])


def typed(cells: pandas.DataFrame, notes: Sequence[str]) -> str:
    """Return cells that begin with the columns Model and Method, and notes below them, for a terminal."""
    cells = cells.copy()
    cells["Model"] = cells["Model"].where(cells["Model"] != cells["Model"].shift(), "")
    align = ["left", "left"] + ["right"] * (len(cells.columns) - 2)
    body = tabulate(
        cells, list(cells.columns), "simple", colalign=align, showindex=False, disable_numparse=True
    )
    return "\n".join([body, "", *(textwrap.fill(note, WIDTH) for note in notes)])
