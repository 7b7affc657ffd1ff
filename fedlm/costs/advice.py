"""Which method suits given devices and links: what fits, and how long turns and rounds take."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pandas

from fedlm.base.errors import UserError
from fedlm.base.randomness import numpy_stream
from fedlm.costs.cases import Case
from fedlm.costs.prediction import Costs
from fedlm.costs.tables import duration
from fedlm.results.cost_to_target import TARGETS
from fedlm.results.devices import Device, Devices, Link, Turn, round_seconds, turn_seconds, waiting_seconds
from fedlm.results.typeset import Table, significant

TARGET = TARGETS[-1]  # of the centralised score


class Fleet(NamedTuple):
    """Who takes part: the name of each client's device, and how many times longer its training takes."""

    devices: list[str]
    slowdown: list[float]


def make_fleet(
    shares: Mapping[str, float], clients: int, stragglers: float = 0.0, slowdown: float = 4.0
) -> Fleet:
    """Deal devices to clients by their shares, and make a share of the clients stragglers.

    Counts follow the largest remainders; which client gets which device, and which ones straggle, is drawn,
    always in the same way. A straggler trains `slowdown` times as long and sends as fast as the others.

    Raises UserError if shares are not positive or do not add up to 1, or `stragglers` is no share.
    """
    if not shares or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise UserError(f"--fleet: shares {_listed(shares)}; allowed: above 0, adding up to 1")
    if not 0 <= stragglers <= 1:
        raise UserError(f"--stragglers: {stragglers}; allowed: 0 to 1, a share of the clients")
    if slowdown < 1:
        raise UserError(f"--slowdown: {slowdown}; allowed: from 1 on")
    exact = {name: share * clients for name, share in shares.items()}
    counts = {name: int(number + 1e-9) for name, number in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: clients - sum(counts.values())]:
        counts[name] += 1
    stream = numpy_stream(0, "fleet")
    devices = [name for name, count in counts.items() for _ in range(count)]
    devices = [devices[number] for number in stream.permutation(clients)]
    slow = set(stream.permutation(clients)[: round(stragglers * clients)].tolist())
    return Fleet(devices, [slowdown if client in slow else 1.0 for client in range(clients)])


def parse_shares(text: str) -> dict[str, float]:
    """Return the shares in a text like `phone_midrange=0.6,laptop=0.4`; raise UserError for another text."""
    found = {}
    for part in text.split(","):
        name, _, share = part.strip().partition("=")
        try:
            found[name] = float(share)
        except ValueError:
            raise UserError(f"--fleet: {part!r}; allowed: DEVICE=SHARE,DEVICE=SHARE,...") from None
    return found


def _listed(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={share:g}" for name, share in shares.items()) or "none"


class Round(NamedTuple):
    """How long a round takes, and how long its clients wait for others, on average, in seconds."""

    seconds: float
    waiting: float


def round_of(turn: Turn, cohorts: Sequence[int], fleet: Fleet, known: Devices, link: Link) -> Round:
    """Return how long a round takes in which each of the fleet's clients has one such turn.

    `cohorts` are the sizes of a round's cohorts. A cohort takes as long as its slowest client, and cohorts
    come one after another.
    """
    seconds = []
    for name, slower in zip(fleet.devices, fleet.slowdown, strict=True):
        seconds.append(turn_seconds(turn._replace(flops=turn.flops * slower), known.device(name), link))
    ends = numpy.cumsum(cohorts)
    dealt = [seconds[end - size : end] for size, end in zip(cohorts, ends, strict=True)]
    return Round(round_seconds(dealt), waiting_seconds(dealt) / max(1, len(seconds)))


def fits(costs: Costs, device: Device) -> str:
    """Return whether a turn fits in a device's memory: "yes", or by how much it does not."""
    over = costs.peak.peak - device.memory_bytes
    if over <= 0:
        return "yes"
    least = min(memory.peak for memory in costs.memory.values())
    some = ", later blocks fit" if least <= device.memory_bytes else ""
    return f"{significant(over / 1e9)} GB too much{some}"


def rounds_to_target(table: Path) -> dict[str, tuple[float, float]]:
    """Return for each method the least and the largest median of rounds to the target over a study's cells.

    `table` is the csv of a study's costs to target; where there is none, nothing is known. Infinite: in some
    cell the target is never reached.
    """
    if not table.is_file():
        return {}
    rows = pandas.read_csv(table)
    rows = rows[numpy.isclose(rows["target"], TARGET)]
    rounds = rows["round"].where(rows["reached"] > 0, numpy.inf).fillna(numpy.inf)
    found = rounds.groupby(rows["method"]).agg(["min", "max"])
    return {str(name): (row["min"], row["max"]) for name, row in found.iterrows()}


def advise(
    cases: Sequence[Case],
    costs: Sequence[Costs | UserError],
    known: Devices,
    fleet: Fleet,
    link: Link,
    rounds: Mapping[str, tuple[float, float]],
) -> Table:
    """Return a table of methods: what fits, seconds and bytes of a turn and a round, time to the target."""
    names = list(dict.fromkeys(fleet.devices))
    devices = {name: known.device(name) for name in names}
    several = len(names) > 1
    numbers: list[dict[str, Any]] = []
    cells = []
    for case, found in zip(cases, costs, strict=True):
        if isinstance(found, UserError):
            continue
        turns = max(1, found.answered)
        turn = Turn(
            found.flops / turns, found.upload_bytes / turns, found.download_bytes / max(1, found.turns)
        )
        whole = round_of(turn, found.cohorts, fleet, known, link)
        least, most = rounds.get(case.method, (numpy.nan, numpy.nan))
        fit = {name: fits(found, device) for name, device in devices.items()}
        per_device = {name: turn_seconds(turn, device, link) for name, device in devices.items()}
        energy = {
            name: turn.flops / device.flops_a_second * device.power_watts.value / 3600
            for name, device in devices.items()
            if device.power_watts
        }
        numbers.append(
            {"model": case.model, "method": case.method, "title": case.title}
            | {"peak_memory_bytes": found.peak.peak}
            | {f"fits({name})": text == "yes" for name, text in fit.items()}
            | {"turn_download_bytes": turn.download_bytes, "turn_upload_bytes": turn.upload_bytes}
            | {"turn_flops": turn.flops}
            | {f"turn_seconds({name})": seconds for name, seconds in per_device.items()}
            | {f"turn_watt_hours({name})": value for name, value in energy.items()}
            | {
                "cohorts": len(found.cohorts),
                "round_seconds": whole.seconds,
                "waiting_seconds": whole.waiting,
            }
            | {"least_rounds_to_target": least, "most_rounds_to_target": most}
        )
        cell = {"Model": case.model, "Method": case.title}
        cell["Memory (GB)"] = significant(found.peak.peak / 1e9)
        for name in names:
            cell[f"Fits {name}" if several else "Fits"] = fit[name]
        cell["Down (MB)"] = significant(turn.download_bytes / 1e6)
        cell["Up (MB)"] = significant(turn.upload_bytes / 1e6)
        for name in names:
            cell[f"Turn on {name}" if several else "Turn"] = duration(per_device[name])
        for name in energy:
            cell[f"Wh on {name}" if several else "Wh"] = significant(energy[name])
        cell["Round"] = duration(whole.seconds)
        cell["Waiting"] = duration(whole.waiting)
        if rounds:
            cell[f"To {TARGET:.0%}"] = _time_to_target(least, most, whole.seconds)
        cells.append(cell)
    shown = pandas.DataFrame(cells)
    notes = _notes(cases, fleet, devices, link, bool(rounds))
    return Table(
        "advice",
        "Which method for these devices",
        pandas.DataFrame(numbers),
        shown,
        numpy.zeros(shown.shape, dtype=bool),
        1,
        notes,
    )


def _time_to_target(least: float, most: float, seconds: float) -> str:
    if numpy.isnan(least):
        return "not known"
    if numpy.isinf(least):
        return "never"
    upper = "never" if numpy.isinf(most) else duration(most * seconds)
    return upper if least == most else f"{duration(least * seconds)} to {upper}"


def _notes(
    cases: Sequence[Case], fleet: Fleet, devices: Mapping[str, Device], link: Link, has_rounds: bool
) -> list[str]:
    def origin(value: Any) -> str:
        return "" if value.source else ", assumed"

    described = "; ".join(
        f"{name}: {device.title}, {device.memory_gb.value:g} GB{origin(device.memory_gb)}, "
        f"{device.training_gflops.value:g} GFLOP/s in training{origin(device.training_gflops)}, "
        f"{fleet.devices.count(name)} of {len(fleet.devices)} clients"
        for name, device in devices.items()
    )
    slow = [factor for factor in fleet.slowdown if factor > 1]
    shapes = " or ".join(
        dict.fromkeys(
            f"{one.steps} steps of {one.training.batch_size} x {one.length} tokens" for one in cases
        )
    )
    notes = [
        f"{described}. {link.title}: {link.down_mbit.value:g} Mbit/s down{origin(link.down_mbit)}, "
        f"{link.up_mbit.value:g} up{origin(link.up_mbit)}. Sources: config/devices.yaml.",
        f"A turn: download, {shapes}, upload; "
        "mean over a run's turns. Memory: live tensors of the largest turn, without what the system and a "
        "GPU's context take. Wh: energy of the training alone.",
        "A round: one turn of each client. A cohort takes as long as its slowest client; cohorts, and so "
        "clients that take turns, come one after another. Waiting: time of a round in which a client does "
        "nothing, mean over clients.",
    ]
    if slow:
        notes.append(f"{len(slow)} clients are stragglers: they train {slow[0]:g} times as long.")
    if has_rounds:
        notes.append(
            f"To {TARGET:.0%}: rounds until the score is at least {TARGET:.0%} of that of centralised "
            "training, from the benchmark's cells (the least and the most; another model, other data), times "
            "the seconds of a round here."
        )
    return notes
