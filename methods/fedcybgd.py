"""FedCyBGD: clients take turns; each trains one block of the model, which the server overwrites.

Its relatives are settings of the same code: several clients per block, averaged (FedBAvg); the whole model as
one block (Fed-full); one client with all data that moves to another block every K steps (BAdam,
arXiv:2404.02827).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, Self

import numpy
from pydantic import Field, model_validator

from fedlm.base.errors import UserError
from fedlm.base.randomness import numpy_stream
from fedlm.federation.method import Method, MethodConfig, Segment
from fedlm.federation.search import LogRange

if TYPE_CHECKING:
    from fedlm.federation.method import Facts, Module, PreTrainedModel


class FedCyBGD(Method):
    """Cyclic block-wise tuning (arXiv:2406.11187, algorithm 1).

    Embeddings and the final norm are never trained; the head, where there is one, is trained by every client.
    A parameter that several layers share is a block of its own.
    """

    title = "FedCyBGD"
    reference = "arXiv:2406.11187"
    search = {"training.learning_rate": LogRange(2e-5, 2e-3)}

    class Config(MethodConfig):
        """Which block a client trains, and with whom."""

        order: Literal["ascending", "descending", "shifted", "rotating", "random"] = Field(
            "ascending",
            description="block of client c in round e (from 0), of B blocks and n clients: c mod B; "
            "B-1-(c mod B); (c + e n) mod B; (c + e) mod B; without replacement over the rounds",
        )
        clients_per_block: int = Field(1, ge=1, le=1_000_000, description="neighbours that train one block")
        blocks_per_turn: int = Field(1, ge=1, le=1000, description="blocks that a client trains at once")
        block: Literal["layer", "model"] = Field("layer", description="what a block is")
        pooled: bool = Field(False, description="one client holds all data")
        switch_every: int | None = Field(
            None, ge=1, description="optimizer steps after which a client moves on to the next block"
        )

        @model_validator(mode="after")
        def _whole_model_has_no_order(self) -> Self:
            if self.block == "model" and (self.blocks_per_turn > 1 or self.switch_every):
                raise ValueError("block: model; allowed only with blocks_per_turn: 1 and no switch_every")
            return self

    config: Config

    def check(self, facts: Facts) -> None:
        if self.config.blocks_per_turn > facts.blocks:
            raise UserError(
                f"blocks_per_turn: {self.config.blocks_per_turn}; allowed: at most {facts.blocks}, "
                "the blocks of the model"
            )

    def population(self, parts: list[numpy.ndarray]) -> list[numpy.ndarray]:
        return [numpy.sort(numpy.concatenate(parts))] if self.config.pooled else parts

    def adapt(self, model: PreTrainedModel, kind: str) -> Module:
        if self.config.block == "model":
            self.blocks = [[name for name, _ in model.named_parameters()]]
            return model
        self.blocks = [list(block.parameters) for block in self.anatomy.blocks]
        trained = {name for block in self.blocks for name in block}.union(self.anatomy.head)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        return model

    def cohorts(self, clients: list[int], round: int) -> list[list[int]]:
        groups: dict[int, list[int]] = {}
        for client in clients:
            groups.setdefault(client // self.config.clients_per_block, []).append(client)
        return list(groups.values())

    def block(self, client: int, round: int) -> list[int]:
        """Return the numbers of the blocks that a client trains at the start of its turn (round from 1)."""
        count, turn = len(self.blocks), round - 1
        width = min(self.config.blocks_per_turn, count)
        place = client // self.config.clients_per_block
        places = -(-self.clients // self.config.clients_per_block)
        if self.config.order == "random":
            # A pass is one permutation of the blocks, spread over the rounds.
            rounds_of_pass = count // width
            stream = numpy_stream(self.seed, "block order", place, turn // rounds_of_pass)
            first = turn % rounds_of_pass * width
            return sorted(stream.permutation(count)[first : first + width].tolist())
        first = {
            "ascending": place,
            "descending": count - 1 - place % count,
            "shifted": place + turn * places,
            "rotating": place + turn,
        }[self.config.order]
        return sorted((first + offset) % count for offset in range(width))

    def segments(self, client: int, round: int, steps: int) -> list[Segment]:
        if self.config.block == "model":
            return [Segment("all", self.blocks[0], steps)]
        blocks, every = self.block(client, round), self.config.switch_every or steps
        segments = []
        for begin in range(0, steps, every):
            label = "block " + "+".join(map(str, blocks))
            segments.append(Segment(label, self._parameters(blocks), min(every, steps - begin)))
            blocks = sorted((block + 1) % len(self.blocks) for block in blocks)
        return segments

    def trainable(self, client: int, round: int) -> list[str]:
        every = self.config.switch_every
        return self._parameters(range(len(self.blocks)) if every else self.block(client, round))

    def _parameters(self, blocks: Iterable[int]) -> list[str]:
        names = dict.fromkeys(name for block in blocks for name in self.blocks[block])
        if self.config.block == "layer":
            names |= dict.fromkeys(self.anatomy.head)
        return list(names)
