"""Costs are foretold: bytes and FLOPs exactly, memory within 1%, for every method in the folder."""

import pytest
import torch
import worlds
from test_methods import CASES, IDS, defaults

from fedlm import costs
from fedlm.data import Prepared
from fedlm.federation import _Batches
from fedlm.model_config import ModelConfig

GIB = 2**30


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other are slow where other processes use the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def padded(monkeypatch):
    """Let every batch hold padding: Transformers drops a mask that masks nothing, and fake ones never show."""
    batch = Prepared.batch

    def with_padding(data, indices):
        made = batch(data, indices)
        made["attention_mask"][0, -1] = 0
        return made

    monkeypatch.setattr(Prepared, "batch", with_padding)


def foretell(run, place, model=None, family="bert", positions=None):
    """Return the costs of a federation of tests/worlds.py, without its weights."""
    kind = run.data.kind
    method = type(run.method)(run.method.config, run.method.clients, run.seed)
    source = ModelConfig(source=str(worlds.folder(family, str(place))), **(model or {}))
    return costs.predict(
        method,
        source,
        kind,
        run.data.num_labels,
        run.parts,
        _Batches(run.data, torch.device("cpu")),
        run.settings,
        run.training,
        positions,
    )


def agree(run, found, within=0.01):
    """Compare what was foretold with what was measured."""
    ledger = run.ledger
    assert found.upload_bytes == ledger.upload
    assert found.download_bytes == ledger.download
    assert found.broadcast_bytes == ledger.broadcast_size
    assert found.turns == sum(len(row["clients"]) for row in run.rounds)
    assert found.flops == run.flops
    assert found.memory.keys() == run.instruments.memory.keys()
    for label, measured in run.instruments.memory.items():
        assert found.memory[label].parameter == measured.parameter
        assert found.memory[label].gradient == measured.gradient
        assert found.memory[label].peak == pytest.approx(measured.peak, rel=within), label


def ran(name, place, **options):
    run = worlds.federation(name, place, **options)
    run.run()
    return run


@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
def test_prediction_is_measurement_for_every_method(name, settings, place, padded):
    run = ran(name, place, **defaults(name, settings))
    found = foretell(run, place)
    agree(run, found)
    assert found.exchanged == sum(run.server.tensors[name].numel() for name in run.method.exchanged)
