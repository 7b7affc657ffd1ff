"""SHERL: a side module takes the early layers' outputs past them into the late layers.

Source: arXiv:2407.07523 (abstract) and its authors' code. See docs/methods/sherl.md.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fedlm.base.errors import UserError
from fedlm.federation.method import Method, MethodConfig
from fedlm.federation.search import LogRange

if TYPE_CHECKING:
    from torch import nn

    from fedlm.federation.method import Facts, Module, PreTrainedModel, Tensor

EPS = 1e-6  # the code's for T5
TEMPERATURE = 0.1  # of the gate


class SHERL(Method):
    """Only a side module and the head are trained, sent and averaged; no gradient reaches the early layers.

    Taps are the output of the embeddings and those of early layers, each reduced to the side module's width
    by an adapter of its own. The last tap is the guide. For each token the others are added to it, weighted
    by how well they agree with it and divided by how much they repeat each other. What comes out is projected
    to the model's width and enters the first late layer. The model's own layers are all frozen.
    """

    title = "SHERL"
    reference = "arXiv:2407.07523"
    search = {"training.learning_rate": LogRange(3e-4, 3e-2)}

    class Config(MethodConfig):
        """Size and places of the side module."""

        reduction: int = Field(
            4, ge=1, le=65_536, description="the model's width divided by the side module's, rounded down"
        )
        late: int = Field(1, ge=1, le=1000, description="number of last layers that gradients pass through")
        layers: list[int] | None = Field(
            None,
            description="numbers, from 0, of the early layers that are tapped besides the embeddings and the "
            "last early layer; None: all",
        )
        form: Literal["gated", "plain"] = Field(
            "gated",
            description="an adapter is a gated residual unit (the code for T5), or linear with a norm, and a "
            "norm ends the side module (the code for BERT)",
        )
        gate: Literal["learned", "open"] = Field(
            "learned",
            description="weight of the early layers' own output in the late layers' input: learned, zero at "
            "first; or one, and the side module's output zero at first, so that training starts from the "
            "pretrained model",
        )

    config: Config

    def check(self, facts: Facts) -> None:
        if self.config.reduction > facts.hidden:
            raise UserError(
                f"reduction: {self.config.reduction}; allowed: at most {facts.hidden}, the model's width"
            )
        self._tapped(facts.layers)

    def _tapped(self, layers: int) -> dict[str, int]:
        """Return the numbers of the layers whose inputs are tapped, by what made these; the last is late.

        Raises UserError if a model of so many layers lacks layers that the settings name.
        """
        late = layers - self.config.late
        if late < 1:
            raise UserError(f"late: {self.config.late}; allowed: at most {layers - 1}, all layers but one")
        early = range(late) if self.config.layers is None else self.config.layers
        if absent := [layer for layer in early if layer not in range(late)]:
            raise UserError(f"layers: {absent[0]}; allowed: 0 to {late - 1}, the layers before the late ones")
        made = {f"layer_{layer}": layer + 1 for layer in sorted({*early, late - 1})}
        return {"embeddings": 0, **made}

    def adapt(self, model: PreTrainedModel, kind: str) -> Module:
        paths = self.anatomy.layers
        tapped = {place: paths[number] for place, number in self._tapped(len(paths)).items()}
        late = model.get_submodule([*tapped.values()][-1])
        dropout = getattr(model.config, "hidden_dropout_prob", 0.0)
        side = self.side_module(model.config.hidden_size, [*tapped], dropout).to(next(late.parameters()))
        model.base_model.side = side
        route = _Route(side)
        for place, path in tapped.items():
            model.get_submodule(path).register_forward_pre_hook(partial(route.tap, place))
        late.register_forward_pre_hook(route.enter)
        # Where nothing before the side module needs a gradient, autograd stores nothing of the early layers.
        trained = {id(parameter) for parameter in side.parameters()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.anatomy.head or id(parameter) in trained)
        return model

    def side_module(self, hidden: int, places: list[str], dropout: float = 0.0) -> nn.ModuleDict:
        """Return the side module of a model of this width, with taps at these places, in float32."""
        import torch
        from torch import nn

        width, plain = hidden // self.config.reduction, self.config.form == "plain"

        def adapter() -> nn.ModuleDict:
            down = nn.Linear(hidden, width)
            if plain:
                return nn.ModuleDict({"down": down, "norm": nn.LayerNorm(width)})
            return nn.ModuleDict(
                {"down": down, "value": nn.Linear(width, width), "gate": nn.Linear(width, width)}
            )

        # Not in a ModuleList: the longest of a model's is taken for its layers.
        side = nn.ModuleDict({"adapters": nn.ModuleDict({place: adapter() for place in places})})
        side["score"] = nn.Linear(width, 1)
        side["up"] = nn.Linear(width, hidden)
        if plain:
            side["norm"] = nn.LayerNorm(hidden, eps=1e-12)
            side["dropout"] = nn.Dropout(dropout)
        if self.config.gate == "open":
            last = side["norm" if plain else "up"]
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
        else:
            side.register_parameter("gate", nn.Parameter(torch.zeros(())))
        return side


class _Route:
    """What the hooks of one forward pass hand from the early layers to the first late one."""

    def __init__(self, side: Any) -> None:
        self.side = side
        self.taps: list[Tensor] = []

    def tap(self, place: str, layer: Module, inputs: tuple[Any, ...]) -> None:
        """Reduce the input of a layer."""
        if place == "embeddings":
            self.taps = []
        self.taps.append(_reduced(self.side["adapters"][place], inputs[0]))

    def enter(self, layer: Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the inputs of the first late layer, its hidden states replaced."""
        import torch

        (*shallow, guide), self.taps = self.taps, []
        side, hidden = self.side, inputs[0]
        up = side["up"](merged(torch.stack(shallow, -2), guide, side["score"]).relu())
        if "norm" in side:
            up = side["dropout"](side["norm"](up))
        if hasattr(side, "gate"):
            hidden = torch.tanh(side.gate / TEMPERATURE) * hidden
        return (up + hidden, *inputs[1:])


def _reduced(adapter: Any, hidden: Tensor) -> Tensor:
    """Return hidden states (..., hidden) at the side module's width (..., width)."""
    down = adapter["down"](hidden)
    if "norm" in adapter:
        return adapter["norm"](down)
    down = down.relu()
    return (adapter["value"](down) + down) * adapter["gate"](down).sigmoid()


def merged(taps: Tensor, guide: Tensor, score: nn.Linear) -> Tensor:
    """Return the guide plus the weighted taps: (..., width) of (..., taps, width) and (..., width)."""
    return (shares(taps, guide, score).unsqueeze(-2) @ taps).squeeze(-2) + guide


def shares(taps: Tensor, guide: Tensor, score: nn.Linear) -> Tensor:
    """Return the weight of each tap, (..., taps): none is negative, and their sum is 1, or 0 if all are 0.

    The score of a tap is a linear function of its product, element by element, with the guide. What is
    positive of it is divided by the tap's redundancy, and by the sum over the taps.
    """
    scores = (taps @ (score.weight[0] * guide).unsqueeze(-1)).squeeze(-1) + score.bias
    scores = scores.relu() / redundancy(taps)
    return scores / (scores.sum(-1, keepdim=True) + EPS)


def redundancy(taps: Tensor) -> Tensor:
    """Return 1 plus the sum of the positive cosines with all other taps: (..., taps) of (..., taps, width).

    The 1 is a tap's cosine with itself, also where the tap is zero and divided by nothing else.
    """
    norms = taps.norm(dim=-1) + EPS
    # One norm after the other, since the product of two may be zero in half precision.
    cosines = taps @ taps.mT / norms.unsqueeze(-1) / norms.unsqueeze(-2)
    others = cosines.relu().triu(1)
    return 1 + others.sum(-1) + others.sum(-2)
