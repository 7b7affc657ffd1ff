"""A model run part by part: what is before its layers, then its layers, one by one.

For clients that cannot hold the whole model, and for activations that are computed once and used often.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from fedlm.models.blocks import find_layers


class Parts:
    """The parts of a model at its input: part 0 is what is before the layers, part n the n-th layer."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tuples = False  # whether a layer returns a tuple, which only its first call shows

    @cached_property
    def layers(self) -> nn.ModuleList:
        """The model's layers; raises UserError if it has no list of them."""
        return find_layers(self.model)[1]

    def through(self, first: int, last: int, inputs: dict[str, Any], hidden: Tensor | None = None) -> Tensor:
        """Return what comes out of part `last` (windows, length, width); nothing behind it is computed.

        `inputs` are the model's, without labels; `hidden` goes into part `first`, unless that is part 0.
        """
        found: list[Tensor] = []
        with self.behind(first, hidden):
            layer = self.layers[max(last - 1, 0)]
            forward = layer.forward

            def stop(*arguments: Any, **options: Any) -> None:
                output = forward(*arguments, **options) if last else arguments[0]
                if last:
                    self.tuples = isinstance(output, tuple)
                found.append(output[0] if isinstance(output, tuple) else output)
                raise _Reached

            with _forward(layer, stop), contextlib.suppress(_Reached):
                self.model(**inputs)
        return found.pop()

    @contextlib.contextmanager
    def behind(self, parts: int, hidden: Tensor | None) -> Iterator[None]:
        """Let the model's passes begin behind the first `parts` parts, with the output of the last one."""

        def given(*arguments: Any, **options: Any) -> Any:
            return (hidden,) if self.tuples else hidden

        first = self.layers[0].forward

        def enter(_: Tensor, *arguments: Any, **options: Any) -> Any:
            return first(hidden, *arguments, **options)

        with contextlib.ExitStack() as stack:
            for layer in list(self.layers)[: max(parts - 1, 0)]:
                stack.enter_context(_forward(layer, given))
            if parts == 1:  # there is no layer that could return it
                stack.enter_context(_forward(self.layers[0], enter))
            yield

    def evaluate(self, parts: int) -> None:
        """Put the first `parts` parts into evaluation mode, if any."""
        if not parts:
            return
        for module in self.model.modules():
            if module is self.layers:
                break
            if not any(inner is self.layers for inner in module.modules()):
                module.eval()
        for layer in list(self.layers)[: parts - 1]:
            layer.eval()


class _Reached(Exception):
    """The pass has come as far as it should."""


@contextlib.contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
