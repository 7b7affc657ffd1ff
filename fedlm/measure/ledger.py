"""Every payload's size in bytes."""

from collections import defaultdict
from typing import Any


class Ledger:
    """Every payload's size in bytes, by direction, round and client; and, separately, the first broadcast.

    The broadcast is the whole pretrained model, which each client receives before its first turn.
    """

    def __init__(self, broadcast: int) -> None:
        self.broadcast_size = broadcast
        self.clients: set[int] = set()
        self.download = self.downloads = 0  # bytes and number of payloads
        self.upload = self.uploads = 0
        self.round: dict[int, list[int]] = defaultdict(lambda: [0, 0])  # client: bytes down, bytes up

    def downloaded(self, client: int, size: int) -> None:
        """Record a payload from the server to a client."""
        self.clients.add(client)
        self.download += size
        self.downloads += 1
        self.round[client][0] += size

    def uploaded(self, client: int, size: int) -> None:
        """Record a payload from a client to the server."""
        self.upload += size
        self.uploads += 1
        self.round[client][1] += size

    def close_round(self) -> list[list[int]]:
        """Return the round's bytes as rows [client, bytes down, bytes up] and begin a new round."""
        rows = [[client, *sizes] for client, sizes in sorted(self.round.items())]
        self.round.clear()
        return rows

    def exchanged(self, client: int, down: int, up: int) -> None:
        """Record the messages within a client's turn, which do not count as payloads of their own."""
        self.download += down
        self.upload += up
        self.round[client][0] += down
        self.round[client][1] += up

    @property
    def broadcast(self) -> int:
        """Bytes of all first broadcasts so far."""
        return self.broadcast_size * len(self.clients)

    def state(self) -> list[Any]:
        """Return the state that the next round depends on, as plain values for a checkpoint."""
        return [self.download, self.downloads, self.upload, self.uploads, sorted(self.clients)]

    def restore(self, state: list[Any]) -> None:
        """Continue from what `state` returned."""
        self.download, self.downloads, self.upload, self.uploads, clients = state
        self.clients = set(clients)
