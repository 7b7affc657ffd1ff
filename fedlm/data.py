"""Prepared data: a task's examples as token ids, on disk and in memory.

`prepare` tokenises a task once for a model, for all methods, partitions and seeds. `Prepared` reads the
result and gives splits and batches. An example is one row of the pool: partitions and splits are arrays of
row numbers. For question answering an example has one or more windows over its document, each a model
input of its own; for all other kinds it has exactly one.
"""

import hashlib
import itertools
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy
import pyarrow
import pyarrow.parquet

from fedlm.errors import UserError
from fedlm.files import write_atomically
from fedlm.randomness import numpy_stream
from fedlm.task import Corpus, Task

FORMAT = 1
SPLITS = ["", "train", "validation", "test"]  # "" is assigned by the seed
REGRESSION_BINS = 10
IGNORED = -100  # The label of a token that is no target, as Transformers' models know it.
# Texts are cut to so many characters per token of `max_length` before they are tokenised, so that one huge
# text costs no more than a long one. Running text has about 4.
CHARACTERS_PER_TOKEN = 64
CHUNK = 1000


class Split(NamedTuple):
    """Row numbers into the pool: sorted int64 arrays without overlap."""

    train: numpy.ndarray
    validation: numpy.ndarray
    test: numpy.ndarray


# ---------------------------------------------------------------------------------------------------------
# Preparing


def prepare(task: Task, model, destination: Path) -> "Prepared":
    """Tokenise a task's examples and write `examples.parquet` and `task.json` into `destination`.

    Args:
        task: the task.
        model: the ModelConfig whose tokenizer is used, and whose positions bound the length.
        destination: a folder, made if absent.

    Raises:
        UserError: the data are bad, or `max_length` exceeds the model's positions.
    """
    from fedlm import models  # Here, since it imports torch and Transformers, which reading does not need.

    task.check()
    limit = models.max_positions(model)
    if limit is not None and task.config.max_length > limit:
        raise UserError(
            f"task {task.name}: max_length: {task.config.max_length}; allowed: at most {limit}, "
            f"the positions of model {model.source}"
        )
    tokenizer = models.load_tokenizer(model)
    if task.kind == "question_answering" and not tokenizer.is_fast:
        raise UserError(
            f"task {task.name}: the tokenizer of model {model.source} does not say where in the text its "
            "tokens are; allowed: a model with a fast tokenizer (tokenizer.json)"
        )
    prepared = tokenise(task, task.load(), tokenizer)
    prepared.split(seed=0)  # Raises if there are too few examples.
    prepared.save(Path(destination))
    return prepared


def tokenise(task: Task, corpus: Corpus, tokenizer) -> "Prepared":
    """Return a task's corpus as token ids of `tokenizer` (a fast tokenizer of Transformers)."""
    from fedlm import metrics

    rows, config = corpus.rows, task.config
    leading, trailing = _special_tokens(tokenizer)
    encode = {"causal": _causal_windows, "question_answering": _answer_windows}.get(task.kind, _text_windows)
    # In chunks, since Python's lists of numbers take ten times the memory of arrays.
    chunks = [rows.iloc[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    parts = [encode(chunk, tokenizer, config, leading) for chunk in chunks]
    columns = {name: numpy.concatenate([part[name] for part in parts]) for name in parts[0]}
    for offsets, counts in {"window_offsets": "tokens_each", "example_offsets": "windows_each"}.items():
        columns[offsets] = numpy.concatenate([[0], numpy.cumsum(columns.pop(counts), dtype=numpy.int64)])
    if "token_types" in columns and not columns["token_types"].any():
        del columns["token_types"]  # What a model takes them for when it is told nothing.
    columns["split"] = numpy.array([SPLITS.index(split) for split in rows["split"]], numpy.int8)
    if task.kind in ("classification", "regression"):
        columns["label"] = rows["label"].to_numpy(numpy.int64 if task.kind == "classification" else float)
    if task.kind == "question_answering":
        columns["context"] = pyarrow.array(list(rows["context"]), pyarrow.large_string())
        columns["answers"] = pyarrow.array(list(rows["answers"]), pyarrow.list_(pyarrow.string()))
    if corpus.group_names:
        columns["group"] = rows["group"].to_numpy(numpy.int32)
    description = {
        "format": FORMAT,
        "task": task.name,
        "title": task.title,
        "kind": task.kind,
        "metric": task.metrics[0],
        "metrics": list(task.metrics),
        "greater_is_better": metrics.greater_is_better(task.kind, task.metrics[0]),
        "label_names": corpus.label_names,
        "group_names": corpus.group_names,
        "examples": len(rows),
        "dropped": corpus.dropped,
        "max_length": config.max_length,
        "pad_token_id": _padding(tokenizer),
        "trailing_special_tokens": 0 if task.kind == "causal" else len(trailing),
        "max_answer_tokens": getattr(config, "max_answer_tokens", None),
        "unanswerable": task.kind == "question_answering" and not all(map(len, rows["answers"])),
        "shares": {"validation": config.validation_share, "test": config.test_share},
        "caps": {
            "train": config.train_examples,
            "validation": config.validation_examples,
            "test": config.test_examples,
        },
    }
    return Prepared({**description, "sha256": _content_hash(columns, description)}, columns)


def _text_windows(rows, tokenizer, config, leading) -> dict:
    """One window an example: the text, or the pair of texts, cut at the end of the longer one."""
    limit = CHARACTERS_PER_TOKEN * config.max_length
    columns = [column for column in ("text", "text_pair") if column in rows]
    texts = [[text[:limit] for text in rows[column]] for column in columns]
    encoded = tokenizer(*texts, truncation=True, max_length=config.max_length)
    # A decoder's tokenizer gives nothing for an empty text, and a model cannot read nothing.
    found = _one_window_each([window or [_padding(tokenizer)] for window in encoded["input_ids"]])
    if "token_type_ids" in encoded:
        found["token_types"] = _flat(encoded["token_type_ids"], numpy.int8)
    return found


def _causal_windows(rows, tokenizer, config, leading) -> dict:
    """One window an example: leading special tokens, prompt, target, end of text. Only the target counts.

    Prompt and target are tokenised apart, as a model that answers a prompt sees them.
    """
    limit = CHARACTERS_PER_TOKEN * config.max_length
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # The end of a long prompt is what the answer depends on most; of a long target, the beginning.
    prompts = tokenizer([text[-limit:] for text in rows["prompt"]], add_special_tokens=False)
    targets = tokenizer([text[:limit] for text in rows["target"]], add_special_tokens=False)
    windows, target_starts = [], []
    for prompt, target in zip(prompts["input_ids"], targets["input_ids"], strict=True):
        # The first target token needs one before it from which it is predicted.
        prompt, target = leading + prompt or end or [_padding(tokenizer)], target + end
        before, after = _room(len(prompt), len(target), config.max_length)
        windows.append(prompt[len(prompt) - before :] + target[:after])
        target_starts.append(before)
    return {**_one_window_each(windows), "target_start": numpy.array(target_starts, numpy.int32)}


def _room(prompt: int, target: int, length: int) -> tuple[int, int]:
    """Return how many tokens of the prompt's end and of the target's beginning fit into `length`.

    The prompt may push the target down to half of the length; then it is cut itself.
    """
    after = min(target, max(length - prompt, length // 2))
    return min(prompt, length - after), after


def _answer_windows(rows, tokenizer, config, leading) -> dict:
    """Question and document in overlapping windows; where the answer is, in tokens of each window.

    A window that does not hold the whole (first) answer points at position 0, as Transformers' own script
    has it. `character_start` and `character_end` are positions in the document of each token, -1 for
    tokens that are not of the document.
    """
    limit = CHARACTERS_PER_TOKEN * config.max_length
    encoded = tokenizer(
        [_cut(question[:limit], tokenizer, config.max_length // 2) for question in rows["question"]],
        [context[: limit * config.max_windows] for context in rows["context"]],
        truncation="only_second",
        max_length=config.max_length,
        stride=config.doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    kept, characters, spans = [], [], []
    windows_each = numpy.zeros(len(rows), numpy.int64)
    answers, answer_starts = list(rows["answers"]), list(rows["answer_start"])
    for window, example in enumerate(encoded["overflow_to_sample_mapping"]):
        if windows_each[example] == config.max_windows:
            continue
        windows_each[example] += 1
        kept.append(window)
        of_document = numpy.array(encoded.sequence_ids(window), float) == 1
        places = numpy.where(of_document[:, None], encoded["offset_mapping"][window], -1)
        characters.append(places.astype(numpy.int32))
        span = (0, 0)
        if len(answers[example]):
            start = answer_starts[example][0]
            span = _span(places, start, start + len(answers[example][0]))
        spans.append(span)
    found = _one_window_each([encoded["input_ids"][window] for window in kept])
    found["windows_each"] = windows_each
    if "token_type_ids" in encoded:
        found["token_types"] = _flat([encoded["token_type_ids"][window] for window in kept], numpy.int8)
    found["character_start"], found["character_end"] = numpy.concatenate(characters).T
    found["start_position"], found["end_position"] = numpy.array(spans, numpy.int32).T
    return found


def _cut(question: str, tokenizer, tokens: int) -> str:
    """Return the beginning of a question that is at most so many tokens long."""
    offsets = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return question if len(offsets) <= tokens else question[: offsets[tokens - 1][1]]


def _span(characters: numpy.ndarray, start: int, end: int) -> tuple[int, int]:
    """Return the first and last token that hold the characters start..end, or (0, 0) if not all are here."""
    in_context = numpy.flatnonzero(characters[:, 0] >= 0)
    if not len(in_context) or characters[in_context[0], 0] > start or characters[in_context[-1], 1] < end:
        return 0, 0
    first = in_context[numpy.searchsorted(characters[in_context, 1], start, side="right")]
    last = in_context[numpy.searchsorted(characters[in_context, 0], end, side="left") - 1]
    return int(first), int(last)


def _special_tokens(tokenizer) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def _padding(tokenizer) -> int:
    """Return the token that fills up a batch; it is masked, so that any token would do."""
    found = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, 0]
    return next(token for token in found if token is not None)


def _one_window_each(windows: list[list[int]]) -> dict:
    return {
        "tokens": _flat(windows, numpy.int32),
        "tokens_each": numpy.array([len(window) for window in windows], numpy.int64),
        "windows_each": numpy.ones(len(windows), numpy.int64),
    }


def _flat(windows: list[list[int]], dtype) -> numpy.ndarray:
    return numpy.fromiter(itertools.chain.from_iterable(windows), dtype)


def _content_hash(columns: dict, description: dict) -> str:
    """Return the SHA-256 of what the examples are and how they are split, whatever wrote the file."""
    digest = hashlib.sha256()
    for name, column in sorted(columns.items()):
        if isinstance(column, numpy.ndarray):
            content = numpy.ascontiguousarray(column)
        else:
            content = json.dumps(column.to_pylist()).encode()
        digest.update(f"{name} {getattr(column, 'dtype', 'text')} {len(column)}\n".encode())
        digest.update(content)
    described = {key: value for key, value in description.items() if key != "sha256"}
    digest.update(json.dumps(described, sort_keys=True).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------
# Reading

# Columns by what one value belongs to.
_OF_TOKENS = {"tokens", "token_types", "character_start", "character_end"}
_OF_WINDOWS = {"start_position", "end_position"}


@dataclass(frozen=True)
class Prepared:
    """A task's examples as token ids.

    Attributes:
        description: what `task.json` holds.
        columns: one flat array a column; `window_offsets` (windows + 1,) cuts the columns of tokens into
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
            whole = whole and description["sha256"] == _content_hash(columns, description)
        except (OSError, ValueError, KeyError, AttributeError, pyarrow.ArrowException) as error:
            raise UserError(f"{folder}: no prepared data can be read here ({error}): prepare again") from None
        if not whole:
            raise UserError(f"{folder}: the prepared data are damaged or of another version: prepare again")
        return cls(description, columns)

    def __len__(self) -> int:
        return len(self.columns["example_offsets"]) - 1

    def __getattr__(self, name: str):
        # Only called for what is not found otherwise: kind, metric, sha256, max_length ...
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
            values = self.columns["label"]
            edges = numpy.quantile(values, numpy.linspace(0, 1, REGRESSION_BINS + 1)[1:-1])
            return numpy.searchsorted(edges, values, side="right").astype(numpy.int64)
        return numpy.zeros(len(self), numpy.int64)

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

        Official splits are kept. What is missing is drawn by the seed from the training examples, stratified
        by label: a share of them, or the cap if that is less. Larger splits are cut to their caps likewise.
        All methods and partitions of a seed have the same split.

        Raises:
            UserError: there are too few examples for three parts.
        """
        random = numpy_stream(seed, "split")
        split = self.columns["split"]
        parts = {"train": numpy.flatnonzero(split <= 1), "validation": split == 2, "test": split == 3}
        available = len(parts["train"])
        for name in ("test", "validation"):
            parts[name] = numpy.flatnonzero(parts[name])
            if not len(parts[name]):
                count = round(self.shares[name] * available)
                count = max(1, min(count, self.caps[name] or count))
                parts[name] = self._draw(parts["train"], count, random)
                parts["train"] = numpy.setdiff1d(parts["train"], parts[name])
        for name, part in parts.items():
            if not len(part):
                raise UserError(f"task {self.task}: {len(self)} examples are too few for a {name} split")
            if self.caps[name] is not None and self.caps[name] < len(part):
                parts[name] = self._draw(part, self.caps[name], random)
        return Split(**parts)

    def _draw(self, pool: numpy.ndarray, count: int, random: numpy.random.Generator) -> numpy.ndarray:
        """Draw examples, each label its share: evenly spaced in the pool, shuffled and sorted by label."""
        shuffled = random.permutation(pool)
        ordered = shuffled[numpy.argsort(self.labels[shuffled], kind="stable")]
        count = min(count, len(pool))
        return numpy.sort(ordered[((numpy.arange(count) + 0.5) * len(pool) / max(count, 1)).astype(int)])

    def batch_length(self, indices: numpy.ndarray) -> int:
        """Return the tokens to which `batch` pads: the longest, rounded up to 8, at most `max_length`."""
        return self._padded(self.lengths[indices].max())

    def batch(self, indices: numpy.ndarray) -> dict:
        """Return the examples as tensors for the model's forward, all of their windows in order.

        Returns:
            int64 tensors of shape (windows, length): `input_ids`, `attention_mask`, with two kinds of tokens
            `token_type_ids`; and `labels`: (windows,) class or float32 number, (windows, length) for causal,
            where what is no target is -100; or `start_positions` and `end_positions` (windows,).
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

        Two arrays (windows, length) beside those of `batch`; -1 for tokens that are not of the document.
        """
        mask, source = self._layout(self._windows_of(numpy.asarray(indices)))
        columns = (self.columns["character_start"], self.columns["character_end"])
        return tuple(_fill(mask, column[source], -1) for column in columns)

    def cap_length(self, tokens: int) -> "Prepared":
        """Return the same examples cut to at most so many tokens, for a method whose own tokens need room.

        Special tokens at the end stay. A causal example is cut as in preparing it. `sha256` stays that of the
        uncut examples.

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
                before, after = _room(prompt, end - start - prompt, tokens)
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
