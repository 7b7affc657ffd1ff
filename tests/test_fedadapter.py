"""Bottleneck adapters: in every family, where they belong, and nothing at all before they are trained."""

import pytest
import tiny
import torch
import worlds

from fedlm.base.errors import UserError
from fedlm.models import loading
from fedlm.models.config import ModelConfig
from fedlm.models.fake import fake_model
from fedlm.study.plugins import discover_methods

HIDDEN, LAYERS = 16, 3
PLACES = {
    "bert": ("attention.output.dense", "output.dense"),
    "roberta": ("attention.output.dense", "output.dense"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "glm": ("self_attn.o_proj", "mlp.down_proj"),
}


def adapted(place, family, kind="classification", placement="both", width=4, **model):
    """Return a tiny model's configuration, the method, and the model with its adapters."""
    config = ModelConfig(source=str(worlds.folder(family, str(place))), **model)
    method = discover_methods()["fedadapter"]
    method = method(method.Config(width=width, placement=placement), 2, 1)
    return config, method, method.prepare(loading.load(config, kind, 2, 1), kind)


@pytest.mark.slow
@pytest.mark.parametrize("family", PLACES)
@pytest.mark.parametrize("placement", ["both", "feed_forward"])
def test_adapters_end_the_sub_layers_of_every_family(place, family, placement):
    _, method, model = adapted(place, family, placement=placement)
    places = PLACES[family] if placement == "both" else PLACES[family][1:]
    assert {name for name, module in model.named_modules() if name.endswith(".adapter")} == {
        f"{layer}.{end}.adapter" for layer in method.anatomy.layers for end in places
    }
    sizes = {name: value.numel() for name, value in model.named_parameters() if ".adapter." in name}
    assert sum(sizes.values()) == LAYERS * len(places) * (2 * 4 * HIDDEN + 4 + HIDDEN)
    assert set(method.exchanged) == {*sizes, *method.anatomy.head}


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_untrained_adapters_change_nothing_and_trained_ones_every_place(place, family):
    config, _, model = adapted(place, family, "causal")
    tokens = torch.arange(3, 19)[None]
    with torch.no_grad():
        expected = loading.load(config, "causal", 2, 1)(tokens).logits
        assert torch.equal(model(tokens).logits, expected)
        for name, value in model.named_parameters():
            if name.endswith("adapter.up.weight"):
                value.normal_()
                assert not torch.equal(model(tokens).logits, expected), name
                value.zero_()


def test_what_layers_share_has_one_adapter(place):
    _, _, model = adapted(place, "mobillama", "causal")
    found = [name for name, _ in model.named_parameters() if name.endswith("adapter.up.weight")]
    assert len(found) == LAYERS + 1


def test_gradient_checkpointing_and_half_precision(place):
    gradients = []
    for checkpointing in (False, True):
        _, _, model = adapted(
            place, "llama", "causal", weights="bfloat16", gradient_checkpointing=checkpointing
        )
        for name, value in model.named_parameters():
            if "adapter" in name:
                assert value.dtype == torch.bfloat16
                torch.nn.init.constant_(value, 0.01)
        model.train()
        tokens = torch.arange(3, 19)[None]
        model(tokens, labels=tokens).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys() and all("adapter" in name for name in plain)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_step_without_weights(place, family):
    config, method, real = adapted(place, family)
    with fake_model(config, "classification", 2, lambda m: method.prepare(m, "classification")) as (_, model):
        shapes = {name: (value.shape, value.requires_grad) for name, value in model.named_parameters()}
        model(torch.ones(2, 8, dtype=torch.long), labels=torch.ones(2, dtype=torch.long)).loss.backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == set(method.exchanged)
    assert shapes == {name: (value.shape, value.requires_grad) for name, value in real.named_parameters()}


def test_a_layer_without_such_projections_is_named(place):
    config = ModelConfig(source=str(worlds.folder("bert", str(place))))
    model = loading.load(config, "classification", 2, 1)
    for layer in model.base_model.encoder.layer:
        layer.output.dense = torch.nn.Linear(32, 5)
    method = discover_methods()["fedadapter"]
    with pytest.raises(UserError, match="BertLayer does not end its attention"):
        method(method.Config(), 2, 1).prepare(model, "classification")
