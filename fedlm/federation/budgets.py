"""Clients of unequal means: which level of a method's turn fits each client's memory budget.

A turn of a level is measured on fake tensors, as in a prediction of costs: this takes no memory, and gives
the same on every machine.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy

from fedlm.base.errors import UserError
from fedlm.base.randomness import numpy_stream
from fedlm.base.settings import nearest
from fedlm.federation.method import Method
from fedlm.federation.settings import Budget, Training
from fedlm.models.config import Kind, ModelConfig

if TYPE_CHECKING:
    from torch.nn import Module

    from fedlm.federation.passes import Batch


def known(method: type[Method]) -> bool:
    """Return whether a method knows budgets."""
    return method.levels is not Method.levels


def count(method: Method, label: Callable[[int], str]) -> dict[str, float]:
    """Return how many clients have which level, by the level's label: numbers for the record of a run."""
    found = Counter(method.level.get(client, 0) for client in range(method.clients))
    return {f"clients_{label(level).replace(' ', '_')}": float(found[level]) for level in sorted(found)}


def draw(budgets: Sequence[Budget], clients: int, seed: int) -> dict[int, Budget]:
    """Return which clients have a budget, and which; it depends on the seed only, not on the method."""
    order = numpy_stream(seed, "budgets").permutation(clients).tolist()
    drawn: dict[int, Budget] = {}
    first, share = 0, 0.0
    for budget in budgets:
        share += budget.share
        last = nearest(share, clients)
        drawn |= dict.fromkeys(order[first:last], budget)
        first = last
    return drawn


def fit(
    method: Method,
    model: Module,
    parts: list[numpy.ndarray],
    make_batch: Callable[[numpy.ndarray], Batch],
    budgets: Sequence[Budget],
    training: Training,
) -> dict[int, int]:
    """Return the level of each client with a budget: the first whose turn fits.

    The turn measured for a budget has as many examples as any of its clients, all as long as the longest of
    theirs, so that no turn of theirs takes more. `model` is prepared. Raises UserError if not even the last
    level fits.
    """
    from fedlm.measure.memory import older_objects_set_aside

    drawn = draw(budgets, len(parts), method.seed)
    found: dict[int, int] = {}
    with older_objects_set_aside():
        for budget in budgets:
            own = [client for client, other in drawn.items() if other is budget]
            if own:
                examples = numpy.concatenate([parts[client] for client in own])
                longest = _Longest(make_batch, examples, training.batch_size)
                most = max(len(parts[client]) for client in own)
                found |= dict.fromkeys(own, _first_that_fits(method, model, most, longest, budget, training))
    return found


def check(
    method: Method,
    model: ModelConfig,
    kind: Kind,
    length: int,
    budgets: Sequence[Budget],
    training: Training,
) -> None:
    """Raise UserError if some budget is too small for one step of the method's smallest turn.

    `method` will be prepared with a model without values, so pass a fresh one; `length` counts tokens.
    """
    import torch

    from fedlm.federation.passes import GivenBatches
    from fedlm.models.loading import build_on_meta

    shapes = build_on_meta(model, kind, 2)
    with torch.device("meta"):
        prepared = method.prepare(shapes, kind)
    batches = GivenBatches(kind, length, getattr(shapes.config, "type_vocab_size", 1) > 1)
    examples = training.batch_size * training.accumulation
    sizes = (0, method.levels() - 1)
    least = min(_peak(method, level, prepared, examples, batches, training) for level in sizes)
    for budget in budgets:
        _require(budget, least, method)


def _first_that_fits(
    method: Method,
    model: Module,
    examples: int,
    make_batch: Callable[[numpy.ndarray], Batch],
    budget: Budget,
    training: Training,
) -> int:
    @cache
    def peak(level: int) -> int:
        return _peak(method, level, model, examples, make_batch, training)

    # Level 0 may need less memory than a higher level that stores activations for every example.
    if peak(0) <= budget.memory:
        return 0
    last = method.levels() - 1
    _require(budget, min(peak(0), peak(last)), method)
    return 1 + bisect_left(range(1, last), True, key=lambda level: peak(level) <= budget.memory)


def _require(budget: Budget, least: int, method: Method) -> None:
    if least > budget.memory:
        raise UserError(
            f"budgets: {budget.memory} bytes; allowed: at least {least}, which the smallest turn "
            f"of {method.name} takes"
        )


def _peak(
    method: Method,
    level: int,
    model: Module,
    examples: int,
    make_batch: Callable[[numpy.ndarray], Batch],
    training: Training,
) -> int:
    """Return the bytes of a turn's peak at a level, measured on fake tensors."""
    import torch

    from fedlm.federation.turn import Turn, steps_of_turn
    from fedlm.measure.instruments import Instruments
    from fedlm.models.fake import fake_copy

    plan = steps_of_turn(numpy.arange(examples), training, method.seed, 1, 0)
    instruments = Instruments()
    before, method.level = method.level, {0: level}
    try:
        with fake_copy(model) as copied, method.shaped(copied, 0):
            parameters = dict(copied.named_parameters())
            received = {name: torch.empty_like(parameters[name]) for name in method.exchanged}
            turn = Turn(
                copied,
                training,
                plan,
                make_batch,
                instruments,
                received=received,
                moments=method.config.moments,
            )
            turn.probe(method.segments(0, 1, turn.steps), method.train)
    finally:
        method.level = before
    found = instruments.peak()
    return found.peak if found else 0


class _Longest:
    """Batches of the shape that the longest of some examples would give."""

    def __init__(
        self, make_batch: Callable[[numpy.ndarray], Batch], examples: numpy.ndarray, batch_size: int
    ) -> None:
        size = getattr(make_batch, "size", len)
        tokens = [size(examples[index : index + 1]) for index in range(len(examples))]
        longest = examples[numpy.argsort(tokens, kind="stable")[-batch_size:]]
        batch = make_batch(longest)
        self.kinds = {name: (value.shape[1:], value.dtype) for name, value in batch.items()}
        rows, self.length = batch["input_ids"].shape
        self.windows = -(-rows // len(longest))

    def size(self, indices: numpy.ndarray) -> int:
        """Return the tokens of a batch."""
        return len(indices) * self.windows * self.length

    def __call__(self, indices: numpy.ndarray) -> Batch:
        import torch

        rows = len(indices) * self.windows
        return {name: torch.ones((rows, *shape), dtype=dtype) for name, (shape, dtype) in self.kinds.items()}
