"""FedLoRA's variants: of each the property that defines it, on tiny models.

What a client's adapted weight really is, peft says (`get_delta_weight`), not the method.
"""

from functools import cache
from typing import NamedTuple

import numpy
import pytest
import torch
import worlds
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlm.federation.method import Server, Upload, weighted_mean
from fedlm.federation.turn import Turn

VARIANTS = ("average", "ffa", "fedsa", "rolora", "flexlora", "fedex")
UNEQUAL = {"scheme": "quantity", "alpha": 1, "min_examples": 4}
FAMILIES = {"bert": "classification", "gpt2": "causal"}  # GPT-2 stores its matrices transposed


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Leave out the memory probe, which takes most of a tiny turn and changes nothing that is sent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Turn, "probe", lambda self, segments, train: None)
        yield


class Exchange(NamedTuple):
    """One turn: what was decoded at both ends, and the weights that the client had at its end."""

    client: int
    examples: int
    down: set[str]
    up: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


class Watched:
    """A finished run of FedLoRA, and what was seen of it, by round from 1."""

    def __init__(self, variant: str, place, family: str = "bert", **settings):
        run = worlds.federation(
            "fedlora",
            place,
            family=family,
            kind=FAMILIES[family],
            scheme=UNEQUAL,
            variant=variant,
            rank=2,
            alpha=6,
            **settings,
        )
        self.run, self.rounds, self.before, self.after = run, [], [], []
        receive, uploaded, merge = run.link.receive, run.link.uploaded, run.method.merge

        def noted_receive(client, message):
            decoded = set(self.decoded(message))
            self.down = decoded
            return receive(client, message)

        def noted_upload(client, tensors):
            up = {name: value.clone() for name, value in tensors.items()}
            weights = adapted_weights(run)
            self.rounds[-1].append(Exchange(client, len(run.parts[client]), self.down, up, weights))
            uploaded(client, tensors)

        def noted_merge(server, uploads, round):
            self.rounds.append([])
            self.before.append(dict(server.tensors))
            merge(server, uploads, round)
            self.after.append(dict(server.tensors))

        run.link.receive, run.link.uploaded, run.method.merge = noted_receive, noted_upload, noted_merge
        self.load = run.load
        run.run()

    def decoded(self, message: bytes):
        from fedlm.exchange import payload

        return payload.decode(message, self.run.link.expected("down", 0))

    def server_weights(self, round: int) -> dict[str, torch.Tensor]:
        """Return the adapted weights of the server's model after a round."""
        self.load(self.after[round - 1])
        return adapted_weights(self.run)

    def mean_weights(self, round: int) -> dict[str, torch.Tensor]:
        """Return the mean of the clients' adapted weights at the end of their turns, weighted by examples."""
        turns = self.rounds[round - 1]
        total = sum(turn.examples for turn in turns)
        return {
            module: sum(turn.weights[module].double() * (turn.examples / total) for turn in turns)
            for module in turns[0].weights
        }


def adapted_weights(run) -> dict[str, torch.Tensor]:
    """Return the weights with which the resident model's adapted layers work, as they are stored."""
    return {
        name: (module.base_layer.weight + module.get_delta_weight("default")).detach().clone()
        for name, module in run.model.named_modules()
        if hasattr(module, "lora_A")
    }


@cache
def watched(variant: str, place, family: str = "bert") -> Watched:
    return Watched(variant, place, family)


def a(names) -> set[str]:
    return {name for name in names if "lora_A" in name}


def b(names) -> set[str]:
    return {name for name in names if "lora_B" in name}


def head(names) -> set[str]:
    return {name for name in names if "classifier" in name}


def same(names, one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in names)


def furthest(one: dict, other: dict) -> float:
    """Return the largest distance of two tables of tensors."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def product(tensors: dict, module: str) -> torch.Tensor:
    names = [f"{module}lora_{letter}.default.weight" for letter in "BA"]
    return tensors[names[0]].double() @ tensors[names[1]].double()


@pytest.mark.slow
def test_the_clients_of_these_tests_differ_in_size(place):
    sizes = [turn.examples for turn in watched("average", place).rounds[0]]
    assert len(set(sizes)) == len(sizes) == 3


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_only_adapters_and_head_cross_the_network(variant, place):
    seen = watched(variant, place)
    assert len(seen.rounds) == 2
    for round, turns in enumerate(seen.rounds, start=1):
        for turn in turns:
            base = {name for name in turn.down if "base_layer" in name}
            assert turn.up.keys() == a(turn.up) | b(turn.up) | head(turn.up) and head(turn.up)
            assert turn.down == a(turn.down) | b(turn.down) | head(turn.down) | base and head(turn.down)
            # Frozen weights travel only where the server has changed them.
            assert bool(base) == (variant == "fedex" and round > 1)
            assert all(name.endswith("base_layer.weight") for name in base)


# --- average


@pytest.mark.parametrize("family", FAMILIES)
def test_average_averages_a_and_b_but_not_what_they_multiply_to(family, place):
    seen = watched("average", place, family)
    for round in (1, 2):
        turns = seen.rounds[round - 1]
        uploads = [
            Upload(turn.client, turn.examples, {n: v.clone() for n, v in turn.up.items()}) for turn in turns
        ]
        means = {name: value for name, (value, _) in weighted_mean(uploads).items()}
        assert means.keys() == set(seen.run.method.exchanged) and furthest(seen.after[round - 1], means) == 0
        assert furthest(seen.server_weights(round), seen.mean_weights(round)) > 1e-3


# --- ffa


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_ffa_never_changes_a_so_the_mean_product_is_exact(family, place):
    seen = watched("ffa", place, family)
    fresh = worlds.federation(
        "fedlora", place, family=family, kind=FAMILIES[family], variant="ffa", rank=2, alpha=6
    )
    frozen = a(fresh.parameters)
    assert frozen and same(frozen, fresh.parameters, seen.run.parameters)
    for round in (1, 2):
        turns = seen.rounds[round - 1]
        assert all(b(turn.up) and not a(turn.up) | a(turn.down) for turn in turns)
        total = sum(turn.examples for turn in turns)
        for name in b(turns[0].up):
            mean = sum(turn.up[name].double() * (turn.examples / total) for turn in turns)
            assert torch.allclose(seen.after[round - 1][name].double(), mean, atol=1e-6)
            assert len({turn.up[name].numpy().tobytes() for turn in turns}) == len(turns)
        assert furthest(seen.server_weights(round), seen.mean_weights(round)) < 1e-6


# --- fedsa


def test_fedsa_sends_a_and_leaves_b_with_its_client(place):
    seen = watched("fedsa", place)
    run = seen.run
    for turns in seen.rounds:
        for turn in turns:
            assert a(turn.up) and a(turn.down) and not b(turn.up) | b(turn.down)
    own = b(run.method.exchanged)
    assert own and same(own, run.server.tensors, run.server.initial)
    assert run.server.kept.keys() == {0, 1, 2}
    for client, kept in run.server.kept.items():
        assert kept.keys() == own
        assert all(kept[name].any() for name in own)
        assert not any(same(own, kept, other) for c, other in run.server.kept.items() if c != client)


@pytest.mark.slow
def test_fedsa_continues_each_clients_own_b(place, monkeypatch):
    """What a client starts from in round 2 is the B with which it ended round 1, and the server's A."""
    starts, ends = {}, {}
    fit = Turn.fit

    def noted(turn, segment):
        values = {name: value.detach().clone() for name, value in turn.model.named_parameters()}
        starts[turn.round, turn.client] = values
        fit(turn, segment)
        ends[turn.round, turn.client] = {n: v.detach().clone() for n, v in turn.model.named_parameters()}

    monkeypatch.setattr(Turn, "fit", noted)
    seen = Watched("fedsa", place)
    names = seen.run.method.exchanged
    for client in range(3):
        assert same(b(names), starts[2, client], ends[1, client])
        assert same(a(names) | head(names), starts[2, client], seen.after[0])
        assert not same(a(names), starts[2, client], ends[1, client])


def test_fedsa_scores_the_clients_own_models(place):
    from fedlm.federation.scoring import score

    seen = watched("fedsa", place)
    run = seen.run
    losses = []
    for client in range(3):
        seen.load({**run.server.tensors, **run.server.kept[client]})
        losses.append(score(run.model, run.data, run.split.test, 64)["loss"])
    assert run.test["loss"] == pytest.approx(sum(losses) / 3, rel=1e-9)
    assert len(set(losses)) == 3
    seen.load(run.server.tensors)  # without any client's B the adapters do nothing
    assert run.test["loss"] != pytest.approx(score(run.model, run.data, run.split.test, 64)["loss"], rel=1e-6)


# --- rolora


@pytest.mark.slow
def test_rolora_trains_and_sends_b_and_a_in_turn(place):
    seen = Watched("rolora", place, rounds=4)
    names = seen.run.method.exchanged
    for round, turns in enumerate(seen.rounds, start=1):
        sent, still = (b, a) if round % 2 else (a, b)
        for turn in turns:
            assert turn.up.keys() == sent(names) | head(names)
        assert same(still(names), seen.before[round - 1], seen.after[round - 1])
        assert not any(
            torch.equal(seen.before[round - 1][name], seen.after[round - 1][name]) for name in sent(names)
        )
        # One factor is the same for all clients, so the mean of the other gives the mean product.
        assert furthest(seen.server_weights(round), seen.mean_weights(round)) < 1e-6


# --- flexlora and fedex, on uploads of any kind


@cache
def method_of(variant: str, place, family: str = "bert", rank: int = 2):
    """Return a federation's method and the server's first values, to merge made-up uploads with."""
    run = worlds.federation(
        "fedlora", place, family=family, kind=FAMILIES[family], variant=variant, rank=rank, alpha=6
    )
    return run.method, run.server.initial


def made_up(method, initial, clients) -> list[Upload]:
    """Return uploads with random values: one for each (examples, seed)."""
    uploads = []
    for client, (examples, seed) in enumerate(clients):
        generator = torch.Generator().manual_seed(seed)
        tensors = {name: torch.randn(initial[name].shape, generator=generator) for name in method.shared}
        uploads.append(Upload(client, examples, tensors))
    return uploads


def copies(uploads: list[Upload]) -> list[Upload]:
    return [upload._replace(tensors={n: v.clone() for n, v in upload.tensors.items()}) for upload in uploads]


def mean_product(uploads: list[Upload], module: str) -> torch.Tensor:
    total = sum(upload.examples for upload in uploads)
    return sum(product(upload.tensors, module) * (upload.examples / total) for upload in uploads)


CLIENTS = st.lists(
    st.tuples(st.integers(1, 1000), st.integers(0, 10_000)), min_size=1, max_size=6, unique_by=lambda c: c[1]
)


@pytest.mark.parametrize("family", FAMILIES)
@given(clients=CLIENTS, other=st.integers(0, 10_000), step=st.floats(1e-2, 10))
@settings(max_examples=25)
def test_flexlora_gives_the_best_product_of_its_rank(family, clients, other, step, place):
    method, initial = method_of("flexlora", place, family)
    server = Server(dict(initial), initial)
    uploads = made_up(method, initial, clients)
    method.merge(server, iter(copies(uploads)), 1)
    generator = torch.Generator().manual_seed(other)
    for module in method.adapted:
        wanted = mean_product(uploads, module)
        found = product(server.tensors, module)
        values = numpy.linalg.svd(wanted.numpy(), compute_uv=False)
        best = float(numpy.sqrt((values[2:] ** 2).sum()))  # Eckart and Young 1936
        error = float(torch.linalg.norm(wanted - found))
        assert error == pytest.approx(best, rel=1e-4, abs=1e-4)
        assert numpy.linalg.matrix_rank(found.numpy(), tol=1e-3) <= 2
        # No product of that rank is closer: neither one made at random nor one nearby.
        names = [f"{module}lora_{letter}.default.weight" for letter in "BA"]
        tall, wide = (server.tensors[name].double() for name in names)
        strange = [torch.randn(x.shape, generator=generator, dtype=torch.double) for x in (tall, wide)]
        rivals = [strange[0] @ strange[1], (tall + step * strange[0]) @ (wide + step * strange[1])]
        assert all(float(torch.linalg.norm(wanted - rival)) >= error - 1e-4 for rival in rivals)
    for name in head(method.shared):
        mean = sum(u.tensors[name].double() * u.examples for u in uploads) / sum(u.examples for u in uploads)
        assert torch.allclose(server.tensors[name].double(), mean, atol=1e-5)


@pytest.mark.parametrize("rank", [2, 24])  # the matrices are 16 x 16
def test_flexlora_is_the_mean_product_while_the_rank_suffices(rank, place):
    method, initial = method_of("flexlora", place, rank=rank)
    server = Server(dict(initial), initial)
    uploads = made_up(method, initial, [(3, 1)])
    method.merge(server, iter(copies(uploads)), 1)
    for module in method.adapted:
        assert torch.allclose(product(server.tensors, module), mean_product(uploads, module), atol=1e-4)


def test_flexlora_in_a_run_leaves_less_error_than_averaging_would(place):
    seen = watched("flexlora", place)
    for round in (1, 2):
        turns = seen.rounds[round - 1]
        uploads = [Upload(turn.client, turn.examples, turn.up) for turn in turns]
        averaged = {name: value for name, (value, _) in weighted_mean(copies(uploads)).items()}
        for module in seen.run.method.adapted:
            wanted = mean_product(uploads, module)
            found = torch.linalg.norm(wanted - product(seen.after[round - 1], module))
            assert found < torch.linalg.norm(wanted - product(averaged, module))


@pytest.mark.parametrize("family", FAMILIES)
@given(clients=CLIENTS)
@settings(max_examples=25)
def test_fedex_weights_are_the_mean_of_any_uploads(family, clients, place):
    method, initial = method_of("fedex", place, family)
    server = Server(dict(initial), initial)
    uploads = made_up(method, initial, clients)
    method.merge(server, iter(copies(uploads)), 1)
    for module, transposed in method.adapted.items():
        assert transposed == (family == "gpt2")
        name = f"{module}base_layer.weight"
        base, changed = (
            x[name].double().T if transposed else x[name].double() for x in (initial, server.tensors)
        )
        wanted = base + 3 * mean_product(uploads, module)  # alpha / rank
        found = changed + 3 * product(server.tensors, module)
        assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_fedex_gives_the_exact_mean_of_the_clients_weights(family, place):
    seen = watched("fedex", place, family)
    for round in (1, 2):
        server, mean = seen.server_weights(round), seen.mean_weights(round)
        assert furthest(server, mean) < 1e-6
        # The clients went far enough apart that a plain average would be seen.
        turns = seen.rounds[round - 1]
        assert furthest(turns[0].weights, mean) > 1e-3
    assert any("base_layer" in name for turn in seen.rounds[1] for name in turn.down)
