"""HeteroFL: sub-models of less width, by the clients' memory budgets (arXiv:2010.01264)."""

from functools import partial

import pytest
import tiny
import torch
import worlds
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedlm.base.errors import UserError
from fedlm.exchange import payload
from fedlm.federation.facts import Facts
from fedlm.models.config import ModelConfig
from fedlm.models.loading import load as load_model
from fedlm.models.narrow import FAMILIES, Narrow, head_size
from fedlm.study.plugins import discover_methods

pytestmark = pytest.mark.usefixtures("one_thread")

UNEQUAL = {"scheme": "quantity", "alpha": 1, "min_examples": 4}
KINDS = [
    ("bert", "classification"),
    ("bert", "question_answering"),
    ("roberta", "regression"),
    ("gpt2", "causal"),
    ("gpt2", "classification"),
    ("llama", "causal"),
    ("mistral", "causal"),
    ("mobillama", "causal"),  # layers share a part
]


ran = partial(worlds.with_levels, "heterofl")


def loaded(tmp_path, family, kind="classification"):
    source = tiny.save(tmp_path / family, family)
    return load_model(ModelConfig(source=str(source)), kind, 2, 0)


@pytest.mark.slow
def test_if_all_clients_are_strong_it_is_fedavg_bit_for_bit(place):
    plain = worlds.federation("fedavg", place, rounds=2)
    plain.run()
    run = ran(place, {}, rounds=2, weights="examples")
    assert worlds.sha(run) == worlds.sha(plain)
    assert (run.ledger.upload, run.ledger.download) == (plain.ledger.upload, plain.ledger.download)
    assert run.instruments.memory == plain.instruments.memory


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_the_narrow_model_computes_what_a_model_built_so_small_computes(family, kind, tmp_path):
    model = loaded(tmp_path, family, kind).eval()
    narrow = Narrow(model, 0.5)
    values = {name: value.detach().clone() for name, value in model.named_parameters()}
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 8, 1, 1]])}
    inputs["attention_mask"] = (inputs["input_ids"] != 1).long()
    small = type(model)(narrow._twin.config).eval()
    if family == "mobillama":
        for layer in small.base_model.layers:
            layer.mlp = small.base_model.layers[0].mlp
    with torch.no_grad():
        for name, value in small.named_parameters():
            value.copy_(narrow.cut(name, values[name]))
        for (_, own), (_, whole) in zip(small.named_buffers(), model.named_buffers(), strict=True):
            own.copy_(whole[tuple(slice(size) for size in own.shape)])  # rotations keep their frequencies
        before = model(**inputs)[0]
        with narrow.instead_of(model, scaled=False):
            for name, value in model.named_parameters():
                value.copy_(narrow.cut(name, values[name]))
            assert torch.equal(model(**inputs)[0], small(**inputs)[0])
        assert torch.equal(model(**inputs)[0], before)
    assert sum(value.numel() for value in small.parameters()) < sum(v.numel() for v in values.values()) / 2


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "distilbert"])
@given(data=st.data())
@settings(max_examples=8)
def test_a_narrower_model_is_a_part_of_a_wider_one(family, tmp_path_factory, data):
    heads = data.draw(st.sampled_from([2, 4]))
    if family == "distilbert":
        from transformers import AutoConfig, AutoModelForSequenceClassification

        config = AutoConfig.for_model(
            family,
            dim=64,
            n_layers=1,
            n_heads=heads,
            hidden_dim=96,
            vocab_size=64,
            max_position_embeddings=32,
        )
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        auto = AutoModelForSequenceClassification if family == "bert" else AutoModelForCausalLM
        model = auto.from_config(tiny.config(family, layers=1, hidden=16 * heads))
    one, two = data.draw(st.sampled_from([(1.0, 0.5), (0.5, 0.25), (1.0, 0.25)]))
    assert head_size(model) * two % 1 == 0
    wide, narrow = Narrow(model, one), Narrow(model, two)
    for name, value in model.named_parameters():
        places = torch.arange(value.numel()).view(value.shape)
        inside = set(narrow.cut(name, places).flatten().tolist())
        assert inside < set(wide.cut(name, places).flatten().tolist()) or narrow.cut(name, places).equal(
            places
        )
        assert wide.cut(name, places).shape == (
            value.shape if one == 1 else wide._twin.get_parameter(name).shape
        )
        assert len(inside) == narrow._twin.get_parameter(name).numel()


def test_of_each_head_the_first_part_is_kept(tmp_path):
    narrow = Narrow(loaded(tmp_path, "bert"), 0.5)
    rows = narrow.cut("bert.encoder.layer.0.attention.self.key.bias", torch.arange(16))
    assert rows.tolist() == [0, 1, 4, 5, 8, 9, 12, 13]
    dense = narrow.cut("bert.encoder.layer.0.attention.output.dense.weight", torch.arange(256).view(16, 16))
    assert dense[0].tolist() == rows.tolist() and dense[:, 0].tolist() == [16 * row for row in range(8)]
    fused = Narrow(loaded(tmp_path, "gpt2", "causal"), 0.5)
    columns = fused.cut("transformer.h.0.attn.c_attn.bias", torch.arange(48))
    assert columns.tolist() == [*rows.tolist(), *(16 + rows).tolist(), *(32 + rows).tolist()]
    rotated = Narrow(loaded(tmp_path, "llama", "causal"), 0.5)
    query = rotated.cut("model.layers.0.self_attn.q_proj.weight", torch.arange(256).view(16, 16))
    # Entry 0 of a head of four is rotated with entry 2.
    assert (query[:, 0] // 16).tolist() == [0, 2, 4, 6, 8, 10, 12, 14]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("training", [True, False])
def test_the_scaler_divides_by_the_rate_in_training_only(family, training, tmp_path):
    model = loaded(tmp_path, family).train(training)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding) or type(module).__name__ == "Conv1D"
    }
    seen = {"computed": {}, "returned": {}}  # hooks see what those registered before them made of it

    def note(when):
        for name, module in layers.items():
            module.register_forward_hook(
                lambda _, given, output, name=name: seen[when].update({name: output})
            )

    note("computed")
    with Narrow(model, 0.5).instead_of(model, scaled=True), torch.no_grad():
        for value in model.parameters():
            value.normal_()
        note("returned")
        model(input_ids=torch.tensor([[5, 6, 7, 8]]))
    head = next(name for name in layers if name in ("classifier", "score"))
    assert len(seen["computed"]) == len(layers) > 10
    for name, output in seen["computed"].items():
        factor = 2 if training and name != head else 1
        assert torch.equal(seen["returned"][name], factor * output), name


@pytest.mark.parametrize("weights", ["equal", "examples"])
def test_an_entry_is_the_mean_over_the_clients_that_hold_it(weights, place):
    levels = {0: 0, 1: 1, 2: 2}
    run = worlds.federation("heterofl", place, scheme=UNEQUAL, rounds=1, weights=weights)
    run.method.level, uploads, merge = levels, [], run.method.merge

    def noted(server, given, round):
        kept = list(given)
        for one in kept:
            uploads.append((one.client, one.examples, {n: one.tensors[n].clone() for n in one.tensors}))
        merge(server, kept, round)

    run.method.merge = noted
    run.run()
    assert len({examples for _, examples, _ in uploads}) > 1
    for name, initial in run.server.initial.items():
        total, weight = torch.zeros_like(initial, dtype=torch.float64), torch.zeros_like(initial)
        for client, examples, sent in uploads:
            share = examples if weights == "examples" else 1
            for tensor, value in ((total, share * sent[name].double()), (weight, torch.tensor(share))):
                level = levels[client]
                part = run.method.narrow[level - 1].window(name, tensor) if level else tensor
                part += value.reshape(part.shape) if value.dim() else value
        torch.testing.assert_close(run.server.tensors[name].double(), total / weight, atol=1e-6, rtol=1e-6)


def test_what_no_client_holds_stays_and_what_is_not_trained_comes_back_as_it_was(place):
    run = ran(place, dict.fromkeys(range(3), 1), rounds=2)
    for name, before in run.server.initial.items():
        after = run.server.tensors[name]
        inside = torch.zeros_like(before, dtype=torch.bool)
        run.method.narrow[0].window(name, inside).fill_(True)
        assert torch.equal(after[~inside], before[~inside]), name
        assert not torch.equal(after[inside], before[inside]), name
    nothing = {"optimizer": "sgd", "learning_rate": 1e-30}
    still = ran(place, {0: 1, 1: 0, 2: 2}, training=nothing)
    for name, before in still.server.initial.items():
        torch.testing.assert_close(still.server.tensors[name], before, atol=1e-25, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_messages_are_the_parts_and_every_part_is_trained(family, kind, place):
    levels = {0: 1, 1: 0}
    run = ran(place, levels, family=family, kind=kind, clients=2)
    narrow = run.method.narrow[0]
    parts = {name: narrow.cut(name, value) for name, value in run.server.tensors.items()}
    size = payload.size(run.server.tensors) + payload.size(parts)
    assert (run.ledger.upload, run.ledger.download) == (size, size)
    assert run.method.extra(run.server) == {"clients_all": 1, "clients_width_0.5": 1}
    assert set(run.instruments.memory) == {"all", "width 0.5"}
    assert run.instruments.memory["width 0.5"].peak < 0.75 * run.instruments.memory["all"].peak
    shapes = {name: value.shape for name, value in run.model.named_parameters()}
    assert shapes == {name: value.shape for name, value in run.server.initial.items()}


@pytest.mark.slow
def test_a_weak_clients_peak_is_within_its_budget_and_wider_is_not(place):
    memory = 300_000
    given = {"budgets": [{"share": 0.7, "memory": memory}]}
    run = worlds.federation("heterofl", place, federation=given, rounds=1)
    levels = dict(run.method.level)
    assert sorted(levels.values()) == [1, 1]
    run.run()
    assert run.instruments.memory["width 0.5"].peak <= memory < run.instruments.memory["all"].peak


def test_flops_of_a_narrow_turn_are_its_own(place):
    """A matrix of half the rows and columns takes a quarter of the operations."""
    options = {"clients": 2, "training": {"optimizer": "sgd", "learning_rate": 1e-3}}
    wide, first, second, narrow = (
        ran(place, levels, **options) for levels in ({}, {0: 1}, {1: 1}, {0: 1, 1: 1})
    )
    assert wide.flops + narrow.flops == first.flops + second.flops
    assert 3 < wide.flops / narrow.flops < 4.1


def test_rates_that_leave_no_whole_part_of_a_head_are_not_used(tmp_path):
    kind = discover_methods()["heterofl"]
    found = {}
    for family in ("bert", "llama"):
        method = kind(kind.Config(), 2, 0)
        method.prepare(loaded(tmp_path, family), "classification")
        found[family] = [narrow.rate for narrow in method.narrow]
    assert found == {"bert": [0.5, 0.25], "llama": [0.5]}
    with pytest.raises(ValueError, match=r"rate 0\.3: no whole part of 4 entries"):
        Narrow(loaded(tmp_path, "bert"), 0.3)


@pytest.mark.parametrize("rates", [(), (0.5,), (1, 1), (1, 0.5, 0.7), (1, 0)])
def test_rates_fall_from_one(rates):
    with pytest.raises(ValidationError, match="allowed: 1, then smaller and smaller shares above 0"):
        discover_methods()["heterofl"].Config(rates=rates)


def test_a_model_whose_heads_are_not_known_is_refused():
    kind = discover_methods()["heterofl"]
    facts = Facts(family="bloom", kind="causal", blocks=2, hidden=8, positions=None, decoder=True, layers=2)
    with pytest.raises(UserError, match=f"of type bloom are is not known; allowed: {', '.join(FAMILIES)}"):
        kind(kind.Config(), 2, 0).check(facts)
