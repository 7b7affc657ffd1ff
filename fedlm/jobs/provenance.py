"""Where a record comes from: code, versions, machine, hashes."""

import os
import platform
import subprocess
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path

from fedlm.base import processor
from fedlm.base.files import sha256
from fedlm.data.task import Task
from fedlm.federation.method import Method
from fedlm.jobs import sources
from fedlm.jobs.sources import ROOT, of_packages, syntax_hash, with_imports
from fedlm.study.plugins import file_of

# What a run executes. Code that checks studies or compiles and draws records does not change them.
EXECUTED = ("base", "measure", "models", "data", "exchange", "federation")
PREPARING = ("base", "models", "data")
FOLDERS = ("fedlm", "methods", "tasks")
PACKAGES = ("torch", "transformers", "peft", "datasets", "tokenizers", "safetensors", "numpy", "scikit-learn")


def code_hash(method: type[Method], task: type[Task]) -> str:
    """Return the SHA-256 of the meaning of all code that a run of this method and this task executes."""
    return _hash_of(EXECUTED, (file_of(method), file_of(task)))


def data_code_hash(task: type[Task]) -> str:
    """Return the SHA-256 of the meaning of all code that prepares and divides a task."""
    return _hash_of(PREPARING, (file_of(task),))


@cache
def _hash_of(packages: tuple[str, ...], plugins: tuple[Path, ...]) -> str:
    """Return the hash of packages, of plug-in files and of what these import."""
    known = of_packages(packages)
    return syntax_hash([*known, *with_imports(plugins, known)])


def plugin_files(method: type[Method], task: type[Task]) -> list[Path]:
    """Return the files of a method and a task, and those that they import beside what every run executes."""
    return with_imports([file_of(method), file_of(task)], of_packages(EXECUTED))


def source(method: type[Method], task: type[Task]) -> dict[str, object]:
    """Return `commit`, `dirty` and `untracked` of the source that a run of this method and task executes."""
    return source_of(plugin_files(method, task))


def source_of(plugins: Iterable[Path], root: Path = ROOT) -> dict[str, object]:
    """Return the commit, whether the source differs from it, and the files that git does not know.

    Args:
        plugins: files that a run executes besides the repository's own; they may lie outside it.
        root: the repository.

    Returns:
        `commit`: the commit, or "unknown" outside git. `dirty`: True where a tracked file has changed (other
        than in `results/` and `figures/`, which the pipeline makes), where `untracked` is not empty, and
        outside git. `untracked`: the SHA-256 of each file in `fedlm/`, `methods/` and `tasks/` that git does
        not know, ignored ones included, and of each plug-in that it does not know, by path; a file outside
        the repository is named without its folder.
    """
    plugins = sorted({path.absolute() for path in plugins})
    inside = [sources.shown(path, root) for path in plugins if sources.is_inside(path, root)]
    outside = [path for path in plugins if not sources.is_inside(path, root)]
    try:
        commit = git(root, "rev-parse", "HEAD").strip()
        changed = git(
            root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!results", ":!figures"
        )
        unknown = git(root, "ls-files", "--others", "-z", "--", *FOLDERS, *inside).split("\0")
    except (OSError, subprocess.SubprocessError):
        commit, changed, unknown = "unknown", "all of it", []
    untracked = {}
    for name in sorted(filter(None, unknown)):
        for path in _files_below(root / name):
            untracked[sources.shown(path, root)] = sha256(path)
    for path in outside:
        name = path.name if path.name not in untracked else f"{path.parent.name}/{path.name}"
        untracked[name] = sha256(path)
    return {"commit": commit, "dirty": bool(changed or untracked), "untracked": untracked}


def _files_below(path: Path) -> list[Path]:
    """Return the file itself, or the files of a folder (git names a repository inside it as one)."""
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [one for one in found if one.is_file() and "__pycache__" not in one.parts]


def git(root: Path, *words: str) -> str:
    """Return what a git command prints about a repository, given a folder in it; raise where it fails."""
    # Inside a git hook these name another repository or index.
    elsewhere = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY")
    environment = {key: value for key, value in os.environ.items() if key not in elsewhere}
    # The user may need the index for a commit: git must not lock it.
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    command = ["git", "-C", str(root), *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=30, env=environment
    ).stdout


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that produce numbers."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def machine() -> dict[str, object]:
    """Return the kind of machine, but never its name."""
    import torch

    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processors": os.cpu_count(),
        # The vector instructions that PyTorch uses, and the library: they determine the order of summation.
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "matrix_products": processor.multiplies_by(),
        "threads": torch.get_num_threads(),
        "gpu": cuda,
    }
