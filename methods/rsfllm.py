"""R-SFLLM: split federated learning over a link that adds noise to what crosses in each step.

Sources: arXiv:2407.11654 and its code; SplitFed v1 and v2 (arXiv:2004.12088) and its code. See
docs/methods/rsfllm.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fedlm.base.errors import UserError
from fedlm.base.randomness import numpy_stream, torch_stream
from fedlm.federation.method import Method, MethodConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fedlm.exchange.declared import Way
    from fedlm.federation.method import Facts, Module, PreTrainedModel, Server, Upload
    from fedlm.federation.turn import Turn


class RSFLLM(Method):
    """The client has the embeddings and the first blocks, the server all that follows.

    In each step the client sends its activations and the labels, and receives the activations' gradient. Its
    part travels once a round in each direction and is averaged. The server's part never travels: v1 has a
    copy of it for each client and averages them, v2 has one, which the round's clients train in turn. The
    radio link of the paper is reduced to its signal-to-noise ratio.
    """

    title = "R-SFLLM"
    reference = "arXiv:2407.11654"

    class Config(MethodConfig):
        """Where the model is split, and how noisy the link is."""

        variant: Literal["v1", "v2"] = Field(
            "v1",
            description="the server's part: a copy for each client, averaged; or one, trained by the clients "
            "in turn, in a new random order each round (SplitFed v1, v2)",
        )
        blocks: int = Field(0, ge=0, le=1000, description="blocks at the client; 0: only the embeddings")
        snr: float | None = Field(
            10.0,
            ge=-100,
            le=100,
            description="mean square of what is sent over the variance of the noise, in dB; None: no noise",
        )
        noise_at: Literal["training", "evaluation", "both"] = Field(
            "training", description="when activations are noisy; scores are clean unless noise is there, too"
        )
        noisy_gradients: bool = Field(
            False, description="whether the gradients that come down in training are noisy, too"
        )
        weights: Literal["uniform", "examples"] = Field("uniform", description="weights of the means")
        moments: Literal["reset"] = "reset"
        compression: None = None

    config: Config

    def check(self, facts: Facts) -> None:
        if self.config.blocks >= facts.blocks:
            raise UserError(
                f"blocks: {self.config.blocks}; allowed: at most {facts.blocks - 1}, since the server needs "
                f"one of the model's {facts.blocks}"
            )
        if self.config.blocks and facts.family == "deberta-v2":
            raise UserError(
                f"blocks: {self.config.blocks}; allowed for {facts.family}: 0, since all blocks read one "
                "table of relative positions"
            )

    def averages(self) -> bool:
        return self.config.variant == "v1"

    def adapt(self, model: PreTrainedModel, kind: str) -> Module:
        import torch

        if self.config.blocks and self.anatomy.shared:
            raise UserError(
                f"blocks: {self.config.blocks}; allowed: 0, since blocks of this model share parameters"
            )
        inner: Any = model
        output = inner.get_output_embeddings()
        if output is not None and output.weight is inner.get_input_embeddings().weight:
            # Client and server each need it, and train their own.
            output.weight = torch.nn.Parameter(output.weight.detach().clone())
        names = [name for block in self.anatomy.blocks[: self.config.blocks] for name in block.parameters]
        client = {*self.anatomy.embeddings, *names}
        self.at_client = [name for name, _ in model.named_parameters() if name in client]
        self.at_server = [name for name, _ in model.named_parameters() if name not in client]
        self.first = self.anatomy.layers[self.config.blocks]
        if self.config.snr is not None and self.config.noise_at != "training":
            model.get_submodule(self.first).register_forward_pre_hook(self._disturb_scoring)
        return model

    def cohorts(self, clients: list[int], round: int) -> list[list[int]]:
        if self.config.variant == "v1":
            return [clients]
        return [numpy_stream(self.seed, "order of clients", round).permutation(clients).tolist()]

    def download(self, server: Server, client: int, round: int) -> dict[str, Tensor]:
        return {name: server.tensors[name] for name in self.at_client}

    def rebuild(self, received: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**received, **self._part}

    def train(self, turn: Turn) -> None:
        def channel(way: Way, sent: Tensor, number: int) -> Tensor:
            noisy = self.config.noise_at != "evaluation" if way == "up" else self.config.noisy_gradients
            stream = torch_stream(
                self.seed, f"noise {way}", turn.round, turn.client, number, device=sent.device
            )
            return disturbed(sent, self.config.snr, stream) if noisy else sent

        with turn.exchange(self.first, channel):
            super().train(turn)

    def upload(self, turn: Turn) -> dict[str, Tensor]:
        from fedlm.federation.turn import snapshots

        self._trained = snapshots(turn.values(self.at_server))
        if self.config.variant == "v2":
            self._part = self._trained
        return turn.values(self.at_client)

    def merge(self, server: Server, uploads: Iterable[Upload], round: int) -> None:
        # What the server trains, in the turns that this merge asks for.
        self._part = {name: server.tensors[name] for name in self.at_server}
        super().merge(server, map(self._joined, uploads), round)
        if self.config.variant == "v2":
            for name, value in self._part.items():
                server.update(name, value)

    def models(self, server: Server) -> Iterable[Mapping[str, Tensor]]:
        self._scored = 0
        yield server.tensors

    def extra(self, server: Server) -> dict[str, float]:
        """Return how many parameters are at the client."""
        return {"client_parameters": float(sum(server.tensors[name].numel() for name in self.at_client))}

    def _joined(self, upload: Upload) -> Upload:
        """Return an upload with its weight and, in v1, with this client's copy of the server's part."""
        if self.config.weights == "uniform":
            upload = upload._replace(examples=1)
        if self.config.variant == "v1":
            upload = upload._replace(tensors={**upload.tensors, **self._trained})
        return upload

    def _disturb_scoring(self, module: Module, arguments: tuple) -> tuple | None:
        """Add noise to what the server's part is given in a pass that scores."""
        if module.training:
            return None
        # Counted from the beginning of a scoring, so that a resumed run draws the same.
        self._scored += 1
        stream = torch_stream(self.seed, "noise in scoring", self._scored, device=arguments[0].device)
        return disturbed(arguments[0], self.config.snr, stream), *arguments[1:]


def disturbed(sent: Tensor, snr: float | None, stream: torch.Generator) -> Tensor:
    """Return a tensor with Gaussian noise of variance mean(sent^2) / 10^(snr / 10); with None, itself."""
    import torch

    if snr is None:
        return sent
    variance = sent.float().square().mean() / 10 ** (snr / 10)
    noise = torch.randn(sent.shape, generator=stream, device=sent.device)
    return (sent + noise * variance.sqrt()).to(sent.dtype)
