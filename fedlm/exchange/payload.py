"""Payloads: the named tensors that cross the network, as bytes.

A payload is one safetensors file in memory. Its length is the traffic; nothing is multiplied out. A tensor
travels dense, or in one of the reduced forms below, each stored as parts whose names end in `#<part>`:

    dense       name                        the values, in the payload's precision
    pruned      name#mask, name#values      one bit an element (packed), and the values that were kept
    quantized   name#int8, name#scale       one byte an element, and one scale per output channel
"""

import json
from collections.abc import Iterable, Mapping
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
    """A payload that cannot be what it claims: truncated, of a wrong shape, with an unknown name."""


@dataclass(frozen=True)
class Pruned:
    """A tensor of which only the elements under `mask` travel; the others are zero at the receiver.

    Where sizes are foretold without values there is no mask, and `kept` says how many elements travel.
    """

    tensor: Tensor
    mask: Tensor | None  # bool, same shape
    kept: int | None = None

    def parts(self, name: str) -> dict[str, Tensor]:
        """Return the stored parts: the packed mask (ceil(n / 8) bytes) and the kept values (k,)."""
        return {f"{name}#mask": pack(self.mask), f"{name}#values": self.tensor[self.mask]}

    def count(self) -> int:
        """Return the number of values that travel."""
        return int(self.mask.sum()) if self.kept is None else self.kept


@dataclass(frozen=True)
class Quantized:
    """A matrix that travels as one signed byte an element and one scale per output channel.

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


def encode(tensors: Mapping[str, Sendable], precision: str = "float32") -> bytes:
    """Return the payload's bytes; the empty payload is no message at all, so no bytes."""
    if not tensors:
        return b""
    parts = _parts(tensors, PRECISIONS[precision])
    order, header = _layout((name, part.dtype, tuple(part.shape)) for name, part in parts.items())
    content = (parts[name].cpu().flatten().view(torch.uint8).numpy() for name in order)
    return b"".join([header, *content])


def size(tensors: Mapping[str, Sendable], precision: str = "float32") -> int:
    """Return `len(encode(tensors, precision))` from names, shapes and types alone.

    Works on fake and meta tensors, whose values do not exist; a Pruned then says how many it keeps.
    """
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


def decode(message: bytes, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a payload, checked against what may be in it.

    `expected` holds, for each name that may occur, a tensor of the right shape and type; values come back in
    that type, on the CPU. Raises PayloadError, naming the tensor, on anything else: bytes that are not a
    payload, an unknown name, a wrong shape, a missing part. No more memory is taken than the message's
    length and the expected shapes account for.
    """
    if not message:
        return {}
    try:
        parts = load(message)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise PayloadError(f"not a payload: {str(error)[:200]}") from error
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
            tensors[name] = value.to(like.dtype)
        elif kind == "mask":
            values = parts.get(f"{name}#values")
            mask = unpack(value, like.shape)
            if values is None or values.shape != (int(mask.sum()),) or not values.is_floating_point():
                raise PayloadError(f"{name}: as many values as the mask has ones are expected")
            tensors[name] = torch.zeros(like.shape, dtype=like.dtype).masked_scatter_(
                mask, values.to(like.dtype)
            )
        elif kind == "int8":
            scale = parts.get(f"{name}#scale")
            if value.dtype != torch.int8 or value.shape != like.shape or value.dim() != 2:
                raise PayloadError(f"{name}: int8 of shape {tuple(like.shape)} is expected")
            rows, columns = like.shape
            fits = scale is not None and scale.shape in ((rows, 1), (1, columns))
            if not fits or scale.dtype != torch.float32:
                raise PayloadError(f"{name}: {rows} scales by row or {columns} by column are expected")
            tensors[name] = (value.float() * scale).to(like.dtype)
        elif f"{name}#{ {'values': 'mask', 'scale': 'int8'}.get(kind, '') }" not in parts:
            raise PayloadError(f"{name}: stray part {kind[:40]!r}")
    return tensors
