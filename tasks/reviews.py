"""Sentiment of sentences from four sources, rated by people: films, products, newspapers, tweets."""

import pandas
from pydantic import Field

from fedlm.base.downloads import fetch, read_tar
from fedlm.base.errors import UserError
from fedlm.base.files import sha256
from fedlm.data.task import Corpus, Task

FILES = {
    "films": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "newspapers": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
INNER_ARCHIVE_SHA256 = "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"
NEUTRAL = 0.5  # Scores from -0.5 to 0.5 (of -4 to 4) are neither negative nor positive, and are left out.


class ReviewSources(Task):
    """Sentences of all four sources, with the source as natural client population."""

    name = "review_sources"
    title = "Review sources"
    reference = "Hutto and Gilbert 2014, ICWSM; source distribution of package vaderSentiment 3.3.2"
    sources: tuple[str, ...] = ("films", "products", "newspapers", "tweets")
    label_names = ("negative", "positive")
    has_groups = True

    class Config(Task.Config):
        max_length: int = Field(64, ge=8, le=1_000_000, description="longest model input, in tokens")

    def rows(self) -> Corpus:
        inner = read_tar(fetch("vader").read_bytes(), "/hutto_ICWSM_2014.tar.gz").popitem()[1]
        if sha256(inner) != INNER_ARCHIVE_SHA256:
            raise UserError(f"{fetch('vader')}: hutto_ICWSM_2014.tar.gz in it is not the expected file")
        members = {name.rpartition("/")[2]: content for name, content in read_tar(inner, ".txt").items()}
        rows = []
        for group, source in enumerate(self.sources):
            for line in members[FILES[source]].decode("utf-8").split("\r\n"):
                _, score, text = line.split("\t")
                if abs(float(score)) > NEUTRAL:
                    rows.append({"text": text, "label": int(float(score) > 0), "group": group})
        return Corpus(pandas.DataFrame(rows), list(self.label_names), list(self.sources))


class MovieReviews(ReviewSources):
    """The film sentences (snippets of rottentomatoes.com reviews) only."""

    name = "movie_reviews"
    title = "Movie reviews"
    sources = ("films",)
    has_groups = False

    def rows(self) -> Corpus:
        corpus = super().rows()
        return Corpus(corpus.rows.drop(columns="group"), corpus.label_names)
