"""Tiny random models and tokenizers for the tests, of each family, in memory or as a folder.

folder = tiny.save(tmp_path / "bert", "bert", texts)
config = ModelConfig(source=str(folder))
"""

from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordLevelTrainer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

ENCODERS = ("bert", "roberta")
DECODERS = ("gpt2", "llama", "bloom", "glm", "mobillama")
FAMILIES = ENCODERS + DECODERS
MORE_DECODERS = ("mistral", "gemma3_text")  # of the standard studies

# In RoBERTa's order, so that the numbers are 0 to 4 and padding is 1 in every family.
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
TEXTS = (
    "the film was good and the actors were good",
    "the film was bad and the end was worse",
    "a striker scored twice in the match",
    "the bank raised its rates and shares fell",
)


def tokenizer(
    texts: Iterable[str] = TEXTS, family: str = "bert", vocabulary: int = 256
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of lower-case words trained on the texts, with the special tokens a family expects.

    Encoders get `<s> text </s>` (BERT marks the second of two texts in token_type_ids); Llama's kin get
    `<s> text`; GPT-2 and Bloom the bare text.
    """
    words = Tokenizer(WordLevel(unk_token="<unk>"))
    words.normalizer = Lowercase()
    words.pre_tokenizer = Whitespace()
    words.train_from_iterator(
        texts, WordLevelTrainer(vocab_size=vocabulary, special_tokens=list(SPECIAL_TOKENS))
    )
    names = ["input_ids", "attention_mask"]
    special = [("<s>", 0), ("</s>", 2)]
    if family == "bert":
        words.post_processor = TemplateProcessing("<s> $A </s>", "<s> $A </s> $B:1 </s>:1", special)
        names.insert(1, "token_type_ids")
    elif family == "roberta":
        words.post_processor = TemplateProcessing("<s> $A </s>", "<s> $A </s> </s> $B </s>", special)
    elif family in ("llama", "glm", "mobillama"):
        words.post_processor = TemplateProcessing("<s> $A", "<s> $A $B", special)
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_input_names=names,
        model_max_length=128,
    )


def config(family: str, layers: int = 3, hidden: int = 16, vocabulary: int = 256) -> PreTrainedConfig:
    """Return the configuration of a tiny model with four attention heads and 128 positions."""
    shared = {"vocab_size": vocabulary, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    wide = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4}
    if family == "bert":
        return AutoConfig.for_model(
            "bert", intermediate_size=2 * hidden, max_position_embeddings=128, **wide, **shared
        )
    if family == "roberta":
        return AutoConfig.for_model(
            "roberta",
            intermediate_size=2 * hidden,
            max_position_embeddings=130,
            type_vocab_size=1,
            **wide,
            **shared,
        )
    if family == "gpt2":
        return AutoConfig.for_model(
            "gpt2", n_embd=hidden, n_layer=layers, n_head=4, n_positions=128, **shared
        )
    if family == "bloom":
        return AutoConfig.for_model("bloom", hidden_size=hidden, n_layer=layers, n_head=4, **shared)
    decoder = {
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": 128,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        **wide,
        **shared,
    }
    if family in ("llama", "glm", *MORE_DECODERS):
        return AutoConfig.for_model(family, **decoder)
    if family == "mobillama":
        return AutoConfig.for_model("llama", share_feed_forward=True, **decoder)
    raise ValueError(f"unknown family {family!r}; there are {FAMILIES}")


def save(
    folder: Path,
    family: str,
    texts: Iterable[str] = TEXTS,
    *,
    layers: int = 3,
    hidden: int = 16,
    vocabulary: int = 256,
    seed: int = 0,
) -> Path:
    """Write a random model of a family and its tokenizer as a Transformers folder, and return the folder.

    Encoders are saved without a head, decoders with their language-model head, as they come from a hub. The
    same arguments give the same bytes; the global generator is left as it was.
    """
    words = tokenizer(texts, family, vocabulary)
    shape = config(family, layers, hidden, vocabulary)
    auto_class = AutoModel if family in ENCODERS else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model: PreTrainedModel = auto_class.from_config(shape)
        # Freshly initialised biases are zero and norms one; make every parameter matter to a test.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        if family == "mobillama":  # published with one copy of the shared feed-forward a layer
            for layer in model.base_model.layers[1:]:
                layer.mlp.load_state_dict(model.base_model.layers[0].mlp.state_dict())
    transformers.logging.disable_progress_bar()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return Path(folder)
