"""Federated prompt tuning: only virtual tokens and the head are trained, sent and averaged.

Sources: prompt tuning arXiv:2104.08691; prefix tuning arXiv:2101.00190; P-tuning arXiv:2103.10385; P-tuning
v2 arXiv:2110.07602; averaged over clients as in FedPrompt arXiv:2208.12268. The tuners are peft's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from fedlm.base.errors import UserError
from fedlm.federation.method import Method, MethodConfig
from fedlm.federation.search import LogRange

if TYPE_CHECKING:
    from fedlm.federation.method import Facts, Module, PreTrainedModel

TASK_TYPES = {
    "classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "causal": "CAUSAL_LM",
    "question_answering": "QUESTION_ANS",
}


class FedPrompt(Method):
    """Virtual tokens before the text; they take positions of the model, so long texts are cut shorter.

    `prompt`: embeddings before the input. `prefix`: keys and values in every layer, trained directly, which
    is P-tuning v2. `prefix_projected`: the same through an MLP, as prefix tuning was published. `p_tuning`:
    embeddings computed by an MLP.
    """

    title = "FedPrompt"
    reference = "arXiv:2208.12268"
    search = {"training.learning_rate": LogRange(3e-3, 3e-1)}

    class Config(MethodConfig):
        """Form and number of the virtual tokens."""

        form: Literal["prompt", "prefix", "prefix_projected", "p_tuning"] = "prompt"
        tokens: int = Field(20, ge=1, le=4096, description="number of virtual tokens")
        hidden: int | None = Field(
            None, ge=1, le=65_536, description="width of the MLP of prefix_projected and p_tuning"
        )

        @model_validator(mode="after")
        def _only_an_mlp_has_a_width(self) -> Self:
            if self.hidden is not None and self.form in ("prompt", "prefix"):
                raise ValueError(
                    f"hidden: {self.hidden}; allowed: nothing, since form {self.form} has no MLP"
                )
            return self

    config: Config

    def virtual_tokens(self) -> int:
        return self.config.tokens

    def check(self, facts: Facts) -> None:
        classifies = facts.kind in ("classification", "regression")
        if facts.decoder and classifies and self.config.form in ("prompt", "p_tuning"):
            raise UserError(
                f"form: {self.config.form!r} with a classifying decoder, whose last token is found by its "
                "number, and virtual tokens have none; allowed: prefix, prefix_projected"
            )

    def adapt(self, model: PreTrainedModel, kind: str) -> Module:
        import peft

        tuner: peft.PromptLearningConfig
        common: dict[str, Any] = {"task_type": TASK_TYPES[kind], "num_virtual_tokens": self.config.tokens}
        width: dict[str, Any] = {"encoder_hidden_size": self.config.hidden} if self.config.hidden else {}
        if self.config.form == "prompt":
            tuner = peft.PromptTuningConfig(**common)
        elif self.config.form == "p_tuning":
            tuner = peft.PromptEncoderConfig(**common, **width)
        else:
            tuner = peft.PrefixTuningConfig(
                **common, **width, prefix_projection=self.config.form == "prefix_projected"
            )
        return peft.get_peft_model(model, tuner)
