"""What runs, what is read and where files land: nothing of it is up to the data, the model or the study."""

import ast
import json
import shutil
from pathlib import Path

import pytest
import tiny
import tiny_study
import worlds
from hypothesis import given
from hypothesis import strategies as st

from fedlm.base.errors import UserError
from fedlm.jobs import running
from fedlm.models import loading
from fedlm.models.config import ModelConfig
from fedlm.study.check import check
from fedlm.study.reading import load, parse
from fedlm.study.study import LABEL, Run

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("fedlm", "methods", "tasks", "benchmarks", "workflow", "tests")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
# Each reads what someone else wrote as code, or writes where someone else says.
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "jsonpickle"}
CALLS = {
    *("eval", "exec", "compile", "__import__"),
    *("torch.load", "torch.save", "torch.hub.load", "torch.jit.load"),
    *("numpy.load", "np.load", "pandas.read_pickle", "pandas.to_pickle"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("shutil.unpack_archive", "tempfile.mktemp", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"),
}
METHODS = {"extractall", "extract", "read_pickle", "to_pickle"}


def named(node: ast.AST) -> str:
    """Return the dotted name of an expression, "" if it is none."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{named(node.value)}.{node.attr}"
    return ""


def dangers(source: str) -> list[str]:
    """Return what in a source must not be there, as `line: name`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if (node.module or "").split(".")[0] in MODULES else []
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [name for name in full if name in CALLS]
        elif isinstance(node, ast.Call):
            name, keywords = named(node.func), {key.arg: key.value for key in node.keywords}
            last = name.rpartition(".")[2]
            if name in CALLS or (last in METHODS and "." in name):
                names = [name]
            if name == "yaml.load" and not named(keywords.get("Loader", ast.Name("_"))).endswith("_Loader"):
                names = [name]
            if isinstance(keywords.get("shell"), ast.Constant) and keywords["shell"].value:
                names = [f"{name}(shell=True)"]
            if isinstance(keywords.get("allow_pickle"), ast.Constant) and keywords["allow_pickle"].value:
                names = [f"{name}(allow_pickle=True)"]
            trusted = keywords.get("trust_remote_code")
            if trusted is not None and not named(trusted).endswith(".trust_remote_code"):
                names = [f"{name}(trust_remote_code=...)"]
            if (
                isinstance(keywords.get("use_safetensors"), ast.Constant)
                and not keywords["use_safetensors"].value
            ):
                names = [f"{name}(use_safetensors=False)"]
        found += [f"{node.lineno}: {name}" for name in names]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "import pickle as p", "from pickle import loads", "import torch\ntorch.load('x')",
        "from torch import load", "eval('1')", "exec('1')", "import yaml\nyaml.load(x, Loader=yaml.Loader)",
        "import yaml\nyaml.load(x)", "tar.extractall('x')", "subprocess.run('ls', shell=True)",
        "AutoModel.from_pretrained('a', trust_remote_code=True)", "numpy.load('x', allow_pickle=True)",
        "import joblib", "import shelve", "import marshal", "frame.to_pickle('x')",
    ],
)  # fmt: skip
def test_the_scan_finds_what_it_looks_for(source):
    assert dangers(source)


@pytest.mark.slow
def test_nothing_in_the_tree_runs_or_unpacks_what_it_reads():
    assert len(SOURCES) > 60
    found = {}
    for path in SOURCES:
        if path == Path(__file__):
            continue
        if names := dangers(path.read_text(encoding="utf-8")):
            found[str(path.relative_to(ROOT))] = names
    # The tests write the kinds of files that must be refused.
    unwanted = {path: names for path, names in found.items() if not path.startswith("tests/")}
    assert unwanted == {}
    assert {name.partition(": ")[2] for names in found.values() for name in names} <= {"torch.save"}


def test_the_one_loader_of_yaml_makes_plain_values_only():
    import yaml

    from fedlm.study.yaml_files import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)
    assert not [tag for tag in _Loader.yaml_constructors if tag and "python" in tag]
    assert not [tag for tag in _Loader.yaml_multi_constructors if tag]


# ---------------------------------------------------------------------------------------------------------
# Code that comes with a model


CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import BertConfig, BertForSequenceClassification

class Own(BertForSequenceClassification):
    pass

class OwnConfig(BertConfig):
    model_type = "own"
"""


def with_code(folder: Path) -> Path:
    """Write a model whose folder brings Python code, which leaves a mark when it runs."""
    tiny.save(folder / "model", "bert")
    (folder / "model" / "own.py").write_text(CODE.format(marker=str(folder / "marker")))
    path = folder / "model" / "config.json"
    shape = json.loads(path.read_text())
    shape["model_type"] = "own"
    shape["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.Own"}
    path.write_text(json.dumps(shape))
    return folder / "model"


def test_code_of_a_model_runs_only_if_the_study_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    source = with_code(tmp_path / "theirs")
    study = tiny_study.write(tmp_path, model=str(source))
    with pytest.raises(UserError, match="comes with its own Python code; read it, and set trust_remote_code"):
        check(load(study))
    with pytest.raises(UserError, match="trust_remote_code"):
        loading.load(ModelConfig(source=str(source)), "classification", 2, 1)
    assert not (tmp_path / "theirs" / "marker").exists()
    loading.build_config(ModelConfig(source=str(source), trust_remote_code=True), "classification", 2)
    assert (tmp_path / "theirs" / "marker").read_text() == "ran"


def test_a_model_whose_weights_are_pickled_is_refused(tmp_path, place):
    import torch

    shutil.copytree(worlds.folder("bert", str(place)), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        loading.load(ModelConfig(source=str(tmp_path / "model")), "classification", 2, 1)


# ---------------------------------------------------------------------------------------------------------
# Where files land

STUDY = {
    "study": "a",
    "model": "minilm",
    "tasks": {"bbc_news": None},
    "partitions": {"iid": None},
    "methods": {"fedavg": None},
}
letters = st.characters(exclude_categories=[]) | st.sampled_from("./\\~ab0-_+")
words = st.text(letters, max_size=12) | st.from_regex(LABEL, fullmatch=True)
climbing = st.lists(st.sampled_from(["..", ".", "", "a", "~"]), min_size=1, max_size=4).map("/".join)


@given(words | climbing, words | climbing, words | climbing, words | climbing)
def test_no_label_leads_out_of_the_results(study, task, partition, method):
    values = {
        "study": study,
        "model": "minilm",
        "tasks": {task: {"task": "bbc_news"}},
        "partitions": {partition: {"scheme": "iid"}},
        "methods": {method: {"method": "fedavg"}},
    }
    try:
        found = parse(values)
    except UserError:
        return
    root = Path("/results")
    folders = running.Folders(found.study, root)
    run = next(found.runs())
    for path in (
        folders.record(run),
        folders.task(run.task),
        folders.partition(run.task, run.partition, run.seed),
        folders.checkpoints(run),
    ):
        assert path.is_relative_to(root) and ".." not in path.parts
        assert Path(*path.parts).resolve() == path  # what the system makes of it is the same path
    # Each label is one step of the path, so that no two runs share a file.
    assert len(folders.record(run).parts) == len(root.parts) + 1 + 1 + 4


@given(st.from_regex(LABEL, fullmatch=True))
def test_every_name_that_is_a_label_is_taken(label):
    if label.endswith("."):
        return
    assert next(parse({**STUDY, "partitions": {label: {"scheme": "iid"}}}).runs()).partition == label


@pytest.mark.slow
def test_a_run_writes_nowhere_but_into_its_results(tmp_path, monkeypatch):
    study = load(tiny_study.write(tmp_path / "own", examples=60, federation={"clients": 2, "rounds": 1}))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    before = sorted(path for path in tmp_path.rglob("*"))
    run = Run("films", "iid", "head_only", 1)
    folders = running.Folders("study", tmp_path / "results")
    running.execute(study, run, folders.record(run), folders)
    after = sorted(path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "results"))
    assert after == before


def test_archives_are_not_unpacked(tmp_path):
    """Members are read by name into memory; one that would climb out is a name like any other."""
    import io
    import tarfile

    from fedlm.base.downloads import read_tar

    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name in ("../../climbs.txt", "/root.txt", "plain.txt"):
            entry = tarfile.TarInfo(name)
            entry.size = 2
            tar.addfile(entry, io.BytesIO(b"hi"))
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    members = read_tar(content.getvalue(), ".txt")
    assert members == {"../../climbs.txt": b"hi", "/root.txt": b"hi", "plain.txt": b"hi"}
    assert not list(tmp_path.parent.rglob("climbs.txt"))
