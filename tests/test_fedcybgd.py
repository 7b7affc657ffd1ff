"""FedCyBGD's choice of a block by the gradient, and at random with replacement."""

import math

import pytest
import torch
import worlds
from pydantic import ValidationError

from fedlm.costs import prediction
from fedlm.exchange import payload
from fedlm.federation.loop import Batches
from fedlm.federation.turn import Turn
from fedlm.measure.flops import flop_counter
from fedlm.study.plugins import discover_methods

METHOD = discover_methods()["fedcybgd"]


def of_batch(turn, names):
    """Return the gradient of the loss of a turn's first batch, by plain autograd."""
    parameters = {name: value for name, value in turn.model.named_parameters() if name in names}
    for value in parameters.values():
        value.requires_grad_()
    loss = turn.model.train()(**turn._make_batch(turn._plan[0][0])).loss
    return dict(zip(parameters, torch.autograd.grad(loss, [*parameters.values()]), strict=True))


def watched(run, note):
    """Let `note(turn, names)` see each turn before it is trained, and run."""
    train = run.method.train

    def noted(turn):
        if type(turn) is Turn:
            note(turn, [name for block in run.method.blocks for name in block])
        train(turn)

    run.method.train = noted
    run.run()
    return run


def sent_blocks(run):
    """Return the list that the number of each turn's uploaded block is added to."""
    upload, found = run.method.upload, []

    def noted(turn):
        sent = upload(turn)
        (number,) = [i for i, block in enumerate(run.method.blocks) if set(block) & set(sent)]
        assert set(sent) == {*run.method.blocks[number], *run.method.anatomy.head}
        found.append(number)
        return sent

    run.method.upload = noted
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind", "training"),
    [
        ("bert", "classification", {}),
        ("bert", "classification", {"loss_scale": 1024.0, "accumulation": 2}),
        ("mobillama", "causal", {}),
    ],
)
def test_each_client_trains_the_block_with_the_largest_root_mean_square_gradient(
    family, kind, training, place
):
    run = worlds.federation("fedcybgd", place, family=family, kind=kind, order="gradient", training=training)
    expected, sent = [], sent_blocks(run)

    def note(turn, names):
        gradient = of_batch(turn, names)
        scores = []
        for block in run.method.blocks:
            values = torch.cat([gradient[name].flatten().double() for name in block])
            scores.append(values.square().mean().sqrt().item())
        found = turn.gradient_norms(run.method.segments(0, 1, 1)[0])
        for name, value in gradient.items():
            assert found[name] == pytest.approx(value.norm().item(), rel=1e-4), name
        expected.append(scores.index(max(scores)))

    watched(run, note)
    assert sent == expected != [run.method.block(client, round)[0] for round in (1, 2) for client in range(3)]


def test_the_score_is_a_mean_and_the_first_of_equals_is_taken():
    method = METHOD(METHOD.Config(order="gradient"), 2, 0)
    method.blocks = [["a", "b"], ["c"], ["d"]]
    method.shapes = {"a": (10, 10), "b": (44,), "c": (4, 4), "d": (16,)}
    assert method.steepest({"a": 12.0, "b": 9.0, "c": 5.0, "d": 5.0}) == 0  # 225 / 144 = 25 / 16
    assert method.steepest({"a": 11.0, "b": 9.0, "c": 5.0, "d": 5.0}) == 1
    assert method.steepest({"a": 2.4, "b": 1.8, "c": 0.8, "d": 1.1}) == 2


@pytest.mark.slow
def test_the_choice_changes_neither_bytes_nor_steps_nor_the_training_of_the_block(place):
    """A choice that happens to rotate is `order: rotating`, bit for bit, with one more pass in each turn."""
    rotating = worlds.federation("fedcybgd", place, order="rotating")
    rotating.run()
    free = worlds.federation("fedcybgd", place, order="gradient")
    free.run()
    forced = worlds.federation("fedcybgd", place, order="gradient")
    turns = iter([(client, round) for round in (1, 2) for client in range(3)])
    forced.method.steepest = lambda norms: forced.method.block(*next(turns))[0]
    passes = []

    def note(turn, names):
        with flop_counter() as counter:
            of_batch(turn, names)
        passes.append(counter.get_total_flops())

    watched(forced, note)
    for run in (free, forced):
        assert run.ledger.upload == rotating.ledger.upload
        assert run.ledger.download == rotating.ledger.download
    assert payload.encode(forced.server.tensors).sha256() == payload.encode(rotating.server.tensors).sha256()
    assert forced.flops == rotating.flops + sum(passes)
    assert [row["train_loss"] for row in forced.rounds] == [row["train_loss"] for row in rotating.rounds]


def test_gradients_are_released_one_by_one_and_all_blocks_have_their_memory(place):
    run = worlds.federation("fedcybgd", place, order="gradient", rounds=1)
    run.run()
    memory = run.instruments.memory
    assert [*memory] == ["scores", "block 0", "block 1", "block 2"]
    every = sum(math.prod(run.method.shapes[name]) * 4 for block in run.method.blocks for name in block)
    assert 0 < memory["scores"].gradient < every / 4
    assert memory["scores"].optimizer == 0


@pytest.mark.slow
def test_a_prediction_rotates(place):
    run = worlds.federation("fedcybgd", place, order="gradient")
    costs = {}
    for order in ("gradient", "rotating"):
        method = METHOD(METHOD.Config(order=order), 3, 1)
        batches = Batches(run.data, torch.device("cpu"))
        source = worlds.ModelConfig(source=str(worlds.folder("bert", str(place))))
        arguments = (source, run.data.kind, run.data.num_labels, run.parts, batches)
        costs[order] = prediction.predict(method, *arguments, run.settings, run.training)
    gradient, rotating = costs["gradient"], costs["rotating"]
    assert gradient.upload_bytes == rotating.upload_bytes
    assert gradient.download_bytes == rotating.download_bytes
    assert {label: gradient.memory[label] for label in rotating.memory} == rotating.memory
    assert gradient.flops > rotating.flops


def test_the_feed_forward_that_all_layers_share_is_trained_sent_and_merged_as_one_block(place):
    run = worlds.federation("fedcybgd", place, family="mobillama", kind="causal", clients=4, rounds=1)
    sent = sent_blocks(run)
    run.run()
    assert sent == [0, 1, 2, 3]
    shared = run.method.blocks[3]
    assert len(shared) == 3 and all(name.startswith("model.layers.0.mlp.") for name in shared)
    assert not set(shared) & {name for block in run.method.blocks[:3] for name in block}
    assert all(not torch.equal(run.server.tensors[name], run.server.initial[name]) for name in shared)
    layers = run.model.model.layers
    assert all(layer.mlp is layers[0].mlp for layer in layers)
    # It travels once in the download, and the one who trains it uploads nothing else.
    assert sum(".mlp." in name for name in run.method.exchanged) == 3
    uploads = [row[2] for row in run.rounds[0]["payloads"]]
    assert uploads[3] == payload.size({name: run.server.tensors[name] for name in shared})


def test_random_with_replacement_draws_each_turn_anew(place):
    run = worlds.federation("fedcybgd", place, clients=5, order="random_with_replacement")
    draws = [[run.method.block(client, round)[0] for round in range(1, 31)] for client in range(5)]
    assert all(set(of_client) == {0, 1, 2} for of_client in draws)
    assert len({tuple(of_client) for of_client in draws}) == 5
    passes = [of_client[first : first + 3] for of_client in draws for first in range(0, 30, 3)]
    assert any(len(set(blocks)) < 3 for blocks in passes)
    several = METHOD(METHOD.Config(order="random_with_replacement", blocks_per_turn=2), 5, 1)
    several.blocks = run.method.blocks
    assert all(len(set(several.block(client, 1))) == 2 for client in range(5))


@pytest.mark.parametrize(
    "settings",
    [
        {"blocks_per_turn": 2},
        {"switch_every": 5},
        {"block": "model"},
        {"moments": "handed_on"},
        {"compression": {"operator": "quantize"}},
    ],
)
def test_what_the_server_would_have_to_know_is_refused(settings):
    with pytest.raises(ValidationError, match="order: gradient; allowed only with"):
        METHOD.Config(order="gradient", **settings)
