"""What a method costs, predicted without weights, data, GPU or network.

The method's own code runs without values, turn by turn: the same cohorts, payloads, caches, batches and steps
as in a real run. Each kind of training step is then done once on fake tensors. Bytes and FLOPs are
exactly those of a real run's record, peak memory is within one percent (in fact nearly to the byte).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch
from torch import Tensor

from fedlm.base.errors import UserError
from fedlm.data.task import Kind
from fedlm.exchange import payload
from fedlm.federation.frozen import first_visits
from fedlm.federation.method import Method
from fedlm.federation.optimizer import state_of
from fedlm.federation.passes import Batch, Channel, PartPass, Pass, Step, precision, upward
from fedlm.federation.rounds import Rounds
from fedlm.federation.settings import Federation as FederationConfig
from fedlm.federation.settings import Training
from fedlm.federation.state import Segment
from fedlm.federation.turn import CORRECTION, Doors, Turn, TurnError
from fedlm.measure.flops import flop_counter
from fedlm.measure.instruments import Instruments
from fedlm.measure.memory import KINDS, Memory, older_objects_set_aside
from fedlm.models.config import ModelConfig
from fedlm.models.fake import fake_model
from fedlm.models.parts import Parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAIN, FORWARD = (True, False, False), (False, False, False)  # kinds of passes: with and without a way back
LEAST_POSITIONS = 3  # first, second and last: FLOPs are linear in the position from the second block on


@dataclass(frozen=True)
class Costs:
    """What one run costs.

    `broadcast_bytes` is the pretrained model, sent to each client once; `download_bytes` and `upload_bytes`
    are of the whole run, as are `flops` and `queries`. `turns` counts the turns, `answered` those that
    ended in an upload. `memory` is that of a turn by the segment that it trains ("all", "block 3"). Segments
    in `interpolated` were not measured: they are between equal blocks that were. `kept_bytes` is what all
    clients together keep after the run, `server_bytes` what the server holds then besides the parameters. In
    `alike`, segments that differ only in their position have the same number. `cohorts` are the sizes of the
    last round's cohorts, `models` is how many models are scored in the end.
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
    server_bytes: int
    flops: int
    queries: int
    memory: dict[str, Memory]
    interpolated: tuple[str, ...]
    alike: dict[str, int]
    cohorts: tuple[int, ...]
    models: int

    @property
    def peak(self) -> Memory:
        """The memory of the turn with the highest peak."""
        return max(self.memory.values(), key=lambda memory: memory.peak)


class _Work(NamedTuple):
    """Training of the same cost wherever it occurs.

    `what` is a segment's label, or a kind of work with the client's level and a batch's shapes.
    """

    trainable: tuple[str, ...]
    dropped: tuple[int, ...]
    what: Any


class _Instance(NamedTuple):
    """The first occurrence of some work: enough to do it once."""

    turn: _RecordedTurn
    segment: Segment
    step: Step


class _RecordedTurn(Turn):
    """A turn that records its work instead of doing it; the work is done once for all equal turns."""

    def __init__(self, work: _Recorded, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._work = work
        self._kept_before = dict(self.kept)
        self._exchanges = False

    def probe(self, segments: Sequence[Segment], train: Callable[[Turn], None]) -> None:
        for segment in segments:
            if self._plan and segment.steps and (segment.trainable or segment.forward_only):
                step = self.largest_step()
                self._work.probe(_Instance(self, segment, step), self.size(step))

    def _fit(self, segment: Segment, doors: Doors) -> None:
        if not segment.trainable or not segment.steps:
            return
        plan = self._plan[self._done : self._done + segment.steps]
        if segment.stored:
            for indices in first_visits(plan):
                self._record(segment, [indices], FORWARD)
        for step in plan:
            self._record(segment, step, (True, doors.term is not None, doors.output_term is not None))
            if doors.correct is not None:
                self._work.work(_Instance(self, segment, step), {}, CORRECTION)
            self._done += 1
        if self.moments != "reset":
            moments = state_of(segment.trainable, self._parameters, self.settings)
            (self.kept if self.moments == "client" else self._values).update(moments)

    def evaluate(self, segment: Segment, values: dict[str, Tensor] | None = None, begin: int = 0) -> float:
        for step in self._plan[begin : begin + segment.steps]:
            self._record(segment, step, FORWARD)
            self.queries += len(step)
        return 0.0

    @contextmanager
    def exchange(self, module: str, channel: Channel | None = None) -> Iterator[None]:
        self._exchanges = True
        try:
            yield
        finally:
            self._exchanges = False

    def gradient_norms(self, segment: Segment) -> dict[str, float]:
        for step in self._plan[:1]:
            self._record(segment, step[:1])
        return {}

    def _record(self, segment: Segment, step: Step, kind: tuple[bool, bool, bool] = PLAIN) -> None:
        for indices in step:
            batch = self._make_batch(indices)
            self._work.work(_Instance(self, segment, [indices]), batch, kind)
            if self._exchanges:
                model: Any = self.model
                shape = (*batch["input_ids"].shape, model.config.hidden_size)
                activation = torch.empty(shape, device="meta")
                self.exchanged["up"] += payload.size(upward(activation, batch), self.precision)
                self.exchanged["down"] += kind[0] * payload.size({"gradient": activation}, self.precision)

    def again(self) -> dict[str, Any]:
        """Return the arguments of a turn that can do the recorded work, on tensors of the current mode."""
        values = {"received": _empty(self.received), "kept": _empty(self._kept_before)}
        return {**self.arguments(), **values}


class _DoorsTurn(Turn):
    """A turn that does, and counts, what a method adds to one pass or to one update of a segment."""

    def __init__(self, instance: _Instance, kind: Hashable, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._instance, self._kind = instance, kind

    def _fit(self, segment: Segment, doors: Doors) -> None:
        if not self.flops and segment.trainable == self._instance.segment.trainable:
            self._freeze_all_but(segment)
            self._add(doors, {name: self._parameters[name] for name in segment.trainable})
        self._done += segment.steps

    def evaluate(self, segment: Segment, values: dict[str, Tensor] | None = None, begin: int = 0) -> float:
        return 0.0

    def gradient_norms(self, segment: Segment) -> dict[str, float]:
        return {}

    def each_step(self) -> range:
        return range(0)

    def _add(self, doors: Doors, trained: dict[str, Tensor]) -> None:
        batch = self._make_batch(self._instance.step[0])
        with torch.no_grad():
            outputs = self.model(**batch) if doors.output_term else {}
        for name, value in outputs.items():
            if isinstance(value, Tensor):
                outputs[name] = value.requires_grad_()
        with flop_counter() as counter:
            if self._kind == CORRECTION:
                assert doors.correct is not None
                with torch.no_grad():
                    for name, value in trained.items():
                        doors.correct(name, torch.zeros_like(value, dtype=torch.float32))
            else:
                terms = [doors.term(trained)] if doors.term else []
                if doors.output_term:
                    with precision(batch, self.settings):
                        terms.append(doors.output_term(batch, outputs))
                for term in terms:
                    if term.requires_grad:
                        term.backward()
        self.flops = counter.get_total_flops()


class _Recorded:
    """The work of a run: how often each pass is done, and the largest step of each segment."""

    def __init__(self, instruments: Instruments) -> None:
        self.instruments = instruments
        self.count: dict[_Work, int] = defaultdict(int)
        self.where: dict[_Work, _Instance] = {}
        self.largest: dict[_Work, tuple[int, _Instance]] = {}

    def probe(self, instance: _Instance, tokens: int) -> None:
        """Record a step of `tokens` tokens if it is the largest of its segment so far."""
        work = _Work(tuple(instance.segment.trainable), self.instruments.dropped, instance.segment.label)
        if tokens > self.largest.get(work, (0,))[0]:
            self.largest[work] = tokens, instance

    def work(self, instance: _Instance, batch: Batch, kind: Hashable) -> None:
        """Record a pass over one batch, or a correction."""
        shapes = (
            kind,
            self.instruments.level,
            *((name, tuple(one.shape)) for name, one in batch.items()),
        )
        work = _Work(tuple(instance.segment.trainable), self.instruments.dropped, shapes)
        self.count[work] += 1
        self.where.setdefault(work, instance)


class _Rehearsal(Rounds):
    """The rounds of a run on a model without values: everything happens but the work of the turns."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.work = _Recorded(self.instruments)
        self.in_parts = Parts(self.model)
        self.cohorts: list[int] = []  # the sizes of those of the current round

    def _merge(self, cohort: list[int], round: int) -> None:
        self.cohorts.append(len(cohort))
        super()._merge(cohort, round)

    def _make_turn(self, client: int, round: int, received: dict[str, Tensor]) -> Turn:
        return _RecordedTurn(self.work, **super()._make_turn(client, round, received).arguments())

    def run(self) -> None:
        """Play all rounds; afterwards the ledger and the record of the work are filled."""
        for round in range(1, self.settings.rounds + 1):
            self.cohorts = []
            self.play(round)

    def memory_of(self, instance: _Instance) -> Memory:
        """Do an instance's step on fake tensors and return its memory."""
        self.instruments.memory.clear()
        self.instruments.largest.clear()
        turn, segment = instance.turn, instance.segment
        with self._copy_of(turn):
            Turn(**turn.again()).probe([segment], self.method.train)
        return self.instruments.memory[segment.label]

    def flops_of(self, instance: _Instance, kind: Any) -> int:
        """Return the FLOPs of work of a kind: those of the pass, and those that the method adds to it."""
        if kind == CORRECTION:
            return self._flops_of_doors(instance, kind)
        backward, *added = kind
        found = self._flops_of_pass(instance, backward)
        return found + self._flops_of_doors(instance, kind) if any(added) else found

    def _flops_of_doors(self, instance: _Instance, kind: Hashable) -> int:
        turn = instance.turn
        with self._copy_of(turn):
            adding = _DoorsTurn(instance, kind, **turn.again())
            self.method.train(adding)
            self.model.zero_grad()
        return adding.flops

    def _flops_of_pass(self, instance: _Instance, backward: bool) -> int:
        """Return the FLOPs of a pass, done on fake tensors unless an equal one was done before."""
        turn, trained = instance.turn, set(instance.segment.trainable)
        with self._copy_of(turn):
            self.model.train(backward)
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in trained)
            batch = self.make_batch(instance.step[0])
            segment, again = instance.segment, 0
            begin: Callable[[], AbstractContextManager] = nullcontext
            if segment.frozen:
                hidden, flops = self._through_frozen(segment, batch)
                if not backward:
                    return flops
                begin = partial(self.in_parts.behind, len(segment.frozen), hidden)
                again = 0 if segment.stored else flops
            work = Pass(self.model, batch, self.training, backward=backward, begin=begin)
            found = self.instruments.flops_of(segment.trainable, batch, work, work.kind)
            self.model.zero_grad()
        return found + again

    @contextmanager
    def _copy_of(self, turn: Turn) -> Iterator[None]:
        """Let the model be the copy of a turn's client."""
        self.instruments.level = self.method.level.get(turn.client, 0)
        with (
            self.method.shaped(self.model, turn.client),
            self.link.depth(turn.client, turn.round) as self.instruments.dropped,
        ):
            yield

    def _through_frozen(self, segment: Segment, batch: Batch) -> tuple[Tensor, int]:
        """Return what comes out of a segment's frozen parts for a batch, and their FLOPs."""
        last = len(segment.frozen) - 1
        steps = [(part, part) for part in range(last + 1)] if segment.stored else [(0, last)]
        hidden, total = None, 0
        for first, then in steps:
            work = PartPass(self.in_parts, first, then, batch, self.training, hidden)
            hidden, flops = self.instruments.count([work.name], batch, work, work.kind)
            total += flops
        assert hidden is not None
        return hidden, total

    def kept_bytes(self) -> int:
        """Return the bytes of all that clients keep; a version that several clients have is stored once."""
        own = sum(value.nbytes for kept in self.server.kept.values() for value in kept.values())
        seen = {(name, version) for has in self.link.seen.values() for name, (version, _) in has.items()}
        initial = self.server.initial
        return own + sum(initial[name].nbytes for name, version in seen if version and name in initial)

    def server_bytes(self) -> int:
        """Return the bytes of the method's own state and of the server optimizer's."""
        states = [self.server.state, *self.server.moments.values()]
        return sum(value.nbytes for state in states for value in state.values())


def _empty(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty(value.shape, dtype=value.dtype) for name, value in tensors.items()}


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
        parts: who holds which examples, one array per client; only their numbers matter.
        batches: makes a batch of examples, of which only shapes matter, with a `size` in tokens.
        positions: at how many positions of equal blocks to measure a step (at least 3: the first two and
            the last); between them costs are interpolated. None measures all.

    Raises:
        UserError: the model cannot be found, or the method does not suit it or cannot train.
    """
    parts = method.population(parts)

    parameters = 0
    rehearsals: list[_Rehearsal] = []

    def rehearse(pretrained: PreTrainedModel) -> torch.nn.Module:
        nonlocal parameters
        parameters = sum(parameter.numel() for parameter in pretrained.parameters())
        broadcast = payload.size(dict(pretrained.named_parameters()), method.config.payload)
        built = method.prepare(pretrained, kind)
        run = _Rehearsal(method, built, parts, batches, federation, training, method.seed, broadcast)
        # The rounds run before the model becomes fake, since fake tensors are many times slower.
        run.run()
        rehearsals.append(run)
        return built

    try:
        with fake_model(model, kind, num_labels, rehearse), older_objects_set_aside():
            (run,) = rehearsals
            recorded = run.work
            instances = {work: instance for work, (_, instance) in recorded.largest.items()}
            memory = _measure(instances, lambda work, one: asdict(run.memory_of(one)), positions)
            flops = _measure(
                recorded.where, lambda work, one: {"flops": run.flops_of(one, work.what[0])}, positions
            )
    except TurnError as error:
        raise UserError(f"method {method.name}: {error}") from error
    by_label: dict[str, Memory] = {}
    for work, found in memory.items():
        kinds = {name: round(found[name]) for name in KINDS}
        peak = Memory(peak=sum(kinds.values()), **kinds)
        if work.what not in by_label or peak.peak > by_label[work.what].peak:
            by_label[work.what] = peak
    exchanged = run.server.initial
    groups = {work.what: _place(work, instance)[0] for work, instance in instances.items()}
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups.values()))}
    return Costs(
        parameters=parameters,
        exchanged=sum(value.numel() for value in exchanged.values()),
        exchanged_bytes=payload.size(exchanged),
        broadcast_bytes=run.ledger.broadcast_size,
        download_bytes=run.ledger.download,
        upload_bytes=run.ledger.upload,
        turns=run.ledger.downloads,
        answered=run.ledger.uploads,
        kept_bytes=run.kept_bytes(),
        server_bytes=run.server_bytes(),
        flops=sum(round(flops[work]["flops"]) * count for work, count in recorded.count.items()),
        memory=by_label,
        interpolated=tuple(
            dict.fromkeys(work.what for work, found in memory.items() if found.get("interpolated"))
        ),
        alike={label: numbers[group] for label, group in groups.items()},
        cohorts=tuple(run.cohorts),
        models=sum(1 for _ in method.models(run.server)),
        queries=run.queries,
    )


def _measure(
    instances: dict[_Work, _Instance],
    measure: Callable[[_Work, _Instance], dict[str, Any]],
    positions: int | None,
) -> dict[_Work, dict[str, Any]]:
    """Return what each work costs; of works that differ only in position, some are interpolated."""
    if positions is None:
        return {work: measure(work, instance) for work, instance in instances.items()}
    groups: dict[Hashable, dict[int, list[_Work]]] = defaultdict(lambda: defaultdict(list))
    for work in instances:
        key, position = _place(work, instances[work])
        groups[key][position].append(work)
    found = {}
    for places in groups.values():
        there = sorted(places)
        chosen = _spread(there, max(positions, LEAST_POSITIONS))
        measured = {place: measure(places[place][0], instances[places[place][0]]) for place in chosen}
        for place, works in places.items():
            for number, work in enumerate(works):
                if place in measured:
                    found[work] = measured[place] | {"interpolated": number > 0}
                else:
                    found[work] = _between(measured, place) | {"interpolated": True}
    return found


def _spread(there: list[int], count: int) -> list[int]:
    """Return about `count` of the positions: the first two, the last, and some evenly spaced between."""
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


def _place(work: _Work, instance: _Instance) -> tuple[Hashable, int]:
    """Return what work has in common with that at other layers, and the lowest layer that it trains.

    A turn's cost follows from how far down the backward pass goes, how much is trained there, and how many
    layers there are; layers that the client's copy lacks do not count.
    """
    numbers = [int(number) for name in work.trainable for number in _LAYER.findall(name)]
    lowest = min(numbers, default=0)
    names = tuple(sorted(_LAYER.sub("*", name) for name in work.trainable))
    label = "" if work.what == instance.segment.label else work.what
    kind = names, len(work.dropped), label, instance.segment.forward_only
    return kind, lowest - sum(layer < lowest for layer in work.dropped)


_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
