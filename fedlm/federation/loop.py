"""The federation: one loop for every method."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from fedlm.base.randomness import numpy_stream
from fedlm.data.prepared import Prepared, Split
from fedlm.exchange import payload, pruning
from fedlm.federation.checkpoint import Checkpoints
from fedlm.federation.method import Method
from fedlm.federation.rounds import Rounds, failed
from fedlm.federation.scorer import Scorer
from fedlm.federation.settings import Federation as FederationSettings
from fedlm.federation.settings import Training
from fedlm.federation.stored import StorageError, Stored
from fedlm.measure.memory import older_objects_set_aside

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = ("server", "state", "moments", "copies", "kept")  # of a checkpoint's tensors


class Federation(Rounds):
    """One run of one method: `Federation(...).run()` trains it to the end.

    `model` is the pretrained model with its new head; `parts` holds each client's training examples as arrays
    of row numbers of `data`; `positions` is how many the model has, None without limit; `log` receives a line
    of progress a round.
    """

    def __init__(
        self,
        method: Method,
        model: "PreTrainedModel",
        data: Prepared,
        split: Split,
        parts: list[numpy.ndarray],
        federation: FederationSettings,
        training: Training,
        seed: int,
        positions: int | None = None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.split, self.log, self.data = split, log, data
        broadcast = payload.size(dict(model.named_parameters()), method.config.payload)
        device = _device(training.device)
        method.label_names = data.label_names
        prepared = method.prepare(model, data.kind)
        if positions and method.virtual_tokens():
            self.data = data.cap_length(positions - method.virtual_tokens())
        super().__init__(
            method,
            prepared,
            method.population(parts),
            Batches(self.data, device),
            federation,
            training,
            seed,
            broadcast,
            self._observe,
            device,
        )
        self.rounds: list[dict[str, Any]] = []
        self.scorer = Scorer(self, self.data)
        self.began, self.spent = time.perf_counter(), 0.0  # spent: seconds of processes that were interrupted

    def run(self, checkpoints: Checkpoints | None = None, test: bool = True) -> None:
        """Run all rounds, from the newest usable checkpoint where there is one; then score the test split.

        A trial of the tuning must not know the test split: with `test` False it is not scored.

        Raises DivergedRun when a loss, an update or a score is not finite, FailedRun when an upload is not
        what it must be.
        """
        watching = checkpoints.watching_signals() if checkpoints else nullcontext()
        with older_objects_set_aside(), watching:
            if checkpoints:
                self._resume(checkpoints)
            if not self.rounds:
                self.baseline = self.scorer.score(self.split.validation)
            for round in range(len(self.rounds) + 1, self.settings.rounds + 1):
                before = self.flops, self.queries
                clients = self.play(round)
                self._close(round, clients, self.flops - before[0], self.queries - before[1])
                if checkpoints:
                    self._save(checkpoints, round)
            if checkpoints:
                checkpoints.rounds_ended(self.settings.rounds, self._state)
            self.test = self.scorer.score(self.split.test) if test else None
            self.further = self.scorer.further(self.split.test) if test else {}

    def _save(self, checkpoints: Checkpoints, round: int) -> None:
        try:
            checkpoints.round_ended(round, self._state)
        except StorageError as error:
            _, client, *_ = (error.tensor or "//").split("/")
            raise failed(self.method, round, [int(client)] if client.isdigit() else [], error) from error

    def _close(self, round: int, clients: list[int], flops: int, queries: int) -> None:
        """Score the server's model, record the round, log a line."""
        due = round % self.training.score_every == 0 or round == self.settings.rounds
        with self._timed("score"):
            validation = self.scorer.score(self.split.validation) if due else None
        examples = sum(count for _, count in self.losses)
        payloads = self.ledger.close_round()
        self.rounds.append(
            {
                "round": round,
                "clients": clients,
                "dropped": list(self.dropped),
                "train_loss": sum(loss * n for loss, n in self.losses) / examples if examples else None,
                "validation": validation,
                "validation_score": validation and validation[self.data.metric],
                "download_bytes": sum(row[1] for row in payloads),
                "upload_bytes": sum(row[2] for row in payloads),
                "payloads": payloads,
                "flops": flops,
                "queries": queries,
                "seconds": dict(self.clock),
            }
        )
        scored = f"{self.data.metric} {validation[self.data.metric]:.4f}" if validation else "not scored"
        loss = self.rounds[-1]["train_loss"]
        loss = f"loss {loss:.4f}" if loss is not None else "no client trained"
        self.log(f"round {round}/{self.settings.rounds}: {loss}, validation {scored}")

    def _observe(self, examples: int) -> dict[str, pruning.Inputs]:
        """Return what the linear layers of the server's model are given on `examples` validation examples.

        The resident model gets the server's values for it; the turn that follows gives it the client's.
        """
        self.load(self.server.tensors)
        stream = numpy_stream(self.seed, "calibration")
        chosen = stream.permutation(self.split.validation)[:examples]
        size = self.training.scoring_batch_size
        batches = (self.make_batch(chosen[start : start + size]) for start in range(0, len(chosen), size))
        return pruning.observe(self.model, batches)

    def _state(self) -> tuple[dict[str, Tensor | Stored], dict[str, Any]]:
        """Return all that the next round depends on, as tensors and as plain values."""
        copies, link = self.link.state()
        tensors: dict[str, Tensor | Stored] = {f"server/{n}": v for n, v in self.server.tensors.items()}
        tensors |= {f"state/{name}": value for name, value in self.server.state.items()}
        for name, moments in self.server.moments.items():
            tensors |= {f"moments/{kind}/{name}": value for kind, value in moments.items()}
        tensors |= {f"copies/{number}": value for number, value in copies.items()}
        for client, kept in self.server.kept.handles.items():
            tensors |= {f"kept/{client}/{name}": value for name, value in kept.items()}
        plain = {
            "version": self.server.version,
            "link": link,
            "rounds": self.rounds,
            "baseline": self.baseline,
            "ledger": self.ledger.state(),
            "flops": self.flops,
            "queries": self.queries,
            "cuda_peak": self.cuda_peak,
            "spent": self.spent + time.perf_counter() - self.began,
            "memory": self.instruments.state(),
        }
        return tensors, plain

    def _resume(self, checkpoints: Checkpoints) -> None:
        self.server.store_in(checkpoints.store)
        found = checkpoints.latest()
        if found is None:
            return
        round, values, plain = found
        parts: dict[str, dict[str, Any]] = {kind: {} for kind in PARTS}
        for name, value in values.items():
            kind, _, rest = name.partition("/")
            parts[kind][rest] = value
        self.server.tensors, self.server.state = parts["server"], parts["state"]
        self.server.version = plain["version"]
        self.server.restore_moments(parts["moments"])
        self.link.restore(parts["copies"], plain["link"])
        self.server.kept.handles.clear()
        for name, stored in checkpoints.store.adopt(parts["kept"]).items():
            client, _, rest = name.partition("/")
            self.server.kept.handles.setdefault(int(client), {})[rest] = stored
        self.rounds, self.baseline = plain["rounds"], plain["baseline"]
        self.flops, self.queries, self.cuda_peak = plain["flops"], plain["queries"], plain["cuda_peak"]
        self.ledger.restore(plain["ledger"])
        self.spent = plain["spent"]
        self.instruments.restore(plain["memory"])
        self.log(f"resumed after round {round}/{self.settings.rounds}")


class Batches:
    """Makes batches of examples, on the device."""

    def __init__(self, data: Prepared, device: torch.device) -> None:
        self.data, self.device = data, device

    def size(self, indices: numpy.ndarray) -> int:
        """Return the tokens of a batch, padding included."""
        return int(self.data.windows[indices].sum()) * self.data.batch_length(indices)

    def __call__(self, indices: numpy.ndarray) -> dict[str, Tensor]:
        batch = self.data.batch(indices)
        if self.device.type == "cuda":
            # From pinned memory the copy does not wait for what the device is still computing.
            batch = {name: value.pin_memory() for name, value in batch.items()}
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
