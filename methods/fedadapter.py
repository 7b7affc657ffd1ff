"""Federated bottleneck adapters: only small modules inside the layers and the head are trained and averaged.

Sources: Houlsby et al. 2019, arXiv:1902.00751, section 2; adapters after the feed-forward only, at
half the size, follow Pfeiffer et al. 2021, arXiv:2005.00247. peft (0.21) has no such adapter: its tuners
change weights or inputs.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fedlm.base.errors import UserError
from fedlm.federation.method import Method, MethodConfig
from fedlm.federation.search import LogRange

if TYPE_CHECKING:
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    from fedlm.federation.method import Module, PreTrainedModel, Tensor

    Projection = Linear | Conv1D


class FedAdapter(Method):
    """x becomes x + up(GELU(down(x))), with down (width, hidden) and up (hidden, width), both with a bias.

    It is placed where a sub-layer (attention, feed-forward) has projected back to the model's width, before
    the residual connection and any norm. `up` starts at zero, so training starts from the pretrained model.
    Layers that share a projection share its adapter. Unlike in the paper the layers' norms stay frozen.
    """

    title = "FedAdapter"
    reference = "arXiv:1902.00751"
    search = {"training.learning_rate": LogRange(1e-4, 1e-2)}

    class Config(MethodConfig):
        """Size and places of the adapters."""

        width: int = Field(64, ge=1, le=4096, description="width of the bottleneck")
        placement: Literal["both", "feed_forward"] = Field(
            "both", description="after attention and feed-forward, or after the feed-forward only"
        )

    config: Config

    def adapt(self, model: PreTrainedModel, kind: str) -> Module:
        model.requires_grad_(False)
        found = [end for path in self.anatomy.layers for end in self._projections(path, model)]
        for projection in dict.fromkeys(found):  # shared projections occur in each layer
            self._insert(projection, model.config.hidden_size)
        head = set(self.anatomy.head)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in head or ".adapter." in name)
        return model

    def _projections(self, path: str, model: PreTrainedModel) -> list[Projection]:
        """Return the linear modules that end a layer's sub-layers; the attention always comes first."""
        layer = model.get_submodule(path)
        attention = next(filter(None, map(_linear_modules, layer.children())), [])
        ends = [attention[-1:], _linear_modules(layer)[-1:]]
        found = [module for end in ends for module in end]
        if any(module.weight.shape[_output(module)] != model.config.hidden_size for module in found):
            raise UserError(
                f"method fedadapter: {type(layer).__name__} does not end its attention and its feed-forward "
                "with a projection to the model's width; allowed: a model whose layers do"
            )
        return found if self.config.placement == "both" else found[-1:]

    def _insert(self, projection: Projection, hidden: int) -> None:
        from torch import nn

        like: dict[str, Any] = {"dtype": projection.weight.dtype, "device": projection.weight.device}
        down = nn.Linear(hidden, self.config.width, **like)
        up = nn.Linear(self.config.width, hidden, **like)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        projection.adapter = nn.Sequential(OrderedDict(down=down, activation=nn.GELU(), up=up))
        projection.register_forward_hook(_adapted)


def _adapted(projection: Any, inputs: tuple, output: Tensor) -> Tensor:
    return output + projection.adapter(output)


def _linear_modules(module: Module) -> list[Projection]:
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    return [part for part in module.modules() if isinstance(part, Linear | Conv1D)]


def _output(module: Projection) -> int:
    """Return the output dimension of the weight; Conv1D stores it transposed."""
    return 0 if hasattr(module, "out_features") else 1
