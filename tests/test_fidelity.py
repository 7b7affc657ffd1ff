"""FedCyBGD's fidelity: each setting that docs/fedcybgd-fidelity.md names does what that page says.

Expectations are written by hand or come from plain PyTorch loops, not from the method's own code.
"""

import ast
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import tiny
import torch
import worlds
import yaml
from transformers import AutoModelForSequenceClassification

from fedlm.data.schemes import parse
from fedlm.exchange import payload
from fedlm.federation.scoring import score
from fedlm.federation.settings import Federation, Training
from fedlm.federation.turn import Turn, steps_of_turn
from fedlm.models import loading
from fedlm.models.blocks import find_blocks
from fedlm.models.config import ModelConfig
from fedlm.study.plugins import discover_methods

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "fedcybgd-fidelity.md"
KINDS = {"bert": "classification", "gpt2": "causal", "llama": "causal"}
LAYER = re.compile(r"\.(?:layer|layers|h)\.(\d+)\.")
OPERATORS = {
    "layer_drop": {"operator": "layer_drop", "rate": 0.5},
    "prune": {"operator": "prune", "sparsity": 0.6},
    "quantize": {"operator": "quantize"},
    "stale": {"operator": "stale", "share": 0.0},
}


@dataclass
class Step:
    """One optimizer step: what it trained on which examples, and the moments before and after it."""

    label: str
    trainable: list[str]
    examples: list[int]
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    dropped: tuple[int, ...]


@dataclass
class Seen:
    """One turn: the server's values, what arrived over the network and what the client started from, its
    steps, what it sent, and the values of its whole copy at the end."""

    client: int
    round: int
    server: dict[str, torch.Tensor]
    down: set[str] = field(default_factory=set)
    start: dict[str, torch.Tensor] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    up: dict[str, torch.Tensor] = field(default_factory=dict)
    end: dict[str, torch.Tensor] = field(default_factory=dict)
    after: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def blocks(self) -> list[int]:
        """The layers of which something was sent."""
        return sorted({int(found[1]) for found in map(LAYER.search, self.up) if found})


def values(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


class Watched:
    """A finished run without the memory probe, and its turns in the order in which they were taken."""

    def __init__(self, place, method="fedcybgd", family="bert", **settings):
        run = worlds.federation(method, place, family=family, kind=KINDS[family], **settings)
        self.run, self.turns = run, []
        self.cohorts: list[list[int]] = []
        send, receive, uploaded, merge = run.link.send, run.link.receive, run.link.uploaded, run.method.merge
        fit, step = Turn.fit, Turn._step

        def noted_send(client, round):
            self.turns.append(Seen(client, round, dict(run.server.tensors)))
            self.cohorts[-1].append(client)
            return send(client, round)

        def noted_receive(client, message):
            self.turns[-1].down = set(payload.decode(message, run.link.expected("down", client)))
            return receive(client, message)

        def noted_fit(turn, segment, *doors):
            seen = self.turns[-1]
            seen.start = seen.start or values(run.model)
            fit(turn, segment, *doors)

        def noted_step(turn, batches, optimizer, segment, *doors):
            def moments():
                return {name: value.clone() for name, value in optimizer.moments().items()}

            before = moments()
            loss = step(turn, batches, optimizer, segment, *doors)
            examples = numpy.concatenate(batches).tolist()
            made = Step(
                segment.label, segment.trainable, examples, before, moments(), run.instruments.dropped
            )
            self.turns[-1].steps.append(made)
            return loss

        def noted_upload(client, tensors):
            self.turns[-1].up = {name: value.clone() for name, value in tensors.items()}
            self.turns[-1].end = values(run.model)
            uploaded(client, tensors)

        def noted_merge(server, uploads, round):
            self.cohorts.append([])
            first = len(self.turns)
            merge(server, uploads, round)
            for seen in self.turns[first:]:
                seen.after = dict(server.tensors)

        run.link.send, run.link.receive, run.link.uploaded = noted_send, noted_receive, noted_upload
        run.method.merge = noted_merge
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Turn, "probe", lambda self, segments, train: None)
            patch.setattr(Turn, "fit", noted_fit)
            patch.setattr(Turn, "_step", noted_step)
            run.run()

    def blocks(self, round: int) -> list[int]:
        """Return the one block that each client sent in a round, in the order of the turns."""
        found = [seen.blocks for seen in self.turns if seen.round == round]
        assert all(len(blocks) == 1 for blocks in found)
        return [blocks[0] for blocks in found]


@cache
def plain_run(place) -> Watched:
    """FedCyBGD as it is without any setting: three clients, three layers, two rounds."""
    return Watched(place)


def same(names, one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in names)


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and same(one, one, other)


class Plain:
    """The tiny model and its data, trained with nothing but PyTorch."""

    def __init__(self, place):
        self.data = worlds.prepared("bert", "classification", str(place))
        source = ModelConfig(source=str(worlds.folder("bert", str(place))))
        self.model = loading.load(source, "classification", 2, 1)
        self.model.train()

    def turn(self, rows, round: int, client: int, layers: list, every: int | None = None, epochs: int = 1):
        """Train one of `layers` (None: everything) and the head, the next one after `every` steps."""
        plan = steps_of_turn(rows, Training(batch_size=8, local_epochs=epochs), 1, round, client)
        for number, step in enumerate(plan):
            if number % (every or len(plan)) == 0:
                layer = layers[number // (every or len(plan)) % len(layers)]
                chosen = [
                    value
                    for name, value in self.model.named_parameters()
                    if layer is None or f".layer.{layer}." in name or name.startswith("classifier.")
                ]
                optimizer = torch.optim.AdamW(chosen, lr=1e-2, weight_decay=0.0, fused=True)
            batch = self.data.batch(step[0])
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            torch.nn.functional.cross_entropy(logits, batch["labels"]).backward()
            optimizer.step()
            self.model.zero_grad()

    def values(self, names) -> dict[str, torch.Tensor]:
        return {name: value for name, value in values(self.model).items() if name in names}


# --- the algorithm


@pytest.mark.slow
def test_the_algorithm_is_this_loop_in_plain_pytorch(place):
    run = plain_run(place).run
    plain = Plain(place)
    for round in (1, 2):
        for client, rows in enumerate(run.parts):
            plain.turn(rows, round, client, [client])
    assert equal(run.server.tensors, plain.values(run.server.tensors))


def test_clients_take_turns_one_after_another_and_the_server_overwrites(place):
    seen = plain_run(place)
    assert seen.cohorts == [[0], [1], [2]] * 2
    first, *rest = seen.turns
    assert equal(first.server, seen.run.server.initial)
    for before, turn in zip(seen.turns, rest, strict=False):
        assert equal(turn.server, before.after)
    for turn in seen.turns:
        assert equal(turn.after, {**turn.server, **turn.up})
        assert not same(turn.up, turn.server, turn.up)


# --- who trains which block


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("ascending", [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]),
        ("descending", [[2, 1, 0, 2, 1], [2, 1, 0, 2, 1], [2, 1, 0, 2, 1]]),
        ("shifted", [[0, 1, 2, 0, 1], [2, 0, 1, 2, 0], [1, 2, 0, 1, 2]]),
        ("rotating", [[0, 1, 2, 0, 1], [1, 2, 0, 1, 2], [2, 0, 1, 2, 0]]),
    ],
)
def test_the_block_that_travels_in_each_order(order, expected, place):
    seen = Watched(place, clients=5, rounds=3, order=order, training={"local_steps": 1})
    assert [seen.blocks(round) for round in (1, 2, 3)] == expected


@pytest.mark.slow
def test_random_order_deals_each_client_every_block_once_before_any_twice(place):
    seen = Watched(place, clients=5, rounds=6, order="random", training={"local_steps": 1})
    rounds = [seen.blocks(round) for round in range(1, 7)]
    passes = [tuple(row[client] for row in rounds[i : i + 3]) for i in (0, 3) for client in range(5)]
    assert all(sorted(blocks) == [0, 1, 2] for blocks in passes)
    assert len(set(passes)) > 2


@cache
def of_twelve_layers(clients: int, **config):
    """Return FedCyBGD prepared with a model of twelve layers, as RoBERTa-base has."""
    method = discover_methods()["fedcybgd"]
    shape = tiny.config("roberta", layers=12)
    prepared = method(method.Config(**config), clients, 1)
    prepared.prepare(AutoModelForSequenceClassification.from_config(shape), "classification")
    return prepared


def layers_of(method, client: int, round: int) -> list[int]:
    names = method.trainable(client, round)
    assert any(name.startswith("classifier.") for name in names)
    return sorted({int(found[1]) for found in map(LAYER.search, names) if found})


def test_the_papers_24_clients_meet_12_blocks_twice_a_round():
    method = of_twelve_layers(24)
    for round in (1, 2, 3):
        assert [layers_of(method, client, round) for client in range(24)] == [[b] for b in range(12)] * 2


def test_shifted_stands_still_where_the_clients_are_a_multiple_of_the_blocks():
    shifted, rotating = of_twelve_layers(24, order="shifted"), of_twelve_layers(24, order="rotating")
    assert [layers_of(shifted, 3, round) for round in (1, 2, 3)] == [[3], [3], [3]]
    assert [layers_of(rotating, 3, round) for round in (1, 2, 3)] == [[3], [4], [5]]
    moving = of_twelve_layers(25, order="shifted")
    assert {layers_of(moving, 3, round)[0] for round in range(1, 13)} == set(range(12))


def test_four_random_blocks_of_twelve_in_a_turn():
    method = of_twelve_layers(24, blocks_per_turn=4, order="random")
    draws = set()
    for client in range(24):
        for first in (1, 4):
            rounds = [layers_of(method, client, first + offset) for offset in range(3)]
            assert [len(layers) for layers in rounds] == [4, 4, 4]
            assert sorted(sum(rounds, [])) == list(range(12))
            draws.add(tuple(rounds[0]))
    assert len(draws) > 12


# --- head, embeddings, final norm


@pytest.mark.slow
@pytest.mark.parametrize("family", KINDS)
def test_every_client_trains_its_block_and_the_head_and_nothing_else(family, place):
    run = plain_run(place) if family == "bert" else Watched(place, family=family, rounds=1)
    head = {"classifier.weight", "classifier.bias"} if family == "bert" else set()
    shapes = dict(run.run.model.named_parameters())
    for turn in run.turns:
        layer = {name for name in shapes if (found := LAYER.search(name)) and int(found[1]) == turn.client}
        assert len(layer) > 8 and turn.up.keys() == layer | head
        assert all(set(step.trainable) == layer | head for step in turn.steps)
        assert same(shapes.keys() - layer - head, turn.start, turn.end)
        assert not torch.equal(
            *(at[next(n for n in layer if "weight" in n)] for at in (turn.start, turn.end))
        )
        assert all(not torch.equal(turn.start[name], turn.end[name]) for name in head)


@pytest.mark.parametrize(
    ("family", "still"),
    [
        ("bert", ["word_embeddings", "position_embeddings", "embeddings.LayerNorm", "pooler.dense"]),
        ("gpt2", ["wte", "wpe", "ln_f"]),
        ("llama", ["embed_tokens", "model.norm", "lm_head"]),
    ],
)
def test_embeddings_and_final_norm_never_change_and_never_travel(family, still, place):
    seen = plain_run(place) if family == "bert" else Watched(place, family=family, rounds=1)
    fresh = worlds.federation("fedcybgd", place, family=family, kind=KINDS[family])
    names = [name for name in fresh.parameters if any(part in name for part in still)]
    assert len(names) >= len(still)
    assert same(names, fresh.parameters, seen.run.parameters)
    for turn in seen.turns:
        assert not turn.down.intersection(names) and not turn.up.keys() & set(names)


# --- Adam


def step_counts(step: Step) -> set[float]:
    return {float(value) for name, value in step.after.items() if name.endswith("@step")}


def test_every_turn_starts_with_zero_moments(place):
    for turn in plain_run(place).turns:
        assert not any(value.any() for value in turn.steps[0].before.values())
        assert all(value.any() for name, value in turn.steps[0].after.items() if "classifier" in name)


def test_adam_steps_once_a_batch_and_goes_on_within_a_turn(place):
    seen = plain_run(place)
    for turn in seen.turns:
        rows = len(seen.run.parts[turn.client])
        assert len(turn.steps) == -(-rows // 8) > 2
        assert [step_counts(step) for step in turn.steps] == [{i + 1.0} for i in range(len(turn.steps))]
        for before, after in zip(turn.steps, turn.steps[1:], strict=False):
            assert equal(before.after, after.before)


@pytest.mark.slow
def test_moments_that_a_client_keeps_are_its_own_of_the_last_round(place):
    seen = Watched(place, moments="client")
    first, second = seen.turns[:3], seen.turns[3:]
    for turn in first:
        assert not turn.steps[0].before
    for before, after in zip(first, second, strict=True):
        assert equal(after.steps[0].before, before.steps[-1].after) and after.steps[0].before
    assert all("@" not in name for turn in seen.turns for name in (*turn.up, *turn.down))


@pytest.mark.slow
def test_moments_handed_on_are_those_of_whoever_trained_last(place):
    seen = Watched(place, clients=4, moments="handed_on")  # client 3 trains block 0 again
    latest: dict[str, torch.Tensor] = {}
    for turn in seen.turns:
        before = {name: value for name, value in turn.steps[0].before.items() if not name.endswith("@step")}
        names = {n for n in latest if n.partition("@")[0] in turn.up and not n.endswith("@step")}
        assert before.keys() == names and same(names, before, latest)
        latest |= turn.steps[-1].after
    assert seen.turns[3].steps[0].before.keys() == seen.turns[0].steps[-1].after.keys()
    # They cross the network: two moments and a counter for each tensor.
    for turn in seen.turns:
        assert len(turn.up) == 4 * len([name for name in turn.up if "@" not in name])


# --- the download


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_own_block_and_the_head_arrive_exactly_and_the_others_reduced(operator, place):
    seen = Watched(place, rounds=2, order="rotating", compression=OPERATORS[operator])
    reduced = 0
    for turn in seen.turns:
        own = turn.up.keys()
        assert any("classifier" in name for name in own)
        assert same(own, turn.start, turn.server)
        others = turn.server.keys() - own
        if operator == "layer_drop":
            (dropped,) = {step.dropped for step in turn.steps}
            assert len(dropped) == 1 and dropped[0] not in turn.blocks
            assert not any(f".layer.{dropped[0]}." in name for name in turn.down)
            reduced += 1
        else:
            reduced += not same(others, turn.start, turn.server)
        # What was reduced on the way never comes back to the server.
        assert equal(turn.after, {**turn.server, **turn.up})
    assert reduced >= len(seen.turns) - 1  # before the first turn nothing is stale


@pytest.mark.slow
def test_stale_blocks_have_their_pretrained_values_but_never_the_own_one(place):
    seen = Watched(place, rounds=3, compression=OPERATORS["stale"])
    initial = seen.run.server.initial
    for turn in seen.turns:
        others = [name for name in turn.server if LAYER.search(name) and name not in turn.up]
        assert same(others, turn.start, initial)
    # In rounds 2 and 3 the own block has been updated, and a stale one would undo that.
    for turn in seen.turns[3:]:
        layer = [name for name in turn.up if LAYER.search(name) and name.endswith("dense.weight")]
        assert layer and not any(torch.equal(turn.start[name], initial[name]) for name in layer)


@pytest.mark.slow
def test_all_updated_blocks_are_sent_where_the_share_is_one(place):
    seen = Watched(place, compression={"operator": "stale", "share": 1.0})
    assert equal(seen.run.server.tensors, plain_run(place).run.server.tensors)


@pytest.mark.slow
def test_caches_change_bytes_and_no_result(place):
    none, pretrained, last_visit = (Watched(place, cache=c) for c in ("none", "pretrained", "last_visit"))
    for seen in (none, pretrained, last_visit):
        assert equal(seen.run.server.tensors, plain_run(place).run.server.tensors)
    exchanged = set(none.run.method.exchanged)
    assert all(turn.down == exchanged for turn in none.turns)
    blocks = [
        [{int(m[1]) for m in map(LAYER.search, t.down) if m} for t in s.turns]
        for s in (pretrained, last_visit)
    ]
    assert blocks[0] == [set(), {0}, {0, 1}, {0, 1, 2}, {0, 1, 2}, {0, 1, 2}]
    assert blocks[1] == [set(), {0}, {0, 1}, {1, 2}, {0, 2}, {0, 1}]


# --- the data


def test_each_client_trains_on_its_own_examples_alone(place):
    seen = plain_run(place)
    rows = numpy.concatenate(seen.run.parts).tolist()
    assert sorted(rows) == sorted(seen.run.split.train) and len(set(rows)) == len(rows)
    sizes = [len(part) for part in seen.run.parts]
    assert max(sizes) - min(sizes) <= 1
    for turn in seen.turns:
        used = sum((step.examples for step in turn.steps), [])
        assert sorted(used) == sorted(seen.run.parts[turn.client])


@pytest.mark.slow
@pytest.mark.parametrize("order", ["rotating", "shifted"])  # which only differ between several clients
def test_undivided_data_block_after_block(order, place):
    seen = Watched(place, rounds=6, pooled=True, order=order)
    assert [turn.blocks for turn in seen.turns] == [[0], [1], [2], [0], [1], [2]]
    for turn in seen.turns:
        assert sorted(sum((step.examples for step in turn.steps), [])) == sorted(seen.run.split.train)


# --- relatives


@pytest.mark.slow
def test_fedbavg_is_the_mean_of_a_blocks_clients(place):
    scheme = {"scheme": "quantity", "alpha": 1, "min_examples": 4}
    seen = Watched(place, clients=6, rounds=1, clients_per_block=2, scheme=scheme)
    parts = seen.run.parts
    plain = Plain(place)
    for block in range(3):
        start = {name: value.clone() for name, value in plain.model.state_dict().items()}
        ends = []
        for client in (2 * block, 2 * block + 1):
            plain.model.load_state_dict(start)
            plain.turn(parts[client], 1, client, [block])
            ends.append((len(parts[client]), {n: v.clone() for n, v in plain.model.state_dict().items()}))
        (one, first), (other, second) = ends
        assert one != other
        mean = {n: (one * first[n].double() + other * second[n].double()) / (one + other) for n in first}
        mean = {n: v.to(first[n].dtype) for n, v in mean.items()}
        plain.model.load_state_dict(mean)
    assert seen.cohorts == [[0, 1], [2, 3], [4, 5]]
    found, wanted = seen.run.server.tensors, plain.values(seen.run.server.tensors)
    assert found.keys() == wanted.keys()
    # Adam's first steps turn a difference of rounding into one of the learning rate where gradients vanish.
    for name in found:
        if "key.bias" not in name:
            assert torch.allclose(found[name], wanted[name], atol=1e-4), name


@pytest.mark.slow
def test_fed_full_is_one_client_after_another_on_all_parameters(place):
    seen = Watched(place, block="model")
    plain = Plain(place)
    for round in (1, 2):
        for client, rows in enumerate(seen.run.parts):
            plain.turn(rows, round, client, [None])
    assert seen.cohorts == [[0], [1], [2]] * 2
    assert seen.run.server.tensors.keys() == dict(plain.model.named_parameters()).keys()
    assert equal(seen.run.server.tensors, plain.values(seen.run.server.tensors))


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 3])
def test_badam_walks_over_the_blocks_every_k_steps(every, place):
    seen = Watched(
        place, rounds=1, pooled=True, switch_every=every, training={"local_epochs": 2, "batch_size": 8}
    )
    (turn,) = seen.turns
    labels = [step.label for step in turn.steps]
    assert labels == [f"block {number // every % 3}" for number in range(len(labels))] and len(labels) > 9
    for number, step in enumerate(turn.steps):
        assert (not any(v.any() for v in step.before.values())) == (number % every == 0)
    plain = Plain(place)
    plain.turn(seen.run.parts[0], 1, 0, [0, 1, 2], every=every, epochs=2)
    assert equal(seen.run.server.tensors, plain.values(seen.run.server.tensors))


@pytest.mark.slow
def test_the_walk_starts_at_the_orders_block_in_each_round(place):
    starts = {}
    for order in ("ascending", "rotating"):
        seen = Watched(place, rounds=2, pooled=True, switch_every=2, order=order)
        starts[order] = [turn.steps[0].label for turn in seen.turns]
    assert starts == {"ascending": ["block 0", "block 0"], "rotating": ["block 0", "block 1"]}


# --- what the authors' code trains, scores and counts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"), [("fedavg", {}), ("fedcybgd", {"block": "model"}), ("fedcybgd", {})], ids=str
)
def test_attention_and_feed_forward_of_gpt2_are_trained(method, settings, place):
    seen = Watched(place, method, family="gpt2", rounds=1, **settings)
    server, initial = seen.run.server.tensors, seen.run.server.initial
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    names = [name for name in server if name.endswith(".weight") and any(part in name for part in parts)]
    assert len(names) == 3 * len(parts)
    assert not any(torch.equal(server[name], initial[name]) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted({"fedlora", "fedadapter", "fedprompt"} & discover_methods().keys()))
def test_adapter_weights_are_in_the_optimizer_and_change(method, place):
    added = {"fedlora": "lora_", "fedadapter": ".adapter.", "fedprompt": "prompt"}[method]
    seen = Watched(place, method, rounds=1, **({"tokens": 4} if method == "fedprompt" else {}))
    names = {name for name in seen.run.parameters if added in name}
    assert names
    for turn in seen.turns:
        assert all(names <= set(step.trainable) for step in turn.steps)
        stepped = {name.partition("@")[0] for name in turn.steps[-1].after}
        assert names <= stepped and names <= turn.up.keys()
    server, initial = seen.run.server.tensors, seen.run.server.initial
    assert not any(torch.equal(server[name], initial[name]) for name in names)


@pytest.mark.slow
def test_the_servers_model_is_scored_and_not_the_last_clients(place):
    seen = Watched(place, compression={"operator": "prune", "sparsity": 0.9})
    run, last = seen.run, seen.turns[-1].end
    run.load(run.server.tensors)
    assert score(run.model, run.data, run.split.test, 64) == run.test
    run.load({name: last[name] for name in run.server.tensors})
    assert score(run.model, run.data, run.split.test, 64)["loss"] != run.test["loss"]


def test_memory_is_that_of_a_training_step_and_depends_on_the_block(place):
    run = worlds.federation("fedcybgd", place, rounds=1, scheme={"scheme": "iid"})
    run.run()
    found = run.instruments.memory
    assert list(found) == ["block 0", "block 1", "block 2"]
    trained = sum(run.parameters[name].numel() for name in run.method.trainable(0, 1))
    model = sum(value.numel() for value in run.model.parameters())
    for memory in found.values():
        assert memory.parameter >= 4 * model
        assert memory.optimizer >= 2 * 4 * trained
        assert memory.activation > 0
        assert memory.peak == memory.parameter + memory.gradient + memory.optimizer + memory.activation
    # Backward ends at the trained block, so an early block holds more.
    peaks = [memory.peak for memory in found.values()]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > peaks[2]


def test_bytes_are_the_lengths_of_what_was_encoded(place):
    seen = plain_run(place)
    rows = [(row[0], row[1], row[2]) for turn in seen.run.rounds for row in turn["payloads"]]
    for turn, (client, down, up) in zip(seen.turns, rows, strict=True):
        assert client == turn.client
        assert up == len(safetensors.torch.save(turn.up))
        assert down == len(safetensors.torch.save({name: turn.server[name] for name in turn.down}))


@pytest.mark.slow
def test_flops_are_counted_and_fall_with_the_distance_from_the_input(place):
    everything = {"batch_size": 256}
    blocks = Watched(place, rounds=3, pooled=True, order="rotating", training=everything).run
    whole = Watched(place, rounds=1, pooled=True, block="model", training=everything).run
    by_block = [row["flops"] for row in blocks.rounds]
    assert whole.flops >= by_block[0] > by_block[1] > by_block[2] > 0
    assert sum(by_block) == blocks.flops


def test_an_upload_is_one_sixteenth_of_roberta_base():
    model = loading.build_on_meta(ModelConfig(source="roberta_base"), "classification", 2)
    anatomy = find_blocks(model)
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    sent = sum(sizes[name] for name in (*anatomy.blocks[5].parameters, *anatomy.head))
    assert sum(sizes.values()) == 124_647_170 and sent == 7_087_872 + 592_130
    assert sent / sum(sizes.values()) == pytest.approx(0.062, abs=5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["bfloat16", "float16"])
def test_half_precision_weights_are_trained_in_float32_copies(weights, place):
    seen = Watched(
        place,
        rounds=2,
        model={"weights": weights},
        training={"learning_rate": 1e-6, "loss_scale": 64.0},
    )
    half = getattr(torch, weights)
    assert {value.dtype for value in seen.run.model.parameters()} == {half}
    name = "bert.encoder.layer.0.output.dense.weight"
    first, second = (turn.up[name] for turn in seen.turns if turn.blocks == [0])
    assert first.dtype == torch.float32
    # Far below half precision, and still round 2 goes on from where round 1 ended.
    initial = seen.run.server.initial[name]
    assert 0 < (first - initial).abs().max() < 1e-4 and torch.equal(first.to(half), initial.to(half))
    assert (second - first).abs().max() < 1e-4 and not torch.equal(second, first)
    assert (second - initial).abs().mean() > (first - initial).abs().mean()


# --- the page


def names_of_tests(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_the_tests_that_the_page_names_exist_and_it_names_all_of_these():
    page = PAGE.read_text(encoding="utf-8")
    here = names_of_tests(Path(__file__))
    elsewhere = {
        f"{path.stem}.{name}"
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        for name in names_of_tests(path)
    }
    named = set(re.findall(r"`((?:test_\w+\.)?test_\w+)`", page))
    assert {name for name in named if "." in name} <= elsewhere
    assert {name for name in named if "." not in name} == here - {
        "test_the_tests_that_the_page_names_exist_and_it_names_all_of_these",
        "test_the_settings_that_the_page_names_exist",
    }


def test_the_settings_that_the_page_names_exist():
    kinds = (discover_methods()["fedcybgd"].Config, Training, Federation, ModelConfig)
    written = re.findall(r"`([a-z_]+: [^`]+)`", PAGE.read_text(encoding="utf-8"))
    assert len(written) > 15
    for text in written:
        given = yaml.safe_load(f"{{{text}}}")
        if "scheme" in given:
            assert parse(given)
            continue
        known = set()
        for kind in kinds:
            found = {key: value for key, value in given.items() if key in kind.model_fields}
            if found:
                assert kind.model_validate({"source": "minilm", **found} if kind is ModelConfig else found)
            known |= found.keys()
        assert known == given.keys(), text
