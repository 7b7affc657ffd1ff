"""Reduced uploads: the change of what a client trained, sparse or of low rank, with error feedback.

The server knows what the client received, so a message with some elements, or with factors of the change, is
enough for it to have a value for every element. With error feedback the client adds to its values what
earlier messages lacked, and keeps what this one lacks: the changes that the server sees and the rest that the
client has sum up to the true changes. The rest of a parameter is kept as `<parameter>@rest`, the factor from
which the next power iteration starts as `<parameter>@right`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedlm.base import staging
from fedlm.base.randomness import torch_stream
from fedlm.exchange import payload
from fedlm.exchange.compression import LowRankUpload, SparseUpload
from fedlm.exchange.payload import TOGETHER, LowRank, Sendable, Sparse


class Outgoing:
    """A client's upload: what is `sent`, in the form in which it travels, and what the client keeps.

    `received` holds what the client received of the server's parameters, `kept` what it kept from earlier
    turns. Values that are not of such parameters, or that the method itself has reduced, are sent as they
    are. `known` is what the server has already of what is sent in part.
    """

    def __init__(
        self,
        values: Mapping[str, Sendable],
        received: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
        settings: SparseUpload | LowRankUpload | None,
        seed: int,
    ) -> None:
        self.settings, self.received, self.kept, self.seed = settings, received, kept, seed
        self.wanted = self._wanted(values) if settings else {}
        self.sent: dict[str, Sendable] = {n: value for n, value in values.items() if n not in self.wanted}
        if isinstance(settings, LowRankUpload):
            self.sent |= {name: self._factors(name, value, settings) for name, value in self.wanted.items()}
        elif settings and self.wanted:
            self.sent[TOGETHER] = sparse(self.wanted, received, settings)
        self.known = {name: received[name] for name in payload.changed(self.sent)}

    def rest(self, arrived: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the client keeps, given what arrived at the server."""
        sent = self.sent.items()
        keep = {f"{name}@right": value.right for name, value in sent if isinstance(value, LowRank)}
        if self.settings and self.settings.error_feedback:
            partly = [name for name in self.known if name in self.wanted]
            keep |= {f"{name}@rest": self.wanted[name] - arrived[name] for name in partly}
        return keep

    def _wanted(self, values: Mapping[str, Sendable]) -> dict[str, Tensor]:
        """Return the values that the server should have: the client's, and what earlier messages lacked."""
        trained = {
            name: value
            for name, value in values.items()
            if isinstance(value, Tensor) and "@" not in name and name in self.received
        }
        wanted = staging.to_host(trained)
        for name in wanted:
            if (rest := self.kept.get(f"{name}@rest")) is not None:
                wanted[name] = wanted[name] + rest
        return wanted

    def _factors(self, name: str, value: Tensor, settings: LowRankUpload) -> Sendable:
        rank = settings.rank_of(tuple(value.shape))
        if rank is None:
            return value
        change = (value - self.received[name]).float().flatten(1)
        start = self.kept.get(f"{name}@right")
        if start is None:
            shape = (change.shape[1], rank)
            # The same at all clients, as in the paper.
            start = torch.randn(shape, generator=torch_stream(self.seed, "low rank", name))
        return power_iteration(change, start, settings.iterations)


def sparse(values: Mapping[str, Tensor], received: Mapping[str, Tensor], settings: SparseUpload) -> Sparse:
    """Return the elements of the values that changed most, in one ranking over all tensors."""
    values = staging.to_host(values)
    changes = [value - received[name] for name, value in values.items()]
    count = settings.count(sum(change.numel() for change in changes))
    return Sparse(values, largest(changes, count), count)


def largest(tensors: Iterable[Tensor], count: int) -> Tensor:
    """Return a mask over tensors laid end to end: true at the `count` elements of the largest magnitude.

    Of equal elements the first are chosen. What is not a number counts as the largest, so that it is seen.
    """
    magnitude = torch.cat([tensor.detach().flatten() for tensor in tensors]).abs()
    if magnitude.is_meta:
        return torch.empty(magnitude.shape, dtype=torch.bool, device="meta")
    magnitude = magnitude.cpu().nan_to_num(nan=torch.inf)
    if count == magnitude.numel():
        return torch.ones(count, dtype=torch.bool)
    bound = magnitude.kthvalue(magnitude.numel() - count + 1).values
    mask = magnitude > bound
    ties = (magnitude == bound).nonzero().flatten()
    mask[ties[: count - int(mask.sum())]] = True
    return mask


def power_iteration(change: Tensor, right: Tensor, iterations: int) -> LowRank:
    """Return factors of a matrix (rows, columns): left with orthonormal columns, right the matrix's image.

    `right` (columns, rank) is where the iteration starts.
    """
    left = torch.empty((len(change), right.shape[1]), device=change.device)
    for _ in range(iterations if not change.is_meta else 0):
        left = torch.linalg.qr(change @ right).Q
        right = change.T @ left
    return LowRank(left, right.to(change.device))
