"""A model of less width in the place of a model: the first part of every layer's inputs and outputs.

Source: HeteroFL (arXiv:2010.01264) and its code. The number of heads stays; of each head the first part is
kept. Where positions are rotations of pairs, that is the first part of both halves of a head, so that pairs
stay together, with the frequencies of the pairs kept.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fedlm.base import staging
from fedlm.models.quiet import own_generator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = ("bert", "roberta", "distilbert", "gpt2", "llama", "mistral")
"""Model types in which the heads are found by the names of the layers."""

_FROM_HEADS = ("query", "key", "value", "q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin", "c_attn")
_INTO_HEADS = ("attention.output.dense", "o_proj", "out_lin", "attn.c_proj")
_WIDTHS = ("hidden_size", "intermediate_size", "n_inner", "hidden_dim", "head_dim")


class Kept(NamedTuple):
    """What is kept of a dimension: of each of its `groups` of `size` entries, the first `kept`."""

    groups: int
    size: int
    kept: int


def head_size(model: PreTrainedModel) -> int:
    """Return the width of a head; half of it where positions rotate pairs of its entries."""
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size // 2 if _rotates(model) else size


class Narrow:
    """A model with `rate` times the width of another: 1/2 keeps half of every hidden size.

    `kept` says for each parameter, by name, what is kept of its dimensions. Raises ValueError where no whole
    part of a head is (see `head_size`).
    """

    def __init__(self, model: PreTrainedModel, rate: float) -> None:
        self.rate = rate
        if head_size(model) * rate % 1:
            raise ValueError(f"rate {rate}: no whole part of {head_size(model)} entries")
        config = copy.deepcopy(model.config)
        for name in _WIDTHS:
            if isinstance(size := getattr(config, name, None), int):
                setattr(config, name, math.ceil(size * rate))
        with torch.device("meta"), own_generator(0):
            self._twin: nn.Module = type(model)(config)
        parameters = dict(model.named_parameters())
        shapes = {name: value.shape for name, value in self._twin.named_parameters()}
        group = head_size(model)
        modules = dict(model.named_modules())
        self.kept = {
            name: _kept(modules, name, value.shape, shapes[name], group) for name, value in parameters.items()
        }
        self._attributes = list(self._differences(model))

    def cut(self, name: str, value: Tensor) -> Tensor:
        """Return the part of a parameter's value that is kept."""
        return self.window(name, value).reshape([one.groups * one.kept for one in self.kept[name]])

    def window(self, name: str, value: Tensor) -> Tensor:
        """Return a view of what is kept of a parameter's value: of each dimension two, groups and kept."""
        for dimension, one in reversed([*enumerate(self.kept[name])]):
            value = value.unflatten(dimension, (one.groups, one.size)).narrow(dimension + 1, 0, one.kept)
        return value

    @contextlib.contextmanager
    def instead_of(self, model: nn.Module, scaled: bool) -> Iterator[None]:
        """Let a model of the same structure be narrow meanwhile, its parameters without defined values.

        If `scaled`, what embeddings and linear layers return in training is divided by the rate, except at
        the model's output: a sum over fewer inputs is as large as one over all.
        """
        parameters = dict(model.named_parameters())
        with contextlib.ExitStack() as stack:
            stack.enter_context(staging.set_aside(parameters))
            for name, parameter in parameters.items():
                shape = [one.groups * one.kept for one in self.kept[name]]
                parameter.data = parameter.data.new_empty(shape)
            for path, attribute, value in self._attributes:
                stack.enter_context(_replaced(model.get_submodule(path), attribute, value))
            for module in _scaled(model) if scaled else ():
                stack.callback(module.register_forward_hook(self._scale).remove)
            yield

    def _scale(self, module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return output / self.rate if module.training else output

    def _differences(self, model: nn.Module) -> Iterator[tuple[str, str, Any]]:
        """Yield the attributes by which a narrow model's modules differ, as (path, name, value)."""
        for path, module in model.named_modules():
            twin = self._twin.get_submodule(path)
            for name, value in vars(module).items():
                other = vars(twin).get(name)
                if value is model.config:
                    yield path, name, self._twin.config
                elif name != "training" and isinstance(other, int | float | tuple) and value != other:
                    yield path, name, other
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.shape != (shape := twin.get_buffer(name).shape):
                    yield path, name, shape


def _rotates(model: nn.Module) -> bool:
    return any(name.endswith("inv_freq") for name, _ in model.named_buffers())


def _kept(
    modules: dict[str, nn.Module], name: str, shape: torch.Size, narrow: torch.Size, head: int
) -> list[Kept]:
    path = name.rpartition(".")[0]
    # GPT-2's linear layers hold (inputs, outputs), all others (outputs, inputs).
    outputs, inputs = (1, 0) if type(modules[path]).__name__ == "Conv1D" else (0, 1)
    if len(shape) == 1:
        outputs = 0
    in_heads = {outputs} if path.endswith(_FROM_HEADS) else {inputs} if path.endswith(_INTO_HEADS) else set()
    kept = []
    for dimension, (size, less) in enumerate(zip(shape, narrow, strict=True)):
        groups = size // head if dimension in in_heads and len(shape) > dimension else 1
        kept.append(Kept(groups, size // groups, less // groups))
    return kept


def _scaled(model: Any) -> Iterator[nn.Module]:
    """Yield the embeddings and the linear layers, but for those of the model's output."""
    base = model.base_model
    output = model.get_output_embeddings()
    for module in base.modules():
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if module is not output and (linear or isinstance(module, nn.Embedding)):
            yield module


@contextlib.contextmanager
def _replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Give a module another attribute for a while; for a buffer, its leading part of the shape `value`."""
    before = getattr(module, name)
    if isinstance(before, Tensor):
        value = before[tuple(slice(size) for size in value)]
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
