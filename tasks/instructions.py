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
        rows["prompt"] = [
            _prompt(instruction, given)
            for instruction, given in zip(rows["instruction"], rows["input"], strict=True)
        ]
        return Corpus(rows)


def _prompt(instruction: str, given: str) -> str:
    parts = [PROMPT.format(CONTEXT if given else ""), f"### Instruction:\n{instruction}"]
    parts += [f"### Input:\n{given}"] * bool(given)
    return "\n\n".join([*parts, "### Response:\n"])
