"""RTD: nothing is trained; at test time the classes of similar examples of the clients are looked up.

Source: Reference Trustable Decoding, arXiv:2409.20181, and its code. See docs/methods/rtd.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from fedlm.base.errors import UserError
from fedlm.exchange.declared import Declared
from fedlm.federation.method import KeepNothingConfig, Method
from fedlm.federation.search import LogRange, OneOf
from fedlm.federation.state import Segment

if TYPE_CHECKING:
    from torch import Tensor

    from fedlm.federation.method import Facts, Module, PreTrainedModel, Server, Upload
    from fedlm.federation.settings import Training
    from fedlm.federation.turn import Turn

SENT = "keys@sent"  # kept by a client that has sent its keys
LEAST = 1e-6  # probability of a class that no neighbour has, so that the loss stays finite
MOST = 256  # stored examples from which the scale of distances is found


class RTD(Method):
    """A datastore of hidden states and classes, made by the clients in one forward pass over their examples.

    A client sends, the first time that it takes part, one key for each example (the final hidden state: of
    the last token for a decoder, the mean over tokens for an encoder) and its class; or only the sum of its
    keys for each class. At test time the k nearest keys vote, weighted by softmax(-squared distance /
    temperature), and their distribution is mixed with the model's own.
    """

    title = "RTD"
    reference = "arXiv:2409.20181"
    kinds = ("classification",)
    search = {"temperature": LogRange(0.01, 10), "neighbours": OneOf((4, 16, 64))}

    class Config(KeepNothingConfig):
        """What is stored, and how it answers."""

        store: Literal["entries", "class_sums"] = Field(
            "entries", description="a client sends a key for each example, or the sum of each class's keys"
        )
        neighbours: int | None = Field(
            32, ge=1, le=1_000_000, description="keys that vote (k); None: all of them"
        )
        temperature: float = Field(
            1.0,
            gt=0,
            le=1e30,
            description="in units of the median squared distance of a stored key to its k-th neighbour",
        )
        heads: int = Field(
            1, ge=1, le=1024, description="slices of the hidden state that vote apart (multi-head RTD)"
        )
        weight: float = Field(
            1.0, ge=0, le=1, description="of the datastore's answer; the rest is the model's own"
        )

    config: Config

    def check(self, facts: Facts) -> None:
        if facts.hidden % self.config.heads:
            raise UserError(
                f"heads: {self.config.heads}; allowed: a divisor of {facts.hidden}, the model's width"
            )

    def check_training(self, training: Training) -> None:
        if training.local_steps or training.local_epochs > 1:
            key = "local_steps" if training.local_steps else "local_epochs"
            raise UserError(
                f"training.{key}: {getattr(training, key)}; allowed: one epoch, since each example is "
                "stored once"
            )

    def averages(self) -> bool:
        return False

    def adapt(self, model: PreTrainedModel, kind: str) -> Module:
        from fedlm.models.loading import is_encoder

        self.width, self.classes = model.config.hidden_size, int(model.config.num_labels or 0)
        self.decoder = not is_encoder(model.config)
        return model.requires_grad_(False)

    def messages(self) -> dict[str, Declared]:
        # Without rows from a client that has sent its keys before.
        keys = Declared((None, self.width), ways=("up",))
        if self.config.store == "class_sums":
            return {"sums": keys, "counts": Declared((None,), "int32", ("up",))}
        return {"keys": keys, "classes": Declared((None,), "int32", ("up",))}

    def download(self, server: Server, client: int, round: int) -> dict[str, Tensor]:
        return {}

    def segments(self, client: int, round: int, steps: int) -> list[Segment]:
        steps = 0 if SENT in self.kept.get(client, {}) else steps
        return [Segment("queries", [], steps, forward_only=True)]

    def train(self, turn: Turn) -> None:
        import torch

        from fedlm.models.readout import watching

        segment = Segment("queries", [], 0 if SENT in turn.kept else turn.steps, forward_only=True)
        count = turn.examples if segment.steps else 0
        device = next(turn.model.parameters()).device
        keys = torch.empty(count, self.width, device=device)
        classes = torch.empty(count, dtype=torch.int32, device=device)
        filled = 0

        def store(hidden: Tensor, given: dict[str, Tensor]) -> None:
            nonlocal filled
            rows = slice(filled, filled + len(hidden))
            keys[rows], classes[rows] = self._key(hidden, given["attention_mask"]), given["labels"].int()
            filled = rows.stop

        if segment.steps:
            with watching(turn.model, store):
                turn.observed(turn.evaluate(segment))
        turn.results = {"keys": keys, "classes": classes}

    def upload(self, turn: Turn) -> dict[str, Tensor]:
        import torch

        keys, classes = turn.results["keys"], turn.results["classes"]
        turn.keep({SENT: torch.ones(1, dtype=torch.bool, device=keys.device)})
        if self.config.store == "entries":
            return turn.results
        rows = self.classes if len(keys) else 0
        sums = keys.new_zeros(rows, self.width)
        counts = torch.zeros(rows, dtype=torch.int32, device=keys.device)
        if rows:
            sums.index_add_(0, classes, keys)
            counts.index_add_(0, classes, torch.ones_like(classes))
        return {"sums": sums, "counts": counts}

    def merge(self, server: Server, uploads: Iterable[Upload], round: int) -> None:
        import torch

        state = server.state
        for upload in uploads:
            sent = {name: upload.tensors[name] for name in self.messages()}
            if not len(next(iter(sent.values()))):
                continue
            for name, value in sent.items():
                if name not in state:
                    state[name] = value
                elif self.config.store == "entries":
                    state[name] = torch.cat([state[name], value])
                else:
                    state[name] = state[name] + value

    @contextmanager
    def answering(self, model: Module, server: Server) -> Iterator[None]:
        """Mix the datastore's answer into the model's logits, which become logarithms of probabilities."""
        from fedlm.models.readout import watching

        store = self.datastore(server, next(model.parameters()).device)
        if store is None or not self.config.weight:
            yield
            return
        query: list[Tensor] = []

        def see(hidden: Tensor, given: dict[str, Tensor]) -> None:
            query[:] = [self._key(hidden, given["attention_mask"])]

        def mix(module: Module, inputs: tuple, outputs: Any) -> Any:
            found, weight = answer(query[0], store, self.classes), self.config.weight
            own = outputs.logits.float().softmax(-1)
            outputs.logits = (weight * found + (1 - weight) * own).clamp(min=LEAST).log()
            return outputs

        hook = model.register_forward_hook(mix)
        try:
            with watching(model, see):
                yield
        finally:
            hook.remove()

    def datastore(self, server: Server, device: Any = "cpu") -> Datastore | None:
        """Return what the server has from its clients, None before the first."""
        import torch

        state, config = server.state, self.config
        if not state:
            return None
        if config.store == "entries":
            keys, classes, neighbours = state["keys"], state["classes"].long(), config.neighbours
        else:
            classes = state["counts"].nonzero().flatten()
            keys = state["sums"][classes] / state["counts"][classes].unsqueeze(1)
            neighbours = None
        keys, classes = keys.float().to(device), classes.to(device)
        neighbours = min(neighbours or len(keys), len(keys))
        rows = torch.linspace(0, len(keys) - 1, min(MOST, len(keys)), device="cpu").long().to(device)
        # One more, since each is its own nearest.
        nearest = squared_distances(keys[rows], keys).topk(min(neighbours + 1, len(keys)), largest=False)
        scale = float(nearest.values[:, -1].median()) or 1.0
        return Datastore(keys, classes, neighbours, config.temperature * scale, config.heads)

    def _key(self, hidden: Tensor, mask: Tensor) -> Tensor:
        from fedlm.models.readout import at_token, mean_of_tokens

        return (at_token if self.decoder else mean_of_tokens)(hidden, mask).float()


class Datastore(NamedTuple):
    """Keys (entries, width) with their classes (entries,), and how they vote."""

    keys: Tensor
    classes: Tensor
    neighbours: int
    temperature: float
    heads: int = 1


def squared_distances(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the squared Euclidean distances (queries, keys)."""
    squares = queries.square().sum(1, keepdim=True) + keys.square().sum(1) - 2 * queries @ keys.T
    return squares.clamp(min=0)


def answer(queries: Tensor, store: Datastore, classes: int) -> Tensor:
    """Return the distribution over classes (queries, classes) of the queries' (queries, width) neighbours.

    Each head finds its own neighbours by its slice of the vectors; distances are scaled by the number of
    heads, so that one temperature serves all, and the heads' distributions are averaged.
    """
    found = queries.new_zeros(len(queries), classes)
    heads = store.heads
    slices = zip(queries.chunk(heads, 1), store.keys.chunk(heads, 1), strict=True)
    for query, keys in slices:
        nearest = squared_distances(query, keys).topk(store.neighbours, largest=False)
        weights = (-heads * nearest.values / store.temperature).softmax(1)
        found.scatter_add_(1, store.classes[nearest.indices], weights / heads)
    return found
