"""What a sceptic can check: that records were not changed, follow from the study, and can be repeated."""

import json
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import test_tuning
import tiny_study  # noqa: F401  (puts the repository on the path)

from fedlm.base.errors import UserError
from fedlm.costs.claimed import write_claimed
from fedlm.jobs import collecting, record, reports, running, tracked, tuning, verification
from fedlm.jobs.folders import Folders
from fedlm.results import findings
from fedlm.study.reading import load
from fedlm.study.study import Run

RUN, TRIAL = Run("films", "iid", "head_only", 1), Run("films", "iid", "head_only", 9, 1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a tuned study whose trials and runs are all made, and the folder of its results."""
    folder = tmp_path_factory.mktemp("finished")
    study = load(test_tuning.study_of(folder))
    folders = Folders("study", folder / "results")
    for run in study.trials():
        running.execute(study, run, folders.record(run), folders, lambda line: None)
    tuning.choose(study, "films", "head_only", folders)
    for run in study.runs():
        running.execute(study, run, folders.record(run), folders, lambda line: None)
    return study, folder / "results"


@pytest.fixture
def made(finished, tmp_path):
    """Return the study and a copy of its results that may be changed."""
    study, results = finished
    for part in ("runs", "trials", "tuning"):
        shutil.copytree(results / "study" / part, tmp_path / "study" / part)
    return study, Folders("study", tmp_path)


def change(path, *keys, value, hide=False):
    """Change one value of a record; with `hide`, write the hash that belongs to the changed content."""
    found = json.loads(path.read_text())
    inner = found
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    if hide:
        record.write(path, found)
    else:
        path.write_text(json.dumps(found))


@pytest.mark.slow
def test_untouched_records_have_no_fault(made):
    assert list(verification.faults(*made)) == []


@pytest.mark.parametrize(
    ("run", "keys", "value", "fault"),
    [
        (RUN, ("test_score",), 0.99, "test_score is not the accuracy on the test split"),
        (RUN, ("validation_score",), 0.99, "validation_score is not that of the last round"),
        (RUN, ("upload_bytes",), 5, "upload_bytes is 5; its rounds add up to "),
        (RUN, ("seed",), 2, "seed is 2; its place says 1"),
        (RUN, ("method",), "fedavg", "method is 'fedavg'; its place says 'head_only'"),
        (RUN, ("config", "training", "learning_rate"), 0.5, "training.learning_rate is 0.5; the study says "),
        (RUN, ("config", "federation", "rounds"), 9, "federation.rounds is 9; the study says 1"),
        (
            TRIAL,
            ("config", "training", "learning_rate"),
            0.5,
            "training.learning_rate is 0.5; the study says ",
        ),
        (TRIAL, ("test",), {"accuracy": 1.0}, "a trial has test scores"),
        (TRIAL, ("trial",), 2, "trial is 2; its place says 1"),
    ],
)
def test_a_changed_value_is_noticed_even_if_the_hash_was_changed_with_it(made, run, keys, value, fault):
    study, folders = made
    path = folders.record(run)
    change(path, *keys, value=value)
    found = list(verification.faults(study, folders))
    assert f"{path}: its content was changed after it was written (content_sha256)" in found
    change(path, *keys, value=value, hide=True)
    found = list(verification.faults(study, folders))
    assert any(line.startswith(f"{path}: ") and fault in line for line in found), found
    assert not any("content_sha256" in line for line in found)


def test_a_choice_that_does_not_follow_from_the_trials_is_noticed(made):
    study, folders = made
    path = folders.choice("films", "head_only")
    follows = json.loads(path.read_text())["validation_score"]
    change(path, "validation_score", value=0.99)
    line = f"{path}: validation_score is 0.99; from the trials follows {follows!r}"
    assert list(verification.faults(study, folders)) == [line]


def test_what_is_missing_or_no_record_is_named(made):
    study, folders = made
    folders.record(TRIAL).unlink()
    folders.record(RUN).write_text("[]")
    found = list(verification.faults(study, folders))
    assert f"{folders.record(TRIAL)}: No such file or directory" in found
    assert any(re.match(rf"{re.escape(str(folders.record(RUN)))}: not a record", line) for line in found)


def test_the_cheapest_run_of_each_method_is_repeated_and_some_at_random(tmp_path):
    rows = {"fedavg": None, "head_only": None}
    study = load(test_tuning.study_of(tmp_path, methods=rows, seeds=list(range(1, 9))))
    folders = Folders("study", tmp_path)
    for number, run in enumerate(study.runs()):
        record.write(folders.record(run), {"wall_seconds": 100 - number})
    found = verification.chosen_runs(study, folders, cheapest=3, drawn=2, seed=5)
    assert found[:2] == [folders.record(Run("films", "iid", method, 8)) for method in ("head_only", "fedavg")]
    assert len(set(found)) == 4
    assert found == verification.chosen_runs(study, folders, cheapest=3, drawn=2, seed=5)
    assert verification.chosen_runs(study, folders, cheapest=1, drawn=0, seed=5) == found[:1]
    drawn = {path for seed in range(20) for path in verification.chosen_runs(study, folders, 3, 2, seed)[2:]}
    assert len(drawn) > 8


@pytest.mark.slow
def test_predicted_costs_are_predicted_again(made, tmp_path, monkeypatch):
    """The verdicts that rest on them would otherwise rest on a file that anyone can edit."""
    study, folders = made
    claims = tmp_path / "claims.yaml"
    rule = "{kind: predicted, model: minilm, of: fedlora, quantity: turn_flops, at_most: 1}"
    claims.write_text(f"systems: [{{name: A, reference: b, claims: [{{claim: Less., rule: {rule}}}]}}]")
    again = partial(write_claimed, path=claims)
    monkeypatch.setattr(verification, "write_claimed", again)
    predicted = folders.root / "costs" / "claims.csv"
    again(predicted)
    collecting.collect(study, folders)

    predicted.write_text(predicted.read_text().replace("FedLoRA", "FedLora"))
    found = list(verification.differences(study, folders, tmp_path / "figures"))
    assert f"{predicted}: not what the prediction gives" in found


@pytest.mark.slow
def test_a_repeated_run_is_the_same_or_as_near_as_another_processor_allows(made):
    study, folders = made
    path, lines = folders.record(RUN), []
    assert verification.repeats(path, lines.append)
    assert lines == [f"{path}: the same, bit for bit"]

    found = json.loads(path.read_text())
    score, examples = found["test_score"], found["examples"]["test"]
    change(path, "provenance", "payload_sha256", value="0" * 64, hide=True)
    assert not verification.repeats(path, lines.append)
    assert "different on a processor of the same capability" in lines[-1]
    change(path, "provenance", "machine", "cpu_capability", value="ELSE", hide=True)
    assert verification.repeats(path, lines.append)
    assert "made on ELSE with " in lines[-1] and "within its standard error" in lines[-1]
    off = 0.01 if score > 0.5 else 0.99
    change(path, "test_score", value=off, hide=True)
    assert abs(off - score) > verification._standard_error({**found, "test_score": off})
    assert not verification.repeats(path, lines.append)
    assert "more than its standard error" in lines[-1]
    assert verification._standard_error({**found, "test_score": 1.0}) == 1 / examples


@pytest.mark.slow
def test_all_reports_follow_from_the_records_to_the_byte(made, finished, tmp_path, monkeypatch):
    study, folders = made
    shutil.copytree(finished[1] / "study/partitions", folders.root / "partitions")
    collecting.collect(study, folders)
    reports.write_tables(study, folders)
    reports.draw_figures(study, folders, tmp_path / "figures")
    reports.write_explorer(study, folders)
    # This study is too small for the tables of which findings are written.
    monkeypatch.setattr(findings, "write_up", lambda tables, study, has: (tables / "main.md").read_text())
    found = tmp_path / "findings.md"
    reports.write_findings(study, folders, found)
    assert list(verification.differences(study, folders, tmp_path / "figures", found)) == []
    found.write_text(found.read_text().replace("1", "2", 1))
    assert list(verification.differences(study, folders, tmp_path / "figures", found)) == [
        f"{found}: not what the records give"
    ]
    main, figure = folders.root / "tables/main.csv", tmp_path / "figures/memory.pdf"
    main.write_text(main.read_text().replace("1", "2", 1))
    figure.unlink()
    assert list(verification.differences(study, folders, tmp_path / "figures")) == [
        f"{main}: not what the records give",
        f"{figure}: missing; the records give it",
    ]


def test_tracked_records_are_settled_while_they_are_unchanged_and_fit_the_study(made, tmp_path, monkeypatch):
    study, folders = made
    (tmp_path / "results").mkdir()
    folders.root.rename(tmp_path / "results/study")
    monkeypatch.chdir(tmp_path)
    folders, figures = Folders("study", Path("results")), Path("figures/study")
    assert tracked.settle(study, folders, figures) == set()  # not in git
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "results"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *words], check=True)
    runs = {run.path for run in (*study.runs(), *study.trials())}
    assert len(runs) == 4 and tracked.settle(study, folders, figures) == runs
    times = {path.stat().st_mtime for path in Path("results").rglob("*.json")}
    assert len(times) == 1

    change(folders.record(RUN), "test_score", value=0.5)
    assert tracked.settle(study, folders, figures) == runs - {RUN.path}
    subprocess.run([*git, "commit", "-qam", "b"], check=True)
    assert tracked.settle(study, folders, figures) == runs
    shorter = study.model_copy(update={"training": study.training.model_copy(update={"batch_size": 8})})
    reason = r"in git, but .*training.batch_size is 16; the study says 8 \(4 such records\)"
    with pytest.raises(UserError, match=reason):
        tracked.settle(shorter, folders, figures)
