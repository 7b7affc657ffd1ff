"""The method in docs/adding-a-method.md is a whole one: it is found, it runs, and it trains what it says."""

import re
from pathlib import Path

import pytest
import torch
import worlds

from fedlm.base.errors import UserError
from fedlm.study.plugins import discover_methods, find

PAGE = Path(__file__).parent.parent / "docs" / "adding-a-method.md"


@pytest.mark.slow
def test_the_example_of_the_page_runs(tmp_path, place):
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL).group(1)
    (tmp_path / "fedbitfit.py").write_text(code)
    found = find([tmp_path]).methods
    assert found.keys() - discover_methods().keys() == {"fedbitfit"}
    run = worlds.federation(found["fedbitfit"], place)
    run.run()
    assert all(name.endswith("bias") or "classifier" in name for name in run.method.exchanged)
    moved = [n for n in run.method.exchanged if not torch.equal(run.server.tensors[n], run.server.initial[n])]
    assert "classifier.weight" in moved and any("layer.0" in name for name in moved)


def test_the_page_shows_fedprox_in_full():
    assert (PAGE.parent.parent / "methods" / "fedprox.py").read_text() in PAGE.read_text()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1\n", "holds 0 methods"),
        ("from fedlm.federation.method import Method\nclass A(Method): pass\n", "A.title"),
    ],
)
def test_a_file_that_holds_no_method_is_named(code, message, tmp_path):
    name = f"broken_{len(code)}.py"
    (tmp_path / name).write_text(code)
    with pytest.raises(UserError) as error:
        discover_methods(tmp_path)
    assert name in str(error.value) and message in str(error.value)
