"""The packages: imports run one way only, and docs/architecture.md lists them as they are.

`python -m tests.test_architecture` writes the table of packages into docs/architecture.md.
"""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- packages: begin -->", "<!-- packages: end -->"

# A package imports only those before it. `methods` and `tasks` are the folders of plug-ins.
ORDER = (
    *("base", "measure", "models", "data", "exchange", "federation"),
    *("methods", "tasks"),
    *("study", "results", "costs", "jobs", "__main__"),
)
PLUG_INS = ("methods", "tasks")


class Import(NamedTuple):
    """One import of a module: by which file, in which line, and the names taken from it."""

    importer: str
    line: int
    module: str
    names: tuple[str, ...]


def module_name(path: Path, root: Path) -> str:
    """Return the dotted name of a file; that of a package for its `__init__.py`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(root: Path) -> dict[str, Path]:
    """Return the files of the package and of the plug-ins, by the name of their module."""
    paths = (path for top in ("fedlm", *PLUG_INS) for path in sorted((root / top).rglob("*.py")))
    return {module_name(path, root): path for path in paths}


def package_of(module: str) -> str | None:
    """Return the entry of ORDER that a module belongs to; None for `fedlm` itself and for libraries."""
    parts = module.split(".")
    if parts[0] == "fedlm":
        return parts[1] if len(parts) > 1 else None
    return parts[0] if parts[0] in PLUG_INS else None


def imports_of(name: str, path: Path, modules: dict[str, Path]) -> Iterator[Import]:
    """Yield all imports of a file, wherever they stand: in functions and under TYPE_CHECKING, too."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, node.lineno, alias.name, ())
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                # `from . import x` in a module starts from its package, in an `__init__.py` from itself.
                parents = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *filter(None, [node.module])])
            names = []
            for alias in node.names:
                # What is taken from a package may be a module of its own.
                if f"{base}.{alias.name}" in modules:
                    yield Import(name, node.lineno, f"{base}.{alias.name}", ())
                else:
                    names.append(alias.name)
            if names:
                yield Import(name, node.lineno, base, tuple(names))


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def faults(root: Path) -> list[str]:
    """Return what is wrong with the packages below a folder, one line a fault."""
    modules = sources(root)
    found = []
    edges: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        if path.name == "__init__.py":
            body = ast.parse(path.read_text("utf-8")).body
            if len(body) != 1 or ast.get_docstring(ast.Module(body, [])) is None:
                found.append(f"{name}/__init__.py: holds more or less than one docstring")
        own = package_of(name)
        if own is not None and own not in ORDER:
            found.append(f"{name}: belongs to no package; allowed: {', '.join(ORDER)}")
            continue
        for one in imports_of(name, path, modules):
            where = f"{name}, line {one.line}"
            other = package_of(one.module)
            if one.module in modules and one.module != name:
                edges[name].add(one.module)
            if other in PLUG_INS and own not in PLUG_INS:
                found.append(f"{where}: imports the plug-in {one.module} by name")
            elif own in ORDER and other in ORDER and ORDER.index(other) > ORDER.index(own):
                found.append(f"{where}: imports {one.module}, upwards from {own} to {other}")
            if one.module.split(".")[0] in ("fedlm", *PLUG_INS):
                for taken in (*one.names, *one.module.split(".")):
                    if private(taken):
                        found.append(f"{where}: imports {taken} of {one.module}, which is private")
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        found.append(f"circle: {' -> '.join(reversed(error.args[1]))}")
    return found


def describe(root: Path) -> str:
    """Return the table of packages in Markdown: what lives there, its modules, what they import."""
    modules = sources(root)
    rows = ["| package | what lives here | modules | imports |", "|---|---|---|---|"]
    for package in ORDER:
        own = [name for name in modules if package_of(name) == package]
        if not own or package in PLUG_INS:
            continue
        docstring = ast.get_docstring(ast.parse(modules[f"fedlm.{package}"].read_text("utf-8"))) or ""
        sentence = re.match(r".+?(?=\.\s|\.?$)", " ".join(docstring.split())).group()
        files = ", ".join(f"`{name.split('.')[2]}`" for name in sorted(own) if name.count(".") > 1)
        used = {package_of(one.module) for name in own for one in imports_of(name, modules[name], modules)}
        below = ", ".join(other for other in ORDER if other in used - {package})
        rows.append(f"| `{package}` | {sentence} | {files or '–'} | {below or '–'} |")
    return "\n".join(rows)


def page() -> str:
    """Return docs/architecture.md with the table of packages as they are now."""
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    return f"{before}{BEGIN}\n{describe(ROOT)}\n{END}{rest.split(END)[1]}"


def test_imports_run_one_way_only():
    assert faults(ROOT) == []


def test_the_page_lists_the_packages_as_they_are():
    assert PAGE.read_text("utf-8") == page(), "out of date: run `python -m tests.test_architecture`"


def tree(root: Path, files: dict[str, str]) -> Path:
    """Write a small repository: the given files, and a docstring for each package."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for folder in [root / "fedlm", *(root / "fedlm").iterdir()]:
        if folder.is_dir() and not (folder / "__init__.py").exists():
            (folder / "__init__.py").write_text('"""A package. More of it."""\n')
    return root


def test_a_sound_tree_has_no_fault(tmp_path):
    files = {
        "fedlm/base/errors.py": "import os\n_hidden = 1\n",
        "fedlm/base/files.py": "from __future__ import annotations\nfrom . import errors\nfrom os import _exit\n",
        "fedlm/federation/method.py": "from ..base.errors import __doc__\nfrom fedlm.base import errors, files\n",
        "fedlm/study/plugins.py": "import fedlm.federation.method\nfrom importlib import import_module\n",
        "fedlm/__main__.py": "from fedlm.study import plugins\n",
        "methods/own.py": "from fedlm.federation.method import Method\nfrom methods.other import Other\n",
        "methods/other.py": "",
        "tasks/files.py": "from fedlm.base import errors\n",
    }
    assert faults(tree(tmp_path, files)) == []


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"fedlm/base/a.py": "from fedlm.data import b", "fedlm/data/b.py": ""}, "upwards from base to data"),
        ({"fedlm/base/a.py": "import fedlm.data.b", "fedlm/data/b.py": ""}, "upwards from base to data"),
        ({"fedlm/base/a.py": "from ..data.b import c", "fedlm/data/b.py": ""}, "upwards from base to data"),
        (
            {"fedlm/base/a.py": "def f():\n    from fedlm.data.b import c\n", "fedlm/data/b.py": ""},
            "fedlm.base.a, line 2: imports fedlm.data.b, upwards from base to data",
        ),
        (
            {
                "fedlm/base/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import fedlm.jobs.b\n",
                "fedlm/jobs/b.py": "",
            },
            "upwards from base to jobs",
        ),
        ({"fedlm/jobs/a.py": "from fedlm import __main__", "fedlm/__main__.py": ""}, "from jobs to __main__"),
        ({"methods/own.py": "from fedlm.study import plugins"}, "upwards from methods to study"),
        (
            {"fedlm/base/a.py": "def f():\n    import fedlm.base.b", "fedlm/base/b.py": "from . import a"},
            "circle: fedlm.base.a -> fedlm.base.b -> fedlm.base.a",
        ),
        ({"methods/a.py": "import methods.b", "methods/b.py": "import methods.a"}, "circle: methods."),
        ({"fedlm/study/a.py": "from methods.fedavg import FedAvg"}, "imports the plug-in methods.fedavg by name"),
        ({"fedlm/jobs/a.py": "def f():\n    from tasks import glue"}, "imports the plug-in tasks by name"),
        ({"fedlm/__main__.py": "import methods"}, "imports the plug-in methods by name"),
        ({"fedlm/base/__init__.py": '"""Base."""\nfrom fedlm.base import a\n'}, "fedlm.base/__init__.py: holds"),
        ({"fedlm/base/__init__.py": ""}, "fedlm.base/__init__.py: holds more or less than one docstring"),
        ({"fedlm/data/a.py": "from fedlm.base.b import _c", "fedlm/base/b.py": ""}, "imports _c of fedlm.base.b"),
        ({"fedlm/data/a.py": "from . import _b", "fedlm/data/_b.py": ""}, "imports _b of fedlm.data._b"),
        ({"methods/a.py": "from fedlm.base.b import _c"}, "imports _c of fedlm.base.b, which is private"),
        ({"fedlm/loose.py": ""}, "fedlm.loose: belongs to no package"),
    ],
)  # fmt: skip
def test_each_fault_is_found(files, fault, tmp_path):
    (found,) = faults(tree(tmp_path, files))
    assert fault in found


def test_the_table_shows_packages_in_order_with_what_they_import(tmp_path):
    files = {
        "fedlm/data/b.py": "def f():\n    from fedlm.models import a\n    import fedlm.base.c\n",
        "fedlm/models/a.py": "",
        "fedlm/base/c.py": "",
        "fedlm/__main__.py": '"""The command line."""\nfrom fedlm.data import b\n',
        "methods/own.py": "",
    }
    assert describe(tree(tmp_path, files)).splitlines()[2:] == [
        "| `base` | A package | `c` | – |",
        "| `models` | A package | `a` | – |",
        "| `data` | A package | `b` | base, models |",
        "| `__main__` | The command line | – | data |",
    ]


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
