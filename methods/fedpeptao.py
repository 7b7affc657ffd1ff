"""FedPepTAO: prefixes in all layers are trained, those of the most important layers are exchanged.

Source: arXiv:2310.15080 (abstract) and its code. See docs/methods/fedpeptao.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fedlm.base.errors import UserError
from fedlm.base.settings import nearest
from fedlm.exchange.declared import Declared
from fedlm.federation.method import weighted_mean
from fedlm.federation.search import LogRange
from fedlm.federation.state import Segment
from methods.fedprompt import FedPrompt

if TYPE_CHECKING:
    from fedlm.federation.method import Facts, Module, PreTrainedModel, Server, Tensor, Upload
    from fedlm.federation.optimizer import Correction
    from fedlm.federation.settings import Training
    from fedlm.federation.turn import Turn

SMOOTHING = 1e-5  # added to the eigenvalues of a layer's score
RATE_DECAY, LOWEST_RATE = 0.99, 1e-4  # of the server's step


class FedPepTAO(FedPrompt):
    """Prefix tuning in which some layers are shared and the others are personal (Che et al. 2023).

    In the first round clients only score the layers, on one batch each; the server chooses those of the
    highest scores. From then on a client trains the prefixes of all layers, and only those of the chosen
    layers, and the head, cross the network. The server averages them and adds a step with momentum and
    control variates, which it derives itself from what it received.
    """

    title = "FedPepTAO"
    reference = "arXiv:2310.15080"
    # The server's step does not shrink with the clients' rate: at low rates its default drowns theirs.
    search = {"training.learning_rate": LogRange(3e-3, 3e-1), "server_rate": LogRange(5e-4, 5e-2)}

    class Config(FedPrompt.Config):
        """The chosen layers, and the server's step."""

        form: Literal["prefix"] = "prefix"
        hidden: None = None
        share: float = Field(
            0.5, gt=0, le=1, description="share of the layers that are exchanged, where `layers` is not given"
        )
        layers: list[int] | None = Field(
            None,
            min_length=1,
            description="numbers of the layers that are exchanged, 0 at the input; None: those of the "
            "highest scores, found in the first round",
        )
        others: Literal["personal", "fixed"] = Field(
            "personal",
            description="prefixes of the layers that are not exchanged: each client trains and keeps its "
            "own, or all have those that were drawn at the start",
        )
        server_rate: float = Field(0.05, ge=0, le=100, description="rate of the server's step; 0: plain mean")
        server_momentum: float = Field(0.9, ge=0, lt=1, description="momentum of the server's step")
        scored: Literal["shared", "personal"] = Field(
            "shared",
            description="the server's model, or the clients' own; the others are scored at the end",
        )
        moments: Literal["reset", "client"] = Field(
            "client", description="the optimizer's state: fresh in each turn, or kept by the client"
        )
        cache: Literal["none"] = "none"
        compression: None = None
        upload_compression: None = None

    config: Config

    def check(self, facts: Facts) -> None:
        super().check(facts)
        layers = self.config.layers or []
        if not set(layers) <= set(range(facts.layers)) or len(set(layers)) < len(layers):
            raise UserError(
                f"layers: {layers}; allowed: numbers from 0 to {facts.layers - 1}, the model's last layer, "
                "each once"
            )
        if self.config.others == "fixed" and self.config.scored == "personal":
            raise UserError(
                "scored: personal with others: fixed; allowed: shared, since all have the same model"
            )

    def check_training(self, training: Training) -> None:
        super().check_training(training)
        if self.config.others == "fixed" and training.weight_decay:
            raise UserError(
                f"training.weight_decay: {training.weight_decay} with others: fixed; allowed: 0, since it "
                "would also move the prefixes that are not trained"
            )

    def averages(self) -> bool:
        return False  # its server has a step of its own

    def prepare(self, model: PreTrainedModel, kind: str) -> Module:
        prepared = super().prepare(model, kind)
        (self.prefix,) = (name for name in self.exchanged if name.startswith("prompt_encoder."))
        self.head = [name for name in self.exchanged if name != self.prefix]
        self.depth = len(self.anatomy.layers)
        given = self.config.layers
        self.count = len(given) if given else max(1, nearest(self.config.share, self.depth))
        # What crosses the network instead of the prefixes.
        self.sent, self.order, self.steps, self.scores = (
            f"{self.prefix}@{name}" for name in ("layers", "order", "steps", "scores")
        )
        return prepared

    def left_out(self, rounds: int) -> str:
        return "all training, since the first round only scores layers" if self._only_scores(rounds) else ""

    def messages(self) -> dict[str, Declared]:
        tokens, width = self.shapes[self.prefix]
        return {
            self.sent: Declared((tokens, self.count * width // self.depth)),
            self.order: Declared((self.depth,), "int16", ("down",)),
            self.steps: Declared((), "int32", ("up",)),
            self.scores: Declared((self.depth - 1,), "float32", ("up",)),
        }

    def segments(self, client: int, round: int, steps: int) -> list[Segment]:
        if self._only_scores(round):
            return [Segment("layer scores", [], min(1, steps), forward_only=True)]
        return super().segments(client, round, steps)

    def download(self, server: Server, client: int, round: int) -> dict[str, Tensor]:
        if self._only_scores(round):
            return {}
        order = self._ranking(server)
        return {
            **{name: server.tensors[name] for name in self.head},
            self.sent: self._take(server.tensors[self.prefix], order[: self.count]),
            self.order: order,
        }

    def rebuild(self, received: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.order not in received:
            return received
        order = received[self.order]
        prefix = self._put(received[self.prefix], order[: self.count], received[self.sent])
        if "personal" in received:
            prefix = self._put(prefix, order[self.count :], received["personal"])
        return received | {self.prefix: prefix}

    def train(self, turn: Turn) -> None:
        import torch

        if not self._only_scores(turn.round):
            correct = self._hold_others(turn) if self.config.others == "fixed" else None
            for segment in self.segments(turn.client, turn.round, turn.steps):
                turn.fit(segment, correct=correct)
            return

        (segment,) = self.segments(turn.client, turn.round, turn.steps)
        with self._watching(turn.model) as states:
            turn.observed(turn.evaluate(segment))
        # In a prediction no model has run.
        found = torch.stack([layer_score(state) for state in states]) if states else torch.zeros(self.depth)
        # Scaled to what half precision can hold. The last layer is never scored, as in the authors' code.
        turn.results = {self.scores: found[: self.depth - 1].float() * SMOOTHING}

    def upload(self, turn: Turn) -> dict[str, Tensor]:
        if self._only_scores(turn.round):
            return turn.results
        import torch

        values, order = super().upload(turn), turn.received[self.order]
        prefix = values.pop(self.prefix)
        if self.count < self.depth and self.config.others == "personal":
            turn.keep({"personal": self._take(prefix, order[self.count :])})
        return {
            **values,
            self.sent: self._take(prefix, order[: self.count]),
            self.steps: torch.tensor(turn.steps, dtype=torch.int32),
        }

    def merge(self, server: Server, uploads: Iterable[Upload], round: int) -> None:
        if self._only_scores(round):
            server.state["order"] = self._ranked(uploads)
            return
        import torch

        state, order = server.state, self._ranking(server)
        start = self._take(server.tensors[self.prefix], order[: self.count])
        zero = torch.zeros_like(start)
        control = state.get("control", zero)
        # Of the clients that answer, by the name of their control variate.
        controls: dict[str, Tensor] = {}
        steps: dict[str, Tensor] = {}
        examples: dict[str, int] = {}

        def noted() -> Iterator[Upload]:
            for upload in uploads:
                name = f"control {upload.client}"
                steps[name], examples[name] = upload.tensors.pop(self.steps), upload.examples
                slope = (start - upload.tensors[self.sent]) / (steps[name] * self.training.learning_rate)
                controls[name] = state.get(name, zero) - control + slope
                yield upload

        means = {name: mean for name, (mean, _) in weighted_mean(noted()).items()}
        if not means:
            return
        mean = means.pop(self.sent)
        fall = start - mean
        shift = sum(steps[name] * (new - state.get(name, zero)) for name, new in controls.items())
        control = control + len(controls) / self.clients * shift / sum(steps.values())
        if "fall" in state:
            momentum = self.config.server_momentum
            velocity = momentum * state.get("velocity", zero) + (1 - momentum) * (state["fall"] - fall)
            own = sum(examples[name] * new for name, new in controls.items()) / sum(examples.values())
            state["velocity"] = velocity + control - own
            mean = mean - self._server_rate(round) * state["velocity"]
        state |= {"control": control, "fall": fall, **controls}
        for name, value in means.items():
            server.update(name, value)
        server.update(self.prefix, self._put(server.tensors[self.prefix], order[: self.count], mean))

    def models(self, server: Server) -> Iterable[Mapping[str, Tensor]]:
        return self._scorable(server)[self.config.scored]

    def further(self, server: Server) -> dict[str, Iterable[Mapping[str, Tensor]]]:
        if self.config.others == "fixed":
            return {}
        other = "personal" if self.config.scored == "shared" else "shared"
        return {f"{other}_score": self._scorable(server)[other]}

    def extra(self, server: Server) -> dict[str, float]:
        """Return of each layer whether it was exchanged, as 1 or 0."""
        if "order" not in server.state:
            return {}
        chosen = set(server.state["order"][: self.count].tolist())
        return {f"layer_{number}": float(number in chosen) for number in range(self.depth)}

    def _scorable(self, server: Server) -> dict[str, Iterable[Mapping[str, Tensor]]]:
        """Return the server's model, whose other layers nobody has trained, and those of the clients."""
        return {"shared": [server.tensors], "personal": self._personal(server)}

    def _personal(self, server: Server) -> Iterator[Mapping[str, Tensor]]:
        """Yield the model of each client that has trained; the server's where none has."""
        own = [kept for _, kept in sorted(server.kept.items()) if "personal" in kept]
        for kept in own:
            others = self._ranking(server)[self.count :]
            prefix = self._put(server.tensors[self.prefix], others, kept["personal"])
            yield {**server.tensors, self.prefix: prefix}
        if not own:
            yield server.tensors

    def _hold_others(self, turn: Turn) -> Correction:
        """Return what takes the gradient of the layers that are not exchanged away."""
        others = turn.received[self.order][self.count :].long()

        def correct(name: str, gradient: Tensor) -> Tensor:
            if name == self.prefix:
                gradient.unflatten(1, (self.depth, -1))[:, others] = 0
            return gradient

        return correct

    def _only_scores(self, round: int) -> bool:
        return round == 1 and self.config.layers is None

    def _ranking(self, server: Server) -> Tensor:
        """Return the numbers of all layers, the chosen ones first: (layers,) int16."""
        import torch

        if given := self.config.layers:
            rest = [number for number in range(self.depth) if number not in given]
            server.state.setdefault("order", torch.tensor(given + rest, dtype=torch.int16))
        return server.state["order"]

    def _ranked(self, uploads: Iterable[Upload]) -> Tensor:
        """Return the layers by the clients' mean score, weighted by examples, the highest first.

        Where nobody has answered, as where layers have equal scores, they keep their order.
        """
        import torch

        means = weighted_mean(uploads)
        scores = means[self.scores][0] if means else torch.zeros(self.depth - 1)
        scores = torch.cat([scores, scores.new_zeros(1)])
        return scores.argsort(descending=True, stable=True).to(torch.int16)

    def _server_rate(self, round: int) -> float:
        rate, first = self.config.server_rate, 1 if self.config.layers else 2
        return max(rate * RATE_DECAY ** (round - first), min(rate, LOWEST_RATE))

    def _take(self, prefix: Tensor, layers: Tensor) -> Tensor:
        """Return the columns of some layers, one layer after the other: (tokens, layers * 2 * hidden)."""
        return prefix.unflatten(1, (self.depth, -1))[:, layers.long()].flatten(1)

    def _put(self, prefix: Tensor, layers: Tensor, values: Tensor) -> Tensor:
        """Return a copy of the matrix in which these layers have these values."""
        whole = prefix.unflatten(1, (self.depth, -1)).clone()
        whole[:, layers.long()] = values.unflatten(1, (len(layers), -1)).to(whole.dtype)
        return whole.flatten(1)

    @contextmanager
    def _watching(self, model: Module) -> Iterator[list[Tensor]]:
        """Collect what each layer returns in the first forward pass: (texts, positions, hidden)."""
        states: list[Tensor] = []

        def note(layer: Module, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
            if len(states) < self.depth:
                states.append(output[0] if isinstance(output, tuple) else output)

        layers = [model.get_submodule(f"base_model.{path}") for path in self.anatomy.layers]
        handles = [layer.register_forward_hook(note) for layer in layers]
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()


def layer_score(states: Tensor) -> Tensor:
    """Return how important a layer is, given its hidden states: the sum of ln(x) + 1 / x over eigenvalues.

    They are those of the cosine similarities between texts, plus 1e-5 each. `states` is (texts, ...); the
    result is a float64 scalar on the CPU. Source: the method's code, `run_getscore.py`.
    """
    import torch

    rows = torch.nn.functional.normalize(states.flatten(1).double())
    # Of a matrix that has no negative eigenvalues rounding may still make some.
    eigenvalues = torch.linalg.eigvalsh((rows @ rows.T).cpu()).clamp(min=0) + SMOOTHING
    return (eigenvalues.log() + 1 / eigenvalues).sum()
