import copy

import peft
import pytest
import tiny
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedlm.base.errors import UserError
from fedlm.models.blocks import find_blocks, skip
from fedlm.models.catalogue import CATALOGUE
from fedlm.models.config import ModelConfig
from fedlm.models.loading import build_on_meta, load


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: tiny.save(root / family, family) for family in tiny.FAMILIES}


def counts(model):
    anatomy = find_blocks(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    count = {block.name: sum(sizes[name] for name in block.parameters) for block in anatomy.blocks}
    for place in ("embeddings", "head", "rest"):
        count[place] = sum(sizes[name] for name in getattr(anatomy, place))
    return count


def on_meta(source, kind="causal"):
    return build_on_meta(ModelConfig(source=source), kind, 2)


def layers(number, size):
    return {f"layer_{index}": size for index in range(number)}


@pytest.mark.parametrize(
    ("source", "kind", "expected"),
    [
        (
            "roberta_base",
            "classification",
            {**layers(12, 7_087_872), "embeddings": 39_000_576, "head": 592_130, "rest": 0},
        ),
        ("gpt2", "causal", {**layers(12, 7_087_872), "embeddings": 39_383_808, "head": 0, "rest": 1_536}),
        (
            "gpt2",
            "question_answering",
            {**layers(12, 7_087_872), "embeddings": 39_383_808, "head": 1_538, "rest": 1_536},
        ),
        # The untied output embedding is pretrained: it is no head.
        (
            "llama2_7b",
            "causal",
            {**layers(32, 202_383_360), "embeddings": 131_072_000, "head": 0, "rest": 131_072_000 + 4_096},
        ),
        (
            "chatglm3_6b",
            "causal",
            {**layers(28, 203_960_832), "embeddings": 266_338_304, "head": 0, "rest": 266_338_304 + 4_096},
        ),
        (
            "bloom_560m",
            "causal",
            {**layers(24, 12_596_224), "embeddings": 256_903_168, "head": 0, "rest": 2_048},
        ),
        (
            "mobillama_05b",
            "causal",
            {
                **layers(22, 16_781_312),
                "shared": 34_603_008,
                "embeddings": 65_536_000,
                "head": 0,
                "rest": 65_536_000 + 2_048,
            },
        ),
        # The pooler is pretrained: it is no head either.
        (
            "minilm",
            "classification",
            {**layers(6, 1_774_464), "embeddings": 11_918_592, "head": 770, "rest": 147_840},
        ),
    ],
)
def test_parameter_counts(source, kind, expected):
    assert counts(on_meta(source, kind)) == expected


@pytest.mark.parametrize("source", CATALOGUE)
def test_every_parameter_is_in_one_place(source):
    model = on_meta(source, "classification")
    anatomy = find_blocks(model)
    names = [name for block in anatomy.blocks for name in block.parameters]
    names += [*anatomy.embeddings, *anatomy.head, *anatomy.rest]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert set(anatomy.places) == set(names)
    for block in anatomy.blocks:
        inside = {id(p) for p in model.get_submodule(block.module).parameters()}
        assert inside >= {id(model.get_parameter(name)) for name in block.parameters}


def test_the_shared_feed_forward_is_a_block_of_its_own():
    anatomy = find_blocks(on_meta("mobillama_05b"))
    shared = anatomy.blocks[-1]
    assert (shared.name, shared.module) == ("shared", "model.layers.0.mlp")
    assert anatomy.shared == shared.parameters and len(shared.parameters) == 3
    assert len(anatomy.layers) == 22


@pytest.mark.parametrize(
    ("source", "kind", "config"),
    [
        ("roberta_base", "SEQ_CLS", peft.LoraConfig(task_type="SEQ_CLS", r=4)),
        ("gpt2", "CAUSAL_LM", peft.LoraConfig(task_type="CAUSAL_LM", r=4, fan_in_fan_out=True)),
        ("llama2_7b", "CAUSAL_LM", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
        ("bloom_560m", "SEQ_CLS", peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)),
    ],
)
def test_a_model_wrapped_by_peft_has_the_same_anatomy(source, kind, config):
    kind = "classification" if kind == "SEQ_CLS" else "causal"
    plain = find_blocks(on_meta(source, kind))
    model = peft.get_peft_model(on_meta(source, kind), config)
    wrapped = find_blocks(model)
    assert len(wrapped.blocks) == len(plain.blocks)
    assert len(wrapped.embeddings) == len(plain.embeddings)
    # peft keeps the head twice: as it was, and as it is trained.
    assert len(wrapped.head) == 2 * len(plain.head)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert wrapped.places[name].startswith("layer_")
        elif "prompt_encoder" in name:
            assert wrapped.places[name] == "rest"
        elif parameter.requires_grad:
            assert wrapped.places[name] == "head"


def test_experts_inside_a_layer_are_not_its_layers():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))

    model = nn.Sequential(nn.Embedding(3, 2), nn.ModuleList(Layer() for _ in range(2)))
    assert find_blocks(model).layers == ("1.0", "1.1")


def test_a_model_without_layers_is_named():
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2), nn.ModuleList([nn.Dropout()]))
    with pytest.raises(UserError, match="^model: no blocks can be found in Sequential"):
        find_blocks(model)


def without(model, skipped):
    """A copy of the model that never had the skipped layers."""
    model = copy.deepcopy(model)
    path = find_blocks(model).layers[0].rpartition(".")[0]
    parent, _, name = path.rpartition(".")
    kept = [layer for i, layer in enumerate(model.get_submodule(path)) if i not in skipped]
    setattr(model.get_submodule(parent), name, nn.ModuleList(kept))
    return model


def run(model, kind):
    tokens = torch.arange(5, 45).reshape(4, 10)
    labels = torch.tensor([0, 1, 1, 0]) if kind == "classification" else tokens
    model.zero_grad()
    with FlopCounterMode(display=False) as counter:
        output = model(tokens, labels=labels)
        output.loss.backward()
    return output, counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_skipped_layers_compute_nothing_and_the_others_do_not_notice(folders, family, checkpointing):
    kind = "classification" if family in tiny.ENCODERS else "causal"
    config = ModelConfig(source=str(folders[family]), gradient_checkpointing=checkpointing)
    model = load(config, kind, 2, 0).train()
    full, full_flops = run(model, kind)
    names = [name for name, _ in model.named_parameters()]
    for skipped in ({0}, {1}, {0, 2}):
        expected, expected_flops = run(without(model, skipped), kind)
        with skip(model, skipped):
            assert [name for name, _ in model.named_parameters()] == names
            output, flops = run(model, kind)
        torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=0)
        assert not torch.equal(output.logits, full.logits)
        assert flops == expected_flops < full_flops
        places = find_blocks(model).places
        for name, parameter in model.named_parameters():
            left_out = places[name] in {f"layer_{index}" for index in skipped}
            assert (parameter.grad is None) == left_out, name
        again, again_flops = run(model, kind)
        assert torch.equal(again.logits, full.logits) and again_flops == full_flops


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(task_type="SEQ_CLS", r=2),
        peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    ],
)
def test_skip_works_on_a_model_wrapped_by_peft(folders, config):
    torch.manual_seed(0)
    model = peft.get_peft_model(
        load(ModelConfig(source=str(folders["bert"])), "classification", 2, 0), config
    )
    full, full_flops = run(model, "classification")
    with skip(model, [1]):
        output, flops = run(model, "classification")
    assert flops < full_flops and not torch.equal(output.logits, full.logits)


def test_skip_ends_with_an_error_and_names_a_wrong_layer(folders):
    model = load(ModelConfig(source=str(folders["llama"])), "causal", 0, 0)
    full, _ = run(model, "causal")
    with pytest.raises(KeyError), skip(model, [0]):
        raise KeyError
    assert torch.equal(run(model, "causal")[0].logits, full.logits)
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match="layers 0 to 2"), skip(model, [wrong]):
            pass
