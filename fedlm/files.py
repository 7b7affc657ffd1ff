"""Files that are either whole or absent."""

import hashlib
import os
import tempfile
from pathlib import Path


def sha256(content: bytes | memoryview | Path) -> str:
    """Return the SHA-256 of bytes, or of a file's content, as 64 hexadecimal digits."""
    if isinstance(content, Path):
        with content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(content).hexdigest()


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Write the parts to `path` so that a reader sees the old file or the new one, never a piece.

    The bytes go to a temporary file beside `path`, are flushed to the disk and renamed. On an error (disk
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
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
