"""EmbracingFL: consecutive layers at the output, by the clients' memory budgets (arXiv:2406.15125)."""

from functools import partial

import numpy
import pytest
import tiny
import tiny_study
import torch
import worlds
from pydantic import ValidationError

from fedlm.base.errors import UserError
from fedlm.costs import prediction
from fedlm.exchange import payload
from fedlm.federation import budgets
from fedlm.federation.passes import GivenBatches
from fedlm.federation.settings import Budget, Training
from fedlm.federation.settings import Federation as FederationConfig
from fedlm.models.config import ModelConfig
from fedlm.models.loading import load as load_model
from fedlm.models.parts import Parts
from fedlm.study import check, reading
from fedlm.study.plugins import discover_methods

pytestmark = pytest.mark.usefixtures("one_thread")


ran = partial(worlds.with_levels, "embracingfl")


@pytest.mark.slow
def test_if_all_clients_are_strong_it_is_fedavg_bit_for_bit(place):
    plain = worlds.federation("fedavg", place, rounds=2)
    plain.run()
    run = ran(place, {}, rounds=2)
    assert worlds.sha(run) == worlds.sha(plain)
    assert (run.ledger.upload, run.ledger.download) == (plain.ledger.upload, plain.ledger.download)
    assert run.instruments.memory == plain.instruments.memory


@pytest.mark.slow
def test_a_weak_clients_peak_is_within_its_budget_and_one_layer_more_is_not(place):
    memory = 200_000
    given = {"budgets": [{"share": 0.7, "memory": memory}, {"share": 0.3, "memory": "1 GB"}]}
    run = worlds.federation("embracingfl", place, federation=given, rounds=1)
    levels = run.method.level
    assert sorted(levels.values()) == [0, 3, 3]
    run.run()
    assert run.instruments.memory["from layer 2"].peak <= memory
    assert run.method.extra(run.server) == {"clients_all": 1, "clients_from_layer_2": 2}
    larger = ran(place, {client: level and level - 1 for client, level in levels.items()})
    assert larger.instruments.memory["from layer 1"].peak > memory


@pytest.mark.slow
def test_a_client_with_many_examples_trains_all_where_keeping_something_of_each_takes_more(place):
    run = worlds.federation("embracingfl", place)
    few, many = numpy.arange(16), numpy.tile(numpy.arange(16), 200)
    for parts, memory, level in (([few], "1 GB", 0), ([few], "200 KB", 3), ([many], "1 MB", 0)):
        given = [Budget(share=1.0, memory=memory)]
        found = budgets.fit(run.method, run.model, parts, run.data.batch, given, run.training)
        assert found == {0: level}
    stored = budgets._peak(
        run.method, 1, run.model, len(many), lambda rows: run.data.batch(rows % 16), run.training
    )
    assert stored > 1_000_000


@pytest.mark.slow
def test_a_prediction_without_data_finds_the_levels_too(place):
    kind = discover_methods()["embracingfl"]
    method = kind(kind.Config(), 4, 0)
    found = prediction.predict(
        method,
        ModelConfig(source=str(worlds.folder("bert", str(place)))),
        "classification",
        2,
        [numpy.arange(16)] * 4,
        GivenBatches("classification", 24),
        FederationConfig(clients=4, rounds=1, budgets=[{"share": 0.5, "memory": "160 KB"}]),
        Training(batch_size=8),
    )
    weak = max(method.level.values())
    assert sorted(method.level.values()) == [weak, weak] and weak > 1
    assert found.memory["all"].peak > 160_000
    assert all(one.peak <= 160_000 for label, one in found.memory.items() if label != "all")


def test_what_is_stored_needs_no_memory_for_frozen_layers(place):
    """At the last level what remains are the trained parameters and one frozen part at a time."""
    run = ran(place, {0: 4, 1: 4, 2: 4})
    sizes = {name: value.nbytes for name, value in run.model.named_parameters()}
    largest = max(sum(sizes[name] for name in part) for part in run.method.parts)
    trained = sum(sizes[name] for name in run.method.trainable(0, 1))
    buffers = sum(value.nbytes for value in run.model.buffers())
    placeholders = 4 * len(sizes)
    assert run.instruments.memory["head"].parameter <= largest + trained + buffers + placeholders
    assert largest + trained < sum(sizes.values()) / 1.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind", "level", "model"),
    [
        ("bert", "classification", 1, {}),
        ("bert", "classification", 3, {"dropout": 0.3}),
        ("gpt2", "causal", 4, {}),  # the output embedding is tied to the frozen one
        ("bloom", "causal", 2, {}),  # layers return tuples
        ("gemma3_text", "causal", 4, {"gradient_checkpointing": True}),  # layers differ by their number
        ("mobillama", "causal", 3, {"weights": "bfloat16"}),  # layers share a part
    ],
)
def test_stored_and_recomputed_turns_are_equal_bit_for_bit(family, kind, level, model, place):
    options = {"family": family, "kind": kind, "model": model, "clients": 2}
    stored, again = (
        ran(place, {1: level}, activations=activations, **options) for activations in ("stored", "recomputed")
    )
    assert worlds.sha(stored) == worlds.sha(again)
    assert stored.flops == again.flops
    assert stored.rounds[0]["train_loss"] == again.rounds[0]["train_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classification", "question_answering"])
def test_over_several_epochs_the_frozen_part_is_computed_once(kind, place):
    options = {"kind": kind, "clients": 2, "training": {"local_epochs": 3, "learning_rate": 1e-3}}
    stored, again = (
        ran(place, {0: 3, 1: 3}, activations=activations, **options)
        for activations in ("stored", "recomputed")
    )
    for name in stored.method.exchanged:
        # An example is in another batch, padded to another length.
        torch.testing.assert_close(
            stored.server.tensors[name], again.server.tensors[name], atol=1e-5, rtol=1e-4
        )
    once = ran(place, {0: 3, 1: 3}, **{**options, "training": {"local_epochs": 1}})
    assert once.flops < stored.flops < again.flops < 3.2 * once.flops


def test_an_upload_is_the_trained_layers_and_each_layer_is_the_mean_of_its_trainers(place):
    levels = {0: 0, 1: 2, 2: 4}
    run = worlds.federation("embracingfl", place, rounds=1)
    run.method.level, uploads, merge = levels, [], run.method.merge

    def noted(server, given, round):
        kept = list(given)
        uploads.extend((one.examples, {n: one.tensors[n].clone() for n in one.tensors}) for one in kept)
        merge(server, kept, round)

    run.method.merge = noted
    run.run()
    parts, exchanged = run.method.parts, run.method.exchanged
    behind = set(exchanged) - {name for part in parts for name in part}
    sizes = {0: set(exchanged), 1: behind.union(*parts[2:]), 2: behind}
    for (_, sent), names in zip(uploads, sizes.values(), strict=True):
        assert set(sent) == names
    size = sum(payload.size({n: run.server.tensors[n] for n in names}) for names in sizes.values())
    assert run.ledger.upload == size
    for name in exchanged:
        own = [(count, sent[name]) for count, sent in uploads if name in sent]
        mean = sum(count * value.double() for count, value in own) / sum(count for count, _ in own)
        torch.testing.assert_close(run.server.tensors[name].double(), mean, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("level", [1, 3, 4])
def test_what_nobody_trains_stays_bit_for_bit(level, place):
    run = ran(place, dict.fromkeys(range(3), level), rounds=2)
    frozen = {name for part in run.method.parts[:level] for name in part}
    assert set(run.method.anatomy.embeddings) <= frozen
    for name in run.method.exchanged:
        same = torch.equal(run.server.tensors[name], run.server.initial[name])
        if name in frozen or name.endswith("weight") and "pooler" not in name:
            assert same == (name in frozen), name


@pytest.mark.parametrize("family", ["bert", "gpt2", "bloom", "gemma3_text"])
def test_part_by_part_is_the_whole_forward_pass(family, tmp_path):
    source = tiny.save(tmp_path / family, family)
    model = load_model(ModelConfig(source=str(source)), "classification", 2, 0)
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 8, 1, 1]])}
    inputs["attention_mask"] = (inputs["input_ids"] != 1).long()
    with torch.no_grad():
        whole = model(**inputs, output_hidden_states=True)
        parts, hidden = Parts(model), None
        for part in range(4):
            hidden = parts.through(part, part, inputs, hidden)
            assert torch.equal(parts.through(0, part, inputs), hidden)
            if part < 3:  # the last is reported behind the final norm
                assert torch.equal(hidden, whole.hidden_states[part])
            with parts.behind(part + 1, hidden):
                rest = model(**inputs)
            assert torch.equal(rest.logits, whole.logits)
        assert torch.equal(model(**inputs).logits, whole.logits)


def test_budgets_are_drawn_from_the_seed_in_the_shares_given():
    given = [Budget(share=0.3, memory="2 MB"), Budget(share=0.5, memory=1000)]
    drawn = budgets.draw(given, 10, seed=1)
    assert sorted(one.memory for one in drawn.values()) == [1000] * 5 + [2_000_000] * 3
    assert drawn == budgets.draw(given, 10, seed=1) != budgets.draw(given, 10, seed=2)
    thirds = [Budget(share=1 / 3, memory=size) for size in (1, 2, 3)]
    assert len(budgets.draw(thirds, 7, seed=1)) == 7


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"share": 0.6, "memory": 1}, {"share": 0.5, "memory": 1}], "add up to 1.1; allowed: at most 1"),
        ([{"share": 0.6, "memory": "300 megs"}], "a number of bytes, or one with a unit: B, KB"),
        ([{"share": 0, "memory": "3 KB"}], "greater than 0"),
    ],
)
def test_bad_budgets_are_named(value, message):
    with pytest.raises(ValidationError, match=message):
        FederationConfig(budgets=value)


def test_a_budget_in_bytes_or_with_a_unit():
    sizes = {"1.5 GB": 1_500_000_000, "2 KiB": 2048, "7B": 7, 12: 12}
    for text, size in sizes.items():
        assert Budget(share=1, memory=text).memory == size


@pytest.mark.slow
def test_the_check_of_a_study_names_budgets_that_are_too_small_and_methods_that_ignore_them(tmp_path):
    def checked(memory):
        path = tiny_study.write(
            tmp_path,
            federation={"clients": 2, "rounds": 2, "budgets": [{"share": 0.5, "memory": memory}]},
            methods={"fedavg": None, "embracingfl": None},
        )
        return check.check(reading.load(path))

    with pytest.raises(
        UserError, match=r"embracingfl.*: 9000 bytes; allowed: at least \d+, which the smalle"
    ):
        checked("9 KB")
    (note,) = checked("20 MB")
    assert note.startswith(
        "federation.budgets: with these methods clients train as if they had no budget: fedavg"
    )


def test_a_budget_too_small_for_the_data_ends_the_run_before_it_begins(place):
    with pytest.raises(UserError, match="budgets: 9000 bytes; allowed: at least"):
        worlds.federation("embracingfl", place, federation={"budgets": [{"share": 0.5, "memory": 9000}]})
