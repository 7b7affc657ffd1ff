"""SHERL: a side module around frozen layers (arXiv:2407.07523)."""

import pytest
import tiny
import torch
import worlds

from fedlm.base.errors import UserError
from fedlm.federation.facts import Facts
from fedlm.measure.memory import measure_step
from fedlm.models import loading
from fedlm.models.blocks import find_blocks
from fedlm.models.config import ModelConfig
from fedlm.study.plugins import discover_methods
from methods import sherl

pytestmark = pytest.mark.usefixtures("one_thread")
HIDDEN, LAYERS = 16, 3
TOKENS = torch.arange(3, 19).reshape(2, 8)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def prepared(folder, kind="classification", method="sherl", **config):
    """Return the method and the tiny model of a folder with its side module."""
    kind_of_method = discover_methods()[method]
    found = kind_of_method(kind_of_method.Config(**config), 2, 1)
    return found, found.prepare(loading.load(ModelConfig(source=str(folder)), kind, 2, 1), kind)


def tiny_model(place, family="bert", kind="classification", **config):
    return prepared(worlds.folder(family, str(place)), kind, **config)


def pretrained(place, family="bert", kind="classification"):
    return loading.load(ModelConfig(source=str(worlds.folder(family, str(place)))), kind, 2, 1)


def side_module(hidden, taps, **config):
    method = discover_methods()["sherl"]
    return method(method.Config(**config), 2, 1).side_module(
        hidden, ["embeddings", *(f"layer_{number}" for number in range(taps - 1))]
    )


def count(module) -> int:
    return sum(value.numel() for value in module.parameters())


def test_parameters_are_counted_by_the_formula():
    # The two side modules of T5-base in the authors' code, without the norms after its stacks.
    assert count(side_module(768, 10)) == 2_366_018
    assert count(side_module(768, 9)) == 2_144_258
    hidden, width, taps = 40, 5, 4
    plain = taps * (hidden * width + 3 * width) + (width + 1) + (width * hidden + 3 * hidden)
    assert count(side_module(hidden, taps, form="plain", reduction=8)) == plain + 1
    assert count(side_module(hidden, taps, form="plain", reduction=8, gate="open")) == plain


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_side_module_and_the_head_travel_and_blocks_are_still_found(place, family):
    # As many adapters as layers, each larger than a layer.
    method, model = tiny_model(place, family, reduction=1, late=1)
    side = {
        name for name, _ in model.named_parameters() if name.startswith(f"{model.base_model_prefix}.side.")
    }
    assert len(side) == LAYERS * 6 + 5
    assert set(method.exchanged) == side | set(method.anatomy.head)
    found = find_blocks(model)
    assert (found.layers, found.head) == (method.anatomy.layers, method.anatomy.head)


def test_redundancy_counts_the_taps_that_say_the_same():
    assert torch.equal(sherl.redundancy(torch.eye(4) * 3), torch.ones(4))
    one = torch.randn(1, 8)
    assert sherl.redundancy(one.expand(5, 8)).allclose(torch.full((5,), 5.0))
    assert sherl.redundancy(torch.cat([one, -2 * one])).allclose(torch.ones(2))
    assert torch.equal(sherl.redundancy(torch.zeros(3, 8)), torch.ones(3))
    taps = torch.randn(7, 5, 8)
    expected = torch.cosine_similarity(taps[:, :, None], taps[:, None], dim=-1).relu().sum(-1)
    assert sherl.redundancy(taps).allclose(expected, rtol=1e-4)


def test_shares_of_the_taps():
    score = torch.nn.Linear(8, 1)
    taps, guide = torch.randn(200, 3, 8), torch.randn(200, 8)
    found = sherl.shares(taps, guide, score)
    positive = (score(taps * guide[:, None]) > 0).squeeze(-1)
    assert torch.equal(found > 0, positive)
    assert found.sum(-1).allclose(positive.any(-1).float(), atol=1e-2)
    assert 0 < positive.any(-1).sum() < 200 and found.sum(-1).max() <= 1 + 1e-6
    # Where no tap has a positive score, the guide is alone.
    alone = ~positive.any(-1)
    assert torch.equal(sherl.merged(taps, guide, score)[alone], guide[alone])


def test_a_tap_gains_nothing_by_being_repeated():
    score = torch.nn.Linear(4, 1)
    torch.nn.init.ones_(score.weight)
    taps, guide = torch.eye(4)[:2], torch.tensor([1.0, 2.0, 0.0, 0.0])
    once = sherl.shares(taps, guide, score)
    repeated = sherl.shares(taps[[0, 0, 0, 1]], guide, score)
    assert once.min() > 0
    assert repeated[:3].sum().isclose(once[0]) and repeated[3].isclose(once[1])


@pytest.mark.parametrize("form", ["gated", "plain"])
def test_tokens_do_not_mix_in_the_side_module(form):
    side = side_module(HIDDEN, 4, form=form)
    hidden = torch.randn(4, 2, 6, HIDDEN)
    order = torch.randperm(12)

    def run(states):
        route = sherl._Route(side)
        for place, state in zip(side["adapters"], states, strict=True):
            route.tap(place, None, (state,))
        return route.enter(None, (states[-1], "mask"))

    (found, mask), (permuted, _) = run(hidden), run(hidden.flatten(1, 2)[:, order])
    assert mask == "mask" and found.shape == (2, 6, HIDDEN)
    torch.testing.assert_close(permuted, found.flatten(0, 1)[order])


def by_hand(side, taps: list[torch.Tensor], plain: bool) -> torch.Tensor:
    """Return the side module's output for one token, step by step as the authors' code describes it."""
    reduced = []
    for adapter, tap in zip(side["adapters"].values(), taps, strict=True):
        down = adapter["down"](tap)
        if plain:
            reduced.append(adapter["norm"](down))
        else:
            z = down.relu()
            reduced.append((adapter["value"](z) + z) * torch.sigmoid(adapter["gate"](z)))
    *shallow, guide = reduced
    scores = []
    for y in shallow:
        cosines = [torch.dot(y, other) / y.norm() / other.norm() for other in shallow]
        scores.append(side["score"](y * guide).relu() / sum(cosine.clamp(min=0) for cosine in cosines))
    weights = [s / (sum(map(abs, scores)) + 1e-6) for s in scores]
    up = side["up"]((sum(a * y for a, y in zip(weights, shallow, strict=True)) + guide).relu())
    return side["norm"](up) if plain else up


@pytest.mark.parametrize("form", ["gated", "plain"])
def test_the_model_computes_what_the_formulas_say(place, form):
    _, model = tiny_model(place, form=form)
    side = model.bert.side
    with torch.no_grad():
        for value in side.parameters():
            value.add_(torch.randn_like(value) * 0.3)
        plain = pretrained(place).bert
        states = plain(TOKENS, output_hidden_states=True).hidden_states[:LAYERS]
        expected = torch.empty_like(states[-1])
        for text in range(2):
            for token in range(8):
                taps = [state[text, token] for state in states]
                expected[text, token] = by_hand(side, taps, form == "plain")
                expected[text, token] += torch.tanh(side.gate / 0.1) * taps[-1]
        late = plain.encoder.layer[-1](expected)
        assert model.bert(TOKENS).last_hidden_state.allclose(late, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "form"), [*((family, "gated") for family in tiny.FAMILIES), ("bert", "plain")]
)
def test_without_the_side_module_it_is_the_pretrained_model(place, family, form):
    kind = "classification" if family in tiny.ENCODERS else "causal"
    _, opened = tiny_model(place, family, kind, form=form, gate="open", late=2)
    _, learned = tiny_model(place, family, kind, form=form)
    side = learned.base_model.side
    with torch.no_grad():
        expected = pretrained(place, family, kind)(TOKENS).logits
        assert torch.equal(opened(TOKENS).logits, expected)
        # With a learned gate it is not the start, but the model can become it.
        assert not torch.equal(learned(TOKENS).logits, expected)
        side.gate.fill_(1)
        for value in side["norm" if form == "plain" else "up"].parameters():
            value.zero_()
        assert torch.equal(learned(TOKENS).logits, expected)


def test_gradients_pass_through_the_late_layer_and_end_there(place):
    method, model = tiny_model(place, late=2)
    early, late, _ = model.bert.encoder.layer
    seen = {}
    early.register_forward_hook(lambda layer, inputs, output: seen.update(early=(inputs[0], output)))
    late.register_forward_pre_hook(lambda layer, inputs: seen.update(late=inputs[0]))
    model.train()
    model(TOKENS, labels=torch.tensor([0, 1])).loss.backward()
    assert not any(state.requires_grad for state in seen["early"])
    assert seen["late"].requires_grad
    assert {name for name, value in model.named_parameters() if value.grad is not None} == set(
        method.exchanged
    )


def test_the_gate_starts_closed_and_moves_at_once(place):
    _, model = tiny_model(place)
    gate, last = model.bert.side.gate, model.bert.encoder.layer[-1]
    seen = {}

    def note(layer, inputs):
        inputs[0].retain_grad()
        seen["input"] = inputs[0]

    last.register_forward_pre_hook(note)
    model.bert.encoder.layer[-2].register_forward_hook(lambda *given: seen.update(early=given[-1]))
    model(TOKENS, labels=torch.tensor([0, 1])).loss.backward()
    # The derivative of tanh(theta / 0.1) at zero is 10.
    expected = 10 * (seen["input"].grad * seen["early"]).sum()
    assert gate.item() == 0 and gate.grad.item() != 0
    torch.testing.assert_close(gate.grad, expected)


def activations(folder, **config) -> int:
    """Return the bytes of activations at the peak of a step of 8 texts of 24 tokens."""
    _, model = prepared(folder, **config)
    model.train()
    tokens, labels = torch.arange(192).reshape(8, 24) % 100 + 5, torch.arange(8) % 2

    def step():
        model(tokens, labels=labels).loss.backward()
        model.zero_grad()

    return measure_step(step, model).activation


@pytest.mark.slow
def test_early_layers_store_no_activations(place):
    shallow, deep = (tiny.save(place / f"deep{n}", "bert", layers=n, hidden=64) for n in (4, 10))
    # Six more layers that nothing taps cost nothing.
    assert activations(deep, layers=[0]) == activations(shallow, layers=[0])

    def stored(taps: int) -> int:
        """Return the most that taps besides the guide may hold: inputs, four narrow ones, and cosines."""
        return 4 * 8 * 24 * (taps * (64 + 4 * 16) + 5 * taps**2)

    # Six that are tapped cost this, and nothing of what is inside them.
    taps = activations(deep) - activations(shallow)
    assert 6 * 4 * 8 * 24 * 64 < taps < stored(9) - stored(3)
    assert taps < (activations(deep, method="fedlora") - activations(shallow, method="fedlora")) / 3
    assert activations(deep) < activations(deep, method="fedlora") / 2


def test_settings_that_do_not_fit_the_model(place):
    method = discover_methods()["sherl"]
    facts = Facts("bert", "classification", blocks=6, hidden=384, positions=512, decoder=False, layers=6)
    for config, message in (
        ({"reduction": 385}, "reduction: 385; allowed: at most 384, the model's width"),
        ({"late": 6}, "late: 6; allowed: at most 5, all layers but one"),
        ({"late": 2, "layers": [0, 4]}, "layers: 4; allowed: 0 to 3, the layers before the late ones"),
        ({"layers": [-1]}, "layers: -1; allowed: 0 to 4, the layers before the late ones"),
    ):
        with pytest.raises(UserError, match=message):
            method(method.Config(**config), 2, 1).check(facts)
    # What all layers share counts as a block, but is no layer.
    with pytest.raises(UserError, match="late: 3; allowed: at most 2"):
        tiny_model(place, "mobillama", "causal", late=3)


def test_tapped_layers(place):
    _, model = tiny_model(place, layers=[])
    assert [*model.bert.side["adapters"]] == ["embeddings", "layer_1"]
    _, model = tiny_model(place, late=2)
    assert [*model.bert.side["adapters"]] == ["embeddings", "layer_0"]
