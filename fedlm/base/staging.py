"""Transfers between the host and a GPU: many tensors in one copy, through page-locked memory.

A copy to or from ordinary memory waits until the device has nothing left to do, and each has a latency of its
own, which is most of what a payload of many small tensors costs. Here tensors are laid end to end in one
buffer, which is copied as a whole; there are two such buffers, so that one is filled while the other is under
way. A larger tensor is copied in pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

ROOM = 32 * 2**20  # bytes of a buffer


def is_away(tensor: Tensor) -> bool:
    """Return whether a tensor's values are in the memory of another device than the CPU."""
    return tensor.device.type not in ("cpu", "meta")


@torch.no_grad()
def write(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair into the first, as `copy_` does."""
    moved: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    for target, value in pairs:
        alike = target.shape == value.shape and target.is_contiguous()
        if alike and is_away(target) and value.device.type == "cpu":
            moved.setdefault(target.device, []).append((target, value))
        else:
            target.copy_(value)
    for device, those in moved.items():
        buffers(device).write(those)


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU: copies of those that are elsewhere, the others as they are."""
    found = {name: tensor.detach() for name, tensor in tensors.items()}
    away: dict[torch.device, list[str]] = {}
    for name, tensor in found.items():
        if is_away(tensor):
            away.setdefault(tensor.device, []).append(name)
    for device, names in away.items():
        found.update(zip(names, buffers(device).read([found[name] for name in names]), strict=True))
    return found


def to_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the tensors on a device: copies of those that are elsewhere, the others as they are."""
    there = {name: one for name, one in tensors.items() if one.is_meta or one.device == device}
    moved = copies({name: one for name, one in tensors.items() if name not in there}, device)
    return {name: there[name] if name in there else moved[name] for name in tensors}


def copies(
    tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return copies of tensors on a device, of another type if one is given."""
    found = {
        name: torch.empty_like(tensor, dtype=dtype, device=device, requires_grad=False)
        for name, tensor in tensors.items()
    }
    write((found[name], tensor) for name, tensor in tensors.items())
    return found


@contextmanager
def set_aside(parameters: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Let parameters have other data meanwhile; yield their values on the CPU, which they get back."""
    held = to_host(parameters)
    device = next((parameter.device for parameter in parameters.values()), torch.device("cpu"))
    try:
        yield held
    finally:
        for name, value in to_device(held, device).items():
            parameters[name].data = value


@cache
def buffers(device: torch.device) -> Buffers:
    """Return the process's buffers for a device."""
    return Buffers(device, ROOM)


class Buffers:
    """The two buffers for a device, of `room` bytes each; page-locked where that device is a GPU."""

    def __init__(self, device: torch.device, room: int) -> None:
        self.device, self.room = device, room
        self._locked = device.type == "cuda"
        self._memory = [torch.empty(room, dtype=torch.uint8, pin_memory=self._locked) for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._last = 0

    def write(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copy values from the CPU into contiguous tensors of their shapes on the device.

        This waits for the device only where it has not yet read what is in the buffer that is needed next.
        """
        for targets, values in self._pieces(pairs):
            number = self._free()
            host = self._view(number, values)
            torch.cat(values, out=host)
            if len(targets) == 1:
                targets[0].copy_(host, non_blocking=self._locked)
                self._started(number)
                continue
            arrived = host.to(self.device, non_blocking=self._locked)
            self._started(number)
            for target, value in zip(targets, arrived.split([len(one) for one in values]), strict=True):
                target.copy_(value)

    def read(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return copies on the CPU of tensors on the device, each in memory of its own."""
        tensors = list(tensors)
        copies = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors]
        arriving: tuple[int, list[Tensor]] | None = None
        for targets, values in self._pieces(zip(copies, tensors, strict=True)):
            number = self._free()
            together = values[0] if len(values) == 1 else torch.cat(values)
            self._view(number, values).copy_(together, non_blocking=self._locked)
            self._started(number)
            if arriving:
                self._fetch(*arriving)
            arriving = number, targets
        if arriving:
            self._fetch(*arriving)
        return copies

    def _fetch(self, number: int, targets: list[Tensor]) -> None:
        """Copy what has arrived in a buffer to where it belongs."""
        self._wait(number)
        host = self._view(number, targets)
        for target, value in zip(targets, host.split([len(one) for one in targets]), strict=True):
            target.copy_(value)

    def _pieces(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Yield targets and values, flat, that fit a buffer together; their values are of one type."""
        targets: list[Tensor] = []
        values: list[Tensor] = []
        used = 0
        for target, value in pairs:
            if value.dtype != (values[0].dtype if values else value.dtype):
                yield targets, values
                targets, values, used = [], [], 0
            most = self.room // value.element_size()
            whole, flat, begin = target.detach().view(-1), value.detach().reshape(-1), 0
            while begin < len(flat):
                if used == most:
                    yield targets, values
                    targets, values, used = [], [], 0
                end = min(len(flat), begin + most - used)
                targets.append(whole[begin:end])
                values.append(flat[begin:end])
                used, begin = used + end - begin, end
        if values:
            yield targets, values

    def _view(self, number: int, values: list[Tensor]) -> Tensor:
        """Return as much of a buffer as these flat tensors need together, in their type."""
        kind = values[0].dtype
        return self._memory[number][: sum(map(len, values)) * kind.itemsize].view(kind)

    def _free(self) -> int:
        """Return the number of the buffer that was not used last, when the device is done with it."""
        self._last = 1 - self._last
        self._wait(self._last)
        return self._last

    def _started(self, number: int) -> None:
        """Note that the device has been asked to copy from or to a buffer."""
        if self._locked:
            self._copied[number] = event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))

    def _wait(self, number: int) -> None:
        if (event := self._copied[number]) is not None:
            event.synchronize()
