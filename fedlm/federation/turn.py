"""A client's turn: batches, optimizer, schedule, steps.

One code path serves a real turn, the memory probe and the prediction of costs: on fake tensors the same
steps run without arithmetic.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import numpy
import torch
from torch import Tensor
from torch.nn import Module

from fedlm.base.randomness import numpy_stream
from fedlm.federation.optimizer import LocalOptimizer, rate_factor
from fedlm.federation.scoring import losses
from fedlm.federation.settings import Training
from fedlm.federation.state import Segment
from fedlm.measure.instruments import Instruments

Batch = dict[str, Tensor]
Step = list[numpy.ndarray]  # indices of the examples of each forward pass of one optimizer step


class Diverged(Exception):
    """A loss or an update that is not finite."""


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

    Attributes: `client`, `round` (from 1); `examples` the client holds; `steps` is the number of optimizer
    steps; `model` is the client's working copy; `received` the values it started from; `kept` what the client
    keeps for its next turn (see `keep`); `loss` the mean loss over the turn's steps.
    """

    def __init__(
        self,
        model: Module,
        settings: Training,
        steps: list[Step],
        make_batch: Callable[[numpy.ndarray], Batch],
        instruments: Instruments,
        client: int = 0,
        round: int = 1,
        rounds: int = 1,
        received: dict[str, Tensor] | None = None,
        kept: dict[str, Tensor] | None = None,
        moments: str = "reset",
    ) -> None:
        self.model = model
        self.settings = settings
        self.client, self.round, self.rounds = client, round, rounds
        self.received = received or {}
        self.kept = {} if kept is None else kept
        self.moments = moments
        self.loss = 0.0
        self.flops = 0
        self._plan = steps
        self._make_batch = make_batch
        self._instruments = instruments
        self._done = 0
        self._values: dict[str, Tensor] = {}
        self._parameters = dict(model.named_parameters())

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the turn."""
        return len(self._plan)

    def values(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the current values of parameters, in float32 where the client trained a float32 copy.

        With moments handed on, the optimizer's state of these parameters comes with them.
        """
        values = {name: self._values.get(name, self._parameters[name]).detach() for name in names}
        if self.moments == "handed_on":
            handed = {name: value for name, value in self._values.items() if name.partition("@")[0] in values}
            values = {**handed, **values}
        return values

    def keep(self, values: dict[str, Tensor]) -> None:
        """Let the client keep these values for its next turn."""
        self.kept.update({name: value.detach().to("cpu", copy=True) for name, value in values.items()})

    def fit(self, segment: Segment) -> None:
        """Train the segment's parameters for its number of steps; freeze all others.

        Raises Diverged when the loss is not finite.
        """
        if not segment.trainable or not segment.steps:
            return
        optimizer = self._optimizer(segment)
        plan = self._plan[self._done : self._done + segment.steps]
        total = torch.zeros((), device=next(iter(optimizer.parameters.values())).device)
        self.model.train()
        for step in plan:
            total += self._step(step, optimizer, segment)
            self._done += 1
        loss = float(total) / max(1, len(plan))
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss}")
        self.loss += loss * len(plan) / self.steps
        self._keep(optimizer)

    def _keep(self, optimizer: LocalOptimizer) -> None:
        """Keep what was trained, and the optimizer's state where someone goes on from it."""
        self._values.update(optimizer.values())
        if self.moments != "reset":
            moments = optimizer.moments()
            (self.kept if self.moments == "client" else self._values).update(
                {name: value.clone() for name, value in moments.items()}
            )

    def _optimizer(self, segment: Segment) -> LocalOptimizer:
        trainable = set(segment.trainable)
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(name in trainable)
            parameter.grad = None
        chosen = {name: self._parameters[name] for name in segment.trainable}
        optimizer = LocalOptimizer(chosen, {**self.received, **self._values}, self.settings)
        if self.moments != "reset":
            optimizer.set_moments(self.kept if self.moments == "client" else self.received)
        return optimizer

    def _step(self, step: Step, optimizer: LocalOptimizer, segment: Segment | None) -> Tensor:
        """Make one optimizer step and return its mean loss; without a segment, count no FLOPs."""
        batches = [self._make_batch(indices) for indices in step]
        targets = [self._targets(batch) for batch in batches] if len(batches) > 1 else [1]
        loss = torch.zeros((), device=next(iter(optimizer.parameters.values())).device)
        for batch, weight in zip(batches, targets, strict=True):
            share = weight / max(1, sum(targets))
            work = ForwardBackward(self.model, batch, self.settings, share)
            if segment is None:
                loss += work()
            else:
                value, flops = self._instruments.count(segment, batch, work)
                self.flops += flops
                loss += value
        optimizer.step(rate_factor(*self._progress(), self.settings))
        return loss

    def _progress(self) -> tuple[float, float]:
        within, one = self._done / max(1, self.steps), 1 / max(1, self.steps)
        if self.settings.schedule_span == "turn":
            return within, one
        return (self.round - 1 + within) / self.rounds, one / self.rounds

    def probe(self, segment: Segment, step: Step | None = None) -> None:
        """Measure the memory of a training step of the segment at the turn's largest batch.

        The trained parameters are put back, so the turn that follows is the same with or without the probe.
        """
        if not segment.trainable or not self._plan:
            return
        step = step or self._largest()
        if self._instruments.knows_memory(segment, self._shape(step)):
            return
        parameters = {name: self._parameters[name] for name in segment.trainable}
        before = {name: value.detach().clone() for name, value in parameters.items()}
        optimizer = self._optimizer(segment)
        self.model.train()
        parts = iter([self._make_state, self._probed_step])
        self._instruments.measure(
            segment,
            self._shape(step),
            lambda: next(parts)(step, optimizer, segment),
            self.model,
            optimizer.state,
        )
        with torch.no_grad():
            for name, value in before.items():
                parameters[name].copy_(value)
                parameters[name].grad = None

    def _make_state(self, step: Step, optimizer: LocalOptimizer, segment: Segment) -> None:
        """Let the optimizer make its state, for which a step of one example does."""
        self._step([step[0][:1]], optimizer, None)

    def _probed_step(self, step: Step, optimizer: LocalOptimizer, segment: Segment) -> None:
        """Do the step whose memory counts."""
        self._step(step, optimizer, None)

    def _largest(self) -> Step:
        """Return the step to probe: the largest forward pass, twice where gradients are accumulated."""
        largest = max((indices for step in self._plan for indices in step), key=self._elements)
        return [largest] * min(2, self.settings.accumulation, max(map(len, self._plan)))

    def _elements(self, indices: numpy.ndarray) -> int:
        size = getattr(self._make_batch, "size", len)
        return size(indices)

    def _shape(self, step: Step) -> int:
        return sum(map(self._elements, step))

    @staticmethod
    def _targets(batch: Batch) -> int:
        """Return how many values the batch's mean loss is a mean of."""
        labels = batch.get("labels")
        if labels is None:
            return len(next(iter(batch.values())))
        if labels.is_floating_point() or labels.dim() == 1:
            return len(labels)
        return max(1, int((labels[:, 1:] != -100).sum()))


class ForwardBackward:
    """The forward and backward pass of one batch; called, it returns the loss times its share."""

    def __init__(self, model: Module, batch: Batch, settings: Training, share: float) -> None:
        self.model, self.batch, self.settings, self.share = model, batch, settings, share

    def __call__(self) -> Tensor:
        autocast = self.settings.autocast
        device = next(iter(self.batch.values())).device.type
        precision = torch.autocast(device, getattr(torch, autocast)) if autocast else nullcontext()
        with precision:
            loss = self._loss() * self.share
        (loss * self.settings.loss_scale).backward()
        return loss.detach().float()

    def _loss(self) -> Tensor:
        if "start_positions" not in self.batch:
            return self.model(**self.batch).loss
        # Transformers' own loss would not know that soft prompts shift the positions of the answer.
        inputs = {name: value for name, value in self.batch.items() if not name.endswith("_positions")}
        return losses("question_answering", self.model(**inputs), self.batch).mean()
