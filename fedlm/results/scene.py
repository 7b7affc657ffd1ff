"""What tables and figures show: the runs of a study in its order, with titles, and which are missing."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import pandas

LONGEST_NOTE = 20  # lines of missing runs in a note; all of them are in missing.csv


class Expected(NamedTuple):
    """The labels of a run that a study asks for."""

    task: str
    partition: str
    method: str
    seed: int


def missing(runs: pandas.DataFrame, expected: Sequence[tuple[str, str, str, int]]) -> list[Expected]:
    """Return the expected runs (task, partition, method, seed) that are not among `runs`, in their order."""
    found = set(zip(runs["task"], runs["partition"], runs["method"], runs["seed"], strict=True))
    return [Expected(*run) for run in expected if tuple(run) not in found]


def describe_missing(absent: Sequence[Expected]) -> list[str]:
    """Return one line for each task, partition and method with missing seeds: `task / partition / ...`."""
    seeds: dict[tuple[str, str, str], list[int]] = {}
    for run in absent:
        seeds.setdefault((run.task, run.partition, run.method), []).append(run.seed)
    return [
        f"{' / '.join(labels)}: seed{'s' if len(some) > 1 else ''} {', '.join(map(str, some))}"
        for labels, some in seeds.items()
    ]


class Scene(NamedTuple):
    """The runs to show, with the order and titles of what they compare."""

    runs: pandas.DataFrame
    tasks: list[str]
    partitions: list[str]
    methods: list[str]
    titles: dict[str, str]
    controls: set[str]
    expected: list[Expected]
    absent: list[Expected]
    left_out: int

    @classmethod
    def make(
        cls,
        runs: pandas.DataFrame,
        expected: Sequence[tuple[str, str, str, int]] = (),
        titles: dict[str, str] | None = None,
        controls: Collection[str] | None = None,
    ) -> "Scene":
        """Order the runs as the study lists them; runs that it does not list are left out.

        `controls` names the methods that bound or explain the others: they are shown and marked, and cannot
        be the best. None: as the method files define.
        """
        if controls is None:
            from fedlm.study.plugins import discover_methods

            controls = [name for name, method in discover_methods().items() if method.control]
        titles = dict(titles or {})
        wanted = [Expected(*run) for run in expected]
        every = len(runs)
        if expected:
            asked = pandas.MultiIndex.from_tuples(expected)
            keys = pandas.MultiIndex.from_frame(runs[["task", "partition", "method", "seed"]])
            runs = runs[keys.isin(asked)]

        def order(name: str, first: Sequence[str] = ()) -> list[str]:
            found = [getattr(run, name) for run in wanted] + sorted(runs[name].unique())
            used = list(dict.fromkeys(found))
            return [label for label in first if label in used] + [
                label for label in used if label not in first
            ]

        methods = order("method", list(titles))
        # Two labels with the same title would look like one row.
        shown = [titles.get(method, method) for method in methods]
        titles = {
            method: title if shown.count(title) == 1 else f"{title} ({method})"
            for method, title in zip(methods, shown, strict=True)
        }
        names = dict(zip(runs["method"], runs["method_name"], strict=True))
        return cls(
            runs=runs,
            tasks=order("task"),
            partitions=order("partition"),
            methods=methods,
            titles=titles,
            controls={method for method in methods if names.get(method, method) in controls},
            expected=wanted,
            absent=missing(runs, expected),
            left_out=every - len(runs),
        )

    def cells(self) -> list[tuple[str, str, str, pandas.DataFrame, int]]:
        """Return task, partition, method, its runs and the number of runs asked for, in the study's order."""
        asked: dict[tuple, int] = {}
        for run in self.expected:
            asked[run[:3]] = asked.get(run[:3], 0) + 1
        found = dict(list(self.runs.groupby(["task", "partition", "method"], observed=True)))
        rows = []
        for task in self.tasks:
            for partition in self.partitions:
                for method in self.methods:
                    key = (task, partition, method)
                    if key in found or key in asked:
                        some = found.get(key, self.runs.iloc[:0])
                        rows.append((*key, some, asked.get(key, len(some))))
        return rows

    def asks_for(self, task: str, partition: str) -> bool:
        """Return whether the study has this cell; all, where nothing is known of the study."""
        return not self.expected or any(run[:2] == (task, partition) for run in self.expected)

    def title(self, method: str) -> str:
        """Return a method's title, with a dagger where it is a control."""
        return self.titles[method] + ("†" if method in self.controls else "")

    def notes(self) -> list[str]:
        """Return the notes below every table: controls, missing runs, origin."""
        notes = []
        if self.controls:
            notes.append("† Control: shown for comparison, not a competitor, never marked as best.")
        if self.absent:
            lines = describe_missing(self.absent)
            shown = "; ".join(lines[:LONGEST_NOTE])
            more = f"; and {len(lines) - LONGEST_NOTE} more rows" if len(lines) > LONGEST_NOTE else ""
            notes.append(
                f"Missing: {len(self.absent)} of {len(self.expected)} runs ({shown}{more}). "
                "All missing runs are listed in missing.csv."
            )
        if self.left_out:
            notes.append(f"{self.left_out} records that are not in the study are left out.")
        if len(self.runs):
            commits = sorted({commit[:12] for commit in self.runs["commit"]})
            made = f"Made by commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"
            made += ", with changes" if self.runs["dirty"].any() else ""
            models = ", ".join(sorted(self.runs["model"].unique()))
            notes.append(f"Model: {models}. {made}.")
        return notes
