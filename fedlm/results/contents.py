"""Which tables and figures a study has. The pipeline plans with it, so nothing large is imported here."""

from typing import NamedTuple

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
PER_PAGE = 4  # tasks (rows), and partitions (columns), of one figure


class Contents(NamedTuple):
    """What a study compares. It follows from the study file alone, so that a pipeline can plan with it."""

    competitors: int = 0  # methods that are not controls
    cells: int = 0  # of task and partition
    centralized: bool = False
    tuned: bool = False

    @classmethod
    def of(cls, study: Study) -> "Contents":
        """Return the contents of a study."""
        runs = list(study.runs())
        names = {label: study.methods[label].method for label in {run.method for run in runs}}
        return cls(
            competitors=sum(name not in study.found.controls() for name in names.values()),
            cells=len({(run.task, run.partition) for run in runs}),
            centralized="centralized" in names.values(),
            tuned=getattr(study, "tuning", None) is not None,
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
        return [*(["profiles"] if several else []), *(["tuning"] if self.tuned else [])]


_NOTHING = Contents()


def names_of_tables(contents: Contents = _NOTHING) -> list[str]:
    """Return the names of all tables of a study."""
    return [*TABLES, *contents.tables()]


def names_of_figures(tasks: int, partitions: int, contents: Contents = _NOTHING) -> list[str]:
    """Return the names, without ending, of all figures of a study with so many tasks and partitions.

    A figure with more than `PER_PAGE` tasks or partitions has several pages.
    """
    by_task, by_partition = _pages(tasks), _pages(partitions)
    pages = {
        "score_over_rounds": by_task * by_partition,
        "score_over_bytes": by_task * by_partition,
        "score_over_heterogeneity": by_task,
        "trade_off": _pages(contents.cells or tasks * partitions),
        "memory": by_task,
        "memory_by_block": by_task,
        "partitions": by_task * by_partition,
        "profiles": 1,
        "tuning": by_task,
    }
    every = [*FIGURES, *contents.figures()]
    return [name_of_page(name, page) for name in every for page in range(pages[name])]


def name_of_page(name: str, page: int) -> str:
    """Return the name of a figure's page, of which the first is 0: `name`, `name_2`, `name_3`, ..."""
    return name if page == 0 else f"{name}_{page + 1}"


def _pages(count: int) -> int:
    return max(1, -(-count // PER_PAGE))


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
