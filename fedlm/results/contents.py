"""Which tables and figures a study has, besides those that every study has."""

from typing import NamedTuple

from fedlm.study.study import Study


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
