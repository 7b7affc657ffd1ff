"""No federation: every client trains its own model over the rounds and nothing is ever merged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from fedlm.base.errors import UserError
from fedlm.federation.method import Method

if TYPE_CHECKING:
    from fedlm.federation.facts import Facts
    from fedlm.federation.method import Server, Tensor, Turn


class LocalOnly(Method):
    """Each client continues its own model; the score is the mean over the clients' models.

    Nothing crosses the network but the first broadcast. A client that was never sampled is not scored.
    """

    title = "Local only"
    reference = "control"
    control = True

    def check(self, facts: Facts) -> None:
        for name, nothing in {"cache": "none", "upload_compression": None}.items():
            if (given := getattr(self.config, name)) != nothing:
                raise UserError(f"{name}: {given}; allowed: none, since nothing is sent")
        if self.config.moments == "handed_on":
            raise UserError("moments: handed_on; allowed: reset, client, since nothing is sent")

    def averages(self) -> bool:
        return False

    def download(self, server: Server, client: int, round: int) -> dict[str, Tensor]:
        return {}

    def upload(self, turn: Turn) -> dict[str, Tensor]:
        turn.keep(turn.values(self.exchanged))
        return {}

    def models(self, server: Server) -> Iterable[Mapping[str, Tensor]]:
        return [kept for _, kept in sorted(server.kept.items())] or [server.tensors]
