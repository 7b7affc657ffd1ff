"""One progress bar for a whole study, in a terminal: rounds that are done, and the time left.

Jobs write a line a round into their logs; the bar counts these lines. Elsewhere than in a terminal, the lines
themselves are shown.
"""

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from fedlm.jobs.folders import Folders
from fedlm.study.study import Run, Study

SHOWN = "FEDLM_BAR"  # set in the jobs' environment where a bar is shown: their lines go to their logs only
SECONDS = 2.0  # between two looks at the logs

_ROUND = re.compile(r"^(\S+): round (\d+)/\d+", re.MULTILINE)
_ENDED = re.compile(r"^(\S+): (?:already finished|this trial failed)", re.MULTILINE)


class Rounds:
    """Counts the rounds of runs that are done, from their records and the logs of this pipeline."""

    def __init__(self, study: Study, runs: Iterable[Run], folders: Folders) -> None:
        rounds: dict[tuple[str, str, str], int] = {}
        self.records: dict[str, Path] = {}
        self.expected: dict[str, int] = {}
        for run in runs:
            key = run.task, run.partition, run.method
            if key not in rounds:
                rounds[key] = study.run(*run).federation.rounds
            self.expected[run.path] = rounds[key]
            self.records[run.path] = folders.record(run)
        self.logs = folders.root / "logs" / "train"
        self.began = time.time() - 1
        self._read: dict[Path, int] = {}  # when a log was last changed that has been read
        self._done: dict[str, int] = {}

    @property
    def total(self) -> int:
        """All rounds of all runs."""
        return sum(self.expected.values())

    def done(self) -> int:
        """Return how many rounds are done now."""
        for path in self.logs.rglob("*.log"):
            try:
                changed = path.stat().st_mtime_ns
                if changed < self.began * 1e9 or self._read.get(path) == changed:
                    continue
                text = path.read_text(errors="replace")
            except OSError:  # removed in the meantime
                continue
            self._read[path] = changed
            for run, round in _ROUND.findall(text):
                self._done[run] = max(self._done.get(run, 0), int(round))
            for run in _ENDED.findall(text):
                self._done[run] = self.expected.get(run, 0)
        for run, record in self.records.items():
            if self._done.get(run) != self.expected[run] and record.exists():
                self._done[run] = self.expected[run]
        return sum(min(count, self.expected.get(run, 0)) for run, count in self._done.items())


class Bar:
    """A bar at the bottom of the terminal, moved by a thread until `close`."""

    def __init__(self, rounds: Rounds, name: str) -> None:
        self.rounds = rounds
        finished = rounds.done()
        self._bar = tqdm(
            total=rounds.total,
            initial=finished,
            desc=name,
            unit="round",
            smoothing=0.02,
            dynamic_ncols=True,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt} of {total_fmt} rounds, {remaining} left",
        )
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._move, daemon=True)
        self._thread.start()

    def _move(self) -> None:
        while not self._ended.wait(SECONDS):
            self._bar.update(self.rounds.done() - self._bar.n)
            self._bar.refresh()

    def close(self) -> None:
        """Count once more and leave the bar as it is."""
        if not self._ended.is_set():
            self._ended.set()
            self._thread.join()
            self._bar.update(self.rounds.done() - self._bar.n)
            self._bar.close()


def show(rounds: Rounds, name: str, logger: logging.Logger) -> Bar | None:
    """Show a bar if there is a terminal and something to do; the logger then writes its lines above it."""
    if not sys.stderr.isatty() or rounds.done() >= rounds.total:
        return None
    os.environ[SHOWN] = "1"
    bar = Bar(rounds, name)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            _write_above(handler)
    return bar


def _write_above(handler: logging.Handler) -> None:
    emit = handler.emit

    def above(record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            emit(record)

    handler.emit = above  # type: ignore[method-assign]
