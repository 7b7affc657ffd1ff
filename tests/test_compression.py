"""Compression of downloads: operators keep what they promise, to the byte, and spare what is trained."""

import json

import numpy
import pytest
import tiny_study
import torch
import worlds
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.pytorch_utils import Conv1D

from fedlm.base.errors import UserError
from fedlm.exchange import compression, payload, pruning
from fedlm.exchange.pruning import Inputs
from fedlm.federation.checkpoint import Checkpoints
from fedlm.federation.link import Link
from fedlm.federation.method import Server
from fedlm.federation.turn import Turn
from fedlm.models import blocks, loading
from fedlm.models.config import ModelConfig
from fedlm.study import check as check_module
from fedlm.study import reading
from fedlm.study.plugins import discover_methods, discover_tasks

OPERATORS = {
    "layer_drop": {"operator": "layer_drop", "rate": 0.5},
    "magnitude": {"operator": "prune", "sparsity": 0.6},
    "wanda": {"operator": "prune", "sparsity": 0.6, "criterion": "wanda", "calibration_examples": 8},
    "dsnot": {"operator": "prune", "sparsity": 0.6, "criterion": "dsnot", "calibration_examples": 8},
    "quantize": {"operator": "quantize"},
    "stale": {"operator": "stale", "share": 0.5},
}
CACHES = ("none", "pretrained", "last_visit")
FAMILIES = {"bert": "classification", "gpt2": "causal", "mobillama": "causal"}


def federation(place, operator=None, family="bert", **settings):
    chosen = {"compression": OPERATORS[operator]} if operator else {}
    return worlds.federation("fedcybgd", place, family=family, kind=FAMILIES[family], **chosen, **settings)


def updated(run, seed=0):
    """Give every exchanged parameter of a federation a value of its own, as if all had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in run.server.initial.items():
        run.server.update(name, value + 0.1 * torch.randn(value.shape, generator=generator))
    return run


def received(run, client=1, round=1):
    message = run.link.send(client, round)
    return message, run.link.depth(client, round), run.link.receive(client, message)


def rows_of(name, tensor, run):
    """Return a matrix with one row per output channel."""
    return tensor.T if isinstance(run.model.get_submodule(name.removesuffix(".weight")), Conv1D) else tensor


def free_matrices(run, client, round):
    trained = set(run.method.trainable(client, round))
    free = compression.free_blocks(run.link.anatomy, trained)
    linear = pruning.linear_weights(run.model)
    names = [name for block in free for name in block.parameters]
    return [name for name in names if name in linear], [name for name in names if name not in linear]


@pytest.fixture
def quick(monkeypatch):
    """Leave out the memory probe, which takes most of a tiny turn and changes nothing that is sent."""
    monkeypatch.setattr(Turn, "probe", lambda self, segments, train: None)


# --- what each operator promises


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("operator", ["magnitude", "wanda", "dsnot"])
def test_pruned_matrices_keep_equally_many_weights_in_each_output_row(operator, family, place):
    run = updated(federation(place, operator, family))
    _, _, values = received(run)
    matrices, rest = free_matrices(run, 1, 1)
    assert matrices and rest
    for name in matrices:
        exact, found = (rows_of(name, tensor, run) for tensor in (run.server.tensors[name], values[name]))
        columns = exact.shape[1]
        assert ((found != 0).sum(1) == columns - round(0.6 * columns)).all()
        assert torch.equal(found[found != 0], exact[found != 0])
        if operator == "magnitude":
            lost = exact.masked_fill(found != 0, 0).abs().amax(1)
            assert (found.abs().masked_fill(found == 0, torch.inf).amin(1) >= lost).all()
    assert all(torch.equal(values[name], run.server.tensors[name]) for name in rest)


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_matrices_are_within_half_a_step_of_their_output_channel(family, place):
    run = updated(federation(place, "quantize", family))
    _, _, values = received(run)
    matrices, rest = free_matrices(run, 1, 1)
    for name in matrices:
        exact, found = (rows_of(name, tensor, run) for tensor in (run.server.tensors[name], values[name]))
        step = exact.abs().amax(1, keepdim=True) / 127
        assert ((exact - found).abs() <= 0.5001 * step).all() and not torch.equal(exact, found)
        assert all(len(row.div(s).round().unique()) > 2 for row, s in zip(found, step, strict=True))
    assert all(torch.equal(values[name], run.server.tensors[name]) for name in rest)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_layers_do_not_travel_and_the_copy_runs_without_them(family, place):
    run = updated(federation(place, "layer_drop", family))
    message, depth, values = received(run)
    sent = payload.decode(message, run.server.initial)
    dropped = [i for i, b in enumerate(run.link.anatomy.blocks) if b.parameters[0] not in sent]
    assert len(dropped) == 1 and dropped != [1]  # client 1 trains layer 1; half of the other two, rounded
    run.load(run.server.tensors)
    batch = run.data.batch(run.parts[1][:4])
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    run.model.eval()
    with torch.no_grad():
        whole = run.model(**batch).logits
        with blocks.skip(run.model, dropped):
            shallow = run.model(**batch).logits
        run.load(values)
        with depth:
            found = run.model(**batch).logits
            held = sum(value.numel() for value in run.model.parameters())
    assert torch.equal(found, shallow) and not torch.equal(found, whole)
    lost = [name for i in dropped for name in run.link.anatomy.blocks[i].parameters]
    assert held == sum(value.numel() for name, value in before.items() if name not in lost)
    assert all(before[name].shape == value.shape for name, value in run.model.named_parameters())


def test_stale_blocks_stay_as_they_were_pretrained(place):
    run = federation(place, "stale")
    anatomy = run.link.anatomy
    for name in [*anatomy.blocks[0].parameters, *anatomy.blocks[2].parameters]:
        run.server.update(name, run.server.tensors[name] + 1)
    message, _, values = received(run)
    sent = payload.decode(message, run.server.initial)
    fresh = [b for b in (0, 2) if anatomy.blocks[b].parameters[0] in sent]
    assert len(fresh) == 1
    for index, block in enumerate(anatomy.blocks):
        source = run.server.tensors if index in fresh else run.server.initial
        assert all(torch.equal(values[name], source[name]) for name in block.parameters)
    assert set(sent) == set(anatomy.blocks[fresh[0]].parameters)  # nothing else was updated


@given(st.integers(1, 30), st.floats(0, 1), st.integers(0, 99))
def test_the_share_of_stale_blocks_is_rounded_and_redrawn_each_turn(count, share, client):
    operator = compression.Stale(operator="stale", share=share)
    updated = [blocks.Block(f"layer_{i}", f"layers.{i}", (f"layers.{i}.weight",)) for i in range(count)]
    left = operator.left_out(updated, 1, 1, client)
    assert count - len(left) == int(share * count + 0.5)
    assert left == [block for block in updated if block in left] == operator.left_out(updated, 1, 1, client)


@given(st.integers(1, 30), st.floats(0.01, 0.99), st.sets(st.integers(0, 29)), st.integers(0, 99))
def test_a_trained_layer_is_never_dropped_and_one_is_always_left(count, rate, trained, client):
    layers = [blocks.Block(f"layer_{i}", f"layers.{i}", (f"layers.{i}.weight",)) for i in range(count)]
    anatomy = blocks.Anatomy(tuple(layers), (), (), (), (), tuple(layer.module for layer in layers))
    free = compression.free_blocks(anatomy, {f"layers.{i}.weight" for i in trained})
    operator = compression.LayerDrop(operator="layer_drop", rate=rate)
    dropped = operator.dropped(anatomy, free, 1, 1, client)
    assert not trained & set(dropped) and len(set(dropped)) == len(dropped) < count
    assert len(dropped) == min(int(rate * len(free) + 0.5), count - 1)


def test_draws_differ_between_turns(place):
    run = updated(federation(place, "layer_drop", clients=6))
    drawn = {
        (client, round): tuple(run.link._dropped(run.link._free(run.method.trainable(client, round)), *turn))
        for client in (0, 3)
        for round in range(1, 9)
        for turn in [(client, round)]
    }
    assert {drawn[0, r] for r in range(1, 9)} == {(1,), (2,)}  # client 0 and client 3 train layer 0
    assert [drawn[0, r] for r in range(1, 9)] != [drawn[3, r] for r in range(1, 9)]


# --- in a federation


@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_trained_always_arrives_exactly(operator, cache, place, quick):
    for family in ("bert", "gpt2"):
        options = {"clients": 4, "order": "shifted", "training": {"local_steps": 1}}
        run = federation(place, operator, family, cache=cache, **options)
        take, turns = run.link.receive, []

        def noted(client, message, run=run, take=take, turns=turns):
            values = take(client, message)
            round = len(run.rounds) + 1
            trained = run.method.trainable(client, round)
            assert all(torch.equal(values[name], run.server.tensors[name]) for name in trained)
            assert values.keys() == set(run.method.exchanged)
            turns.append(
                [n for n in values if n not in trained and not torch.equal(values[n], run.server.tensors[n])]
            )
            return values

        run.link.receive = noted
        run.run()
        assert len(turns) == 8 and any(turns)  # and something else was reduced
        assert numpy.isfinite(run.test["loss"])


def outcome(run) -> tuple:
    """Return everything but times."""
    rounds = [{key: value for key, value in row.items() if key != "seconds"} for row in run.rounds]
    return rounds, run.test, run.flops, run.instruments.memory, payload.encode(run.server.tensors).sha256()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operator", "cache"), [*((operator, "last_visit") for operator in OPERATORS), ("wanda", "none")]
)
def test_a_resumed_run_gives_the_same_bytes(operator, cache, place, tmp_path, request):
    if operator != "layer_drop":  # in which each turn is another model to measure
        request.getfixturevalue("quick")

    class Killed(Exception):
        pass

    def stop(line):
        if line.startswith("round 2"):
            raise Killed

    options = {"rounds": 3, "cache": cache, "order": "shifted", "federation": {"dropout_rate": 0.2}}
    options["training"] = {"local_steps": 1}
    whole = federation(place, operator, **options)
    whole.run()
    checkpoints = Checkpoints(tmp_path, "fingerprint", lambda line: None)
    with pytest.raises(Killed):
        federation(place, operator, log=stop, **options).run(checkpoints)
    resumed = federation(place, operator, **options)
    resumed.run(checkpoints)
    assert outcome(resumed) == outcome(whole)


@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("operator", [None, *OPERATORS])
def test_bytes_are_predicted_without_values_for_a_whole_run(operator, cache, place, quick):
    precision = "bfloat16" if cache == "pretrained" else "float32"
    options = {"rounds": 3, "order": "shifted", "training": {"local_steps": 1}}
    run = federation(place, operator, cache=cache, payload=precision, **options)
    run.run()
    method = discover_methods()["fedcybgd"](run.method.config, len(run.parts), run.seed)
    source = ModelConfig(source=str(worlds.folder("bert", str(place))))
    shapes = method.prepare(loading.build_on_meta(source, "classification", 2), "classification")
    server = Server(
        *({name: dict(shapes.named_parameters())[name].detach() for name in method.exchanged},) * 2
    )
    server.tensors = dict(server.initial)
    link = Link(method, server, shapes, run.seed)
    for row in run.rounds:
        for (client,) in method.cohorts(row["clients"], row["round"]):
            message = link.send(client, row["round"])
            link.receive(client, message)
            assert [client, len(message)] == row["payloads"][client][:2]
            trained = method.trainable(client, row["round"])
            tensors = {name: torch.empty_like(server.tensors[name]) for name in trained}
            link.uploaded(client, tensors)
            for name, value in tensors.items():
                server.update(name, value)
            link.merged([client])


def data_bytes(message) -> int:
    """Return the bytes of a payload without its header."""
    message = bytes(message)
    length = int.from_bytes(message[:8], "little")
    json.loads(message[8 : 8 + length])
    return len(message) - 8 - length


@pytest.mark.slow
def test_exact_bytes_of_each_operator(place):
    """The tiny BERT's layer: four matrices 16 x 16, one 32 x 16, one 16 x 32; vectors of 9 x 16 + 32."""
    matrices, vectors, head = 4 * 16 * 16 + 2 * 16 * 32, 9 * 16 + 32, 2 * 16 + 2
    layer = matrices + vectors
    pruned = matrices // 8 + 4 * (4 * 16 * 6 + 32 * 6 + 16 * 13) + 4 * vectors  # of 16 stay 6, of 32 stay 13
    quantized = matrices + 4 * (4 * 16 + 32 + 16) + 4 * vectors
    expected = {
        None: 4 * (3 * layer + head),
        "layer_drop": 4 * (2 * layer + head),
        "magnitude": 4 * (layer + head) + 2 * pruned,
        "wanda": 4 * (layer + head) + 2 * pruned,
        "dsnot": 4 * (layer + head) + 2 * pruned,
        "quantize": 4 * (layer + head) + 2 * quantized,
        "stale": 4 * (2 * layer + head),
    }
    for operator, bytes in expected.items():
        run = updated(federation(place, operator))
        message, _, _ = received(run)
        assert data_bytes(message) == bytes, operator
        narrow = updated(federation(place, "magnitude", payload="bfloat16"))
    assert data_bytes(received(narrow)[0]) == (4 * (layer + head) + 2 * (pruned + matrices // 8)) // 2


@pytest.mark.slow
def test_the_ledger_shrinks_as_computed(place, quick):
    runs = {operator: federation(place, operator, rounds=1) for operator in (None, "magnitude")}
    for run in runs.values():
        run.run()
    saved = 2 * 3 * (4 * (4 * 16 * 10 + 32 * 10 + 16 * 19) - 1536 // 8)
    headers = 3 * 2 * 6 * len('"#mask":{"dtype":"F32","shape":[],"data_offsets":[,]},')  # a second entry each
    found = runs[None].ledger.download - runs["magnitude"].ledger.download
    assert saved - 3 * headers < found < saved
    assert runs[None].ledger.upload == runs["magnitude"].ledger.upload


@pytest.mark.slow
def test_layer_drop_saves_memory_and_arithmetic_as_much_as_fake_tensors_say(place):
    plain, dropping = federation(place, rounds=1), federation(place, "layer_drop", rounds=1)
    plain.run(), dropping.run()
    assert dropping.flops < plain.flops
    layer = sum(
        plain.parameters[name].nbytes for name in blocks.find_blocks(plain.model).blocks[0].parameters
    )
    for label, found in dropping.instruments.memory.items():
        assert plain.instruments.memory[label].parameter - found.parameter == layer


# --- who can take it


@pytest.mark.parametrize("method", ["fedavg", "fedlora", "fedprompt", "head_only", "centralized"])
@pytest.mark.parametrize("operator", ["layer_drop", "magnitude", "stale"])
def test_a_method_that_trains_all_it_downloads_is_refused_before_training(method, operator, tmp_path):
    path = tiny_study.write(
        tmp_path, methods={"reduced": {"method": method, "compression": OPERATORS[operator]}, "fedcybgd": {}}
    )
    with pytest.raises(UserError) as error:
        check_module.check(reading.load(path))
    (line,) = str(error.value).splitlines()
    assert line.startswith("methods.reduced: compression: ") and "allowed: no compression" in line


def test_the_whole_model_as_one_block_is_refused_and_single_blocks_are_not(tmp_path, place):
    method = {"method": "fedcybgd", "compression": OPERATORS["quantize"]}
    with pytest.raises(UserError, match="compression: quantize finds nothing to reduce"):
        check_module.check(
            reading.load(tiny_study.write(tmp_path, methods={"m": {**method, "block": "model"}}))
        )
    check_module.check(reading.load(tiny_study.write(tmp_path, methods={"m": method})))
    with pytest.raises(UserError, match="compression: prune finds nothing to reduce"):
        worlds.federation("fedavg", place, compression=OPERATORS["wanda"])


# --- the criteria of pruning


@given(st.integers(1, 200), st.floats(0.01, 0.99))
def test_at_least_one_weight_of_a_row_is_kept(columns, sparsity):
    kept = pruning.kept_per_row(columns, sparsity)
    assert 1 <= kept <= columns
    assert kept == 1 or abs(columns * (1 - sparsity) - kept) <= 0.5 + 1e-9


def test_calibration_sees_every_input_of_a_linear_layer_but_no_padding(place):
    run = federation(place, family="gpt2")
    layer = run.model.transformer.h[1].mlp.c_proj
    batches = [run.data.batch(part) for part in (run.parts[0][:3], run.parts[0][3:5])]
    batches[0]["attention_mask"][1, 5:] = 0
    found = pruning.observe(run.model, batches)["transformer.h.1.mlp.c_proj.weight"]
    rows = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0]))
    with torch.no_grad():
        for batch in batches:
            run.model.eval()(**batch)
    hook.remove()
    kept = torch.cat([r[b["attention_mask"].bool()] for r, b in zip(rows, batches, strict=True)])
    assert (found.tokens, found.examples) == (len(kept), 5)
    assert torch.allclose(found.norm, kept.norm(dim=0), rtol=1e-5)
    assert torch.allclose(found.mean, kept.mean(0), atol=1e-6)
    assert torch.allclose(found.variance, kept.var(0, unbiased=False), rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_the_masks_follow_the_servers_model_once_a_round(place, quick):
    run = federation(place, "wanda", clients=4)
    run.run()
    seen = {}
    observe = pruning.observe

    def counted(model, batches):
        values = {name: value.detach().clone() for name, value in model.named_parameters()}
        seen[len(seen)] = all(torch.equal(values[n], run.server.tensors[n]) for n in run.server.tensors)
        return observe(model, batches)

    pruning.observe = counted
    try:
        for client in (0, 1, 2):
            run.link.send(client, 9)
        run.link.send(0, 10)
    finally:
        pruning.observe = observe
    assert seen == {0: True, 1: True}


def inputs_of(rows: torch.Tensor, examples: int) -> Inputs:
    found = Inputs(torch.zeros(rows.shape[1]).double(), torch.zeros(rows.shape[1]).double())
    found.add(rows, examples)
    return found


def test_wanda_weighs_each_weight_by_the_norm_of_its_input():
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(5, 9, generator=generator), torch.randn(40, 9, generator=generator) ** 3
    mask = pruning.choose(weight, 0.5, "wanda", inputs_of(rows, 4))
    for row, kept in zip(weight, mask, strict=True):
        scores = [abs(row[j].item()) * rows[:, j].square().sum().sqrt().item() for j in range(9)]
        assert sorted(scores)[-5:] == sorted(score for score, k in zip(scores, kept, strict=True) if k)


@given(st.integers(1, 8), st.integers(2, 60), st.floats(0.1, 0.9), st.integers(0, 999))
@settings(max_examples=60)
def test_dsnot_lowers_the_expected_error_of_rows_and_touches_no_others(rows, columns, sparsity, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    given = torch.randn(50, columns, generator=generator) + torch.randn(columns, generator=generator)
    inputs = inputs_of(given, 5)
    wanda, dsnot = (pruning.choose(weight, sparsity, name, inputs) for name in ("wanda", "dsnot"))
    assert torch.equal(wanda.sum(1), dsnot.sum(1))

    def errors(mask):
        lost = (weight * ~mask).double()
        mean = (lost @ inputs.mean.double()) * 10
        return mean, mean.square() + (lost.square() @ inputs.variance.double()) * 100

    before, after = errors(wanda), errors(dsnot)
    changed = (wanda != dsnot).any(1)
    assert (after[1][changed] < before[1][changed]).all()
    assert (before[0][changed].abs() > pruning.THRESHOLD * 0.999).all()
    assert ((wanda & ~dsnot).sum(1) <= pruning.CYCLES).all()


def test_a_layer_without_inputs_is_pruned_by_magnitude():
    weight = torch.randn(4, 10)
    assert torch.equal(
        pruning.choose(weight, 0.5, "dsnot", None), pruning.choose(weight, 0.5, "magnitude", None)
    )


@pytest.fixture(scope="module")
def minilm():
    """MiniLM and what its layers are given by 32 real sentences, and by 32 others."""
    source = ModelConfig(source="minilm")
    model, tokenizer = loading.load(source, "classification", 2, 1), loading.load_tokenizer(source)
    task = discover_tasks()["bbc_news"]
    texts = list(task(task.Config()).load().rows["text"])[::34]
    rows: dict[str, list] = {}
    linear = {id(p): name for name, p in model.named_parameters() if name in pruning.linear_weights(model)}
    keep = [name for i in (0, 3, 5) for name in blocks.find_blocks(model).blocks[i].parameters]
    hooks = [
        module.register_forward_pre_hook(
            lambda module, inputs: rows.setdefault(linear[id(module.weight)], []).append(inputs[0])
        )
        for module in model.modules()
        if id(getattr(module, "weight", None)) in linear and linear[id(module.weight)] in keep
    ]
    masks = []
    for part in (texts[:32], texts[32:64]):
        batch = tokenizer(part, padding=True, truncation=True, max_length=48, return_tensors="pt")
        masks.append(batch["attention_mask"].bool())
        with torch.no_grad():
            model(**batch)
    for hook in hooks:
        hook.remove()
    return model, {name: [r[m] for r, m in zip(two, masks, strict=True)] for name, two in rows.items()}


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_reconstruction_error_falls_from_magnitude_to_wanda_to_dsnot_on_minilm(minilm, sparsity):
    model, rows = minilm
    assert len(rows) == 18
    parameters = dict(model.named_parameters())
    for name, (calibration, held_out) in rows.items():
        weight = parameters[name].detach()
        inputs = inputs_of(calibration, 32)
        errors: dict[str, list[float]] = {}
        for criterion in ("magnitude", "wanda", "dsnot"):
            lost = weight * ~pruning.choose(weight, sparsity, criterion, inputs)
            errors[criterion] = [(x @ lost.T).square().sum().item() for x in (calibration, held_out)]
        for at in (0, 1):
            assert errors["magnitude"][at] > errors["wanda"][at] > errors["dsnot"][at], (name, at, errors)


def test_choosing_what_to_prune_is_time_of_the_server_and_not_of_the_download(place, monkeypatch):
    """All masks of a download are there before it is timed."""
    run = worlds.federation(
        "fedcybgd", place, rounds=1, compression={"operator": "prune", "criterion": "wanda"}
    )
    made, send = [], run.link.send

    def sending(client, round):
        before = dict(run.link._masks)
        message = send(client, round)
        made.append(before == run.link._masks and bool(before))
        return message

    monkeypatch.setattr(run.link, "send", sending)
    run.play(1)
    assert made == [True] * 3 and run.clock["prune"] > 0
