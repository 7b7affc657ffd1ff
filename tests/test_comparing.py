"""A method of one's own in the ranking of a study, without touching what the study has."""

import json
import subprocess
import sys

import pytest
import test_tuning

from fedlm.base.errors import UserError
from fedlm.jobs import comparing
from fedlm.jobs.folders import Folders

MINE = '''
"""FedAvg over biases and head."""

from fedlm.federation.method import Method


class Mine(Method):
    """FedAvg over biases."""

    title = "Mine"

    def adapt(self, model, kind):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias") or name in self.anatomy.head)
        return model
'''


@pytest.mark.slow
def test_a_method_of_ones_own_is_tuned_run_and_ranked_beside_the_others(tmp_path):
    path = test_tuning.study_of(tmp_path, tuning={**test_tuning.TUNING, "trials": 2})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/mine.py").write_text(MINE)
    folders, lines = Folders("study", tmp_path / "results"), []
    for method in ("fedavg", str(tmp_path / "elsewhere/mine.py")):
        study, label = comparing.study_with(str(path), method)
        apart = comparing.compare(study, label, folders, lines.append)
    assert label == "mine" and {"mine: 2 trials, 2 to do", "mine: 1 runs, 1 to do"} <= {*lines}
    made = json.loads((folders.root / "runs/films/iid/mine/seed1.json").read_text())
    chosen = json.loads((folders.root / "tuning/films/mine.json").read_text())["chosen"]
    assert made["searched"] == chosen
    assert apart.root == folders.root / "compare/mine/study"
    assert "Mine" in (apart.root / "tables/main.md").read_text()
    assert not (folders.root / "tables").exists()
    before = len(lines)
    comparing.compare(study, label, folders, lines.append)
    assert lines[before:] == ["mine: 2 trials, 0 to do", "mine: 1 runs, 0 to do"]

    # Edited, it is another method: nothing that the older one made counts. A new process, as for a user.
    (tmp_path / "elsewhere/mine.py").write_text(MINE.replace("bias", "weight"))
    options = ["--study", str(path), "--results", str(tmp_path / "results")]
    command = [sys.executable, "-m", "fedlm", "compare", str(tmp_path / "elsewhere/mine.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"mine: 2 trials, 2 to do", "mine: 1 runs, 1 to do"} <= {*done.stderr.splitlines()}
    again = json.loads((folders.root / "runs/films/iid/mine/seed1.json").read_text())
    assert again["upload_bytes"] > made["upload_bytes"]


def test_what_cannot_be_compared_is_refused(tmp_path):
    path = test_tuning.study_of(tmp_path, tuning=None)
    with pytest.raises(UserError, match="has no tuning; allowed: a study whose methods are tuned"):
        comparing.study_with(str(path), "fedavg")
    with pytest.raises(UserError, match="methods.gone.method: 'gone'; allowed: "):
        comparing.study_with("benchmark", "gone")
    with pytest.raises(UserError, match="unheard_of.yaml"):
        comparing.study_with("unheard_of", "fedavg")
