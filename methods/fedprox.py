"""FedProx: FedAvg whose clients are held near the model that they received."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from fedlm.federation.method import Method, MethodConfig

if TYPE_CHECKING:
    from torch import Tensor

    from fedlm.federation.turn import Turn


class FedProx(Method):
    """Local training with a proximal term (Li et al. 2020, algorithm 2, without its partial work).

    Each client minimises its loss plus mu / 2 times the squared distance to the received parameters.
    """

    title = "FedProx"
    reference = "arXiv:1812.06127"

    class Config(MethodConfig):
        """Strength of the pull."""

        mu: float = Field(0.01, ge=0, le=1000, description="weight of the proximal term")

    config: Config

    def train(self, turn: Turn) -> None:
        if not self.config.mu:
            return super().train(turn)
        import torch

        names = self.trainable(turn.client, turn.round)
        mu, anchor = self.config.mu, turn.copies(names)

        def now(name: str) -> Tensor:
            return turn.values([name])[name]

        # The term enters the loss as a number, and its gradient, mu (w - anchor), is added in place: autograd
        # would hold one more copy of all that is trained.
        @torch.no_grad()
        def proximal(trained: dict[str, Tensor]) -> Tensor:
            squares = [torch.dist(now(name), anchor[name]).square() for name in trained]
            return mu / 2 * sum(squares[1:], squares[0])

        def pull(name: str, gradient: Tensor) -> Tensor:
            return gradient.add_(now(name), alpha=mu).sub_(anchor[name], alpha=mu)

        for segment in self.segments(turn.client, turn.round, turn.steps):
            turn.fit(segment, term=proximal, correct=pull)
        return None
