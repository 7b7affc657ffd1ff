"""Checkpoints between rounds: whole, checksummed, and recognised when they are not one's own.

A checkpoint file is a line with the SHA-256 of what follows, then one safetensors file. One of its tensors
holds the run's fingerprint and its other state as JSON: safetensors reads no metadata above 100 MB, which the
state of thousands of clients can exceed. The newest two are kept, should one be damaged. What
clients keep is in files of its own beside the checkpoints (see `stored`), which these refer to by name;
such a file stays as long as one of the two does.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from fedlm.base.files import remove_unfinished, sha256, write_atomically
from fedlm.exchange.payload import Message, Part
from fedlm.federation import stored
from fedlm.federation.stored import StorageError, Store, Stored

_FILES = "round-*.checkpoint"
_PLAIN = "plain"  # the tensor with the JSON; no other is named without a slash
_DIGEST = 65  # 64 hexadecimal digits and a newline
_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and a cluster's limit of time

Values = Mapping[str, Tensor | Stored]
State = tuple[Values, dict[str, Any]]


class Checkpoints:
    """The checkpoints of one run, in one folder, which no other process may use at the same time.

    `fingerprint` names everything the run depends on; a checkpoint with another one is foreign. `log` is
    called with one line for each file that cannot be used. A checkpoint is written after the first round that
    ends at least `seconds` after the last one, and after the round in which a signal asks the process to end.
    `store` is where the run keeps the tensors that a checkpoint only refers to.
    """

    def __init__(
        self, folder: Path, fingerprint: str, log: Callable[[str], None], seconds: float = 0.0
    ) -> None:
        self.folder, self.fingerprint, self.log, self.seconds = Path(folder), fingerprint, log, seconds
        self.store = Store(self.folder)
        self._last = time.monotonic()
        self._previous: Path | None = None
        self._signal: int | None = None
        self._settled: tuple[int, Callable[[], State]] | None = None

    @contextmanager
    def watching_signals(self) -> Iterator[None]:
        """Let a first signal to end the process wait for the end of the round, which then is saved.

        A second one ends it at once. After the last round (see `rounds_ended`) the first one ends it, too.
        Only a process's main thread can watch.
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
        self._let_it_take_its_course()

    def _noticed(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        for one in _SIGNALS:
            signal.signal(one, signal.default_int_handler if one == signal.SIGINT else signal.SIG_DFL)
        if self._settled:
            self.log("stops; all rounds are saved")
            self.save(self._settled[0], *self._settled[1]())
            self._let_it_take_its_course()
        else:
            self.log("stops after this round, which is saved; a second signal stops at once")

    def round_ended(self, round: int, state: Callable[[], State]) -> None:
        """Save the state where it is time, or a signal came; after a signal, let it take its course."""
        if self._signal is None and time.monotonic() - self._last < self.seconds:
            return
        self.save(round, *state())
        self._let_it_take_its_course()

    def rounds_ended(self, round: int, state: Callable[[], State]) -> None:
        """Note that the state changes no more after this round; a signal that comes now saves it."""
        self._settled = round, state

    def _let_it_take_its_course(self) -> None:
        if self._signal is not None:
            number, self._signal = self._signal, None
            os.kill(os.getpid(), number)

    def save(self, round: int, tensors: Values, plain: dict[str, Any]) -> None:
        """Write the checkpoint of a round; then remove all but it and the one before.

        Raises StorageError, with the name of the tensor, where one that is stored cannot be brought to disk.
        """
        unique: dict[tuple, str] = {}
        aliases: dict[str, str] = {}
        written: dict[str, Tensor] = {}
        referred: dict[str, tuple[str, int, str, tuple[int, ...]]] = {}
        files: dict[str, int] = {}
        for name, value in tensors.items():
            if isinstance(value, Stored) and value.file and value.file.store is self.store:
                try:
                    value.file.secure()
                except StorageError as error:
                    error.tensor = name
                    raise
                files[value.file.name] = value.file.size
                referred[name] = value.file.name, value.offset, value.dtype, value.shape
                continue
            tensor = value.load() if isinstance(value, Stored) else value
            # Clients that keep what they downloaded share tensors with the server: written once.
            identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if tensor.numel() and identity in unique:
                aliases[name] = unique[identity]
            else:
                unique[identity] = name
                written[name] = tensor.detach().cpu().contiguous()
        header = {"fingerprint": self.fingerprint, "round": round, "aliases": aliases, "state": plain}
        header["stored"] = referred
        written[_PLAIN] = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
        parts = {name: Part(value, value.dtype) for name, value in written.items()}
        content = Message(parts, {"files": json.dumps(files)})
        self.store.pinned.update(files)
        write_atomically(self._path(round), f"{content.sha256()}\n".encode(), *content.chunks())
        # By number, not by age: what another configuration left here may count further than this run.
        own = (self._path(round), self._previous)
        self._previous, self._last = self._path(round), time.monotonic()
        for path in self._files():
            if path not in own:
                path.unlink(missing_ok=True)
        self._pin()

    def latest(self) -> tuple[int, dict[str, Tensor | Stored], dict[str, Any]] | None:
        """Return (round, values, plain values) of the newest checkpoint that is whole and this run's own.

        Files of stored tensors to which no checkpoint refers are removed.
        """
        remove_unfinished(self.folder)
        self._pin()
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

    def _pin(self) -> None:
        """Let the files to which checkpoints refer stay, and no others."""
        self.store.pin({name for path in self._files() for name in _referred(path)})

    def _read(self, path: Path) -> tuple[int, dict[str, Tensor | Stored], dict[str, Any]]:
        with path.open("rb") as file:
            digest = file.read(_DIGEST)
            content = file.read()
        if digest != f"{sha256(content)}\n".encode():
            raise ValueError("its checksum does not match (it is truncated or damaged)")
        try:
            length = int.from_bytes(content[:8], "little")
            files = dict(json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["files"]))
            read = load(content)
            header = json.loads(read.pop(_PLAIN).numpy().tobytes())
            fingerprint, round, plain = header["fingerprint"], header["round"], dict(header["state"])
            written: dict[str, Tensor | Stored] = dict(read)
            shared = {name: written[other] for name, other in dict(header["aliases"]).items()}
            referred = dict(header["stored"])
            if path != self._path(round):
                raise ValueError(f"round {round}")
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError("its checksum is right, but it is no checkpoint") from error
        if fingerprint != self.fingerprint:
            raise ValueError("it is of another configuration, data, model or code")
        taken = {name: self.store.take_up(name, size) for name, size in files.items()}
        handles = {
            name: Stored(taken[file], offset, dtype, tuple(shape))
            for name, (file, offset, dtype, shape) in referred.items()
        }
        return round, {**written, **shared, **handles}, plain

    def _path(self, round: int) -> Path:
        return self.folder / f"round-{round:06d}.checkpoint"

    def _files(self) -> list[Path]:
        """Return the checkpoint files, newest first."""
        return sorted(self.folder.glob(_FILES), reverse=True)


def _referred(path: Path) -> list[str]:
    """Return the files of stored tensors that a checkpoint names; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(_DIGEST)
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                return []
            return list(json.loads(json.loads(file.read(length))["__metadata__"]["files"]))
    except MemoryError:
        raise
    except Exception:  # damaged in whatever way: `latest` says so
        return []


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints and the stored tensors beside them, as a finished run does."""
    for pattern in (_FILES, stored.PATTERN):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
