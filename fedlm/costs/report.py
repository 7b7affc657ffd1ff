"""Tables and figures of foretold costs: any model, any method, a whole study; no data, weights or GPU."""

import json
import math
import os
import textwrap
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pandas
from matplotlib.figure import Figure
from tabulate import tabulate

from fedlm.base.errors import UserError
from fedlm.base.files import write_atomically
from fedlm.costs.prediction import Costs, StatedBatches, predict
from fedlm.federation.method import MethodConfig
from fedlm.federation.settings import Federation, Training
from fedlm.measure.memory import KINDS
from fedlm.models.catalogue import CATALOGUE
from fedlm.models.config import ModelConfig
from fedlm.models.loading import build_config, max_positions
from fedlm.results import drawing
from fedlm.results.tables import WIDTH
from fedlm.results.typeset import Table, significant
from fedlm.study.plugins import discover_methods, discover_tasks
from fedlm.study.study import Study

CORE = ("fedavg", "fedcybgd", "fedlora", "fedprompt")
DEVICES = (4, 8, 16, 24, 80)  # GB, 1e9 bytes
LINES = (5, 50, 1000)  # Mbit/s
TURNS_FOR_A_REQUEST = 200  # enough to meet every block, when only the memory to ask for matters
ENCODERS = ("bert", "roberta")
KINDS_OF_TASK = ("classification", "regression", "causal", "question_answering")


class Case(NamedTuple):
    """One row of the costs: a method on a model, with everything stated that they depend on."""

    task: str  # the label in a study, or ""
    model: str  # what the row is called
    method: str
    title: str
    config: ModelConfig
    name: str  # of the method's file
    settings: MethodConfig
    kind: str
    num_labels: int
    length: int
    steps: int  # optimizer steps of a turn
    federation: Federation
    training: Training
    participants: float = 1.0  # of the study, for one here: where only a part of the federation is rehearsed

    def key(self) -> str:
        """Return a text that is equal for cases of equal costs."""
        values = self._asdict() | dict.fromkeys(("task", "model", "method", "title"))
        for name in ("config", "settings", "federation", "training"):
            values[name] = values[name].model_dump(mode="json")
        return json.dumps(values, sort_keys=True)


def natural_kind(model: ModelConfig) -> str:
    """Return what a model is fine-tuned for if nothing is said: classification, or causal for decoders."""
    shape = build_config(model, "classification", 2).model_type
    return "classification" if shape in ENCODERS else "causal"


def stated(
    model: str,
    method: str,
    *,
    kind: str | None = None,
    batch_size: int | None = None,
    length: int | None = None,
    steps: int = 10,
    federation: Federation | None = None,
    training: dict[str, Any] | None = None,
    loading: dict[str, Any] | None = None,
    payload: str = "float32",
) -> Case:
    """Return the case of one method with its default settings on one model.

    The batch is by default 64 texts of 128 tokens for encoders and 1 of 512 for decoders. `loading` are
    settings of the model beside its source.

    Raises UserError for a method or model that does not exist, or a length beyond the model's positions.
    """
    methods = discover_methods()
    if method not in methods:
        raise UserError(f"--method: {method!r}; allowed: {', '.join(sorted(methods))}")
    if kind is not None and kind not in KINDS_OF_TASK:
        raise UserError(f"--kind: {kind!r}; allowed: {', '.join(KINDS_OF_TASK)}")
    config = ModelConfig(source=model, **(loading or {}))
    kind = kind or natural_kind(config)
    encodes = natural_kind(config) == "classification"
    positions = max_positions(config)
    length = length or min(128 if encodes else 512, positions or 512)
    if positions is not None and length > positions:
        raise UserError(f"--length: {length}; allowed: at most {positions}, the positions of {model}")
    return Case(
        task="",
        model=model,
        method=method,
        title=methods[method].title,
        config=config,
        name=method,
        settings=methods[method].Config(payload=payload),
        kind=kind,
        num_labels=1 if kind in ("regression", "causal") else 2,
        length=length,
        steps=steps,
        federation=federation or Federation(clients=32, rounds=3),
        training=Training(batch_size=batch_size or (64 if encodes else 1), **(training or {})),
    )


def of_study(study: Study, steps: int = 10, for_requests: bool = False) -> list[Case]:
    """Return a case for each task and method of a study.

    A turn has the study's local_steps, or else `steps`, since how many examples there are is not known.
    `for_requests` leaves out rounds that would only count more bytes.
    """
    tasks, cases = discover_tasks(), []
    pairs = dict.fromkeys((run.task, run.partition, run.method) for run in study.runs())
    first = {(task, method): partition for task, partition, method in reversed(pairs)}
    for task, method in dict.fromkeys((task, method) for task, _, method in pairs):
        run = study.run(task, first[task, method], method, study.seeds[0])
        kind = tasks[run.task](run.task_settings)
        federation = run.federation
        participants = 1.0
        if for_requests:
            share = min(federation.participation, TURNS_FOR_A_REQUEST / federation.clients)
            a_round = max(1, round(share * federation.clients))
            rounds = min(federation.rounds, -(-TURNS_FOR_A_REQUEST // a_round))
            turns = federation.participation * federation.clients * federation.rounds
            participants = min(federation.clients, turns) / min(federation.clients, a_round * rounds)
            federation = federation.model_copy(update={"participation": share, "rounds": rounds})
        labels = kind.count_labels() if kind.kind == "classification" else None
        cases.append(
            Case(
                task=task,
                model=run.model.source,
                method=method,
                title=study.methods[method].title,
                config=run.model,
                name=run.method,
                settings=run.method_settings,
                kind=kind.kind,
                num_labels=labels or (2 if kind.kind in ("classification", "question_answering") else 1),
                length=run.task_settings.max_length,
                steps=run.training.local_steps or (1 if for_requests else steps),
                federation=federation,
                training=run.training,
                participants=max(1.0, participants),
            )
        )
    return cases


def cost(case: Case, positions: int | None) -> Costs:
    """Return the costs of a case; `positions` as in `costs.predict`."""
    # Transformers and peft speak to their own developers.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    method = discover_methods()[case.name](case.settings, case.federation.clients, 0)
    shape = build_config(case.config, case.kind, case.num_labels)
    most = max_positions(case.config)
    room = case.length if most is None else min(case.length, most - method.virtual_tokens())
    examples = case.training.batch_size * case.training.accumulation * case.steps
    training = case.training.model_copy(update={"local_epochs": 1, "local_steps": None})
    return predict(
        method,
        case.config,
        case.kind,
        case.num_labels,
        [numpy.arange(examples)] * case.federation.clients,
        StatedBatches(case.kind, room, getattr(shape, "type_vocab_size", 1) > 1),
        case.federation,
        training,
        positions,
    )


def cost_all(
    cases: Sequence[Case],
    positions: int | None = None,
    processes: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Costs | UserError]:
    """Return the costs of each case, or why there are none; cases of equal costs are done once.

    `processes` work at the same time, by default one a processor core.
    """
    distinct = {case.key(): case for case in cases}
    # The largest first, so that none is left alone at the end.
    order = sorted(distinct, key=lambda key: -_weight(distinct[key]))
    found: dict[str, Costs | UserError] = {}
    processes = min(processes or len(os.sched_getaffinity(0)), len(order))
    with ProcessPoolExecutor(processes, initializer=_one_thread) as pool:
        futures = {pool.submit(_guarded, distinct[key], positions): key for key in order}
        for number, future in enumerate(as_completed(futures), 1):
            case, found[futures[future]] = distinct[futures[future]], future.result()
            say(f"{number} of {len(futures)}: {case.title} on {case.model}")
    return [found[case.key()] for case in cases]


def _guarded(case: Case, positions: int | None) -> Costs | UserError:
    try:
        return cost(case, positions)
    except UserError as error:
        return error


def _weight(case: Case) -> int:
    shape = build_config(case.config, case.kind, case.num_labels)
    return shape.num_hidden_layers * (4 if case.name == "fedcybgd" else 1)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def requests(cases: Sequence[Case], costs: Sequence[Costs | UserError]) -> dict[str, dict[str, int]]:
    """Return what the jobs of a study need, by "task/method", in bytes."""
    return {
        f"{case.task}/{case.method}": {
            "peak_memory_bytes": found.peak.peak,
            "parameter_bytes": found.peak.parameter,
            "exchanged_bytes": found.exchanged_bytes,
            "kept_bytes": round(found.kept_bytes * case.participants),
        }
        for case, found in zip(cases, costs, strict=True)
        if isinstance(found, Costs)
    }


# Tables


def frame(cases: Sequence[Case], costs: Sequence[Costs]) -> pandas.DataFrame:
    """Return one row a case: what was stated, and its costs in bytes and FLOPs."""
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
                "peak_memory_bytes": found.peak.peak,
                **{f"{kind}_bytes": asdict(found.peak)[kind] for kind in KINDS},
                "least_peak_bytes": min(memory.peak for memory in found.memory.values()),
            }
        )
    return pandas.DataFrame(rows)


def block_frame(cases: Sequence[Case], costs: Sequence[Costs]) -> pandas.DataFrame:
    """Return one row a case and block that some turn trains; methods without blocks have the block "all"."""
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


def _name(row: pandas.Series) -> str:
    """Return what a table calls the model, and the task where a study has several."""
    entry = CATALOGUE.get(row["model"])
    model = entry.title.split(",")[0] if entry else Path(row["model"]).name
    return f"{row['task']}, {model}" if row["task"] else model


def _cells(rows: pandas.DataFrame, columns: dict[str, Callable[[pandas.Series], str]]) -> pandas.DataFrame:
    lead = {"Model": [_name(row) for _, row in rows.iterrows()], "Method": list(rows["title"])}
    return pandas.DataFrame(
        lead | {name: [text(row) for _, row in rows.iterrows()] for name, text in columns.items()}
    )


def _least(rows: pandas.DataFrame, columns: dict[str, str], cells: pandas.DataFrame) -> numpy.ndarray:
    """Mark the least of each model, where they differ."""
    best = numpy.zeros(cells.shape, dtype=bool)
    for heading, column in columns.items():
        groups = rows.groupby(["task", "model"], sort=False)[column]
        several = groups.transform("nunique") > 1
        best[:, cells.columns.get_loc(heading)] = several & (rows[column] == groups.transform("min"))
    return best


def _shape_note(rows: pandas.DataFrame) -> str:
    def told(column: str) -> str:
        return ", ".join(map(str, rows[column].unique()))

    shapes = "; ".join(
        f"{batch} x {length} tokens ({', '.join(dict.fromkeys(_name(row) for _, row in some.iterrows()))})"
        for (batch, length), some in rows.groupby(["batch_size", "length"], sort=False)
    )
    levers = []
    if rows["gradient_checkpointing"].any():
        levers.append("gradient checkpointing")
    if (rows["accumulation"] > 1).any():
        levers.append(f"gradients accumulated over {told('accumulation')} passes")
    extra = f" With {' and '.join(levers)}." if levers else ""
    return (
        f"Batch: {shapes}. {told('steps')} optimizer steps a turn, {told('optimizer')}, weights in "
        f"{told('weights')}, payloads in {told('payload')}; {told('clients')} clients, "
        f"{told('rounds')} rounds.{extra}"
    )


NOTE = (
    "Foretold by the method's own turns on tensors without values. GiB is 2**30 bytes, MB is 1e6 bytes, "
    "TFLOP is 1e12 operations."
)


def tables(rows: pandas.DataFrame, blocks: pandas.DataFrame) -> list[Table]:
    """Return all tables of the costs."""
    return [costs_table(rows), fits_table(rows), traffic_table(rows), block_table(rows, blocks)]


def _per(column: str, unit: float) -> Callable[[pandas.Series], str]:
    return lambda row: significant(row[column] / unit)


_KINDS = {
    "Parameters": _per("parameter_bytes", 2**30),
    "Gradients": _per("gradient_bytes", 2**30),
    "Optimizer": _per("optimizer_bytes", 2**30),
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
        f"Bold: least of a model. {NOTE}",
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

    cells = _cells(fits, {f"{size} GB": lambda row, size=size: text(row, size) for size in DEVICES})
    notes = [
        "Peak of live tensors in a client's turn against 1e9 bytes a GB; a GPU's context, its allocator's "
        "rounding and workspaces come on top. Some blocks: a turn fits if it trains one of the later blocks.",
        _shape_note(rows),
    ]
    return Table("fits", "What fits in which memory", fits, cells, _nothing(cells), 1, notes)


def traffic_table(rows: pandas.DataFrame) -> Table:
    """How long the traffic of a turn takes on lines of several rates."""
    columns = ["task", "model", "method", "title", "turn_download_bytes", "turn_upload_bytes"]
    traffic = rows[[*columns, "broadcast_bytes"]].copy()
    both = traffic["turn_download_bytes"] + traffic["turn_upload_bytes"]
    for rate in LINES:
        traffic[f"seconds_at_{rate}_mbit"] = both * 8 / (rate * 1e6)
    cells = _cells(
        traffic,
        {
            "Down a turn (MB)": _per("turn_download_bytes", 1e6),
            "Up a turn (MB)": _per("turn_upload_bytes", 1e6),
            **{
                f"{rate} Mbit/s": lambda row, rate=rate: duration(row[f"seconds_at_{rate}_mbit"])
                for rate in LINES
            },
        },
    )
    notes = [
        "Download and upload of one turn one after another at the line's full rate; without the first "
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
            "Measured": lambda row: "between" if row["interpolated"] else "yes",
        },
    )
    notes = [
        "All in GiB (2**30 bytes). Between: interpolated between blocks that were measured.",
        _shape_note(rows),
    ]
    caption = "Memory of a client's turn by the block that it trains"
    return Table("memory_by_block", caption, blocks, cells, _nothing(cells), 2, notes)


def _nothing(cells: pandas.DataFrame) -> numpy.ndarray:
    return numpy.zeros(cells.shape, dtype=bool)


def duration(seconds: float) -> str:
    """Write a duration with its best unit: 12 s, 3.4 min, 2.1 h, 1.3 days."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{significant(seconds / unit, 2)} {name}"
    return f"{significant(seconds / 86_400, 2)} days"


def terminal(rows: pandas.DataFrame) -> str:
    """Return the costs for a terminal."""
    shown = costs_table(rows)
    columns = [name for name in shown.cells.columns if "a run" not in name]
    cells = shown.cells[columns].copy()
    cells["Model"] = cells["Model"].where(cells["Model"] != cells["Model"].shift(), "")
    cells.columns = [column.replace(" (", "\n(").replace(" a turn", "\na turn") for column in columns]
    align = ["left", "left"] + ["right"] * (len(columns) - 2)
    body = tabulate(
        cells, list(cells.columns), "simple", colalign=align, showindex=False, disable_numparse=True
    )
    notes = [note.replace(" Bold: least of a model.", "") for note in shown.notes]
    return "\n".join([body, "", *(textwrap.fill(note, WIDTH) for note in notes)])


# Figures


def figures(rows: pandas.DataFrame, blocks: pandas.DataFrame, destination: Path) -> list[Path]:
    """Draw memory by method, memory by block and bytes a round; return the paths."""
    look = drawing.styles(rows["method"].unique())
    written = []
    with drawing.settings():
        written += drawing.save_figure(_memory(rows), destination / "memory")
        if "llama2_7b" in set(rows["model"]):
            figure = _one_model(rows, blocks, "llama2_7b")
            written += drawing.save_figure(figure, destination / "memory_llama2_7b")
        written += drawing.save_figure(_by_block(rows, blocks, look), destination / "memory_by_block")
        written += drawing.save_figure(_bytes(rows), destination / "bytes_a_round")
    return written


def _grid(rows: pandas.DataFrame, height: float, **sharing):
    """Yield a figure, and for each model (of a task) its axes and rows."""
    groups = [some for _, some in rows.groupby(["task", "model"], sort=False)]
    columns = min(3, len(groups))
    figure, grid = drawing.panels(-(-len(groups) // columns), columns, height, **sharing)
    for axes in grid.flat[len(groups) :]:
        axes.set_visible(False)
    for axes, some in zip(grid.flat, groups, strict=False):
        axes.set_title(_name(some.iloc[0]), pad=3)
    return figure, list(zip(grid.flat, groups, strict=False)), columns


def _methods_axis(axes, titles: Sequence[str], first: bool) -> None:
    axes.set_yticks(range(len(titles)), titles if first else [""] * len(titles))
    axes.set_ylim(len(titles) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def _memory(rows: pandas.DataFrame) -> Figure:
    """Peak memory of a turn, stacked by kind; of methods with blocks that of the most expensive one."""
    methods = rows["method"].nunique()
    figure, cells, columns = _grid(rows, 0.17 * methods + 0.62)
    for place, (axes, some) in enumerate(cells):
        for bar, (_, row) in enumerate(some.iterrows()):
            drawing.stack(axes, bar, [row[kind] / 2**30 for kind, *_ in drawing.KINDS])
        axes.set_xlim(0, some["peak_memory_bytes"].max() / 2**30 * 1.2)
        axes.set_xlabel("peak memory of a turn (GiB)")
        _methods_axis(axes, list(some["title"]), place % columns == 0)
    drawing.kinds_legend(figure)
    return figure


def _one_model(rows: pandas.DataFrame, blocks: pandas.DataFrame, model: str) -> Figure:
    """Peak memory on one model, with a bar for the first and the last block of methods that have blocks."""
    bars = []
    for _, row in rows[rows["model"] == model].iterrows():
        own = blocks[(blocks["model"] == model) & (blocks["method"] == row["method"])]
        if len(own) == 1:
            bars.append((row["title"], row))
        else:
            ordered = own.sort_values("peak_memory_bytes", ascending=False)
            bars.append((f"{row['title']}, block {ordered.iloc[0]['block']}", ordered.iloc[0]))
            bars.append((f"{row['title']}, block {ordered.iloc[-1]['block']}", ordered.iloc[-1]))
    figure, grid = drawing.panels(1, 1, 0.2 * len(bars) + 0.55)
    axes = grid[0, 0]
    axes.set_title(_name(rows[rows["model"] == model].iloc[0]), pad=3)
    for place, (_, values) in enumerate(bars):
        drawing.stack(axes, place, [values[kind] / 2**30 for kind, *_ in drawing.KINDS])
    axes.set_xlim(0, max(values["peak_memory_bytes"] for _, values in bars) / 2**30 * 1.16)
    axes.set_xlabel("peak memory of a turn (GiB)")
    _methods_axis(axes, [title for title, _ in bars], True)
    drawing.kinds_legend(figure)
    return figure


def _by_block(rows: pandas.DataFrame, blocks: pandas.DataFrame, look: dict[str, drawing.Style]) -> Figure:
    """Peak memory by the position of the trained block; level lines are methods without blocks.

    A block that several layers share stands alone behind the last layer. What lies far above is only named.
    """
    figure, cells, columns = _grid(rows, 1.45)
    for place, (axes, some) in enumerate(cells):
        task, model = some.iloc[0][["task", "model"]]
        own = blocks[(blocks["task"] == task) & (blocks["model"] == model)]
        own = own[own["block"].str.fullmatch(r"\d+|all") & ~own["interpolated"].astype(bool)]
        by_position = own[own["block"] != "all"]["peak_memory_bytes"]
        limit = 1.6 * by_position.max() if len(by_position) else math.inf
        for (method, _), points in own.groupby(["method", "alike"], sort=False):
            style = look[method]
            peaks = points["peak_memory_bytes"] / 2**30
            if points["block"].iloc[0] != "all":
                axes.plot(
                    points["block"].astype(int),
                    peaks,
                    color=style.colour,
                    linestyle=style.line,
                    marker=style.marker,
                    **drawing.edge(style),
                )
            elif points["peak_memory_bytes"].iloc[0] <= limit:
                axes.axhline(peaks.iloc[0], color=style.colour, linestyle=style.line, linewidth=0.9)
            else:
                told = f"{points['title'].iloc[0]}: {significant(peaks.iloc[0])} GiB"
                axes.text(
                    0.98,
                    0.97,
                    told,
                    ha="right",
                    va="top",
                    color=style.colour,
                    transform=axes.transAxes,
                    size=6.5,
                )
        low, high = axes.get_ylim()
        axes.set_ylim(0 if low < 0.5 * high else low - 0.3 * (high - low), high + 0.35 * (high - low))
        if place >= len(cells) - columns:
            axes.set_xlabel("block that the turn trains")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("peak memory (GiB)")
    drawing.method_legend(figure, look, dict(zip(rows["method"], rows["title"], strict=True)))
    return figure


def _bytes(rows: pandas.DataFrame) -> Figure:
    """Bytes that all clients of a round receive and send, on a logarithmic axis."""
    methods = rows["method"].nunique()
    figure, cells, columns = _grid(rows, 0.24 * methods + 0.62, sharex=True)
    for place, (axes, some) in enumerate(cells):
        for bar, (_, row) in enumerate(some.iterrows()):
            for offset, column, colour, hatch in _DIRECTIONS:
                value = row[column] / row["rounds"] / 1e6
                if not value:
                    continue
                axes.barh(bar + offset, value, height=0.36, color=colour, hatch=hatch, edgecolor="white")
                axes.text(value, bar + offset, f" {significant(value)}", va="center", fontsize=6)
        axes.set_xscale("log")
        if place >= len(cells) - columns:
            axes.set_xlabel("bytes a round, all clients (MB)")
            axes.tick_params(labelbottom=True)
        _methods_axis(axes, list(some["title"]), place % columns == 0)
    low, high = cells[0][0].get_xlim()
    cells[0][0].set_xlim(low, high * 6)
    handles = [
        drawing.Patch(facecolor=colour, hatch=hatch, edgecolor="white") for *_, colour, hatch in _DIRECTIONS
    ]
    drawing.legend(figure, handles, ["down: server to clients", "up: clients to server"])
    return figure


_DIRECTIONS = (
    (-0.19, "download_bytes", "#4477AA", ""),
    (0.19, "upload_bytes", "#CCBB44", "////"),
)


def write_requests(path: Path, cases: Sequence[Case], costs: Sequence[Costs | UserError]) -> None:
    """Write what the jobs of a study need, as the pipeline reads it."""
    write_atomically(path, (json.dumps(requests(cases, costs), indent=1, sort_keys=True) + "\n").encode())
