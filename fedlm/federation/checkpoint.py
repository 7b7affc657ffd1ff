"""Checkpoints between rounds: whole, checksummed, and recognised when they are not one's own.

A checkpoint file is a line with the SHA-256 of what follows, then one safetensors file whose metadata hold
the run's fingerprint and its other state as JSON. The newest two are kept, should one be damaged.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from fedlm.base.files import remove_unfinished, sha256, write_atomically

_FILES = "round-*.checkpoint"
_DIGEST = 65  # 64 hexadecimal digits and a newline
_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and a cluster's limit of time

State = tuple[dict[str, Tensor], dict[str, Any]]


class Checkpoints:
    """The checkpoints of one run, in one folder, which no other process may use at the same time.

    `fingerprint` names everything the run depends on; a checkpoint with another one is foreign. `log` is
    called with one line for each file that cannot be used. A checkpoint is written after the first round that
    ends at least `seconds` after the last one, and after the round in which a signal asks the process to end.
    """

    def __init__(
        self, folder: Path, fingerprint: str, log: Callable[[str], None], seconds: float = 0.0
    ) -> None:
        self.folder, self.fingerprint, self.log, self.seconds = Path(folder), fingerprint, log, seconds
        self._last = time.monotonic()
        self._previous: Path | None = None
        self._signal: int | None = None

    @contextmanager
    def watching_signals(self) -> Iterator[None]:
        """Let a first signal to end the process wait for the end of the round, which then is saved.

        A second one ends it at once. Only a process's main thread can watch.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._noticed) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _noticed(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        self.log("stops after this round, which is saved; a second signal stops at once")
        for one in _SIGNALS:
            signal.signal(one, signal.default_int_handler if one == signal.SIGINT else signal.SIG_DFL)

    def round_ended(self, round: int, state: Callable[[], State]) -> None:
        """Save the state where it is time, or a signal came; after a signal, let it take its course."""
        if self._signal is None and time.monotonic() - self._last < self.seconds:
            return
        self.save(round, *state())
        if self._signal is not None:
            os.kill(os.getpid(), self._signal)

    def save(self, round: int, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
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
        header = {"fingerprint": self.fingerprint, "round": round, "aliases": aliases, "state": plain}
        content = save(stored, metadata={"fedlm": json.dumps(header)})
        write_atomically(self._path(round), f"{sha256(content)}\n".encode(), content)
        # By number, not by age: what another configuration left here may count further than this run.
        own = (self._path(round), self._previous)
        self._previous, self._last = self._path(round), time.monotonic()
        for path in self._files():
            if path not in own:
                path.unlink(missing_ok=True)

    def latest(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """Return (round, tensors, plain values) of the newest checkpoint that is whole and this run's own."""
        remove_unfinished(self.folder)
        for path in self._files():
            try:
                found = self._read(path)
                self._previous = path
                return found
            except MemoryError:
                raise
            except Exception as error:  # whatever is wrong with a file, all that follows is not to use it
                self.log(f"checkpoint {path.name} is not used: {error}")
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
            fingerprint, round, plain = header["fingerprint"], header["round"], dict(header["state"])
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
        return round, {**stored, **shared}, plain

    def _path(self, round: int) -> Path:
        return self.folder / f"round-{round:06d}.checkpoint"

    def _files(self) -> list[Path]:
        """Return the checkpoint files, newest first."""
        return sorted(self.folder.glob(_FILES), reverse=True)


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints, as a finished run does."""
    for path in folder.glob(_FILES):
        path.unlink(missing_ok=True)
