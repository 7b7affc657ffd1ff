"""How far pruned layers, and a pruned model, are from the dense ones: magnitude, Wanda, DSnoT.

    python benchmarks/pruning.py [--model minilm] [--model smollm2] [--sparsity 0.5] [--sparsity 0.7]

The criteria see 32 texts of BBC News; errors are measured on 32 others. `layers` is the squared error of a
linear layer's output, given the dense model's inputs, relative to the squared output, averaged over the
layers; `model` is the squared error of the last hidden states, relative to their variance, with all layers
pruned. The last line of a model and sparsity says in how many layers DSnoT's error is below Wanda's, and how
many weights each row keeps.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fedlm.exchange import pruning
from fedlm.models import blocks, loading
from fedlm.models.config import Kind, ModelConfig
from fedlm.study.plugins import discover_tasks

CRITERIA: tuple[pruning.Criterion, ...] = ("magnitude", "wanda", "dsnot")
KINDS: dict[str, Kind] = {"minilm": "classification", "smollm2": "causal"}


class Errors:
    """Squared errors of the layers' outputs, by criterion and the layer's weight, and of the whole model."""

    def __init__(self) -> None:
        self.layers: dict[str, dict[str, float]] = {criterion: {} for criterion in CRITERIA}
        self.model: dict[str, float] = {}
        self.kept: set[int] = set()


@torch.no_grad()
def measure(source: str, sparsity: float, length: int) -> Errors:
    """Prune each linear layer of a model's blocks and return the errors."""
    config = ModelConfig(source=source)
    model = loading.load(config, KINDS[source], 2, 1).eval()
    tokenizer = loading.load_tokenizer(config)
    tokenizer.padding_side = "right"
    task = discover_tasks()["bbc_news"]
    texts = list(task(task.Config()).load().rows["text"])[::34]
    seen, unseen = (
        dict(tokenizer(part, padding=True, truncation=True, max_length=length, return_tensors="pt"))
        for part in (texts[:32], texts[32:64])
    )
    inputs = pruning.observe(model, [seen])
    in_blocks = {name for block in blocks.find_blocks(model).blocks for name in block.parameters}
    linear = {name: t for name, t in pruning.linear_weights(model).items() if name in in_blocks}
    parameters = dict(model.named_parameters())
    names = {id(parameters[name]): name for name in linear}
    wanted = unseen["attention_mask"].flatten().bool()
    found, masks = Errors(), {criterion: {} for criterion in CRITERIA}

    def compare(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        name = names[id(module.weight)]
        weight = parameters[name].T if linear[name] else parameters[name]
        rows = given[0].flatten(0, -2)[wanted]
        size = (rows @ weight.T).square().sum()
        for criterion in CRITERIA:
            mask = pruning.choose(weight, sparsity, criterion, inputs[name])
            assert set(mask.sum(1).tolist()) == {pruning.kept_per_row(weight.shape[1], sparsity)}
            error = (rows @ (weight * ~mask).T).square().sum() / size
            found.layers[criterion][name] = error.item()
            masks[criterion][name] = mask.T if linear[name] else mask

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and id(m.weight) in names]
    hooks = [layer.register_forward_pre_hook(compare) for layer in layers]
    dense = last_states(model, unseen)[wanted]
    for hook in hooks:
        hook.remove()
    variance = (dense - dense.mean(0)).square().sum()
    for criterion in CRITERIA:
        before = {name: parameters[name].clone() for name in linear}
        for name, mask in masks[criterion].items():
            parameters[name].mul_(mask)
        pruned = last_states(model, unseen)[wanted]
        found.model[criterion] = ((pruned - dense).square().sum() / variance).item()
        for name, value in before.items():
            parameters[name].copy_(value)
    found.kept = {pruning.kept_per_row(mask.shape[1], sparsity) for mask in masks["dsnot"].values()}
    return found


def last_states(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the last hidden states, (tokens of the batch, width)."""
    return model(**batch, output_hidden_states=True).hidden_states[-1].flatten(0, 1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=sorted(KINDS))
    parser.add_argument("--sparsity", action="append", type=float)
    parser.add_argument("--length", type=int, default=48, help="tokens of a text")
    options = parser.parse_args()
    for source in options.model or sorted(KINDS):
        for sparsity in options.sparsity or [0.5, 0.7]:
            started = time.perf_counter()
            found = measure(source, sparsity, options.length)
            layers = found.layers
            print(f"{source}, sparsity {sparsity:g} ({time.perf_counter() - started:.0f} s)")
            for criterion in CRITERIA:
                mean = sum(layers[criterion].values()) / len(layers[criterion])
                print(f"  {criterion:<10} layers {mean:.4f}   model {found.model[criterion]:.3f}")
            below = sum(error < layers["wanda"][name] for name, error in layers["dsnot"].items())
            print(
                f"  DSnoT below Wanda in {below} of {len(layers['dsnot'])} layers; "
                f"weights kept in each row: {', '.join(map(str, sorted(found.kept)))}"
            )


if __name__ == "__main__":
    main()
