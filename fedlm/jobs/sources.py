"""Which source files a run executes, and a hash of their meaning.

The hash is taken over the syntax tree: comments, docstrings and formatting do not count.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]


def of_packages(names: Iterable[str], root: Path = ROOT) -> list[Path]:
    """Return the Python files of packages of `fedlm`."""
    return sorted(path for name in names for path in (root / "fedlm" / name).rglob("*.py"))


def with_imports(paths: Iterable[Path], known: Iterable[Path] = (), root: Path = ROOT) -> list[Path]:
    """Return the files and the files that they import, directly or not, also inside functions.

    Only imports from the repository are followed, and, for a file outside it, those from its own folder.
    `known` files are neither followed nor returned.
    """
    found: set[Path] = set()
    waiting, known = [path.absolute() for path in paths], {path.absolute() for path in known}
    while waiting:
        path = waiting.pop()
        if path not in found | known:
            found.add(path)
            waiting += _imported(path, root.absolute())
    return sorted(found)


def syntax_hash(paths: Iterable[Path], root: Path = ROOT) -> str:
    """Return the SHA-256 of the files' syntax trees; for a file that is not valid Python, of its bytes.

    A file's path below the repository counts too; for a file outside it, only its name.
    """
    lines = sorted({f"{shown(path, root)} {_meaning(path.read_bytes(), path.suffix)}\n" for path in paths})
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def is_inside(path: Path, root: Path = ROOT) -> bool:
    """Return whether a file is in the repository."""
    return path.absolute().is_relative_to(root.absolute())


def shown(path: Path, root: Path = ROOT) -> str:
    """Return a file's path below the repository; for a file outside, only its name, not its folder."""
    return path.absolute().relative_to(root.absolute()).as_posix() if is_inside(path, root) else path.name


def _meaning(source: bytes, suffix: str) -> str:
    if suffix == ".py":
        # A half-written file imports nothing.
        with suppress(SyntaxError, ValueError, RecursionError):
            return _read(source).meaning
    return hashlib.sha256(source).hexdigest()


class _Source(NamedTuple):
    """What is known of a source text: a hash of its syntax tree, and the names that it imports.

    An imported name is given by its parts, with the number of dots that it begins with.
    """

    meaning: str
    imports: list[tuple[int, tuple[str, ...]]]


@cache
def _read(source: bytes) -> _Source:
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = f"{node.module}." if node.module else ""
            found += [(node.level, f"{module}{alias.name}") for alias in node.names]
    imports = [(level, tuple(name.split("."))) for level, name in dict.fromkeys(found)]
    return _Source(hashlib.sha256(repr(_plain(tree)).encode()).hexdigest(), imports)


def _plain(value: Any) -> Any:
    """Return a syntax tree as nested tuples that are the same for all versions of Python.

    `ast.dump` prints empty fields in some versions and not in others.
    """
    if isinstance(value, ast.AST):
        fields = ((name, _plain(inner)) for name, inner in ast.iter_fields(value) if name != "kind")
        return type(value).__name__, *((name, inner) for name, inner in fields if inner not in (None, ()))
    if isinstance(value, list):
        return tuple(_plain(inner) for inner in value if not _has_no_effect(inner))
    return value


def _has_no_effect(node: Any) -> bool:
    """Return whether a node is `pass`, or a string that stands alone, as docstrings do."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return isinstance(node.value.value, str)
    return isinstance(node, ast.Pass)


def _imported(path: Path, root: Path) -> Iterator[Path]:
    """Yield the files that a file's import statements name, as far as they exist."""
    try:
        names = _read(path.read_bytes()).imports
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    places = [root] if path.is_relative_to(root) else [path.parent, path.parent.parent, root]
    for level, parts in names:
        where = [path.parents[level - 1]] if 0 < level <= len(path.parents) else places
        yield from _files_of(parts, where)


def _files_of(parts: tuple[str, ...], places: list[Path]) -> Iterator[Path]:
    """Yield the files of a dotted name: its packages and its module; the last part may be a function."""
    for place in places:
        for length in range(1, len(parts) + 1):
            step = place.joinpath(*parts[:length])
            for path in (step / "__init__.py", step.with_name(f"{step.name}.py")):
                if path.is_file():
                    yield path
