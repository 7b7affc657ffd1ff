"""Figures of a study, sized for a two-column paper (6.75 or 3.25 inches wide), as pdf and png.

A method has the same colour, marker and line style in every figure, and styles differ in grey, too. Files
contain no dates and no versions, so that the same records give the same bytes. A figure with more than
`contents.PER_PAGE` rows or columns continues in further files: `<name>.pdf`, `<name>_2.pdf`, ...
"""

from collections.abc import Collection, Iterable, Sequence
from itertools import product
from pathlib import Path

import pandas
from matplotlib.figure import Figure

from fedlm.data.partition import PartitionFile
from fedlm.results import records
from fedlm.results.contents import Contents, chunks, compared_tasks, name_of_page, pages_of_cells
from fedlm.results.curves import over_bytes, over_rounds
from fedlm.results.drawing import save_figure, settings, styles
from fedlm.results.final_scores import over_heterogeneity, overview, trade_off
from fedlm.results.lettering import note_missing
from fedlm.results.memory_figures import memory, memory_by_block
from fedlm.results.partition_figures import draw_partitions
from fedlm.results.profiles import profiles
from fedlm.results.scene import Scene
from fedlm.results.tuning import tuning_curves


def make(
    runs_path: Path,
    rounds_path: Path,
    partition_paths: Iterable[Path],
    titles: dict[str, str],
    destination: Path,
    expected: Sequence[tuple[str, str, str, int]] = (),
    *,
    controls: Collection[str] | None = None,
    contents: Contents | None = None,
    trials: pandas.DataFrame | None = None,
) -> list[Path]:
    """Draw all figures of a study as pdf and png; return their paths.

    Args:
        runs_path, rounds_path: the files of `records.collect`.
        partition_paths: partition files; of each task and partition the lowest seed is drawn.
        titles: display title of each method label, in the order of the legend.
        destination: folder for the files; their names are those of `contents.names_of_figures`.
        expected: the study's runs (task, partition, method, seed), in its order; empty: all existing runs.
        controls: names of methods that are not competitors (left out of the front of a trade-off); None:
            as the method files define.
        contents: which figures there are that only some studies have.
        trials: of the study's tuning, if it has one.

    Raises:
        UserError: a file cannot be read.
    """
    scene = Scene.make(records.load_runs(runs_path), expected, titles, controls)
    rounds = records.load_rounds(rounds_path)
    for key in ("task", "partition", "method"):
        rounds[key] = rounds[key].astype(str)
    partitions = [PartitionFile.read(path) for path in sorted(map(Path, partition_paths))]
    look = styles(scene.methods)
    cells = [cell for cell in product(scene.tasks, scene.partitions) if scene.asks_for(*cell)]
    written = []

    def save(name: str, figures: Iterable[Figure]) -> None:
        for page, figure in enumerate(figures):
            if scene.absent:
                note_missing(figure, f"{len(scene.absent)} of {len(scene.expected)} runs are missing")
            written.extend(save_figure(figure, Path(destination) / name_of_page(name, page)))

    with settings():
        by_task, by_cell = chunks(list(dict(cells))), pages_of_cells(cells)
        compared = chunks(compared_tasks(cells))
        save("score_over_rounds", (over_rounds(scene, rounds, look, page) for page in by_cell))
        save("score_over_bytes", (over_bytes(scene, rounds, look, page) for page in by_cell))
        save("score_over_heterogeneity", (over_heterogeneity(scene, look, page) for page in compared))
        save("trade_off", (trade_off(scene, look, page) for page in chunks(cells)))
        save("memory", (memory(scene, page) for page in by_task))
        save("memory_by_block", (memory_by_block(scene, look, page) for page in by_task))
        save("partitions", (draw_partitions(partitions, page) for page in by_cell))
        more = (contents or Contents()).figures()
        if "overview" in more:
            save("overview", [overview(scene, look)])
        if "profiles" in more:
            save("profiles", [profiles(scene, look)])
        if "tuning" in more and trials is not None:
            save("tuning", (tuning_curves(scene, look, trials, page) for page in by_task))
    return written
