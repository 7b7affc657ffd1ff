"""What all programs share: the model, each client's batches, the optimizer, and the file of the result.

Only PyTorch, Transformers and safetensors are imported, which every environment has. A workload is a folder:
`workload.json` (see `Workload`), `model/` in the layout of Transformers with the new head, and
`batches.safetensors`, whose names are `<round>/<client>/<step>/<input>`.
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Batch = dict[str, torch.Tensor]


class Workload:
    """A federation to run.

    `clients`, `rounds` and `steps` count; `examples` is each client's weight in the mean; `learning_rate` is
    that of AdamW, which starts afresh in each turn; `threads` is the number of threads of one turn.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        found = json.loads((self.folder / "workload.json").read_text())
        self.clients: int = found["clients"]
        self.rounds: int = found["rounds"]
        self.steps: int = found["steps"]
        self.threads: int = found["threads"]
        self.examples: list[int] = found["examples"]
        self.learning_rate: float = found["learning_rate"]
        self._batches: dict[str, torch.Tensor] | None = None
        torch.set_num_threads(self.threads)

    def model(self) -> torch.nn.Module:
        """Return the pretrained model with its head, in training mode; it has no dropout."""
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification.from_pretrained(self.folder / "model").train()

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Return a client's optimizer."""
        return torch.optim.AdamW(model.parameters(), lr=self.learning_rate, weight_decay=0.0, fused=True)

    def batches(self, round: int, client: int) -> list[Batch]:
        """Return the batches of a client's turn; rounds count from 1, clients from 0."""
        if self._batches is None:
            self._batches = load_file(self.folder / "batches.safetensors")
        names = [name.rpartition("/")[2] for name in self._batches if name.startswith(f"{round}/{client}/0/")]
        return [
            {name: self._batches[f"{round}/{client}/{step}/{name}"] for name in names}
            for step in range(self.steps)
        ]

    def train(self, model: torch.nn.Module, round: int, client: int) -> None:
        """Make a client's steps, with an optimizer of its own."""
        optimizer = self.optimizer(model)
        for batch in self.batches(round, client):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


class Clock:
    """Seconds since it was made, and processor time of this process and of the children that have ended."""

    def __init__(self) -> None:
        self.began, self.spent = time.perf_counter(), self._processor()

    def read(self) -> dict[str, float]:
        """Return both, in seconds."""
        return {
            "seconds": time.perf_counter() - self.began,
            "processor_seconds": self._processor() - self.spent,
        }

    @staticmethod
    def _processor() -> float:
        kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        used = [resource.getrusage(kind) for kind in kinds]
        return sum(one.ru_utime + one.ru_stime for one in used)


def arguments() -> tuple[Workload, Path]:
    """Return the workload and the folder of the result, which the command line names."""
    return Workload(Path(sys.argv[1])), Path(sys.argv[2])


def finish(folder: Path, times: dict[str, float], weights: dict[str, torch.Tensor]) -> None:
    """Write the times and the final weights."""
    save_file({name: value.detach().contiguous() for name, value in weights.items()}, folder / "weights")
    (folder / "times.json").write_text(json.dumps(times))
