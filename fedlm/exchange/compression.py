"""Reductions of what a client downloads: dropped layers, pruning, quantisation, stale blocks.

An operator acts on blocks of which this client trains nothing in this turn: the free blocks. What the client
trains, and what belongs to no block (head, embeddings, final norm), is sent in full.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from fedlm.base.randomness import numpy_stream
from fedlm.base.settings import Settings

if TYPE_CHECKING:
    from fedlm.models.blocks import Anatomy, Block


class LayerDrop(Settings):
    """A random share of the layers is not sent, and the client's copy runs without them in this turn.

    A new draw in each turn, from (seed, "layer_drop", round, client).
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
    """The weights of linear layers are sent as a mask and the values that were kept (see `pruning`)."""

    operator: Literal["prune"]
    sparsity: float = Field(
        0.5, gt=0, lt=1, description="share of each output row's weights that is set to zero"
    )
    criterion: Literal["magnitude", "wanda", "dsnot"] = "magnitude"
    calibration_examples: int = Field(
        32, ge=1, le=4096, description="validation examples that the criterion sees (wanda, dsnot)"
    )


class Quantize(Settings):
    """The weights of linear layers are sent as one signed byte each and one scale per output channel."""

    operator: Literal["quantize"]


class Stale(Settings):
    """A random share of the blocks updated so far is sent; the others stay as the client has them.

    The client has them as pretrained or, with cache: last_visit, as it last had them. Blocks never updated
    cost nothing under any cache, since a client that falls back on pretrained blocks must have them. A new
    draw in each turn, from (seed, "stale", round, client). FedCyBGD's own operator; in its authors' code it
    can also hit the block that is to be trained.
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


def _share(share: float, count: int) -> int:
    """Return a share of a count, halves rounded up."""
    return math.floor(share * count + 0.5)
