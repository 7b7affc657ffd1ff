"""How the server follows the clients' mean: plainly, or with an optimizer (Reddi et al. 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlm.federation.settings import Averaging, ServerAdagrad, ServerAdamW, ServerOptimizer, ServerSgd

if TYPE_CHECKING:
    from torch import Tensor


def follow(
    settings: ServerOptimizer, current: Tensor, mean: Tensor, start: Tensor, moments: dict[str, Tensor]
) -> Tensor:
    """Return a parameter's next value, given the mean of what clients made of `start`.

    The change `mean - start` takes the place of a negative gradient. `start` is mostly the current value
    itself; then plain averaging, and SGD with a rate of 1 and no momentum, return the mean bit for bit.
    `moments` is the optimizer's state of this parameter, replaced in place; it is empty at first.
    """
    if isinstance(settings, Averaging):
        return mean if start is current else current + (mean - start)
    if isinstance(settings, ServerSgd) and not settings.momentum:
        rate = settings.learning_rate
        return current.lerp(mean, rate) if start is current else current + rate * (mean - start)
    change = mean - start
    first = moments.get("first", change.new_zeros(change.shape))
    if isinstance(settings, ServerSgd):
        moments["first"] = settings.momentum * first + change
        return current + settings.learning_rate * moments["first"]
    if isinstance(settings, ServerAdamW):
        return _adamw(settings, current, change, moments)
    rate, tau, square = settings.learning_rate, settings.tau, change.square()
    second = moments.get("second", change.new_full(change.shape, tau**2))
    if isinstance(settings, ServerAdagrad):
        beta, second = settings.beta, second + square
    else:
        beta, decay = settings.betas
        if settings.name == "adam":
            second = decay * second + (1 - decay) * square
        else:
            second = second - (1 - decay) * square * (second - square).sign()
    moments["first"], moments["second"] = beta * first + (1 - beta) * change, second
    return current + rate * moments["first"] / (second.sqrt() + tau)


def _adamw(settings: ServerAdamW, current: Tensor, change: Tensor, moments: dict[str, Tensor]) -> Tensor:
    """Return the next value by PyTorch's formulas, with the negative change as the gradient."""
    (one, two), rate = settings.betas, settings.learning_rate
    zeros = change.new_zeros(change.shape)
    steps = moments.get("steps", change.new_zeros(())) + 1
    first = one * moments.get("first", zeros) + (1 - one) * change
    second = two * moments.get("second", zeros) + (1 - two) * change.square()
    moments |= {"steps": steps, "first": first, "second": second}
    root = (second / (1 - two**steps)).sqrt() + settings.epsilon
    return current * (1 - rate * settings.weight_decay) + rate * first / (1 - one**steps) / root
