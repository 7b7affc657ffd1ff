"""Prepared data: a task's examples as token ids, on disk and in memory.

`prepare` tokenises a task once for a model, for all methods, partitions and seeds. `Prepared` reads the
result and gives splits and batches. An example is one row of the pool: partitions and splits are arrays of
row numbers. For question answering an example has one or more windows over its document, each a model
input of its own; for all other kinds it has exactly one.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pyarrow
import pyarrow.parquet

from fedlm.base.errors import UserError
from fedlm.base.files import write_atomically
from fedlm.base.randomness import numpy_stream

FORMAT = 1
SPLITS = ["", "train", "validation", "test"]  # "" is assigned by the seed
REGRESSION_BINS = 10
IGNORED = -100  # The label of a token that is not a target, as Transformers' models expect it.


class Split(NamedTuple):
    """Row numbers into the pool: sorted int64 arrays without overlap."""

    train: numpy.ndarray
    validation: numpy.ndarray
    test: numpy.ndarray


# ---------------------------------------------------------------------------------------------------------
# Preparing


def room(prompt: int, target: int, length: int) -> tuple[int, int]:
    """Return how many tokens of the prompt's end and of the target's beginning fit into `length`.

    The prompt may reduce the target to half of the length; beyond that the prompt is cut.
    """
    after = min(target, max(length - prompt, length // 2))
    return min(prompt, length - after), after


def drawn_count(share: float, cap: int | None, available: int) -> int:
    """Return how many of `available` training examples go to a split that has no official rows."""
    count = round(share * available)
    return max(1, min(count, cap or count))


def split_sizes(
    training: int, official: dict[str, int], shares: dict[str, float], caps: dict[str, int | None]
) -> dict[str, int]:
    """Return how many examples `Prepared.split` gives to each split, 0 where there are too few.

    `training` examples are not in an official split, `official` counts those of validation and test.
    """
    sizes = {"train": training, **official}
    for name in ("test", "validation"):
        if not sizes[name]:
            sizes[name] = min(drawn_count(shares[name], caps[name], training), sizes["train"])
            sizes["train"] -= sizes[name]
    return {name: min(size, caps[name] or size) for name, size in sizes.items()}


def draw(
    pool: numpy.ndarray, strata: numpy.ndarray, count: int, random: numpy.random.Generator
) -> numpy.ndarray:
    """Return `count` row numbers of the pool, sorted, with each stratum's share.

    They are evenly spaced in the pool, shuffled and sorted by stratum; `strata` (pool,) are integers.
    """
    shuffled = random.permutation(len(pool))
    ordered = pool[shuffled[numpy.argsort(strata[shuffled], kind="stable")]]
    count = min(count, len(pool))
    return numpy.sort(ordered[((numpy.arange(count) + 0.5) * len(pool) / max(count, 1)).astype(int)])


def deciles(values: numpy.ndarray) -> numpy.ndarray:
    """Return the decile of each number, int64, which serves as its label when examples are divided."""
    edges = numpy.quantile(values, numpy.linspace(0, 1, REGRESSION_BINS + 1)[1:-1])
    return numpy.searchsorted(edges, values, side="right").astype(numpy.int64)


def content_hash(columns: dict, description: dict) -> str:
    """Return the SHA-256 of the examples and their split, independent of how the file was written."""
    digest = hashlib.sha256()
    for name, column in sorted(columns.items()):
        if isinstance(column, numpy.ndarray):
            content: bytes | memoryview = numpy.ascontiguousarray(column).data
        else:
            content = json.dumps(column.to_pylist()).encode()
        digest.update(f"{name} {getattr(column, 'dtype', 'text')} {len(column)}\n".encode())
        digest.update(content)
    described = {key: value for key, value in description.items() if key != "sha256"}
    digest.update(json.dumps(described, sort_keys=True).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------
# Reading

# The columns, by what each value belongs to.
_OF_TOKENS = {"tokens", "token_types", "character_start", "character_end"}
_OF_WINDOWS = {"start_position", "end_position"}


@dataclass(frozen=True)
class Prepared:
    """A task's examples as token ids.

    Attributes:
        description: what `task.json` holds.
        columns: one flat array per column; `window_offsets` (windows + 1,) cuts the columns of tokens into
            windows, `example_offsets` (examples + 1,) the columns of windows into examples.
    """

    description: dict
    columns: dict

    def save(self, folder: Path) -> None:
        """Write the folder; the same examples give the same bytes."""
        windows, examples = self.columns["window_offsets"], self.columns["example_offsets"]
        table = {}
        for name, column in self.columns.items():
            if name in ("window_offsets", "example_offsets"):
                continue
            column = pyarrow.array(column)
            if name in _OF_TOKENS:
                column = pyarrow.LargeListArray.from_arrays(windows, column)
            if name in _OF_TOKENS | _OF_WINDOWS:
                column = pyarrow.LargeListArray.from_arrays(examples, column)
            table[name] = column
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.table(table), sink, compression="zstd")
        write_atomically(folder / "examples.parquet", memoryview(sink.getvalue()))
        text = json.dumps(self.description, indent=2, ensure_ascii=False) + "\n"
        write_atomically(folder / "task.json", text.encode())

    @classmethod
    def load(cls, folder: Path) -> "Prepared":
        """Read a folder that `save` wrote.

        Raises:
            UserError: the folder is missing, incomplete or damaged (its content has another hash).
        """
        folder = Path(folder)
        try:
            description = json.loads((folder / "task.json").read_text(encoding="utf-8"))
            table = pyarrow.parquet.read_table(folder / "examples.parquet")
            columns = {}
            for name in table.column_names:
                column = table[name].combine_chunks()
                if name in _OF_TOKENS | _OF_WINDOWS:
                    columns["example_offsets"], column = column.offsets.to_numpy(), column.values
                if name in _OF_TOKENS:
                    columns["window_offsets"], column = column.offsets.to_numpy(), column.values
                columns[name] = column if name in ("context", "answers") else column.to_numpy()
            whole = description.get("format") == FORMAT
            whole = whole and description["sha256"] == content_hash(columns, description)
        except (OSError, ValueError, KeyError, AttributeError, pyarrow.ArrowException) as error:
            raise UserError(f"{folder}: prepared data cannot be read here ({error}): prepare again") from None
        if not whole:
            raise UserError(f"{folder}: the prepared data are damaged or of another version: prepare again")
        return cls(description, columns)

    def __len__(self) -> int:
        return len(self.columns["example_offsets"]) - 1

    def __getattr__(self, name: str) -> Any:
        # Only called for attributes not found otherwise: kind, metric, sha256, max_length ...
        try:
            return self.__dict__["description"][name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def num_labels(self) -> int:
        """Outputs of the model's head: classes, 1 for regression, 2 (start and end) for answers."""
        return 2 if self.kind == "question_answering" else max(len(self.label_names), 1)

    @property
    def labels(self) -> numpy.ndarray:
        """For partitioning, int64 (examples,): the class, the decile of a number, 0 where there is none."""
        if self.kind == "classification":
            return self.columns["label"]
        if self.kind == "regression":
            return deciles(self.columns["label"])
        return numpy.zeros(len(self), numpy.int64)

    def class_counts(self, split: Split | None = None) -> list[dict[str, Any]]:
        """Return each class with its number of examples; without classes, nothing.

        Each is `{"name": ..., "examples": n}`; with a split, `train`, `validation` and `test` for `examples`.
        """
        if self.kind != "classification":
            return []
        parts = {"examples": slice(None)} if split is None else split._asdict()
        counts = {
            name: numpy.bincount(self.labels[part], minlength=self.num_labels).tolist()
            for name, part in parts.items()
        }
        return [
            {"name": label, **{name: found[number] for name, found in counts.items()}}
            for number, label in enumerate(self.label_names)
        ]

    @property
    def groups(self) -> numpy.ndarray | None:
        """The natural client population of each example, an index into `group_names`; None without any."""
        return self.columns.get("group")

    @property
    def windows(self) -> numpy.ndarray:
        """Model inputs of each example, (examples,): 1 except for question answering."""
        return numpy.diff(self.columns["example_offsets"])

    @cached_property
    def lengths(self) -> numpy.ndarray:
        """Tokens of each example's longest window, (examples,)."""
        lengths = numpy.diff(self.columns["window_offsets"])
        return numpy.maximum.reduceat(lengths, self.columns["example_offsets"][:-1])

    def split(self, seed: int) -> Split:
        """Return the training, validation and test examples.

        Official splits are kept. A missing split is drawn from the training examples using the seed,
        stratified by label: a share of them, or the cap if that is less. Splits above their cap are cut in
        the same way. All methods and partitions of a seed have the same splits.

        Raises:
            UserError: there are too few examples for three parts.
        """
        random = numpy_stream(seed, "split")
        split = self.columns["split"]
        parts = {"train": numpy.flatnonzero(split <= 1), "validation": split == 2, "test": split == 3}
        # Shares refer to all original training rows, even where few of them were tokenised.
        available = self.description.get("training_rows", len(parts["train"]))
        for name in ("test", "validation"):
            parts[name] = numpy.flatnonzero(parts[name])
            if not len(parts[name]):
                count = drawn_count(self.shares[name], self.caps[name], available)
                parts[name] = self._draw(parts["train"], count, random)
                parts["train"] = numpy.setdiff1d(parts["train"], parts[name])
        for name, part in parts.items():
            if not len(part):
                raise UserError(f"task {self.task}: {len(self)} examples are too few for a {name} split")
            if self.caps[name] is not None and self.caps[name] < len(part):
                parts[name] = self._draw(part, self.caps[name], random)
        return Split(**parts)

    def _draw(self, pool: numpy.ndarray, count: int, random: numpy.random.Generator) -> numpy.ndarray:
        """Draw examples, with each label's share: evenly spaced in the pool, shuffled and sorted by label."""
        return draw(pool, self.labels[pool], count, random)

    def batch_length(self, indices: numpy.ndarray) -> int:
        """Return the tokens to which `batch` pads: the longest, rounded up to 8, at most `max_length`."""
        return self._padded(self.lengths[indices].max())

    def batch(self, indices: numpy.ndarray) -> dict:
        """Return the examples as tensors for the model's forward, all of their windows in order.

        Returns:
            int64 tensors of shape (windows, length): `input_ids`, `attention_mask`, with two kinds of tokens
            `token_type_ids`; and `labels`: (windows,) class or float32 number, (windows, length) for causal,
            with -100 where a token is not a target; or `start_positions` and `end_positions` (windows,).
        """
        import torch

        columns, indices = self.columns, numpy.asarray(indices)
        windows = self._windows_of(indices)
        mask, source = self._layout(windows)
        arrays = {
            "input_ids": _fill(mask, columns["tokens"][source], self.pad_token_id),
            "attention_mask": mask.astype(numpy.int64),
        }
        if "token_types" in columns:
            arrays["token_type_ids"] = _fill(mask, columns["token_types"][source], 0)
        if self.kind == "classification":
            arrays["labels"] = columns["label"][indices]
        elif self.kind == "regression":
            arrays["labels"] = columns["label"][indices].astype(numpy.float32)
        elif self.kind == "causal":
            positions = numpy.arange(mask.shape[1])
            target = mask & (positions >= columns["target_start"][indices][:, None])
            arrays["labels"] = numpy.where(target, arrays["input_ids"], IGNORED)
        else:
            arrays["start_positions"] = columns["start_position"][windows].astype(numpy.int64)
            arrays["end_positions"] = columns["end_position"][windows].astype(numpy.int64)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def characters(self, indices: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Return where each token of a question answering batch starts and ends in its document.

        Two arrays (windows, length) that go with those of `batch`; -1 for tokens outside the document.
        """
        mask, source = self._layout(self._windows_of(numpy.asarray(indices)))
        starts, ends = self.columns["character_start"], self.columns["character_end"]
        return _fill(mask, starts[source], -1), _fill(mask, ends[source], -1)

    def cap_length(self, tokens: int) -> "Prepared":
        """Return the same examples cut to at most so many tokens, for a method whose own tokens need room.

        Special tokens at the end stay. A causal example is cut as when it was prepared. `sha256` stays that
        of the uncut examples.

        Raises:
            UserError: windows for question answering, which would lose a part of the document.
        """
        if tokens >= self.max_length:
            return self
        if self.kind == "question_answering":
            raise UserError(
                f"task {self.task}: max_length: {self.max_length}; allowed: at most {tokens} with a method "
                "that takes positions of the model for itself"
            )
        trailing = self.trailing_special_tokens
        if tokens <= trailing + 1:
            raise UserError(f"task {self.task}: only {tokens} tokens of the model are left for the text")
        lengths = self.lengths
        keep = numpy.ones(len(self.columns["tokens"]), bool)
        columns = dict(self.columns)
        if self.kind == "causal":
            columns["target_start"] = columns["target_start"].copy()
        for example in numpy.flatnonzero(lengths > tokens):
            start, end = self.columns["window_offsets"][example : example + 2]
            if self.kind == "causal":
                prompt = int(self.columns["target_start"][example])
                before, after = room(prompt, end - start - prompt, tokens)
                keep[start : start + prompt - before] = False
                keep[start + prompt + after : end] = False
                columns["target_start"][example] = before
            else:
                keep[start + tokens - trailing : end - trailing] = False
        for name in _OF_TOKENS & set(columns):
            columns[name] = columns[name][keep]
        lengths = numpy.minimum(lengths, tokens)
        columns["window_offsets"] = numpy.concatenate([[0], numpy.cumsum(lengths, dtype=numpy.int64)])
        return Prepared({**self.description, "max_length": tokens}, columns)

    def _padded(self, length: int) -> int:
        return min(-(-int(length) // 8) * 8, self.max_length)

    def _layout(self, windows: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Return which cells of a batch hold a token, (windows, length), and for these where the token is."""
        starts = self.columns["window_offsets"][windows]
        lengths = self.columns["window_offsets"][windows + 1] - starts
        positions = numpy.arange(self._padded(lengths.max()))
        mask = positions < lengths[:, None]
        return mask, (starts[:, None] + positions)[mask]

    def _windows_of(self, examples: numpy.ndarray) -> numpy.ndarray:
        """Return the windows of examples, in order; an example is its only window unless there are more."""
        if self.kind != "question_answering":
            return examples
        offsets = self.columns["example_offsets"]
        counts = offsets[examples + 1] - offsets[examples]
        first = numpy.repeat(offsets[examples] - (numpy.cumsum(counts) - counts), counts)
        return first + numpy.arange(len(first))


def _fill(mask: numpy.ndarray, values: numpy.ndarray, padding: int) -> numpy.ndarray:
    filled = numpy.full(mask.shape, padding, numpy.int64)
    filled[mask] = values
    return filled
