"""Failures that are not caused by bad input but that the user must understand: disk, memory, divergence."""

import errno

from fedlm.base.errors import FailedRun

_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than the system lets this process write",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EIO: "the disk cannot be read or written",
    errno.ENOTDIR: "a file is where a folder should be",
    errno.EEXIST: "a file is where a folder should be",
    errno.EISDIR: "a folder is where a file should be",
    errno.EMFILE: "too many open files",
}
_KEPT = "finished runs are kept, an unfinished one continues from its last saved round: run again to continue"
_AGAIN = "the run continues from its last saved round when it is started again"


def describe(error: Exception) -> str | None:
    """Return one line for a failure of a known kind; None for one that needs its traceback."""
    if isinstance(error, FailedRun):
        full = isinstance(error.__cause__, OSError) and error.__cause__.errno in _DISK
        return f"{error}; {_KEPT}" if full else str(error)
    if isinstance(error, OSError) and error.errno in _DISK:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{_DISK[error.errno]}; {_KEPT}"
    if isinstance(error, MemoryError) or _is_torch_out_of_memory(error):
        return f"out of memory; {_AGAIN}"
    return None


def _is_torch_out_of_memory(error: Exception) -> bool:
    """On a GPU there is a class for it; on the CPU PyTorch raises a plain RuntimeError."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
