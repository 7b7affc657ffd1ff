"""FedBPT: a prompt is found by an evolution strategy, from losses alone; no gradient is computed.

Source: arXiv:2310.01467 and its code in NVFlare; black-box tuning arXiv:2201.03514. See
docs/methods/fedbpt.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fedlm.base.errors import UserError
from fedlm.base.randomness import numpy_stream, torch_stream
from fedlm.exchange.declared import Declared
from fedlm.federation.method import KeepNothingConfig, Method
from fedlm.federation.search import LogRange, OneOf
from fedlm.federation.state import Segment
from fedlm.federation.zeroth_order import require_plain_steps

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy
    from torch import Tensor
    from torch.nn import Module as TorchModule

    from fedlm.federation.method import Facts, Module, PreTrainedModel, Server, Upload
    from fedlm.federation.settings import Training
    from fedlm.federation.turn import Turn
    from fedlm.models.readout import Template

FILLERS = 1000  # the first of the tokens to which the prompt is added, as in the authors' code


class FedBPT(Method):
    """Federated black-box prompt tuning: CMA-ES at the clients and at the server.

    The prompt is a fixed random projection of a short vector z. A client continues the server's search
    distribution on its own examples for some iterations and sends the mean that it reached, its fitness, and
    the step sizes on the way; the server takes these points as one generation of its own CMA-ES. Fitness is
    the loss over the loss on corrupted text, so that a prompt that helps whatever the text says does not win.
    """

    title = "FedBPT"
    reference = "arXiv:2310.01467"
    kinds = ("classification",)
    # Not `sigma`: the projection is divided by it, so that it changes nothing but rounding.
    search = {"spread": LogRange(1, 100), "corruption": OneOf((0.0, 0.5))}

    class Config(KeepNothingConfig):
        """The prompt, the search, and how the model answers."""

        dimensions: int = Field(500, ge=2, le=5000, description="length of the vector that is searched")
        tokens: int = Field(50, ge=1, le=1000, description="tokens of the prompt")
        spread: float = Field(
            1.0,
            gt=0,
            le=1e4,
            description="deviation of a random prompt's entries, in units of the embeddings' (alpha)",
        )
        sigma: float = Field(1.0, gt=0, le=1e3, description="the search's first step size")
        population: int = Field(5, ge=3, le=1000, description="points that a client tries in an iteration")
        iterations: int = Field(8, ge=1, le=10_000, description="iterations of a client's turn")
        corruption: float = Field(
            0.5,
            ge=0,
            le=1,
            description="share of tokens replaced in the corrupted text; 0: fitness is the loss alone",
        )
        readout: Literal["phrases", "words"] | None = Field(
            None,
            description="classes by the cosine to the model's own vector of a phrase, or by the language "
            "head's logits for a word; None: words for decoders, phrases for encoders",
        )
        phrase: str = Field("{}", pattern=r"\{\}", description="phrases: what is said of a class {}")
        temperature: float = Field(0.05, gt=0, le=100, description="phrases: divides the cosines")
        template: str = Field(
            " It was {} .",
            pattern=r"\{\}",
            max_length=200,
            description="words: what follows the text, with {} for the word; a decoder reads up to it",
        )
        words: list[str] | None = Field(
            None, min_length=2, description="words or phrases for the classes; None: their names"
        )

    config: Config

    def check(self, facts: Facts) -> None:
        if self._readout(facts.decoder) == "phrases" and facts.decoder:
            raise UserError("readout: phrases with a decoder; allowed: words")

    def check_training(self, training: Training) -> None:
        require_plain_steps(training)
        if training.local_epochs > 1:
            raise UserError(
                f"training.local_epochs: {training.local_epochs}; allowed: 1, since every query passes over "
                "all examples of the client"
            )

    def averages(self) -> bool:
        return False

    def virtual_tokens(self) -> int:
        # A word of the template has seldom more than two tokens.
        return self.config.tokens + 2 * len(self.config.template.split())

    def _readout(self, decoder: bool) -> str:
        return self.config.readout or ("words" if decoder else "phrases")

    # -----------------------------------------------------------------------------------------------------
    # The model

    def adapt(self, model: PreTrainedModel, kind: str) -> Module:
        from fedlm.models.loading import is_encoder
        from fedlm.models.readout import PromptedModel

        decoder = not is_encoder(model.config)
        words = self._readout(decoder) == "words"
        tokenizer = _tokenizer(model)
        template, after = self._template(tokenizer, decoder, words, model.config.vocab_size)
        answer = self._words(model, tokenizer, after) if words else self._phrases(model, tokenizer, template)
        self.model = PromptedModel(model, template, self._projection(model), answer)
        return self.model

    def _template(self, tokenizer: Any, decoder: bool, words: bool, vocabulary: int) -> tuple[Template, int]:
        """Return where tokens are added, and how many follow the token that stands for the class."""
        from fedlm.data.tokenising import special_tokens
        from fedlm.models.readout import Template

        before, _, behind = self.config.template.partition("{}")
        if decoder:
            behind = ""
        added, after, special = [], 0, (0, 0)
        if tokenizer is None:  # a prediction without the tokenizer: one token for each word
            first, last = len(before.split()), len(behind.split())
            added, after = [0] * (first + (not decoder) + last), last
        else:
            starts, ends = (tokenizer.encode(part, add_special_tokens=False) for part in (before, behind))
            added = [*starts, *([] if decoder else [tokenizer.mask_token_id]), *ends]
            leading, trailing = special_tokens(tokenizer)
            after, special = len(ends), (len(leading), len(trailing))
        fillers = [(FILLERS + number) % vocabulary for number in range(self.config.tokens)]
        return Template(fillers, added if words else [], *special), after + special[1]

    def _projection(self, model: PreTrainedModel) -> Tensor:
        """Return the fixed random matrix (tokens x width, dimensions), the same at all clients."""
        import torch

        config = self.config
        embeddings: Any = model.get_input_embeddings()
        weight = embeddings.weight.detach()
        shape = (config.tokens * weight.shape[1], config.dimensions)
        if weight.is_meta:
            return torch.empty(shape, device="meta")
        deviation = float(weight.float().std(correction=0))
        scale = config.spread * deviation / (math.sqrt(config.dimensions) * config.sigma)
        return scale * torch.randn(shape, generator=torch_stream(self.seed, "projection"))

    def _phrases(self, model: PreTrainedModel, tokenizer: Any, template: Template) -> TorchModule:
        """Return the read-out by the vectors that the model itself gives to phrases, without a prompt."""
        import torch

        from fedlm.models.readout import CosineToPhrases, mean_of_tokens

        classes, width = int(model.config.num_labels or 0), model.config.hidden_size
        if next(model.parameters()).is_meta:
            vectors = torch.empty(classes, width, device="meta")
        else:
            texts = [self.config.phrase.replace("{}", name) for name in self._names(classes)]
            batch = tokenizer(texts, padding=True, return_tensors="pt")
            with torch.no_grad():
                hidden = model.eval().base_model(**batch)[0]
            vectors = torch.nn.functional.normalize(mean_of_tokens(hidden, batch["attention_mask"]), dim=-1)
        prompt = template.leading, template.leading + len(template.prompt)
        return CosineToPhrases(vectors, prompt, self.config.temperature)

    def _words(self, model: PreTrainedModel, tokenizer: Any, after: int) -> TorchModule:
        """Return the read-out by the first token of each class's word."""
        import torch

        from fedlm.models.loading import is_encoder
        from fedlm.models.readout import LabelWords, language_head

        decoder = not is_encoder(model.config)
        ids = [0] * int(model.config.num_labels or 0)
        if not next(model.parameters()).is_meta:
            words = self._names(len(ids))
            spelled = [f" {word}" if decoder else word for word in words]
            ids = [tokenizer.encode(word, add_special_tokens=False)[0] for word in spelled]
            if len(set(ids)) < len(ids):
                twice = [word for word, one in zip(words, ids, strict=True) if ids.count(one) > 1]
                raise UserError(
                    f"words: {' and '.join(map(repr, twice[:2]))} begin with the same token; allowed: words "
                    "whose first tokens differ"
                )
        head = language_head(model, decoder)
        for name, bias in head.named_parameters():
            if name.endswith("bias") and bias.shape == (model.config.vocab_size,) and not bias.is_meta:
                bias.data.zero_()  # as in the authors' code
        return LabelWords(head, torch.tensor(ids), 0 if decoder else after)

    def _names(self, classes: int) -> list[str]:
        names = list(self.config.words or self.label_names)
        if len(names) != classes:
            raise UserError(f"words: {len(names)}; allowed: {classes}, one for each class")
        return names

    # -----------------------------------------------------------------------------------------------------
    # The search

    def messages(self) -> dict[str, Declared]:
        size = self.config.dimensions
        return {
            "sigma": Declared((1,), ways=("down",)),
            "covariance": Declared((size * (size + 1) // 2,), ways=("down",)),  # its upper triangle
            "fitness": Declared((1,), ways=("up",)),
            "sigmas": Declared((self.config.iterations,), ways=("up",)),
        }

    def segments(self, client: int, round: int, steps: int) -> list[Segment]:
        return [Segment("queries", self.exchanged, steps, forward_only=True)]

    def download(self, server: Server, client: int, round: int) -> dict[str, Tensor]:
        state = self._state(server)
        triangle = state["covariance"][tuple(_upper(self.config.dimensions))]
        return {**server.tensors, "sigma": state["sigma"].float(), "covariance": triangle.float()}

    def train(self, turn: Turn) -> None:
        import numpy
        import torch

        from fedlm.models.fake import has_values

        (segment,) = self.segments(turn.client, turn.round, turn.steps)
        size = self.config.dimensions
        covariance = turn.received["covariance"]
        # What pycma holds, the covariance and its eigenvectors, is in arrays that no instrument sees.
        held = torch.empty(2, size, size, dtype=torch.float64, device=covariance.device)
        if not has_values(covariance):
            for _ in range(self._queries()):
                turn.evaluate(segment)
            point = torch.empty(size, device=covariance.device)
            turn.results = {
                "fitness": point[:1],
                "sigmas": torch.empty(self.config.iterations, device=covariance.device),
            }
            return
        stream = numpy_stream(self.seed, "population", turn.round, turn.client)
        held.zero_()[0][tuple(_upper(size))] = covariance.double()
        full = held[0].numpy()
        full += numpy.triu(full, 1).T
        strategy = _strategy(
            turn.received[self.exchanged[0]].double().numpy(),
            float(turn.received["sigma"]),
            full,
            stream,
            self.config.population,
        )
        sigmas = []
        for _ in range(self.config.iterations):
            sigmas.append(strategy.sigma)
            points = strategy.ask()
            strategy.tell(points, [self._fitness(turn, segment, point)[0] for point in points])
        final, loss = self._fitness(turn, segment, strategy.mean)
        turn.observed(loss)
        turn.results = {"fitness": torch.tensor([final]), "sigmas": torch.tensor(sigmas).float()}

    def upload(self, turn: Turn) -> dict[str, Tensor]:
        return {**super().upload(turn), **turn.results}

    def merge(self, server: Server, uploads: Iterable[Upload], round: int) -> None:
        import numpy
        import torch

        from fedlm.models.fake import has_values

        (name,) = self.exchanged
        points, fitness, squares = [], [], []
        for upload in uploads:
            points.append(upload.tensors[name])
            fitness.append(upload.tensors["fitness"])
            squares.append(upload.tensors["sigmas"])
        if not points:
            return
        state = self._state(server)
        if not has_values(points[0]):
            server.update(name, torch.empty_like(server.tensors[name]))
            return
        found = numpy.stack([point.double().numpy() for point in points])
        ranked = [float(one) for one in fitness]
        step = step_size([one.double().tolist() for one in squares], self.config.population)
        after = self._tell(state, found, ranked, step, round)
        state["sigma"] = state["sigma"] * (after / step)
        server.update(name, state["mean"].float())

    def _tell(
        self, state: dict[str, Tensor], points: numpy.ndarray, fitness: list[float], step: float, round: int
    ) -> float:
        """Take the clients' points as a generation; change the state and return the step size afterwards."""
        import torch

        if len(points) < 3:  # pycma takes no fewer
            order = sorted(range(len(points)), key=fitness.__getitem__)
            mean = recombination(len(points)) @ points[order]
            state["mean"] = torch.from_numpy(mean)
            return step
        stream = numpy_stream(self.seed, "server population", round)
        strategy = _strategy(
            state["mean"].numpy(), step, state["covariance"].numpy(), stream, len(points), len(points)
        )
        strategy.ask()  # pycma wants to be asked before it is told
        strategy.countiter, strategy.mean_old = int(state["generation"]), strategy.mean.copy()
        strategy.pc, strategy.adapt_sigma.ps = (state[one].numpy().copy() for one in ("path", "sigma_path"))
        strategy.tell([point.copy() for point in points], fitness)
        state["mean"] = torch.from_numpy(strategy.mean.copy())
        state["covariance"] = torch.from_numpy(strategy.sm.C.copy())
        state["path"] = torch.from_numpy(strategy.pc.copy())
        state["sigma_path"] = torch.from_numpy(strategy.adapt_sigma.ps.copy())
        state["generation"] = state["generation"] + 1
        return float(strategy.sigma)

    def _state(self, server: Server) -> dict[str, Tensor]:
        """Return the server's search distribution: mean, step size sent to clients, covariance, paths."""
        import torch

        if "mean" not in server.state:
            size, kind = self.config.dimensions, torch.float64
            server.state |= {
                "mean": torch.zeros(size, dtype=kind),
                "sigma": torch.full((1,), self.config.sigma, dtype=kind),
                "covariance": torch.eye(size, dtype=kind),
                "path": torch.zeros(size, dtype=kind),
                "sigma_path": torch.zeros(size, dtype=kind),
                "generation": torch.zeros((), dtype=torch.int64),
            }
        return server.state

    def _queries(self) -> int:
        """Return how often a turn passes over the client's examples."""
        return (self.config.population * self.config.iterations + 1) * (2 if self.config.corruption else 1)

    def _fitness(self, turn: Turn, segment: Segment, point: numpy.ndarray) -> tuple[float, float]:
        """Return a point's fitness and loss; the model has the point's prompt afterwards."""
        import torch

        (name,) = self.exchanged
        loss = turn.evaluate(segment, {name: torch.from_numpy(point).float()})
        if not self.config.corruption:
            return loss, loss
        with self._corrupted(turn):
            other = turn.evaluate(segment)
        return loss / (other or 1.0), loss  # in a probe there is no other loss

    @contextmanager
    def _corrupted(self, turn: Turn) -> Iterator[None]:
        """Let the model read the turn's corrupted text: the same each time, if read in the same order."""
        stream = torch_stream(self.seed, "corruption", turn.round, turn.client)
        self.model.corruption = stream, self.config.corruption
        try:
            yield
        finally:
            self.model.corruption = None


def step_size(sigmas: list[list[float]], population: int) -> float:
    """Return the server's step size before it takes the clients' points, from the clients' own.

    The root of their sum of squares over the product of clients and of the points from which a client
    recombines (`global_es.py` of the authors' code).
    """
    from cma.recombination_weights import RecombinationWeights

    total = math.fsum(one * one for client in sigmas for one in client)
    return math.sqrt(total / (len(sigmas) * RecombinationWeights(population).mu))


def recombination(count: int) -> numpy.ndarray:
    """Return the weights of so many points, the best first: all positive, with sum 1."""
    import numpy

    weights = math.log((2 * count + 1) / 2) - numpy.log(numpy.arange(1, count + 1))
    return weights / weights.sum()


def _strategy(
    mean: numpy.ndarray,
    sigma: float,
    covariance: numpy.ndarray,
    stream: numpy.random.Generator,
    population: int,
    parents: int | None = None,
) -> Any:
    """Return pycma's strategy with this distribution, whose evolution paths are zero."""
    import cma

    options: dict[str, Any] = {
        "popsize": population,
        "CMA_mu": parents,
        "randn": lambda *shape: stream.standard_normal(shape),
        "seed": math.nan,
        "verbose": -9,
    }
    strategy = cma.CMAEvolutionStrategy(mean, sigma, options)
    strategy.sm.C = covariance.copy()
    strategy.sm.update_now(-1)
    strategy._updateBDfromSM()
    return strategy


def _upper(size: int) -> Tensor:
    """Return rows and columns of the upper triangle of a matrix: (2, entries)."""
    import torch

    return torch.triu_indices(size, size)


def _tokenizer(model: PreTrainedModel) -> Any:
    """Return the model's tokenizer; None where a prediction has only the model's shape."""
    from fedlm.models.config import ModelConfig
    from fedlm.models.loading import load_tokenizer

    try:
        revision = getattr(model.config, "revision", None)  # a prediction's model has none
        return load_tokenizer(ModelConfig(source=str(model.name_or_path), revision=revision))
    except (UserError, ValueError):
        if next(model.parameters()).is_meta:
            return None
        raise
