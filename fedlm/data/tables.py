"""Tables in files of the reader's own: csv, parquet and jsonl, and folders that serve like one of them."""

import csv
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas
import pyarrow
import pyarrow.parquet
from tqdm import tqdm

from fedlm.base.errors import UserError

SPLITS = ("train", "validation", "test")
UTF_8 = "utf-8-sig"  # UTF-8, with or without the mark that Excel writes at the beginning
SEPARATORS = (",", ";", "\t", "|")
CHUNK = 100_000  # rows of a csv file in memory at once, with all of their columns
SAMPLE = 1 << 16  # bytes from which an encoding is guessed
# The encodings that are suggested: the usual ones of files from Windows, macOS and East Asia.
ENCODINGS = ["utf_16", "cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "mac_roman"]
EAST_ASIAN = ["shift_jis", "gb18030", "big5", "euc_kr"]
ENCODINGS += EAST_ASIAN
_FORMS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".jsonl": "jsonl"}
ALLOWED = (
    "allowed: a file that ends in .csv, .parquet or .jsonl (or .tsv), or a folder: of parquet files, of a "
    "data set saved with save_to_disk, of a folder of text files for each class, or of a text file for each"
)


class Source(NamedTuple):
    """Where the rows of a table are.

    Attributes:
        path: the file or folder that messages name.
        files: the files in it that are read, in this order.
        form: csv, parquet, jsonl, arrow (of `save_to_disk`), texts (a row is a file), lines (a row a line).
        encoding: of the texts in it; None: UTF-8.
        separator: of the columns of a csv file; None: a comma, or a tab where the name ends in .tsv.
    """

    path: Path
    files: list[Path]
    form: str
    encoding: str | None = None
    separator: str | None = None

    def name(self) -> str:
        """Return what the files are, for messages."""
        return self.path.suffix[1:] if self.path.is_file() else self.form

    def is_text(self) -> bool:
        """Return whether the files are texts, which have an encoding."""
        return self.form not in ("parquet", "arrow")

    def reads_as(self) -> str:
        """Return Python's name of the encoding."""
        return self.encoding or UTF_8

    def between(self) -> str:
        """Return what separates the columns of a csv file."""
        return self.separator or ("\t" if self.path.suffix == ".tsv" else ",")


# ---------------------------------------------------------------------------------------------------------
# Finding


def find(path: Path, place: str) -> dict[str, Source]:
    """Return the table in a file or folder under "", or the tables of its splits under their names.

    A folder has splits where `save_to_disk` wrote some, where its parquet files are named as on the hub
    (train-00000-of-00001.parquet), and where it holds the folders `train` and `test` of texts by class.

    Raises UserError, which begins with `place`, where there is none.
    """
    if path.is_file():
        if path.suffix not in _FORMS:
            raise UserError(f"{place}; {ALLOWED}")
        return {"": Source(path, [path], _FORMS[path.suffix])}
    if not path.is_dir():
        known = path.suffix in _FORMS or not path.suffix
        raise UserError(f"{place}: no such file" if known else f"{place}; {ALLOWED}")
    found = _saved(path, place) or _parquet(path) or _split_texts(path) or _texts(path)
    if not found:
        raise UserError(f"{place}: there is nothing in this folder that can be read; {ALLOWED}")
    return found


def _saved(folder: Path, place: str) -> dict[str, Source]:
    """Return the tables of a folder that `save_to_disk` wrote, of a data set or of several splits of one."""
    try:
        if (folder / "dataset_dict.json").is_file():
            names = json.loads((folder / "dataset_dict.json").read_text())["splits"]
            return {name: _saved(folder / name, place)[""] for name in names if name in SPLITS}
        if not (folder / "state.json").is_file():
            return {}
        state = json.loads((folder / "state.json").read_text())
        files = [folder / str(entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{place}: not a whole data set of save_to_disk ({type(error).__name__}: {error})"
        ) from None
    return {"": Source(folder, files, "arrow")}


def _parquet(folder: Path) -> dict[str, Source]:
    for place in (folder, folder / "data"):
        files = sorted(place.glob("*.parquet"))
        named = {
            split: [path for path in files if re.fullmatch(rf"{split}(-.*)?", path.stem)] for split in SPLITS
        }
        if named["train"]:
            return {split: Source(folder, some, "parquet") for split, some in named.items() if some}
        if files:
            return {"": Source(folder, files, "parquet")}
    return {}


def _split_texts(folder: Path) -> dict[str, Source]:
    found = {split: _texts(folder / split).get("") for split in SPLITS}
    return {split: source for split, source in found.items() if source} if found["train"] else {}


def _texts(folder: Path) -> dict[str, Source]:
    """Return the table of texts by class: a folder of text files for each, or a text file for each."""
    for pattern, form in (("*/*.txt", "texts"), ("*.txt", "lines")):
        files = sorted(path for path in folder.glob(pattern) if path.is_file())
        if files:
            return {"": Source(folder, files, form)}
    return {}


# ---------------------------------------------------------------------------------------------------------
# Reading


def header(source: Source, place: str) -> list[str]:
    """Return the names of the columns as the file has them, repetitions included.

    Raises UserError, which begins with `place`, for a file that cannot be read or has no rows.
    """
    columns = [str(name) for name in _attempt(source, place, None).columns]
    if source.form == "csv":
        return _first_line(source, source.between()) or columns
    if source.form == "parquet":
        return pyarrow.parquet.read_schema(source.files[0]).names
    return columns


def repeated(names: Sequence[str]) -> dict[str, int]:
    """Return the names that occur more than once, with their numbers."""
    return {name: count for name, count in Counter(names).items() if count > 1}


def other_separator(source: Source, wanted: Sequence[str]) -> str | None:
    """Return the separator with which a csv file has all of these columns, None where there is none."""
    if source.form == "csv":
        for separator in SEPARATORS:
            if separator != source.between() and set(wanted) <= set(_first_line(source, separator)):
                return separator
    return None


def read(source: Source, place: str, columns: list[str]) -> pandas.DataFrame:
    """Return these columns, each a different one that the table has; rows are numbered from 0.

    A bar shows the progress where standard error is a terminal. Values of csv are texts, empty where nothing
    is written. Numbers that a file of the hub's library names (`ClassLabel`) are their names.

    Raises UserError, which begins with `place`, for a file that cannot be read or has no rows.
    """
    return _attempt(source, place, columns)


def _attempt(source: Source, place: str, columns: list[str] | None) -> pandas.DataFrame:
    """Return the columns, or without them all of the first row."""
    readers = {"csv": _read_csv, "jsonl": _read_jsonl, "texts": _read_texts, "lines": _read_texts}
    try:
        table = readers.get(source.form, _read_arrow)(source, columns)
    except UnicodeError as error:
        raise UserError(_not_in_this_encoding(source, place, error)) from None
    except (OSError, ValueError, RecursionError, Warning, csv.Error, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{place}: it cannot be read as {source.name()}: {reason}") from None
    if not len(table):
        raise UserError(f"{place}: it has no rows")
    return table


def _bar(source: Source, total: int, unit: str) -> tqdm:
    return tqdm(
        total=total, desc=f"reading {source.path.name}", unit=unit, unit_scale=True, disable=None, leave=False
    )


def _first_line(source: Source, separator: str) -> list[str]:
    """Return the values of the first line that is not empty."""
    try:
        with source.files[0].open(encoding=source.reads_as(), newline="") as file:
            return next(filter(None, csv.reader(file, delimiter=separator)), [])
    except (UnicodeError, csv.Error):
        return []


def _read_csv(source: Source, columns: list[str] | None) -> pandas.DataFrame:
    path = source.files[0]
    with (
        warnings.catch_warnings(),
        path.open("rb") as file,
        _bar(source, 0 if columns is None else path.stat().st_size, "B") as bar,
    ):
        # Otherwise rows with one value too many lose it, or shift.
        warnings.simplefilter("error", pandas.errors.ParserWarning)
        with pandas.read_csv(
            file,
            dtype=str,
            keep_default_na=False,
            na_values=[],
            index_col=False,
            sep=source.between(),
            encoding=source.reads_as(),
            nrows=1 if columns is None else None,
            chunksize=CHUNK,  # Of a chunk at a time only the columns that are used are kept.
        ) as chunks:
            tables = []
            for chunk in chunks:
                tables.append(chunk if columns is None else chunk[columns])
                bar.update(file.tell() - bar.n)
    return pandas.concat(tables, ignore_index=True) if tables else pandas.DataFrame()


def _read_arrow(source: Source, columns: list[str] | None) -> pandas.DataFrame:
    """Read files of parquet, or of Arrow's stream format, which the hub's library saves."""
    tables: list[pandas.DataFrame | None] = []
    with _bar(source, len(source.files), " files") as bar:
        for path in source.files:
            parts = _batches(path, source.form, columns)
            tables += [next(parts, None)] if columns is None else parts
            bar.update()
            if columns is None and tables[0] is not None:
                break
    some = [table for table in tables if table is not None]
    return pandas.concat(some, ignore_index=True) if some else pandas.DataFrame()


def _batches(path: Path, form: str, columns: list[str] | None) -> Iterator[pandas.DataFrame]:
    if form == "parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            if columns is None:
                yield from (_named(batch) for batch in file.iter_batches(1))
            elif file.metadata.num_rows:
                yield _named(file.read(columns))
        return
    with pyarrow.memory_map(str(path)) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
        for batch in stream:
            if batch.num_rows:
                yield _named(batch.slice(0, 1) if columns is None else batch.select(columns))


def _named(batch: Any) -> pandas.DataFrame:
    """Return a table with the names of classes for their numbers, where the hub's library names them."""
    frame = batch.to_pandas()
    try:
        known = json.loads(batch.schema.metadata[b"huggingface"])["info"]["features"]
        names = {key: value["names"] for key, value in known.items() if value.get("_type") == "ClassLabel"}
    except (TypeError, KeyError, ValueError, AttributeError):
        return frame
    for column in names.keys() & set(frame.columns):
        frame[column] = frame[column].map(dict(enumerate(names[column])))
    return frame


def _read_jsonl(source: Source, columns: list[str] | None) -> pandas.DataFrame:
    rows = []
    size = 0 if columns is None else source.path.stat().st_size
    with source.path.open(encoding=source.reads_as()) as file, _bar(source, size, "B") as bar:
        for number, line in enumerate(file, start=1):
            bar.update(len(line))
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number}: not an object with a value for each column")
            rows.append(row if columns is None else {name: row[name] for name in columns if name in row})
            if columns is None:
                break
    return pandas.DataFrame(rows, columns=columns, dtype=object)


def _read_texts(source: Source, columns: list[str] | None) -> pandas.DataFrame:
    """Return `text` and `label` of a folder of texts by class."""
    rows = []
    with _bar(source, 0 if columns is None else len(source.files), " files") as bar:
        for path in source.files:
            content = path.read_text(encoding=source.reads_as())
            if source.form == "texts":
                rows.append((content, path.parent.name))
            else:
                rows += [(line, path.stem) for line in content.split("\n") if line.strip()]
            bar.update()
            if columns is None and rows:
                break
    return pandas.DataFrame(rows, columns=["text", "label"], dtype="str")[columns or ["text", "label"]]


# ---------------------------------------------------------------------------------------------------------
# Encodings


def _not_in_this_encoding(source: Source, place: str, error: UnicodeError) -> str:
    if source.encoding:
        return f"{place}: it is not in {source.encoding}, which `encoding` names: {error}"
    for path in source.files:
        guessed = guess_encoding(path)
        if guessed:
            name, where = guessed.replace("_", "-"), "" if path == source.path else f" ({path.name})"
            return (
                f"{place}: it is not in UTF-8{where}: {error}; it reads as {name}: add "
                f"`encoding: {name}` to the task, or convert it (iconv -f {name} -t UTF-8)"
            )
    return f"{place}: it is not in UTF-8: {error}; allowed: UTF-8, or the file's own encoding as `encoding`"


def guess_encoding(path: Path) -> str | None:
    """Return the likeliest encoding of a text that is not in UTF-8; None if it is in UTF-8, or none would do.

    charset-normalizer judges the file's beginning and what surrounds the first byte that is not UTF-8. Where
    Windows' western European encoding (cp1252) would do as well, it is preferred, as the most frequent one.
    """
    from charset_normalizer import from_bytes

    with path.open("rb") as file:
        beginning, around, before = file.read(SAMPLE), b"", b""
        chunk = beginning
        while chunk:
            if any(byte > 127 for byte in chunk) and not _is_utf_8(before + chunk):
                around = chunk
                break
            before, chunk = chunk[-4:], file.read(SAMPLE)
    if not around:
        return None
    if around is not beginning:
        # From line to line, so that no character is cut.
        around = b"\n".join([beginning.split(b"\n")[0], *around.split(b"\n")[1:-1]])
    found = from_bytes(around, cp_isolation=ENCODINGS) or from_bytes(around, 5, 512, 0.6, ENCODINGS)
    best = found.best()
    if best is None:
        return None
    western = "cp1252" in best.could_be_from_charset  # for which it is the same text
    if any(match.encoding == "cp1252" for match in found):
        # A few accents make as good a pair of bytes of an East Asian encoding, but there every letter is one.
        accents = sum(byte > 127 for byte in around) < 0.2 * len(around)
        western |= best.encoding == "cp1250" or (best.encoding in EAST_ASIAN and accents)
    return "cp1252" if western else best.encoding


def _is_utf_8(content: bytes) -> bool:
    """Return whether bytes are UTF-8, but for a character that is cut at the beginning or the end."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        if error.start < 4 and not error.object[error.start] & 0x40:
            return _is_utf_8(content[error.start + 1 :])
        return error.reason == "unexpected end of data"
    return True
