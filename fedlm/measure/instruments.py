"""The instruments of a run: FLOPs of every pass, memory of a probe step."""

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Module

from fedlm.measure.flops import flop_counter
from fedlm.measure.memory import Memory, MemoryTracker, measure

Result = TypeVar("Result")


class Instruments:
    """Counts FLOPs once for each shape of work, and measures memory for each segment's largest step.

    FLOPs depend only on which parameters are trained, on the batch's shape, on the `kind` of work (a pass
    with or without a way back; a method's terms or correction of gradients in a round), on the layers that
    the client's copy lacks (`dropped`) and on its width, which follows from its `level`. So PyTorch's counter
    runs over the first work of each shape, and its result is reused.
    """

    def __init__(self) -> None:
        self.memory: dict[str, Memory] = {}
        self.dropped: tuple[int, ...] = ()
        self.level = 0
        self.largest: dict[str, int] = {}
        self._flops: dict[tuple, int] = {}

    def count(
        self,
        trained: Sequence[str],
        batch: dict[str, Tensor],
        work: Callable[[], Result],
        kind: Hashable,
    ) -> tuple[Result, int]:
        """Run `work` and return its result and its FLOPs."""
        key = self._shape(trained, batch, kind)
        if key in self._flops:
            return work(), self._flops[key]
        with flop_counter() as counter:
            result = work()
        self._flops[key] = counter.get_total_flops()
        return result, self._flops[key]

    def look(
        self,
        trained: Sequence[str],
        batch: dict[str, Tensor],
        work: Callable[[], Tensor],
        kind: Hashable,
    ) -> Tensor:
        """Run `work` under a memory tracker: nothing is counted, except where counting is free.

        On fake tensors, where the pass is slow but counting costs little, FLOPs are counted as well.
        """
        fake = isinstance(next(iter(batch.values())), FakeTensor)
        return self.count(trained, batch, work, kind)[0] if fake else work()

    def flops_of(
        self,
        trained: Sequence[str],
        batch: dict[str, Tensor],
        work: Callable[[], object],
        kind: Hashable,
    ) -> int:
        """Return the FLOPs of `work`, which is run only if no work of its shape was run before."""
        key = self._shape(trained, batch, kind)
        return self._flops[key] if key in self._flops else self.count(trained, batch, work, kind)[1]

    def _shape(self, trained: Sequence[str], batch: dict[str, Tensor], kind: Hashable) -> tuple:
        shapes = ((name, value.shape) for name, value in batch.items())
        return (hash(tuple(trained)), kind, self.dropped, self.level, *shapes)

    def knows_memory(self, label: str, trained: Sequence[str], size: int) -> bool:
        """Return whether a step as large that trains the same was measured under this label."""
        return self.largest.get(self._work(label, trained), 0) >= size

    def measure(
        self,
        label: str,
        trained: Sequence[str],
        size: int,
        act: Callable[[MemoryTracker], object],
        model: Module,
    ) -> None:
        """Measure the peak of live tensors during `act`; the highest of a label is recorded."""
        self.largest[self._work(label, trained)] = size
        found = measure(act, model)
        known = self.memory.get(label)
        if known is None or found.peak > known.peak:
            self.memory[label] = found

    def state(self) -> dict[str, Any]:
        """Return the memory found so far as plain values, for a checkpoint."""
        memory = {label: asdict(memory) for label, memory in self.memory.items()}
        return {"largest": self.largest, "memory": memory}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.largest = dict(state["largest"])
        self.memory = {label: Memory(**memory) for label, memory in state["memory"].items()}

    def _work(self, label: str, trained: Sequence[str]) -> str:
        """Return the name of a segment's work: its label, what it trains, and the layers that are missing."""
        digest = hashlib.sha256("\n".join(trained).encode()).hexdigest()
        return " ".join([label, digest, *map(str, self.dropped)])

    def peak(self) -> Memory | None:
        """Return the memory of the turn with the highest peak; None before any turn."""
        return max(self.memory.values(), key=lambda memory: memory.peak, default=None)
