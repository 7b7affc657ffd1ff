"""Where a record comes from: code, versions, machine, hashes."""

import hashlib
import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

from fedlm.data.task import Task
from fedlm.federation.method import Method
from fedlm.study.plugins import ROOT, files_of

# What a run executes; what checks, compiles and draws records does not change them.
EXECUTED = ("base", "measure", "models", "data", "exchange", "federation")
PACKAGES = ("torch", "transformers", "peft", "datasets", "tokenizers", "safetensors", "numpy", "scikit-learn")


@cache
def code_hash(method: type[Method], task: type[Task]) -> str:
    """Return the SHA-256 of the source that a record of this method and this kind of task depends on."""
    paths = [path for package in EXECUTED for path in (ROOT / "fedlm" / package).glob("*.py")]
    return _hash_of([*paths, *files_of(method), *files_of(task)])


@cache
def data_code_hash(task: type[Task]) -> str:
    """Return the SHA-256 of the source that a prepared task depends on."""
    paths = [
        path for package in ("base", "models", "data") for path in (ROOT / "fedlm" / package).glob("*.py")
    ]
    return _hash_of([*paths, *files_of(task)])


def _hash_of(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for name, path in sorted((_name(path), path) for path in set(paths)):
        digest.update(f"{name}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _name(path: Path) -> str:
    """Return what the hash calls a file: where a plug-in lies is no part of what it does."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else f"plugins/{path.name}"


@cache
def commit() -> tuple[str, bool]:
    """Return the source's commit and whether the tree differs from it; ("unknown", True) outside git."""
    try:
        head = _git("rev-parse", "HEAD")
        return head, bool(_git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return "unknown", True


def _git(*words: str) -> str:
    found = subprocess.run(
        ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True, timeout=30
    )
    return found.stdout.strip()


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that produce numbers."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def machine() -> dict[str, object]:
    """Return what kind of machine this is: never its name."""
    import torch

    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": cuda,
    }
