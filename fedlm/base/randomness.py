"""Named streams of random numbers.

Every draw in a federation comes from a stream named by (seed, purpose, indices), for example
(7, "batches", round, client). A stream depends on nothing else: not on the method, not on what was drawn
before, not on a global generator. So methods are compared on the same draws, and a resumed run draws what
the interrupted one would have drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy

if TYPE_CHECKING:
    import torch


def derive(seed: int, purpose: str, *indices: int | str) -> int:
    """Return the 63-bit seed of the stream named by these values."""
    name = "\x1f".join([str(int(seed)), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1


def numpy_stream(seed: int, purpose: str, *indices: int | str) -> numpy.random.Generator:
    """Return a numpy generator at the start of the named stream."""
    return numpy.random.default_rng(derive(seed, purpose, *indices))


def torch_stream(
    seed: int, purpose: str, *indices: int | str, device: str | torch.device = "cpu"
) -> torch.Generator:
    """Return a torch generator on `device` at the start of the named stream."""
    import torch  # here, because tables and partitions need no torch, and importing it takes seconds

    return torch.Generator(device).manual_seed(derive(seed, purpose, *indices))


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Give code that uses torch's global generators a named stream; restore the generators afterwards.

    Needed where no generator can be passed: the layers' dropout, and peft's initialisation.
    """
    import torch

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
