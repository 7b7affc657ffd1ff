"""Small talk: short questions on 21 topics and their answers, for causal language models."""

import pandas
import yaml
from pydantic import Field

from fedlm.base.downloads import read_wheel
from fedlm.data.task import Corpus, Task

# In these topics a longer entry is a dialogue of questions and answers; in the others it is one question
# with several answers.
DIALOGUES = {"conversations", "health", "trivia"}


class SmallTalk(Task):
    """One answer, the first, to each question, so that no question of the test split is trained on.

    The topic is the natural client population. The prompt is not counted in the loss.
    """

    name = "small_talk"
    title = "Small talk"
    reference = "Cox 2026, Python package chatterbot-corpus 1.3.3 (English)"
    kind = "causal"
    has_groups = True

    class Config(Task.Config):
        max_length: int = Field(64, ge=8, le=1_000_000, description="longest question and answer, in tokens")

    def rows(self) -> Corpus:
        topics = {}
        for name, content in read_wheel("chatterbot", "chatterbot_corpus/data/english/", ".yml").items():
            topics[name.rpartition("/")[2].removesuffix(".yml")] = yaml.safe_load(content)["conversations"]
        rows = [
            {
                "prompt": f"Question: {question.strip()}\nAnswer:",
                "target": f" {answer.strip()}",
                "group": group,
            }
            for group, (topic, entries) in enumerate(topics.items())
            for lines in entries
            for question, answer in _pairs(topic, lines)
        ]
        table = pandas.DataFrame(rows)
        repeated = table["prompt"].duplicated()
        return Corpus(
            table[~repeated].reset_index(drop=True),
            group_names=list(topics),
            dropped={"further answers": int(repeated.sum())},
        )


def _pairs(topic: str, lines: list[str]) -> list[tuple[str, str]]:
    if topic in DIALOGUES:
        return list(zip(lines[::2], lines[1::2], strict=False))
    return [(lines[0], lines[1])]
