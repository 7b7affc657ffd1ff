"""R-SFLLM and SplitFed: messages within a turn, noise of a stated strength, and who averages what."""

import pytest
import torch
import worlds
from test_costs import agree, padded, predicted  # noqa: F401

from fedlm.base.errors import UserError
from fedlm.base.randomness import torch_stream
from fedlm.exchange import payload
from fedlm.federation.facts import Facts
from fedlm.federation.turn import steps_of_turn
from fedlm.study.plugins import discover_methods
from methods.rsfllm import disturbed

pytestmark = pytest.mark.usefixtures("one_thread")
HIDDEN = 16
SGD = {"optimizer": "sgd", "learning_rate": 0.1, "local_steps": 2}


def ran(place, method="rsfllm", **options):
    options = {"rounds": 1, "training": SGD, **options}
    run = worlds.federation(method, place, **options)
    run.run()
    return run


def final(run) -> str:
    return payload.encode(run.server.tensors).sha256()


def turns(run) -> list[tuple[int, dict, dict]]:
    """Run; return of each turn the client, and the parameters' values at its start and at its end."""
    train, found = run.method.train, []

    def values(turn):
        return {name: value.clone() for name, value in turn.values(run.method.exchanged).items()}

    def noted(turn):
        before = values(turn)
        train(turn)
        if type(turn).__name__ == "Turn":  # and not a probe
            found.append((turn.client, before, values(turn)))

    run.method.train = noted
    run.run()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["v1", "v2"])
@pytest.mark.parametrize(("family", "blocks"), [("bert", 0), ("gpt2", 1)])
def test_one_client_without_noise_is_unsplit_training_bit_for_bit(variant, family, blocks, place):
    one = {"clients": 1, "rounds": 2, "family": family, "scheme": {"scheme": "pooled"}}
    split = ran(place, variant=variant, blocks=blocks, snr=None, noisy_gradients=True, **one)
    whole = ran(place, "fedavg", **one)
    assert final(split) == final(whole)
    assert [row["train_loss"] for row in split.rounds] == [row["train_loss"] for row in whole.rounds]
    assert split.test == whole.test and split.flops == whole.flops


@pytest.mark.parametrize(
    "options",
    [
        {"training": {**SGD, "local_steps": 1}},
        pytest.param({"rounds": 2, "training": {}, "blocks": 1}, marks=pytest.mark.slow),
        pytest.param({"federation": {"dropout_rate": 0.5}, "rounds": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_v1_without_noise_is_fedavg_and_v2_is_not(options, place):
    split = ran(place, snr=None, weights="examples", **options)
    options.pop("blocks", None)
    assert final(split) == final(ran(place, "fedavg", **options))
    assert final(ran(place, variant="v2", snr=None, weights="examples", **options)) != final(split)


def test_v1_averages_every_parameter(place):
    """Also those that the released code leaves out: all but the classifier."""
    run = worlds.federation("rsfllm", place, rounds=1, blocks=1, training=SGD)
    ends = [end for _, _, end in turns(run)]
    for name, value in run.server.tensors.items():
        mean = sum(end[name] for end in ends) / 3
        torch.testing.assert_close(value, mean, atol=1e-7, rtol=1e-6)
        if "key.bias" not in name:  # whose gradient is nothing but rounding
            assert not torch.equal(ends[0][name], ends[1][name]), name


@pytest.mark.slow
def test_v2_hands_the_servers_part_on_and_averages_the_clients_parts(place):
    run = worlds.federation("rsfllm", place, rounds=8, clients=3, variant="v2", blocks=1, training=SGD)
    found, method = turns(run), run.method
    orders = {tuple(client for client, _, _ in found[at : at + 3]) for at in range(0, 24, 3)}
    assert len(orders) > 2 and all(sorted(order) == [0, 1, 2] for order in orders)
    for (_, _, ended), (_, begun, _) in zip(found, found[1:], strict=False):
        assert all(torch.equal(begun[name], ended[name]) for name in method.at_server)
    for name in method.at_server:
        assert torch.equal(run.server.tensors[name], found[-1][2][name])
    begun, ends = found[-3][1], [end for _, _, end in found[-3:]]
    for name in method.at_client:
        assert all(torch.equal(start[name], begun[name]) for _, start, _ in found[-3:])
        mean = sum(end[name] for end in ends) / 3
        torch.testing.assert_close(run.server.tensors[name], mean, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(("family", "kind"), [("bert", "classification"), ("gpt2", "causal")])
def test_the_parts_are_disjoint_and_a_tied_output_is_untied(family, kind, place):
    for blocks in (0, 2):
        run = worlds.federation("rsfllm", place, family=family, kind=kind, blocks=blocks)
        client, server = run.method.at_client, run.method.at_server
        assert sorted(client + server) == sorted(run.method.exchanged)
        assert client[: len(run.method.anatomy.embeddings)] == list(run.method.anatomy.embeddings)
        for number, layer in enumerate(run.method.anatomy.layers):
            there = client if number < blocks else server
            assert any(name.startswith(f"{layer}.") for name in there)
            assert not any(name.startswith(f"{layer}.") for name in {*client, *server} - {*there})
        if kind == "causal":
            assert "lm_head.weight" in server and "transformer.wte.weight" in client
            first = run.server.initial
            assert torch.equal(first["lm_head.weight"], first["transformer.wte.weight"])


@pytest.mark.parametrize(
    ("options", "width", "label"),
    [
        ({}, 4, "labels"),
        ({"payload": "bfloat16", "variant": "v2", "blocks": 1, "noisy_gradients": True}, 2, "labels"),
        ({"kind": "question_answering"}, 4, "start_positions"),
        ({"training": {**SGD, "accumulation": 2, "batch_size": 4}}, 4, "labels"),
        ({"model": {"gradient_checkpointing": True}, "blocks": 1}, 4, "labels"),
    ],
    ids=str,
)
def test_the_bytes_are_those_of_every_step_and_of_the_clients_part(options, width, label, place):
    run = ran(place, **options)
    float_type = {4: torch.float32, 2: torch.bfloat16}[width]
    part = {name: run.server.tensors[name] for name in run.method.at_client}
    down = up = 3 * payload.size(part, run.method.config.payload)
    for client, part in enumerate(run.parts):
        for step in steps_of_turn(part, run.training, run.seed, 1, client):
            for indices in step:
                batch = run.make_batch(indices)
                rows, length = batch["input_ids"].shape
                labels = 2 if label == "start_positions" else 1
                numbers = rows * length * HIDDEN
                size = width * numbers + rows * length + 8 * rows * labels
                entries = [("activation", float_type, (rows, length, HIDDEN))]
                entries += [("attention_mask", torch.bool, (rows, length))]
                names = ("start_positions", "end_positions") if labels == 2 else ("labels",)
                entries += [(name, torch.int64, (rows,)) for name in names]
                assert size < payload.size_of(entries) < size + 400  # the header
                up += payload.size_of(entries)
                down += payload.size_of([("gradient", float_type, (rows, length, HIDDEN))])
    assert (run.ledger.download, run.ledger.upload) == (down, up)
    assert run.ledger.downloads == run.ledger.uploads == 3
    assert run.rounds[0]["download_bytes"] == down and run.rounds[0]["upload_bytes"] == up


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {
            "training": {**SGD, "accumulation": 2, "batch_size": 4, "autocast": "bfloat16"},
            "payload": "bfloat16",
            "noisy_gradients": True,
            "upload_compression": {"operator": "sparse", "density": 0.2},
        },
        {
            "model": {"gradient_checkpointing": True},
            "federation": {"dropout_rate": 0.4},
            "variant": "v2",
            "blocks": 1,
            "cache": "last_visit",
            "rounds": 2,
        },
    ],
    ids=str,
)
def test_messages_within_a_turn_are_predicted(options, place, padded):  # noqa: F811
    run = ran(place, **options)
    agree(run, predicted(run, place, options.get("model")))


@pytest.mark.slow
def test_recomputed_passes_meet_the_same_noise(place):
    plain = ran(place, blocks=1)
    again = ran(place, blocks=1, model={"gradient_checkpointing": True})
    assert final(again) == final(plain) and again.ledger.upload == plain.ledger.upload
    assert final(plain) != final(ran(place, blocks=1, snr=None))


@pytest.mark.parametrize("snr", [20.0, 0.0, -10.0])
def test_noise_has_the_stated_variance_and_no_mean(snr):
    sent = 3 * torch.randn(64, 50, 40, generator=torch_stream(1, "values"))
    noise = disturbed(sent, snr, torch_stream(1, "noise")) - sent
    variance = float(sent.square().mean()) / 10 ** (snr / 10)
    # Of 128,000 draws the variance has a standard error of 0.4%.
    assert float(noise.square().mean()) == pytest.approx(variance, rel=0.02)
    assert abs(float(noise.mean())) < 4 * (variance / noise.numel()) ** 0.5
    assert disturbed(sent, None, torch_stream(1, "noise")) is sent


def crossings(run) -> dict[tuple, tuple[torch.Tensor, torch.Tensor]]:
    """Run; return by direction, round, client and pass what was sent in a turn, and what arrived."""
    train, found = run.method.train, {}

    def noted(turn):
        exchange = turn.exchange

        def watched(module, channel):
            def watching(way, sent, number):
                arrived = channel(way, sent, number)
                found[way, turn.round, turn.client, number] = sent.clone(), arrived.clone()
                return arrived

            return exchange(module, watching)

        if type(turn).__name__ == "Turn":
            turn.exchange = watched
        train(turn)

    run.method.train = noted
    run.run()
    return found


@pytest.mark.slow
def test_each_batch_has_noise_of_its_own_and_gradients_only_where_they_are_to(place):
    settings = {"rounds": 2, "training": SGD, "snr": 5.0}
    found = crossings(worlds.federation("rsfllm", place, **settings))
    noises = []
    for (way, *_), (sent, arrived) in found.items():
        if way == "down":
            assert sent.any() and torch.equal(sent, arrived)  # the noise is constant in the backward pass
        else:
            noise = (arrived - sent).flatten()
            noises.append(noise / noise.norm())
            ratio = sent.square().mean() / noise.square().mean()
            assert float(10 * ratio.log10()) == pytest.approx(5, abs=0.5)
    assert len(noises) == 2 * 3 * 2
    for place_of_one, one in enumerate(noises):
        for other in noises[:place_of_one]:
            length = min(len(one), len(other))
            assert abs(float(one[:length] @ other[:length])) < 0.2
    both = crossings(worlds.federation("rsfllm", place, noisy_gradients=True, **settings))
    for (way, *_), (sent, arrived) in both.items():
        ratio = sent.square().mean() / (arrived - sent).square().mean()
        assert float(10 * ratio.log10()) == pytest.approx(5, abs=0.5), way


@pytest.mark.slow
def test_scores_are_clean_unless_noise_is_there_too(place):
    clean = ran(place, snr=None)
    trained = ran(place, snr=-20.0, noise_at="training")
    assert trained.baseline == clean.baseline and trained.test != clean.test
    scored = ran(place, snr=-20.0, noise_at="evaluation")
    assert final(scored) == final(clean) and scored.baseline != clean.baseline
    both = ran(place, snr=-20.0, noise_at="both")
    assert both.baseline == scored.baseline and final(both) == final(trained)


@pytest.mark.slow
def test_the_curve_over_the_ratio_goes_from_the_clean_score_to_chance(place):
    run = ran(place, noise_at="evaluation", clients=2, rounds=6, training={})
    scores = {}
    for snr in (None, 60.0, 10.0, 0.0, -20.0):
        run.method.config = run.method.config.model_copy(update={"snr": snr})
        scores[snr] = run.scorer.score(run.split.test)
    assert scores[10.0] == run.test and scores[None]["accuracy"] > 0.9 > 0.7 > scores[-20.0]["accuracy"]
    assert scores[60.0]["loss"] == pytest.approx(scores[None]["loss"], rel=0.01)
    losses = [score["loss"] for score in scores.values()]
    assert losses[1:] == sorted(losses[1:])


def test_the_record_says_how_much_of_the_model_is_at_the_client(place):
    run = worlds.federation("rsfllm", place, blocks=1)
    expected = sum(run.server.tensors[name].numel() for name in run.method.at_client)
    assert run.method.extra(run.server) == {"client_parameters": expected}
    assert 0 < expected < sum(value.numel() for value in run.server.tensors.values())


def build(**settings):
    kind = discover_methods()["rsfllm"]
    return kind(kind.Config(**settings), 2, 1)


def test_splits_that_cannot_be_are_refused(place):
    facts = Facts("bert", "classification", 3, HIDDEN, 128, False, 3)
    build(blocks=2).check(facts)
    with pytest.raises(UserError, match="blocks: 3; allowed: at most 2, since the server needs one"):
        build(blocks=3).check(facts)
    with pytest.raises(UserError, match="blocks: 1; allowed for deberta-v2: 0"):
        build(blocks=1).check(Facts("deberta-v2", "classification", 3, HIDDEN, 128, False, 3))
    with pytest.raises(UserError, match="blocks: 1; allowed: 0, since blocks of this model share"):
        worlds.federation("rsfllm", place, family="mobillama", kind="causal", blocks=1)
    assert build().averages() and not build(variant="v2").averages()
