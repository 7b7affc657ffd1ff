"""The pool: which rows of a large corpus are tokenised, where a study asks for few of them.

A seed draws its examples from the pool, so the pool must be the same for all seeds and much larger than what
one of them draws. It is cut only where that saves time: where a split has a cap and more rows than
`SMALLEST`.
"""

import numpy
import pandas

from fedlm.base.randomness import numpy_stream
from fedlm.data.prepared import deciles, draw, drawn_count
from fedlm.data.task import Corpus, Task

TIMES = 20  # rows in the pool for each example that a seed draws, up to the cap
SMALLEST = 10_000  # rows that are tokenised in a second: never cut below


def cut(corpus: Corpus, task: Task) -> Corpus:
    """Return the corpus cut to its pool, in the original order; a small one is returned as it is.

    Each split of the data is cut by itself, and only if it has a cap. The pool has `TIMES`
    times the rows that a cap allows; a validation or test split that is a share of the training rows and has
    no cap is there once (`training_rows` keeps the number it is a share of). Rows left out are counted in
    `dropped`. Which rows stay depends on the data alone: each label, and each group within it, keeps its
    share.
    """
    rows, config = corpus.rows, task.config
    caps = {name: getattr(config, f"{name}_examples") for name in ("train", "validation", "test")}
    official = {name: (rows["split"] == name).to_numpy() for name in ("validation", "test")}
    training = ~(official["validation"] | official["test"])
    available = int(training.sum())
    limits = {name: caps[name] and TIMES * caps[name] for name in caps}
    if limits["train"]:
        for name in ("validation", "test"):
            if not official[name].any():
                count = drawn_count(getattr(config, f"{name}_share"), caps[name], available)
                limits["train"] += TIMES * count if caps[name] else count
    kept = []
    for name, part in {"train": training, **official}.items():
        pool, limit = numpy.flatnonzero(part), limits[name]
        if limit and len(pool) > max(limit, SMALLEST):
            strata = _strata(rows.iloc[pool], task.kind)
            pool = draw(pool, strata, max(limit, SMALLEST), numpy_stream(0, "pool", name))
        kept.append(pool)
    chosen = numpy.sort(numpy.concatenate(kept))
    if len(chosen) == len(rows):
        return corpus
    return Corpus(
        rows.iloc[chosen].reset_index(drop=True),
        corpus.label_names,
        corpus.group_names,
        {**corpus.dropped, "beyond the pool": len(rows) - len(chosen)},
        training_rows=available,
    )


def _strata(rows: pandas.DataFrame, kind: str) -> numpy.ndarray:
    """Return a number for each row's label and group, int64."""
    labels = groups = numpy.zeros(len(rows), numpy.int64)
    if kind == "classification":
        labels = rows["label"].to_numpy(numpy.int64)
    elif kind == "regression":
        labels = deciles(rows["label"].to_numpy(float))
    if "group" in rows:
        groups = rows["group"].to_numpy(numpy.int64)
    return labels * (groups.max() + 1) + groups
