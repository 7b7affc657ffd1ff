"""Reductions of what a client downloads: pruning, quantisation, dropped layers, stale blocks."""

from typing import Annotated, Literal

from pydantic import Field

from fedlm.settings import Settings


class LayerDrop(Settings):
    """A random share of the layers does not travel, and the client's copy runs without them."""

    operator: Literal["layer_drop"]
    rate: float = Field(0.5, gt=0, lt=1, description="share of the layers that are dropped")


class Prune(Settings):
    """The matrices travel as a mask and the values that were kept."""

    operator: Literal["prune"]
    sparsity: float = Field(0.5, gt=0, lt=1, description="share of each output row's weights set to zero")
    criterion: Literal["magnitude", "wanda", "dsnot"] = "magnitude"
    calibration_examples: int = Field(
        32, ge=1, le=4096, description="validation examples that the criterion sees (wanda, dsnot)"
    )


class Quantize(Settings):
    """The matrices travel as one signed byte a weight and one scale per output channel."""

    operator: Literal["quantize"]


class Stale(Settings):
    """Of the blocks updated so far a random share is sent; the client keeps the pretrained ones otherwise."""

    operator: Literal["stale"]
    share: float = Field(0.5, ge=0, le=1, description="share of the updated blocks that is sent")


Compression = Annotated[LayerDrop | Prune | Quantize | Stale, Field(discriminator="operator")]
