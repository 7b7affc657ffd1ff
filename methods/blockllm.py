"""BlockLLM: each client trains a small selection of tensors, and selects anew when its loss gets worse.

Source: arXiv:2406.17296 (abstract), its authors' code, and what others write about the paper. See
docs/methods/blockllm.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from fedlm.base.errors import UserError
from fedlm.base.randomness import numpy_stream
from fedlm.exchange.compression import LayerDrop
from fedlm.federation.method import Method, MethodConfig, Segment
from fedlm.federation.search import LogRange

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

    from fedlm.exchange.payload import Sendable
    from fedlm.federation.method import Module, PreTrainedModel, Server
    from fedlm.federation.settings import Training
    from fedlm.federation.turn import Turn


class BlockLLM(Method):
    """Training of selected tensors, or of selected coordinates of selected layers (Ramesh et al. 2024).

    Embeddings and the final norm are never trained; the head, where there is one, is trained by every client
    and outside the budget. What is selected from are units: the tensors of the layers, or the layers
    themselves. A client keeps the losses since its last selection, the number of its steps, the gradient norm
    that each unit had when it was last measured, and its selections; with `selection: coordinates` also which
    coordinates move.
    """

    title = "BlockLLM"
    reference = "arXiv:2406.17296"
    search = {"training.learning_rate": LogRange(3e-5, 3e-3)}

    class Config(MethodConfig):
        """What is selected, how much of it, and when anew."""

        selection: Literal["tensors", "coordinates"] = Field(
            "tensors",
            description="what a client trains: whole tensors, as in the authors' code; or, of the tensors of "
            "whole layers, the coordinates of the largest gradient, as readers describe the paper",
        )
        sparsity: float = Field(
            0.9, ge=0, le=0.99, description="share of the layers' parameters that a client does not train"
        )
        reselect_every: int = Field(
            20,
            ge=1,
            le=10_000_000,
            description="optimizer steps between two decisions whether to select anew",
        )
        patience: int = Field(
            10,
            ge=1,
            le=10_000_000,
            description="the last steps, whose mean loss must be above that of all steps since the last "
            "selection for there to be a new one",
        )
        measure_every: int | None = Field(
            20,
            ge=2,
            le=10_000_000,
            description="optimizer steps of which one measures something that is not selected, instead of "
            "training; null: none does",
        )
        penalty: Literal["exponential", "division"] = Field(
            "exponential",
            description="how visits lower a score: gradient norm / exp(share of the visits / steps), as in "
            "the authors' code; or gradient norm / share of the visits, as readers describe the paper",
        )
        moments: Literal["reset", "client"] = "reset"

        @model_validator(mode="after")
        def _reductions_suit(self) -> Self:
            if self.selection == "coordinates" and self.upload_compression:
                raise ValueError(
                    f"upload_compression: {self.upload_compression.operator}; allowed: null, since with "
                    "selection: coordinates an upload holds only some of the elements already"
                )
            if isinstance(self.compression, LayerDrop):
                raise ValueError(
                    "compression: layer_drop; allowed: the other operators, since a layer that a client "
                    "lacks cannot be measured"
                )
            return self

    config: Config

    def check_training(self, training: Training) -> None:
        if training.weight_decay:
            raise UserError(
                f"training.weight_decay: {training.weight_decay}; allowed: 0, since decay would also change "
                "what is measured and not trained"
            )

    def adapt(self, model: PreTrainedModel, kind: str) -> Module:
        parameters = dict(model.named_parameters())
        blocks = {block.name: list(block.parameters) for block in self.anatomy.blocks if block.parameters}
        tensors = {name: [name] for names in blocks.values() for name in names}
        self.units = blocks if self.config.selection == "coordinates" else tensors
        self.sizes = [sum(parameters[name].numel() for name in names) for names in self.units.values()]
        self.budget = int((1 - self.config.sparsity) * sum(self.sizes))
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in tensors or name in self.anatomy.head)
        return model

    def trainable(self, client: int, round: int) -> list[str]:
        return self._names(self.selected(client, round), self.anatomy.head)

    def segments(self, client: int, round: int, steps: int) -> list[Segment]:
        units = [*self.units]
        measured = [
            Segment(f"measure {units[unit]}", self._names([unit]), 1)
            for unit in self._measured(client, round, steps)
        ]
        changes = len(self._selections(client, round)) - 1
        label = f"client {client}" + (f", selection {changes + 1}" if changes else "")
        return [*measured, Segment(label, self.trainable(client, round), steps - len(measured))]

    def train(self, turn: Turn) -> None:
        import torch

        norms: dict[str, Tensor] = {}
        masks: dict[str, Tensor] = {}

        def measure(name: str, gradient: Tensor) -> Tensor:
            norms[name] = torch.linalg.vector_norm(gradient)
            return gradient.zero_()

        def restrict(name: str, gradient: Tensor) -> Tensor:
            if name in self.anatomy.head:
                return gradient
            norms[name] = torch.linalg.vector_norm(gradient)
            if self.config.selection == "tensors":
                return gradient
            if name not in masks:
                masks[name] = self._mask(turn, name, gradient)
            return gradient.mul_(masks[name])

        *measured, training = self.segments(turn.client, turn.round, turn.steps)
        for segment in measured:
            turn.fit(segment, correct=measure)
        turn.fit(training, correct=restrict)
        self._forget(turn, [name for segment in measured for name in segment.trainable])
        if turn.losses:  # none in a probe of memory, after which nothing is kept
            self._keep_masks(turn, masks)
            self._keep_state(turn, norms)
        elif next(iter(turn.received.values())).is_meta:
            self._keep_placeholders(turn)

    def upload(self, turn: Turn) -> dict[str, Sendable]:  # type: ignore[override]
        import torch

        from fedlm.exchange.payload import TOGETHER, Sparse

        values = super().upload(turn)
        if self.config.selection == "tensors":
            return dict(values)
        head = {name: value for name, value in values.items() if name in self.anatomy.head}
        layers = {name: value for name, value in values.items() if name not in head}
        mask = torch.cat([turn.results[name].flatten() for name in layers])
        kept = sum(self._counts(turn.client, turn.round).values())
        return {**head, TOGETHER: Sparse(layers, mask, kept)}

    def extra(self, server: Server) -> dict[str, float]:
        """Return how often a client has selected anew, on average over all clients."""
        return {"new_selections": sum(map(len, map(_changes, server.kept.values()))) / self.clients}

    def selected(self, client: int, round: int) -> list[int]:
        """Return the numbers of the units that a client trains in a round, in ascending order."""
        return self._selections(client, round)[-1]

    def scores(self, norms: numpy.ndarray, selections: Sequence[Sequence[int]], steps: int) -> numpy.ndarray:
        """Return the score of each unit, given its gradient norm, after so many steps: (units,) float64.

        With each selection the shares of the visits of its units rise by one, and all shares are scaled so
        that they sum to one.
        """
        import numpy

        share = numpy.zeros(len(self.units))
        for selection in selections:
            share[list(selection)] += 1
            share /= share.sum()
        if self.config.penalty == "exponential":
            return norms / numpy.exp(share / steps)
        # What was never visited has no finite score: it comes first, the largest norm before all others.
        return norms / share.clip(1e-12)

    def _selections(self, client: int, round: int) -> list[list[int]]:
        """Return a client's selections up to a round; the last of them is that of the round."""
        order = numpy_stream(self.seed, "selection", client).permutation(len(self.units)).tolist()
        first = self._fill(order, max(1, int((1 - self.config.sparsity) * len(self.units))))
        later = _changes(self.kept.get(client, {}))
        return [first, *(chosen for begin, chosen in later if begin <= round)]

    def _fill(self, order: Iterable[int], count: int | None = None) -> list[int]:
        """Return units in an order of preference, as many as the budget allows.

        Tensors: those before the first that does not fit, except that what is larger than the whole budget is
        passed over. With `count`, so many that fit. Layers: until they hold as much as the budget.
        """
        chosen: list[int] = []
        used = 0
        for unit in order:
            after = used + self.sizes[unit]
            if self.config.selection == "coordinates":
                if used >= self.budget:
                    break
            elif len(chosen) == count or (count is None and chosen and after > self.budget):
                break
            elif after > self.budget:
                continue
            chosen.append(unit)
            used = after
        return sorted(chosen)

    def _names(self, units: Iterable[int], others: Iterable[str] = ()) -> list[str]:
        groups = [*self.units.values()]
        names = {name for unit in units for name in groups[unit]}.union(others)
        return [name for name in self.exchanged if name in names]

    def _measured(self, client: int, round: int, steps: int) -> list[int]:
        """Return the units that a turn measures: one for every so many steps of the turns so far."""
        every = self.config.measure_every
        if every is None:
            return []
        due = round * steps // every - (round - 1) * steps // every
        selected = self.selected(client, round)
        others = [unit for unit in range(len(self.units)) if unit not in selected]
        stream = numpy_stream(self.seed, "measured", client, round)
        return stream.permutation(others)[: min(due, steps - 1)].tolist()

    def _counts(self, client: int, round: int) -> dict[str, int]:
        """Return how many coordinates of each selected tensor move: in all, at most the budget."""
        units, groups = self.selected(client, round), [*self.units.values()]
        elements = sum(self.sizes[unit] for unit in units)
        names = [name for unit in units for name in groups[unit]]
        sizes = {name: math.prod(self.shapes[name]) for name in names}
        return {name: size * self.budget // elements for name, size in sizes.items()}

    def _mask(self, turn: Turn, name: str, gradient: Tensor) -> Tensor:
        """Return which coordinates of a tensor move: those kept, or those of the largest gradient."""
        import torch

        from fedlm.exchange.payload import unpack

        if f"{name}@mask" in turn.kept:
            return unpack(turn.kept[f"{name}@mask"], gradient.shape).to(gradient.device)
        count = self._counts(turn.client, turn.round)[name]
        mask = torch.zeros(gradient.shape, dtype=torch.bool, device=gradient.device)
        mask.view(-1)[gradient.abs().flatten().topk(count).indices] = True
        return mask

    def _keep_masks(self, turn: Turn, masks: Mapping[str, Tensor]) -> None:
        """Leave the masks for the upload, and keep them for the next turn, one bit a coordinate."""
        import torch

        from fedlm.base.staging import to_host
        from fedlm.exchange.payload import pack

        if self.config.selection == "tensors":
            return
        found = to_host(masks)
        for name in self._counts(turn.client, turn.round):
            # A tensor that gets no gradient does not move, whatever its mask.
            mask = found[name] if name in found else self._mask(turn, name, torch.zeros(self.shapes[name]))
            turn.results[name] = mask
            if f"{name}@mask" not in turn.kept:
                turn.keep({f"{name}@mask": pack(mask)})

    def _keep_placeholders(self, turn: Turn) -> None:
        """Keep what a turn would keep that selects nothing anew, without values."""
        import torch

        before = turn.kept.get("selection@losses", torch.empty(0))
        with torch.device("meta"):
            state = {
                "selection@losses": torch.empty(len(before) + turn.steps),
                "selection@steps": torch.empty((), dtype=torch.int64),
                "selection@norms": torch.empty(len(self.units)),
            }
            if self.config.selection == "coordinates":
                for name in self._counts(turn.client, turn.round):
                    elements = math.prod(self.shapes[name])
                    turn.results[name] = torch.empty(elements, dtype=torch.bool)
                    state[f"{name}@mask"] = torch.empty(-(-elements // 8), dtype=torch.uint8)
        turn.keep(state)

    def _keep_state(self, turn: Turn, norms: Mapping[str, Tensor]) -> None:
        """Keep losses, steps and norms, and where it is time select anew for the turns that follow."""
        import torch

        kept = turn.kept
        before = kept.get("selection@losses", torch.empty(0))
        losses = torch.cat([before, torch.stack(turn.losses).cpu()])
        steps = int(kept.get("selection@steps", 0)) + turn.steps
        found = kept.get("selection@norms", torch.full((len(self.units),), torch.nan)).clone()
        squares = dict(zip(norms, torch.stack([*norms.values()]).square().tolist(), strict=True))
        for unit, names in enumerate(self.units.values()):
            if measured := [squares[name] for name in names if name in squares]:
                found[unit] = math.sqrt(sum(measured))
        every = self.config.reselect_every
        is_time = steps // every > (steps - turn.steps) // every
        if is_time and is_worse(losses.tolist(), self.config.patience):
            self._select(turn, found, steps)
            losses = losses[:0]
        turn.keep(
            {
                "selection@losses": losses,
                "selection@steps": torch.tensor(steps),
                "selection@norms": found,
            }
        )

    def _select(self, turn: Turn, norms: Tensor, steps: int) -> None:
        """Select for the turns that follow: by score, then what was never measured, in random order."""
        import torch

        selections = self._selections(turn.client, turn.round)
        scores = self.scores(norms.double().numpy(), selections, steps).tolist()
        measured = [unit for unit, score in enumerate(scores) if not math.isnan(score)]
        others = [unit for unit, score in enumerate(scores) if math.isnan(score)]
        stream = numpy_stream(self.seed, "never measured", turn.client, turn.round)
        order = sorted(measured, key=lambda unit: -scores[unit]) + stream.permutation(others).tolist()
        chosen = torch.zeros(1, len(self.units), dtype=torch.bool)
        chosen[0, self._fill(order)] = True
        added = {"selection@rounds": torch.tensor([turn.round + 1]), "selection@units": chosen}
        for name, value in added.items():
            turn.keep({name: torch.cat([turn.kept[name], value]) if name in turn.kept else value})
        self._forget(turn, self.exchanged)

    def _forget(self, turn: Turn, names: Iterable[str]) -> None:
        """Take the optimizer's moments and the masks of these parameters from what the client keeps."""
        from fedlm.federation.optimizer import MOMENTS

        for name in names:
            for kind in (*MOMENTS, "step", "mask"):
                turn.kept.pop(f"{name}@{kind}", None)


def is_worse(losses: Sequence[float], patience: int) -> bool:
    """Return whether there are more losses than `patience`, and the last so many are above the mean of all.

    Equal losses in float32 have just that mean, so that they are never worse.
    """
    return len(losses) > patience and fmean(losses[-patience:]) > fmean(losses)


def _changes(kept: Mapping[str, Tensor]) -> list[tuple[int, list[int]]]:
    """Return the selections after the first that a client keeps: the first round of each, and its units."""
    if "selection@rounds" not in kept:
        return []
    rounds, units = kept["selection@rounds"].tolist(), kept["selection@units"]
    return [(round, one.nonzero().flatten().tolist()) for round, one in zip(rounds, units, strict=True)]
