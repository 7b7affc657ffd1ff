"""Your own data from csv, parquet or jsonl files."""

import json
import warnings
from pathlib import Path
from typing import Any, Self

import pandas
import pyarrow
import pyarrow.parquet
from pydantic import Field, model_validator

from fedlm.base.errors import UserError
from fedlm.base.files import local_path
from fedlm.data.task import METRICS, Corpus, Kind, Task, Windows, check_windows

LARGEST_CLASSES = 1000
CHUNK = 100_000  # rows of a csv file in memory at once, with all of their columns
SMALL_FILE = 32 << 20  # bytes; larger files are not read before they are prepared
TEXTS = {
    "classification": (1, 2),
    "regression": (1, 2),
    "causal": (1, 16),
    "question_answering": (2, 2),
}


class Files(Task):
    """A table in UTF-8, one example per row; the ending of its name (.csv, .parquet, .jsonl) is its format.

    Splits that have no file are drawn from the training file using the seed. Rows of the training file
    without any text, or whose text occurs twice, are left out and counted. A text of any length is read, and
    cut to 64 characters per token of `max_length` before it is tokenised. Labels of the other files must
    occur in the training file.
    """

    name = "files"
    title = "Own files"
    reference = "your own files"

    class Config(Task.Config, Windows):
        train: str = Field(min_length=1, description="path of a .csv, .parquet or .jsonl file")
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
        kind: Kind = Field("classification", description="what the model does with a row")
        metric: str | None = Field(None, description="the main metric, one of those of the kind")

        @model_validator(mode="after")
        def _consistent(self) -> Self:
            least, most = TEXTS[self.kind]
            if not least <= len(self.text) <= most:
                raise ValueError(f"text: {self.text}; allowed for {self.kind}: {least} to {most} columns")
            if self.metric is not None and self.metric not in METRICS[self.kind]:
                allowed = ", ".join(METRICS[self.kind])
                raise ValueError(f"metric: {self.metric!r}; allowed for {self.kind}: {allowed}")
            if self.kind == "question_answering":
                check_windows(self.max_length, self.doc_stride)
            return self

    config: Config

    def __init__(self, config: Config | dict | None = None) -> None:
        super().__init__(config)
        self.kind = self.config.kind
        self.has_groups = self.config.group is not None
        main = self.config.metric or METRICS[self.kind][0]
        self.metrics = (main, *(metric for metric in METRICS[self.kind] if metric != main))

    def paths(self) -> dict[str, Path]:
        names = ("train", "validation", "test")
        given = {name: getattr(self.config, name) for name in names}
        return {name: local_path(path) for name, path in given.items() if path is not None}

    def files(self) -> list[Path]:
        return list(self.paths().values())

    def _columns(self) -> list[str]:
        """Return the columns that are read, each once."""
        group = [self.config.group] if self.config.group else []
        return list(dict.fromkeys([*self.config.text, self.config.label, *group]))

    def check(self) -> None:
        for split, path in self.paths().items():
            columns = list(_read(path, split).columns)
            for column in self._columns():
                if column not in columns:
                    found = ", ".join(map(str, columns[:20]))
                    raise UserError(f"{split}: {path}: there is no column {column!r}; it has: {found}")

    def count_labels(self) -> int | None:
        path = self.paths()["train"]
        if self.kind != "classification":
            return super().count_labels()
        if path.stat().st_size > SMALL_FILE:
            return None
        return _read(path, "train", [self.config.label])[self.config.label].map(str).nunique()

    def rows(self) -> Corpus:
        self.check()
        parts = {split: self._part(split, path) for split, path in self.paths().items()}
        label_names = self._classes(parts) if self.kind == "classification" else []
        rows = pandas.concat(parts.values(), ignore_index=True) if len(parts) > 1 else parts["train"]
        group_names = []
        if self.config.group:
            group_names = sorted(rows["group"].unique())
            rows["group"] = rows["group"].map({name: index for index, name in enumerate(group_names)})
        return Corpus(rows, label_names, group_names)

    def _part(self, split: str, path: Path) -> pandas.DataFrame:
        """Return one file's rows as in a Corpus, but with the names of label and group."""
        table, config = _read(path, split, self._columns()), self.config
        place = f"{split}: {path}"
        texts = [_texts(table[column], place, column) for column in config.text]
        # A split that has a file of its own is official; the rest is drawn from the training file.
        rows = pandas.DataFrame({"split": ["" if len(self.paths()) == 1 else split] * len(table)})
        if self.kind in ("classification", "regression"):
            for name, text in zip(("text", "text_pair"), texts, strict=False):
                rows[name] = text
            values = _filled(table[config.label], place, config.label)
            rows["label"] = _words(values) if self.kind == "classification" else _numbers(values, place)
        elif self.kind == "causal":
            rows["prompt"] = ["\n".join(row) for row in zip(*texts, strict=True)] if texts[1:] else texts[0]
            rows["target"] = _texts(table[config.label], place, config.label)
        else:
            rows["question"], rows["context"] = texts
            answers = _answers(_filled(table[config.label], place, config.label), rows["context"], place)
            rows["answers"], rows["answer_start"] = answers
        if config.group:
            rows["group"] = _filled(table[config.group], place, config.group).pipe(_words)
        return rows

    def _classes(self, parts: dict[str, pandas.DataFrame]) -> list[str]:
        """Return the classes of the training file, and turn every file's labels into indices of them."""
        names = sorted(parts["train"]["label"].unique(), key=_numbers_first)
        if len(names) > LARGEST_CLASSES:
            raise UserError(
                f"label: {self.config.label!r} has {len(names)} different values in {self.paths()['train']}; "
                f"allowed: at most {LARGEST_CLASSES} (kind: regression is for numbers)"
            )
        index = {name: number for number, name in enumerate(names)}
        for split, part in parts.items():
            unknown = ~part["label"].isin(names)
            if unknown.any():
                row = int(unknown.argmax())
                raise UserError(
                    f"{split}: {self.paths()[split]}: column {self.config.label!r}, row {row + 1}: the label "
                    f"{_short(part['label'][row])} does not occur in the training file"
                )
            part["label"] = part["label"].map(index).astype("int64")
        return names


def _numbers_first(name: str) -> tuple:
    return (0, int(name), name) if name.isdecimal() and len(name) < 19 else (1, 0, name)


def _read(path: Path, split: str, columns: list[str] | None = None) -> pandas.DataFrame:
    """Return these columns of a file, rows numbered from 0; without columns all of its first row."""
    readers = {".csv": _read_csv, ".parquet": _read_parquet, ".jsonl": _read_jsonl}
    if path.suffix not in readers:
        raise UserError(f"{split}: {path}; allowed: a file that ends in .csv, .parquet or .jsonl")
    if not path.is_file():
        raise UserError(f"{split}: {path}: no such file")
    try:
        table = readers[path.suffix](path, columns)
    except UnicodeDecodeError as error:
        raise UserError(f"{split}: {path}: it is not in UTF-8: {error}") from None
    except (OSError, ValueError, RecursionError, Warning, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{split}: {path}: it cannot be read as {path.suffix[1:]}: {reason}") from None
    if not len(table):
        raise UserError(f"{split}: {path}: it has no rows")
    return table


def _read_csv(path: Path, columns: list[str] | None) -> pandas.DataFrame:
    with warnings.catch_warnings():
        # Otherwise rows with one value too many lose it, or shift.
        warnings.simplefilter("error", pandas.errors.ParserWarning)
        with pandas.read_csv(
            path,
            dtype=str,
            keep_default_na=False,
            na_values=[],
            index_col=False,
            encoding="utf-8-sig",
            nrows=1 if columns is None else None,
            chunksize=CHUNK,  # Of a chunk at a time only the columns that are used are kept.
        ) as chunks:
            tables = [chunk if columns is None else chunk[columns] for chunk in chunks]
    return pandas.concat(tables, ignore_index=True) if tables else pandas.DataFrame()


def _read_parquet(path: Path, columns: list[str] | None) -> pandas.DataFrame:
    with pyarrow.parquet.ParquetFile(path) as file:
        if columns is None:
            return next(file.iter_batches(1)).to_pandas() if file.metadata.num_rows else pandas.DataFrame()
        return file.read(columns).to_pandas()


def _read_jsonl(path: Path, columns: list[str] | None) -> pandas.DataFrame:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number}: not an object with a value for each column")
            rows.append(row)
            if columns is None:
                break
    return pandas.DataFrame(rows, dtype=object)


def _is_missing(value: Any) -> bool:
    return value is None or (pandas.api.types.is_scalar(value) and (pandas.isna(value) or value == ""))


def _filled(column: pandas.Series, place: str, name: str) -> pandas.Series:
    """Return a column after checking that no value is missing."""
    missing = column.isna() | (column == "") if column.dtype == "str" else column.map(_is_missing)
    if missing.any():
        raise UserError(
            f"{place}: column {name!r}, row {int(missing.argmax()) + 1}: the value is missing "
            f"(in {int(missing.sum())} of {len(column)} rows)"
        )
    return column


def _words(column: pandas.Series) -> pandas.Series:
    return column if column.dtype == "str" else column.map(str)


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
    for row, value in enumerate(column, start=1):
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
