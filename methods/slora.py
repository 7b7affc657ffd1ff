"""SLoRA: a few rounds of sparse tuning find the start of LoRA's matrices.

Source: arXiv:2308.06522 (abstract); its re-implementation in FlexLoRA's code. See docs/methods/slora.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fedlm.base.errors import UserError
from fedlm.base.randomness import torch_stream
from fedlm.exchange.declared import Declared
from fedlm.federation.method import weighted_mean
from fedlm.federation.search import LogRange
from fedlm.federation.state import Segment
from methods.fedlora import FedLoRA

if TYPE_CHECKING:
    import numpy

    from fedlm.federation.method import Module, PreTrainedModel, Server, Tensor, Upload
    from fedlm.federation.settings import Training
    from fedlm.federation.turn import Turn


class SLoRA(FedLoRA):
    """Stage 1 tunes a random share of the entries of the adapted matrices; stage 2 is FedLoRA.

    After stage 1 the best approximation, of LoRA's rank, of each matrix's change becomes the product
    (alpha / rank) B A; the matrices themselves go back to their pretrained values, and what the approximation
    misses is lost. The head is trained in both stages.
    """

    title = "SLoRA"
    reference = "arXiv:2308.06522"
    search = {"training.learning_rate": LogRange(3e-4, 3e-2)}

    class Config(FedLoRA.Config):
        """The stages."""

        variant: Literal["average"] = "average"
        sparse_rounds: int = Field(5, ge=0, le=100_000, description="rounds of stage 1")
        density: float = Field(0.01, gt=0, le=1, description="share of the entries tuned in stage 1")
        mask: Literal["shared", "own"] = Field(
            "shared",
            description="one random mask for all, so that only its entries travel; or a new one for each "
            "turn (FlexLoRA's re-implementation), so that the whole matrices travel",
        )
        split: Literal["left", "even"] = Field(
            "left", description="which of B and A gets the singular values: B, or both their roots"
        )
        cache: Literal["none"] = "none"
        moments: Literal["reset"] = "reset"
        compression: None = None
        upload_compression: None = None

    config: Config

    def check_training(self, training: Training) -> None:
        if training.weight_decay and self.config.sparse_rounds:
            raise UserError(
                f"training.weight_decay: {training.weight_decay}; allowed: 0, since decay would also change "
                "the entries that stage 1 leaves alone"
            )

    def left_out(self, rounds: int) -> str:
        stage = self.config.sparse_rounds
        return f"stage 2, since sparse_rounds is {stage}" if rounds <= stage else ""

    def prepare(self, model: PreTrainedModel, kind: str) -> Module:
        prepared = super().prepare(model, kind)
        self.tuned = [f"{module}base_layer.weight" for module in self.adapted]
        self.head = [name for name in self.shared if "lora_" not in name]
        self._found: dict[str, numpy.ndarray] = {}
        if self.config.sparse_rounds:
            self.exchanged = self.shared + self.tuned
        return prepared

    def trainable(self, client: int, round: int) -> list[str]:
        return self.tuned + self.head if self._is_sparse(round) else self.shared

    def segments(self, client: int, round: int, steps: int) -> list[Segment]:
        label = "sparse" if self._is_sparse(round) else "adapters"
        return [Segment(label, self.trainable(client, round), steps)]

    def messages(self) -> dict[str, Declared]:
        # In stage 2 it is empty.
        return {"entries": Declared((None,))} if self._shares_mask() else {}

    def download(self, server: Server, client: int, round: int) -> dict[str, Tensor]:
        names = self.trainable(client, round)
        if not self._shares_mask():
            return {name: server.tensors[name] for name in names}
        dense = [name for name in names if name not in self.tuned]
        return {
            **{name: server.tensors[name] for name in dense},
            "entries": self._entries(server.tensors, round),
        }

    def rebuild(self, received: dict[str, Tensor]) -> dict[str, Tensor]:
        entries = received.get("entries")
        if entries is None or entries.is_meta or not len(entries):
            return received
        return received | self._matrices(received, entries)

    def train(self, turn: Turn) -> None:
        if not self._is_sparse(turn.round):
            return super().train(turn)
        from fedlm.base.staging import to_device

        device = next(turn.model.parameters()).device
        masks = to_device({name: self._mask(name, turn) for name in self.tuned}, device)

        def correct(name: str, gradient: Tensor) -> Tensor:
            return gradient.mul_(masks[name]) if name in masks else gradient

        for segment in self.segments(turn.client, turn.round, turn.steps):
            turn.fit(segment, correct=correct)
        return None

    def upload(self, turn: Turn) -> dict[str, Tensor]:
        values = super().upload(turn)
        if not self._shares_mask():
            return values
        sent = {name: value for name, value in values.items() if name not in self.tuned}
        return {**sent, "entries": self._entries(values, turn.round)}

    def merge(self, server: Server, uploads: Iterable[Upload], round: int) -> None:
        means = {name: mean for name, (mean, _) in weighted_mean(uploads).items()}
        entries = means.pop("entries", None)
        if entries is not None and self._is_sparse(round):
            means |= self._matrices(server.tensors, entries)
        for name, mean in means.items():
            server.follow(name, mean)
        if entries is not None and self._is_sparse(round):
            # A server optimizer's weight decay would move the others too, which the clients do not receive.
            masked = self._entries(server.tensors, round)
            for name, matrix in self._matrices(server.initial, masked).items():
                server.update(name, matrix)
        if round == self.config.sparse_rounds:
            self._switch(server)

    def extra(self, server: Server) -> dict[str, float]:
        """Return the share of the squared norm of stage 1's change that the matrices B A hold."""
        kept, whole = (
            (float(server.state[name]) for name in ("kept", "whole")) if server.state else (0.0, 0.0)
        )
        return {"kept_of_update": kept / whole} if whole else {}

    def _is_sparse(self, round: int) -> bool:
        return round <= self.config.sparse_rounds

    def _shares_mask(self) -> bool:
        return bool(self.config.sparse_rounds) and self.config.mask == "shared"

    def _positions(self, name: str) -> Tensor:
        """Return the places of the shared mask's entries in a matrix, ascending: (entries,) int64.

        They are stored as an array, not a tensor: all clients share them, and a turn's memory has its mask.
        """
        import torch

        if name not in self._found:
            self._found[name] = self._draw(name).flatten().nonzero().flatten().numpy()
        return torch.from_numpy(self._found[name])

    def _draw(self, name: str, *turn: int) -> Tensor:
        import torch

        stream = torch_stream(self.seed, "mask", name, *turn)
        return torch.rand(self.shapes[name], generator=stream, device="cpu") < self.config.density

    def _mask(self, name: str, turn: Turn) -> Tensor:
        """Return which entries of a matrix a turn trains, as bool; where nothing has a value, any."""
        import torch

        from fedlm.models.fake import has_values

        like = turn.received[name]
        mask = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
        if not has_values(like):
            return mask
        if self.config.mask == "own":
            return self._draw(name, turn.round, turn.client).to(like.device)
        mask.view(-1)[self._positions(name).to(like.device)] = True
        return mask

    def _entries(self, values: Mapping[str, Tensor], round: int) -> Tensor:
        """Return the masked entries of all matrices, one after the other; none in stage 2."""
        import torch

        from fedlm.base.staging import to_host

        if not self._is_sparse(round):
            return torch.empty(0)
        if values[self.tuned[0]].is_meta:
            return torch.empty(sum(len(self._positions(name)) for name in self.tuned), device="meta")
        matrices = to_host({name: values[name] for name in self.tuned})
        return torch.cat([value.float().flatten()[self._positions(name)] for name, value in matrices.items()])

    def _matrices(self, values: Mapping[str, Tensor], entries: Tensor) -> dict[str, Tensor]:
        """Return the matrices with these entries under the mask, and `values` elsewhere."""
        if entries.is_meta:
            return {name: values[name] for name in self.tuned}
        found, begin = {}, 0
        for name in self.tuned:
            positions = self._positions(name)
            matrix = values[name].clone()
            matrix.view(-1)[positions] = entries[begin : begin + len(positions)].to(matrix.dtype)
            found[name], begin = matrix, begin + len(positions)
        return found

    def _switch(self, server: Server) -> None:
        """Turn what stage 1 changed into B A, as far as the rank allows, and take it out of the matrices."""
        import torch

        kept = whole = 0.0
        scale, rank = self.config.alpha / self.config.rank, self.config.rank
        for module, name in zip(self.adapted, self.tuned, strict=True):
            current, first = server.tensors[name], server.initial[name]
            a, b = self._names(module)
            if not current.is_meta:
                change = current - first
                # Where modules hold their weights transposed, LoRA's product is its transpose.
                u, s, v = torch.linalg.svd(change.T if self.adapted[module] else change, full_matrices=False)
                whole += float(s.square().sum())
                kept += float(s[:rank].square().sum())
                if float(s[0]) == 0:
                    continue  # nothing was learned; B A stays zero, which trains
                even = self.config.split == "even"
                left = s[:rank].div(scale).sqrt() if even else s[:rank] / scale
                right = s[:rank].div(scale).sqrt() if even else torch.ones_like(s[:rank])
                self._set(server, module, right[:, None] * v[:rank], u[:, :rank] * left)
            else:
                server.update(a, server.tensors[a])
                server.update(b, server.tensors[b])
            server.update(name, first)
        server.state |= {"kept": torch.tensor(kept), "whole": torch.tensor(whole)}
