"""A task: data, how it becomes model input, label words and metrics. One file (or family) in `tasks/` each.

To add one, write a subclass of `Task` in a file in `tasks/`; see docs/adding-a-task.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

import pandas
from pydantic import Field

from fedlm.base.errors import UserError
from fedlm.base.settings import Settings
from fedlm.models.config import Kind

# What a row holds besides `split` and, optionally, `group`. `text_pair` is optional.
COLUMNS = {
    "classification": ("text", "label"),
    "regression": ("text", "label"),
    "causal": ("prompt", "target"),
    "question_answering": ("question", "context", "answers", "answer_start"),
}
# The columns that a model reads: two rows that agree in them are duplicates.
INPUTS = {
    "classification": ("text", "text_pair"),
    "regression": ("text", "text_pair"),
    "causal": ("prompt", "target"),
    "question_answering": ("question", "context"),
}
DEFAULT_METRICS = {
    "classification": ("accuracy", "macro_f1"),
    "regression": ("pearson", "spearman"),
    "causal": ("loss", "perplexity", "exact_match"),
    "question_answering": ("f1", "exact_match"),
}


class Windows(Settings):
    """Additional settings of question answering."""

    doc_stride: int = Field(
        128, ge=0, description="tokens that neighbouring windows of a document share (Transformers' word)"
    )
    max_windows: int = Field(
        32, ge=1, le=100_000, description="windows of one document; text after them is ignored"
    )
    max_answer_tokens: int = Field(30, ge=1, le=100_000, description="longest answer that is predicted")


def check_windows(max_length: int, doc_stride: int) -> None:
    """Raise ValueError if the settings leave no room for a document next to the longest question."""
    if max_length < 32 or doc_stride >= max_length // 2 - 8:
        raise ValueError(
            f"max_length {max_length} with doc_stride {doc_stride}; allowed: at least 32 with "
            f"a stride below {max_length // 2 - 8} (half is for the question)"
        )


class Findings(NamedTuple):
    """What a task's data show before they are prepared.

    Attributes:
        notes: what their owner should know, a line each.
        training: how many training examples there are, None if it is not known.
        classes: how many examples each class has, in all splits; empty if it is not known.
    """

    notes: list[str]
    training: int | None = None
    classes: dict[str, int] = {}


@dataclass
class Corpus:
    """The raw rows of a task.

    Attributes:
        rows: one row per example, in a fixed order, with the columns of `COLUMNS` for the task's kind;
            `label` is a class index (classification) or a float (regression); `answers` and `answer_start`
            are lists of equal length (texts, and character positions in `context`), empty where there is
            no answer. Optional: `split` ("train", "validation", "test" where the data come with official
            splits, else ""), `group` (index into `group_names`), `text_pair`.
        label_names: the words for the classes, empty unless classification.
        group_names: the names of the natural client populations, empty where there are none.
        dropped: how many rows were dropped, by reason.
        training_rows: how many training rows there were before the pool was cut (see `fedlm.data.pool`),
            None if it was not.
    """

    rows: pandas.DataFrame
    label_names: list[str] = field(default_factory=list)
    group_names: list[str] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    training_rows: int | None = None


class Task:
    """Base class of all tasks.

    Attributes:
        name: the label by which a study names the task.
        title: for tables and figures.
        reference: one line on where the data come from.
        kind: what the model does with it.
        metrics: names of `fedlm.data.metrics`, the main one first; if empty, those of the kind.
        label_names: the words for the classes, where they are known without the data.
        has_groups: whether the data have natural client populations.
    """

    name: ClassVar[str]
    title: str
    reference: str
    kind: Kind = "classification"
    metrics: tuple[str, ...] = ()
    label_names: Sequence[str] = ()
    has_groups: bool = False

    class Config(Settings):
        """The settings of every task."""

        max_length: int = Field(128, ge=8, le=1_000_000, description="longest model input, in tokens")
        train_examples: int | None = Field(None, ge=1, description="at most so many, drawn using the seed")
        validation_examples: int | None = Field(
            None, ge=1, description="at most so many, drawn using the seed"
        )
        test_examples: int | None = Field(None, ge=1, description="at most so many, drawn using the seed")
        validation_share: float = Field(
            0.1, gt=0, lt=0.5, description="of the training rows, if none is official"
        )
        test_share: float = Field(0.2, gt=0, lt=0.5, description="of the training rows, if none is official")

    config: Config

    def __init__(self, config: Config | dict | None = None) -> None:
        self.config = self.Config(**(config or {})) if isinstance(config, dict | None) else config
        self.metrics = self.metrics or DEFAULT_METRICS[self.kind]

    def check(self) -> None:
        """Raise UserError if the data are not available. Cheap: no model, no download, no tokenisation."""

    def examine(self) -> Findings:
        """Return what can be known of the reader's own data by reading them once; nothing for fixed data.

        Raises UserError for what `load` would refuse. No model, no download, no tokenisation.
        """
        return Findings([])

    def files(self) -> list[Path]:
        """Return the files that the task's data come from, if they can change; none if its data are fixed."""
        return []

    def count_labels(self) -> int | None:
        """Return how many labels examples can be divided by, None if only the data show it. Cheap."""
        if self.kind == "classification":
            return len(self.label_names) or None
        return None if self.kind == "regression" else 1

    def rows(self) -> Corpus:
        """Return the raw rows, duplicates included. The one method that a task must write."""
        raise NotImplementedError

    def load(self) -> Corpus:
        """Return the raw rows without those that are `unusable`, after checking the columns."""
        corpus = self.rows()
        missing = [column for column in COLUMNS[self.kind] if column not in corpus.rows]
        if missing:
            raise TypeError(f"task {self.name} has no column {missing[0]!r}, which {self.kind} needs")
        if "split" not in corpus.rows:
            corpus.rows["split"] = ""
        repeated, empty = unusable(corpus.rows, self.kind)
        corpus.dropped |= {"duplicates": int((repeated & ~empty).sum()), "empty": int(empty.sum())}
        corpus.rows = corpus.rows[~repeated & ~empty].reset_index(drop=True)
        if not len(corpus.rows):
            raise UserError(f"task {self.name}: no example is left; dropped: {corpus.dropped}")
        if self.kind == "classification" and corpus.rows["label"].nunique() < 2:
            only = corpus.label_names[corpus.rows["label"].iloc[0]]
            raise UserError(f"task {self.name}: all examples are of the class {only!r}; allowed: at least 2")
        return corpus


def unusable(rows: pandas.DataFrame, kind: Kind) -> tuple[pandas.Series, pandas.Series]:
    """Return which rows repeat the model input of another row (whatever their label), and which have none.

    Official test and validation rows are never among them, as published numbers count them all; training
    rows that repeat one of them are, so that no test text is trained on. Otherwise the first of several equal
    rows stays.
    """
    inputs = rows[[column for column in INPUTS[kind] if column in rows]]
    official = rows["split"].isin(["test", "validation"])
    if official.any():
        # Sorted so that the rows to keep come first; a stable sort keeps the order among equals.
        order = rows["split"].map({"test": 0, "validation": 1}).fillna(2).sort_values(kind="stable").index
        repeated = inputs.loc[order].duplicated().reindex(rows.index)
    else:
        repeated = inputs.duplicated()
    empty = inputs.apply(lambda column: column.str.strip() == "").all(axis=1)
    return repeated & ~official, empty & ~official
