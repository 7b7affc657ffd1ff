"""Training by forward passes alone: the slope of the loss along a random direction, and a step along it.

Simultaneous perturbation (Spall 1992), made frugal by MeZO (Malladi et al. 2023, arXiv:2305.17333, algorithm
1): a direction is never held as a whole, since its seed gives it again, one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from fedlm.base.errors import UserError
from fedlm.base.randomness import torch_stream

if TYPE_CHECKING:
    from torch import Tensor

    from fedlm.federation.settings import Training
    from fedlm.federation.state import Segment
    from fedlm.federation.turn import Turn

PLAIN = {
    "weight_decay": 0.0,
    "momentum": 0.0,
    "schedule": "constant",
    "warmup": 0.0,
    "largest_gradient_norm": None,
}


def direction(seed: int, name: str, like: Tensor) -> Tensor:
    """Return a parameter's part of the direction of a seed: independent standard normal values.

    They depend on the seed, the parameter's name, shape and device, and on nothing else: not on the order of
    parameters, nor on which others are moved. They are in float32, or float64 where the parameter is.
    """
    import torch  # here, because a study is checked without PyTorch

    kind = torch.float64 if like.dtype == torch.float64 else torch.float32
    generator = torch_stream(seed, name, device=like.device)
    return torch.randn(like.shape, generator=generator, dtype=kind, device=like.device)


def move(parameters: Mapping[str, Tensor], seed: int, distance: float) -> None:
    """Move parameters in place, `distance` times the direction of the seed; without values, do nothing."""
    import torch

    with torch.no_grad():
        for name, value in parameters.items():
            if not value.is_meta:
                value.add_(direction(seed, name, value), alpha=distance)


def descend(
    turn: Turn,
    segment: Segment,
    step: int,
    seed: int,
    epsilon: float,
    rounded: Callable[[float], float] = float,
) -> tuple[float, float]:
    """Take one step of a turn along the direction of a seed; return the slope and the mean of the two losses.

    The slope is (loss(w + epsilon z) - loss(w - epsilon z)) / (2 epsilon), both on the step's examples, as
    `rounded` makes it; then w becomes w - rate * slope * z. The last way back and the step are one movement,
    so a step draws its direction three times.

    Raises TurnError when a loss is not finite.
    """
    parameters = dict(turn.model.named_parameters())
    moved = {name: parameters[name] for name in segment.trainable}
    one = segment._replace(steps=1)
    move(moved, seed, epsilon)
    above = turn.evaluate(one, begin=step)
    move(moved, seed, -2 * epsilon)
    below = turn.evaluate(one, begin=step)
    slope = rounded((above - below) / (2 * epsilon))
    move(moved, seed, epsilon - turn.settings.learning_rate * slope)
    return slope, (above + below) / 2


def require_plain_steps(training: Training) -> None:
    """Raise UserError if the training has settings that steps of a constant rate along directions ignore."""
    for key, plain in PLAIN.items():
        if (value := getattr(training, key)) != plain:
            allowed = "none" if plain is None else plain
            raise UserError(
                f"training.{key}: {value}; allowed: {allowed}, since the rate is constant and nothing has "
                "a gradient"
            )
