"""Methods and tasks are found by looking into folders; nothing is registered anywhere."""

import importlib.util
import inspect
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from fedlm.base.errors import UserError
from fedlm.data.task import Task
from fedlm.federation.method import Method

Plugin = TypeVar("Plugin", Method, Task)
ROOT = Path(__file__).parents[2]


@cache
def discover_methods(folder: Path = ROOT / "methods") -> dict[str, type[Method]]:
    """Return the methods found in a folder, by name, which is the file's.

    Raises UserError for a file that does not hold exactly one method.
    """
    found = {}
    for path in sorted(folder.glob("[!_]*.py")):
        classes = _defined_in(path, Method)
        if len(classes) != 1:
            raise UserError(f"{path}: holds {len(classes)} methods; allowed: exactly one class of Method")
        method = classes[0]
        if not method.title:
            raise UserError(f"{path}: {method.__name__}.title is empty; it names the table's row")
        method.name = path.stem
        found[path.stem] = method
    return found


@cache
def discover_tasks(folder: Path = ROOT / "tasks") -> dict[str, type[Task]]:
    """Return the tasks found in a folder by name, sorted.

    Raises UserError where a file cannot be imported, or two tasks have one name.
    """
    found: dict[str, type[Task]] = {}
    for path in sorted(folder.glob("[!_]*.py")):
        for task in _defined_in(path, Task):
            if "name" not in vars(task):
                continue
            if task.name in found:
                raise UserError(
                    f"{path}: the task name {task.name!r} is taken by {found[task.name].__module__}"
                )
            found[task.name] = task
    return dict(sorted(found.items()))


def file_of(plugin: type) -> Path:
    """Return the file in which a method or task was found."""
    return Path(inspect.getfile(plugin))


def _defined_in(path: Path, base: type[Plugin]) -> list[type[Plugin]]:
    """Return the subclasses of `base` that a file defines (not those it imports)."""
    module = _load(path)
    return [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, base) and value.__module__ == module.__name__
    ]


def _load(path: Path) -> ModuleType:
    """Import a Python file once, as a module of its folder's name."""
    name = f"{path.parent.name}.{path.stem}"
    module = sys.modules.get(name)
    if module is not None and Path(module.__file__ or "").resolve() == path.resolve():
        return module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "of a .py file"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"{path}: cannot be imported: {error!r}") from error
    return module
