"""Instructions and their answers: causal language modelling, without a loss on the prompt."""

from pydantic import Field

from fedlm.data.hub import HubTask
from fedlm.data.task import Corpus

# The prompt of Stanford Alpaca (Taori et al. 2023), with which these data were made.
PROMPT = (
    "Below is an instruction that describes a task{}. "
    "Write a response that appropriately completes the request."
)
CONTEXT = ", paired with an input that provides further context"


class AlpacaGpt4(HubTask):
    """52,002 instructions answered by GPT-4; validation and test examples are drawn using the seed."""

    name = "alpaca_gpt4"
    title = "Alpaca-GPT4"
    reference = "Peng et al. 2023, arXiv:2304.03277; hub vicgalle/alpaca-gpt4"
    kind = "causal"
    splits = {"train": "train"}
    columns = {"instruction": "instruction", "input": "input", "target": "output"}

    class Config(HubTask.Config):
        max_length: int = Field(512, ge=8, le=1_000_000, description="longest prompt and answer, in tokens")
        validation_examples: int | None = Field(
            500, ge=1, description="at most so many, drawn using the seed"
        )
        test_examples: int | None = Field(500, ge=1, description="at most so many, drawn using the seed")
        source: str = Field("vicgalle/alpaca-gpt4", min_length=1, description="hub id, or a local folder")

    def rows(self) -> Corpus:
        rows, _ = self.read()
        inputs = rows["input"] if "input" in rows else [""] * len(rows)
        rows["prompt"] = [
            _prompt(instruction, given)
            for instruction, given in zip(rows["instruction"], inputs, strict=True)
        ]
        if "group" not in rows:
            return Corpus(rows)
        names = sorted(rows["group"].unique())
        rows["group"] = rows["group"].map({name: number for number, name in enumerate(names)})
        return Corpus(rows, group_names=names)


class Dolly(AlpacaGpt4):
    """15,011 instructions written and answered by people, in eight categories, which are its populations."""

    name = "dolly"
    title = "Dolly"
    reference = "Conover et al. 2023, Databricks; hub databricks/databricks-dolly-15k"
    has_groups = True
    columns = {"instruction": "instruction", "input": "context", "target": "response", "group": "category"}

    class Config(AlpacaGpt4.Config):
        source: str = Field(
            "databricks/databricks-dolly-15k", min_length=1, description="hub id, or a local folder"
        )


class Aya(AlpacaGpt4):
    """204,112 instructions and answers in 65 languages; the people who wrote them are its populations."""

    name = "aya"
    title = "Aya"
    reference = "Singh et al. 2024, arXiv:2402.06619; hub CohereLabs/aya_dataset"
    has_groups = True
    columns = {"instruction": "inputs", "target": "targets", "group": "user_id"}

    class Config(AlpacaGpt4.Config):
        source: str = Field("CohereLabs/aya_dataset", min_length=1, description="hub id, or a local folder")


def _prompt(instruction: str, given: str) -> str:
    parts = [PROMPT.format(CONTEXT if given else ""), f"### Instruction:\n{instruction}"]
    parts += [f"### Input:\n{given}"] * bool(given)
    return "\n\n".join([*parts, "### Response:\n"])
