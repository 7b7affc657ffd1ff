"""EmbracingFL: a client trains as many layers as its memory allows, counted from the output.

Source: arXiv:2406.15125 (abstract); no code was published. See docs/methods/embracingfl.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fedlm.federation import budgets
from fedlm.federation.method import Method, MethodConfig
from fedlm.federation.state import Segment

if TYPE_CHECKING:
    from fedlm.federation.method import Module, PreTrainedModel, Server


class EmbracingFL(Method):
    """Partial training of consecutive layers at the output, by the clients' budgets.

    At level 0 a client trains all, at level 1 all but the embeddings, at level n not the first n - 1 layers
    either, at the last only what is behind the layers. What it does not train is frozen for the turn. The
    server takes the mean of a parameter over the clients that trained it.
    """

    title = "EmbracingFL"
    reference = "arXiv:2406.15125"

    class Config(MethodConfig):
        """What becomes of the part that a client does not train."""

        activations: Literal["stored", "recomputed"] = Field(
            "stored",
            description="what comes out of the frozen layers: computed once a turn for each example, layer "
            "by layer, each in memory only meanwhile; or again in each step, with all layers in memory",
        )
        compression: None = None

    config: Config

    def prepare(self, model: PreTrainedModel, kind: str) -> Module:
        prepared = super().prepare(model, kind)
        layers = self.anatomy.blocks[: len(self.anatomy.layers)]
        # What all layers share is trained with the first of them.
        first = [*layers[0].parameters, *self.anatomy.shared]
        self.parts = [self.anatomy.embeddings, tuple(first), *(one.parameters for one in layers[1:])]
        return prepared

    def levels(self) -> int:
        return len(self.parts) + 1

    def trainable(self, client: int, round: int) -> list[str]:
        frozen = {name for part in self.parts[: self.level.get(client, 0)] for name in part}
        return [name for name in self.exchanged if name not in frozen]

    def segments(self, client: int, round: int, steps: int) -> list[Segment]:
        level = self.level.get(client, 0)
        return [
            Segment(
                self._label(level),
                self.trainable(client, round),
                steps,
                frozen=tuple(self.parts[:level]),
                stored=bool(level) and self.config.activations == "stored",
            )
        ]

    def extra(self, server: Server) -> dict[str, float]:
        """Return how many clients train which layers."""
        return budgets.count(self, self._label)

    def _label(self, level: int) -> str:
        if level == 0:
            return "all"
        return f"from layer {level - 1}" if level < len(self.parts) else "head"
