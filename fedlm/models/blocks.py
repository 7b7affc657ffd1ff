"""The parts of a language model: embeddings, blocks (transformer layers), head, and the rest.

They are derived from the model's structure, not from a list of model names: the layers are the longest list
of equal modules, what is registered before them is the embeddings, and what a task's class adds outside the
pretrained model is the head. Works on models of Transformers, also when they are wrapped by peft.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from fedlm.base.errors import UserError


@dataclass(frozen=True)
class Block:
    """A named group of parameters that are trained together: one layer, or what several layers share.

    `module` is the path of the layer's module, or of the first occurrence of what is shared; `parameters` are
    names as in `model.named_parameters()`.
    """

    name: str
    module: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Anatomy:
    """Where each parameter of a model belongs; every name of `model.named_parameters()` belongs to one part.

    `blocks` holds one block a layer, `layer_0` at the input, then, if layers share parameters, one block
    `shared`. `embeddings` comes before the layers and includes an output embedding tied to it; `head` is the
    task's newly initialised output layer (empty for causal models); `rest` is everything else, such as a
    final norm, a pooler, an untied output embedding, or soft prompts. `shared` holds the names in the block
    `shared` once more, `layers` the paths of the layers.

    peft keeps a frozen copy of a head that it trains (`original_module`); both copies are in `head`.
    """

    blocks: tuple[Block, ...]
    embeddings: tuple[str, ...]
    head: tuple[str, ...]
    rest: tuple[str, ...]
    shared: tuple[str, ...]
    layers: tuple[str, ...]

    @cached_property
    def places(self) -> dict[str, str]:
        """The part of each parameter by name: a block's name, `embeddings`, `head` or `rest`."""
        places = {name: block.name for block in self.blocks for name in block.parameters}
        for place in ("embeddings", "head", "rest"):
            places.update(dict.fromkeys(getattr(self, place), place))
        return places


def find_blocks(model: nn.Module) -> Anatomy:
    """Return the anatomy of a model.

    Raises UserError if the model has no list of layers.
    """
    layers_path, layers = find_layers(model)
    paths = [f"{layers_path}.{index}" for index in range(len(layers))]
    users = Counter(id(p) for layer in layers for p in set(layer.parameters()))
    head_paths = _head_paths(model)

    in_layer: list[list[str]] = [[] for _ in layers]
    shared, embeddings, head, rest = [], [], [], []
    before_layers = True
    for name, parameter in model.named_parameters():
        if users[id(parameter)] > 1:
            shared.append(name)
            before_layers = False
        elif users[id(parameter)] == 1:
            index = next(i for i, path in enumerate(paths) if name.startswith(path + "."))
            in_layer[index].append(name)
            before_layers = False
        elif any(name.startswith(path + ".") for path in head_paths):
            head.append(name)
        elif before_layers:
            embeddings.append(name)
        else:
            rest.append(name)

    blocks = [
        Block(f"layer_{index}", path, tuple(names))
        for index, (path, names) in enumerate(zip(paths, in_layer, strict=True))
    ]
    if shared:
        blocks.append(Block("shared", _common_path(shared), tuple(shared)))
    return Anatomy(
        blocks=tuple(blocks),
        embeddings=tuple(embeddings),
        head=tuple(head),
        rest=tuple(rest),
        shared=tuple(shared),
        layers=tuple(paths),
    )


@contextlib.contextmanager
def skip(model: nn.Module, block_indices: Iterable[int]) -> Iterator[None]:
    """Run the model without some of its layers: hidden states bypass them, and they compute nothing.

    `block_indices` count the layers from 0 at the input. Parameters, their names and gradient checkpointing
    stay as they are; a layer left out simply gets no gradient. For clients whose copy lacks layers.

    Raises ValueError for an index that no layer has.
    """
    _, layers = find_layers(model)
    skipped = frozenset(block_indices)
    if wrong := sorted(index for index in skipped if not 0 <= index < len(layers)):
        raise ValueError(f"cannot skip {wrong}: the model has the layers 0 to {len(layers) - 1}")

    class SkippingList(nn.ModuleList):
        """The list as the forward pass sees it. Names and parameters come from `_modules`, which stays."""

        def __iter__(self) -> Iterator[nn.Module]:
            return iter([layer for i, layer in enumerate(self._modules.values()) if i not in skipped])

        def __len__(self) -> int:
            return len(self._modules) - len(skipped)

        def __getitem__(self, index: Any) -> Any:
            return list(self)[index]

    # Changing what the list yields, instead of what a layer returns, needs no knowledge of the tuple that
    # each family's layers return.
    plain = layers.__class__
    layers.__class__ = SkippingList
    try:
        yield
    finally:
        layers.__class__ = plain


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the list of a model's layers and its path; raises UserError if there is none."""
    found: list[tuple[int, int, str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        inside_another = any(path.startswith(other + ".") for *_, other, _ in found)
        if not isinstance(module, nn.ModuleList) or inside_another or not len(module):
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        if size and len({type(layer) for layer in module}) == 1:
            found.append((len(module), size, path, module))
    if not found:
        raise UserError(
            f"model: no blocks can be found in {type(model).__name__}: it has no list of equal layers; "
            "choose a transformer, or a method that does not train blocks"
        )
    _, _, path, layers = max(found, key=lambda candidate: candidate[:2])
    return path, layers


def _head_paths(model: nn.Module) -> list[str]:
    """Return the paths of the modules that the task's class adds to the pretrained model."""
    prefix = ""
    inner: Any = model  # to nn.Module every other attribute is a tensor or a module
    if hasattr(inner, "get_base_model"):  # wrapped by peft
        inner = inner.get_base_model()
        prefix = next(path for path, module in model.named_modules() if module is inner) + "."
    base = getattr(inner, "base_model", inner)
    # What a causal model adds to its base is the pretrained output embedding, which is not a new head.
    if base is inner or inner.get_output_embeddings() is not None:
        return []
    return [prefix + name for name, module in inner.named_children() if module is not base]


def _common_path(names: list[str]) -> str:
    parts = [name.split(".")[:-1] for name in names]
    common = []
    for steps in zip(*parts, strict=False):
        if len(set(steps)) > 1:
            break
        common.append(steps[0])
    return ".".join(common)
