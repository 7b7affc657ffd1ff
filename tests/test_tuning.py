"""Tuning: the same trials for every method, chosen on validation, and never a look at the test split."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_study
from hypothesis import given
from hypothesis import strategies as some

from fedlm.base.errors import DivergedRun, FailedRun, UserError
from fedlm.federation.method import Method
from fedlm.federation.search import LogRange, OneOf
from fedlm.jobs import cleaning, collecting, record, running, tuning
from fedlm.jobs.folders import Folders
from fedlm.results.tuning import read_trials
from fedlm.study import plugins
from fedlm.study.reading import load
from fedlm.study.study import Run
from fedlm.study.tuning import settings_of

TUNING = {"seed": 9, "trials": 3, "partitions": {"films": "iid"}}
WILD = '''
"""FedAvg whose uploads may overflow."""

from fedlm.federation.method import Method, MethodConfig
from fedlm.federation.search import LogRange, OneOf


class Wild(Method):
    """FedAvg."""

    title = "Wild"
    search = {"training.learning_rate": LogRange(1e-4, 1e-2), "power": OneOf((0, 200))}

    class Config(MethodConfig):
        power: int = 0

    def upload(self, turn):
        return {name: value * 2.0**self.config.power for name, value in super().upload(turn).items()}
'''


def study_of(folder, **changes):
    """Return the path of a tiny study with tuning."""
    (folder / "own").mkdir(parents=True, exist_ok=True)
    (folder / "own/wild.py").write_text(WILD)
    values = {
        "federation": {"clients": 2, "rounds": 1},
        "training": {"batch_size": 16, "device": "cpu"},
        "tuning": TUNING,
        "plugins": ["own"],
        "methods": {"head_only": None},
    }
    return tiny_study.write(folder, examples=60, **{**values, **changes})


def execute(study, run, folders, lines=None):
    running.execute(study, run, folders.record(run), folders, (lines if lines is not None else []).append)
    return json.loads(folders.record(run).read_text())


class Ranged(Method):
    name = "ranged"
    title = "Ranged"
    search = {"training.learning_rate": LogRange(1e-5, 1e-3), "payload": OneOf(("float32", "bfloat16"))}


def test_trials_fill_the_space_and_more_of_them_only_add_points():
    eighths = set()
    for trial in range(8):
        found = settings_of(Ranged, trial)
        assert found == settings_of(Ranged, trial)
        assert 1e-5 <= found["training.learning_rate"] <= 1e-3
        assert found["payload"] in ("float32", "bfloat16")
        # From 1e-5 to 1e-3 are two powers of ten, so an eighth is a factor of 10 ** 0.25.
        eighths.add(math.floor(math.log10(found["training.learning_rate"] / 1e-5) * 4 + 1e-9))
    assert eighths == set(range(8))


def test_methods_of_other_names_try_other_points():
    other = type("Other", (Ranged,), {"name": "other"})
    assert settings_of(other, 0) != settings_of(Ranged, 0)


def test_a_task_may_have_partitions_of_its_own(tmp_path):
    path = study_of(
        tmp_path, partitions={"iid": None, "pooled": None, "skewed": {"scheme": "dirichlet", "alpha": 0.5}}
    )
    text = path.read_text()
    path.write_text(text.replace("label: label", "label: label\n    partitions: [skewed, iid]"))
    study = load(path)
    assert [run.partition for run in study.runs()] == ["iid", "skewed"]
    path.write_text(text.replace("label: label", "label: label\n    partitions: [pooled]"))
    with pytest.raises(UserError, match=r"tuning.partitions.films: 'iid'; allowed: pooled"):
        load(path)
    path.write_text(text.replace("label: label", "label: label\n    partitions: [gone]"))
    with pytest.raises(
        UserError, match=r"tasks.films.partitions: \['gone'\]; allowed: a list of iid, pooled, skewed"
    ):
        load(path)


@given(some.floats(0, 1, exclude_max=True), some.floats(1e-8, 1e-2), some.floats(1.5, 1e6))
def test_a_value_lies_in_its_range_up_to_rounding(position, low, factor):
    value = LogRange(low, low * factor).at(position)
    assert low * 0.994 <= value <= low * factor * 1.006
    assert OneOf((1, 2, 3)).at(position) in (1, 2, 3)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({}, "allowed: ranges of 1 to 3 settings"),
        ({"rate": LogRange(1, 2)}, "'rate'; allowed: training.<key>, server_optimizer.<key> of "),
        ({"server_optimizer.learning_rate": LogRange(1, 2)}, "'server_optimizer.learning_rate'; allowed: "),
        ({"training.learning_rate": LogRange(1.0, 1.0)}, "allowed: LogRange(low, high) with 0 < low < high"),
        ({"payload": OneOf(("float32",))}, "with at least two values"),
        ({"payload": OneOf(("float32", "int3"))}, "search.payload: 'int3'; "),
        ({"training.learning_rate": LogRange(1.0, 1000.0)}, "search.training.learning_rate: 1000.0; "),
        ({"training.local_epochs": OneOf((0, 1))}, "search.training.local_epochs: 0; "),
    ],
)
def test_a_search_space_that_cannot_be_used_is_refused_when_its_file_is_found(search, message):
    bad = type("Bad", (Method,), {"title": "Bad", "search": search})
    with pytest.raises(UserError, match=re.escape(message)):
        plugins._check_search(bad, Path("methods/bad.py"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning": {**TUNING, "seed": 1}}, "tuning.seed: 1; allowed: a seed that is not under `seeds`"),
        ({"tuning": {**TUNING, "trials": 0}}, "tuning.trials: 0; "),
        (
            {"tuning": {**TUNING, "partitions": {}}},
            "tuning.partitions: []; allowed: one partition for each of films",
        ),
        (
            {"tuning": {**TUNING, "partitions": {"films": "skewed"}}},
            "tuning.partitions.films: 'skewed'; allowed: iid",
        ),
        ({"tuning": {"trials": 3}}, "tuning.seed: missing"),
        (
            {"methods": {"fedavg": {"training": {"learning_rate": 1e-3}}}},
            "methods.fedavg.training.learning_rate: allowed: nothing, since `tuning` chooses it",
        ),
        (
            {"methods": {"flasc": {"server_optimizer": {"name": "adamw", "learning_rate": 1e-2}}}},
            "methods.flasc.server_optimizer.learning_rate: allowed: nothing, since `tuning` chooses it",
        ),
        (
            {"methods": {"wild": {"power": 0}}},
            "methods.wild.power: allowed: nothing, since `tuning` chooses it",
        ),
        (
            {"methods": {"fedavg": None, "head_only": {"tuned_as": "fedavg"}}},
            "methods.head_only.tuned_as: 'fedavg'; allowed: a tuned row of the same method: none",
        ),
        (
            {"methods": {"fedavg": None, "a": {"method": "fedavg", "tuned_as": "gone"}}},
            "methods.a.tuned_as: 'gone'; allowed: a tuned row of the same method: fedavg",
        ),
        (
            {"tuning": None, "methods": {"fedavg": None, "a": {"method": "fedavg", "tuned_as": "fedavg"}}},
            "methods.a.tuned_as: 'fedavg'; allowed only with `tuning`",
        ),
    ],
)
def test_a_tuning_that_cannot_be_right_is_refused_before_any_job(tmp_path, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load(study_of(tmp_path, **changes))


def test_the_rate_of_a_server_optimizer_is_tuned_and_its_other_settings_stay(tmp_path):
    row = {"server_optimizer": {"name": "adamw", "epsilon": 1e-6}}
    study = load(study_of(tmp_path, methods={"flasc": None, "other": {"method": "flasc", **row}}))
    for method, epsilon in (("flasc", 1e-8), ("other", 1e-6)):
        rates = set()
        for run in study.trials():
            if run.method == method:
                config = study.run(*run)
                optimizer = config.federation.server_optimizer
                assert (optimizer.name, optimizer.epsilon) == ("adamw", epsilon)
                assert optimizer.learning_rate == config.searched["server_optimizer.learning_rate"]
                assert config.training.learning_rate == config.searched["training.learning_rate"]
                rates.add(optimizer.learning_rate)
        assert len(rates) == 3
    assert study.run("films", "iid", "flasc", 1).federation.server_optimizer is None
    chosen = {"training.learning_rate": 1e-3, "server_optimizer.learning_rate": 0.02}
    run = study.run("films", "iid", "other", 1, chosen=chosen)
    assert run.federation.server_optimizer.learning_rate == 0.02
    plain = load(study_of(tmp_path, methods={"flasc": {"server_optimizer": {"name": "none"}}}))
    with pytest.raises(UserError, match=r"methods.flasc.server_optimizer: none; allowed: .*: learning_rate"):
        plain.run("films", "iid", "flasc", 9, trial=0)


def test_every_tuned_row_gets_the_same_number_of_trials_on_one_partition(tmp_path):
    rows = {
        "fedavg": None,
        "two": {"method": "fedavg", "tuned_as": "fedavg"},
        "head_only": {"partitions": ["pooled"]},
    }
    study = load(study_of(tmp_path, methods=rows, partitions={"iid": None, "pooled": None}, seeds=[1, 2]))
    found = list(study.trials())
    assert [(run.method, run.trial) for run in found] == [
        (method, trial) for method in ("fedavg", "head_only") for trial in range(3)
    ]
    assert {(run.task, run.partition, run.seed) for run in found} == {("films", "iid", 9)}
    assert [run.path for run in study.named(["films/iid/fedavg/trial1"])] == ["films/iid/fedavg/trial1"]
    with pytest.raises(UserError, match=r"films/iid/two/trial0' is not in the study.*or \.\.\./trial<k>"):
        study.named(["films/iid/two/trial0"])


def trial_record(folders, trial, score, loss=1.0, better=True, status="finished", rate=None):
    """Write what `choose` reads of a trial's record."""
    run = Run("films", "iid", "head_only", 9, trial)
    values = {
        "status": status,
        "partition": "iid",
        "trial": trial,
        "searched": {"training.learning_rate": rate or 10.0**-trial},
        "greater_is_better": better,
        "validation_score": score,
        "rounds": [{"validation": {"loss": loss}}],
    }
    if status == "failed":
        values |= {"error": "the loss is nan"}
    record.write(folders.record(run), values)


def test_the_best_validation_score_is_chosen_and_ties_go_to_the_lower_loss(tmp_path):
    study, folders = load(study_of(tmp_path)), Folders("study", tmp_path)
    for trial, (score, loss) in enumerate([(0.5, 0.1), (0.8, 0.9), (0.8, 0.7)]):
        trial_record(folders, trial, score, loss)
    choice = tuning.choose(study, "films", "head_only", folders)
    assert (choice["trial"], choice["chosen"]) == (2, {"training.learning_rate": 0.01})
    assert choice["at_edge"] == ["training.learning_rate"]  # no trial tried a lower one
    assert json.loads(folders.choice("films", "head_only").read_text()) == choice
    for trial, score in enumerate([2.0, 1.0, 3.0]):
        trial_record(folders, trial, score, better=False)
    choice = tuning.choose(study, "films", "head_only", folders)
    assert (choice["trial"], choice["at_edge"]) == (1, [])


def test_failed_trials_are_never_chosen_but_count_as_tried(tmp_path):
    study, folders = load(study_of(tmp_path)), Folders("study", tmp_path)
    trial_record(folders, 0, 0.0, status="failed")
    trial_record(folders, 1, 0.2)
    with pytest.raises(UserError, match=r"trial2\.json: not the record of a trial"):
        tuning.choose(study, "films", "head_only", folders)
    trial_record(folders, 2, 0.1)
    choice = tuning.choose(study, "films", "head_only", folders)
    assert (choice["trial"], choice["trials"], choice["failed"], choice["at_edge"]) == (1, 3, 1, [])
    for trial in range(3):
        trial_record(folders, trial, 0.0, status="failed")
    with pytest.raises(FailedRun, match="films/head_only: all 3 trials failed; the first: the loss is nan"):
        tuning.choose(study, "films", "head_only", folders)
    with pytest.raises(UserError, match="'fedavg' is not tuned on 'films'"):
        tuning.choose(study, "films", "fedavg", folders)


@pytest.mark.slow
def test_a_run_takes_what_was_chosen_and_a_trial_never_sees_the_test_split(tmp_path):
    study, folders = load(study_of(tmp_path)), Folders("study", tmp_path / "results")
    run = Run("films", "iid", "head_only", 1)
    with pytest.raises(UserError, match="head_only.json: no settings chosen for head_only"):
        execute(study, run, folders)
    made = [execute(study, trial, folders) for trial in study.trials()]
    for number, one in enumerate(made):
        searched = settings_of(study.found.methods["head_only"], number)
        assert (one["trial"], one["seed"], one["test"], one["test_score"]) == (number, 9, None, None)
        assert one["searched"] == searched and 0 <= one["validation_score"] <= 1
        assert one["config"]["training"]["learning_rate"] == searched["training.learning_rate"]
    assert len({one["provenance"]["payload_sha256"] for one in made}) == 3
    choice = tuning.choose(study, "films", "head_only", folders)
    tuned = execute(study, run, folders)
    assert tuned["searched"] == choice["chosen"] and "trial" not in tuned and tuned["test"]
    assert tuned["config"]["training"]["learning_rate"] == choice["chosen"]["training.learning_rate"]

    # Everything is restored, nothing trained again; what the study uses is kept by `clean`.
    lines = []
    for again in (*study.trials(), run):
        before = folders.record(again).read_bytes()
        folders.record(again).unlink()
        execute(study, again, folders, lines)
        assert folders.record(again).read_bytes() == before
    assert len(lines) == 4 and all(line.endswith("its record is restored") for line in lines)
    assert cleaning.clean(study, folders, dry_run=True) == []
    assert collecting.collect(study, folders) == (1, [])
    rows = read_trials(folders.root / "trials.parquet")
    assert list(rows.trial) == [0, 1, 2] and set(rows.status) == {"finished"}
    assert [json.loads(text) for text in rows.searched] == [one["searched"] for one in made]

    # One trial less: its record is no longer used.
    fewer = load(study_of(tmp_path, tuning={**TUNING, "trials": 2}))
    gone = {path.name for path, _ in cleaning.clean(fewer, folders, dry_run=True)}
    assert "trial2.json" in gone and not {"trial0.json", "trial1.json", "head_only.json", "seed1.json"} & gone


@pytest.mark.slow
def test_a_trial_that_diverges_gets_a_record_and_a_run_does_not(tmp_path):
    rows = {"wild": None, "twice": {"method": "wild", "tuned_as": "wild", "training": {"local_epochs": 2}}}
    study = load(study_of(tmp_path, methods=rows, tuning={**TUNING, "trials": 8}))
    folders = Folders("study", tmp_path / "results")
    kind = study.found.methods["wild"]
    worst = next(trial for trial in range(8) if settings_of(kind, trial)["power"])
    good = next(trial for trial in range(8) if not settings_of(kind, trial)["power"])
    failed = execute(study, Run("films", "iid", "wild", 9, worst), folders)
    assert failed["status"] == "failed" and failed["searched"] == settings_of(kind, worst)
    assert re.match("method wild, round 1, client 0: the update of .* is not finite", failed["error"])
    assert "test" not in failed
    lines = []
    assert execute(study, Run("films", "iid", "wild", 9, worst), folders, lines) == failed
    assert lines[-1].endswith("its record is restored")

    fine = execute(study, Run("films", "iid", "wild", 9, good), folders)
    folders.choice("films", "wild").parent.mkdir(parents=True, exist_ok=True)
    folders.choice("films", "wild").write_text(json.dumps({"chosen": fine["searched"]}))
    twice = execute(study, Run("films", "iid", "twice", 1), folders)
    assert twice["searched"] == fine["searched"]
    assert twice["config"]["method"]["power"] == 0
    assert twice["config"]["training"]["local_epochs"] == 2
    folders.choice("films", "wild").write_text(json.dumps({"chosen": failed["searched"]}))
    with pytest.raises(DivergedRun):
        execute(study, Run("films", "iid", "wild", 1), folders)
    assert not folders.record(Run("films", "iid", "wild", 1)).exists()


def test_a_changed_record_is_noticed(tmp_path):
    record.write(tmp_path / "a.json", {"test_score": 0.5, "rounds": [{"round": 1}]})
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["content_sha256"] == record.content_hash(found)
    found["rounds"][0]["round"] = 2
    assert found["content_sha256"] != record.content_hash(found)


@pytest.mark.slow
def test_the_pipeline_tries_chooses_and_runs_and_then_plans_nothing(tmp_path):
    root = Path(__file__).resolve().parent.parent
    changes = {"tuning": {**TUNING, "trials": 2}}
    study = study_of(tmp_path, pipeline={"checkpoint_seconds": 0, "runs_per_job": 2}, **changes)

    def snakemake(folder, *words, target="collect"):
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(root / "Snakefile"), "--cores", "1"]
        command += [target, *words, "--configfile", str(study)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    status, output = snakemake(tmp_path)
    assert status == 0, output[-3000:]
    results = tmp_path / "results/study"
    chosen = json.loads((results / "tuning/films/head_only.json").read_text())["chosen"]
    tuned = json.loads((results / "runs/films/iid/head_only/seed1.json").read_text())
    assert tuned["searched"] == chosen
    assert list(read_trials(results / "trials.parquet").trial) == [0, 1]
    status, output = snakemake(tmp_path, "-n")
    assert status == 0 and "Nothing to be done" in output, output[-2000:]

    # What git tracks is not made again elsewhere, where neither times nor Snakemake's notes are known ...
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    kept = ["runs", "trials", "tuning", "runs.parquet", "rounds.parquet", "trials.parquet"]
    for words in (
        ["init", "-q"],
        ["add", *(f"results/study/{name}" for name in kept)],
        ["commit", "-qm", "a"],
    ):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(tmp_path), str(clone)], check=True)
    study_of(tmp_path, **changes)  # now a job for each run
    status, output = snakemake(clone, "-n")
    assert status == 0 and "Nothing to be done" in output, output[-2000:]
    gone = "results/study/runs/films/iid/head_only/seed1.json"
    (clone / gone).unlink()
    status, output = snakemake(clone, "-n", target=gone)
    planned = re.findall(r"^Job \d+: (\w+ (?:settings )?)", output, re.MULTILINE)
    assert status == 0 and "Training " in planned and "Trying settings " not in planned, output[-2000:]
    # ... and never taken for a study of other settings.
    study_of(tmp_path, federation={"clients": 2, "rounds": 2}, **changes)
    status, output = snakemake(clone, "-n")
    assert status == 2 and "in git, but cannot serve the study as it is now" in output, output
