"""The settings of a model. Importing this module must not import PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from fedlm.base.files import local_path
from fedlm.base.settings import Settings

if TYPE_CHECKING:
    import torch


Kind = Literal["classification", "regression", "causal", "question_answering"]


class ModelConfig(Settings):
    """Which pretrained model a study fine-tunes, and how it is loaded."""

    source: str = Field(
        min_length=1,
        description="A label of the catalogue (`python -m fedlm models`), a folder with config.json and "
        "safetensors, or a hub id owner/name.",
    )
    revision: str | None = Field(
        default=None, description="Branch, tag or commit of a hub model; the hub's default branch if absent."
    )
    trust_remote_code: bool = Field(
        default=False, description="Whether Python code that comes with the model may run."
    )
    weights: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Number format of the weights in memory."
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Recompute each layer's activations in the backward pass instead of storing them.",
    )
    dropout: Literal["model"] | Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="Probability written into every dropout field of the model's configuration, or `model` "
        "to keep the model's own. At 0 a turn needs no random numbers.",
    )

    @property
    def dtype(self) -> torch.dtype:
        """The torch number format of the weights."""
        import torch

        return getattr(torch, self.weights)

    def files(self) -> list[Path]:
        """Return the files of a local folder that define the model; none for a hub id."""
        found = local_path(self.source)
        if found.suffix == ".json" and found.is_file():
            return [found]
        return sorted(path for ending in ("json", "safetensors", "txt") for path in found.glob(f"*.{ending}"))
