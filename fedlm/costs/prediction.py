"""What a method costs, foretold without weights, data, GPU or network.

The method's own code runs without values, turn by turn: the same cohorts, payloads, caches, batches and steps
as in a real run. Each kind of training step is then done once on fake tensors. Bytes and FLOPs come out
exactly as a record would state them, peak memory to within a percent (in fact nearly to the byte).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from fedlm.data.task import Kind
from fedlm.exchange import payload
from fedlm.federation.link import Link
from fedlm.federation.loop import Federation
from fedlm.federation.method import Method, Segment, Server, Upload
from fedlm.federation.optimizer import state_of
from fedlm.federation.settings import Federation as FederationConfig
from fedlm.federation.settings import Training
from fedlm.federation.turn import Batch, ForwardBackward, Step, Turn, steps_of_turn
from fedlm.measure.instruments import Instruments
from fedlm.measure.ledger import Ledger
from fedlm.measure.memory import KINDS, Memory, older_objects_set_aside
from fedlm.models.config import ModelConfig
from fedlm.models.fake import fake_model

LEAST_POSITIONS = 3  # first, second and last: FLOPs are linear in the position from the second block on


@dataclass(frozen=True)
class Costs:
    """What one run costs.

    `broadcast_bytes` is the pretrained model, sent to each client once; `download_bytes` and `upload_bytes`
    are of the whole run, as are `flops`. `turns` counts the turns, `answered` those that ended in an upload.
    `memory` is that of a turn by the segment that it trains ("all", "block 3"). Segments in `interpolated`
    were not done: they lie between alike blocks that were. `kept_bytes` is what all clients together keep
    after the run. In `alike`, segments that differ in their position only have the same number.
    """

    parameters: int
    exchanged: int
    exchanged_bytes: int
    broadcast_bytes: int
    download_bytes: int
    upload_bytes: int
    turns: int
    answered: int
    kept_bytes: int
    flops: int
    memory: dict[str, Memory]
    interpolated: tuple[str, ...]
    alike: dict[str, int]

    @property
    def peak(self) -> Memory:
        """The memory of the turn with the highest peak."""
        return max(self.memory.values(), key=lambda memory: memory.peak)


class StatedBatches:
    """Batches of a stated length; what is in them does not matter.

    `length` counts tokens, `two_kinds` says whether the model tells first from second sentences.
    """

    def __init__(self, kind: Kind, length: int, two_kinds: bool = False) -> None:
        self.kind, self.length, self.two_kinds = kind, length, two_kinds

    def size(self, indices: numpy.ndarray) -> int:
        """Return the tokens of a batch."""
        return len(indices) * self.length

    def __call__(self, indices: numpy.ndarray) -> Batch:
        examples = len(indices)

        def whole(*shape: int) -> Tensor:
            return torch.ones(shape, dtype=torch.long)

        batch = {"input_ids": whole(examples, self.length), "attention_mask": whole(examples, self.length)}
        if self.two_kinds:
            batch["token_type_ids"] = whole(examples, self.length)
        if self.kind == "causal":
            batch["labels"] = whole(examples, self.length)
        elif self.kind == "question_answering":
            batch |= {"start_positions": whole(examples), "end_positions": whole(examples)}
        else:
            batch["labels"] = whole(examples) if self.kind == "classification" else torch.ones(examples)
        return batch


class _Work(NamedTuple):
    """Training that costs the same, wherever it occurs: `what` is a batch's shapes, or a segment's label."""

    trainable: tuple[str, ...]
    dropped: tuple[int, ...]
    what: Any


class _Occasion(NamedTuple):
    """Where work was met first: enough to do it once."""

    client: int
    round: int
    segment: Segment
    step: Step


class _FakeTurn(Turn):
    """A turn on fake tensors: labels cannot be counted, so each forward pass weighs the same."""

    @staticmethod
    def _targets(batch: Batch) -> int:
        return 1

    def _make_state(self, step, optimizer, segment) -> None:
        for parameter in optimizer.parameters.values():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step(1.0)

    def _probed_step(self, step, optimizer, segment) -> None:
        # FLOPs are counted on the way, unless layers are computed again: the counter keeps their insides.
        again = any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
        self._step(step, optimizer, None if again else segment)

    def count_flops(self, segment: Segment, step: Step) -> int:
        """Return the FLOPs of a forward and backward pass."""
        trained = set(segment.trainable)
        self.model.train()
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(name in trained)
        batch = self._make_batch(step[0])
        work = ForwardBackward(self.model, batch, self.settings, 1.0)
        flops = self._instruments.flops_of(segment, batch, work)
        self.model.zero_grad()
        return flops


class _RehearsedTurn(_FakeTurn):
    """A turn that notes what it would do; the work itself is done once for all turns alike."""

    def __init__(self, book: _Book, *args, **options) -> None:
        super().__init__(*args, **options)
        self._book = book

    def probe(self, segment: Segment, step: Step | None = None) -> None:
        if segment.trainable and self._plan:
            step = step or self._largest()
            self._book.probe(_Occasion(self.client, self.round, segment, step), self._shape(step))

    def fit(self, segment: Segment) -> None:
        if not segment.trainable or not segment.steps:
            return
        for step in self._plan[self._done : self._done + segment.steps]:
            for indices in step:
                self._book.passes(_Occasion(self.client, self.round, segment, [indices]), self._make_batch)
            self._done += 1
        if self.moments != "reset":
            moments = state_of(segment.trainable, self._parameters, self.settings)
            (self.kept if self.moments == "client" else self._values).update(moments)

    def keep(self, values: dict[str, Tensor]) -> None:
        self.kept.update(values)


class _Book:
    """The work of a run: how often each forward pass is done, and the largest step of each segment."""

    def __init__(self, instruments: Instruments) -> None:
        self.instruments = instruments
        self.count: dict[_Work, int] = defaultdict(int)
        self.where: dict[_Work, _Occasion] = {}
        self.largest: dict[_Work, tuple[int, _Occasion]] = {}

    def probe(self, occasion: _Occasion, elements: int) -> None:
        """Note a step of so many elements if it is the largest of its segment so far."""
        work = _Work(tuple(occasion.segment.trainable), self.instruments.dropped, occasion.segment.label)
        if elements > self.largest.get(work, (0,))[0]:
            self.largest[work] = elements, occasion

    def passes(self, occasion: _Occasion, make_batch: Callable[[numpy.ndarray], Batch]) -> None:
        """Note a forward and backward pass."""
        batch = make_batch(occasion.step[0])
        shapes = tuple((name, tuple(value.shape)) for name, value in batch.items())
        work = _Work(tuple(occasion.segment.trainable), self.instruments.dropped, shapes)
        self.count[work] += 1
        self.where.setdefault(work, occasion)


class _Rehearsal(Federation):
    """A federation without values: everything happens but training and scoring."""

    def __init__(
        self,
        method: Method,
        model: torch.nn.Module,
        broadcast: int,
        parts: list[numpy.ndarray],
        batches: Callable[[numpy.ndarray], Batch],
        federation: FederationConfig,
        training: Training,
    ) -> None:
        self.method, self.model, self.seed = method, model, method.seed
        self.settings, self.training, self.batches = federation, training, batches
        self.device = torch.device("cpu")
        self.parts = parts
        parameters = dict(model.named_parameters())
        initial = {name: _like(parameters[name]) for name in method.exchanged}
        self.server = Server(dict(initial), initial)
        self.ledger = Ledger(broadcast)
        self.instruments = Instruments()
        self.link = Link(self)
        self.book = _Book(self.instruments)
        self.clock: dict[str, float] = defaultdict(float)
        self.turns = self.answered = 0

    def run(self) -> None:
        """Let all turns of all rounds pass; afterwards the ledger and the book are filled."""
        for round in range(1, self.settings.rounds + 1):
            for cohort in self.method.cohorts(self.sample(round), round):
                self._merge(cohort, round)

    def memory(self, occasion: _Occasion) -> Memory:
        """Do the step of an occasion on fake tensors and return its memory."""
        self.instruments.memory.clear()
        self.instruments.largest.clear()
        with self.link.depth(occasion.client, occasion.round):
            self._fake_turn(occasion).probe(occasion.segment)
        return self.instruments.memory[occasion.segment.label]

    def flops(self, occasion: _Occasion) -> int:
        """Return the FLOPs of an occasion, done on fake tensors if none like it was done before."""
        with self.link.depth(occasion.client, occasion.round):
            return self._fake_turn(occasion).count_flops(occasion.segment, occasion.step)

    def kept_bytes(self) -> int:
        """Return the bytes of all that clients keep; what several have in the same version is held once."""
        own = sum(value.nbytes for kept in self.server.kept.values() for value in kept.values())
        seen = {(name, version) for books in self.link.seen.values() for name, (version, _) in books.items()}
        initial = self.server.initial
        return own + sum(initial[name].nbytes for name, version in seen if version and name in initial)

    def _fake_turn(self, occasion: _Occasion) -> _FakeTurn:
        return _FakeTurn(self.model, self.training, [occasion.step], self.batches, self.instruments)

    def _turn(self, client: int, round: int) -> Upload | None:
        self.turns += 1
        precision = self.method.config.payload
        sent = self.link.plan(client, round, values=False)
        self.link.note(client, sent)
        self.ledger.downloaded(client, payload.size(sent, precision))
        if not self.answers(client, round):
            return None
        self.answered += 1
        self.instruments.dropped = tuple(self.link.dropped(client, round))
        turn = _RehearsedTurn(
            self.book,
            self.model,
            self.training,
            steps_of_turn(self.parts[client], self.training, self.seed, round, client),
            self.batches,
            self.instruments,
            client=client,
            round=round,
            rounds=self.settings.rounds,
            kept=self.server.kept.setdefault(client, {}),
            moments=self.method.config.moments,
        )
        for segment in self.method.segments(client, round, turn.steps):
            turn.probe(segment)
        self.method.train(turn)
        upload = self.method.upload(turn)
        self.ledger.uploaded(client, payload.size(upload, precision))
        tensors = {name: _like(value) for name, value in upload.items()}
        self.link.uploaded(client, tensors)
        if not turn.kept:
            del self.server.kept[client]
        return Upload(client, len(self.parts[client]), tensors)


def predict(
    method: Method,
    model: ModelConfig,
    kind: Kind,
    num_labels: int,
    parts: list[numpy.ndarray],
    batches: Callable[[numpy.ndarray], Batch],
    federation: FederationConfig,
    training: Training,
    positions: int | None = None,
) -> Costs:
    """Return what a run would cost.

    Args:
        method: not yet prepared.
        parts: who holds which examples, one array a client; what matters is how many.
        batches: makes a batch of examples, of which only shapes matter, with a `size` in tokens.
        positions: of alike blocks, at how many positions to do a step (at least 3: the first two and the
            last); between them costs are interpolated. None does all.

    Raises:
        UserError: the model cannot be found, or the method does not suit it.
    """
    parts = method.population(parts)

    def rehearse(built: torch.nn.Module) -> torch.nn.Module:
        nonlocal run, parameters
        parameters = sum(parameter.numel() for parameter in built.parameters())
        broadcast = payload.size(dict(built.named_parameters()), method.config.payload)
        built = method.prepare(built, kind)
        run = _Rehearsal(method, built, broadcast, parts, batches, federation, training)
        # The rounds pass before the model becomes a fake one, which is many times slower.
        run.run()
        return built

    run, parameters = None, 0
    with fake_model(model, kind, num_labels, rehearse), older_objects_set_aside():
        book = run.book
        occasions = {work: occasion for work, (_, occasion) in book.largest.items()}
        memory = _measure(occasions, lambda one: asdict(run.memory(one)), positions)
        flops = _measure(book.where, lambda one: {"flops": run.flops(one)}, positions)
    by_label: dict[str, Memory] = {}
    for work, found in memory.items():
        kinds = {name: round(found[name]) for name in KINDS}
        peak = Memory(peak=sum(kinds.values()), **kinds)
        if work.what not in by_label or peak.peak > by_label[work.what].peak:
            by_label[work.what] = peak
    exchanged = run.server.initial
    groups = {work.what: _place(work, occasion)[0] for work, occasion in occasions.items()}
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups.values()))}
    return Costs(
        parameters=parameters,
        exchanged=sum(value.numel() for value in exchanged.values()),
        exchanged_bytes=payload.size(exchanged),
        broadcast_bytes=run.ledger.broadcast_size,
        download_bytes=run.ledger.download,
        upload_bytes=run.ledger.upload,
        turns=run.turns,
        answered=run.answered,
        kept_bytes=run.kept_bytes(),
        flops=sum(round(flops[work]["flops"]) * count for work, count in book.count.items()),
        memory=by_label,
        interpolated=tuple(
            dict.fromkeys(work.what for work, found in memory.items() if found.get("interpolated"))
        ),
        alike={label: numbers[group] for label, group in groups.items()},
    )


def _measure(
    occasions: dict[_Work, _Occasion], measure: Callable[[_Occasion], dict[str, Any]], positions: int | None
) -> dict[_Work, dict[str, Any]]:
    """Return what each work costs; of works that differ in position only, measured at some positions."""
    if positions is None:
        return {work: measure(occasion) for work, occasion in occasions.items()}
    alike: dict[Hashable, dict[int, list[_Work]]] = defaultdict(lambda: defaultdict(list))
    for work in occasions:
        key, position = _place(work, occasions[work])
        alike[key][position].append(work)
    found = {}
    for places in alike.values():
        there = sorted(places)
        chosen = _spread(there, max(positions, LEAST_POSITIONS))
        measured = {place: measure(occasions[places[place][0]]) for place in chosen}
        for place, works in places.items():
            for number, work in enumerate(works):
                if place in measured:
                    found[work] = measured[place] | {"interpolated": number > 0}
                else:
                    found[work] = _between(measured, place) | {"interpolated": True}
    return found


def _spread(there: list[int], count: int) -> list[int]:
    """Return about `count` of the positions: the first two, the last, and evenly between."""
    if len(there) <= count:
        return there
    steps = numpy.linspace(1, len(there) - 1, count - 1)
    return [there[0], *(there[round(step)] for step in steps)]


def _between(measured: dict[int, dict[str, Any]], place: int) -> dict[str, Any]:
    places = sorted(measured)
    return {
        name: float(numpy.interp(place, places, [measured[one][name] for one in places]))
        for name in measured[places[0]]
    }


def _place(work: _Work, occasion: _Occasion) -> tuple[Hashable, int]:
    """Return what work has in common with that at other layers, and the lowest layer that it trains.

    A turn's cost follows from how far down the backward pass goes, how much is trained there, and how many
    layers there are; layers that the client's copy lacks do not count.
    """
    numbers = [int(number) for name in work.trainable for number in _LAYER.findall(name)]
    lowest = min(numbers, default=0)
    names = tuple(sorted(_LAYER.sub("*", name) for name in work.trainable))
    label = "" if work.what == occasion.segment.label else work.what
    return (names, len(work.dropped), label), lowest - sum(layer < lowest for layer in work.dropped)


_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def _like(tensor: Tensor) -> Tensor:
    """Return a tensor without values as the server holds it: a new one, in float32."""
    kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=kind, device="meta")
