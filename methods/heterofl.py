"""HeteroFL: a client trains a narrower model, as wide as its memory allows.

Source: arXiv:2010.01264 and its code. See docs/methods/heterofl.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from fedlm.base.errors import UserError
from fedlm.federation import budgets
from fedlm.federation.method import KeepNothingConfig, Method, add_to_mean
from fedlm.federation.state import Segment

if TYPE_CHECKING:
    from fedlm.federation.method import Facts, Module, PreTrainedModel, Server, Tensor, Upload

WIDEST = 1.0


class HeteroFL(Method):
    """Width reduction by the clients' budgets (Diao et al. 2021).

    At level n a client holds, trains and exchanges the sub-model of the n-th rate: of every hidden size the
    first part, of each head the first part. An entry's new value is the mean over the clients that hold it.
    """

    title = "HeteroFL"
    reference = "arXiv:2010.01264"

    class Config(KeepNothingConfig):
        """How narrow models may be, and how they are trained and averaged."""

        rates: tuple[float, ...] = Field(
            (WIDEST, 0.5, 0.25, 0.125, 0.0625),
            description="shares of the width, from 1 down; left out where no whole part of a head is left",
        )
        scaler: bool = Field(
            True,
            description="in training divide what a narrow model's layers return by its rate, as in the paper",
        )
        weights: Literal["equal", "examples"] = Field(
            "equal",
            description="of clients in a mean: equal, as in the paper, or by their numbers of examples",
        )

        @field_validator("rates")
        @classmethod
        def _falling(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
            falling = all(one > two for one, two in zip(rates, rates[1:], strict=False))
            if not rates or rates[0] != WIDEST or not falling or rates[-1] <= 0:
                raise ValueError("allowed: 1, then smaller and smaller shares above 0")
            return rates

    config: Config

    def check(self, facts: Facts) -> None:
        from fedlm.models.narrow import FAMILIES

        if facts.family not in FAMILIES:
            raise UserError(
                f"heterofl: where the heads of a model of type {facts.family} are is not known; allowed: "
                f"{', '.join(FAMILIES)}"
            )

    def prepare(self, model: PreTrainedModel, kind: str) -> Module:
        from fedlm.models.narrow import Narrow, head_size

        whole = [rate for rate in self.config.rates[1:] if head_size(model) * rate % 1 == 0]
        self.narrow = [Narrow(model, rate) for rate in whole]
        return super().prepare(model, kind)

    def levels(self) -> int:
        return 1 + len(self.narrow)

    def held(self, client: int, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        level = self.level.get(client, 0)
        if level == 0:
            return values
        return {name: self.narrow[level - 1].cut(name, value) for name, value in values.items()}

    def shaped(self, model: Module, client: int) -> AbstractContextManager[None]:
        level = self.level.get(client, 0)
        return self.narrow[level - 1].instead_of(model, self.config.scaler) if level else nullcontext()

    def segments(self, client: int, round: int, steps: int) -> list[Segment]:
        return [Segment(self._label(self.level.get(client, 0)), self.exchanged, steps)]

    def merge(self, server: Server, uploads: Iterable[Upload], round: int) -> None:
        means: dict[int, dict[str, tuple[Tensor, float]]] = {}
        for upload in uploads:
            weight = float(upload.examples) if self.config.weights == "examples" else 1.0
            add_to_mean(means.setdefault(self.level.get(upload.client, 0), {}), upload.tensors, weight)
            del upload  # not held while the next client has its turn
        found = means.pop(0, {})
        for level in sorted(means):
            # Narrower models are parts of wider ones: all entries of this part have the same weight so far.
            for name, (mean, weight) in means[level].items():
                before, total = found.get(name, (server.tensors[name].clone(), 0.0))
                part = self.narrow[level - 1].window(name, before)
                part.lerp_(mean.view(part.shape), weight / (total + weight))
                found[name] = before, total + weight
        for name, (value, _) in found.items():
            server.follow(name, value)

    def extra(self, server: Server) -> dict[str, float]:
        """Return how many clients have which width."""
        return budgets.count(self, self._label)

    def _label(self, level: int) -> str:
        return f"width {self.narrow[level - 1].rate:g}" if level else "all"
