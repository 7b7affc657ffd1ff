"""FedKSeed: all parameters are tuned without gradients, and only numbers of seeds and slopes are sent."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fedlm.base.randomness import derive, numpy_stream
from fedlm.exchange.declared import Declared
from fedlm.federation.method import KeepNothingConfig, Method
from fedlm.federation.search import LogRange
from fedlm.federation.state import Segment
from fedlm.federation.zeroth_order import descend, move, require_plain_steps

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy
    from torch import Tensor

    from fedlm.federation.method import Module, PreTrainedModel, Server, Upload
    from fedlm.federation.settings import Training
    from fedlm.federation.turn import Turn


class FedKSeed(Method):
    """Zeroth-order tuning in a pool of K directions (Qin et al. 2024).

    The pool is known to all. A client draws a direction of the pool for each step, finds the slope of its
    loss along it by two forward passes, and steps; it uploads the number and the slope of each step. The
    server keeps, for each direction, the sum over all rounds of the clients' mean slopes. From these K sums
    anybody makes the model: the pretrained one, minus the learning rate times the sum, along each direction.
    See docs/methods/fedkseed.md.
    """

    title = "FedKSeed"
    reference = "arXiv:2312.06353"
    search = {"training.learning_rate": LogRange(3e-5, 3e-3)}

    class Config(KeepNothingConfig):
        """The pool of directions, and how it is used."""

        seeds: int = Field(4096, ge=1, le=2**20, description="directions in the pool (K)")
        epsilon: float = Field(5e-4, gt=0, le=1, description="half the distance of the two forward passes")
        pro: bool = Field(
            False, description="FedKSeed-Pro: directions with steeper slopes so far are drawn more often"
        )
        largest_slope: float = Field(
            1000, gt=0, le=1e12, description="steeper slopes count as this one when `pro` compares directions"
        )
        weights: Literal["examples", "uniform"] = Field(
            "examples", description="weights of the mean of the clients' slopes"
        )

    config: Config

    def check_training(self, training: Training) -> None:
        require_plain_steps(training)

    def adapt(self, model: PreTrainedModel, kind: str) -> Module:
        self._model = model
        return model

    def messages(self) -> dict[str, Declared]:
        pool = self.config.seeds
        declared = {
            "sums": Declared((pool,), "float32", ("down",)),
            "numbers": Declared((None,), "int16" if pool <= 2**15 else "int32", ("up",)),
            "slopes": Declared((None,), "float32", ("up",)),
        }
        return declared | (
            {"probabilities": Declared((pool,), "float32", ("down",))} if self.config.pro else {}
        )

    def segments(self, client: int, round: int, steps: int) -> list[Segment]:
        return [Segment("queries", self.exchanged, steps, forward_only=True)]

    def download(self, server: Server, client: int, round: int) -> dict[str, Tensor]:
        state = self._state(server)
        sent = {"sums": self._as_sent(state["sums"])}
        if self.config.pro:
            sent["probabilities"] = probabilities(state["steepness"], state["draws"])
        return sent

    def rebuild(self, received: dict[str, Tensor]) -> dict[str, Tensor]:
        if received["sums"].is_meta:
            return received
        rate, device = self.training.learning_rate, next(self._model.parameters()).device
        steps = [(number, -rate * total) for number, total in enumerate(received["sums"].tolist()) if total]
        copy = dict(received)
        for name in self.exchanged:
            value = received[name].to(device, copy=True)
            for number, distance in steps:
                move({name: value}, self._seed(number), distance)
            copy[name] = value.cpu()
        return copy

    def train(self, turn: Turn) -> None:
        import torch

        (segment,) = self.segments(turn.client, turn.round, turn.steps)
        numbers = self._draw(turn)
        slopes, losses = [], []
        for step in turn.each_step():
            seed = self._seed(numbers[step])
            slope, loss = descend(turn, segment, step, seed, self.config.epsilon, self._rounded)
            slopes.append(slope)
            losses.append(loss)
        turn.observed(fmean(losses))
        turn.results = {
            "numbers": torch.tensor(numbers[: len(slopes)], dtype=self.messages()["numbers"].dtype),
            "slopes": torch.tensor(slopes),
        }

    def upload(self, turn: Turn) -> dict[str, Tensor]:
        return turn.results

    def merge(self, server: Server, uploads: Iterable[Upload], round: int) -> None:
        import torch

        found = {name: torch.zeros_like(value) for name, value in self._state(server).items()}
        total = 0
        for upload in uploads:
            weight = upload.examples if self.config.weights == "examples" else 1
            numbers, slopes = upload.tensors["numbers"].long(), upload.tensors["slopes"].double()
            found["sums"].index_add_(0, numbers, slopes, alpha=weight)
            if self.config.pro:
                steepness = slopes.abs().clamp(max=self.config.largest_slope)
                found["steepness"].index_add_(0, numbers, steepness)
                found["draws"].index_add_(0, numbers, torch.ones_like(slopes))
            total += weight
        if not total:
            return
        found["sums"] /= total
        for name, value in found.items():
            server.state[name] = server.state[name] + value
        model = self.rebuild({**server.initial, "sums": self._as_sent(server.state["sums"])})
        for name in self.exchanged:
            server.update(name, model[name])

    def _state(self, server: Server) -> dict[str, Tensor]:
        """Return each direction's sum of mean slopes, and for `pro` how steep and how often drawn it was."""
        import torch

        for name in ("sums", "steepness", "draws") if self.config.pro else ("sums",):
            server.state.setdefault(name, torch.zeros(self.config.seeds, dtype=torch.float64))
        return server.state

    def _seed(self, number: int) -> int:
        return derive(self.seed, "direction", int(number))

    def _draw(self, turn: Turn) -> numpy.ndarray:
        """Return the number of each step's direction, drawn with replacement."""
        from fedlm.models.fake import has_values

        stream = numpy_stream(self.seed, "directions", turn.round, turn.client)
        chances = turn.received.get("probabilities")
        if chances is None or not has_values(chances):
            return stream.integers(self.config.seeds, size=turn.steps)
        exact = chances.double().numpy()
        return stream.choice(self.config.seeds, turn.steps, p=exact / exact.sum())

    def _as_sent(self, values: Tensor) -> Tensor:
        """Return values as the receiver has them: server and clients build their models from the same."""
        import torch

        return values.to(getattr(torch, self.config.payload)).float()

    def _rounded(self, slope: float) -> float:
        """Return a slope as the server receives it: the client steps by what it sends."""
        import torch

        if not slope:
            return slope  # the same in every precision, and what a probe finds, where nothing has a value
        return float(self._as_sent(torch.tensor(slope, dtype=torch.float64, device="cpu")))


def probabilities(steepness: Tensor, draws: Tensor) -> Tensor:
    """Return how probable each direction is: the softmax of its mean steepness, scaled to 0 to 1.

    `steepness` sums the absolute slopes found along each direction, `draws` counts them; each direction has
    one slope of 0 besides. No direction is more than e times as probable as another, and before any draw all
    are equally probable.
    """
    mean = steepness / (draws + 1)
    scaled = (mean - mean.min()) / (mean.max() - mean.min() + 1e-10)
    return scaled.softmax(0)
