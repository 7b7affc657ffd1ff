"""SCAFFOLD: control variates correct the drift of clients whose data differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fedlm.base.errors import UserError
from fedlm.exchange.declared import Declared
from fedlm.federation.method import Method, MethodConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from fedlm.federation.method import Server, Upload
    from fedlm.federation.settings import Training
    from fedlm.federation.turn import Turn


class Scaffold(Method):
    """Stochastic controlled averaging (Karimireddy et al. 2020, algorithm 1, option II for the controls).

    The server sends its control c with the parameters x. Client i adds c - c_i to every gradient, trains to
    y_i, and sets c_i to c_i - c + (x - y_i) / r, with r the sum of the learning rates of its steps. It sends
    y_i and the change of c_i; both are averaged, and c changes by that mean times the share of clients that
    answered. The rule for c_i holds for plain SGD, so a study with another optimizer is refused.
    """

    title = "SCAFFOLD"
    reference = "arXiv:1910.06378"

    class Config(MethodConfig):
        """Whether gradients are corrected, and how clients are weighted."""

        corrected: bool = Field(True, description="false: no controls are sent, which is FedAvg")
        weights: Literal["uniform", "examples"] = Field(
            "uniform", description="weights of the mean of the parameters; that of the controls is uniform"
        )

    config: Config

    def check_training(self, training: Training) -> None:
        if self.config.corrected and (training.optimizer != "sgd" or training.momentum):
            given = f"training.optimizer: {training.optimizer}, momentum: {training.momentum:g}"
            raise UserError(
                f"{given}; allowed: sgd without momentum: a control is a mean gradient only if steps are "
                "gradients times the rate"
            )
        if self.config.corrected and training.largest_gradient_norm is not None:
            raise UserError(
                f"training.largest_gradient_norm: {training.largest_gradient_norm:g}; allowed: none: a "
                "control is a mean gradient only if steps are gradients times the rate"
            )

    def messages(self) -> dict[str, Declared]:
        names = self.exchanged if self.config.corrected else []
        return {f"{name}@control": Declared(self.shapes[name]) for name in names}

    def download(self, server: Server, client: int, round: int) -> dict[str, Tensor]:
        if not self.config.corrected:
            return server.tensors
        for name in self.exchanged:
            server.state.setdefault(
                f"{name}@control", server.tensors[name].new_zeros(server.tensors[name].shape)
            )
        return {**server.tensors, **server.state}

    def train(self, turn: Turn) -> None:
        if not self.config.corrected:
            return super().train(turn)
        from fedlm.base.staging import to_device

        # On the device once a turn, not once a step.
        device = next(turn.model.parameters()).device
        own = to_device(self._own_controls(turn), device)
        mean = to_device({name: turn.received[name] for name in own}, device)

        def correct(name: str, gradient: Tensor) -> Tensor:
            control = f"{name}@control"
            return gradient.add_(mean[control]).sub_(own[control])

        for segment in self.segments(turn.client, turn.round, turn.steps):
            turn.fit(segment, correct=correct)
        return None

    def upload(self, turn: Turn) -> dict[str, Tensor]:
        from fedlm.base.staging import to_host

        if not self.config.corrected:
            return super().upload(turn)
        values = to_host(super().upload(turn))
        own, changes = self._own_controls(turn), {}
        for name in self.trainable(turn.client, turn.round):
            control = f"{name}@control"
            moved = turn.received[name] - values[name]
            changes[control] = moved / turn.total_rate - turn.received[control]
            turn.keep({control: own[control] + changes[control]})
        return {**values, **changes}

    def merge(self, server: Server, uploads: Iterable[Upload], round: int) -> None:
        changes: dict[str, Tensor] = {}

        def parameters_only() -> Iterator[Upload]:
            for upload in uploads:
                for name in [name for name in upload.tensors if name.endswith("@control")]:
                    change = upload.tensors.pop(name)
                    changes[name] = changes[name].add_(change) if name in changes else change
                yield upload if self.config.weights == "examples" else upload._replace(examples=1)

        super().merge(server, parameters_only(), round)
        for name, change in changes.items():
            # |S| / N times the mean change is the sum of the changes divided by N.
            server.state[name] = server.state[name] + change / self.clients

    def _own_controls(self, turn: Turn) -> dict[str, Tensor]:
        names = [f"{name}@control" for name in self.trainable(turn.client, turn.round)]
        return {
            name: turn.kept[name]
            if name in turn.kept
            else turn.received[name].new_zeros(turn.received[name].shape)
            for name in names
        }
