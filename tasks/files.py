"""Your own data from csv, parquet or jsonl files, or from folders that serve like one."""

import math
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import pandas
from pydantic import Field, field_validator, model_validator

from fedlm.base.errors import UserError
from fedlm.base.files import local_path
from fedlm.data import metrics, tables
from fedlm.data.prepared import split_sizes
from fedlm.data.tables import Source
from fedlm.data.task import DEFAULT_METRICS, Corpus, Findings, Kind, Task, Windows, check_windows

LARGEST_CLASSES = 1000
FEWEST = 3  # examples of a class, so that each of the three splits can have one
LONGEST_NOTE = 10  # classes that a note names
TEXTS = {
    "classification": (1, 2),
    "regression": (1, 2),
    "causal": (1, 16),
    "question_answering": (2, 2),
}
# What pandas.read_csv reads as a missing value; R writes NA, NumPy nan, a database NULL.
MISSING = frozenset(
    [*"#N/A #NA -1.#IND -1.#QNAN -NaN -nan 1.#IND 1.#QNAN <NA> N/A NA NULL NaN None n/a nan null".split(), ""]  # noqa: SIM905
)
_FOUND: dict[tuple, Findings] = {}  # by settings and the files' times and sizes: read once in a process


class Files(Task):
    """A table, one example per row: a file that ends in .csv, .parquet or .jsonl, or a folder like one.

    Splits that have no file are drawn from the training file using the seed. Rows of the training file
    without any text, or whose text occurs twice, are left out and counted. A text of any length is read, and
    cut to 64 characters per token of `max_length` before it is tokenised. Spaces around classes and groups do
    not count; a value that reads as missing (`MISSING`) is missing. Classes of the other files must occur in
    the training file.
    """

    name = "files"
    title = "Own files"
    reference = "your own files"

    class Config(Task.Config, Windows):
        train: str = Field(
            min_length=1,
            description="path of a .csv, .parquet or .jsonl file, or of a folder that serves like one",
        )
        validation: str | None = Field(None, min_length=1, description="the same; drawn from train if absent")
        test: str | None = Field(None, min_length=1, description="the same; drawn from train if absent")
        text: list[str] = Field(
            min_length=1,
            max_length=16,
            description="columns of the input: a text or a pair of texts; for question_answering question "
            "and document; for causal what the prompt consists of, joined by newlines",
        )
        label: str = Field(
            min_length=1,
            description="column of the class, the number, or the text to be produced; for question_answering "
            "the answer as a text, or as SQuAD has it: {text: [...], answer_start: [...]}",
        )
        group: str | None = Field(None, min_length=1, description="column of the natural client population")
        separator: str | None = Field(
            None,
            min_length=1,
            max_length=1,
            description="what separates the columns of a csv file; [a comma]",
        )
        encoding: str | None = Field(
            None, min_length=1, description="of a file that is not in UTF-8, such as cp1252"
        )
        kind: Kind = Field("classification", description="what the model does with a row")
        metric: str | None = Field(None, description="the main metric, one of those of the kind")

        @field_validator("encoding")
        @classmethod
        def _known(cls, encoding: str | None) -> str | None:
            try:
                "".encode(encoding or "utf-8")
            except (LookupError, ValueError):
                raise ValueError("allowed: an encoding of texts that Python knows, such as cp1252") from None
            return encoding

        @model_validator(mode="after")
        def _consistent(self) -> Self:
            least, most = TEXTS[self.kind]
            if not least <= len(self.text) <= most:
                raise ValueError(f"text: {self.text}; allowed for {self.kind}: {least} to {most} columns")
            known = dict.fromkeys((*DEFAULT_METRICS[self.kind], *metrics.names(self.kind)))
            if self.metric is not None and self.metric not in known:
                allowed = ", ".join(known)
                raise ValueError(f"metric: {self.metric!r}; allowed for {self.kind}: {allowed}")
            if self.kind == "question_answering":
                check_windows(self.max_length, self.doc_stride)
            return self

    config: Config

    def __init__(self, config: Config | dict | None = None) -> None:
        super().__init__(config)
        self.kind = self.config.kind
        self.has_groups = self.config.group is not None
        main = self.config.metric or DEFAULT_METRICS[self.kind][0]
        self.metrics = (main, *(metric for metric in DEFAULT_METRICS[self.kind] if metric != main))

    def sources(self) -> dict[str, Source]:
        """Return the table of each split. Raises UserError for a path where there is none."""
        found: dict[str, Source] = {}
        config = self.config
        for split in tables.SPLITS:
            given = getattr(config, split)
            if given is None:
                continue
            path = local_path(given)
            place = f"{split}: {path}"
            parts = tables.find(path, place)
            if "" not in parts and split not in parts:
                raise UserError(f"{place}: there is no split {split!r}; it has: {', '.join(parts)}")
            # A folder with splits brings those that the study does not name.
            parts = (
                {split: parts[""]} if "" in parts else parts if split == "train" else {split: parts[split]}
            )
            found |= {
                name: part for name, part in parts.items() if name == split or not getattr(config, name)
            }
        return {
            split: found[split]._replace(encoding=config.encoding, separator=config.separator)
            for split in tables.SPLITS
            if split in found
        }

    def files(self) -> list[Path]:
        return [path for source in self.sources().values() for path in source.files]

    def _columns(self) -> list[str]:
        """Return the columns that are read, each once."""
        group = [self.config.group] if self.config.group else []
        return list(dict.fromkeys([*self.config.text, self.config.label, *group]))

    def check(self) -> None:
        self._headers()

    def _headers(self) -> dict[str, list[str]]:
        """Return the header of each split's table, after checking that it has every column that is read."""
        headers = {}
        for split, source in self.sources().items():
            place, wanted = f"{split}: {source.path}", self._columns()
            # A file with another separator may be unreadable with this one, hence before its first row.
            other = tables.other_separator(source, wanted)
            if other:
                raise UserError(
                    f"{place}: its columns are separated by {other!r}, not by {source.between()!r}: "
                    f"add `separator: {_yaml(other)}` to the task"
                )
            headers[split] = names = tables.header(source, place)
            for column in wanted:
                if column not in names:
                    found = ", ".join(map(str, names[:20]))
                    raise UserError(f"{place}: there is no column {column!r}; it has: {found}")
                if names.count(column) > 1:
                    count = names.count(column)
                    raise UserError(
                        f"{place}: there are {count} columns {column!r}; allowed: one of that name"
                    )
        return headers

    def examine(self) -> Findings:
        """Read the columns once; find what preparing would refuse, and what their owner should know."""
        stamps = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in self.files()]
        key = (self.config.model_dump_json(), *stamps)
        if key not in _FOUND:
            headers = self._headers()
            corpus = self.load()
            _FOUND[key] = self._findings(corpus, headers)
        return _FOUND[key]

    def _findings(self, corpus: Corpus, headers: dict[str, list[str]]) -> Findings:
        config, notes = self.config, []
        for split, names in headers.items():
            again = tables.repeated(names)
            if again:
                notes.append(
                    f"{split}: columns whose name occurs more than once: {_listed(map(repr, again))}"
                )
        counts = {}
        if self.kind == "classification":
            found = corpus.rows["label"].value_counts()
            counts = {name: int(found.get(index, 0)) for index, name in enumerate(corpus.label_names)}
            notes += _doubtful(counts, config.label)
        if corpus.dropped["duplicates"] or corpus.dropped["empty"]:
            notes.append(
                f"left out: {corpus.dropped['duplicates']} rows whose text occurs before, "
                f"{corpus.dropped['empty']} without text"
            )
        splits = corpus.rows["split"].value_counts()
        sizes = split_sizes(
            len(corpus.rows) - sum(int(splits.get(name, 0)) for name in ("validation", "test")),
            {name: int(splits.get(name, 0)) for name in ("validation", "test")},
            {"validation": config.validation_share, "test": config.test_share},
            {name: getattr(config, f"{name}_examples") for name in tables.SPLITS},
        )
        for name, count in sizes.items():
            if not count:
                raise UserError(f"{len(corpus.rows)} examples are too few for a {name} split")
        return Findings(notes, sizes["train"], counts)

    def count_labels(self) -> int | None:
        return len(self.examine().classes) if self.kind == "classification" else super().count_labels()

    def rows(self) -> Corpus:
        self.check()
        sources = self.sources()
        parts = {split: self._part(split, source, len(sources) == 1) for split, source in sources.items()}
        label_names = self._classes(parts) if self.kind == "classification" else []
        rows = pandas.concat(parts.values(), ignore_index=True) if len(parts) > 1 else parts["train"]
        group_names = []
        if self.config.group:
            group_names = sorted(rows["group"].unique())
            rows["group"] = rows["group"].map({name: index for index, name in enumerate(group_names)})
        if self.kind == "classification" and self.config.metric == "f1" and len(label_names) != 2:
            raise UserError(
                f"metric: f1; allowed with {len(label_names)} classes: accuracy, macro_f1, matthews, "
                "since f1 is that of the second of two classes"
            )
        return Corpus(rows, label_names, group_names)

    def _part(self, split: str, source: Source, alone: bool) -> pandas.DataFrame:
        """Return one table's rows as in a Corpus, but with the names of label and group."""
        place, config = f"{split}: {source.path}", self.config
        table = tables.read(source, place, self._columns())
        texts = [_texts(table[column], place, column) for column in config.text]
        # A split that has a file of its own is official; the rest is drawn from the training file.
        rows = pandas.DataFrame({"split": ["" if alone else split] * len(table)})
        if self.kind in ("classification", "regression"):
            for name, text in zip(("text", "text_pair"), texts, strict=False):
                rows[name] = text
            values = table[config.label]
            rows["label"] = (
                _words(values, place) if self.kind == "classification" else _numbers(values, place)
            )
        elif self.kind == "causal":
            rows["prompt"] = ["\n".join(row) for row in zip(*texts, strict=True)] if texts[1:] else texts[0]
            rows["target"] = _texts(table[config.label], place, config.label)
        else:
            rows["question"], rows["context"] = texts
            answers = _answers(_filled(table[config.label], place), rows["context"], place)
            rows["answers"], rows["answer_start"] = answers
        if config.group:
            rows["group"] = _words(table[config.group], place)
        return rows

    def _classes(self, parts: dict[str, pandas.DataFrame]) -> list[str]:
        """Return the classes of the training file, and turn every file's labels into indices of them."""
        names = sorted(parts["train"]["label"].unique(), key=_numbers_first)
        if len(names) > LARGEST_CLASSES:
            raise UserError(
                f"label: {self.config.label!r} has {len(names)} different values in {self.config.train}; "
                f"allowed: at most {LARGEST_CLASSES} (kind: regression is for numbers)"
            )
        index = {name: number for number, name in enumerate(names)}
        for split, part in parts.items():
            unknown = ~part["label"].isin(names)
            if unknown.any():
                row = int(unknown.argmax())
                near = {_meaning(name): name for name in names}.get(_meaning(part["label"][row]))
                path = self.sources()[split].path
                raise UserError(
                    f"{split}: {path}: column {self.config.label!r}, row {row + 1}: the label "
                    f"{_short(part['label'][row])} does not occur in the training file"
                    + (f", but {_short(near)} does" if near else "")
                )
            part["label"] = part["label"].map(index).astype("int64")
        return names


def _numbers_first(name: str) -> tuple:
    return (0, int(name), name) if name.isdecimal() and len(name) < 19 else (1, 0, name)


def _yaml(separator: str) -> str:
    return '"\\t"' if separator == "\t" else f"'{separator}'"


def _listed(words: Iterable[str]) -> str:
    """Return words with commas between them, the first of very many."""
    words = list(words)
    more = f" and {len(words) - LONGEST_NOTE} more" if len(words) > LONGEST_NOTE else ""
    return ", ".join(words[:LONGEST_NOTE]) + more


def _doubtful(counts: dict[str, int], column: str) -> list[str]:
    """Return notes on classes that look like one, and on those too small for three splits."""
    alike: dict[str, list[str]] = {}
    for name in counts:
        alike.setdefault(_meaning(name), []).append(name)
    notes = [
        f"column {column!r}: different classes that look like one: "
        + _listed(f"{_short(name)} ({counts[name]})" for name in names)
        for names in alike.values()
        if len(names) > 1
    ][:LONGEST_NOTE]
    small = [f"{_short(name)} ({count})" for name, count in counts.items() if count < FEWEST]
    if small:
        notes.append(
            f"column {column!r}: classes with fewer than {FEWEST} examples, which cannot be in all of "
            f"training, validation and test: {_listed(small)}"
        )
    return notes


def _meaning(label: str) -> str:
    """Return what a label is without its spelling: 1, 1.0 and 01 are one number, True and true one word."""
    text = " ".join(unicodedata.normalize("NFKC", label).casefold().split())
    try:
        number = float(text)
    except ValueError:
        return text
    return repr(number) if math.isfinite(number) else text


def _is_missing(value: Any) -> bool:
    return value is None or (pandas.api.types.is_scalar(value) and (pandas.isna(value) or value == ""))


def _filled(column: pandas.Series, place: str, words: frozenset[str] = frozenset()) -> pandas.Series:
    """Return a column after checking that no value is missing, or one of the words that mean it."""
    missing = column.isna() | (column == "") if column.dtype == "str" else column.map(_is_missing)
    missing = missing | column.isin(list(words)) if words else missing
    if missing.any():
        row = int(missing.argmax())
        value = column.iloc[row]
        reads = f", as {value!r} means" if isinstance(value, str) and value else ""
        raise UserError(
            f"{place}: column {column.name!r}, row {row + 1}: the value is missing{reads} "
            f"(in {int(missing.sum())} of {len(column)} rows)"
        )
    return column


def _words(column: pandas.Series, place: str) -> pandas.Series:
    """Return a column of classes or groups as texts without the spaces around them; none is missing."""
    if column.dtype != "str":
        wrong = ~column.map(pandas.api.types.is_scalar) if column.dtype == object else column.isna() & False
        if wrong.any():
            row = int(wrong.argmax())
            value = _short(column.iloc[row])
            raise UserError(
                f"{place}: column {column.name!r}, row {row + 1}: {value} is not a text or number"
            )
        column = column.map(lambda value: "" if _is_missing(value) else str(value)).astype("str")
    return _filled(column.str.strip(), place, MISSING)


def _texts(column: pandas.Series, place: str, name: str) -> pandas.Series | list[str]:
    """Return a column as texts; numbers become text, missing values the empty text."""
    if column.dtype == "str":
        return column.fillna("")
    texts = []
    for row, value in enumerate(column, start=1):
        if not pandas.api.types.is_scalar(value):
            raise UserError(f"{place}: column {name!r}, row {row}: {_short(value)} is not a text")
        texts.append("" if _is_missing(value) else str(value))
    return texts


def _numbers(column: pandas.Series, place: str) -> list[float]:
    numbers = []
    for row, value in enumerate(_filled(column, place), start=1):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if not abs(number) < 1e30:
            raise UserError(
                f"{place}: column {column.name!r}, row {row}: {_short(value)} is not a finite number"
            )
        numbers.append(number)
    return numbers


def _answers(column: pandas.Series, contexts: pandas.Series, place: str) -> tuple[list, list]:
    """Return the lists of answers and of their positions in the document."""
    texts, starts = [], []
    found: Any
    places: Any
    for row, (value, context) in enumerate(zip(column, contexts, strict=True), start=1):
        if isinstance(value, dict):
            found, places = value.get("text"), value.get("answer_start")
        else:
            found, places = [str(value)], [context.find(str(value))]
        if not _right(found, places, context):
            raise UserError(
                f"{place}: column {column.name!r}, row {row}: the answer {_short(value)} is not in the text"
            )
        texts.append(list(found))
        starts.append([int(start) for start in places])
    return texts, starts


def _right(answers: Any, starts: Any, context: str) -> bool:
    """Return whether these are lists of texts and of their positions in the document."""
    try:
        pairs = list(zip(answers, map(int, starts), strict=True))
        return all(start >= 0 and context.startswith(answer, start) for answer, start in pairs)
    except (TypeError, ValueError):
        return False


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
