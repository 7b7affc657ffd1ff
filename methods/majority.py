"""The control that reads no text: every answer is the class that most training examples have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fedlm.exchange.declared import Declared
from fedlm.federation.method import KeepNothingConfig, Method
from fedlm.federation.search import LogRange
from fedlm.federation.state import Segment

if TYPE_CHECKING:
    from torch import Tensor

    from fedlm.federation.method import Module, PreTrainedModel, Server, Upload
    from fedlm.federation.turn import Turn

SENT = "counts@sent"  # kept by a client that has sent its counts


class Majority(Method):
    """Each client sends once how many examples of each class its first turn has; nothing is trained.

    The answer to any text is the share of each class among all examples sent, so that the class of most
    examples is predicted. The loss is that of these shares, with `smoothing` added to each count. Counting
    takes one forward pass over the client's examples, as the suite shows a method texts in no other way.
    """

    title = "Majority class"
    reference = "control"
    control = True
    kinds = ("classification",)
    search = {"smoothing": LogRange(0.1, 10)}

    class Config(KeepNothingConfig):
        """What is added to the counts."""

        smoothing: float = Field(1.0, gt=0, le=1e6, description="examples added to each class's count")

    config: Config

    def averages(self) -> bool:
        return False

    def adapt(self, model: PreTrainedModel, kind: str) -> Module:
        self.classes = int(model.config.num_labels or 0)
        return model.requires_grad_(False)

    def messages(self) -> dict[str, Declared]:
        return {"counts": Declared((None,), "int32", ("up",))}

    def download(self, server: Server, client: int, round: int) -> dict[str, Tensor]:
        return {}

    def segments(self, client: int, round: int, steps: int) -> list[Segment]:
        return [Segment("counts", [], 0 if SENT in self.kept.get(client, {}) else steps, forward_only=True)]

    def train(self, turn: Turn) -> None:
        import torch

        from fedlm.models.readout import watching

        segment = Segment("counts", [], 0 if SENT in turn.kept else turn.steps, forward_only=True)
        device = next(turn.model.parameters()).device
        counts = torch.zeros(self.classes if segment.steps else 0, dtype=torch.int32, device=device)

        def count(hidden: Tensor, given: dict[str, Tensor]) -> None:
            counts.index_add_(0, given["labels"], torch.ones_like(given["labels"], dtype=torch.int32))

        if segment.steps:
            with watching(turn.model, count):
                turn.observed(turn.evaluate(segment))
        turn.results = {"counts": counts}

    def upload(self, turn: Turn) -> dict[str, Tensor]:
        import torch

        turn.keep({SENT: torch.ones(1, dtype=torch.bool)})
        return turn.results

    def merge(self, server: Server, uploads: Iterable[Upload], round: int) -> None:
        for upload in uploads:
            if len(counts := upload.tensors["counts"]):
                server.state["counts"] = server.state.get("counts", 0) + counts

    @contextmanager
    def answering(self, model: Module, server: Server) -> Iterator[None]:
        """Answer every text with the logarithm of each class's share."""
        if "counts" not in server.state:
            yield
            return

        def share(module: Module, inputs: tuple, outputs: Any) -> Any:
            counts = server.state["counts"].to(outputs.logits) + self.config.smoothing
            outputs.logits = (counts / counts.sum()).log().expand_as(outputs.logits)
            return outputs

        hook = model.register_forward_hook(share)
        try:
            yield
        finally:
            hook.remove()
