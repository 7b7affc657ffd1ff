"""FedCyBGD: clients take turns; each trains one block of the model, which the server overwrites.

Its relatives are settings of the same code: several clients per block, averaged (FedBAvg); the whole model as
one block (Fed-full); one client with all data that moves to another block every K steps (BAdam,
arXiv:2404.02827).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, Self

import numpy
from pydantic import Field, model_validator

from fedlm.base.errors import UserError
from fedlm.base.randomness import numpy_stream
from fedlm.federation.method import Method, MethodConfig, Segment
from fedlm.federation.search import LogRange

if TYPE_CHECKING:
    from fedlm.federation.method import Facts, Module, PreTrainedModel, Tensor
    from fedlm.federation.turn import Turn


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

        order: Literal[
            "ascending",
            "descending",
            "shifted",
            "rotating",
            "random",
            "random_with_replacement",
            "gradient",
        ] = Field(
            "ascending",
            description="block of client c in round e (from 0), of B blocks and n clients: c mod B; "
            "B-1-(c mod B); (c + e n) mod B; (c + e) mod B; at random without replacement over the rounds; "
            "at random; the one with the largest root mean square of the gradient on the turn's first batch",
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

        @model_validator(mode="after")
        def _gradient_chooses_in_the_turn(self) -> Self:
            others = (self.blocks_per_turn, self.block, self.switch_every, self.compression, self.moments)
            if self.order == "gradient" and others != (1, "layer", None, None, "reset"):
                raise ValueError(
                    "order: gradient; allowed only with one block per turn, block: layer, moments: reset, no "
                    "switch_every and no compression, since a client chooses its block after the download"
                )
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
        places = 1 if self.config.pooled else -(-self.clients // self.config.clients_per_block)
        if self.config.order == "random_with_replacement":
            stream = numpy_stream(self.seed, "block order", place, turn)
            return sorted(stream.choice(count, width, replace=False).tolist())
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
            "gradient": place + turn,  # where nothing has a value, as in a prediction
        }[self.config.order]
        return sorted((first + offset) % count for offset in range(width))

    def segments(self, client: int, round: int, steps: int) -> list[Segment]:
        if self.config.block == "model":
            return [Segment("all", self.blocks[0], steps)]
        if self.config.order == "gradient":
            scored = [name for block in self.blocks for name in block]
            candidates = [
                Segment(f"block {number}", self._parameters([number]), steps)
                for number in range(len(self.blocks))
            ]
            return [Segment("scores", scored, 1), *candidates]
        blocks, every = self.block(client, round), self.config.switch_every or steps
        segments = []
        for begin in range(0, steps, every):
            label = "block " + "+".join(map(str, blocks))
            segments.append(Segment(label, self._parameters(blocks), min(every, steps - begin)))
            blocks = sorted((block + 1) % len(self.blocks) for block in blocks)
        return segments

    def trainable(self, client: int, round: int) -> list[str]:
        any_block = self.config.switch_every or self.config.order == "gradient"
        return self._parameters(range(len(self.blocks)) if any_block else self.block(client, round))

    def train(self, turn: Turn) -> None:
        if self.config.order != "gradient":
            return super().train(turn)
        scores, *candidates = self.segments(turn.client, turn.round, turn.steps)
        norms = turn.gradient_norms(scores)
        chosen = self.steepest(norms) if norms else self.block(turn.client, turn.round)[0]
        for number, segment in enumerate(candidates):
            # All are fitted, most of them for no step: a probe measures what each would need.
            turn.fit(segment if number == chosen else segment._replace(steps=0))
        turn.results = turn.values(candidates[chosen].trainable)
        return None

    def upload(self, turn: Turn) -> dict[str, Tensor]:
        return turn.results if self.config.order == "gradient" else super().upload(turn)

    def steepest(self, norms: dict[str, float]) -> int:
        """Return the number of the block whose gradient has the largest root mean square.

        `norms` has the L2 norm of the gradient of each parameter. Of equals the first is taken.
        """
        squares = [sum(norms[name] ** 2 for name in block) for block in self.blocks]
        sizes = [sum(math.prod(self.shapes[name]) for name in block) for block in self.blocks]
        return max(range(len(self.blocks)), key=lambda number: squares[number] / sizes[number])

    def _parameters(self, blocks: Iterable[int]) -> list[str]:
        names = dict.fromkeys(name for block in blocks for name in self.blocks[block])
        if self.config.block == "layer":
            names |= dict.fromkeys(self.anatomy.head)
        return list(names)
