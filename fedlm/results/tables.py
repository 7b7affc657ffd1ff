"""Tables of a study: csv for programs, Markdown for reading, LaTeX (booktabs) for papers.

The csv files hold plain numbers in base units (bytes, FLOPs, seconds, scores as the metric gives them). The
others hold the same numbers rounded and with units: traffic in MB (1e6 bytes), memory in MiB (2**20 bytes),
compute in TFLOP (1e12), scores in points (times 100) unless smaller is better. Every table lists the missing
runs. The same records give the same bytes.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas

from fedlm.base.files import write_atomically
from fedlm.results import records
from fedlm.results.claims import claims_table
from fedlm.results.comparisons import paired_table
from fedlm.results.contents import Contents
from fedlm.results.cost_tables import main_table, memory_table, traffic_table
from fedlm.results.cost_to_target import cost_to_target_table
from fedlm.results.devices import Devices
from fedlm.results.profiles import profiles_table
from fedlm.results.quality import quality_table
from fedlm.results.ranking import ranking_table
from fedlm.results.reference import reference_table
from fedlm.results.scene import Expected, Scene
from fedlm.results.skew import skew_table
from fedlm.results.tuning import tuning_table
from fedlm.results.typeset import Table, latex, markdown


class Evidence(NamedTuple):
    """What the tables need that only some studies have.

    `devices` and `cohorts` give seconds on devices (see `devices.seconds_so_far`), `trials` and `choices`
    are those of a tuning, `predicted` are the predicted costs that claims name.
    """

    contents: Contents = Contents()
    devices: Devices | None = None
    cohorts: Mapping[tuple[str, str], float] | None = None
    trials: pandas.DataFrame | None = None
    choices: Sequence[dict[str, Any]] = ()
    predicted: pandas.DataFrame | None = None


def make(
    runs_path: Path,
    rounds_path: Path,
    expected: Sequence[tuple[str, str, str, int]],
    titles: dict[str, str],
    destination: Path,
    *,
    controls: Collection[str] | None = None,
    evidence: Evidence | None = None,
) -> list[Path]:
    """Write all tables of a study as csv, md and tex, and `missing.csv`; return their paths.

    Args:
        runs_path, rounds_path: the files of `records.collect`.
        expected: the study's runs (task, partition, method, seed), in its order; empty: all existing runs.
        titles: display title of each method label, in the order of the rows.
        destination: folder for the files `<name>.csv`, `.md` and `.tex`, for each of
            `contents.names_of_tables`.
        controls: names of methods that are not competitors; None: as the method files define.
        evidence: what the tables need that only some studies have; without it there are none of these.

    Raises:
        UserError: a file cannot be read.
    """
    evidence = evidence or Evidence()
    scene = Scene.make(records.load_runs(runs_path), expected, titles, controls)
    rounds = records.load_rounds(rounds_path)
    tables = [
        main_table(scene),
        ranking_table(scene),
        paired_table(scene),
        traffic_table(scene, rounds, evidence.devices, evidence.cohorts),
        memory_table(scene),
        skew_table(scene),
        reference_table(scene),
        quality_table(scene, rounds, evidence.trials, evidence.choices),
    ]
    makers: dict[str, Callable[[], Table]] = {
        "profiles": lambda: profiles_table(scene),
        "cost_to_target": lambda: cost_to_target_table(scene, rounds, evidence.devices, evidence.cohorts),
        "tuning": lambda: tuning_table(scene, evidence.trials, evidence.choices),
        "claims": lambda: claims_table(scene, evidence.predicted),
    }
    tables += [makers[name]() for name in evidence.contents.tables()]
    destination = Path(destination)
    written = write(tables, destination)
    path = destination / "missing.csv"
    absent = pandas.DataFrame(scene.absent, columns=list(Expected._fields))
    write_atomically(path, absent.to_csv(index=False, lineterminator="\n").encode())
    return [*written, path]


def write(tables: Iterable[Table], destination: Path) -> list[Path]:
    """Write each table as `<name>.csv`, `.md` and `.tex`; return their paths."""
    written = []
    for table in tables:
        for ending, content in (
            ("csv", table.numbers.to_csv(index=False, lineterminator="\n")),
            ("md", markdown(table)),
            ("tex", latex(table)),
        ):
            written.append(destination / f"{table.name}.{ending}")
            write_atomically(written[-1], content.encode())
    return written
