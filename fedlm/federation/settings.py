"""Settings of the federation, of a client's training and of scoring."""

from typing import Literal

from pydantic import Field, model_validator

from fedlm.base.settings import Settings


class Federation(Settings):
    """Who takes part, and how often."""

    clients: int = Field(8, ge=1, le=1_000_000, description="number of clients")
    rounds: int = Field(3, ge=1, le=100_000, description="number of rounds")
    participation: float = Field(1.0, gt=0, le=1, description="share of the clients sampled in each round")
    dropout_rate: float = Field(
        0.0, ge=0, lt=1, description="probability that a sampled client downloads but never answers"
    )


class Training(Settings):
    """How a client trains in its turn, and how the server's model is scored."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(5e-5, gt=0, le=100)
    weight_decay: float = Field(0.0, ge=0, le=10)
    momentum: float = Field(0.0, ge=0, lt=1, description="of SGD")
    betas: tuple[float, float] = Field((0.9, 0.999), strict=False, description="of AdamW")
    epsilon: float = Field(1e-8, gt=0, le=1, description="of AdamW")
    batch_size: int = Field(16, ge=1, le=65_536, description="examples in one forward pass")
    accumulation: int = Field(1, ge=1, le=65_536, description="forward passes summed into one optimizer step")
    local_epochs: int = Field(1, ge=1, le=10_000, description="passes over the client's examples in one turn")
    local_steps: int | None = Field(
        None, ge=1, le=10_000_000, description="optimizer steps in one turn, instead of local_epochs"
    )
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the schedule in which the rate rises")
    schedule_span: Literal["federation", "turn"] = Field(
        "federation", description="whether the schedule runs over all rounds or restarts in each turn"
    )
    largest_gradient_norm: float | None = Field(None, gt=0, description="gradients are clipped to this norm")
    autocast: Literal["bfloat16", "float16"] | None = Field(None, description="precision of the arithmetic")
    loss_scale: float = Field(1.0, gt=0, le=2**24, description="factor on the loss, for float16 gradients")
    scoring_batch_size: int = Field(64, ge=1, le=65_536)
    score_every: int = Field(1, ge=1, description="rounds between two scores on the validation split")
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _betas_below_one(self) -> "Training":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: {self.betas}; allowed: two numbers from 0 to below 1")
        return self
