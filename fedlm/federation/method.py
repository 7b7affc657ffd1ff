"""A method of federated fine-tuning: what it trains, what crosses the network, how uploads are merged.

A method is one class in its own file under `methods/`, where it is found automatically. Every default here
is FedAvg (McMahan et al. 2017, algorithm 1), so a method's file shows only what makes it different.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from fedlm.base.settings import Settings
from fedlm.exchange.compression import Compression, UploadCompression
from fedlm.exchange.declared import Declared
from fedlm.federation.search import LogRange, Search
from fedlm.federation.settings import Averaging, ServerOptimizer
from fedlm.federation.state import Segment, Server, Upload

if TYPE_CHECKING:
    import numpy
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel

    from fedlm.federation.facts import Facts
    from fedlm.federation.settings import Training
    from fedlm.federation.turn import Turn
    from fedlm.models.blocks import Anatomy


class MethodConfig(Settings):
    """The settings of every method."""

    payload: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="precision of the values in a payload"
    )
    compression: Compression | None = Field(None, description="how downloaded parameters are reduced")
    upload_compression: UploadCompression | None = Field(
        None, description="how the change of uploaded parameters is reduced"
    )
    cache: Literal["none", "pretrained", "last_visit"] = Field(
        "none",
        description="what a client keeps between turns: nothing; the pretrained weights, so that a parameter "
        "never changed costs nothing; what it last had, so that only what changed since then is sent",
    )
    moments: Literal["reset", "client", "handed_on"] = Field(
        "reset", description="the optimizer's state: fresh in each turn, kept by the client, or sent along"
    )

    @model_validator(mode="after")
    def _moments_arrive(self) -> Self:
        if self.moments == "handed_on" and self.payload != "float32":
            raise ValueError(
                f"payload: {self.payload} with moments: handed_on; allowed: float32, since the squares of "
                "small gradients and the count of steps would be lost"
            )
        return self


class KeepNothingConfig(MethodConfig):
    """The settings of a method whose clients keep nothing, and whose messages travel as it makes them."""

    cache: Literal["none"] = "none"
    moments: Literal["reset"] = "reset"
    compression: None = None
    upload_compression: None = None


class Method:
    """FedAvg; the base of every method.

    Attributes: `name` is the file's; `title` is what tables print; `reference` is an arXiv id or DOI;
    `control` marks bounds and baselines, which are not competitors; `kinds` lists the kinds of task;
    `search` names the settings that a study with `tuning` chooses, at most three, and their ranges;
    `server_optimizer` is how the server follows a mean where the study does not say.
    """

    name = ""
    title = ""
    reference = ""
    control = False
    kinds: tuple[str, ...] = ("classification", "regression", "causal", "question_answering")
    Config: type[MethodConfig] = MethodConfig
    search: Search = {"training.learning_rate": LogRange(1e-5, 1e-3)}
    server_optimizer: ServerOptimizer = Averaging()

    label_names: Sequence[str] = ()  # the words for the classes; none in a prediction, and without classes
    anatomy: Anatomy  # blocks, embeddings, head of the model, set by `prepare`
    shapes: dict[str, tuple[int, ...]]  # of all parameters of the adapted model, set by `prepare`
    training: Training  # how clients train, set when the rounds begin
    kept: Mapping[int, Mapping[str, Tensor]]  # what each client keeps after its last turn, by client
    exchanged: list[str]  # every parameter that some client trains in some round, set by `prepare`
    level: dict[int, int]  # of a client's turn, 0 where nothing is said; set when the rounds begin

    def __init__(self, config: MethodConfig, clients: int, seed: int) -> None:
        self.config = config
        self.clients = clients
        self.seed = seed
        self.kept = {}
        self.level = {}

    def check(self, facts: Facts) -> None:
        """Raise UserError, before any job starts, if the settings do not fit the model."""

    def averages(self) -> bool:
        """Return whether `merge` lets the server follow means of uploads, as a server optimizer requires."""
        return True

    def check_training(self, training: Training) -> None:
        """Raise UserError, before any job starts, if how clients train does not suit the method."""

    def left_out(self, rounds: int) -> str:
        """Return what a run of `rounds` rounds never comes to, to be noted before it starts; "": nothing."""
        return ""

    def levels(self) -> int:
        """Return the number of sizes in which a client's turn comes.

        At level 0 it is whole; from level 1 on each takes no more memory than the one before.

        It is called after `prepare`. A method with more than one knows `federation.budgets`: the suite
        measures the levels and sets `self.level` to the largest that fits each client's budget.
        """
        return 1

    def virtual_tokens(self) -> int:
        """Return how many of the model's positions the method itself uses."""
        return 0

    def population(self, parts: list[numpy.ndarray]) -> list[numpy.ndarray]:
        """Return who holds which training examples, given the partition's index arrays."""
        return parts

    def adapt(self, model: PreTrainedModel, kind: str) -> Module:
        """Add the method's parts to the model and return it; freeze what no client ever trains.

        The parameters that require a gradient afterwards are those that some client trains in some turn.
        """
        return model

    def prepare(self, model: PreTrainedModel, kind: str) -> Module:
        """Adapt the pretrained model and record its blocks and its exchanged parameters."""
        from fedlm.base.randomness import derive, isolated
        from fedlm.models.blocks import find_blocks

        self.anatomy = find_blocks(model)
        with isolated(derive(self.seed, "adapter")):
            adapted = self.adapt(model, kind)
        self.shapes = {name: tuple(value.shape) for name, value in adapted.named_parameters()}
        self.exchanged = [name for name, value in adapted.named_parameters() if value.requires_grad]
        return adapted

    def cohorts(self, clients: list[int], round: int) -> list[list[int]]:
        """Split the round's clients into cohorts, each starting from one server state and merged together."""
        return [clients]

    def trainable(self, client: int, round: int) -> list[str]:
        """Return the names of the parameters that this client updates in this turn."""
        return self.exchanged

    def segments(self, client: int, round: int, steps: int) -> list[Segment]:
        """Split a turn of `steps` optimizer steps into segments."""
        return [Segment("all", self.trainable(client, round), steps)]

    def messages(self) -> dict[str, Declared]:
        """Declare what crosses the network besides parameters, by name.

        What arrives is checked against this, in each direction. A tensor named `<parameter>@<anything>` goes
        with that parameter: it is required where the parameter is sent. All others are always required.
        """
        return {}

    def held(self, client: int, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the client's part of values of exchanged parameters: by default all of each.

        For clients whose copy of the model is smaller; it is the same part in all of a run (see `shaped`).
        """
        return values

    def shaped(self, model: Module, client: int) -> AbstractContextManager[None]:
        """Return a context in which the model has the shape of the client's copy: by default its own.

        The client's values, in the shapes of `held`, are written into the model within it. A method that
        needs this must not let the shape depend on anything but the client's level.
        """
        return nullcontext()

    def download(self, server: Server, client: int, round: int) -> Mapping[str, Tensor]:
        """Return what the client needs from the server: by default everything that any client trains."""
        return self.held(client, server.tensors)

    def rebuild(self, received: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the client's copy, made from the values that it received: by default these themselves.

        For a method whose messages are not the parameters. `received` holds the pretrained values, overlaid
        by what the client kept and was sent; nothing may be written into them.
        """
        return received

    def train(self, turn: Turn) -> None:
        """Train the turn's model in place: by default local epochs, segment by segment."""
        for segment in self.segments(turn.client, turn.round, turn.steps):
            turn.fit(segment)

    def upload(self, turn: Turn) -> dict[str, Tensor]:
        """Return what the client sends back: by default what it trained."""
        return turn.values(self.trainable(turn.client, turn.round))

    def merge(self, server: Server, uploads: Iterable[Upload], round: int) -> None:
        """Fold a cohort's uploads into the server's state.

        `uploads` is lazy: asking for the next one runs that client's turn, which starts from the server's
        state, so the state must not change before the last upload has arrived. The default is the mean
        weighted by examples, tensor by tensor, over the clients that uploaded that tensor; it holds one
        running mean, whatever the number of clients, and a mean over one client is that client's tensor, bit
        for bit. Optimizer moments that clients hand on are averaged; the server's optimizer leaves them be.
        """
        for name, (value, _) in weighted_mean(uploads).items():
            if "@" in name:
                server.update(name, value)
            else:
                server.follow(name, value)

    def models(self, server: Server) -> Iterable[Mapping[str, Tensor]]:
        """Yield the models to score, as values of the exchanged parameters; their scores are averaged.

        What is in `server.kept`, yielded as it is, is scored only once between two of its changes.
        """
        yield server.tensors

    def answering(self, model: Module, server: Server) -> AbstractContextManager[None]:
        """Return a context in which the model answers as it does at test time: by default as in training.

        Within it, `model` holds the values that are scored.
        """
        return nullcontext()

    def further(self, server: Server) -> Mapping[str, Iterable[Mapping[str, Tensor]]]:
        """Return models that are scored besides, by the name of their score.

        The mean of their scores on the test split is in the record of a run, beside what `extra` returns.
        """
        return {}

    def extra(self, server: Server) -> dict[str, float]:
        """Return numbers of the method's own for the record of a run, by name."""
        return {}


def weighted_mean(uploads: Iterable[Upload]) -> dict[str, tuple[Tensor, float]]:
    """Return each uploaded tensor's mean, weighted by examples, and the weight behind it."""
    means: dict[str, tuple[Tensor, float]] = {}
    for upload in uploads:
        add_to_mean(means, upload.tensors, upload.examples)
        del upload  # not held while the next client has its turn
    return means


def add_to_mean(
    means: dict[str, tuple[Tensor, float]], tensors: MutableMapping[str, Tensor], weight: float
) -> None:
    """Add a client's tensors to running means, each with the weight behind it; the first become the means."""
    from fedlm.exchange.payload import Received

    for name in tensors:
        if name in means:
            mean, before = means[name]
            # Only read, so that it need not be copied out of the message.
            value = tensors.view(name) if isinstance(tensors, Received) else tensors[name]
            means[name] = (mean.lerp_(value, weight / (before + weight)), before + weight)
        else:
            means[name] = (tensors[name], weight)
