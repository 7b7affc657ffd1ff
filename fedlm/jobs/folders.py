"""Where the files of a study are."""

from pathlib import Path

from fedlm.study.study import Run


class Folders:
    """Where a study's files are, below `results/<study>`."""

    def __init__(self, study: str, results: Path = Path("results")) -> None:
        self.root = Path(results) / study

    def task(self, task: str) -> Path:
        """Folder of a prepared task."""
        return self.root / "tasks" / task

    def partition(self, task: str, partition: str, seed: int) -> Path:
        """File of a partition."""
        return self.root / "partitions" / task / partition / f"seed{seed}.json"

    def record(self, run: Run) -> Path:
        """File of a run's or a trial's record."""
        return self.root / ("runs" if run.trial is None else "trials") / f"{run.path}.json"

    def choice(self, task: str, method: str) -> Path:
        """File of the settings that the tuning chose for a method label on a task."""
        return self.root / "tuning" / task / f"{method}.json"

    def checkpoints(self, run: Run) -> Path:
        """Folder of a run's checkpoints, outside the pipeline's declared outputs."""
        return self.root / "checkpoints" / run.path

    def finished(self, fingerprint: str) -> Path:
        """File of a finished run's kept record, independent of its labels."""
        return self.root / "finished" / f"{fingerprint}.json"
