"""Tokenising: from a task's raw rows to prepared data, once for all methods, partitions and seeds."""

import itertools
from pathlib import Path
from typing import Any

import numpy
import pandas
import pyarrow
from tqdm import tqdm

from fedlm.base.errors import UserError
from fedlm.data import metrics
from fedlm.data.pool import cut
from fedlm.data.prepared import FORMAT, SPLITS, Prepared, content_hash, room
from fedlm.data.task import Corpus, Task
from fedlm.models.config import ModelConfig

# Texts are cut to so many characters per token of `max_length` before they are tokenised, so that one huge
# text costs no more than a long one. Running text has about 4.
CHARACTERS_PER_TOKEN = 64

CHUNK = 1000


def prepare(task: Task, model: ModelConfig, destination: Path) -> "Prepared":
    """Tokenise a task's examples and write `examples.parquet` and `task.json` into `destination`.

    Args:
        task: the task.
        model: the ModelConfig whose tokenizer is used, and whose positions bound the length.
        destination: a folder, created if absent.

    Raises:
        UserError: the data are bad, or `max_length` exceeds the model's positions.
    """
    task.check()
    # The rows come first: of a million, most are freed before PyTorch is loaded and takes its memory.
    corpus = cut(task.load(), task)
    pyarrow.default_memory_pool().release_unused()
    from fedlm.models import loading

    limit = loading.max_positions(model)
    if limit is not None and task.config.max_length > limit:
        raise UserError(
            f"task {task.name}: max_length: {task.config.max_length}; allowed: at most {limit}, "
            f"the positions of model {model.source}"
        )
    tokenizer = loading.load_tokenizer(model)
    if task.kind == "question_answering" and not tokenizer.is_fast:
        raise UserError(
            f"task {task.name}: the tokenizer of model {model.source} does not give the positions of its "
            "tokens in the text; allowed: a model with a fast tokenizer (tokenizer.json)"
        )
    prepared = tokenise(task, corpus, tokenizer)
    prepared.split(seed=0)  # Raises if there are too few examples.
    prepared.save(Path(destination))
    return prepared


def tokenise(task: Task, corpus: Corpus, tokenizer: Any) -> "Prepared":
    """Return a task's corpus as token ids of `tokenizer` (a fast tokenizer of Transformers).

    A bar shows the progress where standard error is a terminal.
    """
    rows, config = corpus.rows, task.config
    leading, trailing = special_tokens(tokenizer)
    encode = {"causal": _causal_windows, "question_answering": _answer_windows}.get(task.kind, _text_windows)
    # In chunks, since Python's lists of numbers take ten times the memory of arrays.
    chunks = [rows.iloc[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    parts = []
    # Without a terminal (`disable=None`) there is no bar.
    with tqdm(total=len(rows), desc=f"tokenising {task.name}", unit=" rows", disable=None) as bar:
        for chunk in chunks:
            parts.append(encode(chunk, tokenizer, config, leading))
            bar.update(len(chunk))
    columns = {name: numpy.concatenate([part[name] for part in parts]) for name in parts[0]}
    for offsets, counts in {"window_offsets": "tokens_each", "example_offsets": "windows_each"}.items():
        columns[offsets] = numpy.concatenate([[0], numpy.cumsum(columns.pop(counts), dtype=numpy.int64)])
    if "token_types" in columns and not columns["token_types"].any():
        del columns["token_types"]  # What a model assumes when it is given none.
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
    if corpus.training_rows is not None:
        description["training_rows"] = corpus.training_rows
    return Prepared({**description, "sha256": content_hash(columns, description)}, columns)


def _text_windows(
    rows: pandas.DataFrame, tokenizer: Any, config: Any, leading: list[int]
) -> dict[str, numpy.ndarray]:
    """One window per example: the text, or the pair of texts, cut at the end of the longer one."""
    limit = CHARACTERS_PER_TOKEN * config.max_length
    columns = [column for column in ("text", "text_pair") if column in rows]
    texts = [[text[:limit] for text in rows[column]] for column in columns]
    ids, types = _encode(tokenizer, texts, config.max_length)
    # A decoder's tokenizer returns no token for an empty text, but a model needs at least one.
    found = _one_window_each([window or [_padding(tokenizer)] for window in ids])
    if types is not None:
        found["token_types"] = _flat(types, numpy.int8)
    return found


def _encode(
    tokenizer: Any, texts: list[list[str]], max_length: int
) -> tuple[list[list[int]], list[list[int]] | None]:
    """Return the token ids of texts, or of pairs of texts, and their token types if the model has some."""
    from transformers.tokenization_utils_base import PaddingStrategy, TruncationStrategy

    typed = "token_type_ids" in tokenizer.model_input_names
    if not tokenizer.is_fast:
        encoded = tokenizer(*texts, truncation=True, max_length=max_length)
        return encoded["input_ids"], encoded["token_type_ids"] if typed else None
    # The same as that call, which also finds where each token is in its text and makes lists of masks.
    tokenizer.set_truncation_and_padding(
        padding_strategy=PaddingStrategy.DO_NOT_PAD,
        truncation_strategy=TruncationStrategy.LONGEST_FIRST,
        max_length=max_length,
        stride=0,
        pad_to_multiple_of=None,
        padding_side=None,
    )
    inputs = texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(inputs)
    return [one.ids for one in encodings], [one.type_ids for one in encodings] if typed else None


def _causal_windows(
    rows: pandas.DataFrame, tokenizer: Any, config: Any, leading: list[int]
) -> dict[str, numpy.ndarray]:
    """One window per example: leading special tokens, prompt, target, end of text. Only the target counts.

    Prompt and target are tokenised separately, as a model that answers a prompt sees them.
    """
    limit = CHARACTERS_PER_TOKEN * config.max_length
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # The answer depends most on the end of a long prompt; of a long target, the beginning counts most.
    prompts = tokenizer([text[-limit:] for text in rows["prompt"]], add_special_tokens=False)
    targets = tokenizer([text[:limit] for text in rows["target"]], add_special_tokens=False)
    windows, target_starts = [], []
    for prompt, target in zip(prompts["input_ids"], targets["input_ids"], strict=True):
        # The first target token needs one before it from which it is predicted.
        prompt, target = leading + prompt or end or [_padding(tokenizer)], target + end
        before, after = room(len(prompt), len(target), config.max_length)
        windows.append(prompt[len(prompt) - before :] + target[:after])
        target_starts.append(before)
    return {**_one_window_each(windows), "target_start": numpy.array(target_starts, numpy.int32)}


def _answer_windows(
    rows: pandas.DataFrame, tokenizer: Any, config: Any, leading: list[int]
) -> dict[str, numpy.ndarray]:
    """Question and document in overlapping windows; where the answer is, in tokens of each window.

    A window that does not hold the whole (first) answer points at position 0, as in Transformers' own
    script. `character_start` and `character_end` are positions in the document of each token, -1 for
    tokens outside the document.
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


def _cut(question: str, tokenizer: Any, tokens: int) -> str:
    """Return the beginning of a question that is at most so many tokens long."""
    offsets = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return question if len(offsets) <= tokens else question[: offsets[tokens - 1][1]]


def _span(characters: numpy.ndarray, start: int, end: int) -> tuple[int, int]:
    """Return the first and last token that hold the characters start..end, or (0, 0) if some are outside."""
    in_context = numpy.flatnonzero(characters[:, 0] >= 0)
    if not len(in_context) or characters[in_context[0], 0] > start or characters[in_context[-1], 1] < end:
        return 0, 0
    first = in_context[numpy.searchsorted(characters[in_context, 1], start, side="right")]
    last = in_context[numpy.searchsorted(characters[in_context, 0], end, side="left") - 1]
    return int(first), int(last)


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def _padding(tokenizer: Any) -> int:
    """Return the token that pads a batch; it is masked, so that any token would do."""
    found = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, 0]
    return next(token for token in found if token is not None)


def _one_window_each(windows: list[list[int]]) -> dict:
    return {
        "tokens": _flat(windows, numpy.int32),
        "tokens_each": numpy.array([len(window) for window in windows], numpy.int64),
        "windows_each": numpy.ones(len(windows), numpy.int64),
    }


def _flat(windows: list[list[int]], dtype: type) -> numpy.ndarray:
    return numpy.fromiter(itertools.chain.from_iterable(windows), dtype)
