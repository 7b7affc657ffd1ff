"""What crosses the network besides parameters: of each tensor the shape and the type, declared beforehand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

Way = Literal["down", "up"]


class Declared(NamedTuple):
    """A tensor that a method sends besides parameters, or instead of them.

    `shape` has None for a dimension of any length, such as the number of steps of a turn. A floating `type`
    travels in the payload's precision and arrives in this type; others travel as they are. `ways` says in
    which directions it travels.
    """

    shape: tuple[int | None, ...]
    type: str = "float32"
    ways: tuple[Way, ...] = ("down", "up")

    @property
    def dtype(self) -> torch.dtype:
        """The type, as PyTorch's."""
        import torch  # here, because a study is checked without PyTorch

        return getattr(torch, self.type)

    def __str__(self) -> str:
        lengths = ", ".join("any" if length is None else str(length) for length in self.shape)
        return f"{self.type} of shape ({lengths})"
