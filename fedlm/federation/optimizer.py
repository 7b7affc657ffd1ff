"""The optimizer of a client's turn, and the schedule of its learning rate."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from fedlm.base import staging
from fedlm.federation.settings import Training

Correction = Callable[[str, Tensor], Tensor]
"""Takes a parameter's name and float32 gradient, returns the gradient to use, of the same shape."""

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def rate_factor(progress: float, step: float, settings: Training) -> float:
    """Return the learning rate's factor at `progress` (0 to 1) of the schedule.

    `step` is the share of the schedule that one optimizer step covers: the first step of a warm-up has a rate
    above zero.
    """
    if progress < settings.warmup:
        return min(1.0, (progress + step) / settings.warmup)
    rest = (progress - settings.warmup) / (1 - settings.warmup)
    if settings.schedule == "linear":
        return 1 - rest
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * rest))
    return 1.0


class LocalOptimizer:
    """AdamW or SGD over named parameters, with a float32 copy of those that are stored in half precision.

    `received` holds the float32 values that the client downloaded: a half-precision parameter's float32 copy
    starts from them and not from their rounded values.
    """

    def __init__(
        self, parameters: dict[str, Tensor], received: dict[str, Tensor], settings: Training
    ) -> None:
        self.settings = settings
        self.parameters = parameters
        self._device = next((value.device for value in parameters.values()), torch.device("cpu"))
        halves = [name for name, value in parameters.items() if value.dtype != torch.float32]
        exact = {name: received.get(name, parameters[name]) for name in halves}
        self.masters = {
            name: master.requires_grad_()
            for name, master in staging.copies(exact, self._device, torch.float32).items()
        }
        updated = [self.masters.get(name, value) for name, value in parameters.items()]
        if settings.optimizer == "adamw":
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                updated,
                lr=settings.learning_rate,
                betas=settings.betas,
                eps=settings.epsilon,
                weight_decay=settings.weight_decay,
                fused=True,
            )
        else:
            self.optimizer = torch.optim.SGD(
                updated,
                lr=settings.learning_rate,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
                foreach=False,
            )

    def make_state(self) -> None:
        """Create the optimizer's state, as a first step does; weight decay may change the parameters."""
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        self.step(1.0)

    def step(self, factor: float, correct: Correction | None = None) -> None:
        """Update the parameters from their gradients, with the learning rate times `factor`.

        `correct` changes each gradient after loss scaling is undone and before clipping. Raises ValueError
        when it returns anything but a tensor of the same shape and type.
        """
        settings = self.settings
        for name, master in self.masters.items():
            parameter = self.parameters[name]
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                # What a term of the loss adds is there already.
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None
        updated = [value for group in self.optimizer.param_groups for value in group["params"]]
        gradients = [value.grad for value in updated if value.grad is not None]
        if settings.loss_scale != 1:
            for gradient in gradients:
                gradient.div_(settings.loss_scale)
        if correct is not None:
            self._correct(correct)
        if settings.largest_gradient_norm is not None:
            torch.nn.utils.clip_grad_norm_(updated, settings.largest_gradient_norm, foreach=False)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        self.optimizer.step()
        torch.autograd.graph.increment_version(updated)  # a fused step leaves their counts as they were
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, master in self.masters.items():
                self.parameters[name].copy_(master)

    def _correct(self, correct: Correction) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                updated = self.masters.get(name, parameter)
                if updated.grad is None:
                    continue
                corrected = correct(name, updated.grad)
                if not isinstance(corrected, Tensor):
                    raise ValueError(f"the correction of {name} is {corrected!r}; allowed: a gradient")
                if corrected.shape != updated.grad.shape:
                    found, expected = tuple(corrected.shape), tuple(updated.grad.shape)
                    raise ValueError(f"the correction of {name} has shape {found}; allowed: {expected}")
                if corrected.dtype != updated.grad.dtype:
                    kinds = corrected.dtype, updated.grad.dtype
                    raise ValueError(f"the correction of {name} has type {kinds[0]}; allowed: {kinds[1]}")
                updated.grad = corrected

    def values(self) -> dict[str, Tensor]:
        """Return the trained values, in float32 where a float32 copy is kept."""
        return {name: self.masters.get(name, value) for name, value in self.parameters.items()}

    def state(self) -> Iterator[Tensor]:
        """Yield every tensor that the optimizer holds: float32 copies and moments."""
        yield from self.masters.values()
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    def moments(self) -> dict[str, Tensor]:
        """Return the optimizer's state as named tensors: `<parameter>@exp_avg`, ..., `<parameter>@step`."""
        found = {}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state.get(self.masters.get(name, parameter), {})
            for key, value in state.items():
                if isinstance(value, Tensor):
                    found[f"{name}@{key}"] = value.detach()
        return found

    def set_moments(self, moments: dict[str, Tensor]) -> None:
        """Continue from the state that `moments` returned."""
        kinds = (*MOMENTS, "step")
        own = {f"{name}@{kind}" for name in self.parameters for kind in kinds}
        found = {name: value for name, value in moments.items() if name in own}
        found = staging.copies(found, self._device, torch.float32)
        for name, updated in self.values().items():
            state = {kind: found[f"{name}@{kind}"] for kind in kinds if f"{name}@{kind}" in found}
            if state:
                self.optimizer.state[updated] = state


def state_of(names: Iterable[str], parameters: Mapping[str, Tensor], settings: Training) -> dict[str, Tensor]:
    """Return tensors without values, with the names and shapes of `LocalOptimizer.moments` after a step."""
    kinds = ("exp_avg", "exp_avg_sq") if settings.optimizer == "adamw" else ("momentum_buffer",)
    if settings.optimizer == "sgd" and not settings.momentum:
        return {}
    state = {}
    for name in names:
        for kind in kinds:
            state[f"{name}@{kind}"] = torch.empty(parameters[name].shape, device="meta")
        if settings.optimizer == "adamw":
            state[f"{name}@step"] = torch.empty((), device="meta")
    return state
