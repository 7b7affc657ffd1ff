"""Tensors kept on disk between turns, so that memory does not grow with the number of clients."""

from __future__ import annotations

import mmap
import os
import re
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedlm.base.files import sha256

if TYPE_CHECKING:
    from torch import Tensor

PATTERN = "state-*.bin"
_NAME = re.compile(r"state-[0-9a-f]{16}\.bin")
_ALIGNMENT = 64  # bytes: more than any type of tensor asks for


class StorageError(OSError):
    """A file of stored tensors that cannot be written or read: no room, no right, not there.

    `tensor` is the name of one of them in a checkpoint, where that is known.
    """

    tensor: str | None = None


class StoredFile:
    """A file of tensors. It is removed when no `Stored` in it is held any more, unless its store pins it."""

    def __init__(self, store: Store, name: str, size: int) -> None:
        self.store, self.name, self.size = store, name, size
        self.path = store.folder / name
        self._safe = False
        self._mapping: weakref.ref[mmap.mmap] | None = None
        store.live[name] = self
        weakref.finalize(self, _remove, self.path, store.pinned, os.getpid())

    def secure(self) -> None:
        """Flush the file to the disk, before a checkpoint relies on it."""
        if self._safe:
            return
        try:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(error.errno, error.strerror, str(self.path)) from error
        self._safe = True

    def mapping(self) -> mmap.mmap:
        """Return the file as memory: read when it is used, and what is written into it never reaches it."""
        found = self._mapping and self._mapping()
        if not found:
            try:
                with self.path.open("rb") as file:
                    found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except OSError as error:
                raise StorageError(error.errno, error.strerror, str(self.path)) from error
            self._mapping = weakref.ref(found)
        return found


class Stored:
    """A tensor in a file; `load` returns it. One without values (meta) has no file."""

    __slots__ = ("_loaded", "dtype", "file", "offset", "shape")

    def __init__(self, file: StoredFile | None, offset: int, dtype: str, shape: tuple[int, ...]) -> None:
        self.file, self.offset, self.dtype, self.shape = file, offset, dtype, shape
        self._loaded: weakref.ref[Tensor] | None = None

    def load(self) -> Tensor:
        """Return the tensor, mapped from its file for as long as it is held.

        Raises StorageError where the file cannot be read.
        """
        import torch

        found = self._loaded() if self._loaded else None
        if found is None:
            dtype, count = getattr(torch, self.dtype), torch.Size(self.shape).numel()
            if self.file is None:
                found = torch.empty(self.shape, dtype=dtype, device="meta")
            elif not count:
                found = torch.empty(self.shape, dtype=dtype)
            else:
                flat = torch.frombuffer(self.file.mapping(), dtype=dtype, count=count, offset=self.offset)
                found = flat.view(self.shape)
            self._loaded = weakref.ref(found)
        return found

    def holds(self, tensor: Tensor) -> bool:
        """Return whether this is the tensor that `load` returned, and nobody wrote into it since."""
        return self._loaded is not None and self._loaded() is tensor and tensor._version == 0


class Store:
    """Tensors in the files of a folder; by default a temporary one, made when needed, gone with the store.

    `pinned` names the files that stay though nobody here holds them, since a checkpoint refers to them;
    `live` has those that are held.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self.pinned: set[str] = set()
        self.live: weakref.WeakValueDictionary[str, StoredFile] = weakref.WeakValueDictionary()

    @property
    def folder(self) -> Path:
        """The folder of the files. Raises StorageError where a temporary one cannot be made."""
        if self._folder is None:
            try:
                self._folder = Path(tempfile.mkdtemp(prefix="fedlm-states-"))
            except OSError as error:
                raise StorageError(error.errno, error.strerror, tempfile.gettempdir()) from error
            weakref.finalize(self, _remove_folder, self._folder, os.getpid())
        return self._folder

    def put(self, tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
        """Write tensors to a new file and return them as handles, by the same names.

        Raises StorageError, and leaves no file, where there is no room.
        """
        placed: dict[str, int] = {}
        size = 0
        for name, tensor in tensors.items():
            if not tensor.is_meta:
                placed[name] = size
                size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        file = self._write({name: tensors[name] for name in placed}, placed, size) if placed else None
        return {
            name: Stored(
                None if tensor.is_meta else file,
                placed.get(name, 0),
                str(tensor.dtype).removeprefix("torch."),
                tuple(tensor.shape),
            )
            for name, tensor in tensors.items()
        }

    def adopt(self, values: Mapping[str, Tensor | Stored]) -> dict[str, Stored]:
        """Return all values as handles; tensors among them are put."""
        handles = {name: value for name, value in values.items() if isinstance(value, Stored)}
        return handles | self.put({n: value for n, value in values.items() if not isinstance(value, Stored)})

    def take_up(self, name: str, size: int) -> StoredFile:
        """Return a file that another process left here. Raises ValueError where it is not there as it was."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name[:40]!r} names no file of stored tensors")
        path = self.folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"{name}, to which it refers, is missing or cut short")
        return self.live.get(name) or StoredFile(self, name, size)

    def pin(self, names: set[str]) -> None:
        """Let just these files stay though nobody holds them; remove what is neither held nor named."""
        self.pinned.clear()
        self.pinned.update(names)
        for path in self.folder.glob(PATTERN):
            if path.name not in self.pinned and path.name not in self.live:
                path.unlink(missing_ok=True)

    def _write(self, tensors: dict[str, Tensor], places: dict[str, int], size: int) -> StoredFile:
        import torch

        name = f"state-{secrets.token_hex(8)}.bin"
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with path.open("xb") as file:
                    for key, tensor in tensors.items():
                        file.seek(places[key])
                        file.write(
                            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
                        )
                    file.truncate(size)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise StorageError(error.errno, error.strerror, str(path)) from error
        return StoredFile(self, name, size)


class Kept(Mapping[str, "Tensor"]):
    """What one client keeps, by name; each tensor is loaded when it is asked for."""

    def __init__(self, handles: Mapping[str, Stored]) -> None:
        self._handles = handles

    def __getitem__(self, name: str) -> Tensor:
        return self._handles[name].load()

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)

    def version(self) -> str:
        """Return a digest: equal versions have equal digests, different versions different ones.

        A stored file is written once and its name is never used again, so the places of the tensors tell.
        """
        places = [(name, one.file and one.file.name, one.offset) for name, one in self._handles.items()]
        return sha256(repr(sorted(places)).encode())


class ClientStates(MutableMapping[int, Mapping[str, "Tensor"]]):
    """What clients keep between their turns, by client, in a store. A client that keeps nothing is not there.

    `handles` has the stored tensors themselves.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.handles: dict[int, dict[str, Stored]] = {}

    def __getitem__(self, client: int) -> Kept:
        return Kept(self.handles[client])

    def __setitem__(self, client: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep these tensors, and only these; those that came from here unchanged are not written again."""
        before = self.handles.get(client, {})
        same = {n: before[n] for n, tensor in tensors.items() if n in before and before[n].holds(tensor)}
        after = same | self.store.put({n: tensor for n, tensor in tensors.items() if n not in same})
        if after:
            self.handles[client] = after
        else:
            self.handles.pop(client, None)

    def __delitem__(self, client: int) -> None:
        del self.handles[client]

    def __iter__(self) -> Iterator[int]:
        return iter(self.handles)

    def __len__(self) -> int:
        return len(self.handles)


def _remove(path: Path, pinned: set[str], process: int) -> None:
    # A forked process has the handles too, but the files are not its own.
    if path.name not in pinned and process == os.getpid():
        path.unlink(missing_ok=True)


def _remove_folder(folder: Path, process: int) -> None:
    if process == os.getpid():
        shutil.rmtree(folder, ignore_errors=True)
