"""Files that are either complete or absent, and locks for folders that one process at a time may use."""

import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlm.base.errors import UserError


def local_path(text: str) -> Path:
    """Return a path from a study with `~` expanded. Raises UserError where it cannot be a path."""
    try:
        if any(character < " " for character in text):
            raise ValueError("it contains control characters")
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        shown = ascii(text) if len(text) <= 80 else f"{ascii(text[:77])}..."
        raise UserError(f"{shown} cannot be a path: {reason}") from error
    return path


def sha256(content: bytes | memoryview | Path) -> str:
    """Return the SHA-256 of bytes, or of a file's content, as 64 hexadecimal digits."""
    if isinstance(content, Path):
        with content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(content).hexdigest()


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Write the parts to `path` so that a reader sees the old file or the new one, never a part.

    The bytes go to a temporary file next to `path`, which is flushed to disk and renamed. On an error (disk
    full, folder read-only) the temporary file is removed, the old file stays, and the error is raised.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and not error.filename:
            error.filename = str(path)  # an error in writing to an open file does not name it
        raise


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of a killed `write_atomically`; nobody else may be writing here."""
    for path in Path(folder).glob(".*.part"):
        path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, waits: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file `path`; if another process holds it, call `waits` once and wait for the release.

    The system releases the lock when the process dies, so nothing has to be cleaned up. On a file system
    without locks nothing is held.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waits()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        yield


@contextmanager
def locked_if_free(path: Path) -> Iterator[bool]:
    """Hold the lock file `path` unless another process does; yield whether it is held. Never waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            free = True
        yield free
