"""Bad studies and bad data: each ends in lines that name the place, or runs; no traceback, no hang."""

import copy
import csv
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_study
import yaml

from fedlm.base.errors import UserError
from fedlm.jobs import running
from fedlm.study import reading
from fedlm.study.check import check

ROOT = Path(__file__).resolve().parent.parent
SLOWEST = 60  # seconds for one study, on a busy machine; an alias of aliases that is unfolded never ends


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A valid study with most kinds of settings in it; its data and model are tiny."""
    folder = tmp_path_factory.mktemp("malformed")
    path = tiny_study.write(folder)
    values = yaml.safe_load(path.read_text())
    values["partitions"] |= {
        "skewed": {"scheme": "dirichlet", "alpha": 0.3, "min_examples": 2},
        "labels": {"labels_per_client": 1},
    }
    values["methods"] |= {
        "cyclic": {"method": "fedcybgd", "order": "random", "training": {"learning_rate": 1e-4}},
        "fedlora": {"rank": 4, "tasks": ["films"], "partitions": ["iid"], "title": "LoRA"},
        "pruned": {"method": "fedcybgd", "compression": {"operator": "prune", "sparsity": 0.5}},
        "fedprompt": {"form": "prefix", "tokens": 4},
    }
    values["pipeline"] = {"threads": 1, "minutes": 5}
    check(reading.parse(copy.deepcopy(values)))
    return values


def outcome(read) -> str | None:
    """Return the error message of a study, None if it is valid; anything but a UserError is raised."""
    started = time.monotonic()
    try:
        study = read()
        check(study)
        for _, run in zip(range(100), study.runs(), strict=False):
            study.run(*run).resolved()
        message = None
    except UserError as error:
        message = str(error)
        assert message.strip()
        for line in message.splitlines():
            assert line.isprintable() and len(line) < 1500 and ": " in line, line
    assert time.monotonic() - started < SLOWEST
    return message


# ---------------------------------------------------------------------------------------------------------
# Files that are not studies, each with a part of the expected message.

EXPLODES = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (97 + i, 97 + i, b",".join([b"*%c" % (96 + i)] * 9)) for i in range(1, 20)
)
NO_TAG = "could not determine a constructor"
FILES = {
    "empty": (b"", "None"),
    "blank": (b"\n\n  \n", "None"),
    "comment": (b"# nothing\n", "None"),
    "a word": (b"study", "allowed: a table"),
    "a number": (b"42", "allowed: a table"),
    "a list": (b"- study\n- seeds\n", "allowed: a table"),
    "null": (b"null", "allowed: a table"),
    "not UTF-8": (b"study: caf\xe9\n", "not UTF-8 (byte 10)"),
    "UTF-16": ("study: a".encode("utf-16"), "not UTF-8"),
    "null bytes": (b"study: a\0b\n", "not valid YAML"),
    "bell": (b"study: a\x07b\n", "not valid YAML"),
    "binary": (bytes(range(256)) * 10, "not UTF-8"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0", "not UTF-8"),
    "tabs": (b"study:\n\tseeds: 1\n", "not valid YAML"),
    "unclosed list": (b"seeds: [1, 2\n", "not valid YAML"),
    "unclosed table": (b"model: {source: a\n", "not valid YAML"),
    "unclosed text": (b'study: "a\n', "not valid YAML"),
    "two documents": (b"study: a\n---\nstudy: b\n", "not valid YAML"),
    "key given twice": (b"study: a\nstudy: b\n", "line 2: key 'study' is given twice"),
    "nested key given twice": (b"training:\n  momentum: 0\n  momentum: 0.9\n", "line 3: key 'momentum'"),
    "key a list": (b"? [a, b]\n: c\n", "a key must be a word or number"),
    "key a table": (b"? {a: b}\n: c\n", "a key must be a word or number"),
    "anchor and alias": (b"a: &x [1]\nb: *x\n", "line 2: alias *x; allowed: no anchors and aliases"),
    "aliases that explode": (EXPLODES, "alias *a"),
    "alias to itself": (b"a: &x [*x]\n", "alias *x"),
    "table in itself": (b"&x\na: *x\n", "alias *x"),
    "alias to nothing": (b"a: *x\n", "alias *x"),
    "merge key": (b"study: a\n<<: {seeds: [1]}\n", "<<"),
    "Python object": (b"study: !!python/object/apply:os.system ['true']\n", NO_TAG),
    "Python name": (b"study: !!python/name:os.system\n", NO_TAG),
    "Python module": (b"!!python/module:os\n", NO_TAG),
    "Python tuple": (b"seeds: !!python/tuple [1]\n", NO_TAG),
    "unknown tag": (b"study: !secret a\n", NO_TAG),
    "empty whole number": (b'seeds: [!!int ""]\n', "not valid YAML"),
    "word as number": (b"seeds: [!!int one]\n", "not valid YAML"),
    "word as decimal": (b"seeds: [!!float one]\n", "not valid YAML"),
    "word as truth": (b"seeds: [!!bool maybe]\n", "not valid YAML"),
    "word as date": (b"seeds: [!!timestamp today]\n", "not valid YAML"),
    "impossible date": (b"study: 2026-13-45\n", "not valid YAML"),
    "bad base64": (b"study: !!binary 'a'\n", "not valid YAML"),
    "number of 101 digits": (b"seeds: [" + b"9" * 101 + b"]\n", "allowed: a number in decimal digits"),
    "number of 200 kB": (b"seeds: [" + b"9" * 200_000 + b"]\n", "allowed: a number in decimal digits"),
    "hexadecimal of 200 kB": (b"seeds: [0x" + b"f" * 200_000 + b"]\n", "allowed: a number in decimal digits"),
    "base 60": (b"seeds: [1:30]\n", "'1:30'; allowed: a number in decimal digits"),
    "base 60 of 200 kB": (b"seeds: [1" + b":59" * 60_000 + b"]\n", "allowed: a number in decimal digits"),
    "base 60 fraction": (b"seeds: [1" + b":59" * 300 + b".5]\n", "allowed: a number in decimal digits"),
    "nested lists": (b"study: " + b"[" * 50_000, "nested too deeply"),
    "nested tables": (b"{a: " * 50_000, "nested too deeply"),
    "nested by indent": (b"\n".join(b" " * i + b"a:" for i in range(600)), "nested too deeply"),
    "dashes": (b"- " * 50_000, "nested too deeply"),
    "10 MB": (b"# padding\n" * 1_000_000, "larger than 256 KiB"),
    "endless text": (b"study: " + b"a" * 200_000, "study: 'aaaa"),
    "100,000 seeds": (b"seeds: [" + b"1," * 100_000 + b"1]\n", "seeds: [1, 1, "),
    "10,000 unknown keys": (b"".join(b"k%d: 1\n" % i for i in range(10_000)), "more"),
    "JSON cut off": (b'{"study": "a", "tasks": {', "not valid YAML"),
    "question mark": (b"?", "None: unknown key"),
    "percent": (b"%YAML 9.9\n---\na: b\n", "not valid YAML"),
    "byte order mark": (b"\xef\xbb\xbfcolour: red\n", "colour: unknown key"),
    "windows lines": (b"colour: red\r\n", "colour: unknown key"),
    "key a number": (b"1: a\n", "1: unknown key"),
    "key true": (b"yes: a\n", "True: unknown key"),
    "long key": (b'? "' + b"k" * 200_000 + b'"\n: 1\n', "unknown key"),
    "key with lines": (b'"a\\nb\\u202e": 1\n', "a\\nb\\u202e: unknown key"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_study(name, tmp_path):
    content, message = FILES[name]
    path = tmp_path / "study.yaml"
    path.write_bytes(content)
    found = outcome(lambda: reading.load(path))
    assert found and message in found
    assert all(line.startswith(f"{path}: ") for line in found.splitlines())


def test_a_path_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "absent", tmp_path, tmp_path / "pipe", Path("/dev/zero"), tmp_path / ("x" * 300)):
        found = outcome(lambda path=path: reading.load(path))
        assert found and str(path) in found


# ---------------------------------------------------------------------------------------------------------
# Values, at every place of a valid study.

HUGE = 10**99  # the reader refuses longer ones
NASTY = [
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, 2**64, -(2**63), HUGE, -HUGE, 0.0, -0.0, 0.5, -0.1, 1e-320,
    1e308, float("nan"), float("inf"), -float("inf"), "", " ", "0", "1", "nan", "1e5", "true", "null",
    "iid", "adamw",
    "fedavg", "minilm", "films", "a b", "a/b", "../../etc", "..", ".", "/", "/etc/passwd", "~", "~root",
    "~nobody_here/x",
    "a\0b", "a\nb", "\x1b[31m", "é", "日本語", "\u202eabc", "\ud800", "a" * 70, "a" * 5000,
    "x" * 300 + ".csv", "http://a/b", "{x}",
    "$(touch x)", "; rm x", "%s", "con", "-x", [], [None], [1, 1], [-1], ["films"], [["films"]], [True],
    {}, {"a": 1},
    {1: 2}, {None: 1}, {"": 1}, {"scheme": "iid"}, {"source": "minilm"}, {"source": ""},
    {"operator": "prune"},
    {"a": {"b": {"c": {}}}}, b"bytes", (1, 2), {1, 2},
]  # fmt: skip


def places(values, path=()):
    """Yield the path of every value in a study, tables and lists included."""
    yield path
    items = (
        values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    )
    for key, value in items:
        yield from places(value, (*path, key))


def at(values, path):
    for key in path:
        values = values[key]
    return values


def put(values, path, value):
    values = copy.deepcopy(values)
    if not path:
        return value
    at(values, path[:-1])[path[-1]] = value
    return values


def read(values):
    """Parse a study of plain values; what is no table is refused before, when the file is read."""
    return lambda: reading.parse(copy.deepcopy(values), "study")


@pytest.mark.slow
def test_every_nasty_value_at_every_place(plain):
    """Some 2,100 studies. A wrong value may be harmless, but then the study can be resolved."""
    refused = tried = 0
    draw = random.Random(0)
    for path in places(plain):
        if not path:
            continue
        for value in draw.sample(NASTY, 40):
            message = outcome(read(put(plain, path, value)))
            refused += message is not None
            assert message is None or any(str(key) in message for key in path), (path, value, message)
            tried += 1
    assert tried > 2000 and refused > 0.7 * tried


@pytest.mark.slow
def test_many_wrong_things_at_once(plain):
    draw = random.Random(1)
    for _ in range(300):
        values = copy.deepcopy(plain)
        for _ in range(draw.randint(2, 6)):
            path = draw.choice([path for path in places(values) if path])
            match draw.choice(["put", "remove", "rename", "move", "add"]):
                case "put":
                    values = put(values, path, draw.choice(NASTY))
                case "remove":
                    del at(values, path[:-1])[path[-1]]
                case "rename" if isinstance(path[-1], str):
                    table = at(values, path[:-1])
                    name = draw.choice([value for value in NASTY if isinstance(value, str | int | float)])
                    table[name] = table.pop(path[-1])
                case "move":
                    values = put(
                        values, path, copy.deepcopy(at(values, draw.choice(list(places(values))[1:])))
                    )
                case "add" if isinstance(at(values, path), dict):
                    name = draw.choice(["colour", "method", "task", "scheme", "training", "model", 1, None])
                    at(values, path)[name] = draw.choice(NASTY)
            if len(list(places(values))) < 2:
                break
        outcome(read(values))


LABELS = [
    "", ".", "..", "../a", "a/b", "/a", "a\\b", "a b", " a", "-a", "_a", "+a", ".a", "a.", "a:", "a*",
    "a?", "a\0b", "a\n",
    "é", "Ａ", "日本", "a\u0301", "\u202ea", "a" * 65, "~", "$HOME", "`x`", "a;b", "{a}", "a|b", "a,b",
    "%2e%2e", "\r", "😀",
]  # fmt: skip


@pytest.mark.parametrize("section", ["tasks", "partitions", "methods"])
@pytest.mark.parametrize("label", LABELS)
def test_labels_that_are_no_names(section, label, plain):
    values = copy.deepcopy(plain)
    values[section][label] = values[section].pop(next(iter(values[section])))
    found = outcome(read(values))
    assert found and f"{section}: label " in found


@pytest.mark.parametrize("label", [*LABELS[:-1], 1, True, None, [], {}])
def test_names_of_studies_that_are_none(label, plain):
    if label in ("a.", "_a", "+a", "-a"):
        label += "/"
    assert "study: " in outcome(read({**plain, "study": label}))


def test_a_word_of_what_is_missing(plain):
    for key in ("study", "tasks", "partitions", "methods"):
        assert f"{key}: " in outcome(read({k: v for k, v in plain.items() if k != key}))
    required = {("tasks", "films", "train"), ("tasks", "films", "text"), ("tasks", "films", "label")}
    for path in required:
        values = copy.deepcopy(plain)
        del at(values, path[:-1])[path[-1]]
        assert ".".join(path) + ": missing" in outcome(read(values))


# ---------------------------------------------------------------------------------------------------------
# The command line.


def fedlm(*arguments, cwd=ROOT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "fedlm", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env=environment,
    )


BY_COMMAND = ["not UTF-8", "aliases that explode", "Python object", "nested lists", "10 MB", "empty"]


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_COMMAND)
def test_the_command_line_prints_it_and_exits_with_2(name, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_bytes(FILES[name][0])
    done = fedlm("check", path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.startswith(f"error: {path}: ")
    assert done.stdout == ""


@pytest.mark.slow
def test_bad_arguments_of_the_command_line(plain, tmp_path):
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(plain))
    run = ["run", "--config", study, "--partition", "iid", "--seed", 1, "--output", tmp_path / "x.json"]
    for arguments in (
        [*run, "--task", "films", "--method", "nothing"],
        [*run, "--task", "../films", "--method", "fedavg"],
        ["check", tmp_path / "absent.yaml"],
        ["rerun", study],
        ["nothing"],
    ):
        done = fedlm(*arguments, cwd=tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.strip()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["study.yaml"]


# ---------------------------------------------------------------------------------------------------------
# Data: through preparing, dividing and a run.

SIDES = {"good": "yes", "bad": "no"}
GOOD = [(f"the film was {word} {number}", SIDES[word]) for number in range(12) for word in SIDES]
ONE_CLASS = "all examples are of the class 'yes'; allowed: at least 2"
TABLES = {
    "one example": (GOOD[:1], ONE_CLASS),
    "two examples": (GOOD[:2], "too few"),
    "three examples": (GOOD[:3], None),
    "one class": ([row for row in GOOD if row[1] == "yes"], ONE_CLASS),
    "header only": ([], "it has no rows"),
    "empty texts": ([("", label) for _, label in GOOD], "no example is left"),
    "blank texts": ([(" \t ", label) for _, label in GOOD], "no example is left"),
    "some empty texts": ([*GOOD, ("", "yes"), (" ", "no")], None),
    "one text": ([("the same", label) for _, label in GOOD], "all examples are of the class"),
    "missing label": ([*GOOD, ("the end", "")], "column 'label', row 25: the value is missing"),
    "a label once": ([*GOOD, ("the end", "maybe")], None),
    "10 MB in one text": ([*GOOD, ("word " * 2_000_000, "yes")], None),
    "10 MB in one word": ([*GOOD, ("x" * 10_000_000, "no")], None),
    "unknown words": ([(f"{'zqx' * 3}{number}", label) for number, (_, label) in enumerate(GOOD)], None),
    "unicode": ([(f"日本語 é \u202e 😀 {number}", label) for number, (_, label) in enumerate(GOOD)], None),
    "null bytes": ([(f"a\0b {number}", label) for number, (_, label) in enumerate(GOOD)], None),
    "lines in texts": ([(f"a\nb\r\n{number}", label) for number, (_, label) in enumerate(GOOD)], None),
    "labels that are long": ([(text, label * 5000) for text, label in GOOD], None),
    "labels that are paths": ([(text, f"../{label}") for text, label in GOOD], None),
    "labels in TeX": ([(text, f"\\{label}_%$&{{") for text, label in GOOD], None),
    "labels nan and null": (
        [(text, "nan" if label == "yes" else "null") for text, label in GOOD],
        "column 'label', row 1: the value is missing, as 'nan' means (in 24 of 24 rows)",
    ),
    "a class per example": ([(text, str(number)) for number, (text, _) in enumerate(GOOD)], None),
}  # fmt: skip


def study_of(plain, path, **task):
    values = copy.deepcopy(plain)
    values["tasks"]["films"] = {**values["tasks"]["films"], "train": str(path), **task}
    values["partitions"], values["methods"] = {"iid": None}, {"head_only": None}
    values["federation"] = {"clients": 1, "rounds": 1}
    return values


def through(values, folder):
    """Take a study from its check to the record of its run."""
    study = reading.parse(values)
    check(study)
    folders = running.Folders("study", folder)
    run = next(study.runs())
    running.execute(study, run, folders.record(run), folders, lambda line: None)
    return json.loads(folders.record(run).read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_data_that_are_odd(name, plain, tmp_path):
    rows, message = TABLES[name]
    with (tmp_path / "data.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    values = study_of(plain, tmp_path / "data.csv")
    if message is None:
        record = through(values, tmp_path / "results")
        assert 0 <= record["test_score"] <= 1
        return
    with pytest.raises(UserError) as error:
        through(values, tmp_path / "results")
    assert message in str(error.value) and "\n" not in str(error.value)


CONTENTS = {
    "empty": (b"", ".csv", "it cannot be read as csv"),
    "not UTF-8": (b"text,label\ncaf\xe9,yes\n", ".csv", "it is not in UTF-8"),
    "no such column": (b"words,label\na,yes\n", ".csv", "there is no column 'text'; it has: words, label"),
    "a value too many": (b"text,label\na,yes,no\nb,no\n", ".csv", "it cannot be read as csv"),
    "unclosed quote": (b'text,label\n"a,yes\n', ".csv", "it cannot be read as csv"),
    "other ending": (
        b"text,label\na,yes\n",
        ".pickle",
        "allowed: a file that ends in .csv, .parquet or .jsonl",
    ),
    "no parquet": (b"PAR1" + b"\0" * 100, ".parquet", "it cannot be read as parquet"),
    "empty parquet": (b"", ".parquet", "it cannot be read as parquet"),
    "no JSON": (b'{"text": "a", "label"\n', ".jsonl", "line 1: "),
    "a list a line": (b'["a", "yes"]\n', ".jsonl", "line 1: not an object"),
    "nested JSON": (b'{"text": ' + b"[" * 100_000 + b"\n", ".jsonl", "it cannot be read as jsonl"),
    "texts that are tables": (b'{"text": {"a": 1}, "label": "x"}\n' * 3, ".jsonl", "{'a': 1} is not a text"),
    "no label": (b'{"text": "a", "label": "x"}\n{"text": "b"}\n', ".jsonl", "row 2: the value is missing"),
    "null label": (
        b'{"text": "a", "label": "x"}\n{"text": "b", "label": null}\n',
        ".jsonl",
        "row 2: the value",
    ),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_files_that_cannot_be_read(name, plain, tmp_path):
    content, ending, message = CONTENTS[name]
    path = tmp_path / f"data{ending}"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        through(study_of(plain, path), tmp_path / "results")
    assert message in str(error.value)
    assert not list(tmp_path.rglob("examples.parquet"))


def test_more_clients_than_examples(plain, tmp_path):
    values = {
        **study_of(plain, plain["tasks"]["films"]["train"]),
        "federation": {"clients": 1000, "rounds": 1},
    }
    with pytest.raises(
        UserError, match="clients: 1000 clients with min_examples 1 need 1000 training examples"
    ):
        through(values, tmp_path)
