"""FedMeZO: FedLoRA whose clients train without gradients."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fedlm.base.randomness import derive
from fedlm.federation.search import LogRange
from fedlm.federation.state import Segment
from fedlm.federation.zeroth_order import descend, require_plain_steps
from methods.fedlora import FedLoRA

if TYPE_CHECKING:
    from fedlm.federation.settings import Training
    from fedlm.federation.turn import Turn


class FedMeZO(FedLoRA):
    """Adapters and head trained by MeZO in every client, and averaged (Ling et al. 2024).

    Each step has a new random direction, two forward passes on its batch, and a step along the direction. The
    trained tensors themselves cross the network, as in FedLoRA. See docs/methods/fedmezo.md.
    """

    title = "FedMeZO"
    reference = "arXiv:2402.05926"
    search = {"training.learning_rate": LogRange(3e-4, 3e-2)}

    class Config(FedLoRA.Config):
        """Shape of the adapters, how they are averaged, and how far apart the two forward passes are."""

        epsilon: float = Field(1e-3, gt=0, le=1, description="half the distance of the two forward passes")
        moments: Literal["reset"] = Field("reset", description="there are none")

    config: Config

    def check_training(self, training: Training) -> None:
        require_plain_steps(training)

    def segments(self, client: int, round: int, steps: int) -> list[Segment]:
        return [Segment("queries", self.trainable(client, round), steps, forward_only=True)]

    def train(self, turn: Turn) -> None:
        (segment,) = self.segments(turn.client, turn.round, turn.steps)
        losses = []
        for step in turn.each_step():
            seed = derive(self.seed, "direction", turn.round, turn.client, step)
            losses.append(descend(turn, segment, step, seed, self.config.epsilon)[1])
        turn.observed(fmean(losses))
