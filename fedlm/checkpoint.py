"""Checkpoints after each round: whole, checksummed, and recognised when they are not one's own.

A checkpoint file is a line with the SHA-256 of what follows, then one safetensors file whose metadata hold
the run's fingerprint and its books as JSON. The newest two are kept, so that a damaged one costs one round.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedlm.files import sha256, write_atomically

KEPT = 2
_DIGEST = 65  # 64 hexadecimal digits and a newline


class Checkpoints:
    """The checkpoints of one run, in one folder.

    `fingerprint` names everything the run depends on; a checkpoint with another one is foreign. `say` is
    called with one line for each file that cannot be used.
    """

    def __init__(self, folder: Path, fingerprint: str, say: Callable[[str], None]) -> None:
        self.folder, self.fingerprint, self.say = Path(folder), fingerprint, say

    def save(self, round: int, tensors: dict[str, Tensor], books: dict[str, Any]) -> None:
        """Write the checkpoint of a round and remove those older than the one before."""
        unique: dict[tuple, str] = {}
        aliases: dict[str, str] = {}
        stored: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            # Clients that keep what they downloaded share tensors with the server: stored once.
            identity = (tensor.data_ptr(), tensor.shape, tensor.dtype)
            if tensor.numel() and identity in unique:
                aliases[name] = unique[identity]
            else:
                unique[identity] = name
                stored[name] = tensor.detach().cpu().contiguous()
        header = {"fingerprint": self.fingerprint, "round": round, "aliases": aliases, "books": books}
        content = save(stored, metadata={"fedlm": json.dumps(header)})
        write_atomically(self._path(round), f"{sha256(content)}\n".encode(), content)
        for path in self._files()[KEPT:]:
            path.unlink(missing_ok=True)

    def latest(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """Return (round, tensors, books) of the newest checkpoint that is whole and this run's own."""
        for path in self._files():
            try:
                return self._read(path)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                self.say(f"checkpoint {path.name} is not used: {error}")
        return None

    def clear(self) -> None:
        """Remove all checkpoints, as a finished run does."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def _read(self, path: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
        with path.open("rb") as file:
            digest = file.read(_DIGEST)
            content = file.read()
        if digest != f"{sha256(content)}\n".encode():
            raise ValueError("its checksum does not match (it is truncated or damaged)")
        length = int.from_bytes(content[:8], "little")
        header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["fedlm"])
        if header["fingerprint"] != self.fingerprint:
            raise ValueError("it is of another configuration, data, model or code")
        stored = load(content)
        tensors = {**stored, **{name: stored[other] for name, other in header["aliases"].items()}}
        return header["round"], tensors, header["books"]

    def _path(self, round: int) -> Path:
        return self.folder / f"round-{round:06d}.checkpoint"

    def _files(self) -> list[Path]:
        """Return the checkpoint files, newest first."""
        return sorted(self.folder.glob("round-*.checkpoint"), reverse=True)
