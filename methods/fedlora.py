"""FedLoRA: only low-rank adapters and the head are trained, sent and averaged.

Sources: LoRA arXiv:2106.09685; its federated average FedIT arXiv:2305.05644; FFA-LoRA arXiv:2403.12313;
FedSA-LoRA arXiv:2410.01463; RoLoRA arXiv:2409.02346; FlexLoRA arXiv:2402.11505; FedEx-LoRA arXiv:2410.09432.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fedlm.base.errors import UserError
from fedlm.federation.method import Method, MethodConfig, weighted_mean
from fedlm.federation.search import LogRange

if TYPE_CHECKING:
    from fedlm.federation.method import Facts, Module, PreTrainedModel, Server, Tensor, Turn, Upload

# Glm is missing from peft's own table of attention projections.
TARGETS = {"glm": ["q_proj", "v_proj"]}


class FedLoRA(Method):
    """A frozen weight W gets a trainable update (alpha / rank) B A, with A (rank, in) and B (out, rank).

    The plain form averages A and B separately; the mean of A and the mean of B do not multiply to the mean
    of B A. The variants treat this differently:

    - `ffa`: A keeps its initial value, so the mean of B is exact.
    - `fedsa`: only A is shared; each client keeps its B, and the clients' own models are scored.
    - `rolora`: B is trained in odd rounds and A in even ones (B first: while it is zero, A has no gradient).
    - `flexlora`: the server averages the products and decomposes the mean into the best A and B of that rank.
    - `fedex`: A and B are averaged, and the difference to the mean product is added to the frozen weights,
      which are therefore sent to the clients from the second round on.
    """

    title = "FedLoRA"
    reference = "arXiv:2305.05644"
    search = {"training.learning_rate": LogRange(3e-4, 3e-2)}

    class Config(MethodConfig):
        """Shape of the adapters, and how they are averaged."""

        rank: int = Field(8, ge=1, le=4096)
        alpha: float = Field(16, gt=0, le=1e6, description="the update is scaled by alpha / rank")
        targets: list[str] | None = Field(
            None,
            min_length=1,
            description="ends of the adapted matrices' names; None: peft's choice",
        )
        variant: Literal["average", "ffa", "fedsa", "rolora", "flexlora", "fedex"] = "average"

    config: Config

    def check(self, facts: Facts) -> None:
        if self.config.rank > facts.hidden:
            raise UserError(f"rank: {self.config.rank}; allowed: at most {facts.hidden}, the model's width")

    def averages(self) -> bool:
        return self.config.variant not in ("flexlora", "fedex")

    def adapt(self, model: PreTrainedModel, kind: str) -> Module:
        from peft import LoraConfig, get_peft_model
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

        family = model.config.model_type
        targets = self.config.targets or TARGETS.get(family) or KNOWN.get(family)
        if not targets:
            raise UserError(
                f"targets: missing; name the matrices to adapt, since peft has no default for {family}"
            )
        names = [name for name, _ in model.named_modules()]
        absent = [
            target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)
        ]
        if absent:
            raise UserError(
                f"targets: {absent[0]!r} is not a module of the model; allowed: ends of module names"
            )
        head = {f"base_model.model.{name}" for name in self.anatomy.head}
        lora = LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.alpha,  # type: ignore[arg-type]  # peft declares int and takes any number
            target_modules=list(targets),
        )
        adapted = get_peft_model(model, lora)
        for name, parameter in adapted.named_parameters():
            adapter = "lora_A" not in name if self.config.variant == "ffa" else True
            parameter.requires_grad_(name in head or ("lora_" in name and adapter))
        self.adapted = {
            f"{name}.": bool(getattr(module, "fan_in_fan_out", False))
            for name, module in adapted.named_modules()
            if hasattr(module, "lora_A")
        }
        return adapted

    def prepare(self, model: PreTrainedModel, kind: str) -> Module:
        prepared = super().prepare(model, kind)
        self.shared = list(self.exchanged)
        if self.config.variant == "fedex":
            self.exchanged = self.shared + [f"{module}base_layer.weight" for module in self.adapted]
        return prepared

    def trainable(self, client: int, round: int) -> list[str]:
        if self.config.variant != "rolora":
            return self.shared
        frozen = "lora_A" if round % 2 else "lora_B"
        return [name for name in self.shared if frozen not in name]

    def download(self, server: Server, client: int, round: int) -> dict[str, Tensor]:
        if self.config.variant == "fedsa":
            return {name: value for name, value in server.tensors.items() if "lora_B" not in name}
        if self.config.variant == "fedex":
            unchanged = {
                name for name in self.exchanged if "base_layer" in name and name not in server.version
            }
            return {name: value for name, value in server.tensors.items() if name not in unchanged}
        return server.tensors

    def upload(self, turn: Turn) -> dict[str, Tensor]:
        values = super().upload(turn)
        if self.config.variant == "fedsa":
            own = {name: value for name, value in values.items() if "lora_B" in name}
            turn.keep({name: value for name, value in own.items() if "@" not in name})
            values = {name: value for name, value in values.items() if name not in own}
        return values

    def models(self, server: Server) -> Iterable[dict[str, Tensor]]:
        if self.config.variant == "fedsa" and server.kept:
            return ({**server.tensors, **kept} for _, kept in sorted(server.kept.items()))
        return [server.tensors]

    def merge(self, server: Server, uploads: Iterable[Upload], round: int) -> None:
        if self.config.variant not in ("flexlora", "fedex"):
            return super().merge(server, uploads, round)
        products: dict[str, tuple[Tensor, float]] = {}
        means = weighted_mean(self._with_products(uploads, products))
        if not means:
            return None
        for name, (value, _) in means.items():
            server.update(name, value)
        for module, (product, _) in products.items():
            if self.config.variant == "flexlora":
                self._decompose(server, module, product)
            else:
                self._add_residual(server, module, product)
        return None

    def _with_products(
        self, uploads: Iterable[Upload], products: dict[str, tuple[Tensor, float]]
    ) -> Iterator[Upload]:
        """Yield the uploads and add each module's product B A to a running weighted mean."""
        for upload in uploads:
            for module in self.adapted:
                a, b = (upload.tensors[name] for name in self._names(module))
                mean, weight = products.get(module, (None, 0))
                total = weight + upload.examples
                product = b @ a
                mean = product if mean is None else mean.lerp_(product, upload.examples / total)
                products[module] = (mean, total)
            yield upload

    def _names(self, module: str) -> tuple[str, str]:
        return f"{module}lora_A.default.weight", f"{module}lora_B.default.weight"

    def _decompose(self, server: Server, module: str, product: Tensor) -> None:
        import torch

        u, s, v = torch.linalg.svd(product, full_matrices=False)
        root, rank = s[: self.config.rank].sqrt(), self.config.rank
        self._set(server, module, root[:, None] * v[:rank], u[:, :rank] * root)

    def _set(self, server: Server, module: str, a: Tensor, b: Tensor) -> None:
        """Set a module's A and B. Where these have less than the rank, the rest of A stays and of B is 0."""
        import torch

        rank = len(a)
        for name, value, dim in zip(self._names(module), (a, b), (0, 1), strict=True):
            if rank < self.config.rank:
                rest = server.tensors[name].narrow(dim, rank, self.config.rank - rank)
                value = torch.cat([value, rest if dim == 0 else rest * 0], dim)
            server.update(name, value.contiguous())

    def _add_residual(self, server: Server, module: str, product: Tensor) -> None:
        a, b = (server.tensors[name] for name in self._names(module))
        residual = (product - b @ a) * (self.config.alpha / self.config.rank)
        weight = f"{module}base_layer.weight"
        server.update(weight, server.tensors[weight] + (residual.T if self.adapted[module] else residual))
