"""The parameters of the resident model, which serves all clients one after the other."""

import weakref
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedlm.base import staging


class Resident:
    """Writes values into parameters, but none that is there already: of a large model that is most of them.

    PyTorch counts the changes in place of each tensor, but for those made through `.data`.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self._written: dict[str, _Written] = {}

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Write values of parameters; other messages are left out."""
        pairs = {
            name: (self.parameters[name], value)
            for name, value in values.items()
            if name in self.parameters and not (name in self._written and self._written[name].is_still(value))
        }
        staging.write(pairs.values())
        for name, (parameter, value) in pairs.items():
            self._written[name] = _Written(value, parameter)

    def forget(self, names: Iterable[str]) -> None:
        """Write these the next time whatever they seem to be: for parameters that a method has trained."""
        for name in names:
            self._written.pop(name, None)


class _Written:
    """Remembers which value a parameter was given."""

    def __init__(self, value: Tensor, parameter: Tensor) -> None:
        # Each message has a tensor of its own for the same memory.
        self._memory, self._parameter = weakref.ref(value.untyped_storage()), parameter
        self._was = self._state(value)

    def is_still(self, value: Tensor) -> bool:
        """Return whether the parameter was given this memory, and neither has changed since."""
        return self._memory() is value.untyped_storage() and self._was == self._state(value)

    def _state(self, value: Tensor) -> tuple:
        place = value.storage_offset(), value.stride(), value.dtype, value._version
        return *place, self._parameter._version, self._parameter.data_ptr()
