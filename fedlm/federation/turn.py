"""A client's turn: training steps, and forward passes that only evaluate.

The same code serves a real turn, the probe of its memory, and the prediction of costs on tensors without
values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.nn import Module

from fedlm.base import staging
from fedlm.base.randomness import numpy_stream
from fedlm.exchange import payload
from fedlm.exchange.declared import Way
from fedlm.federation.frozen import Frozen, ProbedFrozen
from fedlm.federation.optimizer import Correction, LocalOptimizer, rate_factor
from fedlm.federation.passes import (
    Batch,
    Channel,
    Crossing,
    OutputTerm,
    PartPass,
    Pass,
    Step,
    Term,
    targets,
    upward,
)
from fedlm.federation.settings import Training
from fedlm.federation.state import Segment
from fedlm.measure.instruments import Instruments
from fedlm.measure.memory import MemoryTracker

CORRECTION = "correction"  # the kind of work, for the count of FLOPs


class TurnError(Exception):
    """A turn that cannot be used, for example since a correction has a wrong shape."""


class NotFiniteError(TurnError):
    """A loss or an update that is not finite."""


class Doors(NamedTuple):
    """What a method adds to its clients' training (see `Turn.fit`)."""

    term: Term | None = None
    correct: Correction | None = None
    output_term: OutputTerm | None = None


def steps_of_turn(
    indices: numpy.ndarray, settings: Training, seed: int, round: int, client: int
) -> list[Step]:
    """Return the turn's optimizer steps, in order.

    Each epoch is a new permutation of the client's examples, drawn from (seed, "batches", round, client):
    the same for every method.
    """
    stream = numpy_stream(seed, "batches", round, client)
    steps: list[Step] = []
    epoch = 0
    while len(steps) < settings.local_steps if settings.local_steps else epoch < settings.local_epochs:
        order = stream.permutation(indices)
        passes = [order[i : i + settings.batch_size] for i in range(0, len(order), settings.batch_size)]
        steps += [passes[i : i + settings.accumulation] for i in range(0, len(passes), settings.accumulation)]
        epoch += 1
    return steps[: settings.local_steps]


class Turn:
    """One client's turn, as a method sees it.

    Attributes: `client`, `round` (from 1); `steps` is the number of optimizer steps; `model` is the client's
    working copy; `received` the values it started from, which must not be written to; `kept` what the client
    keeps for its next turn (see `keep`); `loss` the mean loss over the turn's steps; `losses` that of each
    step that `fit` has made, as () float32, where it makes them all; `total_rate` the sum of the learning
    rates of the steps so far; `queries` the number of passes that only evaluated (see `evaluate`); `results`
    what `train` leaves for `upload`; `exchanged` the bytes of the messages within the turn, by direction (see
    `exchange`).
    """

    def __init__(
        self,
        model: Module,
        settings: Training,
        plan: list[Step],
        make_batch: Callable[[numpy.ndarray], Batch],
        instruments: Instruments,
        client: int = 0,
        round: int = 1,
        rounds: int = 1,
        received: dict[str, Tensor] | None = None,
        kept: dict[str, Tensor] | None = None,
        moments: str = "reset",
        precision: str = "float32",
    ) -> None:
        self.model = model
        self.settings = settings
        self.client, self.round, self.rounds = client, round, rounds
        self.received = received or {}
        self.kept = {} if kept is None else kept
        self.moments, self.precision = moments, precision
        self.loss = 0.0
        self.losses: list[Tensor] = []
        self.flops = 0
        self.queries = 0
        self.total_rate = 0.0
        self.results: dict[str, Tensor] = {}
        self.exchanged: dict[Way, int] = {"down": 0, "up": 0}
        self._plan = plan
        self._make_batch = make_batch
        self._instruments = instruments
        self._done = 0
        self._passes = 0
        self._batch: Batch = {}
        self._crossed: dict[Way, int] = {}  # in each direction, the last pass whose message was counted
        self._values: dict[str, Tensor] = {}
        self._parameters = dict(model.named_parameters())
        self._frozen = Frozen(model, self._parameters, make_batch, settings)

    def arguments(self) -> dict[str, Any]:
        """Return what this turn was made of, for another turn of the same work."""
        return {
            "model": self.model,
            "settings": self.settings,
            "plan": self._plan,
            "make_batch": self._make_batch,
            "instruments": self._instruments,
            "client": self.client,
            "round": self.round,
            "rounds": self.rounds,
            "received": self.received,
            "kept": self.kept,
            "moments": self.moments,
            "precision": self.precision,
        }

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the turn."""
        return len(self._plan)

    @property
    def examples(self) -> int:
        """Number of examples in the turn's steps, repeated ones included."""
        return sum(len(indices) for step in self._plan for indices in step)

    def values(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the current values of parameters, in float32 where the client trained a float32 copy.

        With moments handed on, the optimizer's state of these parameters comes with them.
        """
        values = {name: self._values.get(name, self._parameters[name]).detach() for name in names}
        if self.moments == "handed_on":
            handed = {name: value for name, value in self._values.items() if name.partition("@")[0] in values}
            values = {**handed, **values}
        return values

    def copies(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return copies of the current values, in float32 on the model's device: the method's own memory.

        Where weights are stored in half precision and were not trained yet, those are the values received.
        """
        found = {}
        for name in names:
            parameter = self._parameters[name]
            rounded = parameter.dtype != torch.float32 and name in self.received
            found[name] = self._values.get(name, self.received[name] if rounded else parameter)
        return staging.copies(found, next(iter(self._parameters.values())).device, torch.float32)

    def keep(self, values: dict[str, Tensor]) -> None:
        """Let the client keep copies of these values for its next turn."""
        self.kept.update(snapshots(values))

    def fit(
        self,
        segment: Segment,
        term: Term | None = None,
        correct: Correction | None = None,
        output_term: OutputTerm | None = None,
    ) -> None:
        """Train the segment's parameters for its number of steps; freeze all others.

        `term` takes the trained parameters by name and returns a scalar that is added to the loss, once an
        optimizer step. So does `output_term`, which takes a batch and the model's outputs for it, as a
        distillation loss needs; where a step has several batches, it counts as much as their losses.
        `correct` takes a parameter's name and its float32 gradient, which it may change, and returns the
        gradient to use; it is called once an optimizer step, after loss scaling is undone and before
        clipping. Meanwhile `values` are the present ones, in float32; a term sees these, too. The FLOPs of
        what these three add are counted once a round for each shape of work.

        Raises NotFiniteError when the loss is not finite, TurnError when a term is no scalar, or a correction
        has another shape or type than its gradient.
        """
        self._fit(segment, Doors(term, correct, output_term))

    def _fit(self, segment: Segment, doors: Doors) -> None:
        if not segment.trainable or not segment.steps:
            return
        plan = self._plan[self._done : self._done + segment.steps]
        with self._frozen.apart(segment):
            self._frozen.store(segment, plan, self._run_part)
            optimizer = self._optimizer(segment)
            total = torch.zeros((), device=next(iter(optimizer.parameters.values())).device)
            self._train_mode(segment)
            for step in plan:
                self.losses.append(self._step(step, optimizer, segment, doors))
                total += self.losses[-1]
                self._done += 1
        loss = float(total) / max(1, len(plan))
        if not math.isfinite(loss):
            raise NotFiniteError(f"the loss is {loss}")
        self.loss += loss * len(plan) / self.steps
        self._keep(optimizer)

    def evaluate(self, segment: Segment, values: dict[str, Tensor] | None = None, begin: int = 0) -> float:
        """Return the mean loss over the segment's number of steps from step `begin` on; train nothing.

        `values` are written into the model first, and stay there. Each forward pass is a query. The model
        is in evaluation mode, so that two losses differ by the parameters and not by dropout.

        Raises NotFiniteError when the loss is not finite.
        """
        self._write(values)
        plan = self._plan[begin : begin + segment.steps]
        total = torch.zeros((), device=next(iter(self._parameters.values())).device)
        self.model.eval()
        for step in plan:
            for batch, share in self._weighted(step):
                work = Pass(self.model, batch, self.settings, share, backward=False)
                total += self._pass(segment.trainable, work)
                self.queries += 1
        loss = float(total) / max(1, len(plan))
        if not math.isfinite(loss):
            raise NotFiniteError(f"the loss is {loss}")
        return loss

    @contextmanager
    def exchange(self, module: str, channel: Channel | None = None) -> Iterator[None]:
        """Meanwhile, let each pass send the input of a module up, and its gradient down.

        `module` is the path of the first module whose work is the server's. Its first argument, (rows,
        tokens, hidden), crosses with the batch's labels and mask; in a backward pass its gradient comes back.
        Both arrive in the payload's precision; the lengths of the encoded messages are in `exchanged`.
        `channel` may change what arrives. Where checkpointing computes a pass again, it is asked for the same
        once more, by the same number of the pass; the message counts once.
        """

        def send(way: Way, value: Tensor) -> Tensor:
            return self._send(way, value, channel)

        def cross(server: Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return Crossing.apply(arguments[0], send), *arguments[1:]

        hook = self.model.get_submodule(module).register_forward_pre_hook(cross)
        try:
            yield
        finally:
            hook.remove()

    def gradient_norms(self, segment: Segment) -> dict[str, float]:
        """Return the L2 norm of the gradient of each of the segment's parameters; train nothing.

        The loss is that of the first batch of the turn, which the turn's first step sees again. Each gradient
        is released as soon as its norm is known. Empty where nothing has a value, and in a probe.
        """
        if not self._plan:
            return {}
        norms = self._norms(segment, self._plan[0][0])
        values = torch.stack([*norms.values()]).tolist()
        return dict(zip(norms, values, strict=True))

    def each_step(self) -> Iterable[int]:
        """Return the numbers of the turn's steps, for a method that trains without `fit`; in a probe, one."""
        return range(self.steps)

    def observed(self, loss: float) -> None:
        """Record the turn's training loss, for a method that trains without `fit`."""
        self.loss = loss

    def probe(self, segments: Sequence[Segment], train: Callable[[Turn], None]) -> None:
        """Measure the memory of the segments that no earlier turn measured at this size.

        `train` is the method's own training. It runs once per segment, reduced to one step of that segment at
        the turn's largest batch; the other segments do nothing. Everything that the client holds meanwhile
        counts. The message that the client received does not: it is written into the model tensor by tensor
        as it arrives. What the method reads from it, or from what the client kept, counts as the method's.

        The trained parameters are restored, so the turn that follows is the same with or without the probe.
        """
        for segment in segments:
            if not segment.steps or not self._plan or not (segment.trainable or segment.forward_only):
                continue
            size = self.size(self.largest_step())
            if not self._instruments.knows_memory(segment.label, segment.trainable, size):
                self._probe(segment, size, train)

    def _probe(self, segment: Segment, size: int, train: Callable[[Turn], None]) -> None:
        names = segment.trainable
        before = {name: self.received[name] for name in names if name in self.received}
        before |= {name: self._parameters[name].detach().clone() for name in names if name not in before}

        def act(tracker: MemoryTracker) -> None:
            train(probing := _ProbingTurn(self, segment, tracker))
            if not probing.met:
                raise TurnError(f"segments() lists {segment.label!r}, but train() never fits it")

        with self._frozen.apart(segment):
            self._instruments.measure(segment.label, names, size, act, self.model)
        self._write(before)
        for name in names:
            self._parameters[name].grad = None

    def largest_step(self) -> Step:
        """Return the step to probe: the largest forward pass, twice where gradients are accumulated."""
        largest = max((indices for step in self._plan for indices in step), key=self._tokens)
        return [largest] * min(2, self.settings.accumulation, max(map(len, self._plan)))

    def size(self, step: Step) -> int:
        """Return the tokens of a step, padding included."""
        return sum(map(self._tokens, step))

    def _tokens(self, indices: numpy.ndarray) -> int:
        return getattr(self._make_batch, "size", len)(indices)

    def _write(self, values: dict[str, Tensor] | None) -> None:
        staging.write((self._parameters[name], value) for name, value in (values or {}).items())

    def _norms(self, segment: Segment, indices: numpy.ndarray) -> dict[str, Tensor]:
        self._freeze_all_but(segment)
        norms: dict[str, Tensor] = {}

        def release(name: str, parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._saw(parameter.grad)
            norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
            norms[name] = norm / self.settings.loss_scale
            parameter.grad = None

        hooks = [
            self._parameters[name].register_post_accumulate_grad_hook(partial(release, name))
            for name in segment.trainable
        ]
        self.model.train()
        try:
            self._pass(segment.trainable, Pass(self.model, self._make_batch(indices), self.settings))
        finally:
            for hook in hooks:
                hook.remove()
        return norms

    def _saw(self, gradient: Tensor) -> None:
        """Called with each gradient before it is released."""

    def _freeze_all_but(self, segment: Segment) -> None:
        trainable = set(segment.trainable)
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(name in trainable)
            parameter.grad = None

    def _optimizer(self, segment: Segment) -> LocalOptimizer:
        self._freeze_all_but(segment)
        chosen: dict[str, Tensor] = {name: self._parameters[name] for name in segment.trainable}
        optimizer = LocalOptimizer(chosen, {**self.received, **self._values}, self.settings)
        if self.moments != "reset":
            optimizer.set_moments(self.kept if self.moments == "client" else self.received)
        self._values.update(optimizer.values())
        return optimizer

    def _keep(self, optimizer: LocalOptimizer) -> None:
        """Keep the optimizer's state where a later turn continues from it."""
        if self.moments != "reset":
            moments = optimizer.moments()
            if self.moments == "client":
                self.keep(moments)
            else:
                self._values.update({name: value.clone() for name, value in moments.items()})

    def _train_mode(self, segment: Segment) -> None:
        self.model.train()
        self._frozen.parts.evaluate(len(segment.frozen))

    def _run_part(self, work: PartPass) -> Tensor:
        return self._pass([work.name], work)

    def _step(
        self,
        step: Step,
        optimizer: LocalOptimizer,
        segment: Segment,
        doors: Doors,
    ) -> Tensor:
        """Make one optimizer step and return its mean loss."""
        loss = torch.zeros((), device=next(iter(optimizer.parameters.values())).device)
        added = partial(_scalar, "term", doors.term, optimizer.values()) if doors.term else None
        output_term = partial(_scalar, "output_term", doors.output_term) if doors.output_term else None
        for indices, (batch, share) in zip(step, self._weighted(step), strict=True):
            begin = self._frozen.begin(segment, indices, batch, self._run_part)
            work = Pass(self.model, batch, self.settings, share, True, added, output_term, begin)
            loss += self._pass(segment.trainable, work)
        factor = rate_factor(*self._progress(), self.settings)
        self.total_rate += factor * self.settings.learning_rate
        try:
            self._update(segment.trainable, optimizer, factor, doors.correct)
        except ValueError as error:
            raise TurnError(str(error)) from error
        return loss

    def _update(
        self, trained: Sequence[str], optimizer: LocalOptimizer, factor: float, correct: Correction | None
    ) -> None:
        work = partial(optimizer.step, factor, correct)
        if correct is None:
            return work()
        self.flops += self._instruments.count(trained, {}, work, (CORRECTION, self.round))[1]
        return None

    def _weighted(self, step: Step) -> Iterator[tuple[Batch, float | Tensor]]:
        """Yield the batches of a step, each with its share of the step's mean loss."""
        batches = [self._make_batch(indices) for indices in step]
        counts = list(map(targets, batches)) if len(batches) > 1 else [1]
        for batch, count in zip(batches, counts, strict=True):
            self._passes, self._batch = self._passes + 1, batch
            yield batch, count / sum(counts)
        self._batch = {}  # or it would count as memory of what follows

    def _send(self, way: Way, value: Tensor, channel: Channel | None) -> Tensor:
        """Send an activation or a gradient of the present pass; return what arrives."""
        sent = upward(value, self._batch) if way == "up" else {"gradient": value}
        message = payload.encode(sent, self.precision)
        if self._crossed.get(way) != self._passes:
            self._crossed[way] = self._passes
            self.exchanged[way] += len(message)
        arrived = message.parts["activation" if way == "up" else "gradient"].sent().to(value.dtype)
        return channel(way, arrived, self._passes) if channel else arrived

    def _pass(self, trained: Sequence[str], work: Pass | PartPass) -> Tensor:
        # What a method adds may depend on the round.
        kind = (*work.kind, self.round) if any(work.kind[1:]) else work.kind
        result, flops = self._instruments.count(trained, work.batch, work, kind)
        self.flops += flops
        return result

    def _progress(self) -> tuple[float, float]:
        within, one = self._done / max(1, self.steps), 1 / max(1, self.steps)
        if self.settings.schedule_span == "turn":
            return within, one
        return (self.round - 1 + within) / self.rounds, one / self.rounds


class _ProbingTurn(Turn):
    """A turn in which one segment makes one step under a memory tracker, and the others do nothing."""

    def __init__(self, turn: Turn, target: Segment, tracker: MemoryTracker) -> None:
        super().__init__(**{**turn.arguments(), "kept": dict(turn.kept)})
        self.target, self.tracker, self.met = target, tracker, False
        self._frozen = ProbedFrozen(turn._frozen, tracker)
        tracker.expect([*self.received.values(), *self.kept.values()], "method")

    def _fit(self, segment: Segment, doors: Doors) -> None:
        if self._is_target(segment):
            self.met = True
            self.tracker.mark_live("method")
            self._frozen.store(segment, self._plan[self._done : self._done + segment.steps], self._run_part)
            with self.tracker.paused():
                optimizer = self._optimizer(segment)
                optimizer.make_state()
            self.tracker.mark(optimizer.state(), "optimizer")
            self._train_mode(segment)
            self._step(self.largest_step(), optimizer, segment, doors)
        self._done += segment.steps

    def evaluate(self, segment: Segment, values: dict[str, Tensor] | None = None, begin: int = 0) -> float:
        if self._is_target(segment):
            self.met = True
            self.tracker.mark_live("method")
            self._write(values)
            self.model.eval()
            for batch, share in self._weighted(self.largest_step()):
                work = Pass(self.model, batch, self.settings, share, backward=False)
                self._pass(segment.trainable, work)
        return 0.0

    def gradient_norms(self, segment: Segment) -> dict[str, float]:
        if self._is_target(segment):
            self.met = True
            self.tracker.mark_live("method")
            self._norms(segment, self.largest_step()[0])
        return {}

    def _saw(self, gradient: Tensor) -> None:
        self.tracker.mark([gradient], "gradient")

    def each_step(self) -> Iterable[int]:
        return range(1)

    def _is_target(self, segment: Segment) -> bool:
        found = (segment.label, segment.trainable) == (self.target.label, self.target.trainable)
        return found and not self.met

    def _pass(self, trained: Sequence[str], work: Pass | PartPass) -> Tensor:
        if any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
            return work()  # the counter would keep the activations of layers that are recomputed
        return self._instruments.look(trained, work.batch, work, work.kind)

    def _update(
        self, trained: Sequence[str], optimizer: LocalOptimizer, factor: float, correct: Correction | None
    ) -> None:
        optimizer.step(factor, correct)


def _scalar(door: str, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Return what a term of the loss returns; raise TurnError where that is no scalar."""
    found = function(*arguments)
    if not isinstance(found, Tensor) or found.shape:
        what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)[:100]
        raise TurnError(f"{door} returned {what}; allowed: a scalar tensor, of shape ()")
    return found


def snapshots(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors on the CPU, in their own formats; of those without values, others without."""
    host = staging.to_host(tensors)
    for name, tensor in tensors.items():
        if not staging.is_away(tensor):
            host[name] = tensor.detach().clone()
    return host
