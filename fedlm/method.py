"""A method of federated fine-tuning: what it trains, what crosses the network, how uploads are merged.

A method is one class in its own file under `methods/`, found by looking into the folder. Every default here
is FedAvg (McMahan et al. 2017, algorithm 1), so a method's file shows only what makes it different.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field

from fedlm.compression import Compression
from fedlm.settings import Settings

if TYPE_CHECKING:
    import numpy
    from torch import Tensor
    from torch.nn import Module

    from fedlm.blocks import Anatomy
    from fedlm.check import Facts
    from fedlm.training import Turn

FOLDER = Path(__file__).parent.parent / "methods"


@dataclass
class Server:
    """What the server knows.

    `tensors` maps the name of each exchanged parameter to its current value on the CPU, `initial` to its
    value before the first round. `version` counts a parameter's changes, 0 for none. `state` is the method's
    own (momentum, for example). `kept` is what a client keeps between its turns, by client; it is held here
    because the simulation has one process, and no other client reads it.
    """

    tensors: dict[str, Tensor]
    initial: dict[str, Tensor]
    version: dict[str, int] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def update(self, name: str, value: Tensor) -> None:
        """Give a parameter its new value. The old tensor is replaced, never written into."""
        self.tensors[name] = value
        self.version[name] = self.version.get(name, 0) + 1


class Upload(NamedTuple):
    """What the server received from one client."""

    client: int
    examples: int
    tensors: dict[str, Tensor]


class Segment(NamedTuple):
    """A part of a turn in which the same parameters are trained, with one optimizer."""

    label: str  # names the row of the memory table: "all", "block 3"
    trainable: list[str]
    steps: int


class MethodConfig(Settings):
    """Settings that every method has."""

    payload: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="precision of the values in a payload"
    )
    compression: Compression | None = Field(None, description="how downloaded parameters are reduced")
    cache: Literal["none", "pretrained", "last_visit"] = Field(
        "none",
        description="what a client keeps between turns: nothing; the pretrained weights, so that a parameter "
        "never changed costs nothing; what it last had, so that only what changed since then travels",
    )
    moments: Literal["reset", "client", "handed_on"] = Field(
        "reset", description="the optimizer's state: fresh in each turn, kept by the client, or sent along"
    )


class Method:
    """FedAvg; the base of every method.

    Attributes: `name` is the file's; `title` is what tables print; `reference` is an arXiv id or DOI;
    `control` marks bounds and baselines, which are not competitors; `kinds` lists the kinds of task.
    """

    name = ""
    title = ""
    reference = ""
    control = False
    kinds: tuple[str, ...] = ("classification", "regression", "causal", "question_answering")
    Config: type[MethodConfig] = MethodConfig

    anatomy: Anatomy  # blocks, embeddings, head of the model, set by `prepare`
    exchanged: list[str]  # every parameter that some client trains in some round, set by `prepare`

    def __init__(self, config: MethodConfig, clients: int, seed: int) -> None:
        self.config = config
        self.clients = clients
        self.seed = seed

    def check(self, facts: Facts) -> None:
        """Raise UserError where the settings ask for what the model has not, before any job starts."""

    def virtual_tokens(self) -> int:
        """Return how many positions of the model the method takes for itself."""
        return 0

    def population(self, parts: list[numpy.ndarray]) -> list[numpy.ndarray]:
        """Return who holds which training examples, given the partition's index arrays."""
        return parts

    def adapt(self, model: Module, kind: str) -> Module:
        """Return the model with what the method adds to it; freeze what no client ever trains.

        The parameters that require a gradient afterwards are those that some client trains somewhere.
        """
        return model

    def prepare(self, model: Module, kind: str) -> Module:
        """Adapt the pretrained model and note its blocks and its exchanged parameters."""
        from fedlm.blocks import find_blocks
        from fedlm.randomness import derive, isolated

        self.anatomy = find_blocks(model)
        with isolated(derive(self.seed, "adapter")):
            model = self.adapt(model, kind)
        self.exchanged = [name for name, value in model.named_parameters() if value.requires_grad]
        return model

    def cohorts(self, clients: list[int], round: int) -> list[list[int]]:
        """Split the round's clients into cohorts, each starting from one server state and merged together."""
        return [clients]

    def trainable(self, client: int, round: int) -> list[str]:
        """Return the names of the parameters that this client updates in this turn."""
        return self.exchanged

    def segments(self, client: int, round: int, steps: int) -> list[Segment]:
        """Split a turn of `steps` optimizer steps into segments."""
        return [Segment("all", self.trainable(client, round), steps)]

    def download(self, server: Server, client: int, round: int) -> dict[str, Tensor]:
        """Return what the client needs from the server: by default all that is trained somewhere."""
        return server.tensors

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
        state, so the state must not change before the last upload came. The default is the mean weighted by
        examples, tensor by tensor, over the clients that uploaded that tensor; it holds one running mean,
        whatever the number of clients, and a mean over one client is that client's tensor, bit by bit.
        """
        for name, (value, _) in weighted_mean(uploads).items():
            server.update(name, value)

    def models(self, server: Server) -> Iterable[dict[str, Tensor]]:
        """Yield the models to score, as values of the exchanged parameters; their scores are averaged."""
        yield server.tensors


def weighted_mean(uploads: Iterable[Upload]) -> dict[str, tuple[Tensor, float]]:
    """Return each uploaded tensor's mean, weighted by examples, and the weight behind it."""
    means: dict[str, tuple[Tensor, float]] = {}
    for upload in uploads:
        for name, value in upload.tensors.items():
            if name in means:
                mean, weight = means[name]
                total = weight + upload.examples
                means[name] = (mean.lerp_(value, upload.examples / total), total)
            else:
                means[name] = (value, upload.examples)
    return means


@cache
def discover(folder: Path = FOLDER) -> dict[str, type[Method]]:
    """Return the methods found in the folder, by name, which is the file's.

    Raises UserError for a file that does not hold exactly one method.
    """
    from fedlm.errors import UserError

    found = {}
    for path in sorted(folder.glob("[!_]*.py")):
        module = load_module(f"methods.{path.stem}", path)
        classes = [
            value
            for value in vars(module).values()
            if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module.__name__
        ]
        if len(classes) != 1:
            raise UserError(f"{path}: holds {len(classes)} methods; allowed: exactly one class of Method")
        method = classes[0]
        if not method.title:
            raise UserError(f"{path}: {method.__name__}.title is empty; it names the table's row")
        method.name = path.stem
        found[path.stem] = method
    return found


def load_module(name: str, path: Path):
    """Import a Python file under the given module name, once."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
