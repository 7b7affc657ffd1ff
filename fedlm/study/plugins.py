"""Methods and tasks are found in folders; nothing has to be registered.

The repository's own are in `methods/` and `tasks/`. A study may name further folders, whose files hold
methods, tasks or both.
"""

import hashlib
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from pydantic import ValidationError

from fedlm.base.errors import UserError
from fedlm.data.task import COLUMNS, Task
from fedlm.federation.method import Method, MethodConfig
from fedlm.federation.search import LogRange, OneOf
from fedlm.federation.settings import Training
from fedlm.study.yaml_files import printable, shown

ROOT = Path(__file__).resolve().parents[2]
OWN = (ROOT / "methods", ROOT / "tasks")
Plugin = TypeVar("Plugin", Method, Task)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
MOST_SEARCHED = 3  # settings; with more, a handful of trials cannot fill the space


@dataclass(frozen=True)
class Found:
    """The methods and tasks that a study may use, by name: the repository's, and those of its own folders."""

    methods: dict[str, type[Method]]
    tasks: dict[str, type[Task]]
    folders: tuple[Path, ...] = ()

    def controls(self) -> set[str]:
        """Return the names of the methods that bound or explain the others."""
        return {name for name, method in self.methods.items() if method.control}


def find(folders: Sequence[Path] = ()) -> Found:
    """Return the repository's methods and tasks together with those of further folders.

    The Python files of the folders are imported, so their code runs. Raises UserError with one line for each
    bad folder or file.
    """
    methods, tasks = dict(discover_methods()), dict(discover_tasks())
    faults, seen = [], set()
    for folder in folders:
        try:
            paths = plugin_files(folder)
            if folder.resolve() in seen:
                raise UserError(f"{folder}: named twice; allowed: each folder once")
            seen.add(folder.resolve())
        except UserError as error:
            faults.append(str(error))
            continue
        for path in paths:
            try:
                _add(path, methods, tasks)
            except UserError as error:
                faults.append(str(error))
    if faults:
        raise UserError("\n".join(faults))
    return Found(methods, dict(sorted(tasks.items())), tuple(folders))


def plugin_files(folder: Path) -> list[Path]:
    """Return the files of a folder that hold plug-ins: all Python files whose name does not begin with _.

    Raises UserError if the folder does not exist, is not a folder, or has no such file.
    """
    allowed = "a folder with Python files that hold methods or tasks"
    if not folder.is_dir():
        raise UserError(f"{folder}: {'a file' if folder.exists() else 'does not exist'}; allowed: {allowed}")
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".py" and path.name[0] not in "_.")
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); allowed: {allowed}") from error
    if not paths:
        raise UserError(
            f"{folder}: holds no plug-in; allowed: {allowed} (names that begin with _ are skipped)"
        )
    return paths


def method_in(path: Path) -> type[Method]:
    """Return the method in one file, which may be anywhere; the file is imported.

    Raises UserError if the path is not a Python file with exactly one method, or its name is taken.
    """
    allowed = "a Python file with one method"
    if path.suffix != ".py" or not path.is_file():
        found = "a folder" if path.is_dir() else "not a Python file" if path.exists() else "does not exist"
        raise UserError(f"{path}: {found}; allowed: {allowed}")
    methods = discover_methods()
    if path.resolve().parent == ROOT / "methods" and path.stem in methods:
        return methods[path.stem]
    known = dict(methods)
    _add(path, known, dict(discover_tasks()))
    if path.stem not in known:
        raise UserError(f"{path}: holds no method; allowed: {allowed}")
    return known[path.stem]


@cache
def discover_methods(folder: Path = ROOT / "methods") -> dict[str, type[Method]]:
    """Return the methods in a folder that holds only methods, by name, which is the file's.

    Raises UserError for a file that does not hold exactly one method.
    """
    found = {}
    for path in sorted(folder.glob("[!_]*.py")):
        classes = _defined_in(path, Method)
        if len(classes) != 1:
            raise UserError(f"{path}: holds {len(classes)} methods; allowed: exactly one class of Method")
        found[path.stem] = _named(classes[0], path)
    return found


@cache
def discover_tasks(folder: Path = ROOT / "tasks") -> dict[str, type[Task]]:
    """Return the tasks in a folder that holds only tasks, by name, sorted.

    Raises UserError if a file cannot be imported, or two tasks have the same name.
    """
    found: dict[str, type[Task]] = {}
    for path in sorted(folder.glob("[!_]*.py")):
        for task in _defined_in(path, Task):
            if "name" in vars(task):
                _take("task", task.name, task, path, found)
    return dict(sorted(found.items()))


def file_of(kind: type) -> Path:
    """Return the file that defines a method or task."""
    return Path(inspect.getfile(kind)).resolve()


def is_own(kind: type) -> bool:
    """Return whether a method or task is the repository's own, not a plug-in from elsewhere."""
    return file_of(kind).parent in OWN


def _add(path: Path, methods: dict[str, type[Method]], tasks: dict[str, type[Task]]) -> None:
    """Add the methods and tasks of a plug-in file to those found so far."""
    if not NAME.fullmatch(path.stem):
        raise UserError(
            f"{path}: the file's name is the plug-in's; allowed: up to 64 letters, digits, _ and -, then .py"
        )
    classes = _defined_in(path, Method)
    named = [task for task in _defined_in(path, Task) if "name" in vars(task)]
    if len(classes) > 1:
        names = ", ".join(one.__name__ for one in classes)
        raise UserError(f"{path}: holds {len(classes)} methods ({names}); allowed: one per file")
    if not classes and not named:
        raise UserError(
            f"{path}: holds no method and no task; allowed: a class derived from Method, or from Task with a "
            "name (a helper's file name begins with _)"
        )
    for method in classes:
        if not (isinstance(method.Config, type) and issubclass(method.Config, MethodConfig)):
            raise UserError(f"{path}: {method.__name__}.Config; allowed: a class derived from MethodConfig")
        _take("method", path.stem, method, path, methods)
        _named(method, path)
    for task in named:
        _check_task(task, path)
        _take("task", task.name, task, path, tasks)


def _named(method: type[Method], path: Path) -> type[Method]:
    if not method.title:
        raise UserError(f"{path}: {method.__name__}.title is empty; it names the row in tables")
    _check_search(method, path)
    method.name = path.stem
    return method


def _check_search(method: type[Method], path: Path) -> None:
    where, search = f"{path}: {method.__name__}.search", method.search
    if not isinstance(search, dict) or not 1 <= len(search) <= MOST_SEARCHED:
        raise UserError(f"{where}: {shown(search)}; allowed: ranges of 1 to {MOST_SEARCHED} settings")
    optimizer = type(method.server_optimizer)
    sections = {"training": Training, "server_optimizer": optimizer, "": method.Config}
    for key, places in search.items():
        section, _, name = key.rpartition(".")
        if section not in sections or name not in sections[section].model_fields:
            raise UserError(
                f"{where}: {shown(key)}; allowed: training.<key>, server_optimizer.<key> of the method's own "
                "server optimizer, or a key of the method's Config"
            )
        tried: tuple = ()
        if isinstance(places, LogRange):
            good, tried = 0 < places.low < places.high, tuple(places)
        elif good := isinstance(places, OneOf) and len(places.values) > 1:
            tried = places.values
        if not good:
            raise UserError(
                f"{where}.{key}: {shown(places)}; allowed: LogRange(low, high) with 0 < low < high, or OneOf "
                "with at least two values"
            )
        for value in tried:
            try:
                sections[section].model_validate({name: value})
            except ValidationError as error:
                # Other keys may be required, or have to fit this one: the study's check sees to that.
                for item in error.errors():
                    if item["loc"][:1] == (name,):
                        raise UserError(
                            f"{where}.{key}: {shown(value)}; {printable(item['msg'], 300)}"
                        ) from error


def _check_task(task: type[Task], path: Path) -> None:
    where = f"{path}: {task.__name__}"
    if not isinstance(task.name, str) or not NAME.fullmatch(task.name):
        raise UserError(f"{where}.name: {shown(task.name)}; allowed: up to 64 letters, digits, _ and -")
    for key in ("title", "reference"):
        value = getattr(task, key, None)
        if not isinstance(value, str) or not value:
            raise UserError(f"{where}.{key}: {shown(value)}; allowed: one line of text")
    if task.kind not in COLUMNS:
        raise UserError(f"{where}.kind: {shown(task.kind)}; allowed: {', '.join(COLUMNS)}")
    if not (isinstance(task.Config, type) and issubclass(task.Config, Task.Config)):
        raise UserError(f"{where}.Config; allowed: a class derived from Task.Config")


def _take(word: str, name: str, kind: type, path: Path, known: dict) -> None:
    """Add a method or task under its name, which must not be taken."""
    if name in known:
        holder = file_of(known[name])
        shadows = f"built in ({holder.relative_to(ROOT)})" if is_own(known[name]) else f"taken by {holder}"
        source = "the file's" if word == "method" else "the class attribute `name`"
        raise UserError(
            f"{path}: the {word} name {name!r} is {shadows}; allowed: a name of its own, which is {source}"
        )
    known[name] = kind


def _defined_in(path: Path, base: type[Plugin]) -> list[type[Plugin]]:
    """Return the subclasses of `base` that a file defines (not those it imports)."""
    module = _load(path)
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, base) and value.__module__ == module.__name__
    ]
    return list(dict.fromkeys(found))  # a class with two names is one class


def _load(path: Path) -> ModuleType:
    """Import a Python file once, as a module of its folder, so that it can import the files next to it."""
    path = path.resolve()
    name = f"{_package(path.parent)}.{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "of a .py file"
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _no_bytecode(path.parent not in OWN):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(
            f"{path}: cannot be imported: {_reason(error, path)}; allowed: Python that runs"
        ) from error
    return module


def _package(folder: Path) -> str:
    """Return the name of the package of a folder's files.

    The folders of the repository have their own names. Any other gets one derived from its path, so that
    folders never collide with each other or with an installed package.
    """
    if folder in OWN:
        return folder.name
    name = f"plugins_{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    importlib.invalidate_caches()
    return name


@contextmanager
def _no_bytecode(wanted: bool) -> Iterator[None]:
    """Leave no `__pycache__` in a user's folder."""
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = before or wanted
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _reason(error: BaseException, path: Path) -> str:
    """Return one line on why an import failed, with the line number in the file."""
    if isinstance(error, SyntaxError) and error.filename:
        elsewhere = f"{error.filename} " if Path(error.filename).resolve() != path else ""
        return printable(f"{elsewhere}line {error.lineno}: {error.msg}", 300)
    steps = traceback.extract_tb(error.__traceback__)
    lines = [step.lineno for step in steps if Path(step.filename).resolve() == path]
    where = f"line {lines[-1]}: " if lines else ""
    return printable(f"{where}{type(error).__name__}: {error}", 300)
