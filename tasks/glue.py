"""GLUE: nine sentence understanding tasks."""

from typing import Literal, NamedTuple

from pydantic import Field

from fedlm.data.hub import HubTask


class _Part(NamedTuple):
    title: str
    columns: list[str]
    label_names: list[str]
    metrics: tuple[str, ...] = ("accuracy",)


PAIR = ["sentence1", "sentence2"]
ENTAILMENT = ["entailment", "not_entailment"]
PARTS = {
    "cola": _Part("CoLA", ["sentence"], ["unacceptable", "acceptable"], ("matthews", "accuracy")),
    "sst2": _Part("SST-2", ["sentence"], ["negative", "positive"]),
    "mrpc": _Part("MRPC", PAIR, ["not_equivalent", "equivalent"], ("accuracy", "f1")),
    "qqp": _Part("QQP", ["question1", "question2"], ["not_duplicate", "duplicate"], ("accuracy", "f1")),
    "stsb": _Part("STS-B", PAIR, [], ("pearson", "spearman")),
    "mnli": _Part("MNLI", ["premise", "hypothesis"], ["entailment", "neutral", "contradiction"]),
    "qnli": _Part("QNLI", ["question", "sentence"], ENTAILMENT),
    "rte": _Part("RTE", PAIR, ENTAILMENT),
    "wnli": _Part("WNLI", PAIR, ["not_entailment", "entailment"]),
}


class Glue(HubTask):
    """One of GLUE's tasks, with its own metrics.

    The labels of the official test split are hidden, so the official validation split is the test split
    here, and a validation split is drawn from the official training split using the seed. MNLI has two
    official validation splits, of the same genres as training (matched) and of other ones (mismatched).
    """

    name = "glue"
    title = "GLUE"
    reference = "Wang et al. 2019, arXiv:1804.07461; hub nyu-mll/glue"

    class Config(HubTask.Config):
        name: Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"] = Field(
            description="which of the nine tasks"
        )
        source: str = Field(
            "nyu-mll/glue", min_length=1, description="hub id, or a local folder in its layout"
        )
        mnli_test: Literal["matched", "mismatched"] = Field(
            "matched", description="which test split, for mnli"
        )

    config: Config

    def __init__(self, config: Config | dict | None = None) -> None:
        super().__init__(config)
        part = PARTS[self.config.name]
        self.title, self.label_names, self.metrics = part.title, part.label_names, part.metrics
        self.kind = "classification" if part.label_names else "regression"
        self.subset = self.config.name
        self.columns = dict(zip(["text", "text_pair"], part.columns, strict=False), label="label")
        test = f"validation_{self.config.mnli_test}" if self.subset == "mnli" else "validation"
        self.splits = {"train": "train", "test": test}
