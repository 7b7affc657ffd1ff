"""FLASC: LoRA whose messages hold only the largest entries, in both directions.

Source: arXiv:2406.05233 and its code; CELLM (arXiv:2407.20557, withdrawn) describes the same messages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fedlm.exchange.compression import SparseUpload
from fedlm.federation.method import weighted_mean
from fedlm.federation.search import LogRange
from fedlm.federation.settings import ServerAdamW
from methods.fedlora import FedLoRA

if TYPE_CHECKING:
    from fedlm.exchange.payload import Sendable
    from fedlm.federation.method import Server, Upload
    from fedlm.federation.turn import Turn


class Flasc(FedLoRA):
    """FedLoRA with top-k messages over one ranking of adapters and head.

    A client receives the server's entries of the largest magnitude and starts with zeros elsewhere. It trains
    all entries and sends those that changed most, whether or not it received them. The mean of the changes,
    zero where nothing was sent, is the direction of a step of the server's AdamW on its dense values.
    """

    title = "FLASC"
    reference = "arXiv:2406.05233"
    server_optimizer = ServerAdamW(name="adamw")
    # The server's rate decides how far entries move at all; the authors' 1e-3 suits their 200 rounds.
    search = {
        "training.learning_rate": LogRange(3e-4, 3e-2),
        "server_optimizer.learning_rate": LogRange(1e-3, 1e-1),
    }

    class Config(FedLoRA.Config):
        """The densities of the messages."""

        rank: int = Field(16, ge=1, le=4096)
        variant: Literal["average"] = "average"  # the only one that FLASC has
        download_density: float = Field(0.25, gt=0, le=1, description="share of the entries sent to clients")
        upload_density: float = Field(0.25, gt=0, le=1, description="share of the entries sent back")
        weights: Literal["uniform", "examples"] = Field("uniform", description="weights of the mean")
        scored: Literal["masked", "dense"] = Field(
            "masked", description="the server's model with the round's mask, or with all its values"
        )
        moments: Literal["reset", "client"] = "reset"
        cache: Literal["none"] = "none"  # unsent entries are zero, not old
        compression: None = None
        upload_compression: None = None

    config: Config

    def download(self, server: Server, client: int, round: int) -> dict[str, Sendable]:  # type: ignore[override]
        from fedlm.exchange.payload import TOGETHER, Sparse

        if "mask" not in server.state:
            return dict(server.tensors)
        return {TOGETHER: Sparse(self._values(server), server.state["mask"], self._count(server))}

    def upload(self, turn: Turn) -> dict[str, Sendable]:  # type: ignore[override]
        from fedlm.exchange.payload import TOGETHER
        from fedlm.exchange.uploads import sparse

        values, density = super().upload(turn), self.config.upload_density
        if density == 1:
            return dict(values)
        return {TOGETHER: sparse(values, turn.received, SparseUpload(density=density))}

    def merge(self, server: Server, uploads: Iterable[Upload], round: int) -> None:
        from fedlm.exchange.payload import PRECISIONS
        from fedlm.exchange.uploads import largest

        if self.config.download_density < 1:
            server.state["mask"] = largest(self._values(server).values(), self._count(server))
        uniform = self.config.weights == "uniform"
        means = weighted_mean(one._replace(examples=1) if uniform else one for one in uploads)
        start, sent_as = self._masked(server), PRECISIONS[self.config.payload]
        for name, (mean, _) in means.items():
            # As the clients received it: AdamW would take the rounding of an unsent entry for a change.
            server.follow(name, mean, start[name].to(sent_as).to(mean.dtype))

    def models(self, server: Server) -> list[dict]:
        return [self._masked(server) if self.config.scored == "masked" else server.tensors]

    def _values(self, server: Server) -> dict:
        """Return the server's values in the order in which the ranking and the messages have them."""
        return {name: server.tensors[name] for name in self.exchanged}

    def _count(self, server: Server) -> int:
        elements = sum(value.numel() for value in server.tensors.values())
        return max(1, math.floor(self.config.download_density * elements))

    def _masked(self, server: Server) -> dict:
        """Return the server's values with zeros where the mask of this round is false."""
        if "mask" not in server.state:
            return server.tensors
        values = self._values(server)
        masks = server.state["mask"].split([value.numel() for value in values.values()])
        pairs = zip(values.items(), masks, strict=True)
        return {name: value.where(mask.view(value.shape), 0.0) for (name, value), mask in pairs}
