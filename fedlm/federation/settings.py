"""Settings of the federation, of a client's training and of scoring."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from fedlm.base.settings import Settings


class Averaging(Settings):
    """The server's parameters become the clients' mean."""

    name: Literal["none"] = "none"


class ServerSgd(Settings):
    """Steps along the change of the mean; with momentum this is FedAvgM (arXiv:1909.06335)."""

    name: Literal["sgd"]
    learning_rate: float = Field(1.0, gt=0, le=100)
    momentum: float = Field(0.0, ge=0, lt=1)


class ServerAdaptive(Settings):
    """FedAdam and FedYogi (arXiv:2003.00295, algorithm 2)."""

    name: Literal["adam", "yogi"]
    learning_rate: float = Field(0.01, gt=0, le=100)
    betas: tuple[float, float] = Field((0.9, 0.99), strict=False, description="of the two moments")
    tau: float = Field(
        1e-3, gt=0, le=1, description="added to the root of the second moment, which starts at its square"
    )

    @model_validator(mode="after")
    def _betas_below_one(self) -> "ServerAdaptive":
        _require_below_one(self.betas)
        return self


class ServerAdagrad(Settings):
    """FedAdagrad (arXiv:2003.00295, algorithm 2)."""

    name: Literal["adagrad"]
    learning_rate: float = Field(0.01, gt=0, le=100)
    beta: float = Field(0.0, ge=0, lt=1, description="of the first moment")
    tau: float = Field(
        1e-3, gt=0, le=1, description="added to the root of the second moment, which starts at its square"
    )


class ServerAdamW(Settings):
    """AdamW as in PyTorch, with its correction of the moments' start and its weight decay."""

    name: Literal["adamw"]
    learning_rate: float = Field(1e-3, gt=0, le=100)
    betas: tuple[float, float] = Field((0.9, 0.999), strict=False, description="of the two moments")
    epsilon: float = Field(1e-8, gt=0, le=1)
    weight_decay: float = Field(0.01, ge=0, le=10)

    @model_validator(mode="after")
    def _betas_below_one(self) -> "ServerAdamW":
        _require_below_one(self.betas)
        return self


ServerOptimizer = Annotated[
    Averaging | ServerSgd | ServerAdaptive | ServerAdagrad | ServerAdamW, Field(discriminator="name")
]


UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def _bytes(value: Any) -> Any:
    """Return "300 MB" as a number of bytes, and anything else as it is."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?) ?([A-Za-z]+)", value.strip())
    if found is None or found[2] not in UNITS:
        raise ValueError(f"allowed: a number of bytes, or one with a unit: {', '.join(UNITS)}")
    return round(float(found[1]) * UNITS[found[2]])


class Budget(Settings):
    """The memory that a turn may take at some of the clients."""

    share: float = Field(gt=0, le=1, description="share of the clients")
    memory: Annotated[
        int,
        BeforeValidator(_bytes),
        Field(ge=1, le=2**60),
        WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}]}),
    ] = Field(description='peak memory of a turn, in bytes or with a unit: "300 MB", "2 GiB"')


class Federation(Settings):
    """Who takes part, how often, and what the server makes of a mean."""

    clients: int = Field(8, ge=1, le=1_000_000, description="number of clients")
    rounds: int = Field(3, ge=1, le=100_000, description="number of rounds")
    participation: float = Field(1.0, gt=0, le=1, description="share of the clients sampled in each round")
    dropout_rate: float = Field(
        0.0, ge=0, lt=1, description="probability that a sampled client downloads but never answers"
    )
    server_optimizer: ServerOptimizer | None = Field(
        None, description="how the server follows the clients' mean; None: as the method does, mostly plainly"
    )
    budgets: list[Budget] = Field(
        [],
        max_length=100,
        description="memory budgets of shares of the clients, drawn from the run's seed; the others have no "
        "limit. Methods that do not know budgets train as if there were none",
    )

    @model_validator(mode="after")
    def _shares_within_one(self) -> "Federation":
        total = sum(budget.share for budget in self.budgets)
        if total > 1 + 1e-9:
            raise ValueError(f"budgets: their shares add up to {total:g}; allowed: at most 1")
        return self


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
        _require_below_one(self.betas)
        return self


def _require_below_one(betas: tuple[float, float]) -> None:
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: {betas}; allowed: two numbers from 0 to below 1")
