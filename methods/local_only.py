"""No federation: every client trains its own model over the rounds and nothing is ever merged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from fedlm.federation.method import Method

if TYPE_CHECKING:
    from fedlm.federation.method import Server, Tensor, Turn


class LocalOnly(Method):
    """Each client continues its own model; the score is the mean over the clients' models.

    Nothing crosses the network but the first broadcast. A client that was never sampled is not scored.
    """

    title = "Local only"
    reference = "control"
    control = True

    def averages(self) -> bool:
        return False

    def download(self, server: Server, client: int, round: int) -> dict[str, Tensor]:
        return {}

    def upload(self, turn: Turn) -> dict[str, Tensor]:
        turn.keep(turn.values(self.exchanged))
        return {}

    def models(self, server: Server) -> Iterable[Mapping[str, Tensor]]:
        return [kept for _, kept in sorted(server.kept.items())] or [server.tensors]
