"""Which tables and figures a study has. The pipeline plans with it, so nothing large is imported here."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from fedlm.study.study import Study

TABLES = ("main", "ranking", "paired", "traffic", "memory", "skew", "reference", "quality")  # of every study
FIGURES = (
    "score_over_rounds",
    "score_over_bytes",
    "score_over_heterogeneity",
    "trade_off",
    "memory",
    "memory_by_block",
    "partitions",
)
PER_PAGE = 4  # rows, and columns, of one figure

Cells = Sequence[tuple[str, str]]  # of task and partition


class Contents(NamedTuple):
    """What a study compares. It follows from the study file alone, so that a pipeline can plan with it."""

    competitors: int = 0  # methods that are not controls
    cells: int = 0  # of task and partition
    centralized: bool = False
    tuned: bool = False

    @classmethod
    def of(cls, study: Study) -> "Contents":
        """Return the contents of a study."""
        names = {label: study.methods[label].method for label in {run.method for run in study.runs()}}
        return cls(
            competitors=sum(name not in study.found.controls() for name in names.values()),
            cells=len(cells_of(study)),
            centralized="centralized" in names.values(),
            tuned=study.tuning is not None,
        )

    def tables(self) -> list[str]:
        """Return the names of the tables that only some studies have, in their order."""
        several = self.competitors > 1 and self.cells > 1
        return [
            *(["profiles"] if several else []),
            *(["cost_to_target"] if self.centralized and self.competitors else []),
            *(["tuning"] if self.tuned else []),
            *(["claims"] if self.judges() else []),
        ]

    def judges(self) -> bool:
        """Return whether claims of papers are judged: by a study in which all methods were tuned alike."""
        return self.tuned and self.competitors > 1

    def figures(self) -> list[str]:
        """Return the names of the figures that only some studies have, in their order."""
        several = self.competitors > 1 and self.cells > 1
        return [*(["overview", "profiles"] if several else []), *(["tuning"] if self.tuned else [])]


_NOTHING = Contents()


def names_of_tables(contents: Contents = _NOTHING) -> list[str]:
    """Return the names of all tables of a study."""
    return [*TABLES, *contents.tables()]


def cells_of(study: Study) -> Cells:
    """Return the cells of a study."""
    return list(dict.fromkeys((run.task, run.partition) for run in study.runs()))


def names_of_figures(cells: Cells, contents: Contents = _NOTHING) -> list[str]:
    """Return the names, without ending, of all figures of a study with these cells.

    A figure with more than `PER_PAGE` rows or columns has several pages.
    """
    by_task, by_cell = len(chunks(list(dict(cells)))), len(pages_of_cells(cells))
    pages = {
        "score_over_rounds": by_cell,
        "score_over_bytes": by_cell,
        "score_over_heterogeneity": len(chunks(compared_tasks(cells))),
        "trade_off": len(chunks(cells)),
        "memory": by_task,
        "memory_by_block": by_task,
        "partitions": by_cell,
        "overview": 1,
        "profiles": 1,
        "tuning": by_task,
    }
    every = [*FIGURES, *contents.figures()]
    return [name_of_page(name, page) for name in every for page in range(pages[name])]


def pages_of_cells(cells: Cells) -> list[list[tuple[str, list[str]]]]:
    """Return for each page its rows: a task, and those of its partitions that are on the page."""
    pages = []
    for tasks in chunks(list(dict(cells))):
        of_task = {task: chunks([partition for own, partition in cells if own == task]) for task in tasks}
        for page in range(max(map(len, of_task.values()), default=0)):
            pages.append([(task, own[page]) for task, own in of_task.items() if page < len(own)])
    return pages


def compared_tasks(cells: Cells) -> list[str]:
    """Return the tasks that have more than one partition, or all, where none has."""
    partitions = Counter(task for task, _ in cells)
    return [task for task, count in partitions.items() if count > 1] or list(partitions)


def chunks(values: Sequence[Any]) -> list[Any]:
    """Divide into parts of `PER_PAGE`."""
    return [values[start : start + PER_PAGE] for start in range(0, len(values), PER_PAGE)]


def name_of_page(name: str, page: int) -> str:
    """Return the name of a figure's page, of which the first is 0: `name`, `name_2`, `name_3`, ..."""
    return name if page == 0 else f"{name}_{page + 1}"


def cohorts(study: Study) -> dict[tuple[str, str], float]:
    """Return for each task and method how many cohorts a round has for each of its clients.

    1 where clients take turns, 1 / clients where all are merged at once. A method whose cohorts depend on the
    model is left out.
    """
    found: dict[tuple[str, str], float] = {}
    for run in study.runs():
        if (run.task, run.method) in found:
            continue
        config = study.run(run.task, run.partition, run.method, run.seed)
        clients = list(range(config.federation.clients))
        try:
            made = config.method_class(config.method_settings, len(clients), run.seed).cohorts(clients, 1)
        except AttributeError:  # of what `prepare` sets
            continue
        found[run.task, run.method] = len(made) / len(clients)
    return found
