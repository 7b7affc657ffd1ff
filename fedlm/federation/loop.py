"""The federation: one loop for every method.

The server, all clients and the network are simulated in one process with one resident model. Nothing but
payloads passes between server and clients: before a client trains, the model is rebuilt from the pretrained
weights, from what this client itself kept, and from what it decoded out of the bytes it was sent.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor

from fedlm.base.errors import FailedRun
from fedlm.base.randomness import derive, isolated, numpy_stream
from fedlm.data.prepared import Prepared, Split
from fedlm.exchange import payload
from fedlm.exchange.payload import PayloadError
from fedlm.federation.checkpoint import Checkpoints
from fedlm.federation.link import Link
from fedlm.federation.method import Method, Server, Upload
from fedlm.federation.scoring import score
from fedlm.federation.settings import Federation as FederationConfig
from fedlm.federation.settings import Training
from fedlm.federation.turn import Diverged, Turn, steps_of_turn
from fedlm.measure.instruments import Instruments
from fedlm.measure.ledger import Ledger
from fedlm.measure.memory import older_objects_set_aside


class Federation:
    """One run of one method: `Federation(...).run()` trains it to the end.

    `model` is the pretrained model with its new head; `parts` holds each client's training examples as arrays
    of row numbers of `data`; `positions` is how many the model has, None without limit; `say` receives a line
    of progress a round.
    """

    def __init__(
        self,
        method: Method,
        model: torch.nn.Module,
        data: Prepared,
        split: Split,
        parts: list[numpy.ndarray],
        federation: FederationConfig,
        training: Training,
        seed: int,
        positions: int | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.method, self.split, self.seed, self.say = method, split, seed, say
        self.settings, self.training = federation, training
        self.parts = method.population(parts)
        self.device = _device(training.device)
        self.ledger = Ledger(payload.size(dict(model.named_parameters()), method.config.payload))
        self.model = method.prepare(model, data.kind).to(self.device)
        self.data = data
        if positions and method.virtual_tokens():
            self.data = data.cap_length(positions - method.virtual_tokens())
        self.parameters = dict(self.model.named_parameters())
        initial = {name: _snapshot(self.parameters[name]) for name in method.exchanged}
        self.server = Server(dict(initial), initial)
        self.link = Link(self)
        self.instruments = Instruments()
        self.rounds: list[dict[str, Any]] = []
        self.losses: list[tuple[float, int]] = []
        self.dropped: list[int] = []
        self.clock = dict.fromkeys(("download", "probe", "train", "upload", "merge", "score"), 0.0)
        self.flops = 0
        self.cuda_peak = 0
        self.began, self.spent = time.perf_counter(), 0.0  # spent: seconds of processes that were interrupted

    def run(self, checkpoints: Checkpoints | None = None) -> None:
        """Run all rounds, from the newest usable checkpoint where there is one.

        Raises FailedRun when a loss or an update is not finite, or an upload is not what it must be.
        """
        with older_objects_set_aside():
            self._run(checkpoints)

    def _run(self, checkpoints: Checkpoints | None) -> None:
        if checkpoints:
            self._resume(checkpoints)
        if not self.rounds:
            self.baseline = self._score(self.split.validation)
        for round in range(len(self.rounds) + 1, self.settings.rounds + 1):
            self.clock = dict.fromkeys(self.clock, 0.0)
            self.losses, self.dropped, flops_before = [], [], self.flops
            clients = self.sample(round)
            for cohort in self.method.cohorts(clients, round):
                self._merge(cohort, round)
            self._close(round, clients, self.flops - flops_before)
            if checkpoints:
                checkpoints.save(round, *self._state())
        self.test = self._score(self.split.test)

    def sample(self, round: int) -> list[int]:
        """Return the clients that take part in a round, in ascending order."""
        count = max(1, math.floor(self.settings.participation * len(self.parts) + 0.5))
        stream = numpy_stream(self.seed, "sampling", round)
        return sorted(stream.choice(len(self.parts), count, replace=False).tolist())

    def answers(self, client: int, round: int) -> bool:
        """Return whether a sampled client will send its upload."""
        return numpy_stream(self.seed, "dropout", round, client).random() >= self.settings.dropout_rate

    def _merge(self, cohort: list[int], round: int) -> None:
        """Let the method merge a cohort; what the turns inside took is not the merge's time."""
        started, turns = time.perf_counter(), sum(self.clock.values())
        self.method.merge(self.server, self._uploads(cohort, round), round)
        self.link.merged(cohort)
        self.clock["merge"] += time.perf_counter() - started - (sum(self.clock.values()) - turns)

    def _uploads(self, cohort: list[int], round: int) -> Iterator[Upload]:
        """Yield the uploads of a cohort, running each client's turn when its upload is asked for."""
        for client in cohort:
            try:
                upload = self._turn(client, round)
            except (Diverged, PayloadError) as error:
                name = self.method.name
                raise FailedRun(f"method {name}, round {round}, client {client}: {error}") from error
            if upload:
                yield upload

    def _turn(self, client: int, round: int) -> Upload | None:
        """Let one client download, train and upload."""
        with self._timed("download"):
            message, layers = self.link.send(client, round)
            self.ledger.downloaded(client, len(message))
            received = self.link.receive(client, message)
            self._load(received)
        if not self.answers(client, round):
            self.dropped.append(client)
            return None
        turn = Turn(
            self.model,
            self.training,
            steps_of_turn(self.parts[client], self.training, self.seed, round, client),
            _Batches(self.data, self.device),
            self.instruments,
            client=client,
            round=round,
            rounds=self.settings.rounds,
            received=received,
            kept=self.server.kept.setdefault(client, {}),
            moments=self.method.config.moments,
        )
        with layers, isolated(derive(self.seed, "dropout in layers", round, client)):
            with self._timed("probe"):
                for segment in self.method.segments(client, round, turn.steps):
                    turn.probe(segment)
            self._reset_cuda_peak()
            with self._timed("train"):
                self.method.train(turn)
        self._read_cuda_peak()
        self.flops += turn.flops
        self.losses.append((turn.loss, len(self.parts[client])))
        with self._timed("upload"):
            message = payload.encode(self.method.upload(turn), self.method.config.payload)
            self.ledger.uploaded(client, len(message))
            tensors = payload.decode(message, self.link.expected())
            for name, value in tensors.items():
                if not torch.isfinite(value).all():
                    raise Diverged(f"the update of {name} is not finite")
        self.link.uploaded(client, tensors)
        if not turn.kept:
            del self.server.kept[client]
        return Upload(client, len(self.parts[client]), tensors)

    def _load(self, values: dict[str, Tensor]) -> None:
        """Write values into the resident model; an optimizer's moments (name@moment) are not its own."""
        with torch.no_grad():
            for name, value in values.items():
                if "@" not in name:
                    self.parameters[name].copy_(value)

    def _score(self, indices: numpy.ndarray) -> dict[str, float]:
        """Return the metrics of the server's model (the mean over models, where a method has several)."""
        found = []
        for values in self.method.models(self.server):
            self._load({name: values[name] for name in self.method.exchanged})
            batch_size = self.training.scoring_batch_size
            autocast = self.training.autocast and getattr(torch, self.training.autocast)
            found.append(score(self.model, self.data, indices, batch_size, self.device, autocast))
        return {name: sum(one[name] for one in found) / len(found) for name in found[0]}

    def _close(self, round: int, clients: list[int], flops: int) -> None:
        """Score the server's model, write down the round, say so."""
        due = round % self.training.score_every == 0 or round == self.settings.rounds
        with self._timed("score"):
            validation = self._score(self.split.validation) if due else None
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
                "seconds": dict(self.clock),
            }
        )
        told = f"{self.data.metric} {validation[self.data.metric]:.4f}" if validation else "not scored"
        loss = self.rounds[-1]["train_loss"]
        loss = f"loss {loss:.4f}" if loss is not None else "no client answered"
        self.say(f"round {round}/{self.settings.rounds}: {loss}, validation {told}")

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all that the next round depends on, as tensors and as plain values."""
        tensors = {f"server/{name}": value for name, value in self.server.tensors.items()}
        tensors |= {f"state/{name}": value for name, value in self.server.state.items()}
        for kind, clients in (("kept", self.server.kept), ("copies", self.link.copies)):
            for client, values in clients.items():
                tensors |= {f"{kind}/{client}/{name}": value for name, value in values.items()}
        books = {
            "version": self.server.version,
            "link": self.link.books(),
            "rounds": self.rounds,
            "baseline": self.baseline,
            "ledger": [self.ledger.download, self.ledger.upload, sorted(self.ledger.clients)],
            "flops": self.flops,
            "spent": self.spent + time.perf_counter() - self.began,
            "memory": self.instruments.books(),
        }
        return tensors, books

    def _resume(self, checkpoints: Checkpoints) -> None:
        found = checkpoints.latest()
        if found is None:
            return
        round, tensors, books = found
        self.server.tensors = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            if kind in ("kept", "copies"):
                client, _, rest = rest.partition("/")
                clients = self.server.kept if kind == "kept" else self.link.copies
                clients.setdefault(int(client), {})[rest] = value
            else:
                (self.server.tensors if kind == "server" else self.server.state)[rest] = value
        self.server.version = books["version"]
        self.link.restore(books["link"])
        self.rounds, self.baseline, self.flops = books["rounds"], books["baseline"], books["flops"]
        self.ledger.download, self.ledger.upload, clients = books["ledger"]
        self.ledger.clients = set(clients)
        self.spent = books["spent"]
        self.instruments.restore(books["memory"])
        self.say(f"resumed after round {round}/{self.settings.rounds}")

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.clock[kind] += time.perf_counter() - started

    def _reset_cuda_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _read_cuda_peak(self) -> None:
        if self.device.type == "cuda":
            self.cuda_peak = max(self.cuda_peak, torch.cuda.max_memory_allocated())


class _Batches:
    """Makes batches of examples, on the device."""

    def __init__(self, data: Prepared, device: torch.device) -> None:
        self.data, self.device = data, device

    def size(self, indices: numpy.ndarray) -> int:
        """Return the tokens of a batch, padding included."""
        return int(self.data.windows[indices].sum()) * self.data.batch_length(indices)

    def __call__(self, indices: numpy.ndarray) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in self.data.batch(indices).items()}


def _snapshot(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
