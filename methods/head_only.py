"""Linear probing: the pretrained model stays as it is and only the new head is trained and averaged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlm.federation.method import Method
from fedlm.federation.search import LogRange

if TYPE_CHECKING:
    from fedlm.federation.method import Module, PreTrainedModel


class HeadOnly(Method):
    """FedAvg over the head; the baseline that shows what tuning the transformer adds."""

    title = "Head only"
    reference = "control"
    control = True
    search = {"training.learning_rate": LogRange(1e-3, 1e-1)}
    kinds = ("classification", "regression", "question_answering")

    def adapt(self, model: PreTrainedModel, kind: str) -> Module:
        head = set(self.anatomy.head)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in head)
        return model
