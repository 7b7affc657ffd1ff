"""Checkpoints after each round: whole, checksummed, and recognised when they are not one's own.

A checkpoint file is a line with the SHA-256 of what follows, then one safetensors file whose metadata hold
the run's fingerprint and its books as JSON. The newest two are kept, so that a damaged one costs one round.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from fedlm.base.files import remove_unfinished, sha256, write_atomically

_FILES = "round-*.checkpoint"
_DIGEST = 65  # 64 hexadecimal digits and a newline


class Checkpoints:
    """The checkpoints of one run, in one folder, which no other process may use at the same time.

    `fingerprint` names everything the run depends on; a checkpoint with another one is foreign. `say` is
    called with one line for each file that cannot be used.
    """

    def __init__(self, folder: Path, fingerprint: str, say: Callable[[str], None]) -> None:
        self.folder, self.fingerprint, self.say = Path(folder), fingerprint, say

    def save(self, round: int, tensors: dict[str, Tensor], books: dict[str, Any]) -> None:
        """Write the checkpoint of a round; then remove all but it and the one before."""
        unique: dict[tuple, str] = {}
        aliases: dict[str, str] = {}
        stored: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            # Clients that keep what they downloaded share tensors with the server: stored once.
            identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if tensor.numel() and identity in unique:
                aliases[name] = unique[identity]
            else:
                unique[identity] = name
                stored[name] = tensor.detach().cpu().contiguous()
        header = {"fingerprint": self.fingerprint, "round": round, "aliases": aliases, "books": books}
        content = save(stored, metadata={"fedlm": json.dumps(header)})
        write_atomically(self._path(round), f"{sha256(content)}\n".encode(), content)
        # By number, not by age: what another configuration left here may count further than this run.
        own = (self._path(round), self._path(round - 1))
        for path in self._files():
            if path not in own:
                path.unlink(missing_ok=True)

    def latest(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """Return (round, tensors, books) of the newest checkpoint that is whole and this run's own."""
        remove_unfinished(self.folder)
        for path in self._files():
            try:
                return self._read(path)
            except MemoryError:
                raise
            except Exception as error:  # whatever is wrong with a file, all that follows is not to use it
                self.say(f"checkpoint {path.name} is not used: {error}")
        return None

    def _read(self, path: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
        with path.open("rb") as file:
            digest = file.read(_DIGEST)
            content = file.read()
        if digest != f"{sha256(content)}\n".encode():
            raise ValueError("its checksum does not match (it is truncated or damaged)")
        try:
            length = int.from_bytes(content[:8], "little")
            header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["fedlm"])
            fingerprint, round, books = header["fingerprint"], header["round"], dict(header["books"])
            stored = load(content)
            shared = {name: stored[other] for name, other in dict(header["aliases"]).items()}
            if path != self._path(round):
                raise ValueError(f"round {round}")
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError("its checksum is right, but it is no checkpoint") from error
        if fingerprint != self.fingerprint:
            raise ValueError("it is of another configuration, data, model or code")
        return round, {**stored, **shared}, books

    def _path(self, round: int) -> Path:
        return self.folder / f"round-{round:06d}.checkpoint"

    def _files(self) -> list[Path]:
        """Return the checkpoint files, newest first."""
        return sorted(self.folder.glob(_FILES), reverse=True)


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints, as a finished run does."""
    for path in folder.glob(_FILES):
        path.unlink(missing_ok=True)
