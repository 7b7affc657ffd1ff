"""Costs are predicted: bytes and FLOPs exactly, memory within 1%, for every method in the folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy
import pandas
import pytest
import tiny
import tiny_study
import torch
import worlds
from test_methods import CASES, IDS, KINDS, defaults

from fedlm import __main__ as program
from fedlm.costs import cases, prediction
from fedlm.data.prepared import Prepared
from fedlm.federation.loop import Batches
from fedlm.federation.passes import GivenBatches
from fedlm.federation.settings import Federation as FederationConfig
from fedlm.federation.settings import Training
from fedlm.measure import memory as measured_memory
from fedlm.models.config import ModelConfig
from fedlm.study.plugins import discover_methods

GIB = 2**30
ROOT = Path(__file__).parent.parent


pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


@pytest.fixture
def padded(monkeypatch):
    """Let every batch hold padding: a mask that masks nothing is dropped, which fake ones cannot show."""
    batch = Prepared.batch

    def with_padding(data, indices):
        made = batch(data, indices)
        made["attention_mask"][0, -1] = 0
        return made

    monkeypatch.setattr(Prepared, "batch", with_padding)


def predicted(run, place, model=None, family="bert", positions=None):
    """Return the costs of a federation of tests/worlds.py, without its weights."""
    kind = run.data.kind
    method = type(run.method)(run.method.config, run.method.clients, run.seed)
    source = ModelConfig(source=str(worlds.folder(family, str(place))), **(model or {}))
    return prediction.predict(
        method,
        source,
        kind,
        run.data.num_labels,
        run.parts,
        Batches(run.data, torch.device("cpu")),
        run.settings,
        run.training,
        positions,
    )


def agree(run, found, within=0.01, exact_flops=True):
    """Compare what was predicted with what was measured."""
    ledger = run.ledger
    assert found.upload_bytes == ledger.upload
    assert found.download_bytes == ledger.download
    assert found.broadcast_bytes == ledger.broadcast_size
    assert found.turns == sum(len(row["clients"]) for row in run.rounds)
    if exact_flops:
        assert found.flops == run.flops
    assert found.memory.keys() == run.instruments.memory.keys()
    for label, measured in run.instruments.memory.items():
        assert found.memory[label].parameter == measured.parameter
        assert found.memory[label].gradient == measured.gradient
        held = found.memory[label].method
        assert held == pytest.approx(measured.method, abs=0.002 * measured.peak), label
        assert found.memory[label].peak == pytest.approx(measured.peak, rel=within), label


def ran(name, place, **options):
    run = worlds.federation(name, place, **options)
    run.run()
    return run


@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
def test_prediction_is_measurement_for_every_method(name, settings, place, padded):
    run = ran(name, place, **defaults(name, settings))
    found = predicted(run, place)
    # A choice of block by its gradient needs values, and FLOPs depend on the block.
    agree(run, found, exact_flops=settings.get("order") != "gradient")
    assert found.exchanged == sum(run.server.tensors[name].numel() for name in run.method.exchanged)


# What a family or a kind of task can spoil, the core methods show; each other method is predicted in one.
CORE = ("fedavg", "fedcybgd", "fedlora", "fedprompt")
FEWER = [case for number, case in enumerate(KINDS) if case[0] in CORE or number % 5 == 0]


@pytest.mark.parametrize(("name", "family", "kind"), FEWER)
def test_prediction_is_measurement_in_each_family_and_kind(name, family, kind, place, padded):
    run = ran(name, place, family=family, kind=kind, rounds=1, **defaults(name, {}))
    agree(run, predicted(run, place, family=family))


@pytest.mark.parametrize("family", ["bloom", "glm", "mobillama"])
@pytest.mark.parametrize("name", ["fedavg", "fedcybgd", "fedlora"])
def test_prediction_is_measurement_in_further_families(name, family, place, padded):
    run = ran(name, place, family=family, kind="causal", rounds=1)
    agree(run, predicted(run, place, family=family))


@pytest.mark.parametrize(
    "options",
    [
        {"training": {"accumulation": 2}},
        {"training": {"optimizer": "sgd", "momentum": 0.9}, "moments": "handed_on"},
        {"training": {"autocast": "bfloat16"}},
        {"training": {"largest_gradient_norm": 1.0, "local_epochs": 2}},
        {"model": {"weights": "bfloat16"}, "payload": "bfloat16"},
        {"model": {"gradient_checkpointing": True}},
        {"federation": {"dropout_rate": 0.5, "participation": 0.7}, "clients": 5},
        {"scheme": {"scheme": "quantity", "alpha": 0.5}, "clients": 4},
        {"cache": "last_visit", "order": "shifted", "rounds": 3},
        {"cache": "pretrained", "compression": {"operator": "stale", "share": 0.5}, "rounds": 3},
        {"compression": {"operator": "prune", "sparsity": 0.6, "criterion": "magnitude"}},
        {"compression": {"operator": "quantize"}},
        {"compression": {"operator": "layer_drop", "rate": 0.5}},
    ],
    ids=str,
)
def test_prediction_is_measurement_under_every_lever(options, place, padded):
    run = ran("fedcybgd", place, **options)
    agree(run, predicted(run, place, options.get("model")))


def test_prediction_is_measurement_where_batches_weigh_by_their_targets(place, padded):
    """A language model's batches have unequal numbers of targets, which only the labels' values tell."""
    run = ran("fedcybgd", place, family="gpt2", kind="causal", training={"accumulation": 2, "batch_size": 2})
    agree(run, predicted(run, place, family="gpt2"))


def test_the_peak_is_that_of_the_costliest_round(place, padded):
    """RoLoRA trains B, which needs A(x), and then A, which needs the layer's input: many more activations."""
    settings = {"variant": "rolora", "rank": 1, "targets": ["query", "value"]}
    first, both = (ran("fedlora", place, rounds=rounds, **settings) for rounds in (1, 2))
    assert both.instruments.memory["all"].activation > first.instruments.memory["all"].activation
    agree(both, predicted(both, place))


def test_between_measured_blocks_costs_are_interpolated_and_flops_stay_exact(tmp_path):
    source = ModelConfig(source=str(tiny.save(tmp_path / "deep", "roberta", layers=9, hidden=64)))

    def predict(order, positions, **settings):
        kind = discover_methods()["fedcybgd"]
        return prediction.predict(
            kind(kind.Config(order=order, **settings), 9, 0),
            source,
            "classification",
            2,
            [numpy.arange(8)] * 9,
            GivenBatches("classification", 32),
            FederationConfig(clients=9, rounds=2),
            Training(batch_size=8),
            positions,
        )

    for order, settings in (("ascending", {}), ("random", {"blocks_per_turn": 3})):
        exact, sampled = predict(order, None, **settings), predict(order, 3, **settings)
        assert not exact.interpolated and sampled.interpolated
        assert sampled.flops == exact.flops
        assert sampled.memory.keys() == exact.memory.keys()
        assert sampled.peak.peak == pytest.approx(exact.peak.peak, rel=0.001)
        for label, memory in exact.memory.items():
            assert sampled.memory[label].peak == pytest.approx(memory.peak, rel=0.1)
    assert len(sampled.interpolated) < len(sampled.memory)


def test_the_figures_of_the_paper_scale():
    """shared facts: RoBERTa-base 64 x 128 with its dropout, LLaMA-2-7B 1 x 512, float32, AdamW."""
    case = cases.case_of("roberta_base", "fedcybgd", loading={"dropout": "model"})
    found = cases.cost(case, 3)
    assert found.parameters == 124_647_170
    assert found.memory["block 0"].peak / GIB == pytest.approx(5.66, rel=0.02)
    assert found.memory["block 11"].peak / GIB == pytest.approx(1.19, rel=0.02)
    assert found.upload_bytes / found.turns / 4 / 124_647_170 == pytest.approx(0.062, abs=0.0005)
    whole = cases.cost(cases.case_of("roberta_base", "fedavg", loading={"dropout": "model"}), 3)
    assert whole.memory["all"].peak / GIB == pytest.approx(8.30, rel=0.02)
    llama = cases.cost(cases.case_of("llama2_7b", "fedcybgd"), 3)
    assert llama.parameters == 6_738_415_616
    assert llama.memory["block 0"].peak / GIB == pytest.approx(30.4, rel=0.02)
    assert llama.memory["block 31"].peak / GIB == pytest.approx(27.9, rel=0.02)
    assert llama.upload_bytes / llama.turns / 4 == pytest.approx(202_383_360, rel=1e-4)


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "fedlm", "costs", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )


def test_a_table_for_any_config_json(tmp_path):
    folder = tiny.save(tmp_path / "own", "gpt2")
    shape = tmp_path / "shape.json"
    shape.write_text((folder / "config.json").read_text())
    for source in (folder, shape):
        done = command(
            *("--model", source, "--method", "fedcybgd", "--method", "fedlora", "--length", 16),
            *("--output", tmp_path / "out"),
            *(("--figures", tmp_path / "drawn") if source == shape else ()),
        )
        assert done.returncode == 0, done.stderr
        assert "FedCyBGD" in done.stdout and "FedLoRA" in done.stdout
    rows = pandas.read_csv(tmp_path / "out/costs.csv")
    assert list(rows["method"]) == ["fedcybgd", "fedlora"]
    assert (rows["turn_queries"] == 0).all()
    parts = rows[[f"{kind}_bytes" for kind in measured_memory.KINDS]].sum(axis=1)
    assert (parts == rows["peak_memory_bytes"]).all()
    traffic = pandas.read_csv(tmp_path / "out/traffic_time.csv")
    sent = rows["turn_download_bytes"] + rows["turn_upload_bytes"]
    assert traffic["seconds_at_5_mbit"].tolist() == pytest.approx((sent * 8 / 5e6).tolist())
    fits = pandas.read_csv(tmp_path / "out/fits.csv")
    assert fits["fits_4_gb"].all()
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {
        f"{name}.{ending}"
        for name in ("memory", "memory_by_block", "bytes_a_round")
        for ending in ("pdf", "png")
    }


def test_predictions_for_the_jobs_of_a_study(tmp_path):
    study = tiny_study.write(tmp_path, methods={"fedavg": None, "local_only": None})
    done = command("--config", study, "--predictions", tmp_path / "predictions.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "predictions.json").read_text())
    (task,) = {key.split("/")[0] for key in found}
    assert set(found) == {f"{task}/fedavg", f"{task}/local_only"}
    for needs in found.values():
        assert needs["peak_memory_bytes"] > needs["parameter_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "roberta_base", "--length", 600], "--length: 600; allowed: at most 512"),
        (["--model", "bert_huge"], "model: unknown label 'bert_huge'"),
        (["--method", "fedsgd"], "--method: 'fedsgd'; allowed: blockllm, centralized"),
        (["--model", "minilm", "--weights", "int4"], "--weights: 'int4'"),
        (["--model", "minilm", "--kind", "poetry"], "--kind: 'poetry'; allowed: classification"),
        (["--model", "minilm", "--kind", "causal"], "reads text in both directions"),
        (["--model", "some/absent", "--method", "fedavg"], "the hub cannot be reached"),
        (["--predictions", "x.json"], "--predictions: needs --config"),
        (["--config", "absent.yaml"], "absent.yaml"),
    ],
    ids=str,
)
def test_bad_input_ends_in_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fedlm", "costs", *map(str, arguments)])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert program.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
