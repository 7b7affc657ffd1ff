"""One round: cohorts of clients, a turn for each client, and the merge of their uploads.

The server, all clients and the network are simulated in one process with one resident model. Nothing but
payloads passes between server and clients: before a client trains, the model is rebuilt from the pretrained
weights, from what this client itself kept, and from what it decoded from the message it received.

A real run and the prediction of its costs execute the same code. In a prediction the model's tensors have no
values (meta): copying and decoding them does nothing, and the turn records its work instead of doing it.
"""

import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager

import numpy
import torch
from torch import Tensor

from fedlm.base.errors import DivergedRun, FailedRun
from fedlm.base.randomness import derive, isolated, numpy_stream
from fedlm.base.settings import nearest
from fedlm.exchange import payload
from fedlm.exchange.payload import PayloadError, Received
from fedlm.exchange.pruning import Inputs
from fedlm.exchange.uploads import Outgoing
from fedlm.federation import budgets
from fedlm.federation.link import Link
from fedlm.federation.method import Method
from fedlm.federation.passes import Batch
from fedlm.federation.resident import Resident
from fedlm.federation.settings import Federation as FederationSettings
from fedlm.federation.settings import Training
from fedlm.federation.state import Server, Upload
from fedlm.federation.stored import StorageError
from fedlm.federation.turn import NotFiniteError, Turn, TurnError, steps_of_turn
from fedlm.measure.instruments import Instruments
from fedlm.measure.ledger import Ledger

CLOCK = ("prune", "download", "probe", "train", "upload", "merge", "score")


class Rounds:
    """The rounds of a run: `play(round)` takes the server from one state to the next.

    `model` is as the method prepared it, and is moved to `device`, if one is given; `parts` holds each
    client's examples, `make_batch` makes a batch of them; `broadcast` is the size of the pretrained model in
    bytes. `observe` returns what the linear layers are given on a number of calibration examples, for
    compressions that need it.
    """

    def __init__(
        self,
        method: Method,
        model: torch.nn.Module,
        parts: list[numpy.ndarray],
        make_batch: Callable[[numpy.ndarray], Batch],
        federation: FederationSettings,
        training: Training,
        seed: int,
        broadcast: int,
        observe: Callable[[int], dict[str, Inputs]] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.method, self.model, self.seed = method, model, seed
        self.parts, self.make_batch = parts, make_batch
        self.settings, self.training = federation, training
        method.training = training
        if federation.budgets and method.levels() > 1:
            method.level = budgets.fit(method, model, parts, make_batch, federation.budgets, training)
        self.parameters = dict(model.named_parameters())
        self._resident = Resident(self.parameters)
        stays = device is None or device.type == "cpu"
        initial = {name: _first_value(self.parameters[name], stays) for name in method.exchanged}
        if device is not None:
            model.to(device)
        self.device = next(iter(self.parameters.values())).device
        optimizer = federation.server_optimizer or method.server_optimizer
        self.server = Server(dict(initial), initial, optimizer=optimizer)
        method.kept = self.server.kept
        self.link = Link(method, self.server, model, seed, observe)
        self.ledger = Ledger(broadcast)
        self.instruments = Instruments()
        self.losses: list[tuple[float, int]] = []
        self.dropped: list[int] = []
        self.clock = dict.fromkeys(CLOCK, 0.0)
        self.flops = 0
        self.queries = 0
        self.cuda_peak = 0
        self._uploaded: weakref.ref[MutableMapping[str, Tensor]] | None = None  # the last one

    def play(self, round: int) -> list[int]:
        """Run the turns of the round's clients and merge their uploads; return the clients."""
        self.clock = dict.fromkeys(CLOCK, 0.0)
        self.losses, self.dropped = [], []
        clients = self.sample(round)
        for cohort in self.method.cohorts(clients, round):
            self._merge(cohort, round)
        return clients

    def sample(self, round: int) -> list[int]:
        """Return the clients that take part in a round, in ascending order."""
        count = max(1, nearest(self.settings.participation, len(self.parts)))
        stream = numpy_stream(self.seed, "sampling", round)
        return sorted(stream.choice(len(self.parts), count, replace=False).tolist())

    def answers(self, client: int, round: int) -> bool:
        """Return whether a sampled client sends its upload."""
        return numpy_stream(self.seed, "dropout", round, client).random() >= self.settings.dropout_rate

    def _merge(self, cohort: list[int], round: int) -> None:
        """Let the method merge a cohort; the time of the turns inside does not count as merging."""
        started, turns = time.perf_counter(), sum(self.clock.values())
        self.method.merge(self.server, self._uploads(cohort, round), round)
        try:
            self.link.merged(cohort)
            self._own_upload()
        except StorageError as error:
            raise failed(self.method, round, cohort, error) from error
        self.clock["merge"] += time.perf_counter() - started - (sum(self.clock.values()) - turns)

    def _uploads(self, cohort: list[int], round: int) -> Iterator[Upload]:
        """Yield the uploads of a cohort, running each client's turn when its upload is asked for."""
        for client in cohort:
            self._own_upload()
            try:
                with self.method.shaped(self.model, client):
                    upload = self._turn(client, round)
            except (TurnError, PayloadError, StorageError) as error:
                raise failed(self.method, round, [client], error) from error
            if upload:
                self.link.uploaded(client, upload.tensors)
                self._uploaded = weakref.ref(upload.tensors)
                yield upload
            # Nobody holds it any more but a method that needs it.
            if len(cohort) > 1:
                self.link.uploads_more()
            del upload

    def _own_upload(self) -> None:
        """Take an upload that is still in use out of the resident model, which is about to change."""
        upload = self._uploaded() if self._uploaded else None
        if isinstance(upload, Received):
            upload.own_all()

    def _turn(self, client: int, round: int) -> Upload | None:
        """Let one client download, train and upload."""
        self.instruments.level = self.method.level.get(client, 0)
        with self._timed("prune"):
            self.link.prune(client, round)
        with self._timed("download"):
            message = self.link.send(client, round)
            self.ledger.downloaded(client, len(message))
            received = self.method.rebuild(self.link.receive(client, message))
            self.load(received)
        if not self.answers(client, round):
            self.dropped.append(client)
            return None
        turn = self._make_turn(client, round, received)
        with self.link.depth(client, round) as self.instruments.dropped:
            segments = self.method.segments(client, round, turn.steps)
            with self._timed("probe"), self._isolated("probe", client, round):
                turn.probe(segments, self.method.train)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with self._timed("train"), self._isolated("dropout in layers", client, round):
                self.method.train(turn)
        self._resident.forget(name for segment in segments for name in segment.trainable)
        self.cuda_peak = max(self.cuda_peak, _cuda_peak(self.device))
        self.flops += turn.flops
        self.queries += turn.queries
        self.ledger.exchanged(client, turn.exchanged["down"], turn.exchanged["up"])
        if turn.flops:  # a turn may have nothing to do
            self.losses.append((turn.loss, len(self.parts[client])))
        with self._timed("upload"):
            outgoing = self._outgoing(turn)
            message = payload.encode(outgoing.sent, self.method.config.payload)
            self.ledger.uploaded(client, len(message))
            tensors = self.link.accept(client, message, outgoing.known)
            _require_finite(tensors.sent())
            turn.keep(outgoing.rest(tensors))
        self.server.kept[client] = turn.kept
        return Upload(client, len(self.parts[client]), tensors)

    def _outgoing(self, turn: Turn) -> Outgoing:
        received = {name: turn.received[name] for name in self.server.initial}
        reduction = self.method.config.upload_compression
        return Outgoing(self.method.upload(turn), received, turn.kept, reduction, self.seed)

    def _make_turn(self, client: int, round: int, received: dict[str, Tensor]) -> Turn:
        return Turn(
            self.model,
            self.training,
            steps_of_turn(self.parts[client], self.training, self.seed, round, client),
            self.make_batch,
            self.instruments,
            client=client,
            round=round,
            rounds=self.settings.rounds,
            received=received,
            kept=dict(self.server.kept.get(client, {})),
            moments=self.method.config.moments,
            precision=self.method.config.payload,
        )

    def load(self, values: dict[str, Tensor]) -> None:
        """Write values of parameters into the resident model; other messages are left out."""
        self._resident.load(values)

    def _isolated(self, purpose: str, client: int, round: int) -> AbstractContextManager[None]:
        return isolated(derive(self.seed, purpose, round, client))

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.clock[kind] += time.perf_counter() - started


def _cuda_peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def failed(method: Method, round: int, clients: list[int], error: Exception) -> FailedRun:
    """Return the failure of a run, which names the method, the round, and the clients if there are any."""
    where = f", client {clients[0]}" if len(clients) == 1 else ""
    if len(clients) > 1:
        where = f", clients {clients[0]} to {clients[-1]}"
    reason = f"{error.filename}: {error.strerror}" if isinstance(error, StorageError) else error
    kind = DivergedRun if isinstance(error, NotFiniteError) else FailedRun
    return kind(f"method {method.name}, round {round}{where}: {reason}")


def _require_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    # What was trained is on the device, what was only received on the CPU.
    largest: dict[torch.device, dict[str, Tensor]] = {}
    for name, value in tensors:
        if not value.is_meta and value.numel() and value.is_floating_point():
            # One pass without a temporary: NaN and infinity survive a maximum.
            largest.setdefault(value.device, {})[name] = torch.linalg.vector_norm(value, math.inf).double()
    for found in largest.values():
        # One transfer from the device for all.
        for name, number in zip(found, torch.stack([*found.values()]).tolist(), strict=True):
            if not math.isfinite(number):
                raise NotFiniteError(f"the update of {name} is not finite")


def _first_value(parameter: torch.nn.Parameter, stays: bool) -> Tensor:
    """Return a parameter's value as the server holds it: in float32, on the CPU, in memory of its own.

    Transformers maps weights from their file, which costs no memory. So it is the parameter that gets a copy,
    here where it `stays` on the CPU.
    """
    value = parameter.detach()
    if value.is_meta:
        return torch.empty(parameter.shape, dtype=torch.float32, device="meta")
    if value.device.type != "cpu" or value.dtype != torch.float32:
        return value.to("cpu", torch.float32, copy=True)
    if stays:
        parameter.data = value.clone()
    return value
