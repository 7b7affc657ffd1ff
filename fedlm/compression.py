"""Reductions of what a client downloads: dropped layers, pruning, quantisation, stale blocks.

An operator acts on blocks of which this client trains nothing in this turn: the free blocks. What the client
trains, and what belongs to no block (head, embeddings, final norm), travels dense and exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from fedlm.errors import UserError
from fedlm.randomness import numpy_stream
from fedlm.settings import Settings

if TYPE_CHECKING:
    from fedlm.blocks import Anatomy, Block
    from fedlm.method import Method
    from fedlm.model_config import ModelConfig


class LayerDrop(Settings):
    """A random share of the layers does not travel, and the client's copy runs without them in this turn.

    Drawn anew in each turn from (seed, "layer_drop", round, client).
    """

    operator: Literal["layer_drop"]
    rate: float = Field(
        0.5, gt=0, lt=1, description="share of the layers not trained in this turn that are dropped"
    )

    def dropped(self, anatomy: Anatomy, free: list[Block], seed: int, round: int, client: int) -> list[int]:
        """Return the numbers of the layers, from 0 at the input, that the client's copy lacks in this turn.

        At least one layer of the model is left.
        """
        layers = [anatomy.layers.index(block.module) for block in free if block.module in anatomy.layers]
        count = min(_share(self.rate, len(layers)), len(anatomy.layers) - 1)
        stream = numpy_stream(seed, "layer_drop", round, client)
        return sorted(stream.choice(layers, count, replace=False).tolist()) if count else []


class Prune(Settings):
    """The weights of linear layers travel as a mask and the values that were kept (see fedlm.pruning)."""

    operator: Literal["prune"]
    sparsity: float = Field(
        0.5, gt=0, lt=1, description="share of each output row's weights that is set to zero"
    )
    criterion: Literal["magnitude", "wanda", "dsnot"] = "magnitude"
    calibration_examples: int = Field(
        32, ge=1, le=4096, description="validation examples that the criterion sees (wanda, dsnot)"
    )


class Quantize(Settings):
    """The weights of linear layers travel as one signed byte each and one scale per output channel."""

    operator: Literal["quantize"]


class Stale(Settings):
    """Of the blocks updated so far a random share is sent; the others stay as the client has them.

    That is as they were pretrained, or, with cache: last_visit, as it last had them. Blocks never updated
    cost nothing under any cache, since a client that is left with pretrained blocks must have them. Drawn
    anew in each turn from (seed, "stale", round, client). FedCyBGD's own operator, which there may hit the
    block that is to be trained.
    """

    operator: Literal["stale"]
    share: float = Field(0.5, ge=0, le=1, description="share of the updated blocks that is sent")

    def left_out(self, updated: list[Block], seed: int, round: int, client: int) -> list[Block]:
        """Return those of the updated free blocks that are not sent in this turn."""
        stream = numpy_stream(seed, "stale", round, client)
        sent = set(stream.permutation(len(updated))[: _share(self.share, len(updated))].tolist())
        return [block for index, block in enumerate(updated) if index not in sent]


Compression = Annotated[LayerDrop | Prune | Quantize | Stale, Field(discriminator="operator")]


def free_blocks(anatomy: Anatomy, trained: Iterable[str]) -> list[Block]:
    """Return the blocks none of whose parameters is among the trained ones."""
    trained = set(trained)
    return [block for block in anatomy.blocks if trained.isdisjoint(block.parameters)]


def check(method: Method, model: ModelConfig, kind: str) -> None:
    """Raise UserError if the method's compression finds nothing to reduce; no weights are read.

    `method` is prepared with a model of shapes without values: take a fresh one.
    """
    if method.config.compression is None:
        return
    import torch

    from fedlm.blocks import find_blocks
    from fedlm.models import build_on_meta

    shapes = build_on_meta(model, kind, 2)
    with torch.device("meta"):
        adapted = method.prepare(shapes, kind)
    require_reducible(method, find_blocks(adapted))


def require_reducible(method: Method, anatomy: Anatomy) -> None:
    """Raise UserError if the method's compression would never find anything to reduce.

    `method` is prepared and has a compression; `anatomy` is that of the model as the method adapted it.
    """
    operator = method.config.compression
    exchanged = set(method.exchanged)
    # Clients and rounds may differ in what is trained; the first of each show whether any leaves a block.
    for round in (1, 2):
        for client in range(min(method.clients, 100)):
            for block in free_blocks(anatomy, method.trainable(client, round)):
                movable = not isinstance(operator, LayerDrop) or block.module in anatomy.layers
                if movable and not exchanged.isdisjoint(block.parameters):
                    return
    raise UserError(
        f"compression: {operator.operator} finds nothing to reduce, since every client of {method.name} "
        "trains all that it downloads; allowed: no compression, or a method whose clients train some of the "
        "blocks, such as fedcybgd"
    )


def _share(share: float, count: int) -> int:
    """Return a share of a count, halves rounded up."""
    return math.floor(share * count + 0.5)
