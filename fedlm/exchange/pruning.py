"""Which weights of a linear layer are kept: by magnitude, by Wanda, or by Wanda refined by DSnoT.

Masks are per output row, each row keeping the same number of weights. Wanda is arXiv:2306.11695, DSnoT
arXiv:2310.08915. Weights are (out, in) here; the caller transposes the weights of Transformers' Conv1D.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Criterion = Literal["magnitude", "wanda", "dsnot"]
CYCLES = 50  # maximum number of swaps per row, as published
THRESHOLD = 0.1  # rows with a smaller error are not changed, as published


@dataclass
class Inputs:
    """Sums over the calibration inputs of a linear layer, as Wanda and DSnoT need them.

    `total` and `squares` are float64 (in,): the sums of each input feature and of its square over all tokens.
    """

    total: Tensor
    squares: Tensor
    tokens: int = 0
    examples: int = 0

    def add(self, rows: Tensor, examples: int) -> None:
        """Add inputs (tokens, in) of so many examples."""
        rows = rows.double()
        self.total += rows.sum(0)
        self.squares += rows.square().sum(0)
        self.tokens += len(rows)
        self.examples += examples

    @property
    def norm(self) -> Tensor:
        """The L2 norm of each feature over all tokens, (in,)."""
        return self.squares.sqrt().float()

    @property
    def mean(self) -> Tensor:
        """The mean of each feature over all tokens, (in,)."""
        return (self.total / self.tokens).float()

    @property
    def variance(self) -> Tensor:
        """The variance of each feature over all tokens, (in,)."""
        return (self.squares / self.tokens - (self.total / self.tokens).square()).clamp_min(0).float()


def linear_weights(model: nn.Module) -> dict[str, bool]:
    """Return the names of the linear layers' weights, and whether each is stored as its transpose."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(module.weight)]: isinstance(module, Conv1D)
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


@torch.no_grad()
def observe(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, Inputs]:
    """Return the inputs of each linear layer, by the name of its weight, when the model reads the batches.

    Padding does not count. A layer that is used in several places sees the inputs of all of them.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen: dict[str, Inputs] = {}
    batch: dict[str, Tensor] = {}

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].flatten(0, -2)
        wanted = batch["attention_mask"].flatten().bool()
        if len(rows) == len(wanted):
            rows = rows[wanted]
        zeros = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
        found = seen.setdefault(names[id(module.weight)], Inputs(zeros, zeros.clone()))
        found.add(rows, len(batch["attention_mask"]))

    layers = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    hooks = [layer.register_forward_pre_hook(watch) for layer in layers]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            model(**batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return seen


def kept_per_row(columns: int, sparsity: float) -> int:
    """Return how many weights of a row of `columns` are kept: at least one."""
    return max(1, columns - round(columns * sparsity))


def choose(weight: Tensor, sparsity: float, criterion: Criterion, inputs: Inputs | None) -> Tensor:
    """Return the mask of the weights that are kept, bool (out, in), with the same number in each row.

    `inputs` are the layer's inputs (see `observe`); None, as for a layer that the forward pass never
    reaches, means pruning by magnitude.
    """
    kept = kept_per_row(weight.shape[1], sparsity)
    if criterion == "magnitude" or inputs is None:
        return _largest(weight.abs(), kept)
    weight = weight.to(inputs.total.device)
    mask = _largest(weight.abs() * inputs.norm, kept)
    if criterion == "dsnot":
        mask = _refine(weight, mask, inputs)
    return mask.cpu()


def _largest(scores: Tensor, count: int) -> Tensor:
    """Return the mask of each row's `count` largest scores."""
    indices = scores.topk(count, dim=1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, indices, True)


def _refine(weight: Tensor, mask: Tensor, inputs: Inputs) -> Tensor:
    """Return Wanda's mask after DSnoT's swaps of a kept weight for a pruned one, in each row separately.

    The error of a row is what the pruned weights would add to its output: the expectation of their products
    with the inputs, summed over an example's tokens. While it is above the threshold, the pruned weight that
    lowers it most, relative to its input's variance, is restored, and of the kept weights whose removal
    lowers it too, the one with the smallest Wanda score is pruned.

    A row is done at the first swap that would not lower its expected squared error, assuming uncorrelated
    inputs. This is not in the paper, whose swaps lower only the mean error: on MiniLM they raised the
    squared error of every third layer.
    """
    length = inputs.tokens / inputs.examples
    effect = weight * (inputs.mean * length)
    spread = weight.square() * (inputs.variance * length**2)
    growth = effect / inputs.variance.clamp_min(torch.finfo(torch.float32).tiny)
    scores = weight.abs() * inputs.norm

    # The first CYCLES candidates of each row, best first: for rows whose output is too small, then for those
    # where it is too large. Shapes (2, out, depth).
    depth = min(CYCLES, weight.shape[1])
    candidates = []
    for sign in (1, -1):
        helps = sign * effect > 0
        gain = (sign * growth).masked_fill(mask | ~helps, -torch.inf).topk(depth, 1)
        loss = scores.masked_fill(~mask | ~(sign * effect < 0), torch.inf).topk(depth, 1, largest=False)
        usable_here = gain.values.isfinite() & loss.values.isfinite()
        candidates.append((gain.indices, loss.indices, usable_here))
    growing, pruning, usable = map(torch.stack, zip(*candidates, strict=True))

    mask = mask.clone()
    row = torch.arange(len(weight), device=weight.device)
    error, variance = (effect * ~mask).sum(1), (spread * ~mask).sum(1)
    taken = torch.zeros(2, len(weight), dtype=torch.long, device=weight.device)
    active = torch.ones_like(row, dtype=torch.bool)
    for _ in range(CYCLES):
        side = (error < 0).long()
        place = taken[side, row].clamp_max(depth - 1)
        active &= (error.abs() > THRESHOLD) & (taken[side, row] < depth) & usable[side, row, place]
        grown, pruned = growing[side, row, place], pruning[side, row, place]
        new_error = error + effect[row, pruned] - effect[row, grown]
        new_variance = variance + spread[row, pruned] - spread[row, grown]
        active &= new_error.square() + new_variance < error.square() + variance
        if not active.any():
            break
        mask[row[active], grown[active]] = True
        mask[row[active], pruned[active]] = False
        error, variance = torch.where(active, new_error, error), torch.where(active, new_variance, variance)
        taken[side[active], row[active]] += 1
    return mask
