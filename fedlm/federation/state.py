"""What the server knows, what a client uploads, and the parts of a turn."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from fedlm.federation.server_optimizer import follow
from fedlm.federation.settings import Averaging, ServerOptimizer
from fedlm.federation.stored import ClientStates, Store

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Server:
    """What the server knows.

    `tensors` maps the name of each exchanged parameter to its current value on the CPU, `initial` to its
    value before the first round. `version` counts a parameter's changes, 0 for none. `state` is the method's
    own (control variates, for example), `moments` the state of the server's `optimizer`, by parameter and
    kind. `kept` is what a client keeps between its turns, by client; it is here since
    the simulation has one process, and no other client reads it. It is in the store's files, as is what
    clients keep of their downloads (see `Link`).
    """

    tensors: dict[str, Tensor]
    initial: dict[str, Tensor]
    version: dict[str, int] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    optimizer: ServerOptimizer = field(default_factory=Averaging)
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    store: Store = field(default_factory=Store)
    kept: ClientStates = field(init=False)

    def __post_init__(self) -> None:
        self.kept = ClientStates(self.store)

    def store_in(self, store: Store) -> None:
        """Put what clients keep from now on into another store."""
        self.store = self.kept.store = store

    def update(self, name: str, value: Tensor) -> None:
        """Give a parameter its new value. The old tensor is replaced, never written into."""
        self.tensors[name] = value
        self.version[name] = self.version.get(name, 0) + 1

    def follow(self, name: str, mean: Tensor, start: Tensor | None = None) -> None:
        """Move a parameter towards a mean of uploads, by the server's optimizer.

        `start` is the value from which the clients started, where that is not the parameter's own. A
        parameter that no client sent does not move, and its moments wait.
        """
        current, moments = self.tensors[name], self.moments.setdefault(name, {})
        start = current if start is None else start
        self.update(name, follow(self.optimizer, current, mean, start, moments))

    def restore_moments(self, moments: dict[str, Tensor]) -> None:
        """Continue with the server optimizer's moments, named `<kind>/<parameter>`."""
        self.moments = {}
        for name, value in moments.items():
            kind, _, parameter = name.partition("/")
            self.moments.setdefault(parameter, {})[kind] = value


class Upload(NamedTuple):
    """What the server received from one client: the tensors, by name, which the method may write to.

    Each is copied from the message when it is first asked for (see `payload.Received`).
    """

    client: int
    examples: int
    tensors: MutableMapping[str, Tensor]


class Segment(NamedTuple):
    """A part of a turn in which the same parameters are trained, with one optimizer.

    `frozen` names the parameters of each part of the model that the segment runs in evaluation mode: what is
    before the layers, then so many layers. If they are `stored`, what comes out of them is computed once a
    segment for each example, part by part, and training begins behind them: each part is in memory only
    while it computes.
    """

    label: str  # names the row of the memory table: "all", "block 3"
    trainable: list[str]
    steps: int
    forward_only: bool = False  # nothing is trained by gradients; see Turn.evaluate
    frozen: tuple[tuple[str, ...], ...] = ()
    stored: bool = False
