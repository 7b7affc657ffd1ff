"""What it costs to come near the score of centralised training: bytes, compute, memory, seconds."""

import math
from collections.abc import Mapping
from typing import Any

import numpy
import pandas

from fedlm.results.cells import CELL
from fedlm.results.devices import Devices, seconds_so_far
from fedlm.results.ranking import on_all_partitions
from fedlm.results.scene import Scene
from fedlm.results.typeset import Table, significant

TARGETS = (0.90, 0.97)  # of the centralised score
KEYS = [*CELL, "method", "seed"]
NUMBERS = [*CELL, "method", "title", "control", "target", "centralised_score", "reached", "seeds"]


def centralised_scores(scene: Scene) -> pandas.Series:
    """Return the validation score of centralised training after its last round, by task, partition and seed.

    It has all examples whatever the partition, so one that it was run on serves for the others of its task.
    """
    runs = on_all_partitions(scene.runs)
    own = runs[runs["method_name"] == "centralized"]
    return own.groupby([*CELL, "seed"], observed=True)["validation_score"].mean().rename("centralised_score")


def first_rounds(scene: Scene, rounds: pandas.DataFrame, share: float) -> pandas.DataFrame:
    """Return each run's first round from which its validation score is within reach of the centralised one.

    The target is `share` of the score of centralised training with the same seed or, where lower is better,
    that score divided by it. It has to be reached in two scored rounds in a row, of which the first counts,
    or in the last: one lucky round is not enough. The result has a row for each run whose seed has a
    centralised score, with the columns of `rounds`; these are NaN where the target is never reached.
    """
    greater = scene.runs.groupby("task", observed=True)["greater_is_better"].first().astype(bool).to_dict()
    runs = scene.runs[scene.runs["method_name"] != "centralized"][KEYS]
    runs = runs.merge(centralised_scores(scene).reset_index(), on=[*CELL, "seed"])
    some = rounds[rounds["validation_score"].notna()].merge(runs, on=KEYS).sort_values([*KEYS, "round"])
    better = some["task"].map(greater).to_numpy(dtype=bool)
    values, score = (some[name].to_numpy(dtype=float) for name in ("validation_score", "centralised_score"))
    some["there"] = numpy.where(better, values >= share * score, values <= score / share)
    stays = some.groupby(KEYS, observed=True)["there"].shift(-1, fill_value=True)
    first = some[some["there"] & stays].drop_duplicates(KEYS)
    return runs.merge(first.drop(columns=["there", "centralised_score"]), on=KEYS, how="left")


def cost_to_target_table(
    scene: Scene,
    rounds: pandas.DataFrame,
    devices: Devices | None = None,
    cohorts: Mapping[tuple[str, str], float] | None = None,
) -> Table:
    """Costs up to the first round within reach of the centralised score, for each task, partition and method.

    `cohorts` is as in `seconds_so_far`; without it there are no seconds.
    """
    columns = devices.columns() if devices and cohorts else {}
    rounds = rounds.astype(dict.fromkeys(KEYS[:3], object))
    for name, (device, link) in columns.items():
        rounds[name] = seconds_so_far(rounds, scene.runs, cohorts or {}, device, link)
    quantities = {
        "round": ("Rounds", 1.0),
        "upload_bytes": ("Sent up (MB)", 1e6),
        "download_bytes": ("Sent down (MB)", 1e6),
        "flops": ("Compute (TFLOP)", 1e12),
        "peak_memory_bytes": ("Peak memory (MiB)", 2**20),
        **{name: (name, 1.0) for name in columns},
    }
    scores = centralised_scores(scene).groupby(level=CELL).mean().to_dict()
    memory = scene.runs[[*KEYS, "peak_memory_bytes"]]
    found = {
        share: dict(list(first.merge(memory, on=KEYS).groupby([*CELL, "method"], observed=True)))
        for share in TARGETS
        for first in [first_rounds(scene, rounds, share)]
    }
    numbers: list[dict[str, Any]] = []
    cells = []
    for task, partition, method, runs, _ in scene.cells():
        score = scores.get((task, partition), math.nan)
        if runs.empty or runs["method_name"].iloc[0] == "centralized" or not math.isfinite(score):
            continue
        for share in TARGETS:
            own = found[share].get((task, partition, method))
            if own is None:
                continue
            reached = own["round"].notna()
            number: dict[str, Any] = {
                "task": task,
                "partition": partition,
                "method": method,
                "title": scene.titles[method],
                "control": method in scene.controls,
                "target": share,
                "centralised_score": score,
                "reached": int(reached.sum()),
                "seeds": len(own),
            }
            cell = {"Task": task, "Partition": partition, "Method": scene.title(method)}
            cell |= {"Target": f"{share:.0%}", "Reached": f"{reached.sum()} of {len(own)}"}
            for column, (heading, unit) in quantities.items():
                known = own[column].astype(float)
                # A seed that never gets there costs infinitely much: it cannot improve the median.
                typical = (
                    float(known.where(reached, math.inf).median())
                    if known[reached].notna().all()
                    else math.nan
                )
                number[column] = typical if math.isfinite(typical) else math.nan
                text = f"{typical:g}" if column == "round" else significant(typical / unit)
                cell[heading] = "never" if typical == math.inf else text
            numbers.append(number)
            cells.append(cell)
    scored = rounds[(rounds["round"] > 0) & rounds["validation_score"].notna()].merge(
        scene.runs[KEYS], on=KEYS
    )
    every = scored.groupby("method")["round"].min()
    seldom = [
        f"{scene.titles[method]} (every {every[method]})"
        for method in scene.methods
        if every.get(method, 1) > 1
    ]
    headings = ["Task", "Partition", "Method", "Target", "Reached"]
    headings += [heading for heading, _ in quantities.values()]
    shown = pandas.DataFrame(cells, columns=headings)
    notes = [
        "Up to the first scored round whose validation score is at least 90% (97%) of that of centralised "
        "training with the same seed after its last round, and so is the next round's, or it is the last; "
        "where lower is better, at most that score divided by 0.9 (0.97). "
        "Median over seeds, in which a seed that never gets there counts as infinite: never means that "
        "half of the seeds, or more, do not. Bytes and compute are sums over all clients, without the "
        "first broadcast; 0 rounds: the untrained model is within reach. Peak memory is that of the run.",
    ]
    if seldom:
        notes.append(
            f"Not scored in every round, and so reached later than it may have been: {', '.join(seldom)}."
        )
    if columns:
        places = "; ".join(
            f"{device.title}, {device.training_gflops.value:g} GFLOP/s, {link.title}, "
            f"{link.down_mbit.value:g} down and {link.up_mbit.value:g} Mbit/s up"
            for device, link in columns.values()
        )
        notes.append(
            f"Seconds if every client had this device and link ({places}; sources in "
            f"config/devices.yaml): a cohort "
            "takes as long as its slowest client, and clients that take turns add up."
        )
    return Table(
        "cost_to_target",
        "What it costs to come near centralised training",
        pandas.DataFrame(numbers, columns=[*NUMBERS, *quantities]),
        shown,
        numpy.zeros(shown.shape, dtype=bool),
        3,
        [*notes, *scene.notes()],
    )
