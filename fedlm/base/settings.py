"""Base class of everything that is read from a study file."""

import math

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Immutable settings; an unknown key is an error, numbers must be finite, and `true` is not a number."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


def nearest(share: float, count: int) -> int:
    """Return how many of `count` things a share is, to the nearest whole number; halves are rounded up."""
    return math.floor(share * count + 0.5)
