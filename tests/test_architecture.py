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


def test_every_method_has_a_page():
    pages = ROOT / "docs" / "methods"
    controls = (pages / "controls.md").read_text("utf-8")
    names = [path.stem for path in sorted((ROOT / "methods").glob("*.py"))]
    missing = [name for name in names if not (pages / f"{name}.md").is_file() and f"`{name}`" not in controls]
    assert not missing, f"no page in docs/methods: {', '.join(missing)}"


# A small repository without a fault.
SOUND = {
    "fedlm/__init__.py": '"""The suite."""',
    "fedlm/base/__init__.py": '"""The foundation. For others: `errors`."""',
    "fedlm/base/errors.py": "import os\n_hidden = 1",
    "fedlm/base/files.py": "from os import _exit\nfrom . import errors",
    "fedlm/federation/__init__.py": '"""The trainer: methods\nand the loop. More."""',
    "fedlm/federation/method.py": "from ..base.errors import UserError\nfrom fedlm.base import files",
    "fedlm/study/__init__.py": '"""Studies."""',
    "fedlm/study/plugins.py": "def find():\n    import fedlm.base.errors\n    import fedlm.federation.method",
    "fedlm/__main__.py": '"""The command line."""\nfrom fedlm.study import plugins',
    "methods/own.py": "from fedlm.federation.method import Method\nfrom methods.other import Other",
    "methods/other.py": "",
    "tasks/files.py": "from fedlm.base import errors",
}


def tree(root: Path, **changes: str) -> Path:
    """Write the sound repository, with these files changed or added; return its folder."""
    for name, text in {**SOUND, **changes}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_sound_tree_has_no_fault(tmp_path):
    assert faults(tree(tmp_path)) == []


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("fedlm/base/a.py", "from fedlm.study import plugins", "upwards from base to study"),
        ("fedlm/base/a.py", "import fedlm.study.plugins", "upwards from base to study"),
        ("fedlm/base/a.py", "import fedlm.study as s", "upwards from base to study"),
        ("fedlm/base/a.py", "from fedlm import study", "upwards from base to study"),
        ("fedlm/base/a.py", "from ..study.plugins import find", "upwards from base to study"),
        ("fedlm/base/a.py", "def f():\n    import fedlm.study", "a, line 2: imports fedlm.study, upwards"),
        ("fedlm/base/a.py", "if TYPE_CHECKING:\n    import fedlm.study", "upwards from base to study"),
        ("fedlm/study/a.py", "from fedlm import __main__", "upwards from study to __main__"),
        ("methods/a.py", "from fedlm.study import plugins", "upwards from methods to study"),
        ("fedlm/base/errors.py", "from . import files", "circle: fedlm.base."),
        ("fedlm/base/errors.py", "def f():\n    from fedlm.base.files import g", "circle: fedlm.base."),
        ("methods/other.py", "import methods.own", "circle: methods."),
        ("fedlm/study/a.py", "from methods.own import Own", "imports the plug-in methods.own by name"),
        (
            "fedlm/study/a.py",
            "def f():\n    from tasks import files",
            "imports the plug-in tasks.files by name",
        ),
        ("fedlm/__main__.py", '"""Main."""\nimport methods', "imports the plug-in methods by name"),
        ("fedlm/base/__init__.py", '"""Base."""\nimport os', "fedlm.base/__init__.py: holds more or less"),
        ("fedlm/base/__init__.py", "", "fedlm.base/__init__.py: holds more or less"),
        (
            "fedlm/study/a.py",
            "from fedlm.base.errors import _hidden",
            "_hidden of fedlm.base.errors, which is",
        ),
        ("fedlm/study/a.py", "from . import _b", "imports _b of fedlm.study, which is private"),
        ("methods/a.py", "from fedlm.base.errors import _hidden", "_hidden of fedlm.base.errors, which"),
        ("fedlm/loose.py", "", "fedlm.loose: belongs to no package; allowed: base, measure"),
    ],
)
def test_each_fault_is_found(file, text, fault, tmp_path):
    (found,) = faults(tree(tmp_path, **{file: text}))
    assert fault in found


def test_the_table_shows_packages_in_order_with_what_they_import(tmp_path):
    assert describe(tree(tmp_path)).splitlines()[2:] == [
        "| `base` | The foundation | `errors`, `files` | – |",
        "| `federation` | The trainer: methods and the loop | `method` | base |",
        "| `study` | Studies | `plugins` | base, federation |",
        "| `__main__` | The command line | – | study |",
    ]


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
