import peft
import pytest
import tiny
import torch

from fedlm.measure.flops import count_flops
from fedlm.measure.memory import measure_step
from fedlm.models.blocks import find_blocks
from fedlm.models.config import ModelConfig
from fedlm.models.fake import fake_model
from fedlm.models.loading import load

GIB = 2**30


pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: tiny.save(root / family, family, layers=2, hidden=32) for family in tiny.FAMILIES}


def freeze(model, trained):
    """Leave only the first or the last layer, and the head, to be trained; or all."""
    anatomy = find_blocks(model)
    if trained != "all":
        index = 0 if trained == "first block" else len(anatomy.layers) - 1
        chosen = {*anatomy.blocks[index].parameters, *anatomy.head}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
    return model.train()


def make_step(model, kind, batch_size, length):
    """A step of AdamW on a batch whose last token is padding."""
    batch = {
        "input_ids": torch.ones(batch_size, length, dtype=torch.long) * 5,
        "attention_mask": torch.ones(batch_size, length, dtype=torch.long),
    }
    batch["attention_mask"][:, -1] = 0
    if kind == "classification":
        batch["labels"] = torch.zeros(batch_size, dtype=torch.long)
    elif kind == "causal":
        batch["labels"] = batch["input_ids"]
    else:
        batch["start_positions"] = batch["end_positions"] = torch.ones(batch_size, dtype=torch.long)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measured(config, kind, labels, shape, prepare):
    model = prepare(load(config, kind, labels, 0))
    step = make_step(model, kind, *shape)
    return measure_step(step, model), count_flops(step)


def predicted(config, kind, labels, shape, prepare):
    with fake_model(config, kind, labels, prepare) as (_, model):
        step = make_step(model, kind, *shape)
        return measure_step(step, model), count_flops(step)


@pytest.mark.parametrize(
    ("trained", "dropout"), [("all", 0.0), ("first block", 0.0), ("last block", 0.0), ("all", "model")]
)
def test_prediction_is_measurement_on_minilm(trained, dropout):
    config = ModelConfig(source="minilm", dropout=dropout)
    arguments = config, "classification", 5, (4, 32), lambda model: freeze(model, trained)
    real, prediction = measured(*arguments), predicted(*arguments)
    assert prediction[1] == real[1]
    assert prediction[0].peak == pytest.approx(real[0].peak, rel=0.01)
    assert prediction == real, "in fact it agrees to the byte"


@pytest.mark.parametrize(
    ("family", "kind", "trained"),
    [
        *((family, "classification", "all") for family in tiny.FAMILIES),
        *((family, "causal", "first block") for family in tiny.DECODERS),
        ("roberta", "question_answering", "last block"),
    ],
)
def test_prediction_is_measurement_in_every_family(folders, family, kind, trained):
    config = ModelConfig(source=str(folders[family]))
    arguments = config, kind, 3, (4, 24), lambda model: freeze(model, trained)
    real, prediction = measured(*arguments), predicted(*arguments)
    assert prediction == real
    assert real[1] > 0


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("levers", [{"weights": "bfloat16"}, {"gradient_checkpointing": True}])
def test_prediction_is_measurement_with_memory_levers(folders, family, levers):
    config = ModelConfig(source=str(folders[family]), **levers)
    arguments = config, "classification", 3, (4, 24), lambda model: freeze(model, "all")
    assert predicted(*arguments) == measured(*arguments)


@pytest.mark.parametrize(
    ("family", "kind", "adapter"),
    [
        ("bert", "classification", peft.LoraConfig(task_type="SEQ_CLS", r=4)),
        ("bert", "classification", peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)),
        ("bert", "classification", peft.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=4)),
        ("llama", "causal", peft.LoraConfig(task_type="CAUSAL_LM", r=4)),
        ("gpt2", "causal", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.peft_type.value,
)
def test_prediction_is_measurement_with_peft(folders, family, kind, adapter):
    config = ModelConfig(source=str(folders[family]))

    def prepare(model):
        return peft.get_peft_model(model, adapter).train()

    arguments = config, kind, 3, (4, 24), prepare
    real, prediction = measured(*arguments), predicted(*arguments)
    assert prediction[1] == real[1]
    assert prediction[0].peak == pytest.approx(real[0].peak, rel=0.01)


@pytest.mark.parametrize(
    ("trained", "gibibytes"), [("all", 8.30), ("first block", 5.66), ("last block", 1.19)]
)
def test_roberta_base_at_the_size_of_the_paper(trained, gibibytes):
    # With the model's own dropout of 0.1, as the figures were taken.
    config = ModelConfig(source="roberta_base", dropout="model")
    with fake_model(config, "classification", 2, lambda m: freeze(m, trained)) as (_, model):
        memory = measure_step(make_step(model, "classification", 64, 128), model)
    assert memory.peak / GIB == pytest.approx(gibibytes, abs=0.01)


# Of the first and the last block: tests/test_costs.py.
@pytest.mark.parametrize(("trained", "gibibytes"), [("all", 101.4)])
def test_llama2_7b_at_the_size_of_the_paper(trained, gibibytes):
    config = ModelConfig(source="llama2_7b")
    with fake_model(config, "causal", 0, lambda m: freeze(m, trained)) as (_, model):
        memory = measure_step(make_step(model, "causal", 1, 512), model)
    assert memory.peak / GIB == pytest.approx(gibibytes, abs=0.05)
    assert memory.parameter >= 4 * 6_738_415_616


def test_what_is_shared_stays_shared_and_nothing_is_real(folders):
    for family in ("gpt2", "mobillama"):
        config = ModelConfig(source=str(folders[family]))
        real = load(config, "causal", 0, 0)
        with fake_model(config, "causal", 0) as (mode, model):
            assert len(list(model.parameters())) == len(list(real.parameters()))
            tensors = [*model.parameters(), *model.buffers()]
            assert all(tensor.fake_mode is mode and tensor.device.type == "cpu" for tensor in tensors)
            assert find_blocks(model) == find_blocks(real)
            for name, parameter in real.named_parameters():
                fake = model.get_parameter(name)
                assert (fake.shape, fake.stride(), fake.dtype) == (
                    parameter.shape,
                    parameter.stride(),
                    parameter.dtype,
                )


def test_the_flops_of_minilm_by_hand():
    """Forward and backward of all layers: six products of a token with each weight, and the attention."""
    config = ModelConfig(source="minilm")
    layers, hidden, batch, length = 6, 384, 4, 32
    tokens = batch * length
    linear = 6 * tokens * layers * 12 * hidden**2
    # Two products forward, five backward (the scores are computed again), each of length x length x hidden.
    attention = 7 * 2 * batch * length**2 * hidden * layers
    pooler_and_classifier = 6 * batch * (hidden**2 + hidden * 5)
    flops = predicted(config, "classification", 5, (batch, length), lambda m: freeze(m, "all"))[1]
    assert flops == linear + attention + pooler_and_classifier
