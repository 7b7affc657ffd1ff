"""SQuAD: answers to questions, as spans of a paragraph."""

from typing import Self

from pydantic import Field, model_validator

from fedlm.data.hub import HubTask
from fedlm.data.task import Corpus, Windows, check_windows


class Squad(HubTask):
    """87,599 training and 10,570 test questions on Wikipedia articles, which are natural client populations.

    The labels of the official test split are hidden, so the official validation split is the test split here,
    and a validation split is drawn from the official training split using the seed. `source:
    rajpurkar/squad_v2, subset: squad_v2` has questions without an answer; there the model predicts none when
    position 0 scores above every span.
    """

    name = "squad"
    title = "SQuAD"
    reference = "Rajpurkar et al. 2016, arXiv:1606.05250; hub rajpurkar/squad"
    kind = "question_answering"
    has_groups = True
    splits = {"train": "train", "test": "validation"}
    columns = {"question": "question", "context": "context", "answers": "answers", "title": "title"}

    class Config(HubTask.Config, Windows):
        max_length: int = Field(384, ge=32, le=1_000_000, description="tokens of a window, question included")
        source: str = Field("rajpurkar/squad", min_length=1, description="hub id, or a local folder")

        subset: str = Field("plain_text", min_length=1, description="the hub's name of its part or folder")

        @model_validator(mode="after")
        def _room_for_the_document(self) -> Self:
            check_windows(self.max_length, self.doc_stride)
            return self

    config: Config

    def __init__(self, config: Config | dict | None = None) -> None:
        super().__init__(config)
        self.subset = self.config.subset

    def rows(self) -> Corpus:
        rows, _ = self.read()
        rows["answer_start"] = [
            [int(start) for start in answer["answer_start"]] for answer in rows["answers"]
        ]
        rows["answers"] = [list(answer["text"]) for answer in rows["answers"]]
        # Titles in alphabetical order; test articles have groups as well, though no client holds them.
        group_names = sorted(set(rows["title"]))
        rows["group"] = rows["title"].map({title: group for group, title in enumerate(group_names)})
        return Corpus(rows, group_names=group_names)
