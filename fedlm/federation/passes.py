"""Forward and backward passes over one batch, for training or for evaluation only."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import Module

from fedlm.data.prepared import IGNORED
from fedlm.exchange.declared import Way
from fedlm.federation.scoring import Batch, losses
from fedlm.federation.settings import Training
from fedlm.models.config import Kind
from fedlm.models.parts import Parts

Step = list[numpy.ndarray]  # indices of the examples of each forward pass of one optimizer step
Term = Callable[[dict[str, Tensor]], Tensor]
"""A term of the loss: takes the trained parameters by name, returns a scalar with its gradient."""
OutputTerm = Callable[[Batch, Any], Tensor]
"""A term of the loss: takes a batch and the model's outputs for it, returns a scalar with its gradient."""
Channel = Callable[[Way, Tensor, int], Tensor]
"""A link: takes a direction, what was sent and the number of the pass, returns what arrives."""


class Pass:
    """A pass over one batch; called, it returns the loss times its share, detached, in float32.

    With `backward` the gradients are added to the existing ones. `term` and `output_term` are added to the
    batch's loss before it is weighted, so that over the passes of one optimizer step they count once. `begin`
    makes the context of the pass: `Parts.behind` lets it begin with stored activations.
    """

    def __init__(
        self,
        model: Module,
        batch: Batch,
        settings: Training,
        share: float | Tensor = 1.0,
        backward: bool = True,
        term: Callable[[], Tensor] | None = None,
        output_term: OutputTerm | None = None,
        begin: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.model, self.batch, self.settings, self.share = model, batch, settings, share
        self.backward, self.term, self.output_term, self.begin = backward, term, output_term, begin

    @property
    def kind(self) -> tuple[bool, bool, bool]:
        """What its FLOPs depend on besides the batch: whether it goes back, and which terms it has."""
        return self.backward, self.term is not None, self.output_term is not None

    def __call__(self) -> Tensor:
        with nullcontext() if self.backward else torch.no_grad(), self.begin():
            with precision(self.batch, self.settings):
                loss = self._loss()
            if self.term is not None:
                loss = loss + self.term()
            loss = loss * self.share
            if self.backward:
                (loss * self.settings.loss_scale).backward()
        return loss.detach().float()

    def _loss(self) -> Tensor:
        if "start_positions" not in self.batch:
            outputs = self.model(**self.batch)
            loss = outputs.loss
        else:
            # Transformers' own loss would not know that soft prompts shift the positions of the answer.
            inputs = {name: value for name, value in self.batch.items() if not name.endswith("_positions")}
            outputs = self.model(**inputs)
            loss = losses("question_answering", outputs, self.batch).mean()
        return loss if self.output_term is None else loss + self.output_term(self.batch, outputs)


class PartPass:
    """A forward pass through parts of a model (see `Parts`), without gradients.

    Called, it returns what comes out of part `last`; `hidden` (windows, length, width) goes into part
    `first`, unless that is part 0.
    """

    kind = (False, False, False)

    def __init__(
        self, parts: Parts, first: int, last: int, batch: Batch, settings: Training, hidden: Tensor | None
    ) -> None:
        self.parts, self.first, self.last = parts, first, last
        self.batch, self.settings, self.hidden = batch, settings, hidden

    def __call__(self) -> Tensor:
        inputs = {n: v for n, v in self.batch.items() if n != "labels" and not n.endswith("_positions")}
        with torch.no_grad(), precision(self.batch, self.settings):
            return self.parts.through(self.first, self.last, inputs, self.hidden)

    @property
    def name(self) -> str:
        """What distinguishes its FLOPs from those of other passes over such a batch."""
        return f"parts {self.first} to {self.last}"


def precision(batch: Batch, settings: Training) -> AbstractContextManager:
    """Return the context of a pass in the precision of the settings."""
    device = next(iter(batch.values())).device.type
    return torch.autocast(device, getattr(torch, settings.autocast)) if settings.autocast else nullcontext()


class GivenBatches:
    """Batches of a given length; their content does not matter.

    `length` counts tokens, `two_kinds` is whether the model distinguishes first and second sentences.
    """

    def __init__(self, kind: Kind, length: int, two_kinds: bool = False) -> None:
        self.kind, self.length, self.two_kinds = kind, length, two_kinds

    def size(self, indices: numpy.ndarray) -> int:
        """Return the tokens of a batch."""
        return len(indices) * self.length

    def __call__(self, indices: numpy.ndarray) -> Batch:
        examples = len(indices)

        def whole(*shape: int) -> Tensor:
            return torch.ones(shape, dtype=torch.long)

        batch = {"input_ids": whole(examples, self.length), "attention_mask": whole(examples, self.length)}
        if self.two_kinds:
            batch["token_type_ids"] = whole(examples, self.length)
        if self.kind == "causal":
            batch["labels"] = whole(examples, self.length)
        elif self.kind == "question_answering":
            batch |= {"start_positions": whole(examples), "end_positions": whole(examples)}
        else:
            batch["labels"] = whole(examples) if self.kind == "classification" else torch.ones(examples)
        return batch


def targets(batch: Batch) -> int | Tensor:
    """Return how many values the batch's mean loss is a mean of, at least 1.

    Where that depends on the labels' values, it is a tensor, so that nothing waits for the device.
    """
    labels = batch.get("labels")
    if labels is None:
        return len(next(iter(batch.values())))
    if labels.is_floating_point() or labels.dim() == 1:
        return len(labels)
    return (labels[:, 1:] != IGNORED).sum().clamp(min=1)


class Crossing(torch.autograd.Function):
    """The place where activations leave the client, and their gradients come back.

    `send(way, tensor)` is called with each, and returns what arrives.
    """

    @staticmethod
    def forward(ctx: Any, activation: Tensor, send: Callable[[Way, Tensor], Tensor]) -> Tensor:
        ctx.send = send
        return send("up", activation)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.send("down", gradients[0]), None


def upward(activation: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Return what a pass sends to the server's part of a split model: activation, mask and labels."""
    rest = {name: value for name, value in batch.items() if name not in ("input_ids", "token_type_ids")}
    return {"activation": activation, **rest, "attention_mask": batch["attention_mask"].bool()}
