import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
from pydantic import ValidationError
from transformers import AutoConfig

from fedlm.base import downloads
from fedlm.base.errors import UserError
from fedlm.models import places
from fedlm.models.catalogue import CATALOGUE
from fedlm.models.config import ModelConfig
from fedlm.models.loading import (
    build_config,
    build_on_meta,
    fingerprint,
    is_encoder,
    load,
    load_tokenizer,
    max_positions,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: tiny.save(root / family, family) for family in tiny.FAMILIES}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def shapes(model):
    return {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "kind", "labels", "parameters"),
    [
        ("roberta_base", "classification", 2, 124_647_170),
        ("roberta_large", "classification", 2, 355_361_794),
        ("gpt2", "causal", 0, 124_439_808),
        ("bloom_560m", "causal", 0, 559_214_592),
        ("chatglm3_6b", "causal", 0, 6_243_584_000),
        ("llama2_7b", "causal", 0, 6_738_415_616),
        ("mistral_7b", "causal", 0, 7_248_023_552),
        ("gemma3_270m", "causal", 0, 268_098_176),
        ("mobillama_05b", "causal", 0, 534_865_920),
        ("mobillama_08b", "causal", 0, 819_315_200),
        ("mobillama_1b", "causal", 0, 1_261_529_088),
        ("smollm2", "causal", 0, 134_515_008),
    ],
)
def test_catalogue_has_the_published_parameter_counts(source, kind, labels, parameters):
    model = build_on_meta(ModelConfig(source=source), kind, labels)
    assert count(model) == parameters
    assert all(p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize(
    ("source", "feed_forwards"), [("mobillama_05b", 1), ("mobillama_08b", 1), ("mobillama_1b", 22)]
)
def test_the_smaller_mobillamas_share_one_feed_forward_and_the_largest_shares_none(source, feed_forwards):
    layers = build_on_meta(ModelConfig(source=source), "causal", 0).model.layers
    assert len(layers) == 22
    assert len({id(layer.mlp) for layer in layers}) == feed_forwards
    assert len({id(layer.self_attn) for layer in layers}) == 22


def of_feed_forward(tensors, layer):
    return {n: t for n, t in tensors.items() if n.startswith(f"model.layers.{layer}.mlp.")}


@pytest.mark.parametrize("stored", ["in each layer", "once"])
def test_a_shared_feed_forward_is_loaded_as_one_however_it_is_stored(stored, tmp_path):
    folder = tiny.save(tmp_path / "mobillama", "mobillama")
    weights = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    if stored == "once":
        kept = {n: t for n, t in tensors.items() if ".mlp." not in n} | of_feed_forward(tensors, 0)
        safetensors.torch.save_file(kept, weights, {"format": "pt"})
    model = load(ModelConfig(source=str(folder)), "causal", 0, 0)
    first, *others = model.model.layers
    assert others and all(layer.mlp is first.mlp for layer in others)
    found = dict(model.named_parameters())
    assert found.keys() & tensors.keys() == found.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in found.items())

    # The same values in layers that share nothing give the same output, and gradients that add up to one.
    tokens = torch.arange(5, 25).reshape(2, 10)
    apart = copy.deepcopy(model)
    for layer in apart.model.layers:
        layer.mlp = copy.deepcopy(first.mlp)
    outputs = [one(tokens, labels=tokens) for one in (model, apart)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    for name, parameter in first.mlp.named_parameters():
        summed = sum(layer.mlp.get_parameter(name).grad for layer in apart.model.layers)
        torch.testing.assert_close(parameter.grad, summed)


def test_feed_forwards_that_differ_are_not_shared_silently(tmp_path):
    folder = tiny.save(tmp_path / "mobillama", "mobillama")
    weights = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] += 1
    safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError, match="share one feed-forward, but the weights of layers 0 and 2 differ"):
        load(ModelConfig(source=str(folder)), "causal", 0, 0)


def test_every_catalogue_entry_is_described_and_builds():
    for label, entry in CATALOGUE.items():
        assert entry.title and entry.reference and entry.hub.count("/") == 1
        places.check(ModelConfig(source=label))
        assert build_config(ModelConfig(source=label), "classification", 3).num_labels == 3


@pytest.mark.parametrize(
    ("source", "positions"),
    [("minilm", 512), ("roberta_base", 512), ("gpt2", 1024), ("llama2_7b", 4096), ("bloom_560m", None)],
)
def test_max_positions(source, positions):
    assert max_positions(ModelConfig(source=source)) == positions


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_max_positions_is_the_longest_text_that_runs(folders, family):
    config = ModelConfig(source=str(folders[family]))
    model = load(config, "classification", 2, 0)
    positions = max_positions(config)
    length = positions or 300
    assert model(torch.full((1, length), 5)).logits.shape == (1, 2)
    if family in ("bert", "roberta", "gpt2"):
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, length + 1), 5))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("kind", ["classification", "regression", "causal", "question_answering"])
def test_load_agrees_with_build_on_meta_for_each_task(folders, family, kind):
    config = ModelConfig(source=str(folders[family]))
    if (kind == "causal" and family in tiny.ENCODERS) or (kind == "question_answering" and family == "glm"):
        for build in (lambda: load(config, kind, 0, 0), lambda: build_on_meta(config, kind, 0)):
            with pytest.raises(UserError, match="model: "):
                build()
        return
    labels = 1 if kind == "regression" else 3
    model, on_meta = load(config, kind, labels, 0), build_on_meta(config, kind, labels)
    assert shapes(model) == shapes(on_meta)
    assert count(model) == count(on_meta)  # the same tensors are shared
    assert model.config.pad_token_id == 1
    batch = load_tokenizer(config)(list(tiny.TEXTS), padding=True, return_tensors="pt")
    output = model(**batch)
    if kind in ("classification", "regression"):
        assert output.logits.shape == (4, labels)
        assert model.config.problem_type.startswith("regression" if kind == "regression" else "single")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_pretrained_weights_are_loaded_and_only_the_head_is_new(folders, family):
    config = ModelConfig(source=str(folders[family]))
    first, second = (load(config, "classification", 3, seed) for seed in (0, 1))
    different = {n for n, p in first.named_parameters() if not torch.equal(p, second.get_parameter(n))}
    assert different, "the head depends on the seed"
    assert all(name.split(".")[0] in ("classifier", "score") for name in different)


@pytest.mark.parametrize(
    ("family", "encoder"),
    {
        **dict.fromkeys(["bert", "roberta", "xlm-roberta", "camembert", "electra", "albert", "mpnet"], True),
        **dict.fromkeys(["distilbert", "deberta-v2", "modernbert"], True),
        **dict.fromkeys(["gpt2", "llama", "bloom", "mistral", "qwen2", "gemma3_text", "gpt_neox"], False),
    }.items(),
)
def test_encoders_are_told_from_decoders(family, encoder):
    assert is_encoder(AutoConfig.for_model(family)) == encoder


def test_the_head_depends_on_the_seed_and_on_nothing_else(folders):
    config = ModelConfig(source=str(folders["roberta"]))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = fingerprint(load(config, "classification", 3, 7))
    assert torch.equal(state, torch.get_rng_state()), "the global generator is left as it was"
    torch.manual_seed(2)
    assert fingerprint(load(config, "classification", 3, 7)) == first
    assert fingerprint(load(config, "classification", 3, 8)) != first


def test_dropout_is_written_into_every_field(folders):
    bert = build_config(ModelConfig(source="minilm"), "classification", 2)
    assert (bert.hidden_dropout_prob, bert.attention_probs_dropout_prob) == (0.0, 0.0)
    bert = build_config(ModelConfig(source="minilm", dropout="model"), "classification", 2)
    assert (bert.hidden_dropout_prob, bert.attention_probs_dropout_prob) == (0.1, 0.1)
    gpt2 = build_config(ModelConfig(source="gpt2", dropout=0.25), "causal", 0)
    assert (gpt2.attn_pdrop, gpt2.embd_pdrop, gpt2.resid_pdrop) == (0.25, 0.25, 0.25)
    for family in tiny.FAMILIES:
        model = load(ModelConfig(source=str(folders[family])), "classification", 2, 0).train()
        tokens = torch.arange(5, 25).reshape(2, 10)
        state = torch.get_rng_state()
        assert torch.equal(model(tokens).logits, model(tokens).logits)
        assert torch.equal(state, torch.get_rng_state()), f"{family}: a turn draws no random number"


def test_weights_in_half_precision(folders):
    config = ModelConfig(source=str(folders["llama"]), weights="bfloat16")
    model, on_meta = load(config, "causal", 0, 0), build_on_meta(config, "causal", 0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert shapes(model) == shapes(on_meta)
    buffers = {n: b.dtype for n, b in model.named_buffers()}
    assert buffers == {n: b.dtype for n, b in on_meta.named_buffers()}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradient_checkpointing_changes_nothing_but_memory(folders, family):
    tokens = torch.arange(5, 25).reshape(2, 10)
    gradients = []
    for checkpointing in (False, True):
        config = ModelConfig(source=str(folders[family]), gradient_checkpointing=checkpointing)
        model = load(config, "classification", 2, 0).train()
        assert model.is_activation_checkpointing is checkpointing
        model(tokens, labels=torch.tensor([0, 1])).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_a_decoder_classifies_at_the_last_token_that_is_not_padding(folders):
    config = ModelConfig(source=str(folders["gpt2"]))
    model, words = load(config, "classification", 2, 0), load_tokenizer(config)
    alone = model(**words(["the film was bad"], return_tensors="pt")).logits
    padded = model(
        **words(
            ["the film was bad", "the film was good and the actors were good"],
            padding=True,
            return_tensors="pt",
        )
    ).logits
    torch.testing.assert_close(padded[:1], alone)


def test_a_tokenizer_without_padding_pads_with_its_end_of_text(folders, tmp_path):
    folder = tiny.save(tmp_path / "gpt2", "gpt2")
    for name in ("tokenizer_config.json", "config.json"):
        content = json.loads((folder / name).read_text())
        content.pop("pad_token", None), content.pop("pad_token_id", None)
        (folder / name).write_text(json.dumps(content))
    config = ModelConfig(source=str(folder))
    assert load_tokenizer(config).pad_token_id == 2
    model = load(config, "classification", 2, 0)
    assert model.config.pad_token_id == 2
    assert model.transformer.wte.padding_idx is None, "the end-of-text token stays trainable"


def test_minilm_is_the_model_in_its_package():
    config = ModelConfig(source="minilm")
    model = load(config, "classification", 5, 0)
    assert count(model) == 22_715_141
    assert shapes(model) == shapes(build_on_meta(config, "classification", 5))
    words = load_tokenizer(config)
    assert words.convert_ids_to_tokens(words("learning language").input_ids) == [
        "[CLS]",
        "learning",
        "language",
        "[SEP]",
    ]


@pytest.mark.slow
@pytest.mark.skipif(
    not (downloads.folder() / downloads.ARCHIVES["smollm2"].file).is_file(),
    reason="the archive is not downloaded",
)
def test_smollm2_answers():
    config = ModelConfig(source="smollm2")
    model, words = load(config, "causal", 0, 0), load_tokenizer(config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert shapes(model) == shapes(build_on_meta(config, "causal", 0))
    question = words.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**question, max_new_tokens=12, do_sample=False)
    assert "Paris" in words.decode(answer[0])


def test_fingerprint_sees_names_formats_shapes_and_values():
    def prints(**tensors):
        module = torch.nn.Module()
        for name, tensor in tensors.items():
            module.register_parameter(name, torch.nn.Parameter(tensor))
        return fingerprint(module)

    variants = [
        prints(a=torch.zeros(2, 3)),
        prints(b=torch.zeros(2, 3)),
        prints(a=torch.zeros(3, 2)),
        prints(a=torch.zeros(6)),
        prints(a=torch.zeros(2, 3, dtype=torch.float64)),
        prints(a=torch.tensor([[0.0, 0, 0], [0, 0, 1e-45]])),
        prints(a=torch.zeros(2, 3, dtype=torch.bfloat16)),
    ]
    assert len(set(variants)) == len(variants)
    assert prints(a=torch.arange(6.0).reshape(3, 2).T) == prints(a=torch.tensor([[0.0, 2, 4], [1, 3, 5]]))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("minilmm", "did you mean minilm"),
        ("roberta-base", "did you mean roberta_base"),
        ("no/such/folder", "there is no folder"),
        ("/no/such/folder", "there is no folder"),
        ("./nothing", "there is no folder"),
        ("~/no_such_model", "there is no folder"),
    ],
)
def test_a_source_that_cannot_exist_is_named(source, says):
    config = ModelConfig(source=source)
    for call in (
        lambda: places.check(config),
        lambda: load(config, "classification", 2, 0),
        lambda: build_on_meta(config, "classification", 2),
        lambda: load_tokenizer(config),
    ):
        with pytest.raises(UserError, match="^model: ") as caught:
            call()
        assert says in str(caught.value) and repr(source) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_model_is_named(tmp_path, folders):
    with pytest.raises(UserError, match="has no config.json"):
        places.check(ModelConfig(source=str(tmp_path)))

    shape_only = tmp_path / "shape"
    shape_only.mkdir()
    (shape_only / "config.json").write_bytes((folders["bert"] / "config.json").read_bytes())
    config = ModelConfig(source=str(shape_only))
    assert count(build_on_meta(config, "classification", 2)) > 0
    assert count(build_on_meta(ModelConfig(source=str(shape_only / "config.json")), "classification", 2)) > 0
    with pytest.raises(UserError, match="only safetensors are read"):
        load(config, "classification", 2, 0)
    # A pickle beside it is not even looked at.
    (shape_only / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="only safetensors are read"):
        load(config, "classification", 2, 0)
    (shape_only / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(UserError, match="cannot be loaded"):
        load(config, "classification", 2, 0)
    for content in ("{", "{}", '{"model_type": "nothing"}', "[]"):
        (shape_only / "config.json").write_text(content)
        with pytest.raises(UserError, match="^model: "):
            load(config, "classification", 2, 0)


def test_weights_that_do_not_fit_are_an_error_not_random_numbers(tmp_path):
    folder = tiny.save(tmp_path / "bert", "bert")
    for change in ({"num_hidden_layers": 4}, {"intermediate_size": 64}):
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | change))
        with pytest.raises(UserError, match="do not fit"):
            load(ModelConfig(source=str(folder)), "classification", 2, 0)
        (folder / "config.json").write_text(json.dumps(content))


def test_a_checkpoint_with_another_head_gets_a_new_one(tmp_path, folders):
    load(ModelConfig(source=str(folders["bert"])), "classification", 7, 0).save_pretrained(tmp_path)
    assert load(ModelConfig(source=str(tmp_path)), "classification", 3, 0).classifier.out_features == 3


def test_code_of_a_model_runs_only_if_the_study_says_so(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}})
    )
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UserError, match="trust_remote_code: true"):
        build_on_meta(ModelConfig(source=str(tmp_path)), "classification", 2)


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_named(tmp_path):
    script = (
        "from fedlm.models.loading import *\n"
        "for source in ('roberta_base', 'somebody/something'):\n"
        "    for call in (lambda c: load(c, 'classification', 2, 0), load_tokenizer):\n"
        "        try:\n"
        "            call(ModelConfig(source=source))\n"
        "        except UserError as error:\n"
        "            print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert all("the hub cannot be reached" in line and "name its folder" in line for line in lines)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"source": ""},
        {"source": "minilm", "dropout": 1.0},
        {"source": "minilm", "dropout": "none"},
        {"source": "minilm", "weights": "int8"},
        {"source": "minilm", "unknown": 1},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValidationError):
        ModelConfig(**wrong)
