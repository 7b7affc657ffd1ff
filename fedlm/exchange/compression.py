"""Reductions of what crosses the network.

Of downloads: dropped layers, pruning, quantisation, stale blocks. Such an operator acts on blocks of which
this client trains nothing in this turn: the free blocks. What the client trains, and what belongs to no block
(head, embeddings, final norm), is sent in full.

Of uploads: sparse and low-rank changes of whatever the client trained (see `uploads`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from fedlm.base.randomness import numpy_stream
from fedlm.base.settings import Settings, nearest

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
        count = min(nearest(self.rate, len(layers)), len(anatomy.layers) - 1)
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
        sent = set(stream.permutation(len(updated))[: nearest(self.share, len(updated))].tolist())
        return [block for index, block in enumerate(updated) if index not in sent]


Compression = Annotated[LayerDrop | Prune | Quantize | Stale, Field(discriminator="operator")]


class SparseUpload(Settings):
    """Of all that a client uploads, only the parameters that changed most are sent (top-k).

    One ranking over all tensors, by the magnitude of the change from what the client received. At the server
    the others have the value that the client received.
    """

    operator: Literal["sparse"] = "sparse"
    density: float = Field(0.1, gt=0, le=1, description="share of the elements that is sent, rounded down")
    error_feedback: bool = Field(
        True, description="what is not sent is kept by the client and added to its next change"
    )

    def count(self, elements: int) -> int:
        """Return how many of so many elements are sent: at least one."""
        return max(1, math.floor(self.density * elements))


class LowRankUpload(Settings):
    """The change of each large matrix is sent as two factors (PowerSGD, arXiv:1905.13727, algorithm 1)."""

    operator: Literal["low_rank"] = "low_rank"
    rank: int = Field(4, ge=1, le=4096)
    iterations: int = Field(1, ge=1, le=100, description="power iterations, each from the one before")
    least_rate: float = Field(
        10.0, ge=0, description="a matrix is sent in full unless its factors are smaller by more than this"
    )
    error_feedback: bool = Field(
        True, description="what the factors lack is kept by the client and added to its next change"
    )

    def rank_of(self, shape: tuple[int, ...]) -> int | None:
        """Return the rank at which a tensor's change is sent; None if the tensor is sent in full."""
        if len(shape) < 2:
            return None
        rows, columns = shape[0], math.prod(shape[1:])
        rank = min(self.rank, rows, columns)
        return rank if rows * columns > self.least_rate * rank * (rows + columns) else None


UploadCompression = Annotated[SparseUpload | LowRankUpload, Field(discriminator="operator")]


def free_blocks(anatomy: Anatomy, trained: Iterable[str]) -> list[Block]:
    """Return the blocks none of whose parameters is among the trained ones."""
    trained = set(trained)
    return [block for block in anatomy.blocks if trained.isdisjoint(block.parameters)]
