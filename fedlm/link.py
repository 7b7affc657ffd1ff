"""The way from the server to a client: what must travel, in which form, and what the client already has."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedlm import payload

if TYPE_CHECKING:
    from fedlm.federation import Federation


class Link:
    """Downloads of a federation: client caches and compression.

    What the client trains in this turn always arrives exactly; the other parameters may be reduced. `seen`
    notes, for clients that keep what they had, which version of each parameter that is and whether exactly.
    """

    def __init__(self, federation: "Federation") -> None:
        self.federation = federation
        self.method, self.server = federation.method, federation.server
        self.config = federation.method.config
        self.seen: dict[int, dict[str, tuple[int, bool]]] = {}

    def expected(self) -> dict[str, Tensor]:
        """Return, for every name that may be in a payload, a tensor of its shape and type."""
        expected = dict(self.server.initial)
        if self.config.moments == "handed_on":
            for name, value in self.server.initial.items():
                expected |= {f"{name}@{key}": value for key in ("exp_avg", "exp_avg_sq", "momentum_buffer")}
                expected[f"{name}@step"] = torch.zeros(())
        return expected

    def send(self, client: int, round: int) -> tuple[bytes, AbstractContextManager]:
        """Return the encoded download, and a context in which the model is as deep as the client's copy."""
        sent = self.plan(client, round)
        return payload.encode(sent, self.config.payload), nullcontext()

    def plan(self, client: int, round: int) -> dict[str, payload.Sendable]:
        """Return what travels to the client, each parameter in the form in which it travels."""
        trained = set(self.method.trainable(client, round))
        wanted = {
            name: value
            for name, value in self.method.download(self.server, client, round).items()
            if "@" not in name or name.partition("@")[0] in trained
        }
        return {name: value for name, value in wanted.items() if not self._has(client, name, name in trained)}

    def _has(self, client: int, name: str, exactly: bool) -> bool:
        """Return whether the client need not be sent this parameter."""
        version = self.server.version.get(name, 0)
        if self.config.cache == "none":
            return False
        if version == 0 and self.config.cache == "pretrained":
            return True
        seen, exact = self.seen.get(client, {}).get(name, (0, True))
        return self.config.cache == "last_visit" and seen == version and (exact or not exactly)

    def receive(self, client: int, message: bytes) -> dict[str, Tensor]:
        """Return the values of the client's copy: pretrained, then what it kept, then what it was sent."""
        decoded = payload.decode(message, self.expected())
        kept = self.server.kept.get(client, {})
        if self.config.cache == "last_visit":
            self._remember(client, decoded, exact=True)
        own = {name: value for name, value in kept.items() if "@" not in name}
        return {**self.server.initial, **own, **decoded}

    def _remember(self, client: int, values: dict[str, Tensor], exact: bool) -> None:
        self.server.kept.setdefault(client, {}).update(values)
        seen = self.seen.setdefault(client, {})
        for name in values:
            seen[name] = (self.server.version.get(name, 0), exact)

    def merged(self, cohort: list[int]) -> None:
        """Note that a client merged alone has exactly what the server now has of what it trained."""
        if self.config.cache != "last_visit" or len(cohort) != 1:
            return

    def books(self) -> dict[str, Any]:
        """Return what a checkpoint must hold, as plain values."""
        return {"seen": {str(client): seen for client, seen in self.seen.items()}}

    def restore(self, books: dict[str, Any]) -> None:
        """Continue from what `books` returned."""
        self.seen = {
            int(client): {name: (version, exact) for name, (version, exact) in seen.items()}
            for client, seen in books["seen"].items()
        }
