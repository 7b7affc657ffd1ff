"""Training steps of any size without weights or arithmetic.

PyTorch's fake tensors have shapes, number formats and lifetimes, but no content. A step of the real code on a
fake model creates the same tensors in the same order as on a real one, so its memory and its operations can
be counted on a laptop, whatever the model's size.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import PreTrainedModel

from fedlm.models.config import Kind, ModelConfig
from fedlm.models.loading import build_on_meta


@contextlib.contextmanager
def fake_model(
    config: ModelConfig,
    kind: Kind,
    num_labels: int,
    prepare: Callable[[PreTrainedModel], nn.Module] | None = None,
) -> Iterator[tuple[FakeTensorMode, nn.Module]]:
    """Make the model fake inside a FakeTensorMode, and yield the mode and the model.

        with fake_model(config, "classification", 5) as (mode, model):
            tokens = torch.ones(16, 64, dtype=torch.long)      # fake, too
            measure_step(lambda: step(model, tokens), model)

    `prepare` wraps or freezes the model beforehand (peft cannot wrap a fake model). What reads a tensor's
    content (`.item()`, `if tensor:`) raises inside. Transformers cannot see whether a fake attention mask
    masks anything and always applies it, as it does for a real batch with padding; without a mask both do
    without.
    """
    pretrained = build_on_meta(config, kind, num_labels)
    model: nn.Module = pretrained
    if prepare is not None:
        # Under the meta device new adapters get no content either.
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = prepare(pretrained)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        to_fake(model)
        yield mode, model


@contextlib.contextmanager
def fake_copy(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a fake copy of any model, inside a FakeTensorMode; the model itself stays as it is."""
    # What the copy is given here is not copied, so that it takes no memory.
    without_values: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        without_values[id(tensor)] = empty
    copied = copy.deepcopy(model, without_values)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        to_fake(copied)
        yield copied


def has_values(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has values, which those of a prediction do not."""
    # In this order: asking a fake tensor where it is would count as a use of it under a memory tracker.
    return not isinstance(tensor, FakeTensor) and not tensor.is_meta


def to_fake(model: nn.Module) -> None:
    """Replace the model's parameters and buffers by empty fake ones on the CPU, inside a FakeTensorMode.

    Size, stride, number format, requires_grad and sharing stay as they are.
    """
    replaced: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in replaced:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            replaced[id(tensor)] = empty
        return replaced[id(tensor)]

    # All old tensors live until the end, so that no two of them can have the same id.
    old = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        # Besides what is registered, modules keep copies of buffers as plain attributes.
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for tensors in stores:
            for name, tensor in tensors.items():
                if isinstance(tensor, torch.Tensor):
                    old.append(tensor)
                    tensors[name] = fake(tensor)
    del old
