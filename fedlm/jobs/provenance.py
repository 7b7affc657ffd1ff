"""Where a record comes from: code, versions, machine, hashes."""

import hashlib
import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What a run executes; what checks, compiles and draws records does not change them.
EXECUTED = ("base", "measure", "models", "data", "exchange", "federation")
PACKAGES = ("torch", "transformers", "peft", "datasets", "tokenizers", "safetensors", "numpy", "scikit-learn")


@cache
def code_hash(method: str, task: str) -> str:
    """Return the SHA-256 of the source that a record of this method and this kind of task depends on."""
    paths = [path for package in EXECUTED for path in (ROOT / "fedlm" / package).glob("*.py")]
    return _hash_of([*paths, ROOT / "methods" / f"{method}.py", _task_file(task)])


@cache
def data_code_hash(task: str) -> str:
    """Return the SHA-256 of the source that a prepared task depends on."""
    paths = [
        path for package in ("base", "models", "data") for path in (ROOT / "fedlm" / package).glob("*.py")
    ]
    return _hash_of([*paths, _task_file(task)])


def _task_file(task: str) -> Path:
    from fedlm.study.plugins import discover_tasks

    return ROOT / "tasks" / f"{discover_tasks()[task].__module__.rpartition('.')[2]}.py"


def _hash_of(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


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
