"""The parts of a model that a turn runs frozen, which leave memory once their outputs are stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import numpy
from torch import Tensor
from torch.nn import Module, Parameter

from fedlm.base import staging
from fedlm.federation.passes import Batch, PartPass, Step
from fedlm.federation.settings import Training
from fedlm.federation.state import Segment
from fedlm.measure.memory import MemoryTracker
from fedlm.models.parts import Parts

Run = Callable[[PartPass], Tensor]


class Frozen:
    """The frozen parts of a turn's segments (see `Segment`).

    `run` makes a pass through some of them; it is not kept, since it holds the turn.
    """

    def __init__(
        self,
        model: Module,
        parameters: dict[str, Parameter],
        make_batch: Callable[[numpy.ndarray], Batch],
        settings: Training,
    ) -> None:
        self.model, self.make_batch, self.settings = model, make_batch, settings
        self.parts = Parts(model)
        self._parameters = parameters
        self._apart: dict[str, Tensor] = {}  # parameters that are out of the model for a while
        self._hidden: dict[int, Tensor] = {}  # what comes out of the frozen parts, by example

    @contextmanager
    def apart(self, segment: Segment) -> Iterator[None]:
        """Keep what a segment stores the output of out of the model, where it would hold memory."""
        if not segment.stored:
            yield
            return
        # What is used at several places, like an output embedding tied to the input's, stays.
        uses = Counter(id(value) for _, value in self.model.named_parameters(remove_duplicate=False))
        names = [name for part in segment.frozen for name in part if uses[id(self._parameters[name])] == 1]
        with staging.set_aside({name: self._parameters[name] for name in names}) as held:
            self._apart.update(held)
            for name in names:
                self._parameters[name].data = _without_memory(self._parameters[name].data)
            try:
                yield
            finally:
                self._hidden.clear()
                for name in names:
                    del self._apart[name]

    def store(self, segment: Segment, plan: list[Step], run: Run) -> None:
        """Compute what comes out of the frozen parts for all examples of a plan, if the segment stores it."""
        if not segment.stored:
            return
        passes = self._visits(plan)
        self.model.eval()
        hidden: list[Tensor | None] = [None] * len(passes)
        for part, names in enumerate(segment.frozen):
            with self._back(names):
                for number, indices in enumerate(passes):
                    hidden[number] = self._next(part, indices, hidden[number], run)
        for indices, values in zip(passes, hidden, strict=True):
            assert values is not None
            begin = 0
            for index, windows in zip(indices, self._windows(indices, len(values)), strict=True):
                self._hidden[int(index)] = values[begin : begin + windows]
                begin += windows

    def begin(
        self, segment: Segment, indices: numpy.ndarray, batch: Batch, run: Run
    ) -> Callable[[], AbstractContextManager]:
        """Return how a training pass over some examples begins: behind the frozen parts, if there are any."""
        if not segment.frozen:
            return nullcontext
        if segment.stored:
            hidden = self._stored(indices, batch)
        else:
            hidden = self._through(0, len(segment.frozen) - 1, batch, None, run)
        return partial(self.parts.behind, len(segment.frozen), hidden)

    def _stored(self, indices: numpy.ndarray, batch: Batch) -> Tensor:
        """Return what was stored for some examples as one tensor (windows, length, width)."""
        rows = [self._hidden[int(index)] for index in indices]
        windows, length = batch["input_ids"].shape
        # In another batch an example may have more padding or less; nothing attends to padding.
        hidden = rows[0].new_zeros(windows, length, rows[0].shape[-1])
        begin = 0
        for row in rows:
            width = min(length, row.shape[1])
            hidden[begin : begin + len(row), :width] = row[:, :width]
            begin += len(row)
        return hidden

    def _visits(self, plan: list[Step]) -> list[numpy.ndarray]:
        return first_visits(plan)

    def _next(self, part: int, indices: numpy.ndarray, hidden: Tensor | None, run: Run) -> Tensor:
        """Return what comes out of a part for some examples, given what came out of the one before."""
        return self._through(part, part, self.make_batch(indices), hidden, run)

    def _through(self, first: int, last: int, batch: Batch, hidden: Tensor | None, run: Run) -> Tensor:
        return run(PartPass(self.parts, first, last, batch, self.settings, hidden))

    def _windows(self, indices: numpy.ndarray, total: int) -> list[int]:
        """Return how many rows each example has in a batch of `total` rows."""
        if total == len(indices):
            return [1] * total
        batches = (self.make_batch(indices[i : i + 1]) for i in range(len(indices)))
        return [len(batch["input_ids"]) for batch in batches]

    @contextmanager
    def _back(self, names: Iterable[str]) -> Iterator[None]:
        """Put parameters that were set aside back into the model for a while."""
        apart = [name for name in names if name in self._apart]
        for name, value in self._fetch(apart).items():
            self._parameters[name].data = value
        yield
        for name in apart:
            self._parameters[name].data = _without_memory(self._parameters[name].data)

    def _fetch(self, names: list[str]) -> dict[str, Tensor]:
        device = next(iter(self._parameters.values())).device
        return staging.copies({name: self._apart[name] for name in names}, device)


class ProbedFrozen(Frozen):
    """The same under a memory tracker: only the largest batch is computed, others have its output's size."""

    def __init__(self, frozen: Frozen, tracker: MemoryTracker) -> None:
        super().__init__(frozen.model, frozen._parameters, frozen.make_batch, frozen.settings)
        self.tracker = tracker
        self._apart = frozen._apart
        self._largest: numpy.ndarray | None = None

    def _visits(self, plan: list[Step]) -> list[numpy.ndarray]:
        size = getattr(self.make_batch, "size", len)
        return sorted(super()._visits(plan), key=size, reverse=True)

    def _next(self, part: int, indices: numpy.ndarray, hidden: Tensor | None, run: Run) -> Tensor:
        if self._largest is None or self._largest is indices:
            self._largest = indices
            self._like = super()._next(part, indices, hidden, run)
            return self._like
        if hidden is not None:
            return hidden
        batch = self.make_batch(indices)
        return self._like.new_empty(*batch["input_ids"].shape, self._like.shape[-1])

    def _fetch(self, names: list[str]) -> dict[str, Tensor]:
        with self.tracker.paused():
            found = super()._fetch(names)
        self.tracker.mark(found.values(), "parameter")
        return found


def first_visits(plan: list[Step]) -> list[numpy.ndarray]:
    """Return the passes of a plan that have an example which none before had."""
    found, seen = [], set[int]()
    for indices in (one for step in plan for one in step):
        if not seen.issuperset(indices.tolist()):
            found.append(indices)
            seen.update(indices.tolist())
    return found


def _without_memory(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape that holds a single value."""
    return tensor.new_zeros(()).expand(tensor.shape)
