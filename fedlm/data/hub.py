"""Data sets of the Hugging Face hub, by id, or from a local folder in the hub's layout.

Both go through the library `datasets`, which reads parquet, csv and json files and runs no code of the hub
(its versions since 4 cannot).
"""

from pathlib import Path
from typing import Any

import pandas
from pydantic import Field

from fedlm.base.errors import UserError
from fedlm.base.files import local_path
from fedlm.data.task import Corpus, Task

READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


class HubTask(Task):
    """Base class of the tasks whose data are on the hub.

    Attributes:
        subset: the hub's name for a part of the data set (its "config"), None if it has no parts.
        splits: which of the hub's splits become which of ours, {"train": "train", "test": "validation"};
            a validation or test split that is missing here is drawn from the training split.
        columns: which of the hub's columns become which of ours, {"text": "sentence", "label": "label"}.
        label_names: the classes in the order of the hub's numbers; if empty, they are read from the data.
    """

    subset: str | None = None
    splits: dict[str, str]
    columns: dict[str, str]
    label_names: list[str] = []

    class Config(Task.Config):
        """Settings of all of them; each task has its own default for `source`."""

        source: str = Field(min_length=1, description="hub id owner/name, or a local folder in its layout")
        revision: str | None = Field(None, min_length=1, description="commit, branch or tag on the hub")

    config: Config

    def check(self) -> None:
        self.files()

    def files(self) -> list[Path]:
        return [path for paths in self._local_files().values() for path in paths]

    def rows(self) -> Corpus:
        rows, label_names = self.read()
        return Corpus(rows, label_names)

    def read(self) -> tuple[pandas.DataFrame, list[str]]:
        """Return the rows with our names of columns and splits, and the names of the classes.

        Raises:
            UserError: the hub cannot be reached, or the data are not of the expected form.
        """
        tables, names = [], self.label_names
        for split, dataset in self._load().items():
            place = f"{self._place()}, split {self.splits[split]!r}"
            for column in self.columns.values():
                if column not in dataset.column_names:
                    found = ", ".join(dataset.column_names)
                    raise UserError(f"{place}: there is no column {column!r}; it has: {found}")
            rows = pandas.DataFrame({ours: list(dataset[theirs]) for ours, theirs in self.columns.items()})
            for ours, theirs in self.columns.items():
                _require_values(rows[ours], f"{place}, column {theirs!r}", number=ours == "label")
            if self.kind == "classification":
                names = names or _names(dataset, self.columns["label"])
                outside = ~rows["label"].isin(range(len(names)))
                if outside.any():
                    row = int(outside.argmax())
                    raise UserError(
                        f"{place}, row {row + 1}: label {rows['label'][row]}; allowed: 0 to {len(names) - 1}"
                    )
            rows["split"] = split if len(self.splits) > 1 else ""
            tables.append(rows)
        return pandas.concat(tables, ignore_index=True), list(names)

    def _load(self) -> dict[str, Any]:
        """Return a `datasets.Dataset` for each of our splits."""
        import datasets

        local, place = self._local_files(), self._place()
        try:
            if local:
                paths = {theirs: [str(path) for path in paths] for theirs, paths in local.items()}
                reader = READERS[next(iter(local.values()))[0].suffix]
                found = datasets.load_dataset(reader, data_files=paths)
            else:
                found = datasets.load_dataset(self.config.source, self.subset, revision=self.config.revision)
        except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
            raise UserError(
                f"{place} cannot be reached ({_short(error)}): connect; or, if its cache has it, set "
                "HF_HUB_OFFLINE=1; or give a local folder in the layout of the hub"
            ) from None
        except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
            raise UserError(f"{place} cannot be read: {_short(error.__cause__ or error)}") from None
        missing = [theirs for theirs in self.splits.values() if theirs not in found]
        if missing:
            raise UserError(f"{place} has no split {missing[0]!r}; it has: {', '.join(found)}")
        return {ours: found[theirs] for ours, theirs in self.splits.items()}

    def _local_files(self) -> dict[str, list[Path]]:
        """Return the files of each of the hub's splits if the source is a local folder, else nothing.

        They are <split>-*.parquet or <split>.parquet (or .jsonl, .json, .csv) in the folder's part for the
        subset, in its folder `data`, or in itself: wherever the hub's data sets have them.
        """
        source, place = self.config.source, self._place()
        folder = local_path(source)
        if not folder.is_dir():
            if source.count("/") != 1 or source.startswith((".", "~", "/")):
                raise UserError(f"{place}; allowed: a local folder that exists, or a hub id owner/name")
            return {}
        parts = [folder / part for part in (self.subset or "data", "data", ".")]
        found = {}
        for split in self.splits.values():
            candidates = (
                sorted(path for pattern in (f"{split}-*", split) for path in part.glob(pattern + ending))
                for part in parts
                for ending in READERS
            )
            found[split] = next(filter(None, candidates), [])
            if not found[split]:
                raise UserError(
                    f"{place}: there is no {split}-*.parquet or {split}.parquet (or .jsonl, .json, .csv) in "
                    + " or ".join(map(str, parts))
                )
        if len({paths[0].suffix for paths in found.values()}) > 1:
            raise UserError(f"{place}; allowed: files of one format for all splits")
        return found

    def _place(self) -> str:
        return f"task {self.name}: source: {self.config.source!r}"


def _names(dataset: Any, column: str) -> list[str]:
    """Return the names of the classes: the data's own, or those in `label_text`, or the numbers."""
    feature = dataset.features[column]
    if hasattr(feature, "names"):
        return feature.names
    numbers = dataset[column][:]
    words = dataset["label_text"][:] if "label_text" in dataset.column_names else map(str, numbers)
    named = dict(zip(numbers, words, strict=True))
    return [str(named.get(number, number)) for number in range(max(numbers) + 1)]


def _require_values(column: pandas.Series, place: str, number: bool) -> None:
    """Raise UserError for values that are missing, or texts where numbers are expected and vice versa."""
    expected = (int, float) if number else (str, dict)
    wrong = ~column.map(lambda value: isinstance(value, expected) and value == value)
    if wrong.any():
        row = int(wrong.argmax())
        value, kind = column[row], "a number" if number else "a text"
        missing = value is None or value != value
        fault = "the value is missing" if missing else f"{_short(repr(value))} is not {kind}"
        raise UserError(f"{place}, row {row + 1}: {fault}")


def _short(error: object) -> str:
    return " ".join(str(error).split())[:200]
