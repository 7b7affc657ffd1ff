"""Prepared data: splits, batches, windows, determinism, damage."""

import json
import time

import numpy
import pandas
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field
from transformers import ByT5Tokenizer

from fedlm.base.errors import UserError
from fedlm.data import prepared, tokenising
from fedlm.data.pool import cut
from fedlm.data.prepared import Prepared
from fedlm.data.task import Corpus, Task, Windows
from fedlm.data.tokenising import prepare, tokenise
from fedlm.models.config import ModelConfig

WORDS = "the film was good bad and actors end worse striker scored match bank rates shares fell".split()  # noqa: SIM905


class Rows(Task):
    """A task of given rows."""

    name = title = reference = "rows"

    class Config(Task.Config, Windows):
        max_length: int = Field(16, ge=1)
        doc_stride: int = 4

    def __init__(self, rows, kind="classification", label_names=("no", "yes"), group_names=(), **config):
        self.kind = kind
        super().__init__(config)
        self.given = Corpus(
            pandas.DataFrame(rows),
            list(label_names) if kind == "classification" else [],
            list(group_names),
        )

    def rows(self):
        return Corpus(self.given.rows.copy(), self.given.label_names, self.given.group_names)


def sentences(count, seed=0, longest=12):
    random = numpy.random.default_rng(seed)
    found = set()
    while len(found) < count:
        found.add(" ".join(random.choice(WORDS, random.integers(1, longest + 1))))
    return sorted(found)


def classified(count=60, classes=2, **config):
    rows = [{"text": text, "label": index % classes} for index, text in enumerate(sentences(count))]
    names = [str(label) for label in range(classes)]
    return Rows(rows, label_names=names, **config)


def made(task, family="bert"):
    return tokenise(task, task.load(), tiny.tokenizer([" ".join(WORDS)], family))


# ------------------------------------------------------------------------------------------ duplicates


def test_the_first_of_equal_inputs_stays_whatever_its_label():
    rows = [
        {"text": "a", "label": 0},
        {"text": "b", "label": 1},
        {"text": "a", "label": 1},
        {"text": " ", "label": 1},
    ]
    corpus = Rows(rows).load()
    assert corpus.rows[["text", "label"]].values.tolist() == [["a", 0], ["b", 1]]
    assert corpus.dropped == {"duplicates": 1, "empty": 1}


def test_official_test_rows_all_stay_and_never_occur_in_training():
    rows = [
        {"text": text, "label": label, "split": split}
        for text, label, split in [
            ("a", 0, "train"),
            ("b", 1, "train"),
            ("b", 0, "train"),
            ("c", 1, "validation"),
            ("c", 1, "train"),
            ("a", 0, "test"),
            ("a", 0, "test"),
            ("", 0, "test"),
        ]
    ]
    corpus = Rows(rows).load()
    assert corpus.rows[["text", "split"]].values.tolist() == [
        ["b", "train"],
        ["c", "validation"],
        ["a", "test"],
        ["a", "test"],
        ["", "test"],
    ]
    assert corpus.dropped == {"duplicates": 3, "empty": 0}


def test_a_pair_is_a_duplicate_only_as_a_pair():
    rows = [
        {"text": "a", "text_pair": pair, "label": label} for pair, label in [("x", 0), ("y", 1), ("x", 0)]
    ]
    assert len(Rows(rows).load().rows) == 2


def test_one_class_or_no_example_is_an_error():
    with pytest.raises(UserError, match="class 'yes'"):
        Rows([{"text": "a", "label": 1}, {"text": "b", "label": 1}]).load()
    with pytest.raises(UserError, match="no example is left"):
        Rows([{"text": "", "label": 1}]).load()


# ---------------------------------------------------------------------------------------------- splits


@given(st.integers(3, 200), st.integers(2, 5), st.integers(0, 5))
@settings(max_examples=30)
def test_splits_are_disjoint_whole_and_stratified(count, classes, seed):
    labels = numpy.random.default_rng(count).integers(0, classes, count)
    prepared = Prepared(
        {
            "task": "t",
            "kind": "classification",
            "shares": {"validation": 0.1, "test": 0.2},
            "caps": {"train": None, "validation": None, "test": None},
        },
        {
            "split": numpy.zeros(count, numpy.int8),
            "label": labels,
            "example_offsets": numpy.arange(count + 1),
        },
    )
    split = prepared.split(seed)
    assert sorted(numpy.concatenate(split)) == list(range(count))
    assert len(split.test) == max(1, round(0.2 * count))
    assert len(split.validation) == max(1, round(0.1 * count))
    for label in range(classes):
        expected = (labels == label).sum() * len(split.test) / count
        assert abs((labels[split.test] == label).sum() - expected) <= 1
    assert all(part.dtype == numpy.int64 and (numpy.diff(part) > 0).all() for part in split)


def test_splits_depend_on_the_seed_alone():
    prepared = made(classified())
    assert all(map(numpy.array_equal, prepared.split(1), prepared.split(1)))
    assert not numpy.array_equal(prepared.split(1).test, prepared.split(2).test)


def test_official_splits_are_kept_and_the_rest_is_drawn_from_training():
    task = classified(60)
    task.given.rows["split"] = ["train"] * 40 + ["test"] * 20
    split = made(task).split(0)
    assert split.test.tolist() == list(range(40, 60))
    assert len(split.validation) == 4 and split.validation.max() < 40
    assert len(split.train) == 36
    task.given.rows["split"] = ["train"] * 40 + ["validation"] * 5 + ["test"] * 15
    split = made(task).split(0)
    assert [len(part) for part in split] == [40, 5, 15]


def test_caps_leave_what_they_do_not_take_to_training():
    split = made(classified(100, validation_examples=4, test_examples=6)).split(0)
    assert [len(part) for part in split] == [90, 4, 6]
    prepared = made(classified(100, train_examples=10))
    split = prepared.split(0)
    assert [len(part) for part in split] == [10, 10, 20]
    assert numpy.bincount(prepared.labels[split.train]).tolist() == [5, 5]


def test_too_few_examples_are_an_error():
    with pytest.raises(UserError, match="2 examples are too few"):
        made(classified(2)).split(0)


# --------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_a_batch_is_what_the_tokenizer_s_own_padding_gives(family):
    task = classified(30)
    prepared, tokenizer = made(task, family), tiny.tokenizer([" ".join(WORDS)], family)
    texts = task.load().rows["text"]
    indices = numpy.array([7, 3, 3, 20, 11])
    batch = prepared.batch(indices)
    expected = tokenizer(
        texts[indices].tolist(),
        padding=True,
        pad_to_multiple_of=8,
        truncation=True,
        max_length=16,
        return_tensors="pt",
    )
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert batch["labels"].tolist() == prepared.labels[indices].tolist()
    assert batch["input_ids"].shape[1] == prepared.batch_length(indices)
    assert prepared.lengths[indices].tolist() == expected["attention_mask"].sum(1).tolist()


@given(
    st.lists(
        st.tuples(*[st.lists(st.sampled_from([*WORDS, "</s>", "<s>", "é", "zz", ""])).map(" ".join)] * 2),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["bert", "roberta", "gpt2", "llama", "bytes"]),
    st.booleans(),
    st.integers(6, 20),
)
@pytest.mark.filterwarnings("ignore:This sequence already has")
def test_texts_are_tokenised_as_transformers_does(pairs, family, paired, length):
    """`bytes` is a tokenizer in Python, without `tokenizer.json`."""
    tokenizer = ByT5Tokenizer() if family == "bytes" else tiny.tokenizer([" ".join(WORDS)], family)
    texts = [list(column) for column in zip(*pairs, strict=True)][: 1 + paired]
    expected = tokenizer(*texts, truncation=True, max_length=length)
    tokenizer("film")  # which sets the length that was asked for last
    ids, types = tokenising._encode(tokenizer, texts, length)
    assert ids == expected["input_ids"]
    assert types == expected.get("token_type_ids")


def test_pairs_have_two_kinds_of_tokens_where_the_model_knows_them():
    rows = [
        {"text": "film good", "text_pair": "bank", "label": 0},
        {"text": "bad", "text_pair": "match fell", "label": 1},
    ]
    for family, known in {"bert": True, "roberta": False}.items():
        batch = made(Rows(rows), family).batch([0, 1])
        assert ("token_type_ids" in batch) == known
    batch = made(Rows(rows), "bert").batch([0, 1])
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]


def test_batches_are_padded_to_eight_and_never_beyond_the_longest_allowed():
    prepared = made(classified(30, max_length=12))
    assert prepared.lengths.max() == 12
    assert prepared.batch_length([int(prepared.lengths.argmax())]) == 12
    assert prepared.batch_length([int(prepared.lengths.argmin())]) == 8
    assert prepared.batch([int(prepared.lengths.argmax())])["input_ids"].shape == (1, 12)


def test_an_empty_test_text_is_still_a_model_input():
    rows = [
        {"text": "film", "label": 0, "split": "train"},
        {"text": "bad", "label": 1, "split": "train"},
        {"text": "", "label": 1, "split": "test"},
    ]
    prepared = made(Rows(rows), "gpt2")
    assert prepared.lengths.tolist() == [1, 1, 1]


def test_regression_labels_are_numbers_and_are_binned_for_partitioning():
    rows = [{"text": text, "label": index / 7} for index, text in enumerate(sentences(50))]
    prepared = made(Rows(rows, kind="regression"))
    batch = prepared.batch(numpy.array([0, 7]))
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [0.0, 1.0]
    assert prepared.num_labels == 1
    assert numpy.bincount(prepared.labels).tolist() == [5] * 10


def test_groups():
    task = classified(30)
    task.given.rows["group"], task.given.group_names = [index % 3 for index in range(30)], ["x", "y", "z"]
    prepared = made(task)
    assert prepared.group_names == ["x", "y", "z"]
    assert prepared.groups.tolist() == [index % 3 for index in range(30)]
    assert made(classified(30)).groups is None


# ---------------------------------------------------------------------------------------------- causal


def causal(rows, family="llama", **config):
    return made(Rows([{"prompt": p, "target": t} for p, t in rows], kind="causal", **config), family)


def test_only_the_target_and_the_end_of_text_count():
    tokenizer = tiny.tokenizer([" ".join(WORDS)], "llama")
    prepared = causal([("the film", "was good"), ("bank", "fell"), ("", "worse")])
    batch = prepared.batch(numpy.array([0, 2]))
    ids = tokenizer("the film was good")["input_ids"]
    assert batch["input_ids"][0, :6].tolist() == [*ids, tokenizer.eos_token_id]
    assert batch["labels"][0].tolist() == [-100, -100, -100, *ids[3:], tokenizer.eos_token_id, -100, -100]
    # An empty prompt leaves the token at the beginning, from which the first word is predicted.
    assert (batch["labels"][1] != -100).tolist() == [False, True, True, False, False, False, False, False]


def test_padding_by_the_end_of_text_is_masked():
    tokenizer = tiny.tokenizer([" ".join(WORDS)], "gpt2")
    tokenizer.pad_token = tokenizer.eos_token
    task = Rows(
        [{"prompt": "film", "target": "bad"}, {"prompt": "the end was", "target": "good and bad"}],
        kind="causal",
    )
    batch = tokenise(task, task.load(), tokenizer).batch([0, 1])
    assert batch["attention_mask"].sum(1).tolist() == [3, 7]
    assert (batch["labels"] != -100).sum(1).tolist() == [2, 4]


def test_a_target_without_a_prompt_is_predicted_from_the_end_of_a_text():
    batch = causal([("", "good bad"), ("film", "bad")], "gpt2").batch([0])
    assert batch["input_ids"][0, 0] == batch["input_ids"][0, 3] == 2
    assert batch["labels"][0, :2].tolist() == [-100, batch["input_ids"][0, 1]]


@given(st.integers(1, 60), st.integers(1, 60), st.integers(8, 24))
@settings(max_examples=40)
def test_a_long_example_keeps_targets_and_the_end_of_its_prompt(prompt, target, length):
    before, after = prepared.room(prompt, target, length)
    assert 1 <= before <= prompt and 1 <= after <= target and before + after <= length
    if prompt + target <= length:
        assert (before, after) == (prompt, target)
    else:
        assert before + after == length
        assert after >= min(target, length // 2)


def test_a_prompt_is_cut_at_its_beginning():
    prepared = causal([("bank " * 30 + "film good", "bad worse"), ("a", "b")], max_length=10)
    tokenizer = tiny.tokenizer([" ".join(WORDS)], "llama")
    words = tokenizer.convert_ids_to_tokens(prepared.batch([0])["input_ids"][0])
    assert words == ["bank"] * 5 + ["film", "good", "bad", "worse", "</s>"]


# ----------------------------------------------------------------------------------- question answering

DOCUMENT = " ".join(f"{word}{number}" for number in range(4) for word in WORDS)


def answering(rows=None, family="bert", max_length=32, **config):
    rows = rows or [("the striker", DOCUMENT, "bad2 and2"), ("film", "the film was good", "good")]
    table = [
        {
            "question": question,
            "context": context,
            "answers": [answer] if answer else [],
            "answer_start": [context.index(answer)] if answer else [],
        }
        for question, context, answer in rows
    ]
    task = Rows(table, kind="question_answering", max_length=max_length, **config)
    tokenizer = tiny.tokenizer([row[1] for row in rows], family, vocabulary=512)
    return tokenise(task, task.load(), tokenizer), tokenizer


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_windows_cover_the_document_overlap_and_point_at_the_answer(family):
    prepared, tokenizer = answering(family=family)
    assert len(prepared) == 2 and prepared.num_labels == 2
    assert prepared.windows.tolist() == [prepared.windows[0], 1] and prepared.windows[0] > 2
    batch = prepared.batch(numpy.array([1, 0]))
    assert len(batch["input_ids"]) == prepared.windows.sum()
    starts, ends = prepared.characters(numpy.array([1, 0]))
    assert starts.shape == batch["input_ids"].shape
    covered, answers = numpy.zeros(len(DOCUMENT), int), []
    for window in range(1, len(starts)):
        inside = starts[window] >= 0
        for start, end in zip(starts[window][inside], ends[window][inside], strict=True):
            covered[start:end] += 1
        first, last = int(batch["start_positions"][window]), int(batch["end_positions"][window])
        if last:
            answers.append(DOCUMENT[starts[window, first] : ends[window, last]])
        else:
            assert first == 0
    letters = numpy.array([character != " " for character in DOCUMENT])
    assert covered[letters].min() == 1 and covered.max() == 2
    assert answers and set(answers) == {"bad2 and2"}
    overlap = sum(covered == 2) - sum((covered == 2) & ~letters)
    assert overlap > 0
    assert (batch["start_positions"][0] > 0) and prepared.unanswerable is False


def test_questions_without_an_answer_point_at_position_zero():
    prepared, _ = answering([("film", "the film was good", "good"), ("bank", "the film was bad", None)])
    assert prepared.batch([1])["start_positions"].tolist() == [0]
    assert prepared.unanswerable is True
    assert prepared.columns["answers"].to_pylist() == [["good"], []]


def test_long_questions_and_endless_documents_are_bounded():
    rows = [("film " * 500, DOCUMENT * 50, "bad2 and2"), ("film", "the film was good", "good")]
    prepared, _ = answering(rows, max_windows=5)
    assert prepared.windows.tolist() == [5, 1]
    assert prepared.lengths.max() == 32


def test_an_answer_across_two_windows_is_in_neither_unless_they_overlap_by_it():
    long = " ".join(DOCUMENT.split()[10:40])
    prepared, _ = answering([("film", DOCUMENT, long), ("film", "the film was good", "good")])
    assert prepared.batch([0])["end_positions"].sum() == 0


# ----------------------------------------------------------------------------------------- cap_length


def test_capping_keeps_the_special_token_at_the_end():
    prepared = made(classified(40))
    capped = prepared.cap_length(9)
    assert capped.max_length == 9 and capped.lengths.max() == 9
    everything = numpy.arange(len(prepared))
    tokens = capped.batch(everything)["input_ids"]
    last = capped.lengths - 1
    assert set(tokens[everything, last].tolist()) == {2}
    short = int(prepared.lengths.argmin())
    assert torch.equal(capped.batch([short])["input_ids"], prepared.batch([short])["input_ids"])
    assert prepared.cap_length(16) is prepared
    assert capped.sha256 == prepared.sha256
    assert all(map(numpy.array_equal, capped.split(0), prepared.split(0)))


def test_capping_equals_preparing_shorter():
    rows = [(" ".join(WORDS[:8]), " ".join(WORDS[8:12])), ("film", " ".join(WORDS)), ("bad", "good")]
    capped, short = causal(rows, "gpt2", max_length=16).cap_length(10), causal(rows, "gpt2", max_length=10)
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(capped.batch([0, 2])[name], short.batch([0, 2])[name])
    capped, short = made(classified(40), "gpt2").cap_length(10), made(classified(40, max_length=10), "gpt2")
    assert torch.equal(capped.batch(range(40))["input_ids"], short.batch(range(40))["input_ids"])


def test_capping_keeps_kinds_of_tokens_in_step():
    rows = [{"text": "film good", "text_pair": " ".join(WORDS[:9]), "label": i} for i in range(2)]
    rows[1]["text"] = "film bad"
    batch = made(Rows(rows)).cap_length(10).batch([0, 1])
    assert batch["token_type_ids"][0].tolist() == [0] * 4 + [1] * 6


def test_what_cannot_be_capped():
    with pytest.raises(UserError, match="max_length: 32; allowed: at most 20"):
        answering()[0].cap_length(20)
    with pytest.raises(UserError, match="only 1 tokens"):
        made(classified(10)).cap_length(1)


# ------------------------------------------------------------------------------------------ on the disk


@pytest.fixture
def model(tmp_path):
    return ModelConfig(source=str(tiny.save(tmp_path / "model", "roberta", [" ".join(WORDS)])))


def test_prepared_twice_gives_the_same_bytes_and_reads_back(tmp_path, model):
    first, second = tmp_path / "a", tmp_path / "b"
    prepared = prepare(classified(), model, first)
    prepare(classified(), model, second)
    for name in ("examples.parquet", "task.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    read = Prepared.load(first)
    assert read.description == prepared.description
    assert read.columns.keys() == prepared.columns.keys()
    assert all(numpy.array_equal(read.columns[name], prepared.columns[name]) for name in read.columns)


@pytest.mark.parametrize("kind", ["causal", "question_answering", "regression"])
def test_every_kind_reads_back(tmp_path, kind):
    if kind == "causal":
        prepared = causal([("the film", "was good"), ("bank", "fell"), ("", "worse")])
    elif kind == "regression":
        prepared = made(Rows([{"text": t, "label": 0.5} for t in sentences(5)], kind="regression"))
    else:
        prepared, _ = answering()
    prepared.save(tmp_path)
    read = Prepared.load(tmp_path)
    everything = numpy.arange(len(prepared))
    for name, tensor in prepared.batch(everything).items():
        assert torch.equal(read.batch(everything)[name], tensor)


def test_the_hash_follows_the_content():
    reference = made(classified()).sha256
    assert made(classified()).sha256 == reference
    changed = classified()
    changed.given.rows.loc[3, "text"] += " good"
    relabelled = classified()
    relabelled.given.rows.loc[3, "label"] = 0
    resplit = classified()
    resplit.given.rows["split"] = ["train"] * 50 + ["test"] * 10
    others = [made(task).sha256 for task in (changed, relabelled, resplit, classified(test_examples=3))]
    assert len({reference, *others}) == 5


def test_damage_is_noticed(tmp_path, model):
    prepare(classified(), model, tmp_path)
    content = bytearray((tmp_path / "examples.parquet").read_bytes())
    description = (tmp_path / "task.json").read_text()
    for position in range(4, len(content), len(content) // 20):
        damaged = content.copy()
        damaged[position] ^= 0xFF
        (tmp_path / "examples.parquet").write_bytes(damaged)
        try:  # A flipped bit that changes nothing of the content is no damage.
            assert Prepared.load(tmp_path).sha256 == json.loads(description)["sha256"]
        except UserError as error:
            assert "prepare again" in str(error)
    (tmp_path / "examples.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="prepare again"):
        Prepared.load(tmp_path)
    (tmp_path / "examples.parquet").write_bytes(content)
    (tmp_path / "task.json").write_text(description.replace('"max_length": 16', '"max_length": 17'))
    with pytest.raises(UserError, match="damaged"):
        Prepared.load(tmp_path)
    with pytest.raises(UserError, match="prepared data cannot be read"):
        Prepared.load(tmp_path / "nowhere")


def test_a_length_beyond_the_positions_names_the_key(tmp_path, model):
    with pytest.raises(UserError, match="max_length: 129; allowed: at most 128"):
        prepare(classified(max_length=129), model, tmp_path)
    prepare(classified(max_length=128), model, tmp_path)


def test_ten_megabytes_in_one_text_take_no_time():
    task = classified(20)
    task.given.rows.loc[0, "text"] = "film " * 2_000_000
    task.given.rows.loc[1, "text"] = "x" * 10_000_000
    start = time.process_time()
    prepared = made(task)
    assert time.process_time() - start < 5
    assert prepared.lengths[0] == 16


# ------------------------------------------------------------------------------------------------ pool


def test_small_data_are_prepared_as_ever():
    """The hash is that of the version before the pool: records made of small data stay valid."""
    found = made(classified(train_examples=2, validation_examples=1, test_examples=1))
    assert "training_rows" not in found.description
    assert made(classified()).sha256 == "14eb5484e9a0103711bc21b39bb92a583a0f6b4e99e4264b2846cb3c3ee634c1"


def many(count=40_000, **config):
    """Return a task of many rows; one in ten has label 1, and label 1 is mostly in group 1."""
    rows = [
        {"text": f"film {i}", "label": int(i % 10 == 0), "group": int(i % 10 == 0 and i % 3 > 0)}
        for i in range(count)
    ]
    return Rows(rows, group_names=["here", "there"], **config)


CAPS = {"train_examples": 300, "validation_examples": 100, "test_examples": 150}


def test_of_many_rows_a_pool_is_kept_that_does_not_depend_on_the_seed():
    task = many(**CAPS)
    corpus = cut(task.load(), task)
    assert len(corpus.rows) == 20 * (300 + 100 + 150)
    assert corpus.dropped["beyond the pool"] == 40_000 - 11_000
    numbers = [int(text.split()[1]) for text in corpus.rows["text"]]
    assert numbers == sorted(numbers)
    for column in ("label", "group"):
        share = task.given.rows[column].mean()
        assert corpus.rows[column].mean() == pytest.approx(share, abs=1e-3)
    again = cut(task.load(), task).rows
    assert corpus.rows.equals(again)
    prepared = made_of(task, corpus)
    one, other = prepared.split(1), prepared.split(2)
    assert [len(part) for part in one] == [300, 100, 150]
    assert len(numpy.intersect1d(one.train, other.train)) < 30
    assert prepared.description["training_rows"] == 40_000


def test_a_split_without_a_cap_keeps_the_size_that_its_share_says():
    task = many(train_examples=300, test_share=0.05, validation_share=0.1)
    corpus = cut(task.load(), task)
    assert len(corpus.rows) == 20 * 300 + 4000 + 2000
    split = made_of(task, corpus).split(1)
    assert [len(part) for part in split] == [300, 4000, 2000]


@pytest.mark.parametrize("config", [{}, {"test_examples": 10}, {"train_examples": 3000, "test_examples": 1}])
def test_what_is_used_or_nearly_is_not_cut(config):
    task = many(12_000, **config)
    corpus = task.load()
    assert cut(corpus, task) is corpus


def test_official_splits_are_cut_by_themselves():
    task = many(30_000, train_examples=10, test_examples=10)
    task.given.rows["split"] = ["train"] * 14_000 + ["validation"] * 4_000 + ["test"] * 12_000
    rows = cut(task.load(), task).rows
    assert rows["split"].value_counts().to_dict() == {"train": 10_000, "test": 10_000, "validation": 4_000}


def made_of(task, corpus):
    return tokenise(task, corpus, tiny.tokenizer([" ".join(WORDS)], "bert"))
