"""The language models: where they come from, how they are loaded, and their shapes without weights.

A model is named by a label of the catalogue (`minilm`), by a folder in the layout of Transformers, or by
its name on the Hugging Face hub (`owner/name`). Weights are read from safetensors only, and code from the hub
runs only where the study says `trust_remote_code: true`.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from fedlm.base.errors import UserError
from fedlm.base.randomness import derive
from fedlm.models.catalogue import CATALOGUE
from fedlm.models.config import Kind, ModelConfig
from fedlm.models.places import Place, find_place, reading
from fedlm.models.quiet import own_generator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Names in Transformers. The classes, which take 110 MB, are imported where a model is made: a process that
# only tokenises does without.
_AUTO_CLASSES: dict[Kind, str] = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "causal": "AutoModelForCausalLM",
    "question_answering": "AutoModelForQuestionAnswering",
}


def build_config(config: ModelConfig, kind: Kind, num_labels: int) -> PreTrainedConfig:
    """Return the Transformers configuration of the model for a task, without weights.

    A model of the catalogue needs no network; a folder needs its config.json; a hub id needs the hub or its
    cache. Dropout and the number of labels are as requested, and no key-value cache is kept, since nothing
    is generated while training. `num_labels` is ignored for causal models.

    Raises UserError for a source that cannot be found or a model that cannot do the task.
    """
    entry = CATALOGUE.get(config.source)
    shape = entry.build_config() if entry is not None else _read_config(config)
    return _adapt(shape, config, kind, num_labels)


def _read_config(config: ModelConfig) -> PreTrainedConfig:
    place = find_place(config)
    with reading(config, place):
        if not place.local:
            # A request of its own: the hub's errors distinguish not found, not reachable and not allowed.
            huggingface_hub.hf_hub_download(place.name, "config.json", revision=config.revision)
        return AutoConfig.from_pretrained(
            place.name, revision=config.revision or "main", trust_remote_code=config.trust_remote_code
        )


def _adapt(shape: PreTrainedConfig, config: ModelConfig, kind: Kind, num_labels: int) -> PreTrainedConfig:
    if kind == "causal" and is_encoder(shape):
        raise UserError(
            f"model: {config.source!r} ({shape.model_type}) reads text in both directions and cannot "
            "continue it; a causal task needs a decoder such as smollm2 or gpt2"
        )
    shape.use_cache = False
    if kind in ("classification", "regression"):
        shape.num_labels = num_labels
        shape.problem_type = "regression" if kind == "regression" else "single_label_classification"
    elif kind == "question_answering":
        shape.num_labels = 2  # the start and the end of the answer
    if config.dropout != "model":
        for name, value in list(vars(shape).items()):
            if (
                re.search("dropout|pdrop", name)
                and isinstance(value, int | float)
                and not isinstance(value, bool)
            ):
                setattr(shape, name, config.dropout)
            # Leaving out whole layers at random is not dropout, but it also needs random numbers.
            elif name.endswith("layerdrop") and isinstance(value, int | float):
                setattr(shape, name, 0.0)
    return shape


def is_encoder(shape: PreTrainedConfig) -> bool:
    """Return whether a model reads text in both directions, so that it cannot continue it."""
    import transformers

    # Not by `is_decoder` alone, which decoders such as GPT-NeoX set to false. BERT's kin can be either.
    masked = type(shape) in transformers.AutoModelForMaskedLM._model_mapping
    return masked and not getattr(shape, "is_decoder", False)


def max_positions(config: ModelConfig) -> int | None:
    """Return how many tokens a text may have, virtual tokens included; None where positions are unlimited."""
    shape = build_config(config, "classification", 2)
    positions = getattr(shape, "max_position_embeddings", None)
    if positions is None:
        return None
    # The RoBERTa family counts positions from the padding token's number + 1.
    if shape.model_type in ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer"):
        return positions - shape.pad_token_id - 1
    return positions


def load(config: ModelConfig, kind: Kind, num_labels: int, seed: int) -> PreTrainedModel:
    """Return the pretrained model for a task, on the CPU and in evaluation mode.

    The head (and a pooler, if the checkpoint lacks one) is initialised from the stream (seed, "head"), so it
    is the same for every method; a checkpoint's own head of the same shape is kept. Torch's global generator
    is left unchanged.

    Raises UserError if the model cannot be found or reached, or its weights do not fit the model.
    """
    place = find_place(config)
    if place.local:
        _require_safetensors(config, Path(place.name))
    entry = CATALOGUE.get(config.source)
    read = entry.build_config() if entry is not None and entry.own_code else _read_config(config)
    shape = _adapt(read, config, kind, num_labels)
    auto_class = _auto_class(shape, config, kind)
    with reading(config, place), own_generator(derive(seed, "head")):
        model, report = auto_class.from_pretrained(
            place.name,
            config=shape,
            revision=config.revision or "main",
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            dtype=config.dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            key_mapping=_key_mapping(shape, kind),
        )
    if getattr(shape, "share_feed_forward", False):
        _require_one_feed_forward(model, report["missing_keys"], config)
        _share_feed_forward(model)
    _require_fit(model, report, config, kind)
    # For what reads more of the checkpoint, such as its language head.
    model.config.revision = config.revision
    if kind in ("classification", "regression"):
        # Decoders predict the class from the last token that is not padding, so model and tokenizer must
        # agree. Set after building, since otherwise the token's embedding would be excluded from training.
        model.config.pad_token_id = _pad_token_id(model.config, config)
    return _finish(model, config)


def build_on_meta(config: ModelConfig, kind: Kind, num_labels: int) -> PreTrainedModel:
    """Return the model for a task with its parameters on the meta device: shapes without values.

    Needs no weights, and no network unless the source is a hub id that is not in the cache.
    """
    shape = build_config(config, kind, num_labels)
    with reading(config, Place(config.source, local=True)), torch.device("meta"), own_generator(0):
        model = _auto_class(shape, config, kind).from_config(
            shape, dtype=config.dtype, trust_remote_code=config.trust_remote_code
        )
    if getattr(shape, "share_feed_forward", False):
        _share_feed_forward(model)
    if kind in ("classification", "regression"):
        model.config.pad_token_id = _fallback_pad_token_id(model.config)
    return _finish(model, config).eval()


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer; one without a padding token pads with its end-of-text token."""
    place = find_place(config)
    with reading(config, place):
        tokenizer = AutoTokenizer.from_pretrained(
            place.name, revision=config.revision or "main", trust_remote_code=config.trust_remote_code
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise UserError(
            f"model: the tokenizer of {config.source!r} has no padding, end-of-text or unknown token"
        )
    return tokenizer


def fingerprint(model: torch.nn.Module) -> str:
    """Return a SHA-256 over the names, number formats, shapes and values of a model's parameters and buffers.

    Equal fingerprints mean equal weights, wherever they were loaded. A shared tensor counts under each of its
    names; buffers that are not saved with the model do not count.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}\x1f".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _of_transformers(kind: Kind) -> Any:
    """Return Transformers' class that finds the model for a kind of task."""
    import transformers

    return getattr(transformers, _AUTO_CLASSES[kind])


def _auto_class(shape: PreTrainedConfig, config: ModelConfig, kind: Kind) -> Any:
    auto_class = _of_transformers(kind)
    remote = config.trust_remote_code and auto_class.__name__ in (getattr(shape, "auto_map", None) or {})
    if type(shape) not in auto_class._model_mapping and not remote:
        raise UserError(
            f"model: {config.source!r} ({shape.model_type}) has no class for {kind.replace('_', ' ')} in "
            "Transformers; choose another model or another task"
        )
    return auto_class


def _key_mapping(shape: PreTrainedConfig, kind: Kind) -> dict[str, str] | None:
    """Return how weights are renamed for a task's class, where it does not follow the model's other classes.

    Transformers' LlamaForQuestionAnswering holds its layers under another name than every Llama checkpoint.
    """
    classes = _of_transformers(kind)._model_mapping, _of_transformers("causal")._model_mapping
    if kind == "causal" or any(type(shape) not in mapping for mapping in classes):
        return None
    here, elsewhere = (mapping[type(shape)].base_model_prefix for mapping in classes)
    return None if here == elsewhere else {f"^{elsewhere}\\.": f"{here}."}


def _finish(model: PreTrainedModel, config: ModelConfig) -> PreTrainedModel:
    if config.gradient_checkpointing:
        # The reentrant form needs a trained input of every layer, which a frozen embedding does not give.
        model.activation_checkpointing_enable({"use_reentrant": False})
    if model.loss_type is None:
        # Transformers chooses the loss by the name of the class, which it cannot do for GPT2LMHeadModel.
        model.loss_type = "ForCausalLM"
    return model


def _share_feed_forward(model: PreTrainedModel) -> None:
    """Let all layers use the first layer's feed-forward, as in MobiLlama."""
    layers: Any = model.base_model.layers
    for layer in layers:
        layer.mlp = layers[0].mlp


def _require_one_feed_forward(model: PreTrainedModel, missing: set[str], config: ModelConfig) -> None:
    """Raise UserError if the checkpoint has feed-forwards that differ; it may store one, or one a layer."""
    base: Any = model.base_model
    first = dict(base.layers[0].mlp.named_parameters())
    stored = {id(value) for name, value in model.named_parameters() if name not in missing}
    for number, layer in enumerate(base.layers):
        for name, value in layer.mlp.named_parameters():
            if id(value) in stored and not torch.equal(value, first[name]):
                raise UserError(
                    f"model: {config.source!r} is to share one feed-forward, but the weights of layers 0 and "
                    f"{number} differ"
                )


def _require_safetensors(config: ModelConfig, folder: Path) -> None:
    names = ("model.safetensors", "model.safetensors.index.json")
    if not any((folder / name).is_file() for name in names):
        raise UserError(
            f"model: {config.source!r} holds no {' or '.join(names)}; only safetensors are read: convert the "
            "weights with Transformers' save_pretrained"
        )


def _require_fit(model: PreTrainedModel, report: dict[str, Any], config: ModelConfig, kind: Kind) -> None:
    """Raise UserError if weights other than the head's (or a pooler's) would be initialised at random."""
    base = model.base_model
    in_base = {id(parameter) for parameter in base.parameters()} if base is not model else set()
    parameters = dict(model.named_parameters())  # each shared tensor under its first name
    mismatched = {key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"]}
    lacking = [name for name in sorted(report["missing_keys"] | mismatched) if name in parameters]
    if kind != "causal":
        lacking = [
            name for name in lacking if id(parameters[name]) in in_base and "pooler" not in name.split(".")
        ]
    if lacking:
        raise UserError(
            f"model: the weights of {config.source!r} do not fit {type(model).__name__}: {len(lacking)} "
            f"tensors are missing or have another shape, the first is {lacking[0]}"
        )


def _pad_token_id(shape: PreTrainedConfig, config: ModelConfig) -> int:
    try:
        return load_tokenizer(config).pad_token_id
    except UserError:
        return _fallback_pad_token_id(shape)


def _fallback_pad_token_id(shape: PreTrainedConfig) -> int:
    if shape.pad_token_id is not None:
        return shape.pad_token_id
    eos = shape.eos_token_id
    return (eos[0] if isinstance(eos, list) else eos) or 0
