"""Study files: what is read, what overrides what, what is refused and with which message."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from fedlm.base.errors import UserError
from fedlm.study import reading, yaml_files
from fedlm.study.check import check
from fedlm.study.reading import parse
from fedlm.study.schema import schema
from fedlm.study.study import Run

ROOT = Path(__file__).resolve().parent.parent
STUDIES = sorted((ROOT / "config").glob("*.yaml"))
STUDIES = [path for path in STUDIES if path.stem not in ("reference", "claims", "devices")]

PLAIN = {
    "study": "plain",
    "seeds": [1, 2],
    "model": "minilm",
    "federation": {"clients": 4, "rounds": 5},
    "training": {"learning_rate": 0.001, "batch_size": 8},
    "tasks": {"bbc_news": {"max_length": 32}, "films": {"task": "movie_reviews", "max_length": 48}},
    "partitions": {"iid": None, "skewed": {"scheme": "dirichlet", "alpha": 0.3}},
    "methods": {"fedavg": None, "slow": {"method": "fedavg", "training": {"learning_rate": 0.0001}}},
}


def changed(**changes) -> dict:
    return {**copy.deepcopy(PLAIN), **changes}


def faults(values: dict) -> list[str]:
    with pytest.raises(UserError) as error:
        check(parse(values))
    return str(error.value).splitlines()


def test_what_so_few_rounds_never_come_to_is_noted_before_the_first_job():
    methods = {
        "short": {"method": "slora", "sparse_rounds": 2},
        "scores": {"method": "fedpeptao"},
        "fedavg": None,
    }
    training = {"learning_rate": 1e-3}

    def noted(rounds):
        federation = {"clients": 4, "rounds": rounds}
        tasks = {"bbc_news": {"max_length": 32}}
        return check(parse(changed(methods=methods, federation=federation, training=training, tasks=tasks)))

    first, second = noted(1)
    assert first.startswith("methods.short (on tasks.") and "1 rounds" not in first
    assert first.endswith("1 round leaves out stage 2, since sparse_rounds is 2")
    assert "methods.scores" in second and "all training" in second
    (only,) = noted(2)
    assert only.endswith("2 rounds leave out stage 2, since sparse_rounds is 2")
    assert noted(3) == []


def test_the_schema_in_the_repository_is_the_one_of_the_code():
    written = (ROOT / "config" / "schema.json").read_text()
    assert written == schema(), "run: python -m fedlm schema > config/schema.json"
    jsonschema.Draft202012Validator.check_schema(json.loads(written))


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_of_the_repository_fit_schema_and_code(path):
    values = yaml_files.read_yaml(path)
    jsonschema.validate(values, json.loads(schema()))
    assert list(parse(values).runs())


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"federation": {"clients": 0}},
        {"training": {"learning_rate": -1}},
        {"colour": "red"},
        {"tasks": {}},
        {"partitions": {"a": {"scheme": "dirichlet"}}},
        {"methods": {"a": {"method": "fedlora", "rank": 0}}},
        {"seeds": []},
        {"methods": {"../a": None}},
    ],
)
def test_the_schema_refuses_what_the_code_refuses(changes):
    jsonschema.validate(PLAIN, json.loads(schema()))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed(**changes), json.loads(schema()))
    with pytest.raises(UserError):
        parse(changed(**changes))


def test_each_definition_stands_in_the_schema_once():
    text = schema()
    assert len(text) < 150_000
    for field in ('"largest_gradient_norm": {', '"trust_remote_code": {', '"dropout_rate": {'):
        assert text.count(field) == 1


def test_the_runs_are_the_grid_of_labels_and_seeds():
    study = parse(PLAIN)
    assert len(list(study.runs())) == 2 * 2 * 2 * 2
    assert next(study.runs()) == Run("bbc_news", "iid", "fedavg", 1)
    some = parse(changed(methods={"fedavg": {"tasks": ["films"], "partitions": ["iid"]}}))
    assert [run.path for run in some.runs()] == ["films/iid/fedavg/seed1", "films/iid/fedavg/seed2"]


def test_settings_of_the_task_override_the_study_and_those_of_the_method_both():
    values = changed()
    values["tasks"]["films"] |= {"training": {"batch_size": 4}, "federation": {"clients": 2}}
    study = parse(values)
    assert study.run("bbc_news", "iid", "fedavg", 1).training.batch_size == 8
    films = study.run("films", "iid", "slow", 1)
    assert (films.training.batch_size, films.training.learning_rate) == (4, 0.0001)
    assert (films.federation.clients, films.federation.rounds) == (2, 5)
    with pytest.raises(UserError, match="method: 'fast' is not in the study; allowed: fedavg, slow"):
        study.run("films", "iid", "fast", 1)


def test_a_row_has_its_own_budgets_or_those_of_the_study():
    federation = {"clients": 4, "budgets": [{"share": 0.5, "memory": "1 GB"}]}
    rows = {
        "embracingfl": None,
        "weaker": {"method": "embracingfl", "budgets": [{"share": 0.25, "memory": "60 MB"}]},
        "free": {"method": "embracingfl", "budgets": []},
    }
    study = parse(changed(federation=federation, methods=copy.deepcopy(rows)))
    found = {row: study.run("films", "iid", row, 1).federation.budgets for row in rows}
    assert {row: [(one.share, one.memory) for one in budgets] for row, budgets in found.items()} == {
        "embracingfl": [(0.5, 10**9)],
        "weaker": [(0.25, 60 * 10**6)],
        "free": [],
    }
    rows["weaker"]["budgets"][0]["share"] = 2
    with pytest.raises(UserError, match=r"methods.weaker.budgets.0.share: 2; "):
        parse(changed(methods=rows))


def test_a_resolved_configuration_is_a_study_again():
    """What a record states is enough to make the run again."""
    run = parse(PLAIN).run("films", "skewed", "slow", 2)
    record = {"study": "plain", "task": "films", "partition": "skewed", "method": "slow", "seed": 2}
    study = reading.of_record({**record, "config": json.loads(json.dumps(run.resolved()))})
    assert [one.path for one in study.runs()] == ["films/skewed/slow/seed2"]
    assert study.run("films", "skewed", "slow", 2).resolved() == run.resolved()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"federation": {"clients": 0}}, "federation.clients: 0; Input should be greater than or equal to 1"),
        ({"federation": {"clients": True}}, "federation.clients: True; Input should be a valid integer"),
        ({"federation": {"clients": "4"}}, "federation.clients: '4'; Input should be a valid integer"),
        ({"federation": []}, "federation: []; "),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate: nan; "),
        ({"training": {"betas": [0.9, 1.0]}}, "betas: (0.9, 1.0); allowed"),
        ({"training": {"colour": 1}}, "training.colour: unknown key"),
        ({"tasks": {"nothing": None}}, "tasks.nothing.task: 'nothing'; allowed: ag_news, "),
        ({"tasks": {"bbc_news": {"max_length": 600}}}, "bbc_news.max_length: 600; allowed: at most 512"),
        ({"model": "minilmm"}, "model: unknown label 'minilmm'; did you mean minilm?"),
        ({"model": {"source": "nowhere/a/b"}}, "there is no folder 'nowhere/a/b'"),
        ({"methods": {"fedlora": {"rank": 0}}}, "methods.fedlora.rank: 0; "),
        ({"methods": {"fedlora": {"rank": 500}}}, "rank: 500; allowed: at most 384"),
        ({"methods": {"fedavg": {"tasks": ["bbc"]}}}, ".fedavg.tasks: ['bbc']; allowed: a list of bbc"),
        ({"methods": {"fedavg": {"tasks": [1]}}}, "methods.fedavg.tasks: [1]; allowed"),
        ({"methods": {"fedcybgd": {"blocks_per_turn": 7}}}, "7; allowed"),
        ({"methods": {"fedprompt": {"tokens": 510}}}, "510 virtual tokens; allowed: at most 504"),
        (
            {"methods": {"fedcybgd": {"moments": "handed_on", "payload": "float16"}}},
            "payload: float16 with moments: handed_on; allowed: float32",
        ),
        ({"methods": {"local_only": {"cache": "last_visit"}}}, "cache: last_visit; allowed: none"),
        (
            {"methods": {"local_only": {"moments": "handed_on"}}},
            "methods.local_only: moments: handed_on; allowed: reset, client",
        ),
        ({"methods": {"fedkseed": {"cache": "last_visit"}}}, "methods.fedkseed.cache: 'last_visit'; "),
        ({"partitions": {"labels": {"labels_per_client": 9}}}, "labels_per_client: 9, but the training"),
        ({"partitions": {"natural": None}}, "scheme: natural, but the task has no natural populations"),
        ({"partitions": {"dirichlet": {"alpha": -0.1}}}, "partitions.dirichlet.dirichlet.alpha: -0.1; "),
        ({"partitions": {"odd": None}}, "partitions.odd: "),
        ({"seeds": [1, 1]}, "seeds: [1, 1]; allowed: a list of different whole numbers"),
        (
            {"pipeline": {"checkpoint_seconds": -1}},
            "pipeline.checkpoint_seconds: -1; Input should be greater than or equal to 0",
        ),
        ({"study": "../up"}, "study: '../up'; allowed: up to 64 letters"),
        ({"partitions": {"A": {"scheme": "iid"}, "a": {"scheme": "iid"}}}, "'A' and 'a' differ only in case"),
        (
            {"tasks": {"own": {"task": "files", "train": "no.csv", "text": ["a"], "label": "b"}}},
            "tasks.own: train: no.csv: no such file",
        ),
    ],
)  # fmt: skip
def test_a_message_names_the_place_the_value_and_what_is_allowed(changes, message):
    found = faults(changed(**changes))
    assert any(message in fault for fault in found), found


def test_all_faults_are_reported_at_once_and_very_many_are_cut_short():
    found = faults(changed(federation={"clients": 0, "rounds": 0}, seeds=[-1]))
    assert len(found) == 3
    many = faults(changed(training={f"k{number}": 1 for number in range(500)}))
    assert len(many) < 60 and many[-1] == "study: and 450 more"


def test_a_study_of_endless_runs_is_refused():
    labels = {f"a{number}": {"scheme": "iid"} for number in range(300)}
    methods = {f"m{number}": {"method": "fedavg"} for number in range(300)}
    values = changed(partitions=labels, methods=methods, seeds=list(range(1000)))
    assert faults(values) == ["study: study: 180000000 runs; allowed: at most 1000000"]


@pytest.mark.parametrize("text", ["2e-5", "2E-05", "2.0e-5", "0.00002"])
def test_learning_rates_as_people_write_them(text, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(PLAIN).replace("learning_rate: 0.001", f"learning_rate: {text}"))
    assert reading.load(path).training.learning_rate == 2e-5
