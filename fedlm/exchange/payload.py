"""Payloads: the named tensors that cross the network, as bytes.

A payload is one safetensors file in memory. Its length is the traffic; nothing is estimated. A dense tensor
is sent without a copy. Tensors without values (meta) make a payload of the same length that cannot be
written out; costs are predicted with these. A tensor is sent dense, or in one of the reduced forms below,
each stored as parts whose names end in `#<part>`:

    dense       name                        the values, in the payload's precision
    pruned      name#mask, name#values      one bit per element (packed), and the values that were kept
    quantized   name#int8, name#scale       one byte per element, and one scale per output channel
    low rank    name#left, name#right       two factors of the change from what the receiver knows
    sparse      *#bits or *#indices,        some elements of several tensors laid end to end: where they are,
                *#chosen                    in the shorter of two forms, and their values
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from fedlm.base import staging
from fedlm.exchange.declared import Declared

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CODES = {  # in the order in which safetensors stores them: the widest first, which aligns them
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
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


@dataclass(frozen=True)
class LowRank:
    """A tensor of which a change is sent, as left (rows, rank) times the transpose of right (columns, rank).

    Rows are the first dimension, columns all others. The receiver adds the change to what it knows.
    """

    left: Tensor
    right: Tensor

    def parts(self, name: str) -> dict[str, Tensor]:
        """Return the stored parts."""
        return {f"{name}#left": self.left, f"{name}#right": self.right}


TOGETHER = "*"  # the name of what is made of several tensors


@dataclass(frozen=True)
class Sparse:
    """Several tensors, laid end to end, of which only the elements under `mask` are sent.

    The receiver, who knows which tensors these are, has the other elements from elsewhere, or takes zeros.
    Sent under the name TOGETHER. `mask` is bool, as long as all tensors together; `kept` its number of ones.
    """

    tensors: Mapping[str, Tensor]
    mask: Tensor
    kept: int

    def parts(self, name: str) -> dict[str, Tensor]:
        """Return the stored parts: positions as packed bits or as indices, and the chosen values."""
        kind, dtype, shape = self.positions()
        if self.mask.is_meta:
            places = torch.empty(shape, dtype=dtype, device="meta")
            return {f"{name}#{kind}": places, f"{name}#chosen": torch.empty(self.kept, device="meta")}
        places = pack(self.mask) if kind == "bits" else self.mask.nonzero().flatten().to(dtype)
        flat = torch.cat([value.flatten() for value in staging.to_host(self.tensors).values()])
        return {f"{name}#{kind}": places, f"{name}#chosen": flat[self.mask]}

    def positions(self) -> tuple[str, torch.dtype, tuple[int]]:
        """Return the shorter form of the positions: its part, type and shape."""
        elements = self.mask.numel()
        wide = torch.int32 if elements < 2**31 else torch.int64
        if self.kept * wide.itemsize < -(-elements // 8):
            return "indices", wide, (self.kept,)
        return "bits", torch.uint8, (-(-elements // 8),)


Sendable = Tensor | Pruned | Quantized | LowRank | Sparse


def changed(tensors: Mapping[str, Sendable]) -> list[str]:
    """Return the names of the tensors of which only a change, or some elements, are sent, in their order."""
    names: list[str] = []
    for name, value in tensors.items():
        if isinstance(value, LowRank):
            names.append(name)
        elif isinstance(value, Sparse):
            names += value.tensors
    return names


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


class Part(NamedTuple):
    """A part of a payload: values in the sender's memory, and the type in which they are sent."""

    tensor: Tensor
    kind: torch.dtype

    @property
    def nbytes(self) -> int:
        """Number of bytes that are sent."""
        return self.kind.itemsize * self.tensor.numel()

    def sent(self) -> Tensor:
        """Return the values as they are sent: a copy, or the sender's memory where that is the same."""
        return self.tensor.to(self.kind).contiguous()


def _parts(tensors: Mapping[str, Sendable], precision: torch.dtype) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for name, value in tensors.items():
        stored = {name: value} if isinstance(value, Tensor) else value.parts(name)
        for part, tensor in stored.items():
            keep = not tensor.is_floating_point() or part.endswith("#scale")
            parts[part] = Part(tensor.detach(), tensor.dtype if keep else precision)
    return parts


class Message:
    """An encoded payload: a header and the parts, which share the tensors' memory.

    `len(message)` is the traffic, `bytes(message)` the safetensors file. An empty payload is no message at
    all and has 0 bytes. Values in another precision than the sender's are converted where they are used, one
    tensor at a time, so that a message in half precision takes no memory either. `metadata` are texts for the
    file's header; what crosses the network has none.
    """

    def __init__(self, parts: dict[str, Part], metadata: dict[str, str] | None = None) -> None:
        self.parts = parts
        entries = ((name, part.kind, tuple(part.tensor.shape)) for name, part in parts.items())
        order, header = _layout(entries, metadata)
        self._order, self._header = order, header if parts else b""
        self._length = len(self._header) + sum(part.nbytes for part in parts.values())

    def __len__(self) -> int:
        return self._length

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Yield the bytes in order, tensor by tensor."""
        yield self._header
        for name in self._order:
            yield self.parts[name].sent().cpu().flatten().view(torch.uint8).numpy().data

    def __bytes__(self) -> bytes:
        return b"".join(self.chunks())

    def sha256(self) -> str:
        """Return the hexadecimal SHA-256 of the bytes."""
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()


def encode(tensors: Mapping[str, Sendable], precision: str = "float32") -> Message:
    """Return the payload of these tensors, which shares their memory."""
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
        elif isinstance(value, LowRank):
            entries.append((f"{name}#left", wide, tuple(value.left.shape)))
            entries.append((f"{name}#right", wide, tuple(value.right.shape)))
        elif isinstance(value, Sparse):
            form, integer, shape = value.positions()
            entries.append((f"{name}#{form}", integer, shape))
            entries.append((f"{name}#chosen", wide, (value.kept,)))
        else:
            kind = wide if value.is_floating_point() else value.dtype
            entries.append((name, kind, tuple(value.shape)))
    return size_of(entries)


def size_of(entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> int:
    """Return the length of the payload with these (name, type, shape) entries."""
    entries = list(entries)
    data = sum(kind.itemsize * torch.Size(shape).numel() for _, kind, shape in entries)
    return len(_layout(entries)[1]) + data


def _layout(
    entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: dict[str, str] | None = None
) -> tuple[list[str], bytes]:
    """Return the order of the tensors and the header of a safetensors file.

    The format (huggingface/safetensors, "Format"): 8 bytes of header length, a JSON header padded with spaces
    to a multiple of 8, the data. Tensors are ordered by type, then by name.
    """
    order = sorted(entries, key=lambda entry: (_ORDER[entry[1]], entry[0]))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, kind, shape in order:
        end = offset + kind.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _CODES[kind], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [entry[0] for entry in order], len(text).to_bytes(8, "little") + text


class Received(MutableMapping[str, Tensor]):
    """The tensors of a payload, by name, each with memory of its own from when it is first asked for.

    Until then the values of dense tensors are in the sender's memory: before that is written to, `own_all`
    must be called. From a GPU they come several at a time, in their order (see `staging`).
    """

    def __init__(self, shared: dict[str, tuple[Part, torch.dtype]], tensors: dict[str, Tensor]) -> None:
        self._shared, self._own = shared, tensors
        self._fetched: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._shared:
            value = self.view(name)
            if value.data_ptr() == self._shared[name][0].tensor.data_ptr():
                value = value.clone()
            self._own[name] = value
            del self._shared[name]
            self._fetched.pop(name, None)
        return self._own[name]

    def view(self, name: str) -> Tensor:
        """Return a tensor that must not be written to, and is read before the sender's memory changes."""
        if name not in self._shared:
            return self._own[name]
        part, kind = self._shared[name]
        if not staging.is_away(part.tensor):
            return part.sent().to(kind)
        if name not in self._fetched:
            self._fetched = staging.to_host(self._next(name))
        return self._fetched[name].to(kind)

    def _next(self, first: str) -> dict[str, Tensor]:
        """Return the tensors from this one on, as they are sent, that fit a buffer together; at least one."""
        found: dict[str, Tensor] = {}
        room = staging.ROOM
        for name in itertools.dropwhile(lambda name: name != first, self._shared):
            part, _ = self._shared[name]
            room -= part.nbytes
            if found and room < 0:
                break
            found[name] = part.sent()
        return found

    def sent(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors where they are, in the type in which they were sent; not to be written to."""
        for name in self:
            yield name, self._shared[name][0].sent() if name in self._shared else self._own[name]

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

    def __contains__(self, name: object) -> bool:
        return name in self._shared or name in self._own

    def __len__(self) -> int:
        return len(self._shared) + len(self._own)


def decode(
    message: Message | bytes,
    expected: Mapping[str, Tensor | Declared],
    own: bool = False,
    known: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the tensors of a payload, checked against what may be in it.

    `expected` holds, for each name that may occur, a tensor of the right shape and type, or the declaration
    of one that is sent dense; values come back in that type, on the CPU. With `own` they have memory of their
    own; without, values that were sent as they are share the sender's, and must not be written to. `known` is
    what the receiver has already of the tensors that arrive as a change or in part (see `changed`), in the
    order in which they were laid.

    Raises PayloadError, naming the tensor, on anything else: bytes that are not a payload, an unknown name, a
    wrong shape, a missing part. No more memory is allocated than the message's length and the expected
    shapes account for.
    """
    received = receive(message, expected, known)
    return {name: received[name] if own else received.view(name) for name in received}


def receive(
    message: Message | bytes,
    expected: Mapping[str, Tensor | Declared],
    known: Mapping[str, Tensor] | None = None,
) -> Received:
    """Return what `decode` returns with `own`, but each tensor is copied when it is asked for.

    So one tensor is in memory at a time where they are used one after the other. All checks are made at once.
    """
    if not message:
        return Received({}, {})
    parts = message.parts if isinstance(message, Message) else _read(message)
    shared: dict[str, tuple[Part, torch.dtype]] = {}
    tensors: dict[str, Tensor] = {}
    known = known or {}

    def sent(part: str) -> Tensor | None:
        return parts[part].sent() if part in parts else None

    for part, held in parts.items():
        name, _, kind = part.partition("#")
        if name == TOGETHER and kind == "chosen":
            tensors |= _sparse(sent("*#bits"), sent("*#indices"), held.sent(), known)
            continue
        if name == TOGETHER and kind in ("bits", "indices"):
            if "*#chosen" not in parts:
                raise PayloadError(f"stray part {part[:40]!r}")
            continue
        if name not in expected:
            raise PayloadError(f"unknown tensor {name[:100]!r}")
        like = expected[name]
        if not kind:
            _require_alike(name, held, like)
            shared[name] = held, like.dtype
        elif isinstance(like, Declared):
            raise PayloadError(f"{name}: in a reduced form; expected {like}")
        elif kind == "mask":
            tensors[name] = _pruned(name, held.sent(), sent(f"{name}#values"), like)
        elif kind == "int8":
            tensors[name] = _quantized(name, held.sent(), sent(f"{name}#scale"), like)
        elif kind == "left" and name in known:
            tensors[name] = _low_rank(name, held.sent(), sent(f"{name}#right"), known[name])
        elif f"{name}#{ {'values': 'mask', 'scale': 'int8', 'right': 'left'}.get(kind, '') }" not in parts:
            raise PayloadError(f"{name}: stray part {kind[:40]!r}")
    return Received(shared, tensors)


def _require_alike(name: str, part: Part, like: Tensor | Declared) -> None:
    """Raise PayloadError unless the part has the shape and the type; any floating type is as good."""
    shape, kind = part.tensor.shape, part.kind
    same_length = len(shape) == len(like.shape)
    lengths = zip(shape, like.shape, strict=False)
    if not same_length or any(expected not in (found, None) for found, expected in lengths):
        expected = like if isinstance(like, Declared) else tuple(like.shape)
        raise PayloadError(f"{name}: shape {tuple(shape)}; expected {expected}")
    if kind != like.dtype and not (kind.is_floating_point and like.dtype.is_floating_point):
        raise PayloadError(f"{name}: type {kind}; expected {like.dtype}")


def _read(message: bytes) -> dict[str, Part]:
    try:
        return {name: Part(value, value.dtype) for name, value in load(message).items()}
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


def _low_rank(name: str, left: Tensor, right: Tensor | None, known: Tensor) -> Tensor:
    rows, columns = known.shape[:1].numel(), known.shape[1:].numel()
    for factor, length in ((left, rows), (right, columns)):
        good = factor is not None and factor.is_floating_point() and factor.dim() == 2
        if not good or factor.shape != (length, left.shape[1]):  # type: ignore[union-attr]  # good says so
            raise PayloadError(f"{name}: expected factors of {rows} and {columns} rows and one rank")
    if left.is_meta or right is None:
        return torch.empty(known.shape, dtype=known.dtype, device="meta")
    return known + (left.to(known.dtype) @ right.to(known.dtype).T).view(known.shape)


def _sparse(
    bits: Tensor | None, indices: Tensor | None, chosen: Tensor, known: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    elements = sum(value.numel() for value in known.values())
    if (bits is None) == (indices is None) or not chosen.is_floating_point() or chosen.dim() != 1:
        raise PayloadError("sparse part: expected values, and their positions as bits or as indices")
    if chosen.is_meta:
        return {n: torch.empty(v.shape, dtype=v.dtype, device="meta") for n, v in known.items()}
    if indices is None:
        assert bits is not None
        mask = unpack(bits, torch.Size([elements]))
    else:
        places = indices.long()
        rising = places.dim() == 1 and bool((places[1:] > places[:-1]).all())
        if not rising or places.numel() and (int(places[0]) < 0 or int(places[-1]) >= elements):
            raise PayloadError(f"sparse part: expected rising indices below {elements}")
        mask = torch.zeros(elements, dtype=torch.bool)
        mask[places] = True
    if chosen.numel() != int(mask.sum()):
        raise PayloadError(f"sparse part: {chosen.numel()} values for {int(mask.sum())} positions")
    tensors, begin, used = {}, 0, 0
    for name, value in known.items():
        here = mask[begin : begin + value.numel()]
        begin += value.numel()
        count = int(here.sum())
        part = chosen[used : used + count].to(value.dtype)
        used += count
        tensors[name] = value.masked_scatter(here.view(value.shape), part)
    return tensors
