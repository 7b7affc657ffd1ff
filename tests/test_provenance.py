"""What a run's code is, and where a record says that it comes from."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_study

from fedlm.base.files import sha256
from fedlm.jobs import provenance, rerun, sources

ROOT = Path(__file__).resolve().parent.parent
HELPER = "methods/_helper.py"


def copy(folder: Path) -> Path:
    """Copy what a run needs of the repository."""
    for name in ("fedlm", "methods", "tasks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def python(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------------------------------------------------
# The hash of the code


def flipped(text: str) -> str:
    """Return source in which the first arithmetic operator, + if there is one, is another."""
    for old, new in ((ast.Add, ast.Sub), (ast.Sub, ast.Add), (ast.Mult, ast.Div), (ast.Div, ast.Mult)):
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, old):
                node.op = new()
                return ast.unparse(tree)
    raise ValueError("there is no operator")


def other_docstrings(text: str) -> str:
    tree, count = ast.parse(text), 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body[0].value.value = "Another sentence."
            count += 1
    assert count > 3
    return ast.unparse(tree)


def statement(text: str) -> str:
    return f"{text}\nADDED = 1\n"


def imports_helper(text: str) -> str:
    return f"{text}\nfrom methods import _helper\n"


# Edits of a file, and whether the code of a run (FedAvg on a task of files) and of its data is another then.
EDITS = {
    "docstrings of the loop": ("fedlm/federation/loop.py", other_docstrings, False, False),
    "a comment in the loop": ("fedlm/federation/loop.py", lambda t: f"# Why.\n{t}", False, False),
    "the loop without comments, reformatted": (
        "fedlm/federation/loop.py",
        lambda text: ast.unparse(ast.parse(text)),
        False,
        False,
    ),
    "a docstring of the method": (
        "methods/fedavg.py",
        lambda text: text.replace('"""', '"""Indeed: ', 1),
        False,
        False,
    ),
    "another method": ("methods/fedcybgd.py", statement, False, False),
    "another task": ("tasks/squad.py", statement, False, False),
    "a figure": ("fedlm/results/drawing.py", flipped, False, False),
    "the study's reader": ("fedlm/study/reading.py", statement, False, False),
    "the prediction of costs": ("fedlm/costs/prediction.py", flipped, False, False),
    "what runs the jobs": ("fedlm/jobs/running.py", statement, False, False),
    "a helper that nothing imports": (HELPER, statement, False, False),
    "an operator in the optimizer": ("fedlm/federation/optimizer.py", flipped, True, False),
    "an operator in measuring": ("fedlm/measure/memory.py", flipped, True, False),
    "an operator in the exchange": ("fedlm/exchange/payload.py", flipped, True, False),
    "an operator in the partition": ("fedlm/data/partition.py", flipped, True, True),
    "a statement in the models": ("fedlm/models/loading.py", statement, True, True),
    "a number": (
        "fedlm/base/randomness.py",
        lambda text: f"{text}\nADDED = 1.0\n",
        True,
        True,
    ),
    "the method's file": ("methods/fedavg.py", statement, True, False),
    "the task's file": ("tasks/files.py", statement, True, True),
    "the method imports a helper": ("methods/fedavg.py", imports_helper, True, False),
}
# In a process of its own, which finds the copy's code: hashes after each edit, and before any.
HASHES = """
import json, sys
from pathlib import Path
from fedlm.jobs import provenance
from fedlm.study.plugins import discover_methods, discover_tasks
def hashes():
    provenance._hash_of.cache_clear()
    method, task = discover_methods()["fedavg"], discover_tasks()["files"]
    return provenance.code_hash(method, task), provenance.data_code_hash(task)
found = {"": hashes()}
for name, path, text in json.load(open("edits.json")):
    before = Path(path).read_text()
    Path(path).write_text(text)
    found[name] = hashes()
    Path(path).write_text(before)
assert hashes() == found[""]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def hashes(tmp_path_factory) -> dict[str, list[str]]:
    folder = copy(tmp_path_factory.mktemp("repository"))
    (folder / HELPER).write_text("FACTOR = 1\n")
    edits = [(name, path, edit((folder / path).read_text())) for name, (path, edit, *_) in EDITS.items()]
    (folder / "edits.json").write_text(json.dumps(edits))
    return json.loads(python(folder, "-c", HASHES))


@pytest.mark.slow
@pytest.mark.parametrize("name", EDITS)
def test_the_hash_of_the_code_changes_with_what_a_run_executes_and_with_nothing_else(name, hashes):
    _, _, run, data = EDITS[name]
    assert (hashes[name][0] != hashes[""][0], hashes[name][1] != hashes[""][1]) == (run, data)


def test_what_a_plug_in_imports_belongs_to_it(tmp_path):
    (tmp_path / "methods").mkdir()
    method, helper, other = (tmp_path / "methods" / f"{name}.py" for name in ("mine", "_helper", "_other"))
    method.write_text("def late():\n    from methods._helper import FACTOR\n    return FACTOR\n")
    helper.write_text("import json\nfrom . import _other\nFACTOR = 1\n")
    other.write_text("")
    (tmp_path / "methods" / "_unused.py").write_text("")
    assert sources.with_imports([method], root=tmp_path) == sorted([method, helper, other])
    assert sources.with_imports([method], known=[helper], root=tmp_path) == [method]

    def found() -> str:
        return sources.syntax_hash(sources.with_imports([method], root=tmp_path), tmp_path)

    before = found()
    helper.write_text("import json\nfrom . import _other  # why\n\nFACTOR = (1)\n")
    assert found() == before
    helper.write_text("import json\nfrom . import _other\nFACTOR = 2\n")
    assert found() != before


def test_a_plug_in_from_elsewhere_has_the_same_hash_wherever_it_lies(tmp_path):
    found = []
    for folder in (tmp_path / "one", tmp_path / "other"):
        folder.mkdir()
        (folder / "mine.py").write_text("import _beside\nX = 1\n")
        (folder / "_beside.py").write_text("Y = 2\n")
        paths = sources.with_imports([folder / "mine.py"])
        assert [path.name for path in paths] == ["_beside.py", "mine.py"]
        found.append(sources.syntax_hash(paths))
    assert found[0] == found[1]
    (tmp_path / "one" / "_beside.py").write_text("Y = 3\n")
    assert sources.syntax_hash(sources.with_imports([tmp_path / "one" / "mine.py"])) != found[0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x = 1", "x = 1.0"),
        ("x = 1", "x = True"),
        ("x = None", "x = ..."),
        ("x = 'a'", "x = b'a'"),
        ("f(*x)", "f(x)"),
        ("x = {**y}", "x = {}"),
        ("def f(a=None): return a", "def f(a): return a"),
        ("def f(a, /): return a", "def f(a): return a"),
        ("x: int = 1", "x = 1"),
        ("if x:\n    pass\nelse:\n    y()", "if x:\n    y()"),
    ],
)
def test_what_differs_in_meaning_has_another_hash(one, other, tmp_path):
    path = tmp_path / "file.py"
    found = []
    for text in (one, other):
        path.write_text(text)
        found.append(sources.syntax_hash([path], tmp_path))
    assert found[0] != found[1]


# ---------------------------------------------------------------------------------------------------------
# Commit, changes, files that git does not know


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def committed(folder: Path) -> str:
    git(folder, "init", "-q")
    git(folder, "add", "--all")
    git(folder, "commit", "-q", "-m", "all")
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path) -> Path:
    """A small repository with one commit."""
    folder = tmp_path / "repository"
    for name in ("fedlm/base.py", "methods/known.py", "tasks/known.py", "results/tracked.json", "README.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x = 1\n")
    (folder / ".gitignore").write_text("secret*\n__pycache__/\n")
    committed(folder)
    return folder


def test_a_clean_tree(repository):
    (repository / "results/tracked.json").write_text("made again")
    (repository / "notes.txt").write_text("in no folder that a run executes")
    (repository / "fedlm/__pycache__").mkdir()
    (repository / "fedlm/__pycache__/base.pyc").write_bytes(b"compiled")
    found = provenance.source_of([repository / "methods/known.py"], repository)
    assert found == {"commit": git(repository, "rev-parse", "HEAD"), "dirty": False, "untracked": {}}


@pytest.mark.parametrize("name", ["methods/known.py", "fedlm/base.py", "README.md"])
def test_a_changed_file_makes_it_dirty(name, repository):
    (repository / name).write_text("x = 2\n")
    found = provenance.source_of([], repository)
    assert (found["dirty"], found["untracked"]) == (True, {})


@pytest.mark.parametrize("name", ["methods/mine.py", "tasks/secret.py", "fedlm/new/ünï code.py"])
def test_a_file_that_git_does_not_know_is_named(name, repository):
    path = repository / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("y = 2\n")
    found = provenance.source_of([], repository)
    assert (found["dirty"], found["untracked"]) == (True, {name: sha256(path)})


def test_plug_ins_from_other_folders_are_named_without_their_place(repository, tmp_path):
    own, known, outside, same = (
        repository / "extra/own.py",
        repository / "README.md",
        tmp_path / "elsewhere/mine.py",
        tmp_path / "further/mine.py",
    )
    for number, path in enumerate((own, outside, same)):
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"y = {number}\n")
    found = provenance.source_of([own, known, outside, same], repository)
    assert found["dirty"]
    assert found["untracked"] == {
        "extra/own.py": sha256(own),
        "mine.py": sha256(outside),
        "further/mine.py": sha256(same),
    }


def test_a_repository_within_a_folder_is_named_file_by_file(repository):
    (repository / "methods/theirs").mkdir()
    (repository / "methods/theirs/method.py").write_text("z = 3\n")
    committed(repository / "methods/theirs")
    found = provenance.source_of([], repository)["untracked"]
    assert found["methods/theirs/method.py"] == sha256(repository / "methods/theirs/method.py")


def test_a_copy_within_another_repository_has_not_its_commit_alone(repository):
    """It is unknown whose commit it is, but all files that it does not hold are named."""
    inner = repository / "copy"
    (inner / "methods").mkdir(parents=True)
    (inner / "methods/mine.py").write_text("y = 2\n")
    found = provenance.source_of([], inner)
    assert (found["dirty"], list(found["untracked"])) == (True, ["methods/mine.py"])


def test_outside_git(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = provenance.source_of([], tmp_path)
    assert found == {"commit": "unknown", "dirty": True, "untracked": {}}


def test_another_index_in_the_environment_is_not_believed(repository, tmp_path, monkeypatch):
    """As in a hook of another repository."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("")
    other = committed(tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other/.git"))
    assert provenance.source_of([], repository)["commit"] != other


def test_another_capability_of_the_processor_is_reported_as_a_cause(tmp_path, capsys):
    import torch

    machine = provenance.machine()
    assert machine["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    before = {"rounds": [], "provenance": {"machine": machine}}
    after = {"rounds": [], "provenance": {"machine": {**machine, "cpu_capability": "ABACUS"}}}
    rerun.report(before, after)
    assert f"machine: cpu_capability {machine['cpu_capability']} -> ABACUS" in capsys.readouterr().out


@pytest.mark.slow
def test_a_method_of_ones_own_that_is_not_committed_is_named_in_the_record(tmp_path):
    folder = copy(tmp_path / "repository")
    commit = committed(folder)
    method = folder / "methods/mine.py"
    method.write_text((folder / "methods/head_only.py").read_text() + "\nfrom methods import _helper\n")
    (folder / HELPER).write_text("FACTOR = 1\n")
    study = tiny_study.write(tmp_path / "own", federation={"clients": 2, "rounds": 1}, methods={"mine": None})
    labels = ["--task", "films", "--partition", "iid", "--method", "mine", "--seed", "1"]
    python(folder, "-m", "fedlm", "run", "--config", str(study), *labels, "--output", "record.json")
    found = json.loads((folder / "record.json").read_text())["provenance"]
    assert (found["commit"], found["dirty"]) == (commit, True)
    assert found["untracked"] == {name: sha256(folder / name) for name in (HELPER, "methods/mine.py")}
    assert str(tmp_path) not in json.dumps(found)
