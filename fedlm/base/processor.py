"""A process that makes full use of its processor: memory that was freed stays, and vectors are used whole.

glibc hands a large tensor's memory back to the system as soon as it is freed and faults it in again when the
next step asks for it: a sixth of the time of a small model's step, and most of a turn of one step.

PyTorch has MKL multiply matrices of float32, which on AMD's processors uses vectors of 256 bits although
there are such of 512. oneDNN, the other library in PyTorch, uses them: a product takes less than half the
time (`benchmarks/products.py`).
"""

import ctypes
import platform
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_LARGEST = 2**31 - 1
_SMALLEST_PRODUCT = 2**18  # multiplications below which setting oneDNN up takes longer than it saves

_installed: list[Any] = []  # PyTorch forgets what it was told when the library's object is deleted


def make_full_use() -> None:
    """Prepare this process for training; a second call changes nothing.

    From then on glibc keeps freed memory, and on AMD's processors with AVX-512 oneDNN multiplies. The results
    differ from MKL's by rounding.
    """
    keep_freed_memory()
    if not _installed and _has_unused_vectors():
        _multiply_by_onednn()


def multiplies_by() -> str:
    """Return which library multiplies matrices of float32 on the CPU in this process."""
    import torch

    return "oneDNN" if _installed else "MKL" if torch.backends.mkl.is_available() else "BLAS"


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next tensor; with another C library nothing changes."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _LARGEST)


def _has_unused_vectors() -> bool:
    import torch

    try:
        vendor = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        vendor = "AuthenticAMD" in platform.processor()
    return (
        vendor
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _multiply_by_onednn() -> None:
    import torch

    linear = torch.ops.mkldnn._linear_pointwise.default

    def suits(one: "Tensor", other: "Tensor") -> bool:
        return (
            one.dtype is torch.float32
            and other.dtype is torch.float32
            and one.shape[0] * one.shape[1] * other.shape[1] >= _SMALLEST_PRODUCT
            # oneDNN takes rows or columns that follow each other, not an expanded tensor or a part of one.
            and (one.is_contiguous() or one.t().is_contiguous())
            and (other.is_contiguous() or other.t().is_contiguous())
        )

    # The variants with `out` stay PyTorch's own.
    def mm(one: "Tensor", other: "Tensor") -> "Tensor":
        if suits(one, other):
            return linear(one, other.t(), None, "none", [], "")
        return torch.mm(one, other, out=one.new_empty(one.shape[0], other.shape[1]))

    def addmm(
        bias: "Tensor", one: "Tensor", other: "Tensor", *, beta: float = 1, alpha: float = 1
    ) -> "Tensor":
        row = bias.dim() == 1 and bias.dtype is torch.float32 and bias.shape[0] == other.shape[1]
        if beta == 1 and alpha == 1 and row and bias.is_contiguous() and suits(one, other):
            return linear(one, other.t(), bias, "none", [], "")
        out = one.new_empty(one.shape[0], other.shape[1])
        return torch.addmm(bias, one, other, beta=beta, alpha=alpha, out=out)

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that PyTorch's own product is replaced
        library.impl("mm", mm, "CPU")
        library.impl("addmm", addmm, "CPU")
    _installed.append(library)
