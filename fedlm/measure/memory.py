"""The peak memory of training, exact, and split by what it is used for.

A tracker sees every operation and follows the storage of every tensor from its allocation to its release.
It counts the bytes of live tensors: repeatable to the byte, and the same for fake tensors, which have
sizes but no content. It does not see workspaces that live inside one operation; a GPU's allocator also rounds
sizes up and keeps what was freed.
"""

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

MemoryKind = Literal["parameter", "gradient", "optimizer", "method", "activation"]
KINDS: tuple[MemoryKind, ...] = ("parameter", "gradient", "optimizer", "method", "activation")

_RANK: dict[MemoryKind, int] = {"activation": 0, "method": 1, "gradient": 2, "optimizer": 3, "parameter": 4}


@dataclass(frozen=True)
class Memory:
    """Bytes of live tensors at their peak, and what the tensors were.

    `parameter` holds parameters and buffers, trained or not; `gradient` the gradients of parameters;
    `optimizer` the optimizer's state and the float32 copies of half-precision weights; `method` what the
    method itself holds while it trains (an anchor, a control variate); `activation` the rest: activations,
    temporaries and the batch. The five add up to `peak`.
    """

    peak: int
    parameter: int
    gradient: int
    optimizer: int
    activation: int
    method: int = 0


class MemoryTracker(TorchDispatchMode):
    """Follows all tensors while it is entered; `memory()` afterwards gives the peak.

        with MemoryTracker(model) as tracker:
            train(model)
        tracker.memory().peak

    Parameters, buffers and gradients that exist already count from the start, other tensors from their
    allocation or, if they are older, from their first use. State and gradients of any torch.optim optimizer
    are recognised when it steps; anything else that belongs to an optimizer is declared with `mark`. Works on
    the CPU, on CUDA, and inside FakeTensorMode; it costs about as much time as the step itself.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self._model = model
        # Each storage has a number. Positive sizes in the timeline are allocations, negative ones releases;
        # what each storage was is often known only later, so the peak is found by replaying the timeline.
        self._timeline: list[tuple[int, int]] = []
        self._live: dict[int, int] = {}
        self._kinds: list[MemoryKind] = []
        self._finalizers: dict[int, weakref.finalize] = {}
        self._hooks: list = []
        self._expected: dict[int, MemoryKind] = {}
        self._held: list[torch.Tensor] = []
        self._paused = False
        # What is on the host then, buffers of transfers for example, takes no memory of the client's.
        self._on_gpu = any(parameter.device.type == "cuda" for parameter in model.parameters())

    def mark(self, tensors: Iterable[torch.Tensor], kind: MemoryKind) -> None:
        """Declare what live tensors are, unless they are known to be something of a higher rank.

        From low to high: activation, method, gradient, optimizer, parameter.
        """
        if self._paused:
            return
        for tensor in tensors:
            number = self._follow(tensor)
            if number is not None and _RANK[kind] > _RANK[self._kinds[number]]:
                self._kinds[number] = kind

    def mark_live(self, kind: MemoryKind) -> None:
        """Declare what all live tensors are that are not known to be something of a higher rank."""
        for number in self._live.values():
            if _RANK[kind] > _RANK[self._kinds[number]]:
                self._kinds[number] = kind

    def expect(self, tensors: Iterable[torch.Tensor], kind: MemoryKind) -> None:
        """Declare what older tensors are; they count from their first use, and not at all if never used."""
        for tensor in tensors:
            if tensor.layout is torch.strided:
                self._held.append(tensor)
                self._expected[tensor.untyped_storage()._cdata] = kind

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Pause tracking; tensors made meanwhile count from their first use afterwards."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def memory(self) -> Memory:
        """Return the peak so far, and its split at that moment."""
        current = dict.fromkeys(KINDS, 0)
        total, peak, split = 0, 0, dict(current)
        for number, size in self._timeline:
            current[self._kinds[number]] += size
            total += size
            if total > peak:
                peak, split = total, dict(current)
        return Memory(peak=peak, **split)

    def __enter__(self) -> Self:
        self.mark(self._model.parameters(), "parameter")
        self.mark(self._model.buffers(), "parameter")
        self._mark_gradients(self._model.parameters())
        for parameter in self._model.parameters():
            if parameter.requires_grad and parameter.is_leaf:
                hook = parameter.register_post_accumulate_grad_hook(lambda p: self._mark_gradients([p]))
                self._hooks.append(hook)
        self._hooks.append(register_optimizer_step_pre_hook(self._before_optimizer))
        self._hooks.append(register_optimizer_step_post_hook(self._after_optimizer))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()
        for finalizer in self._finalizers.values():
            finalizer.detach()
        self._finalizers.clear()
        self._held.clear()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return function(*args, **kwargs)
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor)
        output = function(*args, **kwargs)
        for tensor in tree_iter(output):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor)
        return output

    def _follow(self, tensor: torch.Tensor) -> int | None:
        """Return the number of the tensor's storage, a new one if it was not seen before."""
        if tensor.layout is not torch.strided:
            return None
        storage = tensor.untyped_storage()
        if self._on_gpu and storage.device.type == "cpu":
            return None
        key = storage._cdata
        number = self._live.get(key)
        if number is None:
            number = len(self._kinds)
            size = storage.nbytes()
            self._kinds.append(self._expected.get(key, "activation"))
            self._live[key] = number
            self._timeline.append((number, size))
            finalizer = weakref.finalize(storage, self._release, key, size)
            finalizer.atexit = False
            self._finalizers[key] = finalizer
        return number

    def _release(self, key: int, size: int) -> None:
        self._finalizers.pop(key)
        self._timeline.append((self._live.pop(key), -size))

    def _mark_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        self.mark((p.grad for p in parameters if p.grad is not None), "gradient")

    def _before_optimizer(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._mark_gradients(parameters)
        # Parameters of the optimizer that are not the model's are its float32 copies.
        self.mark(parameters, "optimizer")

    def _after_optimizer(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        state = (value for values in optimizer.state.values() for value in tree_iter(values))
        self.mark((value for value in state if isinstance(value, torch.Tensor)), "optimizer")


_set_aside = False


@contextlib.contextmanager
def older_objects_set_aside() -> Iterator[None]:
    """Exempt all present objects from garbage collection, so that collecting is quick until the exit.

    Searching all of PyTorch and Transformers takes longer than a small step. Nested use does nothing.
    """
    global _set_aside
    if _set_aside:
        yield
        return
    gc.collect()
    gc.freeze()
    _set_aside = True
    try:
        yield
    finally:
        _set_aside = False
        gc.unfreeze()


def measure(act: Callable[[MemoryTracker], object], model: nn.Module) -> Memory:
    """Return the peak memory while `act` runs; `act` receives the tracker."""
    collecting = gc.isenabled()
    with older_objects_set_aside():
        # Otherwise reference cycles would be collected at moments that depend on what ran before.
        gc.collect()
        gc.disable()
        try:
            with MemoryTracker(model) as tracker:
                act(tracker)
                gc.collect()
        finally:
            if collecting:
                gc.enable()
    return tracker.memory()


def measure_step(
    step: Callable[[], object],
    model: nn.Module,
    optimizer_state: Callable[[], Iterable[torch.Tensor]] = tuple,
) -> Memory:
    """Return the peak memory of a training step, which is run twice.

    The first run creates the optimizer's state, the second finds it there; the peak is over both. `step` does
    a forward pass, a backward pass and the optimizer's step, and clears the gradients as training does: it
    changes the model, so the caller must restore a real model afterwards. The state of torch.optim's
    optimizers is recognised; `optimizer_state` gives the tensors of any other.
    """

    def twice(tracker: MemoryTracker) -> None:
        for _ in range(2):
            tracker.mark(optimizer_state(), "optimizer")
            step()
            tracker.mark(optimizer_state(), "optimizer")
            gc.collect()

    return measure(twice, model)
