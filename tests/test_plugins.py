"""Methods and tasks from folders outside the repository: found, run, made again, and refused in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import tiny_study

from fedlm.base.errors import UserError
from fedlm.costs import cases
from fedlm.jobs import provenance, running
from fedlm.jobs.rerun import read, rerun
from fedlm.study import plugins, yaml_files
from fedlm.study.check import check
from fedlm.study.reading import load
from fedlm.study.schema import schema
from fedlm.study.study import Run

ROOT = Path(__file__).resolve().parent.parent
BIASES = """
from pydantic import Field

from fedlm.federation.method import Method, MethodConfig

from ._common import is_bias


class Biases(Method):
    "Only biases."

    title = "Biases"
    kinds = ("classification",)

    class Config(MethodConfig):
        layers: int = Field(3, ge=1, description="how many layers are trained")

    def adapt(self, model, kind):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_bias(name))
        return model
"""
COMMON = "def is_bias(name):\n    return name.endswith('bias')\n"
WEATHER = """
import pandas

from fedlm.data.task import Corpus, Task


class Weather(Task):
    name = title = reference = "weather"

    def rows(self):
        texts = [f"the {kind} film was number {n}" for n in range(40) for kind in ("good", "bad")]
        return Corpus(pandas.DataFrame({"text": texts, "label": [0, 1] * 40}), ["good", "bad"])
"""


def mine(folder: Path, **files: str) -> Path:
    """Write plug-ins into a folder and return it; by default a method with a helper, and a task."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, code in (files or {"biases": BIASES, "_common": COMMON, "weather": WEATHER}).items():
        (folder / f"{name}.py").write_text(code)
    return folder


def study_of(tmp_path: Path, **changes) -> Path:
    """Write a study that uses the plug-ins beside it."""
    changes = {
        "plugins": ["mine"],
        "tasks": {"weather": {"max_length": 16}},
        "methods": {"few": {"method": "biases", "layers": 2}},
        "federation": {"clients": 2, "rounds": 1},
        **changes,
    }
    return tiny_study.write(tmp_path, **changes)


def faults(path: Path) -> list[str]:
    with pytest.raises(UserError) as error:
        load(path)
    return str(error.value).splitlines()


def test_a_study_finds_what_lies_in_its_folders(tmp_path):
    folder = mine(tmp_path / "mine")
    path = study_of(tmp_path)
    study = load(path)
    check(study)
    assert study.methods["few"].title == "Biases (few)" and study.methods["few"].settings.layers == 2
    run = study.run("weather", "iid", "few", 1)
    assert plugins.file_of(run.method_class) == folder / "biases.py"
    used = provenance.plugin_files(run.method_class, run.task_class)
    outside = {path for path in used if not path.is_relative_to(ROOT)}
    assert outside == {folder / name for name in ("_common.py", "biases.py", "weather.py")}
    assert plugins.file_of(run.task_class) == folder / "weather.py"
    assert not plugins.is_own(run.method_class) and plugins.is_own(study.found.methods["fedavg"])
    jsonschema.validate(yaml_files.read_yaml(path), json.loads(schema()))
    # Nothing stays behind: another study knows none of it, and the folder holds what it held.
    assert "biases" not in plugins.find().methods and "biases" not in plugins.discover_methods()
    assert sorted(found.name for found in folder.iterdir()) == ["_common.py", "biases.py", "weather.py"]


def test_folders_with_files_of_one_name_do_not_collide(tmp_path):
    one = mine(tmp_path / "a" / "mine", first=BIASES, _common=COMMON)
    two = mine(tmp_path / "b" / "mine", second=BIASES, _common="def is_bias(name):\n    return 'other'\n")
    found = plugins.find([one, two])
    assert {"first", "second", "fedavg"} <= found.methods.keys()
    first, second = (sys.modules[found.methods[name].__module__] for name in ("first", "second"))
    assert first.is_bias("weight") is False and second.is_bias("weight") == "other"


@pytest.mark.slow
def test_a_run_of_plugins_is_made_made_again_and_costed(tmp_path, monkeypatch, capsys):
    mine(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    study, run = load(study_of(tmp_path)), Run("weather", "iid", "few", 1)
    folders = running.Folders("study", tmp_path / "results")
    running.execute(study, run, folders.record(run), folders)
    record = read(folders.record(run))
    assert record["plugins"] == ["mine"] and str(tmp_path) not in json.dumps(record["plugins"])
    assert record["config"]["method"]["method"] == "biases"
    assert rerun(folders.record(run)) == []
    asked = cases.of_study(study)
    costs = cases.cost_all(asked)
    assert costs[0].upload_bytes == record["upload_bytes"]

    (tmp_path / "mine").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="plugins: mine: does not exist"):
        rerun(folders.record(run))
    assert rerun(folders.record(run), plugins=["moved"]) == []


@pytest.mark.slow
def test_a_change_of_a_plugin_or_its_helper_changes_the_hash_of_the_code(tmp_path):
    script = (
        "import sys; from fedlm.study.reading import load; from fedlm.jobs import provenance;"
        "run = load(sys.argv[1]).run('weather', 'iid', 'few', 1);"
        "print(provenance.code_hash(run.method_class, run.task_class));"
        "print(provenance.data_code_hash(run.task_class))"
    )
    path, folder = study_of(tmp_path), mine(tmp_path / "mine")

    def hashed() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", script, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    first = hashed()
    (folder / "unused.py").write_text(BIASES)
    assert hashed() == first
    (folder / "_common.py").write_text(COMMON.replace("'bias'", "'weight'"))
    run, data = hashed()
    assert run != first[0] and data == first[1]  # the task does not import the method's helper


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "x = 1\nclass A(:\n"}, "a.py: cannot be imported: line 2: invalid syntax; allowed: "),
        ({"a": "import os\nimport nowhere_at_all\n"}, "line 2: ModuleNotFoundError: No module named"),
        ({"a": "raise ValueError('one\\ntwo')\n"}, "line 1: ValueError: one\\ntwo; allowed: "),
        ({"a": "import sys\nsys.exit(3)\n"}, "a.py: cannot be imported: line 2: SystemExit: 3"),
        ({"a": BIASES, "_common": "def f(\n"}, "_common.py line 1: '(' was never closed"),
        ({"a": "x = 1\n"}, "a.py: holds no method and no task; allowed: "),
        ({"fedavg": BIASES, "_common": COMMON}, "'fedavg' is built in (methods/fedavg.py); allowed: "),
        ({"w": WEATHER.replace('"weather"', '"files"')}, "'files' is built in (tasks/files.py); allowed: "),
        ({"v": WEATHER, "w": WEATHER}, "w.py: the task name 'weather' is taken by"),
        ({"w": WEATHER.replace('"weather"', '"a/b"')}, "w.py: Weather.name: 'a/b'; allowed: "),
        ({"w": WEATHER.replace("title = ", "")}, "w.py: Weather.title: None; allowed: "),
        ({"a b": BIASES, "_common": COMMON}, "a b.py: the file's name is the plug-in's; allowed: "),
        ({"a": BIASES.replace("MethodConfig)", "Field.__class__)")}, "a.py: "),
        ({"_a": BIASES}, "mine: holds no plug-in; allowed: "),
        ({}, "mine: holds no plug-in; allowed: "),
    ],
)
def test_a_plugin_at_fault_is_one_line_that_names_it(files, message, tmp_path):
    (tmp_path / "mine").mkdir()
    if files:
        mine(tmp_path / "mine", **files)
    found = faults(study_of(tmp_path))
    assert len(found) == 1 and "study.yaml: plugins: " in found[0] and message in found[0]
    assert str(tmp_path / "mine") in found[0] and found[0].isprintable()


def test_folders_at_fault(tmp_path):
    mine(tmp_path / "mine")
    mine(tmp_path / "too", biases=BIASES, _common=COMMON)
    (tmp_path / "file.py").write_text(BIASES)
    assert "absent: does not exist; allowed: a folder" in faults(study_of(tmp_path, plugins=["absent"]))[0]
    assert "file.py: a file; allowed: a folder" in faults(study_of(tmp_path, plugins=["file.py"]))[0]
    assert (
        "mine: named twice"
        in faults(study_of(tmp_path, plugins=["mine", "../" + tmp_path.name + "/mine"]))[0]
    )
    two = faults(study_of(tmp_path, plugins=["mine", "too"]))
    assert len(two) == 1
    assert f"{tmp_path}/too/biases.py: the method name 'biases' is taken by {tmp_path}/mine" in two[0]
    for value in ("mine", [1], [""], {"a": 1}, ["a\nb"]):
        assert "allowed: a list of folders" in faults(study_of(tmp_path, plugins=value))[0]
    both = faults(study_of(tmp_path, plugins=["absent", "file.py"]))
    assert len(both) == 2
    assert load(study_of(tmp_path, plugins=None, tasks={"bbc_news": None}, methods={"fedavg": None}))


def command(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "fedlm", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_command_line_refuses_before_any_job(tmp_path):
    mine(tmp_path / "mine", broken="def f(:\n")
    done = command("check", str(study_of(tmp_path)), cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "broken.py" in done.stderr and "line 1" in done.stderr


@pytest.mark.slow
def test_the_lists_show_plugins_that_the_command_line_names(tmp_path):
    mine(tmp_path / "mine")
    assert "biases" in command("methods", "--plugins", "mine", cwd=tmp_path).stdout
    assert "weather" in command("tasks", "--plugins", "mine", cwd=tmp_path).stdout
    assert command("tasks", "--plugins", "absent", cwd=tmp_path).returncode == 2


METHOD = """
from fedlm.federation.method import Method

class Mine(Method):
    title = "Mine"
    kinds = ("classification",)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "failing"),
    [
        ("", None),
        ("    def train(self, turn):\n        pass\n", "what is trained changes and nothing else does"),
        (
            "    def upload(self, turn):\n"
            "        return {name: value + 1 for name, value in super().upload(turn).items()}\n",
            "an upload is what the client trained",
        ),
    ],
    ids=["right", "trains_nothing", "uploads_something_else"],
)
def test_test_method_tells_right_from_wrong(code, failing, tmp_path):
    (tmp_path / "mine.py").write_text(METHOD + code)
    done = command("test-method", "mine.py", cwd=tmp_path)
    assert done.returncode == (1 if failing else 0), done.stdout + done.stderr
    lines = done.stdout.splitlines()
    checks = [line for line in lines if line.startswith(("pass  ", "FAIL  "))]
    assert len(checks) == 10 and all("test_" not in line for line in checks)
    if failing:
        assert f"FAIL  {failing}" in lines and "of 10 checks failed" in lines[-1]
    else:
        assert lines[-1] == "mine: all 10 checks passed" and len(lines) == 11
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent.py"], "absent.py: does not exist; allowed: a Python file with one method"),
        (["."], "a folder; allowed: "),
        (["weather.py"], "weather.py: holds no method; allowed: "),
        (["fedavg.py"], "the method name 'fedavg' is built in"),
        (["broken.py"], "broken.py: cannot be imported: line 1"),
        (["needs.py"], "needs: setting rank: Field required; --settings sets it"),
        (["needs.py", "--settings", "rank"], "--settings: not valid JSON"),
    ],
)
def test_test_method_refuses_what_is_no_method(words, message, tmp_path):
    needs = "    class Config(Method.Config):\n        rank: int\n"
    mine(tmp_path, weather=WEATHER, fedavg=METHOD, broken="def f(:\n", needs=METHOD + needs)
    done = command("test-method", *words, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert message in done.stderr
