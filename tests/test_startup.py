"""What a command need not import it does not: Python with PyTorch and Transformers takes seconds to start."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from fedlm.base.errors import UserError
from fedlm.data.metrics import METRICS
from fedlm.federation.facts import facts, read_facts
from fedlm.models.catalogue import CATALOGUE
from fedlm.models.config import ModelConfig

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "peft", "evaluate", "datasets", "sklearn", "scipy", "matplotlib"}


def imported_by(code: str) -> set[str]:
    """Return the names of all modules that a new Python has imported after running some code."""
    code += "\nimport sys; print('\\n'.join(['modules:', *sys.modules]))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(found.stdout.partition("modules:\n")[2].split())


@pytest.mark.slow
def test_checking_the_demo_imports_none_of_the_large_libraries():
    command = "import sys; sys.argv[1:] = ['check', 'config/demo.yaml']; from fedlm.__main__ import main"
    found = imported_by(f"{command}; assert main() == 0")
    assert "fedlm.study.check" in found
    assert found.isdisjoint(HEAVY)


@pytest.mark.slow
def test_the_facts_of_a_model_of_ones_own_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    tiny.save(folder, "bert", ["the film was good"])
    code = f"""
from fedlm.federation.facts import facts
from fedlm.models.config import ModelConfig
print(facts(ModelConfig(source={str(folder)!r}), "classification"))"""
    assert "torch" in imported_by(code)
    assert imported_by(code).isdisjoint(HEAVY)
    (kept,) = (tmp_path / "cache" / "facts").iterdir()
    whole = kept.read_text()
    kept.write_text("{}")
    assert "torch" in imported_by(code)
    assert kept.read_text() == whole
    # Another model under the same name, and no folder to keep its facts in.
    shape = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**shape, "num_hidden_layers": 1}))
    monkeypatch.setenv("FEDLM_CACHE", "/proc/none")
    assert "torch" in imported_by(code)


@pytest.mark.slow
def test_what_the_pipeline_imports_at_each_start_is_as_small():
    found = imported_by(
        "import fedlm.study.reading, fedlm.study.check, fedlm.study.plugins, fedlm.jobs.provenance\n"
        "import fedlm.jobs.tracked, fedlm.jobs.obstacles, fedlm.jobs.folders, fedlm.results.contents"
    )
    assert found.isdisjoint(HEAVY)


@pytest.mark.slow
def test_a_job_imports_pytorch_and_transformers_but_not_evaluate_or_peft():
    found = imported_by(
        "import fedlm.jobs.running, fedlm.jobs.record, fedlm.federation.loop, fedlm.models.loading"
    )
    assert {"torch", "transformers"} <= found
    assert found.isdisjoint({"evaluate", "datasets", "peft", "matplotlib", "transformers.pipelines"})


@pytest.mark.slow
def test_tokenising_needs_no_class_of_a_model(tmp_path):
    tiny.save(tmp_path, "bert", ["the film was good"])
    code = f"""
from fedlm.models import loading
from fedlm.models.config import ModelConfig
model = ModelConfig(source={str(tmp_path)!r})
loading.max_positions(model), loading.load_tokenizer(model)
import fedlm.data.tokenising"""
    found = imported_by(code)
    assert "fedlm.data.tokenising" in found
    assert found.isdisjoint(
        {"transformers.modeling_utils", "transformers.generation.utils", "scipy", "sklearn"}
    )


@pytest.mark.slow
@pytest.mark.parametrize("source", CATALOGUE)
@pytest.mark.parametrize("kind", METRICS)
def test_the_facts_of_a_labelled_model_are_those_of_its_structure(source, kind):
    model = ModelConfig(source=source)
    if kind in CATALOGUE[source].kinds:
        assert facts(model, kind) == read_facts(model, kind)
    else:
        for asked in (facts, read_facts):
            with pytest.raises(UserError, match=source):
                asked(model, kind)
