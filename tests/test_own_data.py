"""Data as people have them: what is read, what is refused, what `check` says, and a first study of them."""

import json
import os
import shlex
import subprocess
import time
from pathlib import Path

import datasets
import numpy
import pandas
import pytest
import tiny
import tiny_study
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_faults import mounted
from typer.testing import CliRunner

from fedlm.__main__ import app
from fedlm.base.errors import FailedRun, UserError
from fedlm.base.files import locked
from fedlm.data import tables
from fedlm.data.prepared import Prepared, split_sizes
from fedlm.data.tokenising import tokenise
from fedlm.jobs import obstacles, running
from fedlm.study.check import check
from fedlm.study.plugins import discover_tasks
from fedlm.study.reading import load, parse
from fedlm.study.starter import starter

FILES = discover_tasks()["files"]
LABELS = ["neg", "pos", "neutral"]
ROWS = [(f"text number {index}", LABELS[index % 3]) for index in range(30)]


def written(path: Path, rows=ROWS, head=("text", "label"), separator=",", encoding="utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [separator.join(map(str, row)) for row in [head, *rows]]
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def task(train, **config):
    return FILES({"train": str(train), "text": ["text"], "label": "label", **config})


def classes(task) -> dict[str, int]:
    """Return the classes with their numbers of rows, as `rows` gives them."""
    corpus = task.rows()
    return {name: int((corpus.rows["label"] == index).sum()) for index, name in enumerate(corpus.label_names)}


# ---------------------------------------------------------------------------------------------------------
# Labels


def rows_of(labels):
    return [(f"text {index}", label) for index, label in enumerate(labels)]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_spaces_around_classes_and_groups_do_not_count(tmp_path, ending):
    table = pandas.DataFrame(
        [
            (f"t{i}", label, who)
            for i, (label, who) in enumerate([("neg", "a "), (" neg ", "a"), ("pos\t", " b")])
        ],
        columns=["text", "label", "who"],
    )
    path = tmp_path / f"t.{ending}"
    if ending == "csv":
        table.to_csv(path, index=False)
    elif ending == "jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_parquet(path)
    corpus = task(path, group="who").rows()
    assert corpus.label_names == ["neg", "pos"] and corpus.rows["label"].tolist() == [0, 0, 1]
    assert corpus.group_names == ["a", "b"] and corpus.rows["group"].tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    "word", ["NaN", "NA", "nan", "null", "NULL", "N/A", "None", " NA ", "<NA>", " ", "\t"]
)
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_label_that_reads_as_missing_is_missing(tmp_path, word, ending):
    path = tmp_path / f"t.{ending}"
    rows = rows_of(["a", "b", "a", word, "b"])
    if ending == "csv":
        written(path, rows)
    else:
        path.write_text("".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in rows))
    shown = f", as '{word.strip()}' means" if word.strip() else ""
    with pytest.raises(UserError, match=rf"'label', row 4: the value is missing{shown} \(in 1 of 5 rows\)"):
        task(path).rows()


def test_words_that_only_resemble_missing_ones_are_classes(tmp_path):
    labels = ["none", "nano", "Na", "NB", "0", "-"] * 2
    assert set(classes(task(written(tmp_path / "t.csv", rows_of(labels))))) == set(labels)


def test_values_of_json_are_written_as_they_are_and_not_mixed_up(tmp_path):
    path = tmp_path / "t.jsonl"
    values = [1, 1.0, True, "1", "True"] * 3
    path.write_text("".join(json.dumps({"text": f"t{i}", "label": v}) + "\n" for i, v in enumerate(values)))
    assert classes(task(path)) == {"1": 6, "1.0": 3, "True": 6}
    path.write_text('{"text": "a", "label": ["x"]}\n{"text": "b", "label": "x"}\n')
    with pytest.raises(UserError, match=r"'label', row 1: \['x'\] is not a text or number"):
        task(path).rows()


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (["1", "1.0"], "'1' (3), '1.0' (3)"),
        (["True", "true"], "'True' (3), 'true' (3)"),
        (["very good", "very  good"], "'very  good' (3), 'very good' (3)"),
        (["01", "1", "b"], "'01' (3), '1' (3)"),
        (["neg", "pos"], None),
        (["1", "-1", "10"], None),
        (["infinity", "inf"], None),
    ],
)
def test_classes_that_look_like_one_are_noted(tmp_path, labels, named):
    notes = task(written(tmp_path / "t.csv", rows_of(labels * 3))).examine().notes
    assert notes == ([f"column 'label': different classes that look like one: {named}"] if named else [])


def test_a_class_too_small_for_three_splits_is_noted_after_duplicates_are_gone(tmp_path):
    rows = [*ROWS, ("one", "rare"), ("two", "rare"), ("two", "rare"), ("three", "alone")]
    findings = task(written(tmp_path / "t.csv", rows)).examine()
    assert findings.notes == [
        "column 'label': classes with fewer than 3 examples, which cannot be in all of training, validation "
        "and test: 'alone' (1), 'rare' (2)",
        "left out: 1 rows whose text occurs before, 0 without text",
    ]
    assert findings.classes == {"alone": 1, "neg": 10, "neutral": 10, "pos": 10, "rare": 2}


def test_a_label_of_the_test_file_that_is_written_differently(tmp_path):
    train = written(tmp_path / "a.csv", rows_of(["1", "2"] * 5))
    test = written(tmp_path / "b.csv", rows_of(["1", "2.0"]))
    with pytest.raises(UserError, match=r"row 2: the label '2\.0' does not occur .* file, but '2' does"):
        task(train, test=str(test)).rows()


def test_repeated_headers(tmp_path):
    path = written(tmp_path / "t.csv", [(*row, "x", "y") for row in ROWS], ("text", "label", "note", "note"))
    assert task(path).examine().notes == ["train: columns whose name occurs more than once: 'note'"]
    path = written(tmp_path / "u.csv", [(*row, "x") for row in ROWS], ("text", "label", "label"))
    with pytest.raises(UserError, match="u.csv: there are 2 columns 'label'; allowed: one of that name"):
        task(path).check()


# ---------------------------------------------------------------------------------------------------------
# Encodings and separators

TEXTS = {
    "cp1252": "Le café était très bon à 5 €",
    "cp1250": "zażółć gęślą jaźń, příliš žluťoučký kůň",
    "cp1251": "очень хороший фильм, всем советую",
    "utf-16": "a plain text of Windows",
    "cp1254": "çok güzel bir film, öğretmen ışık",
    "shift-jis": "とても良い映画でした。音楽も素晴らしい、ひどい話ではない",
    "gb18030": "这部电影很好看，推荐给大家",
}


@pytest.mark.parametrize(("encoding", "text"), TEXTS.items())
def test_the_message_names_an_encoding_that_does(tmp_path, encoding, text):
    rows = [(f"{text.replace(',', '')} {index}", label) for index, (_, label) in enumerate(ROWS)]
    path = written(tmp_path / "t.csv", rows, encoding=encoding)
    with pytest.raises(UserError, match="it is not in UTF-8") as raised:
        task(path).check()
    message = str(raised.value)
    named = message.split("add `encoding: ")[1].split("`")[0]
    assert f"iconv -f {named} -t UTF-8" in message and "\n" not in message
    corpus = task(path, encoding=named).rows()
    assert corpus.rows["text"].tolist() == [row[0] for row in rows]


def test_a_single_byte_far_behind_the_beginning_is_found(tmp_path):
    rows = [(f"text {index}", "a") for index in range(20_000)] + [("caf\xe9", "b")]
    path = written(tmp_path / "t.csv", rows, encoding="cp1252")
    with pytest.raises(UserError, match="add `encoding: cp1252`"):
        task(path).examine()
    assert tables.guess_encoding(written(tmp_path / "u.csv", rows)) is None


@pytest.mark.slow
@given(st.text(st.characters(codec="utf-8"), max_size=40), st.integers(0, 8))
@settings(max_examples=100)
def test_utf_8_cut_anywhere_is_utf_8(text, cut):
    content = f"word {text} word".encode()
    assert tables._is_utf_8(content[: max(1, len(content) - cut)])


def test_a_wrong_encoding_in_the_study_is_named(tmp_path):
    path = written(tmp_path / "t.csv", rows_of(["é", "b"] * 3), encoding="cp1252")
    with pytest.raises(UserError, match="it is not in ascii, which `encoding` names"):
        task(path, encoding="ascii").rows()
    for wrong in ("rot13", "utf-99", "base64", ""):
        with pytest.raises(ValueError, match="encoding"):
            task(path, encoding=wrong)


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_another_separator_is_named_and_can_be_set(tmp_path, separator):
    path = written(
        tmp_path / "t.csv", [(f"a, b {i}", label) for i, (_, label) in enumerate(ROWS)], separator=separator
    )
    with pytest.raises(UserError, match="its columns are separated by ") as raised:
        task(path).check()
    setting = yaml.safe_load(str(raised.value).split("add `")[1].split("`")[0])
    assert setting == {"separator": separator}
    assert classes(task(path, **setting)) == {"neg": 10, "neutral": 10, "pos": 10}


def test_a_tsv_has_tabs(tmp_path):
    path = written(tmp_path / "t.tsv", separator="\t")
    assert classes(task(path)) == {"neg": 10, "neutral": 10, "pos": 10}


# ---------------------------------------------------------------------------------------------------------
# Folders


def same_as_csv(folder, tmp_path, **config) -> None:
    """The task of a folder has the rows of a csv file with the same content, in whatever order."""
    one = task(written(tmp_path / "same.csv")).rows()
    other = task(folder, **config).rows()
    assert other.label_names == one.label_names
    expected = sorted(one.rows[["text", "label"]].itertuples(index=False, name=None))
    assert sorted(other.rows[["text", "label"]].itertuples(index=False, name=None)) == expected


def hub_data(rows=ROWS):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=LABELS)}
    )
    table = {"text": [row[0] for row in rows], "label": [LABELS.index(row[1]) for row in rows]}
    return datasets.Dataset.from_dict(table, features)


def test_a_data_set_saved_with_save_to_disk(tmp_path):
    datasets.disable_progress_bars()
    hub_data().save_to_disk(tmp_path / "saved", num_shards=2)
    same_as_csv(tmp_path / "saved", tmp_path)
    assert [path.suffix for path in task(tmp_path / "saved").files()] == [".arrow"] * 2
    shuffled = hub_data().shuffle(seed=1).select(range(12))
    shuffled.save_to_disk(tmp_path / "some")
    assert task(tmp_path / "some").rows().rows["text"].tolist() == shuffled["text"][:]


def test_the_splits_of_a_saved_data_set_are_official(tmp_path):
    datasets.disable_progress_bars()
    saved = datasets.DatasetDict(
        {"train": hub_data(ROWS[:20]), "test": hub_data(ROWS[20:]), "more": hub_data()}
    )
    saved.save_to_disk(tmp_path / "saved")
    corpus = task(tmp_path / "saved").load()
    assert corpus.rows["split"].value_counts().to_dict() == {"train": 20, "test": 10}
    # A split that the study names itself comes from there.
    own = written(tmp_path / "own.csv", [("another text", "pos")])
    corpus = task(tmp_path / "saved", test=str(own)).load()
    assert corpus.rows["split"].value_counts().to_dict() == {"train": 20, "test": 1}
    with pytest.raises(UserError, match="validation: .*there is no split 'validation'; it has: train, test"):
        task(tmp_path / "saved", validation=str(tmp_path / "saved")).check()
    (tmp_path / "saved" / "train" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="not a whole data set of save_to_disk"):
        task(tmp_path / "saved").check()


def test_hidden_labels_are_missing(tmp_path):
    datasets.disable_progress_bars()
    hidden = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [-1, 0]}, hub_data().features)
    hidden.save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="'label', row 1: the value is missing"):
        task(tmp_path / "saved").rows()


@pytest.mark.parametrize("where", ["", "data"])
def test_a_folder_of_parquet_files(tmp_path, where):
    folder = tmp_path / "parquet" / where
    folder.mkdir(parents=True)
    for part in range(3):
        table = pandas.DataFrame(ROWS[part * 10 : (part + 1) * 10], columns=["text", "label"])
        table.to_parquet(folder / f"part-{part}.parquet")
    same_as_csv(tmp_path / "parquet", tmp_path)


def test_a_folder_of_parquet_files_as_the_hub_names_them(tmp_path):
    for split, rows in {"train": ROWS[:20], "test": ROWS[20:]}.items():
        pandas.DataFrame(rows, columns=["text", "label"]).to_parquet(
            tmp_path / f"{split}-00000-of-00001.parquet"
        )
    assert task(tmp_path).load().rows["split"].value_counts().to_dict() == {"train": 20, "test": 10}


def test_a_folder_of_text_files_for_each_class(tmp_path):
    for number, (text, label) in enumerate(ROWS):
        path = tmp_path / "texts" / label / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "texts" / "README.md").write_text("not a text of any class")
    same_as_csv(tmp_path / "texts", tmp_path)
    os.rename(tmp_path / "texts", tmp_path / "train")
    (tmp_path / "test" / "pos").mkdir(parents=True)
    (tmp_path / "test" / "pos" / "1.txt").write_text("one more")
    assert task(tmp_path).load().rows["split"].value_counts().to_dict() == {"train": 30, "test": 1}


def test_a_text_file_for_each_class(tmp_path):
    for label in LABELS:
        lines = "".join(f"{text}\n\n" for text, other in ROWS if other == label)
        (tmp_path / "lines").mkdir(exist_ok=True)
        (tmp_path / "lines" / f"{label}.txt").write_text(lines)
    same_as_csv(tmp_path / "lines", tmp_path)
    (tmp_path / "lines" / "pos.txt").write_bytes("très bien\n".encode("cp1252"))
    with pytest.raises(UserError, match=r"not in UTF-8 \(pos.txt\).*encoding: cp1252"):
        task(tmp_path / "lines").rows()


def test_a_folder_with_nothing_in_it_says_what_would_do(tmp_path):
    with pytest.raises(UserError, match="nothing in this folder that can be read; allowed: .*save_to_disk"):
        task(tmp_path).check()


# ---------------------------------------------------------------------------------------------------------
# Check


@given(
    st.integers(1, 300),
    st.integers(0, 5),
    st.integers(0, 5),
    st.floats(0.01, 0.49),
    st.floats(0.01, 0.49),
    st.one_of(st.none(), st.integers(1, 400)),
    st.one_of(st.none(), st.integers(1, 40)),
)
@settings(max_examples=200)
def test_the_sizes_of_splits_are_known_before_they_are_drawn(
    training, validation, test, one, other, most, cap
):
    shares, caps = {"validation": one, "test": other}, {"train": most, "validation": cap, "test": cap}
    columns = {
        "split": numpy.repeat([0, 2, 3], [training, validation, test]),
        "label": numpy.arange(training + validation + test) % 3,
        "example_offsets": numpy.arange(training + validation + test + 1),
    }
    data = Prepared({"task": "t", "kind": "classification", "shares": shares, "caps": caps}, columns)
    sizes = split_sizes(training, {"validation": validation, "test": test}, shares, caps)
    try:
        drawn = {name: len(part) for name, part in data.split(0)._asdict().items()}
    except UserError:
        assert 0 in sizes.values()
    else:
        assert sizes == drawn


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tiny_study.write(tmp_path_factory.mktemp("plain"), methods={"head_only": None})
    return yaml.safe_load(path.read_text())


def with_data(plain, path, **changes):
    films = {**plain["tasks"]["films"], "train": str(path)}
    return parse({**plain, "tasks": {"films": films}, **changes})


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (rows_of(["a", "", "b"]), {}, "tasks.films: train: .*row 2: the value is missing"),
        (rows_of(["a"] * 9), {}, "all examples are of the class 'a'; allowed: at least 2"),
        ([("same", label) for label in "ab"], {}, "all examples are of the class 'a'"),
        ([("", label) for label in "ab"], {}, "no example is left"),
        (rows_of(["a", "b"]), {}, "2 examples are too few for a"),
        (rows_of(["a", "b"] * 5), {"federation": {"clients": 9}}, "need 9 training examples, .* are 7"),
        (
            rows_of(["a", "b"] * 5),
            {"partitions": {"labels": {"labels_per_client": 3}}},
            "the training examples have 2 labels",
        ),
    ],
)  # fmt: skip
def test_check_refuses_what_preparing_or_dividing_would_refuse(tmp_path, plain, rows, changes, message):
    with pytest.raises(UserError, match=message) as raised:
        check(with_data(plain, written(tmp_path / "t.csv", rows), **changes))
    assert "\n" not in str(raised.value)


def test_check_reads_the_data_once(tmp_path, plain, monkeypatch):
    path, read = written(tmp_path / "t.csv"), []
    real = tables._read_csv
    monkeypatch.setattr(tables, "_read_csv", lambda *given: read.append(given[1]) or real(*given))
    assert check(with_data(plain, path, partitions={"labels": {"labels_per_client": 2}})) == []
    assert [columns for columns in read if columns] == [["text", "label"]]


def test_the_command_prints_notes_and_passes(tmp_path, plain):
    path = written(tmp_path / "t.csv", [*ROWS, ("one", "rare")])
    films = {**plain["tasks"]["films"], "train": str(path)}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**plain, "tasks": {"films": films}}))
    done = CliRunner().invoke(app, ["check", str(tmp_path / "study.yaml")])
    assert done.exit_code == 0 and "is valid: 1 runs" in done.stdout
    assert "note: tasks.films: column 'label': classes with fewer than 3 examples" in done.stderr


@pytest.mark.slow
def test_classes_are_printed_when_data_are_prepared_and_stand_in_the_record(tmp_path, plain):
    rows = [*ROWS, ("text number 0", "neg"), ("text number 1", "pos")]
    study, lines = with_data(plain, written(tmp_path / "t.csv", rows)), []
    folders = running.Folders("study", tmp_path)
    run = next(study.runs())
    running.execute(study, run, tmp_path / "record.json", folders, lines.append)
    assert lines[0] == "films: 30 examples; left out: 2 duplicates; 3 classes: neg 10, neutral 10, pos 10"
    record = json.loads((tmp_path / "record.json").read_text())
    assert [entry["name"] for entry in record["classes"]] == ["neg", "neutral", "pos"]
    for split, count in record["examples"].items():
        assert sum(entry[split] for entry in record["classes"]) == count
    assert all(entry["train"] + entry["validation"] + entry["test"] == 10 for entry in record["classes"])
    # Neither changes the hash of the data.
    assert "classes" not in json.loads((folders.task("films") / "task.json").read_text())


def test_a_kind_without_classes_has_none(tmp_path):
    rows = rows_of([index / 7 for index in range(30)])
    made = task(written(tmp_path / "t.csv", rows), kind="regression")
    data = tokenise(made, made.load(), tiny.tokenizer())
    assert data.class_counts() == [] and running.describe(data) == "30 examples"


def test_a_split_that_is_smaller_than_asked_for_is_printed(tmp_path):
    made = task(written(tmp_path / "t.csv", ROWS), train_examples=5, validation_examples=6, test_examples=50)
    data = tokenise(made, made.load(), tiny.tokenizer())
    assert len(data.split(0).test) == 6
    assert running.describe(data).endswith("; only 6 of 50 examples for test")


def test_a_run_without_output_goes_to_its_place(tmp_path, plain):
    films = {**plain["tasks"]["films"], "train": str(written(tmp_path / "t.csv"))}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**plain, "tasks": {"films": films}}))
    labels = ["--task", "films", "--partition", "iid", "--method", "head_only", "--seed", "1"]
    where = ["--config", str(tmp_path / "study.yaml"), "--results", str(tmp_path / "results")]
    done = CliRunner().invoke(app, ["run", *where, *labels])
    assert done.exit_code == 0, done.output
    record = tmp_path / "results" / "study" / "runs" / "films" / "iid" / "head_only" / "seed1.json"
    assert json.loads(record.read_text())["status"] == "finished"


# ---------------------------------------------------------------------------------------------------------
# What stands in the way


def test_a_file_from_the_future_is_named_with_the_remedy(tmp_path, plain):
    path = written(tmp_path / "my data.csv")
    study = with_data(plain, path)
    obstacles.check_times(study)
    os.utime(path, (time.time(), time.time() + 86_400))
    with pytest.raises(
        UserError, match=r"tasks.films: .*my data.csv: its time stamp is in the future"
    ) as raised:
        obstacles.check_times(study)
    remedy = str(raised.value).rpartition("put it right: ")[2]
    subprocess.run(shlex.split(remedy), check=True)
    obstacles.check_times(study)


def test_folders_that_cannot_be_written(tmp_path):
    obstacles.check_writable([tmp_path, tmp_path / "not" / "there"])
    (tmp_path / "file").write_text("")
    with pytest.raises(FailedRun, match="a file is where a folder should be"):
        obstacles.check_writable([tmp_path / "file" / "results"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_disk_that_is_read_only(tmp_path):
    with mounted(tmp_path / "disk", "size=1m,ro"), pytest.raises(FailedRun) as raised:
        obstacles.check_writable([tmp_path / "disk" / "results"])
    reason = "the file system is read-only; make it writable, or start in a folder that is"
    assert str(raised.value) == f"{tmp_path}/disk/results: {reason}"


def test_a_run_that_goes_on_is_announced_with_its_process(tmp_path, plain):
    study = parse(plain)
    folders, run = running.Folders("study", tmp_path), next(study.runs())
    assert obstacles.announce(study, folders.root) == []
    (tmp_path / "file").write_text("where a folder should be")
    assert obstacles.announce(study, tmp_path / "file") == []
    with locked(folders.checkpoints(run) / "lock", lambda: None):
        assert list(obstacles.in_progress(study, folders.root)) == [(run, None)]
        (folders.checkpoints(run) / "lock").write_text("123")
        (line,) = obstacles.announce(study, folders.root)
        assert line.startswith(
            "films/iid/head_only/seed1: process 123 of an earlier run of the pipeline is still making it"
        )
        assert line.endswith("to end it instead: kill 123")
    assert obstacles.announce(study, folders.root) == []


def test_a_trial_that_goes_on_is_announced_too(tmp_path, plain):
    tuned = {
        "tuning": {"seed": 9, "trials": 2, "partitions": {"films": "iid"}},
        "methods": {"head_only": None},
    }
    study = parse({**plain, **tuned})
    folders, trial = running.Folders("study", tmp_path), list(study.trials())[1]
    with locked(folders.checkpoints(trial) / "lock", lambda: None):
        (line,) = obstacles.announce(study, folders.root)
    assert line.startswith(
        "films/iid/head_only/trial1: a process of an earlier run of the pipeline is still making it"
    )


def test_a_run_writes_its_process_down(tmp_path, plain):
    study, seen = parse(plain), []
    folders, run = running.Folders("study", tmp_path), next(study.runs())
    running.execute(
        study,
        run,
        tmp_path / "record.json",
        folders,
        lambda line: seen.append(list(obstacles.in_progress(study, folders.root))),
    )
    assert seen and all(found == [(run, os.getpid())] for found in seen)
    assert list(obstacles.in_progress(study, folders.root)) == []


# ---------------------------------------------------------------------------------------------------------
# The first study


def many(path, label, count=300, **options):
    rows = [(f"title {i}", f"body {i} of {i % 7}", label(i), f"shop{i % 3}") for i in range(count)]
    return written(path, rows, ("title", "body", "stars", "shop"), **options)


def test_the_first_study_of_a_csv_file_is_short_and_valid(tmp_path):
    path = many(tmp_path / "my reviews.csv", lambda i: i % 3)
    text, notes = starter(str(path), ["title", "body"], "stars", "shop")
    lines = text.splitlines()
    assert len(lines) == 9 and sum("#" in line for line in lines) >= 7 and notes == []
    study = parse(yaml.safe_load(text))
    check(study)
    assert study.study == "my_reviews" and study.tasks["my_reviews"].settings.text == ["title", "body"]
    assert list(study.partitions) == ["iid", "dirichlet_0.3", "natural"] and study.federation.clients == 8
    assert "fedavg" in study.methods


@pytest.mark.parametrize(
    ("count", "clients", "capped"), [(3, 1, False), (12, 2, False), (100, 3, False), (3000, 8, True)]
)
def test_clients_and_examples_fit_the_data(tmp_path, count, clients, capped):
    text, _ = starter(str(many(tmp_path / "r.csv", lambda i: i % 2, count)), ["body"], "stars")
    study = parse(yaml.safe_load(text))
    assert study.federation.clients == clients
    assert (study.tasks["r"].settings.train_examples is not None) == capped
    assert list(study.partitions) == ["iid", "dirichlet_0.3"]


@pytest.mark.parametrize(
    ("label", "kind", "model"),
    [
        (lambda i: i % 5, "classification", "minilm"),
        (lambda i: i / 7, "regression", "minilm"),
        (lambda i: f"the answer to {i}", "causal", "smollm2"),
    ],
)
def test_the_kind_follows_from_the_label(tmp_path, label, kind, model):
    text, _ = starter(str(many(tmp_path / "r.csv", label)), ["title", "body"], "stars")
    study = parse(yaml.safe_load(text))
    assert study.tasks["r"].settings.kind == kind and study.model.source == model


def test_separator_and_encoding_are_in_the_study(tmp_path):
    path = many(tmp_path / "r.csv", lambda i: ["très bien", "mal"][i % 2], separator=";", encoding="cp1252")
    settings = parse(yaml.safe_load(starter(str(path), ["title", "body"], "stars")[0])).tasks["r"].settings
    assert (settings.separator, settings.encoding) == (";", "cp1252")


def test_a_folder_can_be_the_data_of_the_first_study(tmp_path):
    for label in LABELS:
        path = tmp_path / "texts" / f"{label}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{text}\n" for text, other in ROWS if other == label))
    study = parse(yaml.safe_load(starter(str(tmp_path / "texts"), ["text"], "label")[0]))
    assert study.task("texts").examine().classes == dict.fromkeys(sorted(LABELS), 10)


@pytest.mark.parametrize(
    ("text", "label", "message"),
    [
        ("words", "stars", "there is no column 'words'; it has: title, body, stars, shop"),
        ("title", "star", "there is no column 'star'"),
        ("title,body,shop", "stars", "allowed for classification: 1 to 2 columns"),
        ("title", "shop", None),
    ],
)
def test_the_command_prints_the_study_and_what_follows_apart(tmp_path, text, label, message):
    path = many(tmp_path / "r.csv", lambda i: i % 3)
    done = CliRunner().invoke(app, ["init", "--data", str(path), "--text", text, "--label", label])
    if message:
        assert isinstance(done.exception, UserError) and message in str(done.exception)
        assert done.stdout == ""
        return
    assert done.exit_code == 0, done.output
    (tmp_path / "r.yaml").write_text(done.stdout)
    check(load(tmp_path / "r.yaml"))
    follow = [line.strip() for line in done.stderr.splitlines() if line.startswith("    ")]
    assert follow == ["python -m fedlm check r.yaml", "snakemake --configfile r.yaml --cores all"]
    assert sorted(found.name for found in tmp_path.iterdir()) == ["r.csv", "r.yaml"]


@pytest.mark.slow
def test_the_first_study_runs(tmp_path):
    path = many(tmp_path / "r.csv", lambda i: i % 2, count=60)
    study = parse(yaml.safe_load(starter(str(path), ["title", "body"], "stars")[0]))
    folders = running.Folders(study.study, tmp_path / "results")
    for method in ("head_only", "fedavg"):
        run = next(run for run in study.runs() if run.method == method and run.partition == "dirichlet_0.3")
        running.execute(study, run, folders.record(run), folders, lambda line: None)
        assert 0 <= json.loads(folders.record(run).read_text())["test_score"] <= 1


def test_every_example_of_the_page_on_tasks_is_valid(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "adding-a-task.md").read_text()
    first, second, *rest = [part.split("```")[0] for part in page.split("```python\n")[1:]]
    assert not rest
    # The second goes on where the first ended: a setting of the same task.
    settled = (
        first + second.replace("class Weather(Task)", "class Settled(Weather)") + '    name = "settled"\n'
    )
    (tmp_path / "settled.py").write_text(settled)
    assert discover_tasks(tmp_path)["settled"]({"language": "de"}).config.language == "de"
    blocks = [yaml.safe_load(part.split("```")[0]) for part in page.split("```yaml\n")[1:]]
    own = next(block["tasks"]["tickets"] for block in blocks if "tickets" in block["tasks"])
    assert own.pop("task") == "files" and FILES(own).config.encoding == "cp1252"
