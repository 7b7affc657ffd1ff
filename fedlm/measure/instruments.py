"""The instruments of a run: FLOPs of every step, memory of a probe step, bytes of every payload."""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import Module

from fedlm.measure.flops import flop_counter
from fedlm.measure.memory import Memory, measure_step

if TYPE_CHECKING:
    from fedlm.federation.method import Segment


class Instruments:
    """Counts FLOPs and measures memory, each shape of work once.

    FLOPs depend on which parameters are trained, on the batch's shape, on the layers that the client's copy
    lacks (`dropped`), and on nothing else, so PyTorch's counter runs the first time a shape is met, over the
    step itself, and its figure is used again later.
    """

    def __init__(self) -> None:
        self.memory: dict[str, Memory] = {}
        self.dropped: tuple[int, ...] = ()
        self.largest: dict[str, int] = {}
        self._flops: dict[tuple, int] = {}

    def count(self, segment: "Segment", batch: dict[str, Tensor], work: Callable[[], Tensor]):
        """Run `work` and return its result and the FLOPs of its forward and backward pass."""
        key = self._shape(segment, batch)
        if key in self._flops:
            return work(), self._flops[key]
        with flop_counter() as counter:
            result = work()
        self._flops[key] = counter.get_total_flops()
        return result, self._flops[key]

    def flops_of(self, segment: "Segment", batch: dict[str, Tensor], work: Callable[[], Tensor]) -> int:
        """Return the FLOPs of `work`, which is only run if no work of its shape was."""
        key = self._shape(segment, batch)
        return self._flops[key] if key in self._flops else self.count(segment, batch, work)[1]

    def _shape(self, segment: "Segment", batch: dict[str, Tensor]) -> tuple:
        shapes = ((name, value.shape) for name, value in batch.items())
        return (hash(tuple(segment.trainable)), self.dropped, *shapes)

    def knows_memory(self, segment: "Segment", size: int) -> bool:
        """Return whether a step of the segment at least as large was measured already."""
        return self.largest.get(self._work(segment), 0) >= size

    def measure(
        self,
        segment: "Segment",
        size: int,
        step: Callable[[], object],
        model: Module,
        state: Callable[[], Iterable[Tensor]],
    ) -> None:
        """Measure the peak of live tensors during `step` and note it under the segment's label."""
        self.largest[self._work(segment)] = size
        found = measure_step(step, model, state)
        known = self.memory.get(segment.label)
        if known is None or found.peak > known.peak:
            self.memory[segment.label] = found

    def books(self) -> dict[str, dict]:
        """Return the memory found so far as plain values, for a checkpoint."""
        memory = {label: asdict(memory) for label, memory in self.memory.items()}
        return {"largest": self.largest, "memory": memory}

    def restore(self, books: dict[str, dict]) -> None:
        """Continue from what `books` returned."""
        self.largest = dict(books["largest"])
        self.memory = {label: Memory(**memory) for label, memory in books["memory"].items()}

    def _work(self, segment: "Segment") -> str:
        """Return what names the work of a segment: its label and the layers that are not there."""
        without = ", ".join(map(str, self.dropped))
        return f"{segment.label} without {without}" if without else segment.label

    def peak(self) -> Memory | None:
        """Return the memory of the turn with the highest peak; None before any turn."""
        return max(self.memory.values(), key=lambda memory: memory.peak, default=None)
