"""Failures that are not the reader's input but that the reader must understand: disk, memory, divergence."""

import errno

from fedlm.federation import FailedRun

_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
}


def describe(error: Exception) -> str | None:
    """Return one line for a failure of a known kind; None for one that deserves its traceback."""
    if isinstance(error, FailedRun):
        return str(error)
    if isinstance(error, OSError) and error.errno in _DISK:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{_DISK[error.errno]}; nothing that was finished is lost, run again to continue"
    if isinstance(error, MemoryError):
        return "out of memory; the run continues from its last whole round when it is started again"
    return None
