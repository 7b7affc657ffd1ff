"""Payloads: the named tensors that cross the network, as bytes.

A payload is one safetensors file in memory. Its length is the traffic; nothing is estimated. A dense tensor
is sent without a copy. Tensors without values (meta) make a payload of the same length that cannot be
written out; costs are predicted with these. A tensor is sent dense, or in one of the reduced forms below,
each stored as parts whose names end in `#<part>`:

    dense       name                        the values, in the payload's precision
    pruned      name#mask, name#values      one bit per element (packed), and the values that were kept
    quantized   name#int8, name#scale       one byte per element, and one scale per output channel
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CODES = {  # in the order in which safetensors stores them: the widest first, which aligns them
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = {kind: index for index, kind in enumerate(_CODES)}


class PayloadError(Exception):
    """A payload that is not valid: truncated, of a wrong shape, with an unknown name."""


@dataclass(frozen=True)
class Pruned:
    """A tensor of which only the elements under `mask` are sent; the others are zero at the receiver.

    A tensor without values has no mask; `kept` is then the number of elements that are sent.
    """

    tensor: Tensor
    mask: Tensor | None  # bool, same shape
    kept: int | None = None

    def parts(self, name: str) -> dict[str, Tensor]:
        """Return the stored parts: the packed mask (ceil(n / 8) bytes) and the kept values (k,)."""
        if self.mask is None:
            packed = torch.empty(-(-self.tensor.numel() // 8), dtype=torch.uint8, device="meta")
            return {f"{name}#mask": packed, f"{name}#values": torch.empty(self.count(), device="meta")}
        return {f"{name}#mask": pack(self.mask), f"{name}#values": self.tensor[self.mask]}

    def count(self) -> int:
        """Return the number of values that are sent."""
        if self.mask is not None:
            return int(self.mask.sum())
        assert self.kept is not None, "a pruned tensor has a mask or a number of kept values"
        return self.kept


@dataclass(frozen=True)
class Quantized:
    """A matrix that is sent as one signed byte per element and one scale per output channel.

    `channels` is the dimension of the output channels: 0, or 1 where the transposed weight is stored.
    """

    tensor: Tensor
    channels: int = 0

    def parts(self, name: str) -> dict[str, Tensor]:
        """Return the stored parts: int8 of the tensor's shape, and float32 scales that broadcast to it."""
        values = self.tensor.float()
        scale = values.abs().amax(1 - self.channels, keepdim=True) / 127
        steps = values / scale.where(scale > 0, 1)
        return {f"{name}#int8": steps.round().clamp(-127, 127).to(torch.int8), f"{name}#scale": scale}

    def scale_shape(self) -> tuple[int, int]:
        """Return the scales' shape: (rows, 1) or (1, columns)."""
        return (self.tensor.shape[0], 1) if self.channels == 0 else (1, self.tensor.shape[1])


Sendable = Tensor | Pruned | Quantized


def pack(mask: Tensor) -> Tensor:
    """Pack a boolean mask of n elements into ceil(n / 8) bytes, first element in the lowest bit."""
    flat = mask.flatten().to(torch.uint8)
    padded = torch.zeros(-(-flat.numel() // 8) * 8, dtype=torch.uint8)
    padded[: flat.numel()] = flat.cpu()
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    return (padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """Return the boolean mask of `shape` that `pack` packed. Raises PayloadError on a wrong length."""
    elements = shape.numel()
    if packed.dtype != torch.uint8 or packed.shape != (-(-elements // 8),):
        raise PayloadError(f"mask of {packed.numel()} bytes; expected {-(-elements // 8)}")
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((packed[:, None] >> shifts) & 1).flatten()[:elements].view(shape).bool()


def _parts(tensors: Mapping[str, Sendable], precision: torch.dtype) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = {}
    for name, value in tensors.items():
        stored = {name: value} if isinstance(value, Tensor) else value.parts(name)
        for part, tensor in stored.items():
            keep = not tensor.is_floating_point() or part.endswith("#scale")
            tensor = tensor.detach() if keep else tensor.detach().to(precision)
            parts[part] = tensor.contiguous()
    return parts


class Message:
    """An encoded payload: a header and the stored parts, which share the tensors' memory.

    `len(message)` is the traffic, `bytes(message)` the safetensors file. An empty payload is no message at
    all and has 0 bytes.
    """

    def __init__(self, parts: dict[str, Tensor]) -> None:
        self.parts = parts
        order, header = _layout((name, part.dtype, tuple(part.shape)) for name, part in parts.items())
        self._order, self._header = order, header if parts else b""
        self._length = len(self._header) + sum(part.nbytes for part in parts.values())

    def __len__(self) -> int:
        return self._length

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Yield the bytes in order, tensor by tensor."""
        yield self._header
        for name in self._order:
            yield self.parts[name].cpu().flatten().view(torch.uint8).numpy().data

    def __bytes__(self) -> bytes:
        return b"".join(self.chunks())

    def sha256(self) -> str:
        """Return the hexadecimal SHA-256 of the bytes."""
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()


def encode(tensors: Mapping[str, Sendable], precision: str = "float32") -> Message:
    """Return the payload of these tensors; it shares their memory where they are sent unchanged."""
    return Message(_parts(tensors, PRECISIONS[precision]))


def size(tensors: Mapping[str, Sendable], precision: str = "float32") -> int:
    """Return `len(encode(tensors, precision))` from names, shapes and types alone."""
    if not tensors:
        return 0
    wide = PRECISIONS[precision]
    entries: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    for name, value in tensors.items():
        if isinstance(value, Pruned):
            entries.append((f"{name}#mask", torch.uint8, (-(-value.tensor.numel() // 8),)))
            entries.append((f"{name}#values", wide, (value.count(),)))
        elif isinstance(value, Quantized):
            entries.append((f"{name}#int8", torch.int8, tuple(value.tensor.shape)))
            entries.append((f"{name}#scale", torch.float32, value.scale_shape()))
        else:
            kind = wide if value.is_floating_point() else value.dtype
            entries.append((name, kind, tuple(value.shape)))
    return size_of(entries)


def size_of(entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> int:
    """Return the length of the payload with these (name, type, shape) entries."""
    entries = list(entries)
    data = sum(kind.itemsize * torch.Size(shape).numel() for _, kind, shape in entries)
    return len(_layout(entries)[1]) + data


def _layout(entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> tuple[list[str], bytes]:
    """Return the order of the tensors and the header of a safetensors file.

    The format (huggingface/safetensors, "Format"): 8 bytes of header length, a JSON header padded with spaces
    to a multiple of 8, the data. Tensors are ordered by type, then by name.
    """
    order = sorted(entries, key=lambda entry: (_ORDER[entry[1]], entry[0]))
    header, offset = {}, 0
    for name, kind, shape in order:
        end = offset + kind.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _CODES[kind], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [entry[0] for entry in order], len(text).to_bytes(8, "little") + text


class Received(MutableMapping[str, Tensor]):
    """The tensors of a payload, by name, each with memory of its own from when it is first asked for.

    Until then the values that were sent unchanged are in the sender's memory: before that is written to,
    `own_all` must be called.
    """

    def __init__(self, shared: dict[str, tuple[Tensor, torch.dtype]], tensors: dict[str, Tensor]) -> None:
        self._shared, self._own = shared, tensors

    def __getitem__(self, name: str) -> Tensor:
        if name in self._shared:
            value, kind = self._shared[name]
            self._own[name] = value.to(_host(value), kind, copy=True)
            del self._shared[name]
        return self._own[name]

    def view(self, name: str) -> Tensor:
        """Return a tensor that must not be written to, and is read before the sender's memory changes."""
        if name not in self._shared:
            return self._own[name]
        value, kind = self._shared[name]
        return value.to(_host(value), kind)

    def sent(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors where they are, in the form in which they were sent; not to be written to."""
        for name in self:
            yield name, self._shared[name][0] if name in self._shared else self._own[name]

    def own_all(self) -> None:
        """Give all tensors memory of their own."""
        for name in list(self._shared):
            self[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._shared.pop(name, None)
        self._own[name] = value

    def __delitem__(self, name: str) -> None:
        del (self._shared if name in self._shared else self._own)[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._shared, *self._own])

    def __len__(self) -> int:
        return len(self._shared) + len(self._own)


def _host(tensor: Tensor) -> torch.device:
    return tensor.device if tensor.is_meta else torch.device("cpu")


def decode(message: Message | bytes, expected: Mapping[str, Tensor], own: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a payload, checked against what may be in it.

    `expected` holds, for each name that may occur, a tensor of the right shape and type; values come back in
    that type, on the CPU. With `own` they have memory of their own; without, values that were sent
    unchanged share the sender's, and must not be written to.

    Raises PayloadError, naming the tensor, on anything else: bytes that are not a payload, an unknown name, a
    wrong shape, a missing part. No more memory is allocated than the message's length and the expected
    shapes account for.
    """
    received = receive(message, expected)
    return {name: received[name] if own else received.view(name) for name in received}


def receive(message: Message | bytes, expected: Mapping[str, Tensor]) -> Received:
    """Return what `decode` returns with `own`, but each tensor is copied when it is asked for.

    So one tensor is in memory at a time where they are used one after the other. All checks are made at once.
    """
    if not message:
        return Received({}, {})
    parts = message.parts if isinstance(message, Message) else _read(message)
    shared: dict[str, tuple[Tensor, torch.dtype]] = {}
    tensors: dict[str, Tensor] = {}
    for part, value in parts.items():
        name, _, kind = part.partition("#")
        if name not in expected:
            raise PayloadError(f"unknown tensor {name[:100]!r}")
        like = expected[name]
        if not kind:
            if value.shape != like.shape:
                raise PayloadError(f"{name}: shape {tuple(value.shape)}; expected {tuple(like.shape)}")
            if value.is_floating_point() != like.is_floating_point():
                raise PayloadError(f"{name}: type {value.dtype}; expected {like.dtype}")
            shared[name] = value, like.dtype
        elif kind == "mask":
            tensors[name] = _pruned(name, value, parts.get(f"{name}#values"), like)
        elif kind == "int8":
            tensors[name] = _quantized(name, value, parts.get(f"{name}#scale"), like)
        elif f"{name}#{ {'values': 'mask', 'scale': 'int8'}.get(kind, '') }" not in parts:
            raise PayloadError(f"{name}: stray part {kind[:40]!r}")
    return Received(shared, tensors)


def _read(message: bytes) -> dict[str, Tensor]:
    try:
        return load(message)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise PayloadError(f"not a payload: {str(error)[:200]}") from error


def _pruned(name: str, packed: Tensor, values: Tensor | None, like: Tensor) -> Tensor:
    if packed.is_meta:
        return torch.empty(like.shape, dtype=like.dtype, device="meta")
    mask = unpack(packed, like.shape)
    if values is None or values.shape != (int(mask.sum()),) or not values.is_floating_point():
        raise PayloadError(f"{name}: expected as many values as the mask has ones")
    return torch.zeros(like.shape, dtype=like.dtype).masked_scatter_(mask, values.to(like.dtype))


def _quantized(name: str, steps: Tensor, scale: Tensor | None, like: Tensor) -> Tensor:
    if steps.dtype != torch.int8 or steps.shape != like.shape or steps.dim() != 2:
        raise PayloadError(f"{name}: expected int8 of shape {tuple(like.shape)}")
    rows, columns = like.shape
    if scale is None or scale.shape not in ((rows, 1), (1, columns)) or scale.dtype != torch.float32:
        raise PayloadError(f"{name}: expected {rows} scales by row or {columns} by column")
    return (steps.float() * scale).to(like.dtype)
